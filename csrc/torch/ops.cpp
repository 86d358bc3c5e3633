// The operators on the CPU: memory and threads. The work is done by the row drivers of csrc/cpu.

#include "sparse.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/simd/storage.h"
#include "kept_memory.h"

namespace reptile_ext {
namespace {

const Device kCpu = {aoti_torch_device_type_cpu(), 0};
Device device_of(const Tensor&) { return kCpu; }

// Memory of this thread that is kept from call to call: a few rows of exponentials.
void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    memory.reset();
    capacity = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(4096, rounded));
    if (!memory) fail("out of memory for " + std::to_string(rounded) + " bytes of scratch");
    capacity = rounded;
  }
  return memory.get();
}

// The strides of empty_like: those of a tensor without holes, else without them and in the same order. False where that
// order is a matter of opinion: dimensions that overlap.
bool strides_like(const View& view, std::vector<int64_t>& strides) {
  std::vector<int64_t> order;  // from the innermost dimension outwards
  for (int64_t d = view.ndim - 1; d >= 0; --d) {
    if (view.strides[d] <= 0) return false;
    order.push_back(d);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return std::pair(view.strides[a], view.sizes[a]) < std::pair(view.strides[b], view.sizes[b]);
  });
  strides.resize(order.size());
  bool has_holes = false;
  int64_t dense = 1;
  for (int64_t d : order) {
    strides[size_t(d)] = dense;
    if (view.sizes[d] == 1) continue;
    if (view.strides[d] < dense) return false;
    has_holes |= view.strides[d] > dense;
    dense *= view.sizes[d];
  }
  if (!has_holes) std::copy_n(view.strides, view.ndim, strides.begin());
  return true;
}

// From memory that is kept, if it is large enough to be worth it and torch lets it be got back.
Tensor new_gradient(const Tensor& student) {
  const View view(student);
  const size_t bytes = bytes_of(view, "student");
  std::vector<int64_t> strides;
  if (!torch_from_blob || bytes < KeptMemory::kLeastBytes || bytes > KeptMemory::kMostBytes ||
      !strides_like(view, strides)) {
    Tensor gradient = fresh_gradient(student);
    advise_huge_pages(View(gradient).data, bytes);
    return gradient;
  }
  const Block block = KeptMemory::instance().take(bytes);
  if (!block.data) return fresh_gradient(student);  // which says that there is no memory
  const auto deleter = [](void* data, void* size) {
    KeptMemory::instance().give_back({data, reinterpret_cast<size_t>(size)});
  };
  AtenTensorHandle handle;
  if (torch_from_blob(block.data, view.ndim, view.sizes, strides.data(), 0, view.dtype, kCpu.type, -1, &handle,
                      aoti_torch_layout_strided(), nullptr, 0, deleter, reinterpret_cast<void*>(block.bytes)) != 0) {
    KeptMemory::instance().give_back(block);
    fail("PyTorch call failed: torch_from_blob");
  }
  return Tensor(handle);
}

// Calls f(begin, end) over [0, n) in chunks that threads fetch as they get free: rows that are masked cost nothing, so
// equal shares would not be equal work. Results do not depend on who does which row.
template <class F>
void parallel_rows(int64_t n, int64_t chunk, const F& f) {
  uint32_t num_threads = 1;
  if (n > chunk) TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&num_threads));
  if (num_threads <= 1) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
  struct Shared {
    const F& f;
    int64_t n, chunk;
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex mutex;
  } shared{f, n, chunk, {}, nullptr, {}};
  const auto work = [](int64_t, int64_t, void* context) {
    Shared& s = *static_cast<Shared*>(context);
    try {
      for (int64_t begin; (begin = s.next.fetch_add(s.chunk)) < s.n;) s.f(begin, std::min(begin + s.chunk, s.n));
    } catch (...) {  // may not cross the C boundary
      std::lock_guard<std::mutex> lock(s.mutex);
      s.error = std::current_exception();
    }
  };
  const int64_t workers = std::min<int64_t>(num_threads, (n + chunk - 1) / chunk);
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, workers, 1, work, &shared));
  if (shared.error) std::rethrow_exception(shared.error);
}

