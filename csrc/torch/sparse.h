// The operators of teachers that are k classes a row, whose log-probabilities [rows, k] are `teacher`; the CPU alone
// has them:
//
//     sparse_distillation_loss, sparse_distillation_loss_
#pragma once

#include "operators.h"

namespace reptile_ext {
namespace {

bool may_share_memory(const View& floats, const View& indices) {
  if (floats.is_empty() || indices.is_empty()) return false;
  int64_t count = 1;
  for (int64_t d = 0; d < indices.ndim; ++d) count *= indices.sizes[d];
  const auto [begin, end] = byte_range(floats, "student");
  const char* first = static_cast<const char*>(indices.data);
  return begin < first + count * int64_t(sizeof(int64_t)) && first < end;
}

// All but the weights, what the sum is divided by, and whether the values of the indices are right. The arguments have
// the student in the teacher's place.
SparseProblem sparse_problem_of(const Arguments& a, const Tensor& indices, const Tensor& log_probs, int64_t tail,
                                const View& student, const View* gradient, std::vector<int64_t>& leading) {
  SparseProblem p;
  p.rows = problem_of(a, student, gradient, leading, Part::kLoss);
  if (tail < 0 || tail > int64_t(Tail::kZero)) fail("tail is unknown");
  if (needs_labels(p.rows.divergence) || p.rows.divergence == Divergence::kMse) {
    fail("divergence must be one of probabilities, without a label among them");
  }
  p.tail = Tail(tail);
  const View ids(indices), y(log_probs);
  if (ids.ndim < 1 || ids.ndim != y.ndim || !std::equal(ids.sizes, ids.sizes + ids.ndim, y.sizes)) {
    fail("indices and log-probabilities must have one shape");
  }
  p.k = ids.sizes[ids.ndim - 1];
  if (p.k < 1 || p.k > kMostListed) fail("indices must list 1 to 4096 classes a row");
  check_vector(ids, p.rows.num_rows * p.k, "indices");
  check_vector(y, p.rows.num_rows * p.k, "log-probabilities");
  if (ids.dtype != aoti_torch_dtype_int64()) fail("indices must be int64");
  p.indices = static_cast<const int64_t*>(ids.data);
  p.log_probs.data = y.data;
  p.log_probs.dtype = dtype_of(y, "log-probabilities");
  if (p.log_probs.dtype == DType::kFloat64) p.rows.teacher.dtype = DType::kFloat64;  // the results' dtype
  if (gradient && gradient->data == student.data) {
    check_inplace(student, y, "teacher_log_probs");
    if (may_share_memory(student, ids)) fail("inplace=True needs teacher_indices in memory of their own");
  }
  return p;
}

// The same of a teacher that is k classes a row; `a` has the student in the teacher's place.
Tensor run_sparse(const Arguments& a, const Tensor& indices, const Tensor& log_probs, int64_t tail, bool truncate,
                  const View& student, const View* gradient);

std::tuple<Tensor, Tensor> sparse_distillation_loss(REPTILE_EXT_PARAMETERS, const Tensor& indices, const int64_t& tail,
                                                    const bool& truncate, const bool& needs_gradient) {
  const Tensor& log_probs = teacher;
  const auto run_on = [&](const Tensor& teacher, const View& view, const View* gradient) {
    return run_sparse(REPTILE_EXT_ARGUMENTS, indices, log_probs, tail, truncate, view, gradient);
  };
  const View view(student);
  dtype_of(view, "student");  // before there is a gradient like it
  if (!needs_gradient) {
    const int64_t nothing[1] = {0};
    return {run_on(student, view, nullptr), new_tensor(device_of(student), 1, nothing, view.dtype)};
  }
  Tensor gradient = new_gradient(student);
  const View gradient_view(gradient);
  Tensor loss = run_on(student, view, &gradient_view);
  return {std::move(loss), std::move(gradient)};
}

Tensor sparse_distillation_loss_(REPTILE_EXT_PARAMETERS, const Tensor& indices, const int64_t& tail,
                                 const bool& truncate) {
  const Tensor& log_probs = teacher;
  const View view(student);
  check_inplace(view, view);
  const auto run_on = [&](const Tensor& teacher) {
    return run_sparse(REPTILE_EXT_ARGUMENTS, indices, log_probs, tail, truncate, view, &view);
  };
  return run_on(student);
}

}  // namespace
}  // namespace reptile_ext
