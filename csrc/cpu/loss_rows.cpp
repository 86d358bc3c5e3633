// The row driver: loss and gradient of a range of rows, forward and backward in one go.
//
// Compiled once per instruction set. REPTILE_EXT_KERNELS is the one name such an object exports; everything else is
// in anonymous namespaces, and nothing here uses the standard library's templates (see simd.h for why).
//
// What is fused, in units of one row of V elements:
//
//     first pass     read s and t once, write two or three values a class (float32), e_s and e_t say, to this thread's
//                    scratch, which stays in the L2
//     mixture pass   of the divergences over normalised probabilities: read the scratch, replace a value in it
//     last pass      read the scratch, write the gradient once: non-temporally if it is fresh memory, which would
//                    otherwise be read in before it is written
//
// so memory sees 2 reads and 1 write of each element, and a pair of logits costs 2 exponentials, not 4.
//
// Classes that are neighbours in memory go through the lanes of vectors, one row at a time. Where the classes are
// strided and the rows are neighbours (images: [B, C, H, W], classes in C), rows go through the lanes instead, side by
// side. Both are a Tile, and the passes are the same. Any other layout, and mixed types, are gathered row by row into
// scratch and scattered back.
//
// Hard-label cross entropy has a pass of its own between the first and the last, over the student alone; at T_s = 1 it
// shares e_s and needs the pass for label smoothing only.
//
// passes.h has the passes, halves.h the two halves that they make, this file the layouts.

#include "halves.h"
#include "layouts.h"

