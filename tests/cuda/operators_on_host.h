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
  DeviceProperties properties() const {
    DeviceProperties found;
    found.num_multiprocessors = settings.num_multiprocessors;
    found.set_generation(settings.has_clusters);
    return found;
  }
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

// How many there were since the last time: loads of 16 bytes, exponentials in float32, bytes that copies brought,
// launches.
extern "C" __attribute__((visibility("default"))) void reptile_ext_host_counts(int64_t* numbers) {
  namespace host = reptile_ext::host;
  const int64_t found[] = {host::whole_loads, host::exponentials, host::bulk_bytes, host::launches};
  for (int i = 0; i < 4; ++i) numbers[i] = found[i];
  host::whole_loads = host::exponentials = host::bulk_bytes = host::launches = 0;
}
