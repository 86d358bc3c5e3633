// PyTorch's stable ABI, target 2.10: the C++ faces that ops.cpp needs (STABLE_TORCH_LIBRARY, TORCH_BOX, Tensor).
//
// Where PyTorch's own headers are on the include path (CMake option REPTILE_EXT_TORCH_INCLUDE) they are used. Where
// they are not, which is the normal build, the few C functions of the ABI that this library calls are declared here
// together with as much of the C++ faces as ops.cpp uses, under the same names and with the same meaning. So building
// needs no torch at all: not a matching one, not a second one that an isolated build environment would have to
// download. The ABI promises that these declarations hold for torch 2.10 and every later one, and the test-suite
// compiles this file's declarations together with PyTorch's (tests/test_build.py), where any difference is an error.
//
// docs/design.md ("Building without torch") has the whole argument.
#pragma once

#define TORCH_TARGET_VERSION 0x020A000000000000  // 2.10

#if defined(REPTILE_EXT_USE_TORCH_HEADERS)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#else

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

extern "C" {
struct AtenTensorOpaque;
struct TorchLibraryOpaque;
struct DeviceGuardOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;
using DeviceGuardHandle = DeviceGuardOpaque*;
using StableIValue = uint64_t;
using AOTITorchError = int32_t;

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_layout_strided();
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle orig_handle, AtenTensorHandle* new_handle);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* ret_dim);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** ret_sizes);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** ret_strides);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* ret_dtype);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* ret_device_type);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* ret_device_index);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** ret_data_ptr);
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes_ptr, const int64_t* strides_ptr,
                                        int32_t dtype, int32_t device_type, int32_t device_index,
                                        AtenTensorHandle* ret_new_tensor);
AOTITorchError aoti_torch_library_init_def(const char* ns, const char* file, uint32_t line,
                                           TorchLibraryHandle* ret_new_torch_lib);
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* k, const char* file, uint32_t line,
                                            TorchLibraryHandle* ret_new_torch_lib);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle self, const char* schema);
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle tlh);
AOTITorchError torch_library_impl(TorchLibraryHandle self, const char* name,
                                  void (*fn)(StableIValue*, uint64_t, uint64_t), uint64_t extension_build_version);
AOTITorchError torch_call_dispatcher(const char* opName, const char* overloadName, StableIValue* stack,
                                     uint64_t extension_build_version);
AOTITorchError aoti_torch_create_device_guard(int32_t device_index, DeviceGuardHandle* ret_guard);
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard);
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
typedef void (*ParallelFunc)(int64_t begin, int64_t end, void* ctx);
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func, void* ctx);
AOTITorchError torch_get_num_threads(uint32_t* out_num_threads);
}

