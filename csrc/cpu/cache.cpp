// A block is the rows of one sample:
//
//   heads     8 bytes a row: what its body needs to be read, so that the size of a body follows from its head
//   offsets   4 bytes for every 64th row but the first: where its body begins, behind this table
//   bodies    three fields of bits, lowest bit first: high parts of the ids, low parts, codes of the log-probabilities
//
// Ids are a set, so they are kept in ascending order (Elias-Fano): the lowest l bits of each as they are, of the rest
// the differences in unary. n of V classes take l + 2 + V / (n 2^l) bits or fewer each, at most half a bit more than
// any code that makes no assumption about the set.
//
// A log-probability is hi - range · h_s(c / m) with its code c in 0 … m. With s = 0 the levels are evenly spaced; with
// s > 0 they are denser where probabilities are large: evenly spaced in p^(s / range). The writer tries the curves and
// takes the fewest bits with which the row keeps max_kl, and last shifts hi such that the row's mass is what it was.

#include "cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

namespace reptile_ext {
namespace cache {
namespace {

constexpr int kNumCurves = 16;
constexpr double kCurves[kNumCurves] = {0, 1, 2, 3, 4, 5, 6.5, 8, 10, 13, 18, 32, 128, 512, 2048, 16384};
constexpr double kMaxRange = 65536;
constexpr double kMaxLogProbError = 0.5;  // of entries with a probability of 1e-4 and more
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Head {
  float hi;
  uint16_t count;  // of classes; bit 15: some are at -inf, and the largest code says so
  uint8_t range;   // 0: none, else 2^((range - 95) / 10) nats
  uint8_t levels;  // bits of a code, and the number of the curve in the upper half
};
static_assert(sizeof(Head) == kHeadBytes, "a head is written as it lies in memory");

constexpr uint16_t kHasInfinite = 0x8000;

double range_of(int code) { return code == 0 ? 0 : std::exp2((code - 95) / 10.0); }

struct Layout {
  int low_bits;
  int64_t high_bits, bytes;
};

Layout layout_of(int64_t count, int bits, int64_t vocab_size) {
  if (count == 0) return {0, 0, 0};
  int low = 0;
  while ((count << (low + 1)) <= vocab_size) ++low;
  const int64_t high = count + ((vocab_size - 1) >> low);
  return {low, high, (high + count * (low + bits) + 7) / 8};
}

// h_s(c / m) of all codes and curves, made when first needed: 2^bits floats a curve.
const float* curves_of(int bits, bool has_infinite) {
  static std::once_flag once[2][kMaxBits + 1];
  static std::vector<float> tables[2][kMaxBits + 1];
  std::vector<float>& table = tables[has_infinite][bits];
  std::call_once(once[has_infinite][bits], [&] {
    const int64_t size = int64_t(1) << bits, last = size - 1 - (has_infinite ? 1 : 0);
    table.assign(size_t(kNumCurves * size), 1.0f);
    for (int curve = 0; curve < kNumCurves; ++curve) {
      const double s = kCurves[curve];
      float* h = table.data() + curve * size;
      for (int64_t c = 0; c < last; ++c) {
        const double u = double(c) / double(last);
        h[c] = float(s == 0 ? u : -std::log1p(u * std::expm1(-s)) / s);
      }
      if (last == 0) h[0] = 0.0f;
      if (has_infinite) h[size - 1] = kInfinity;
    }
  });
  return table.data();
}

uint64_t load(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  return word;
}

// `width` bits from a bit on; 57 or fewer.
uint64_t bits_at(const uint8_t* bytes, int64_t bit, int width) {
  return (load(bytes + (bit >> 3)) >> (bit & 7)) & ((uint64_t(1) << width) - 1);
}

void put_bits(uint8_t* bytes, int64_t bit, int width, uint64_t value) {
  uint8_t* at = bytes + (bit >> 3);
  value <<= bit & 7;
  for (int64_t end = (bit & 7) + width; end > 0; end -= 8, value >>= 8) *at++ |= uint8_t(value);
}

struct Entry {
  int32_t id;
  float log_prob;
};

class RowEncoder {
 public:
  RowEncoder(int64_t k, int64_t vocab_size, double max_kl, bool is_sampled)
      : vocab_size_(vocab_size), max_kl_(max_kl), is_sampled_(is_sampled) {
    entries_.reserve(size_t(k));
    weights_.resize(size_t(k));
    below_.resize(size_t(k));
    places_.resize(size_t(k) * kNumCurves);
    codes_.resize(size_t(k));
  }

