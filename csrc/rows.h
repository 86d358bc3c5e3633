// What a row driver is asked to do, in plain C: pointers, strides, numbers. No framework, no templates.
//
// A problem is `num_rows` pairs of rows, student logits and teacher logits, of `vocab_size` classes each. Rows need
// not be neighbours in memory: row n is found by splitting n into indices of `row_sizes` (row-major, the leading
// shape of the tensors with neighbouring dimensions merged where all operands allow it) and going
// `row_strides[i]` elements along each. Strides are in elements and 64-bit throughout.
#pragma once

#include <cstddef>
#include <cstdint>

namespace reptile_ext {

// PyTorch's limit is 64 dimensions; one of them holds the classes.
constexpr int kMaxRowDims = 63;

// Positions match KERNELS and REDUCTIONS in reptile_ext/arguments.py. The mirrored ones are a divergence with the roles
// of student and teacher exchanged, for the gradient of a teacher who learns; the others are each other's mirror.
enum class Divergence : int {
  kForwardKl,
  kReverseKl,
  kSymmetricKl,
  kJsd,
  kSkewKl,
  kSkewReverseKl,
  kTvd,
  kHellinger,
  kSoftCrossEntropy,
  kMse,
  kDkd,
  kMirroredSoftCrossEntropy,
  kMirroredDkd,
};
constexpr int kNumDivergences = 13;
static constexpr bool needs_labels(Divergence kind) {
  return kind == Divergence::kDkd || kind == Divergence::kMirroredDkd;
}
enum class Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

static constexpr size_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// One [..., V] operand: where its first element is and how far apart its rows and classes are.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t class_stride = 1;
  int64_t row_strides[kMaxRowDims] = {};
};

struct LossProblem {
  int64_t num_rows = 0;
  int64_t vocab_size = 0;     // classes that are compared
  int64_t gradient_size = 0;  // classes of a gradient row: those past vocab_size are set to zero
  int num_row_dims = 0;
  int64_t row_sizes[kMaxRowDims] = {};
  Operand student, teacher;
  Operand gradient;  // data == nullptr: the loss alone. May be the student's own memory.

  Divergence divergence = Divergence::kForwardKl;
  double beta = 0, omega = 1;  // β and 1 − β, both given: from one near 1 the other cannot be had
  double student_temperature = 1, teacher_temperature = 1;
  double soft_scale = 1;  // soft_weight · S
  double hard_weight = 0, label_smoothing = 0;

  const int64_t* labels = nullptr;   // [num_rows]; if hard_weight > 0 or needs_labels; in range where a row is in
  const double* weights = nullptr;   // [num_rows], nullptr: all 1. A row with weight 0 is out: never read, gradient 0
  double gradient_scale = 1;         // on top of the row's weight: 1 / denominator
  const double* upstream = nullptr;  // what comes from above and multiplies the gradient, one a row or one for all;
  bool upstream_is_uniform = true;   // nullptr: 1

  double* row_losses = nullptr;  // [num_rows], written: weight · loss of the row
};

// What an instruction set brings. Each function does rows [begin, end).
struct Kernels {
  // Bytes of scratch a thread needs for this problem.
  size_t (*scratch_bytes)(const LossProblem& problem);
  // `scratch` is the calling thread's own, of that size, aligned to 64.
  void (*loss_rows)(const LossProblem& problem, int64_t begin, int64_t end, void* scratch);
  // gradient row n times factors[n], or times factors[0] if is_uniform; of the problem only the shape and `gradient`
  // are looked at.
  void (*scale_rows)(const LossProblem& problem, const double* factors, bool is_uniform, int64_t begin, int64_t end);
};

}  // namespace reptile_ext