#define TORCH_ABI_VERSION TORCH_TARGET_VERSION
#define TORCH_ERROR_CODE_CHECK(call)                                          \
  do {                                                                        \
    if ((call) != 0) throw std::runtime_error("PyTorch call failed: " #call); \
  } while (0)

namespace torch::stable {

// Owns one reference to a tensor.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  AtenTensorHandle handle_;
};

namespace detail {

// The ABI passes every argument as 64 bits: numbers and handles as they are, an optional as a pointer to 64 bits on
// the heap, which the receiver frees, or null.
template <class T>
struct Convert {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(StableIValue));
  static T to(StableIValue value) {
    T result;
    std::memcpy(&result, &value, sizeof(T));
    return result;
  }
  static StableIValue from(T value) {
    StableIValue result = 0;
    std::memcpy(&result, &value, sizeof(T));
    return result;
  }
};
template <>
struct Convert<Tensor> {
  static Tensor to(StableIValue value) { return Tensor(Convert<AtenTensorHandle>::to(value)); }
  static StableIValue from(Tensor&& tensor) { return Convert<AtenTensorHandle>::from(tensor.release()); }
};
template <class T>
struct Convert<std::optional<T> > {
  static std::optional<T> to(StableIValue value) {
    StableIValue* inner = Convert<StableIValue*>::to(value);
    if (!inner) return std::nullopt;
    std::optional<T> result(Convert<T>::to(*inner));
    delete inner;
    return result;
  }
};

template <class Function, Function* function>
struct Boxer;
template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxer<Result(Parameters...), function> {
  static void call(StableIValue* stack, uint64_t num_inputs, uint64_t /*num_outputs*/) {
    if (num_inputs != sizeof...(Parameters)) throw std::runtime_error("operator schema and kernel differ");
    run(stack, std::index_sequence_for<Parameters...>{});
  }

 private:
  template <size_t... I>
  static void run(StableIValue* stack, std::index_sequence<I...>) {
    // Braces: arguments are taken off the stack in order.
    std::tuple<std::decay_t<Parameters>...> arguments{Convert<std::decay_t<Parameters> >::to(stack[I])...};
    if constexpr (std::is_void_v<Result>) {
      std::apply(function, arguments);
    } else {
      push(stack, std::apply(function, arguments));
    }
  }
  static void push(StableIValue* stack, Tensor&& result) { stack[0] = Convert<Tensor>::from(std::move(result)); }
  static void push(StableIValue* stack, std::tuple<Tensor, Tensor>&& result) {
    stack[0] = Convert<Tensor>::from(std::move(std::get<0>(result)));
    stack[1] = Convert<Tensor>::from(std::move(std::get<1>(result)));
  }
};

class StableLibrary {
 public:
  StableLibrary(const char* ns, const char* key, const char* file, uint32_t line) {
    TORCH_ERROR_CODE_CHECK(key ? aoti_torch_library_init_impl(ns, key, file, line, &library_)
                               : aoti_torch_library_init_def(ns, file, line, &library_));
  }
  StableLibrary(const StableLibrary&) = delete;
  ~StableLibrary() { aoti_torch_delete_library_object(library_); }
  void def(const char* schema) { TORCH_ERROR_CODE_CHECK(aoti_torch_library_def(library_, schema)); }
  void impl(const char* name, void (*fn)(StableIValue*, uint64_t, uint64_t)) {
    TORCH_ERROR_CODE_CHECK(torch_library_impl(library_, name, fn, TORCH_ABI_VERSION));
  }

 private:
  TorchLibraryHandle library_;
};

struct StableTorchLibraryInit {
  StableLibrary library;
  StableTorchLibraryInit(void (*fill)(StableLibrary&), const char* ns, const char* key, const char* file, uint32_t line)
      : library(ns, key, file, line) {
    fill(library);
  }
};

}  // namespace detail

// The dispatcher takes over the references it is passed, hence a new one of `self`.
inline Tensor empty_like(const Tensor& self) {
  AtenTensorHandle again;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(self.get(), &again));
  // aten::empty_like(self, dtype, layout, device, pin_memory, memory_format), all but the first left out.
  StableIValue stack[6] = {detail::Convert<AtenTensorHandle>::from(again), 0, 0, 0, 0, 0};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
  return detail::Convert<Tensor>::to(stack[0]);
}

}  // namespace torch::stable

#define TORCH_BOX(f) (&torch::stable::detail::Boxer<std::remove_pointer_t<decltype(f)>, f>::call)
#define STABLE_TORCH_LIBRARY(ns, m) REPTILE_EXT_LIBRARY(ns, def, nullptr, m)
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) REPTILE_EXT_LIBRARY(ns, key, #key, m)
#define REPTILE_EXT_LIBRARY(ns, id, key, m)                                                                          \
  static void fill_##ns##_##id(torch::stable::detail::StableLibrary&);                                               \
  static const torch::stable::detail::StableTorchLibraryInit init_##ns##_##id(&fill_##ns##_##id, #ns, key, __FILE__, \
                                                                              __LINE__);                             \
  static void fill_##ns##_##id(torch::stable::detail::StableLibrary& m)

#endif

// Of torch 2.11 and later: a tensor of memory that the caller brings, and what is to be called when its storage goes.
// Null in torch 2.10.
extern "C" {
AOTITorchError torch_from_blob(void* data, int64_t ndim, const int64_t* sizes_ptr, const int64_t* strides_ptr,
                               int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                               AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
                               int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx), void* deleter_ctx);
}
#pragma weak torch_from_blob
