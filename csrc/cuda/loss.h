// What the CUDA part is asked to do, and the plan it makes; no CUDA in here.
#pragma once

#include "../rows.h"

namespace reptile_ext {

// A LossProblem whose pointers are the device's, and what the host cannot know without waiting for the device.
struct DeviceLoss {
  LossProblem problem;
  int64_t ignore_index = -100;
  // One number that gradient_scale is divided by, or null; launch_divisor's kernel writes it.
  const double* divisor = nullptr;

  // Where the loss goes if it is the sum of the rows' losses, times gradient_scale / divisor: the kernel of the rows
  // adds it up itself, and row_losses is not used. Each block has a number in `of_blocks`; the last one to count itself
  // in `arrived`, which has to be 0, adds these up.
  void* sum = nullptr;
  bool sum_is_double = false;
  double* of_blocks = nullptr;
  uint32_t* arrived = nullptr;
};

// How a problem is divided among threads. A team of threads shares a row: part of a warp (many rows a block), a block,
// or the blocks of a cluster.
struct Plan {
  enum class Source : int {
    kRing,    // a row is read once, through a ring in shared memory (ring_rows.cu)
    kMemory,  // a row is read again in every pass; most of it from the L2 (loss_rows.cu)
  };
  Source source = Source::kMemory;
  int team_threads = 1;  // in one block
  int cluster_blocks = 1;
  int block_threads = 256;
  int64_t grid_blocks = 1;

  // Of a ring. Pieces are 16 bytes of an operand; a block of a cluster has a share of each row's.
  int64_t pieces = 0;  // of a row, where it begins farthest behind a boundary of 16 bytes
  int share = 0;
  int ring_rows = 0;
  // Pieces of one operand, whole stages, which are a piece of every thread of a block: of a row, and of the ring. Where
  // the ring has no room for ring_rows, which are two, rows wrap around in it, and so many pieces of the next row are
  // copied ahead, the rest when this row has made room.
  int row_pieces = 0, ring_pieces = 0, pieces_ahead = 0;
  int side_bytes = 0;  // of ring_pieces
  int shared_bytes = 0;
  bool has_bulk_copies = false;
  bool keeps = false;               // exponentials, in registers; else they are taken again in every pass over the ring
  bool rows_at_boundaries = false;  // every row of every operand begins at 16 bytes

  constexpr int rows_per_block() const { return block_threads / team_threads; }
};

struct LaunchShape {
  int64_t blocks;
  int threads;
  int cluster_blocks = 1;
  int shared_bytes = 0;  // besides those of shared_memory
};

struct DeviceProperties {
  int num_multiprocessors = 1;
  bool has_clusters = false;  // and bulk copies: sm_90 and later, and the library holds code for it
  // Shared memory: of a block at most, and of all blocks of a multiprocessor, each of which takes 1 KB more than it
  // asks.
  int shared_block = 99 << 10, shared_all = 100 << 10;