  Error encode(const int32_t* ids, const float* log_probs, int64_t k, Head* head, uint8_t* body, int64_t* num_bytes,
               Stats* stats) {
    entries_.clear();
    for (int64_t i = 0; i < k; ++i) {
      if (std::isnan(log_probs[i]) || log_probs[i] == kInfinity) return Error::kNotANumber;
      if (ids[i] < -1 || ids[i] >= vocab_size_) return Error::kOutOfRange;
      if (ids[i] >= 0) {
        entries_.push_back({ids[i], log_probs[i]});
      } else if (log_probs[i] != -kInfinity) {
        return Error::kPadding;
      }
    }
    const auto by_id = [](const Entry& a, const Entry& b) { return a.id < b.id; };
    if (!std::is_sorted(entries_.begin(), entries_.end(), by_id)) std::sort(entries_.begin(), entries_.end(), by_id);
    for (size_t i = 1; i < entries_.size(); ++i) {
      if (entries_[i].id == entries_[i - 1].id) return Error::kRepeated;
    }

    // The finite ones, relative to the largest.
    float top = -kInfinity, bottom = kInfinity;
    size_t num_finite = 0;
    for (const Entry& e : entries_) {
      if (e.log_prob == -kInfinity) continue;
      top = std::max(top, e.log_prob);
      bottom = std::min(bottom, e.log_prob);
      ++num_finite;
    }
    const bool has_infinite = num_finite < entries_.size();
    double relative_mass = 0, mass = 0;
    if (num_finite > 0) {
      for (size_t i = 0; i < entries_.size(); ++i) {
        const bool infinite = entries_[i].log_prob == -kInfinity;
        below_[i] = infinite ? 0 : std::min(double(top) - double(entries_[i].log_prob), kMaxRange);
        weights_[i] = infinite ? 0 : std::exp(double(entries_[i].log_prob) - double(top));
        relative_mass += weights_[i];
      }
      for (size_t i = 0; i < entries_.size(); ++i) weights_[i] /= relative_mass;
      mass = relative_mass * std::exp(double(top));
      if (!(mass <= (is_sampled_ ? std::numeric_limits<double>::max() : kMaxMass))) return Error::kTooMuchMass;
      relative_mass_ = relative_mass;
    }
    const double log_mass = num_finite > 0 ? double(top) + std::log(relative_mass) : 0;

    head->hi = num_finite > 0 ? top : 0.0f;
    head->count = uint16_t(entries_.size() | (has_infinite ? kHasInfinite : 0));
    head->range = 0;
    int bits = has_infinite ? 1 : 0, curve = 0;
    const double spread = num_finite > 0 ? std::min(double(top) - double(bottom), kMaxRange) : 0;
    double kl = 0, log_prob_error = 0;
    if (spread > 0) {
      int code = std::min(std::max(int(std::ceil(10 * std::log2(spread) + 95)), 1), 255);
      while (code < 255 && range_of(code) < spread) ++code;
      head->range = uint8_t(code);
      if (!find_levels(code, has_infinite, log_mass, mass, &bits, &curve, head, &kl, &log_prob_error)) {
        return Error::kKl;
      }
    } else {
      for (size_t i = 0; i < entries_.size(); ++i) codes_[i] = entries_[i].log_prob == -kInfinity ? 1 : 0;
    }
    head->levels = uint8_t(bits | curve << 4);

    const int64_t count = int64_t(entries_.size());
    const Layout layout = layout_of(count, bits, vocab_size_);
    const int64_t low = layout.high_bits, code = low + count * layout.low_bits;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = entries_[size_t(i)].id, place = (id >> layout.low_bits) + i;
      body[place >> 3] |= uint8_t(1 << (place & 7));
      put_bits(body, low + i * layout.low_bits, layout.low_bits, uint64_t(id) & ((uint64_t(1) << layout.low_bits) - 1));
      put_bits(body, code + i * bits, bits, codes_[size_t(i)]);
    }
    *num_bytes = layout.bytes;
    stats->worst_kl = std::max(stats->worst_kl, kl);
    stats->sum_kl += kl;
    stats->worst_log_prob_error = std::max(stats->worst_log_prob_error, log_prob_error);
    stats->sum_mass += mass;
    return Error::kNone;
  }

