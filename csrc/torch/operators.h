// The operators, as every device has them, over what ops.cpp and ops_cuda.cpp define for theirs: `run`, `run_stats` and
// `run_binary`.
//
//     distillation_loss     the loss and d loss / d student, in one go
//     distillation_loss_    the same, the gradient over the student's logits
//     row_stats             the first half: numbers of the rows, of the classes at hand (Part in rows.h)
//     row_gradient          the second half: loss and gradient, from the row stats of all classes
//     row_gradient_         the same, the gradient over the student's logits
//     scale_gradient_       the backward pass of a gradient that is there: times grad_output, where it lies
//
// and of logits that each are a distribution of their own; `dim` and `label_smoothing` have no meaning there, and
// labels, weight and pos_weight have the shape of the logits:
//
//     binary_distillation_loss, binary_distillation_loss_, scale_elements_
//
// and of teachers that are k classes a row, whose log-probabilities [rows, k] are `teacher`:
//
//     sparse_distillation_loss, sparse_distillation_loss_
#pragma once

#include "arguments.h"

namespace reptile_ext {
namespace {

// The loss; the gradient goes to `gradient` (the student's own view: in place) unless that is null. With `combined`,
// the second half of it alone.
Tensor run(const Arguments& a, const View& student, const View* gradient, const Combined* combined);
// Writes row stats of one part, [rows, count], to `stats`; `maxima` and `sums` are those that the part starts from.
Tensor run_stats(const Arguments& a, const View& student, Part part, int count, const OptionalTensor& maxima,
                 const OptionalTensor& sums);
// The same as `run` of logits that each are a distribution of their own.
Tensor run_binary(const Arguments& a, const OptionalTensor& pos_weight, const View& student, const View* gradient);
// The same of a teacher that is k classes a row; `a` has the student in the teacher's place.
Tensor run_sparse(const Arguments& a, const Tensor& indices, const Tensor& log_probs, int64_t tail, bool truncate,
                  const View& student, const View* gradient);
Device device_of(const Tensor& tensor);
// A tensor for the gradient, as empty_like would make it.
Tensor new_gradient(const Tensor& student);

std::tuple<Tensor, Tensor> loss_and_gradient(const Arguments& a, bool needs_gradient, const Combined* combined) {
  const View view(a.student);
  dtype_of(view, "student");  // before there is a gradient like it
  if (!needs_gradient) {
    const int64_t nothing[1] = {0};
    return {run(a, view, nullptr, combined), new_tensor(device_of(a.student), 1, nothing, view.dtype)};
  }
  Tensor gradient = new_gradient(a.student);
  const View gradient_view(gradient);
  Tensor loss = run(a, view, &gradient_view, combined);
  return {std::move(loss), std::move(gradient)};
}

Tensor loss_and_gradient_in_place(const Arguments& a, const Combined* combined) {
  const View view(a.student);
  check_inplace(view, View(a.teacher));
  return run(a, view, &view, combined);
}

std::tuple<Tensor, Tensor> distillation_loss(REPTILE_EXT_PARAMETERS, const bool& needs_gradient) {
  return loss_and_gradient(REPTILE_EXT_ARGUMENTS, needs_gradient, nullptr);
}

Tensor distillation_loss_(REPTILE_EXT_PARAMETERS) { return loss_and_gradient_in_place(REPTILE_EXT_ARGUMENTS, nullptr); }

Tensor row_stats(REPTILE_EXT_PARAMETERS, const OptionalTensor& maxima, const OptionalTensor& sums) {
  if (sums && !maxima) fail("sums need the maxima that they start from");
  const Part part = !maxima ? Part::kMaxima : !sums ? Part::kSums : Part::kMixtureSums;
  const int count = !maxima ? kNumMaxima : !sums ? kNumSums : kNumMixtureSums;
  return run_stats(REPTILE_EXT_ARGUMENTS, View(student), part, count, maxima, sums);
}

std::tuple<Tensor, Tensor> row_gradient(REPTILE_EXT_PARAMETERS, const Tensor& maxima, const Tensor& sums,
                                        const Tensor& mixture_sums, const bool& needs_gradient) {
  const Combined combined{maxima, sums, mixture_sums};
  return loss_and_gradient(REPTILE_EXT_ARGUMENTS, needs_gradient, &combined);
}

Tensor row_gradient_(REPTILE_EXT_PARAMETERS, const Tensor& maxima, const Tensor& sums, const Tensor& mixture_sums) {
  const Combined combined{maxima, sums, mixture_sums};
  return loss_and_gradient_in_place(REPTILE_EXT_ARGUMENTS, &combined);
}

std::tuple<Tensor, Tensor> binary_distillation_loss(REPTILE_EXT_PARAMETERS, const OptionalTensor& pos_weight,
                                                    const bool& needs_gradient) {
  const Arguments a = REPTILE_EXT_ARGUMENTS;
  const View view(student);
  dtype_of(view, "student");  // before there is a gradient like it
  if (!needs_gradient) {
    const int64_t nothing[1] = {0};
    return {run_binary(a, pos_weight, view, nullptr), new_tensor(device_of(student), 1, nothing, view.dtype)};
  }
  Tensor gradient = new_gradient(student);
  const View gradient_view(gradient);
  Tensor loss = run_binary(a, pos_weight, view, &gradient_view);
  return {std::move(loss), std::move(gradient)};
}

Tensor binary_distillation_loss_(REPTILE_EXT_PARAMETERS, const OptionalTensor& pos_weight) {
  const View view(student);
  return run_binary(REPTILE_EXT_ARGUMENTS, pos_weight, view, &view);
}

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
