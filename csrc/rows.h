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

// Which functor of divergence.h, where the registry that numbers them is.
enum class Divergence : int;

// What becomes of the rows' losses, and the names that Python knows these by, in the same order.
enum class Reduction : int { kNone, kMean, kSum };
constexpr const char* kReductionNames[] = {"none", "mean", "sum"};

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

static constexpr size_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// What a driver computes of a row. The loss is made of two named halves, row_stats and row_gradient; the fused call
// does both in one go. Where something lies between them, such as the classes that other processes hold, they are
// called apart, and what one call finds of the classes at hand is combined with the others' (the larger of the maxima,
// the sum of the sums) before it goes into the next.
enum class Part : int {
  kLoss,         // both halves
  kMaxima,       // row_stats: reference points
  kSums,         // row_stats, from the combined maxima: sums over the classes
  kMixtureSums,  // row_stats, from maxima and sums: the sums of divergences that go through a mixture of p and q
  kGradient,     // row_gradient, from all of these: loss and gradient
};
// Numbers of a row. Maxima: of the student, of the teacher, and of the student once more for the cross entropy, whose
// row has the label's class where the divergence leaves it out. Sums: the divergence's; behind them the cross entropy's
// Σ e_1, Σ a_1 and number of classes that are not masked; and the logits of the label's class, of student and teacher.
// What a divergence does not use is 0, and so is everything of an ignored row.
constexpr int kNumMaxima = 3, kMaxSums = 5, kNumSums = kMaxSums + 5, kNumMixtureSums = 2;
constexpr int kZ1 = kMaxSums, kA1 = kMaxSums + 1, kCount1 = kMaxSums + 2, kStudentLabel = kMaxSums + 3,
              kTeacherLabel = kMaxSums + 4;

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

  Divergence divergence = {};
  double beta = 0, one_minus_beta = 1;  // both given: from one near 1 the other cannot be had
  double student_temperature = 1, teacher_temperature = 1;
  double soft_scale = 1;  // soft_weight · S
  double hard_weight = 0, label_smoothing = 0;

  const int64_t* labels = nullptr;  // [num_rows]; if hard_weight > 0 or needs_labels; in range where a row counts
  const double* weights = nullptr;  // [num_rows], nullptr: all 1. A row of weight 0 is ignored: never read, gradient 0
  double gradient_scale = 1;        // on top of the row's weight: 1 / denominator
  const double* grad_output = nullptr;  // multiplies the gradient, one a row or one for all; nullptr: 1
  bool grad_output_is_uniform = true;

  double* row_losses = nullptr;  // [num_rows], written: weight · loss of the row

  // If the halves are called apart: numbers of every row, each [num_rows, count]. A label is then −1 where its class is
  // not among those at hand.
  Part part = Part::kLoss;
  double *maxima = nullptr, *sums = nullptr, *mixture_sums = nullptr;
};

// Tensors of one shape, each element of them a distribution of its own (`binary_distillation_loss`). Dimensions are in
// the order in which the student's lie in memory, neighbours merged where every operand allows it.
constexpr int kMaxElementDims = 32;  // dimensions of two elements and more that do not merge: more are 2^33 elements
struct Elements {
  void* data = nullptr;  // null: there is none
  DType dtype = DType::kFloat32;
  int64_t strides[kMaxElementDims] = {};
};

struct BinaryProblem {
  int64_t num_elements = 0;
  int num_dims = 0;
  int64_t sizes[kMaxElementDims] = {};
  Elements student, teacher;
  Elements gradient;                    // may be the student's own memory
  Elements labels, weight, pos_weight;  // an element is ignored if its weight is 0 or its label is ignore_index
  Elements grad_output;                 // multiplies the gradient
  Elements losses;                      // of every element, times `scale`
  double ignore_index = 0;

  Divergence divergence = {};
  double beta = 0, one_minus_beta = 1;
  double student_temperature = 1, teacher_temperature = 1;
  double soft_scale = 1, hard_weight = 0;
  double scale = 1;        // of losses and gradient
  double* sums = nullptr;  // of weight · loss, one a block of kElementsPerBlock
};
constexpr int64_t kElementsPerBlock = 1024;

// A teacher that is k classes a row and their log-probabilities (`sparse_distillation_loss`). What becomes of the
// classes that it does not list, and the names that Python knows these by, in the same order:
enum class Tail : int {
  kBucket,       // all of them together are one class, of teacher and student
  kRestrict,     // they are left out; both sides add up to 1 over the others
  kRenormalize,  // the teacher's probabilities of the others add up to 1
  kZero,         // the teacher's probabilities stay as they are, and nothing is added for these classes
};
constexpr const char* kTailNames[] = {"bucket", "restrict", "renormalize", "zero"};
constexpr int64_t kMostListed = 4096;

struct SparseProblem {
  LossProblem rows;  // all but the teacher's logits
  Tail tail = Tail::kBucket;
  int64_t k = 0;
  const int64_t* indices = nullptr;  // [num_rows, k], of rows that count distinct and at least 0, or −1: none; at
                                     // vocab_size and above, classes that the student does not have
  Operand log_probs;                 // [num_rows, k], one after the other
};

// What is wrong with a constant's value, if anything is.
struct WrongValue {
  const char* name = nullptr;
  double value = 0;
};

// What an instruction set brings for them. Each function does blocks [begin, end).
struct BinaryKernels {
  void (*loss)(const BinaryProblem& problem, int64_t begin, int64_t end);
  // Sums of the weights of what is not ignored, to `sums`; looks at the values of the constants.
  WrongValue (*weights)(const BinaryProblem& problem, int64_t begin, int64_t end);
  // gradient · grad_output, where the gradient lies; ignored elements are 0 and stay 0.
  void (*scale)(const BinaryProblem& problem, int64_t begin, int64_t end);
};

// What an instruction set brings for rows. Each function does rows [begin, end).
struct Kernels {
  // Bytes of scratch a thread needs for this problem.
  size_t (*scratch_bytes)(const LossProblem& problem);
  // `scratch` is the calling thread's own, of that size, aligned to 64.
  void (*loss_rows)(const LossProblem& problem, int64_t begin, int64_t end, void* scratch);
  // gradient row n times factors[n], or times factors[0] if is_uniform; reads the problem's shape and `gradient` alone.
  void (*scale_rows)(const LossProblem& problem, const double* factors, bool is_uniform, int64_t begin, int64_t end);
};

// The same for rows of a sparse teacher. The classes that it lists, and the others as one, are a row of k + 1 classes
// in float64, which the dense kernels of the same instruction set take.
struct SparseKernels {
  size_t (*scratch_bytes)(const SparseProblem& problem, const Kernels& dense);
  void (*loss_rows)(const SparseProblem& problem, const Kernels& dense, int64_t begin, int64_t end, void* scratch);
};

}  // namespace reptile_ext