 private:
  // The fewest bits, and the curve, with which the row keeps max_kl; leaves the codes in codes_ and hi in the head.
  bool find_levels(int range_code, bool has_infinite, double log_mass, double mass, int* bits, int* curve, Head* head,
                   double* kl, double* log_prob_error) {
    const size_t n = entries_.size();
    const double range = range_of(range_code);
    // Where on each curve the entries lie, 0 … 1; all curves are tried with 4 bits, the three best with others.
    for (int s = 0; s < kNumCurves; ++s) {
      float* place = places_.data() + size_t(s) * n;
      const float steepness = float(kCurves[s]), scale = float(1 / range);
      const float whole = s == 0 ? 1.0f : 1.0f - std::exp(-steepness);
      for (size_t i = 0; i < n; ++i) {
        const float x = float(below_[i]) * scale;
        place[i] = std::min(s == 0 ? x : (1.0f - std::exp(-steepness * x)) / whole, 1.0f);
      }
    }
    int best[kNumCurves];
    double cost[kNumCurves];
    for (int s = 0; s < kNumCurves; ++s) {
      best[s] = s;
      cost[s] = approximate_kl(s, 4, has_infinite, range);
    }
    std::sort(best, best + kNumCurves,
              [&](int a, int b) { return cost[a] < cost[b] || (cost[a] == cost[b] && a < b); });
    for (*bits = has_infinite ? 2 : 1; *bits <= kMaxBits; ++*bits) {
      for (int j = 0; j < 3; ++j) {
        *curve = best[j];
        if (approximate_kl(*curve, *bits, has_infinite, range) > max_kl_) continue;
        if (settle(*curve, *bits, has_infinite, range, log_mass, mass, head, kl, log_prob_error)) return true;
      }
    }
    return false;
  }

  uint32_t code_of(float place, uint32_t last) const { return uint32_t(place * float(last) + 0.5f); }

  // KL of the row within itself, Σ w (log w - log ŵ), in float32 and less what float32 cannot see: to choose by.
  double approximate_kl(int s, int bits, bool has_infinite, double range) const {
    const size_t n = entries_.size();
    const uint32_t last = (uint32_t(1) << bits) - 1 - (has_infinite ? 1 : 0);
    const float* h = curves_of(bits, has_infinite) + (int64_t(s) << bits);
    const float* place = places_.data() + size_t(s) * n;
    const float scale = float(range), share = float(1 / relative_mass_);
    float first = 0, gain = 0;
    for (size_t i = 0; i < n; ++i) {
      const float level = scale * h[code_of(place[i], last)], weight = float(weights_[i]);
      first += weight * (level - float(below_[i]));
      gain += weight > 0 ? share * std::exp(-level) - weight : 0;
    }
    return double(first) + std::log1p(double(gain)) - 1e-6;
  }

  // The codes, hi, and the error of what a reader will decode, in double.
  bool settle(int s, int bits, bool has_infinite, double range, double log_mass, double mass, Head* head, double* kl,
              double* log_prob_error) {
    const size_t n = entries_.size();
    const uint32_t last = (uint32_t(1) << bits) - 1 - (has_infinite ? 1 : 0);
    const float* h = curves_of(bits, has_infinite) + (int64_t(s) << bits);
    const float* place = places_.data() + size_t(s) * n;
    const float scale = float(range);
    double sum = 0;
    for (size_t i = 0; i < n; ++i) {
      const bool infinite = entries_[i].log_prob == -kInfinity;
      codes_[i] = infinite ? last + 1 : code_of(place[i], last);
      if (!infinite) sum += std::exp(-double(scale * h[codes_[i]]));
    }
    // Downwards: a row of all the mass must not come out with more than all.
    const double wanted = log_mass - std::log(sum);
    float hi = float(wanted);
    if (double(hi) > wanted) hi = std::nextafter(hi, -kInfinity);
    head->hi = hi;

    double first = 0, decoded_mass = 0, worst = 0;
    for (size_t i = 0; i < n; ++i) {
      if (entries_[i].log_prob == -kInfinity) continue;
      const double decoded = double(hi - scale * h[codes_[i]]), given = double(entries_[i].log_prob);
      decoded_mass += std::exp(decoded);
      if (weights_[i] > 0) first += weights_[i] * (given - decoded);
      if (weights_[i] * mass >= 1e-4) worst = std::max(worst, std::fabs(given - decoded));
    }
    // Both views of a row: its K classes by themselves, and beside one more that holds the rest.
    *kl = std::max(first + std::log(decoded_mass) - log_mass, 0.0);
    if (!is_sampled_) {
      const double rest = 1 - mass, decoded_rest = std::max(1 - decoded_mass, 1e-12);
      const double tail = rest > 0 ? rest * std::log(rest / decoded_rest) : 0;
      *kl = std::max(*kl, first * mass + tail);
    }
    *log_prob_error = worst;
    return *kl <= max_kl_ && worst <= kMaxLogProbError;
  }