// Weights of the rows, 0 for ignored ones; empty if all are 1. Checks the labels, before anything is written.
std::vector<double> row_weights(const Arguments& a, const LossProblem& p, double* total) {
  const int64_t n = p.num_rows;
  *total = double(n);
  if (!a.labels && !a.weight) return {};
  std::vector<double> weights(size_t(n), 1.0);
  if (a.weight) {
    std::copy_n(weight_data(*a.weight, n), n, weights.begin());
    for (double w : weights) {
      if (!(w >= 0 && w < std::numeric_limits<double>::infinity())) {
        fail("weight must be finite and not negative; got " + std::to_string(w));
      }
    }
  }
  if (p.labels) {
    const int64_t least = p.part == Part::kLoss ? 0 : -1;  // −1: its class is not among those at hand
    for (int64_t r = 0; r < n; ++r) {
      const int64_t label = p.labels[r];
      if (label == a.ignore_index) {
        weights[r] = 0;
      } else if (weights[r] != 0 && (label < least || label >= p.vocab_size)) {
        fail("labels must lie in [0, " + std::to_string(p.vocab_size) +
             ") or equal ignore_index=" + std::to_string(a.ignore_index) + "; got " + std::to_string(label));
      }
    }
  }
  *total = 0;
  for (double w : weights) *total += w;
  return weights;
}

// Rows that one thread takes at a time.
int64_t rows_per_task(int64_t vocab_size) {
  constexpr int64_t kPairsPerTask = 1 << 15;  // below this, waking a thread costs more than it does
  const int64_t rows = std::max<int64_t>(1, kPairsPerTask / vocab_size);
  return rows > 64 ? rows / 64 * 64 : rows;  // whole pairs of vectors of rows that lie side by side
}

void run_rows(const LossProblem& p) {
  const Kernels& kernels = *current_instruction_set().kernels;
  const size_t scratch = kernels.scratch_bytes(p);
  parallel_rows(p.num_rows, rows_per_task(std::max<int64_t>(1, p.vocab_size)),
                [&](int64_t begin, int64_t end) { kernels.loss_rows(p, begin, end, thread_scratch(scratch)); });
}

// The loss is scale / divisor · Σ w ℓ; `total` is Σ w.
double divisor_of(const Arguments& a, double total) {
  if (a.denominator) {
    const double divisor = *denominator_data(*a.denominator);
    if (total == 0) return 1;  // nothing counts: the loss is 0, whatever it is to be divided by
    if (!(divisor > 0 && divisor < std::numeric_limits<double>::infinity())) {
      fail("denominator must be positive and finite; got " + std::to_string(divisor));
    }
    return divisor;
  }
  return a.reduction == int64_t(Reduction::kMean) && total != 0 ? total : 1;  // of nothing 0, not NaN
}

// The loss of rows [leading]; `run` computes p.row_losses, and the gradient.
template <class Run>
Tensor loss_of_rows(const Arguments& a, LossProblem& p, const std::vector<int64_t>& leading, const Run& run) {
  double total = 0;
  const std::vector<double> weights = row_weights(a, p, &total);
  if (!weights.empty()) p.weights = weights.data();
  p.gradient_scale = a.scale / divisor_of(a, total);

  const int32_t loss_dtype = is_double(p) ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const bool none = a.reduction == int64_t(Reduction::kNone);
  Tensor loss = new_tensor(kCpu, none ? int64_t(leading.size()) : 0, leading.data(), loss_dtype);

  std::vector<double> row_losses(static_cast<size_t>(p.num_rows));
  p.row_losses = row_losses.data();
  run();

  void* out = View(loss).data;
  const auto write = [&](int64_t i, double value) {
    if (is_double(p)) {
      static_cast<double*>(out)[i] = value;
    } else {
      static_cast<float*>(out)[i] = static_cast<float>(value);
    }
  };
  if (none) {
    for (int64_t r = 0; r < p.num_rows; ++r) write(r, row_losses[r] * p.gradient_scale);
  } else {
    double sum = 0;  // in row order, whoever computed the rows
    for (double row_loss : row_losses) sum += row_loss;
    write(0, sum * p.gradient_scale);
  }
  return loss;
}

Tensor run(const Arguments& a, const View& student, const View* gradient, const Combined* combined) {
  std::vector<int64_t> leading;
  LossProblem p = problem_of(a, student, gradient, leading, combined ? Part::kGradient : Part::kLoss);
  if (combined) combined->put_into(p);
  return loss_of_rows(a, p, leading, [&] { run_rows(p); });
}

