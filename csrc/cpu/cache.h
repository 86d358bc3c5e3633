// The coding of a teacher's rows in a cache: K class ids and their log-probabilities, in about 2.4 bytes each.
// docs/cache.md describes it bit by bit. Knows no framework.
#pragma once

#include <cstdint>

namespace reptile_ext {
namespace cache {

constexpr int kHeadBytes = 8;
constexpr int kGroup = 64;    // rows between two entries of a block's table of offsets
constexpr int kMaxBits = 15;  // of a log-probability
constexpr int64_t kMaxVocabSize = 1 << 24;
constexpr int64_t kMaxClasses = 4096;  // in a row
constexpr double kMaxMass = 1.02;      // what 16-bit log-probabilities may add up to
constexpr int kSlack = 8;              // bytes behind a block that a reader may touch

enum class Error : int {
  kNone = 0,
  kNotANumber,   // a log-probability of NaN or +inf
  kOutOfRange,   // an id outside [-1, V)
  kRepeated,     // an id twice in a row
  kTooMuchMass,  // probabilities that add up to more than kMaxMass
  kPadding,      // an id of -1 with a log-probability other than -inf
  kKl,           // no number of bits keeps the error asked for
  kDamaged,      // bytes that no writer has written
};

// What coding has cost, summed or at its worst over the rows.
struct Stats {
  double worst_kl = 0;  // nats, the larger of both views of a row: see encode_row in cache.cpp
  double sum_kl = 0;
  double worst_log_prob_error = 0;  // of entries with a probability of 1e-4 and more
  double sum_mass = 0;              // probability that the rows hold
};

struct Outcome {
  Error error = Error::kNone;
  int64_t row = 0;
};

// Bytes that a block of so many rows takes at most.
int64_t max_block_bytes(int64_t num_rows, int64_t k, int64_t vocab_size);

// Codes [num_rows, k] ids and log-probabilities into `block`, whose bytes have to be 0; says how many were used.
Outcome encode_block(const int32_t* ids, const float* log_probs, int64_t num_rows, int64_t k, int64_t vocab_size,
                     double max_kl, bool is_sampled, uint8_t* block, int64_t* num_bytes, Stats* stats);

// Rows [begin, end) of a block of num_rows rows, into [end - begin, k] ids, in ascending order and padded by -1, and
// log-probabilities, padded by -inf. Reads nothing past block + num_bytes + kSlack.
Outcome decode_rows(const uint8_t* block, int64_t num_bytes, int64_t num_rows, int64_t begin, int64_t end, int64_t k,
                    int64_t vocab_size, int64_t* ids, float* log_probs);

}  // namespace cache
}  // namespace reptile_ext