  int64_t vocab_size_;
  double max_kl_;
  bool is_sampled_;
  double relative_mass_ = 0;  // in units of the largest probability
  std::vector<Entry> entries_;
  std::vector<double> weights_, below_;
  std::vector<float> places_;
  std::vector<uint32_t> codes_;
};

Error decode_row(const Head& head, const uint8_t* body, const Layout& layout, int64_t k, int64_t vocab_size,
                 int64_t* ids, float* log_probs) {
  const int64_t count = head.count & ~kHasInfinite;
  const int bits = head.levels & 15;
  int64_t found = 0, low = layout.high_bits;
  for (int64_t begin = 0; begin < layout.high_bits; begin += 64) {
    uint64_t word = load(body + (begin >> 3));
    if (layout.high_bits - begin < 64) word &= (uint64_t(1) << (layout.high_bits - begin)) - 1;
    for (; word != 0; word &= word - 1) {
      if (found == count) return Error::kDamaged;
      const int64_t high = begin + __builtin_ctzll(word) - found;
      ids[found++] = high << layout.low_bits | int64_t(bits_at(body, low, layout.low_bits));
      low += layout.low_bits;
    }
  }
  if (found != count || (count > 0 && ids[count - 1] >= vocab_size)) return Error::kDamaged;
  const float* h = curves_of(bits, (head.count & kHasInfinite) != 0) + (int64_t(head.levels >> 4) << bits);
  const float range = float(range_of(head.range));
  int64_t code = layout.high_bits + count * layout.low_bits;
  if (head.count & kHasInfinite) {  // 0 · inf is no number
    const uint64_t largest = (uint64_t(1) << bits) - 1;
    for (int64_t i = 0; i < count; ++i, code += bits) {
      const uint64_t c = bits_at(body, code, bits);
      log_probs[i] = c == largest ? -kInfinity : head.hi - range * h[c];
    }
  } else {
    for (int64_t i = 0; i < count; ++i, code += bits) log_probs[i] = head.hi - range * h[bits_at(body, code, bits)];
  }
  for (int64_t i = count; i < k; ++i) {
    ids[i] = -1;
    log_probs[i] = -kInfinity;
  }
  return Error::kNone;
}

int64_t table_bytes(int64_t num_rows) { return num_rows > 0 ? (num_rows - 1) / kGroup * 4 : 0; }

}  // namespace

int64_t max_block_bytes(int64_t num_rows, int64_t k, int64_t vocab_size) {
  int64_t most = 0;
  for (int64_t count = 1; count <= k; ++count) most = std::max(most, layout_of(count, kMaxBits, vocab_size).bytes);
  return num_rows * (kHeadBytes + most) + table_bytes(num_rows) + kSlack;
}

Outcome encode_block(const int32_t* ids, const float* log_probs, int64_t num_rows, int64_t k, int64_t vocab_size,
                     double max_kl, bool is_sampled, uint8_t* block, int64_t* num_bytes, Stats* stats) {
  RowEncoder encoder(k, vocab_size, max_kl, is_sampled);
  uint8_t* const table = block + num_rows * kHeadBytes;
  uint8_t* const bodies = table + table_bytes(num_rows);
  int64_t at = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    if (row > 0 && row % kGroup == 0) {
      const uint32_t offset = uint32_t(at);
      std::memcpy(table + (row / kGroup - 1) * 4, &offset, 4);
    }
    Head head;
    int64_t size = 0;
    const Error error = encoder.encode(ids + row * k, log_probs + row * k, k, &head, bodies + at, &size, stats);
    if (error != Error::kNone) return {error, row};
    std::memcpy(block + row * kHeadBytes, &head, sizeof head);
    at += size;
  }
  *num_bytes = num_rows * kHeadBytes + table_bytes(num_rows) + at;
  return {};
}

Outcome decode_rows(const uint8_t* block, int64_t num_bytes, int64_t num_rows, int64_t begin, int64_t end, int64_t k,
                    int64_t vocab_size, int64_t* ids, float* log_probs) {
  const int64_t before = num_rows * kHeadBytes + table_bytes(num_rows), room = num_bytes - before;
  if (room < 0) return {Error::kDamaged, begin};
  const uint8_t* const bodies = block + before;
  int64_t row = begin / kGroup * kGroup, at = 0;
  if (row > 0) {
    uint32_t offset;
    std::memcpy(&offset, block + num_rows * kHeadBytes + (row / kGroup - 1) * 4, 4);
    at = offset;
  }
  Layout layout = {0, 0, 0};
  int known_count = -1, known_bits = -1;
  for (; row < end; ++row) {
    Head head;
    std::memcpy(&head, block + row * kHeadBytes, sizeof head);
    const int count = head.count & ~kHasInfinite, bits = head.levels & 15;
    if (count > k || (bits == 0 && (head.count & kHasInfinite))) return {Error::kDamaged, row};
    if (count != known_count || bits != known_bits) {
      layout = layout_of(count, bits, vocab_size);
      known_count = count;
      known_bits = bits;
    }
    if (at + layout.bytes > room) return {Error::kDamaged, row};
    if (row >= begin) {
      const int64_t to = (row - begin) * k;
      const Error error = decode_row(head, bodies + at, layout, k, vocab_size, ids + to, log_probs + to);
      if (error != Error::kNone) return {error, row};
    }
    at += layout.bytes;
  }
  return {};
}

}  // namespace cache
}  // namespace reptile_ext