// What rounding to 16 bits may make of a logarithm that is not above 0, and more; and of a sum of probabilities, each
// of which it changes by 3 % at most where it has a share in the sum.
constexpr double kLargestLogProb = 0.1, kLargestMass = 1.1;

// Whether the indices of a row that counts are in range and differ, and its log-probabilities are some. `slots` is
// memory for 4 · kMostListed numbers.
void check_list(const SparseProblem& p, int64_t row, bool truncate, int32_t* slots) {
  const int64_t vocab_size = p.rows.vocab_size;
  uint32_t num_slots = 16;
  while (num_slots < 2 * p.k) num_slots *= 2;
  std::fill_n(slots, num_slots, -1);
  const int64_t* ids = p.indices + row * p.k;
  for (int64_t i = 0; i < p.k; ++i) {
    const int64_t id = ids[i];
    if (id < -1 || (id >= vocab_size && !truncate)) {
      fail("teacher_indices must lie in [-1, " + std::to_string(vocab_size) + "), -1 for none" +
           (id < 0 ? "" : ", or pass vocab='truncate' to leave out classes that the student does not have") + "; got " +
           std::to_string(id));
    }
    if (id < 0) continue;
    uint32_t slot = uint32_t(uint64_t(id) * 0x9e3779b97f4a7c15u >> 40) & (num_slots - 1);
    for (; slots[slot] >= 0; slot = (slot + 1) & (num_slots - 1)) {
      if (ids[slots[slot]] == id) {
        fail("teacher_indices must differ from one another in a row; got " + std::to_string(id) + " twice");
      }
    }
    slots[slot] = int32_t(i);
  }
}

template <class T>
void check_log_probs(const SparseProblem& p, int64_t row) {
  const T* y = static_cast<const T*>(p.log_probs.data) + row * p.k;
  for (int64_t i = 0; i < p.k; ++i) {
    if (p.indices[row * p.k + i] >= 0 && to_float(y[i]) > kLargestLogProb) {
      fail("teacher_log_probs must be logarithms of probabilities, at most 0 but for rounding; got " +
           std::to_string(to_float(y[i])) + " (top_k_targets makes them of logits)");
    }
  }
  // Probabilities in their place, which lie below the bound if each is small, add up to about k. A float's bits, taken
  // for an integer, are its logarithm but for what a chord lies above its arc, up to 6 %: so the first sum is none too
  // small, costs next to nothing, and is enough for nearly all rows.
  float bound = 0;
  for (int64_t i = 0; i < p.k; ++i) {
    const float log_prob = p.indices[row * p.k + i] >= 0 ? float(to_float(y[i])) : -80;
    const int32_t bits = int32_t((log_prob > -80 ? log_prob : -80) * 12102203.0f) + 0x3f800000;  // 2^23 log2 e
    float at_least;
    std::memcpy(&at_least, &bits, sizeof(bits));
    bound += at_least;
  }
  if (!(bound > kLargestMass)) return;
  double mass = 0;
  for (int64_t i = 0; i < p.k; ++i) {
    if (p.indices[row * p.k + i] >= 0) mass += std::exp(double(to_float(y[i])));
  }
  if (mass > kLargestMass) {
    fail("teacher_log_probs must be logarithms of probabilities, which add up to 1 at most; got a row of sum " +
         std::to_string(mass) + " (F.log_softmax over all classes, or top_k_targets, makes them of logits)");
  }
}

constexpr int64_t kLogitsPerTask = 1 << 17, kTasksOfManyRows = 64;

