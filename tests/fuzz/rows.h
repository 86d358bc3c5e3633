// What the fuzz targets of rows share: dense teachers (fuzz_rows.cpp) and sparse ones (fuzz_sparse.cpp). A `Case` is
// either's; both have
//
//     p, student, gradient, mode, labels, weights, grad_output, cuts, outer, outer_index
//     is_in(row), may_be_negative(), arithmetic()
#pragma once

#include "drawn.h"

namespace reptile_ext {
namespace {

// --------------------------------------------------------------------------------------------------------- a case

// Classes: few, or around the size of a vector, of the probe (512) and of a block (to 4,096). Then so many rows that
// the case stays small, but enough to fill the vectors where rows lie side by side.
inline void read_row_shape(LossProblem& p, Input& in) {
  const int64_t kind = in.below(16), edges[] = {2, 4, 8, 16, 32, 64, 128, 512, 1024, 2048, 4096};
  p.vocab_size = kind < 8 ? 1 + in.below(70) : (kind < 15 ? edges[in.below(8)] : in.pick(edges)) + in.below(3) - 1;
  int64_t room = std::min<int64_t>(100, std::max<int64_t>(9, 2048 / p.vocab_size));
  p.num_rows = 1;
  p.num_row_dims = int(in.below(5));
  for (int d = 0; d < p.num_row_dims; ++d) {
    p.row_sizes[d] = 1 + in.below(room);
    p.num_rows *= p.row_sizes[d];
    room /= p.row_sizes[d];
  }
}

// Other bits wherever the driver has no business to read: between the elements, past vocab_size, in ignored rows.
template <class Case>
void scramble(Tensor& t, const Case& c, Random random) {
  Memory other(t.memory.size());
  random.fill(other);
  for (int64_t row = 0; row < c.p.num_rows; ++row) {
    for (int64_t v = 0; c.is_in(row) && v < c.p.vocab_size; ++v) {
      std::memcpy(&other[t.at(row, v)], &t.memory[t.at(row, v)], size_of(t.dtype));
    }
  }
  t.memory = other;
}
template <class Case>
void scramble_labels(Case& c, Random random) {
  for (size_t row = 0; row < c.labels.size(); ++row) {
    if (!c.is_in(int64_t(row))) {
      c.labels[row] = random.pick({int64_t(-100), int64_t(-1), c.p.vocab_size, INT64_MIN, INT64_MAX, int64_t(0)});
    }
  }
}

// Weights, labels, grad_output, and which rows of a larger problem these are.
template <class Case>
void read_rows(Case& c, Input& in, Random& random) {
  LossProblem& p = c.p;
  if (in.one_in(2)) {
    c.weights.resize(size_t(p.num_rows));
    for (double& w : c.weights) w = random.pick({1.0, 0.0, 0.3, 3.0});
  }
  if (needs_labels(p.divergence) || p.hard_weight > 0 || in.one_in(4)) {
    for (int64_t row = 0; row < p.num_rows; ++row) c.labels.push_back(int64_t(random.bits() >> 1) % p.vocab_size);
    scramble_labels(c, random);
  }
  if (in.one_in(2)) {
    p.grad_output_is_uniform = in.one_in(2);
    c.grad_output.resize(size_t(p.grad_output_is_uniform ? 1 : p.num_rows));
    for (double& u : c.grad_output) u = random.pick({1.0, -1.0, 0.0, 65536.0, 1e-3});
  }
  if (in.one_in(4)) {
    c.outer = in.pick({int64_t(3), int64_t(1) << 20, int64_t(1) << 32});
    c.outer_index = in.one_in(2) ? c.outer - 1 : 0;
  }
  c.cuts = read_cuts(in, p.num_rows);
}

// -------------------------------------------------------------------------------------------- running the kernels

// The problem in full: with the outermost dimension, along which strides are 0.
template <class Case>
LossProblem with_outer(const Case& c) {
  LossProblem p = c.p;
  p.num_rows *= c.outer;
  p.num_row_dims = 0;
  if (c.outer > 1) p.row_sizes[p.num_row_dims++] = c.outer;
  for (int d = 0; d < c.p.num_row_dims; ++d) p.row_sizes[p.num_row_dims++] = c.p.row_sizes[d];
  return p;
}
template <class Case>
Operand operand_of(const Tensor& t, Memory& memory, const Case& c) {
  Operand o;
  o.data = memory.data() + t.start * int64_t(size_of(t.dtype));
  o.dtype = t.dtype;
  o.class_stride = t.class_stride;
  std::copy(t.row_strides.begin(), t.row_strides.end(), o.row_strides + (c.outer > 1));
  return o;
}
// A pointer to row 0 of an array that has only this case's rows, `size` numbers each: possibly far before what memory
// there is.
template <class T, class Case>
T* row_0(T* rows, const Case& c, int64_t size = 1) {
  return reinterpret_cast<T*>(uintptr_t(rows) - uintptr_t(c.outer_index * c.p.num_rows * size) * sizeof(T));
}

struct Result {
  Numbers losses, gradient;  // gradient: [num_rows, gradient_size], or empty
};

// The arrays that have a number a row; the result's losses among them.
template <class Case>
void set_rows(LossProblem& p, const Case& c, const std::vector<int64_t>& labels, const Numbers& weights,
              const Numbers& grad_output, Result& result, char garbage) {
  if (!labels.empty()) p.labels = row_0(labels.data(), c);
  if (!weights.empty()) p.weights = row_0(weights.data(), c);
  if (!grad_output.empty()) {
    p.grad_output = p.grad_output_is_uniform ? grad_output.data() : row_0(grad_output.data(), c);
  }
  result.losses.assign(size_t(c.p.num_rows), garbage);
  p.row_losses = row_0(result.losses.data(), c);
}

// ----------------------------------------------------------------------------------------------------- the checks

// The promises of SPEC.md for each row.
template <class Case>
void check_rows(const Case& c, const Result& result, const std::vector<ExactRow>& exact) {
  const int64_t n = c.p.vocab_size, width = c.p.gradient_size;
  for (int64_t row = 0; row < c.p.num_rows; ++row) {
    const ExactRow& e = exact[row];
    const double loss = result.losses[row];
    const double* gradient = result.gradient.empty() ? nullptr : &result.gradient[row * width];
    const auto all = [&](int64_t begin, int64_t end, const char* what, auto&& is_right) {
      for (int64_t v = begin; gradient && v < end; ++v) {
        if (!is_right(gradient[v])) fail(row, "%s: the gradient of class %lld is %g", what, (long long)v, gradient[v]);
      }
    };
    const auto is_zero = [](double g) { return g == 0; };

    if (!c.is_in(row)) {
      if (loss != 0) fail(row, "is out: the loss is %g", loss);
      all(0, width, "is out", is_zero);
      continue;
    }
    all(n, width, "past vocab_size", is_zero);
    if (e.is_broken) {
      if (!std::isnan(loss)) fail(row, "is broken: the loss is %g", loss);
      all(0, n, "is broken", [](double g) { return std::isnan(g); });
      continue;
    }
    if (!c.may_be_negative() && loss < 0) fail(row, "the loss is negative, %g", loss);
    if (!e.is_in_range) continue;
    if (std::isnan(loss)) fail(row, "is not broken: the loss is NaN");
    all(0, n, "is not broken", [](double g) { return !std::isnan(g); });
    if (!e.is_moderate) continue;
    const double tolerance = e.unit * e.loss_size + e.loss_slack;
    if (loss != e.loss && !(std::fabs(loss - e.loss) <= tolerance)) {
      fail(row, "the loss is %.17g, right is %.17g, within %.3g", loss, e.loss, tolerance);
    }
    for (int64_t v = 0; gradient && v < n; ++v) {
      const double tolerance_v = e.unit * e.gradient_size[v] + e.gradient_slack[v];
      if (!is_near(gradient[v], e.gradient[v], tolerance_v, c.student.dtype)) {
        fail(row, "the gradient of class %lld is %.17g, right is %.17g, within %.3g", (long long)v, gradient[v],
             e.gradient[v], tolerance_v);
      }
    }
  }
}

// In the rows that have the same to read as before.
template <class Case, class Predicate>
void check_same_bits(const Case& c, const Result& before, const Result& after, Predicate&& is_same) {
  for (int64_t row = 0; row < c.p.num_rows; ++row) {
    if (!is_same(row)) continue;
    if (!same_bits(before.losses[row], after.losses[row])) {
      fail(row, "the loss was %.17g and is %.17g", before.losses[row], after.losses[row]);
    }
    for (int64_t v = 0; !before.gradient.empty() && v < c.p.gradient_size; ++v) {
      const double g = before.gradient[row * c.p.gradient_size + v], h = after.gradient[row * c.p.gradient_size + v];
      if (!same_bits(g, h)) fail(row, "the gradient of class %lld was %.17g and is %.17g", (long long)v, g, h);
    }
  }
}

}  // namespace
}  // namespace reptile_ext