namespace reptile_ext {
namespace {

enum class Layout {
  kContiguous,  // classes are neighbours
  kSideBySide,  // rows are neighbours
  kGathered,    // neither, or types that differ
};

Layout layout_of(const LossProblem& p) {
  const bool same_type = p.student.dtype == p.teacher.dtype;
  const auto all = [&](auto&& holds) {
    return holds(p.student) && holds(p.teacher) && (!p.gradient.data || holds(p.gradient));
  };
  if (same_type && all([](const Operand& o) { return o.class_stride == 1; })) return Layout::kContiguous;
  const int last = p.num_row_dims - 1;
  if (same_type && !needs_labels(p.divergence) && p.vocab_size <= kSideBySideMaxClasses && last >= 0 &&
      p.row_sizes[last] >= 8 && all([last](const Operand& o) { return o.row_strides[last] == 1; })) {
    return Layout::kSideBySide;
  }
  return Layout::kGathered;
}

// The type the arithmetic is in.
bool is_double(const LossProblem& p) {
  return p.student.dtype == DType::kFloat64 || p.teacher.dtype == DType::kFloat64;
}

// Rows of kept values and of the cross entropy's exponentials, and three more to gather rows in; side by side, a pair
// of vectors for each class.
size_t scratch_bytes(const LossProblem& p) {
  const size_t pair = 2 * (is_double(p) ? Double::kLanes : Float::kLanes);
  const size_t rows = layout_of(p) == Layout::kSideBySide ? (kMaxKept + 1) * pair : kMaxKept + 1 + 3;
  return rows * size_t(padded(p.vocab_size)) * (is_double(p) ? 8 : 4);
}

// Rows [begin, end) of one storage type; gathered rows are of the arithmetic type.
template <class In>
void loss_rows_of_type(const LossProblem& p, Layout layout, int64_t begin, int64_t end, void* scratch) {
  using V = Arithmetic<In>;
  using Scalar = typename V::Scalar;
  constexpr int kPair = 2 * V::kLanes;
  const int64_t n = p.vocab_size;
  const int64_t row_size = padded(n) * (layout == Layout::kSideBySide ? kPair : 1);
  Scalar* rows = static_cast<Scalar*>(scratch);

  // Without a soft part the teacher is unused; the student in its place is multiplied by 0 everywhere.
  const bool soft = p.soft_scale > 0;
  const Operand& teacher = soft ? p.teacher : p.student;
  const Divergence divergence = soft ? p.divergence : Divergence::kForwardKl;

  Call<Scalar> call;
  for (int i = 0; i < kMaxKept; ++i) call.kept[i] = rows + i * row_size;
  call.e_1 = rows + kMaxKept * row_size;
  Scalar* gathered = rows + (kMaxKept + 1) * row_size;
  call.beta = Scalar(p.beta);
  call.one_minus_beta = Scalar(p.one_minus_beta);
  call.hard = p.hard_weight > 0;
  call.smooth = p.label_smoothing > 0;
  // Fresh memory larger than a cache; in place the line is in the cache already.
  call.stream = layout == Layout::kContiguous && p.gradient.data != p.student.data &&
                p.num_rows * n * int64_t(sizeof(In)) >= (1 << 22);

  Tile<In> tile;
  tile.folded = layout != Layout::kSideBySide;
  tile.student_step = tile.folded ? kPair : p.student.class_stride;
  tile.teacher_step = tile.folded ? kPair : teacher.class_stride;
  tile.gradient_step = tile.folded ? kPair : p.gradient.class_stride;
  tile.num_pairs = tile.folded ? (n + kPair - 1) / kPair : n;
  tile.num_whole = n / kPair;
  tile.tail = int(n % kPair);
  tile.rows = 1;

  const int last = p.num_row_dims - 1;
  RowIndex index(p, begin);
  for (int64_t r = begin; r < end;) {
    const int64_t s_offset = index.offset(p.student), t_offset = index.offset(teacher);
    const int64_t g_offset = p.gradient.data ? index.offset(p.gradient) : 0;
    if (!tile.folded) {
      int64_t live = p.row_sizes[last] - index.index[last];
      live = live < end - r ? live : end - r;
      tile.rows = tile.tail = int(live < kPair ? live : kPair);
      tile.num_whole = tile.rows == kPair ? n : 0;
    }
    bool any = !p.weights;
    for (int i = 0; i < tile.rows && !any; ++i) any = p.weights[r + i] != 0;
    if (any) {
      if (layout == Layout::kGathered) {
        gather_row(p.student, s_offset, n, gathered);
        gather_row(teacher, t_offset, n, gathered + row_size);
        tile.student = reinterpret_cast<const In*>(gathered);  // In is Scalar here
        tile.teacher = reinterpret_cast<const In*>(gathered + row_size);
        tile.gradient = p.gradient.data ? reinterpret_cast<In*>(gathered + 2 * row_size) : nullptr;
      } else {
        tile.student = static_cast<const In*>(p.student.data) + s_offset;
        tile.teacher = static_cast<const In*>(teacher.data) + t_offset;
        tile.gradient = p.gradient.data ? static_cast<In*>(p.gradient.data) + g_offset : nullptr;
      }
      with_divergence<V>(divergence, [&](auto d) {
        using D = decltype(d);
        call.shares_exp = D::kKeepsExp && p.student_temperature == 1.0;
        call.k_s = Scalar((D::kRawLogits ? 1 : kLog2E) / p.student_temperature);
        call.k_t = Scalar((D::kRawLogits ? 1 : kLog2E) / p.teacher_temperature);
        loss_of_tile<D>(call, p, tile, r);
      });
      if (layout == Layout::kGathered && p.gradient.data) {
        scatter_row(p.gradient, g_offset, n, gathered + 2 * row_size);
      }
    }
    for (int i = 0; i < tile.rows; ++i, ++r, index.next()) {
      const bool counts = !p.weights || p.weights[r] != 0;
      if (!counts && p.row_losses) p.row_losses[r] = 0;
      if (p.gradient.data && (!counts || p.gradient_size > n)) {
        clear_classes(p.gradient, g_offset + (tile.folded ? 0 : i), counts ? n : 0, p.gradient_size);
      }
    }
  }
  if (call.stream) stream_fence();
}

void loss_rows(const LossProblem& p, int64_t begin, int64_t end, void* scratch) {
  const Layout layout = layout_of(p);
  const DType arithmetic = is_double(p) ? DType::kFloat64 : DType::kFloat32;
  switch (layout == Layout::kGathered ? arithmetic : p.student.dtype) {
    case DType::kFloat32:
      return loss_rows_of_type<float>(p, layout, begin, end, scratch);
    case DType::kBFloat16:
      return loss_rows_of_type<BFloat16>(p, layout, begin, end, scratch);
    case DType::kFloat16:
      return loss_rows_of_type<Float16>(p, layout, begin, end, scratch);
    case DType::kFloat64:
      return loss_rows_of_type<double>(p, layout, begin, end, scratch);
  }
}

template <class In>
void scale_row(In* row, int64_t n, double factor) {
  using V = Arithmetic<In>;
  constexpr int kPair = 2 * V::kLanes;
  const V f = V(typename V::Scalar(factor));
  V a, b;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    load2(row + i, a, b);
    store2(row + i, a * f, b * f);
  }
  if (i < n) {
    load2_tail(row + i, int(n - i), a, b);
    store2_tail(row + i, int(n - i), a * f, b * f);
  }
}

void scale_rows(const LossProblem& p, const double* factors, bool is_uniform, int64_t begin, int64_t end) {
  const Operand& gradient = p.gradient;
  const int last = p.num_row_dims - 1;
  const bool side_by_side = last >= 0 && gradient.row_strides[last] == 1;
  with_type(gradient, [&](auto* data) {
    RowIndex index(p, begin);
    for (int64_t r = begin; r < end;) {
      auto* row = data + index.offset(gradient);
      int64_t live = 1;
      if (gradient.class_stride == 1) {
        scale_row(row, p.gradient_size, factors[is_uniform ? 0 : r]);
      } else {
        // In memory order: the rows that lie side by side, class by class.
        if (side_by_side) live = p.row_sizes[last] - index.index[last];
        if (live > end - r) live = end - r;
        for (int64_t v = 0; v < p.gradient_size; ++v) {
          for (int64_t i = 0; i < live; ++i) {
            auto* element = row + v * gradient.class_stride + i;
            using Scalar = decltype(to_float(*element));
            from_float(Scalar(to_float(*element) * Scalar(factors[is_uniform ? 0 : r + i])), element);
          }
        }
      }
      for (int64_t i = 0; i < live; ++i, ++r) index.next();
    }
  });
}

}  // namespace

const Kernels& REPTILE_EXT_KERNELS() {
  static const Kernels kernels = {scratch_bytes, loss_rows, scale_rows};
  return kernels;
}

}  // namespace reptile_ext