Tensor run_sparse(const Arguments& a, const Tensor& indices, const Tensor& log_probs, int64_t tail, bool truncate,
                  const View& student, const View* gradient) {
  std::vector<int64_t> leading;
  SparseProblem p = sparse_problem_of(a, indices, log_probs, tail, student, gradient, leading);
  const Selection set = current_instruction_set();
  const int64_t vocab_size = std::max<int64_t>(1, p.rows.vocab_size);
  // Several rows at a time, where there are enough for all threads: the first one of a task waits for memory, and what
  // is read ahead at the end of a row is the next one's. Of the longest rows one, so that threads end at the same time.
  const int64_t chunk =
      std::max(rows_per_task(vocab_size), std::min(kLogitsPerTask / vocab_size, p.rows.num_rows / kTasksOfManyRows));
  return loss_of_rows(a, p.rows, leading, [&] {
    // All of it before anything is written.
    parallel_rows(p.rows.num_rows, std::max<int64_t>(1, (1 << 13) / p.k), [&](int64_t begin, int64_t end) {
      std::vector<int32_t> slots(size_t(4 * p.k + 16));
      for (int64_t r = begin; r < end; ++r) {
        if (p.rows.weights && p.rows.weights[r] == 0) continue;
        check_list(p, r, truncate, slots.data());
        switch (p.log_probs.dtype) {
          case DType::kFloat32:
            check_log_probs<float>(p, r);
            break;
          case DType::kBFloat16:
            check_log_probs<BFloat16>(p, r);
            break;
          case DType::kFloat16:
            check_log_probs<Float16>(p, r);
            break;
          case DType::kFloat64:
            check_log_probs<double>(p, r);
            break;
        }
      }
    });
    const size_t scratch = set.sparse_kernels->scratch_bytes(p, *set.kernels);
    parallel_rows(p.rows.num_rows, chunk, [&](int64_t begin, int64_t end) {
      set.sparse_kernels->loss_rows(p, *set.kernels, begin, end, thread_scratch(scratch));
    });
  });
}

Tensor run_stats(const Arguments& a, const View& student, Part part, int count, const OptionalTensor& maxima,
                 const OptionalTensor& sums) {
  std::vector<int64_t> leading;
  LossProblem p = problem_of(a, student, nullptr, leading, part);
  double total = 0;
  const std::vector<double> weights = row_weights(a, p, &total);
  if (!weights.empty()) p.weights = weights.data();
  Stats stats = stats_of(p, part, count, maxima, sums, kCpu);
  std::memset(stats.data, 0, size_t(p.num_rows) * size_t(count) * sizeof(double));  // of rows that are ignored
  run_rows(p);
  return std::move(stats.tensor);
}

// gradient · factor, where the gradient lies: one factor for all, or one a row. Nothing to do where it is 1. Ignored
// rows (by `labels` and `weight`) and the classes from `vocab_size` on are 0 and stay 0, even times an infinity or NaN.
void scale_gradient_(const Tensor& gradient, const Tensor& factor, const std::optional<Tensor>& labels,
                     const std::optional<Tensor>& weight, int64_t ignore_index, int64_t vocab_size, int64_t dim) {
  const View view(gradient), factor_view(factor);
  const LossProblem p = scale_problem(view, factor_view, vocab_size, dim);
  bool is_uniform = factor_view.ndim == 0;
  std::vector<double> factors(is_uniform ? 1 : static_cast<size_t>(p.num_rows));
  if (factor_view.dtype == aoti_torch_dtype_float64()) {
    std::copy_n(static_cast<const double*>(factor_view.data), factors.size(), factors.begin());
  } else {
    std::copy_n(static_cast<const float*>(factor_view.data), factors.size(), factors.begin());
  }
  if (std::all_of(factors.begin(), factors.end(), [](double f) { return f == 1; })) return;
  const bool finite = std::all_of(factors.begin(), factors.end(), [](double f) { return std::isfinite(f); });
  if (!finite && (labels || weight)) {
    if (is_uniform) factors.resize(static_cast<size_t>(p.num_rows), factors[0]);
    is_uniform = false;
    if (labels) {
      const int64_t* data = label_data(*labels, p.num_rows);
      for (int64_t r = 0; r < p.num_rows; ++r) factors[r] = data[r] == ignore_index ? 0 : factors[r];
    }
    if (weight) {
      const double* data = weight_data(*weight, p.num_rows);
      for (int64_t r = 0; r < p.num_rows; ++r) factors[r] = data[r] == 0 ? 0 : factors[r];
    }
  }
  const Kernels& kernels = *current_instruction_set().kernels;
  parallel_rows(p.num_rows, rows_per_task(std::max<int64_t>(1, p.gradient_size)),
                [&](int64_t begin, int64_t end) { kernels.scale_rows(p, factors.data(), is_uniform, begin, end); });
}

// ------------------------------------------------------------- elements that are distributions of their own:
// binary.cpp

int64_t num_blocks(const BinaryProblem& p) { return (p.num_elements + kElementsPerBlock - 1) / kElementsPerBlock; }

// Calls f(begin, end) over the blocks, on the threads there are.
template <class F>
void parallel_blocks(const BinaryProblem& p, const F& f) {
  parallel_rows(num_blocks(p), rows_per_task(kElementsPerBlock), f);
}