  // As of an H100 or, without clusters, an A100: where no device is at hand.
  void set_generation(bool clusters) {
    has_clusters = clusters;
    shared_block = (clusters ? 227 : 163) << 10;
    shared_all = shared_block + 1024;
  }
};

constexpr int kChunk = 8;                    // classes that a thread takes at a time: one or two loads of 16 bytes
constexpr int kMaxBlockThreads = 512;        // of 128 registers
constexpr int kMaxDoubleBlockThreads = 256;  // of 255 registers: float64 is for checks, not for speed
constexpr int kMaxClusterBlocks = 8;         // more are not portable

// Rings.
constexpr int kPieceBytes = 16;
constexpr int kMaxRingRows = 8;
constexpr int kRingRowsBefore90 = 2;
constexpr int kRingSharedBytes = 5376;  // in front of the stages

// Sparse teachers.
constexpr int kSparseThreads = 256;  // of a block at most
constexpr int kSparseDoubleThreads = 128;
constexpr int kSparseResidentThreads = 768;  // of a multiprocessor, at 80 registers a thread
constexpr int kSparseSharedBytes = 5376;     // in front of the list
// Pieces of a thread, where values of each class are kept: 40 pairs of logits, or fewer where more of a class are kept,
// or where so many small pieces, and all that a mixture needs, are too much.
template <class D>
constexpr int ring_pieces(DType dtype) {
  const int kept = D::Gradient::kKept < 2 ? 2 : D::Gradient::kKept;
  return (D::kMixtureSums > 0 && size_of(dtype) == 4 ? 72 : 80) / kept / (kPieceBytes / int(size_of(dtype)));
}

// Of many rows, their numbers are added up in two steps.
constexpr int64_t kRowsPerTile = 4096;  // 8 a thread
constexpr int64_t num_row_tiles(int64_t num_rows) { return (num_rows + kRowsPerTile - 1) / kRowsPerTile; }

// Each returns null, or what CUDA says went wrong. They launch and return; nothing waits for the device.
//
// The sum of problem.weights without ignored rows, in a fixed order: what a mean is divided by, or `denominator` if
// there is one; 1 if no row counts. `out` is one number. `tiles` is memory for num_row_tiles of them.
// It sets `arrived` to 0, too, if there is one.
const char* launch_divisor(const DeviceLoss& loss, const double* denominator, double* tiles, double* out, void* stream);
const char* set_to_zero(uint32_t* number, void* stream);
// From row_losses to the loss, float32 or float64: their sum or, `each`, all of them, times gradient_scale / divisor.
const char* launch_losses(const DeviceLoss& loss, bool each, bool is_double, double* tiles, void* out, void* stream);
// The problem's part: loss and gradient, or row stats.
const char* launch_loss(DeviceLoss loss, const Plan& plan, void* stream);
// gradient row n times factors[n], or times factors[0]; nothing where that is 1. Ignored rows stay 0.
const char* launch_scale(const DeviceLoss& loss, const void* factors, bool is_double, bool is_uniform,
                         const DeviceProperties& device, void* stream);

// Elements that each are a distribution of their own. Their sums are num_tiles numbers, which launch_divisor (as
// weights) and launch_losses (as row_losses) add up.
constexpr int64_t kElementsPerTile = 4096;  // of a block: its threads take 16 each
// A tile begins up to kChunk − 1 elements before the first, at a boundary of 16 bytes.
constexpr int64_t num_tiles(const BinaryProblem& problem) {
  return (problem.num_elements + kChunk - 1 + kElementsPerTile - 1) / kElementsPerTile;
}
struct DeviceBinary {
  BinaryProblem problem;            // `scale` without what follows
  const double* divisor = nullptr;  // one number that losses and gradient are divided by, or null
  const double* factor = nullptr;   // one number that the gradient alone is multiplied by, or null
  // Set by the launchers: whether threads take kChunk elements at a time, and from how far before the first.
  bool has_spans = false;
  int shift = 0;
};
// Loss and gradient; sums of weight · loss, unless there are losses of every element.
const char* launch_binary(const DeviceBinary& loss, const DeviceProperties& device, void* stream);
// Sums of the weights of what is not ignored.
const char* launch_binary_weights(const DeviceBinary& loss, const DeviceProperties& device, void* stream);
// gradient · grad_output, where the gradient lies; nothing where that is one number for all, and 1. Ignored elements
// stay 0.
const char* launch_binary_scale(const DeviceBinary& loss, bool is_uniform, const DeviceProperties& device,
                                void* stream);

// A teacher that is k classes a row (sparse.cu): the student's rows are `rows`, which has the student in the teacher's
// place.
struct DeviceSparse {
  DeviceLoss rows;
  Tail tail = Tail::kBucket;
  int64_t k = 0;
  const int64_t* indices = nullptr;  // [num_rows, k]
  const void* log_probs = nullptr;   // [num_rows, k]
  DType log_probs_dtype = DType::kFloat32;
  bool truncate = false;  // whether there may be indices from vocab_size on

  constexpr bool is_double() const {
    return rows.problem.student.dtype == DType::kFloat64 || log_probs_dtype == DType::kFloat64;
  }
};
// A row is shared by the blocks of a cluster, each of which has `share` chunks of it one after the other; a row with
// more than that goes by tiles, each shared in the same way.
struct SparsePlan {
  int threads = 32;
  int cluster_blocks = 1;
  int64_t grid_blocks = 1;
  int share = 0;  // chunks
  int64_t num_tiles = 1;
  bool keeps = true;  // the row, in shared memory; else it is read again for the gradient
  int shared_bytes = 0;
};
SparsePlan plan_of(const DeviceSparse& problem, const DeviceProperties& device);
const char* launch_sparse(const DeviceSparse& problem, const SparsePlan& plan, void* stream);

// What `plan_of` needs to know of a device.
const char* properties_of(int device, DeviceProperties& found);
// Makes it this thread's device to the CUDA runtime that is linked into this library, which is not torch's.
const char* use_device(int device);

Plan plan_of(const LossProblem& problem, const DeviceProperties& device);
const char* name_of(const Plan& plan);

}  // namespace reptile_ext
