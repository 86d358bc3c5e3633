// The device of csrc/torch/ops_cuda.cpp, on a host: properties that a test sets, and the names of memory for host.h.
#pragma once

#include "host.h"

namespace reptile_ext {
namespace {

struct Settings {
  int num_multiprocessors = 4;
  bool has_clusters = true;
  host::Order order = host::Order::kInTurn;
};
Settings settings;

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) : device{aoti_torch_device_type_cpu(), 0} {
    host::ranges.clear();
    host::order = settings.order;
  }
  DeviceProperties properties() const { return {settings.num_multiprocessors, settings.has_clusters}; }
  void names(const void* begin, size_t bytes) const {
    if (begin) host::ranges.emplace_back(uintptr_t(begin), uintptr_t(begin) + bytes);
  }

  Device device;
  void* stream = nullptr;
};

}  // namespace
}  // namespace reptile_ext

extern "C" __attribute__((visibility("default"))) void reptile_ext_host(int num_multiprocessors, int has_clusters,
                                                                        int order) {
  reptile_ext::settings = {num_multiprocessors, has_clusters != 0, reptile_ext::host::Order(order)};
}

// How many loads of 16 bytes there were since the last time.
extern "C" __attribute__((visibility("default"))) int64_t reptile_ext_host_whole_loads() {
  const int64_t found = reptile_ext::host::whole_loads;
  reptile_ext::host::whole_loads = 0;
  return found;
}