Tensor run_binary(const Arguments& a, const OptionalTensor& pos_weight, const View& student, const View* gradient) {
  BinaryProblem p;
  Tensor loss = binary_problem(a, pos_weight, student, gradient, kCpu, p);
  const View loss_view(loss);
  // Of the backward pass, one for all: it belongs to the gradient alone; the loss is then of no interest.
  const double* const grad_output = uniform_grad_output(a);
  const BinaryKernels& kernels = *current_instruction_set().binary_kernels;
  std::vector<double> sums(size_t(num_blocks(p)), 0.0);
  p.sums = sums.data();
  const auto total = [&sums] {  // in order, whoever computed them
    double sum = 0;
    for (double x : sums) sum += x;
    return sum;
  };
  double total_weight = double(p.num_elements);
  if (p.labels.data || p.weight.data || p.pos_weight.data) {
    parallel_blocks(p, [&](int64_t begin, int64_t end) {
      const WrongValue wrong = kernels.weights(p, begin, end);
      if (!wrong.name) return;
      const bool is_label = std::strcmp(wrong.name, "labels") == 0;
      fail(wrong.name +
           (is_label ? " must lie between 0 and 1 or equal ignore_index=" + std::to_string(a.ignore_index)
                     : std::string(" must be finite and not negative")) +
           "; got " + std::to_string(wrong.value));
    });
    total_weight = total();
  }
  p.scale = a.scale / divisor_of(a, total_weight);
  const double loss_scale = p.scale;
  if (grad_output) p.scale *= *grad_output;
  parallel_blocks(p, [&](int64_t begin, int64_t end) { kernels.loss(p, begin, end); });
  if (a.reduction != int64_t(Reduction::kNone)) {
    const double value = total() * loss_scale;
    if (loss_view.dtype == aoti_torch_dtype_float64()) {
      *static_cast<double*>(loss_view.data) = value;
    } else {
      *static_cast<float*>(loss_view.data) = static_cast<float>(value);
    }
  }
  return loss;
}

// gradient · factor, where the gradient lies: one factor for all, or one an element. As scale_gradient_.
void scale_elements_(const Tensor& gradient, const Tensor& factor, const std::optional<Tensor>& labels,
                     const std::optional<Tensor>& weight, int64_t ignore_index) {
  const View view(gradient), factor_view(factor);
  if (factor_view.ndim == 0) {
    const double f = factor_view.dtype == aoti_torch_dtype_float64()   ? *static_cast<const double*>(factor_view.data)
                     : factor_view.dtype == aoti_torch_dtype_float32() ? *static_cast<const float*>(factor_view.data)
                                                                       : 0;
    if (f == 1) return;
  }
  const BinaryProblem p = scale_elements_problem(view, factor_view, labels, weight, ignore_index);
  const BinaryKernels& kernels = *current_instruction_set().binary_kernels;
  parallel_blocks(p, [&](int64_t begin, int64_t end) { kernels.scale(p, begin, end); });
}

}  // namespace
}  // namespace reptile_ext

STABLE_TORCH_LIBRARY(reptile_ext, m) {
  REPTILE_EXT_DEFINE(m);
  REPTILE_EXT_DEFINE_SPARSE(m);
}

STABLE_TORCH_LIBRARY_IMPL(reptile_ext, CPU, m) {
  REPTILE_EXT_IMPLEMENT(m);
  REPTILE_EXT_IMPLEMENT_SPARSE(m);
}

// Through ctypes: gives back the memory that is kept for gradients; and how many bytes that is.
extern "C" __attribute__((visibility("default"))) void reptile_ext_release_memory() {
  reptile_ext::KeptMemory::instance().release();
}
extern "C" __attribute__((visibility("default"))) size_t reptile_ext_kept_memory() {
  return reptile_ext::KeptMemory::instance().kept();
}

// For the test-suite and `reptile doctor`, through ctypes: the set in use; with a name, use that one from now on. Null
// if there is no such set on this machine; `error`, of `size` bytes, then says so.
extern "C" __attribute__((visibility("default"))) const char* reptile_ext_instruction_set(const char* name, char* error,
                                                                                          size_t size) {
  try {
    return (name ? reptile_ext::select_instruction_set(name) : reptile_ext::current_instruction_set()).name;
  } catch (const std::exception& exception) {
    std::strncpy(error, exception.what(), size - 1);
    error[size - 1] = 0;
    return nullptr;
  }
}
