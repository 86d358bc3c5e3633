// Rows in memory: where they start, and those that do not lie as the passes want them.
#pragma once

#include "../rows.h"
#include "simd.h"

namespace reptile_ext {
namespace {

// Where row n of an operand starts: the indices of n, counted up row by row.
struct RowIndex {
  const LossProblem& problem;
  int64_t index[kMaxRowDims];

  RowIndex(const LossProblem& p, int64_t n) : problem(p) {
    for (int d = p.num_row_dims - 1; d >= 0; --d) {
      index[d] = n % p.row_sizes[d];
      n /= p.row_sizes[d];
    }
  }
  void next() {
    for (int d = problem.num_row_dims - 1; d >= 0; --d) {
      if (++index[d] < problem.row_sizes[d]) return;
      index[d] = 0;
    }
  }
  int64_t offset(const Operand& operand) const {
    int64_t sum = 0;
    for (int d = 0; d < problem.num_row_dims; ++d) sum += index[d] * operand.row_strides[d];
    return sum;
  }
};

template <class Scalar>
void gather_row(const Operand& operand, int64_t offset, int64_t n, Scalar* out) {
  with_type(operand, [&](auto* data) {
    for (int64_t v = 0; v < n; ++v) out[v] = Scalar(to_float(data[offset + v * operand.class_stride]));
  });
}

template <class Scalar>
void scatter_row(const Operand& operand, int64_t offset, int64_t n, const Scalar* row) {
  with_type(operand, [&](auto* data) {
    for (int64_t v = 0; v < n; ++v) {
      if constexpr (sizeof(*data) == 2) {
        from_float(float(row[v]), data + offset + v * operand.class_stride);
      } else {
        from_float(row[v], data + offset + v * operand.class_stride);
      }
    }
  });
}

void clear_classes(const Operand& operand, int64_t offset, int64_t from, int64_t to) {
  with_type(operand, [&](auto* data) {
    data += offset;
    if (operand.class_stride == 1) {
      std::memset(data + from, 0, size_t(to - from) * sizeof(*data));
    } else {
      for (int64_t v = from; v < to; ++v) std::memset(data + v * operand.class_stride, 0, sizeof(*data));
    }
  });
}

}  // namespace
}  // namespace reptile_ext
