// The pybind11 module `_C`: what is Python's own. It needs no torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../cpu/dispatch.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = REPTILE_EXT_VERSION;
#if defined(__clang__)
  info["compiler"] = "Clang " __clang_version__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["torch_abi"] = "2.10";
  info["build_type"] = REPTILE_EXT_BUILD_TYPE;
  int count;
  const reptile_ext::InstructionSet* sets = reptile_ext::instruction_sets(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(sets[i].name);
  info["instruction_sets"] = names;
  return info;
}

py::dict cpu_info() {
  py::dict info;
  info["machine"] = REPTILE_EXT_MACHINE;
  int count;
  const reptile_ext::InstructionSet* sets = reptile_ext::instruction_sets(&count);
  std::vector<std::string> supported;
  for (int i = 0; i < count; ++i) {
    if (sets[i].is_supported()) supported.emplace_back(sets[i].name);
  }
  info["supported"] = supported;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and processor information of reptile_ext.";
  m.def("build_info", &build_info, "How this build was made: version, compiler, torch ABI, instruction sets compiled in.");
  m.def("cpu_info", &cpu_info, "This processor: its machine name and the compiled-in instruction sets it can run.");
}
