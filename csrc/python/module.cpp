// The pybind11 module `_C`: what is Python's own. It needs no torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../cpu/cache.h"
#include "../cpu/instruction_sets.h"
#include "../divergence.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = REPTILE_EXT_VERSION;
#if defined(__clang__)
  info["compiler"] = "Clang " __clang_version__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["torch_abi"] = "2.10";
  info["build_type"] = REPTILE_EXT_BUILD_TYPE;
  std::vector<std::string> names;
  for (const auto& set : reptile_ext::kInstructionSets) names.emplace_back(set.name);
  info["instruction_sets"] = names;
  return info;
}

py::tuple names_of(const char* const* names, size_t count) {
  py::tuple result(count);
  for (size_t i = 0; i < count; ++i) result[i] = py::str(names[i]);
  return result;
}
template <size_t kCount>
py::tuple names_of(const char* const (&names)[kCount]) {
  return names_of(names, kCount);
}

py::dict cpu_info() {
  py::dict info;
  info["machine"] = REPTILE_EXT_MACHINE;
  std::vector<std::string> supported;
  for (const auto& set : reptile_ext::kInstructionSets) {
    if (set.is_supported()) supported.emplace_back(set.name);
  }
  info["supported"] = supported;
  return info;
}

// out = a xor b: two reads and one write of each byte, the write past the caches where the processor can; or out = a,
// one read, if b is null. What a loss that touches memory only as often as it must cannot beat.
void stream_range(const char* a, const char* b, char* out, int64_t begin, int64_t end) {
  int64_t i = begin;
  const auto byte = [&](int64_t j) { return b ? char(a[j] ^ b[j]) : a[j]; };
#if defined(__SSE2__)
  for (; i < end && (reinterpret_cast<uintptr_t>(out + i) & 15) != 0; ++i) out[i] = byte(i);
  for (; !b && i + 64 <= end; i += 64) {
    for (int64_t j = i; j < i + 64; j += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + j), _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + j)));
    }
  }
  for (; i + 64 <= end; i += 64) {
    for (int64_t j = i; j < i + 64; j += 16) {
      const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + j));
      const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + j));
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + j), _mm_xor_si128(x, y));
    }
  }
  _mm_sfence();
#endif
  for (; i < end; ++i) out[i] = byte(i);
}

void stream_limit(uintptr_t a, uintptr_t b, uintptr_t out, int64_t num_bytes, int threads) {
  if (threads < 1 || num_bytes < 0) throw py::value_error("threads must be at least 1 and num_bytes not negative");
  py::gil_scoped_release release;
  // Chunks that threads fetch as they get free, like the rows of the loss: a yardstick must not wait for the slowest.
  constexpr int64_t kChunk = 1 << 20;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(kChunk)) < num_bytes;) {
      stream_range(reinterpret_cast<const char*>(a), reinterpret_cast<const char*>(b), reinterpret_cast<char*>(out),
                   begin, std::min(begin + kChunk, num_bytes));
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

// The cache's blocks (cpu/cache.h), from and into memory that is named by its address.
py::tuple cache_encode(uintptr_t ids, uintptr_t log_probs, int64_t num_rows, int64_t k, int64_t vocab_size,
                       double max_kl, bool is_sampled) {
  namespace cache = reptile_ext::cache;
  if (num_rows < 0 || k < 1 || k > cache::kMaxClasses || vocab_size < k || vocab_size > cache::kMaxVocabSize) {
    throw py::value_error("num_rows, k or vocab_size is out of range");
  }
  // Where a row's body begins has 32 bits in a block.
  if (num_rows > 0 && cache::max_block_bytes(1, k, vocab_size) > (int64_t(1) << 32) / num_rows) {
    throw py::value_error("a sample of " + std::to_string(num_rows) +
                          " positions may take more than 4 GiB, the most that one can: add it in parts");
  }
  cache::Stats stats;
  cache::Outcome outcome;
  std::string block;
  {
    py::gil_scoped_release release;
    block.resize(size_t(cache::max_block_bytes(num_rows, k, vocab_size)), 0);
    int64_t num_bytes = 0;
    outcome = cache::encode_block(reinterpret_cast<const int32_t*>(ids), reinterpret_cast<const float*>(log_probs),
                                  num_rows, k, vocab_size, max_kl, is_sampled, reinterpret_cast<uint8_t*>(&block[0]),
                                  &num_bytes, &stats);
    block.resize(size_t(num_bytes));
  }
  return py::make_tuple(int(outcome.error), outcome.row, py::bytes(block), stats.worst_kl, stats.sum_kl,
                        stats.worst_log_prob_error, stats.sum_mass);
}

py::tuple cache_decode(const py::buffer& memory, int64_t offset, int64_t num_bytes, int64_t num_rows, int64_t begin,
                       int64_t end, int64_t k, int64_t vocab_size, uintptr_t ids, uintptr_t log_probs) {
  namespace cache = reptile_ext::cache;
  const py::buffer_info info = memory.request();
  const int64_t size = info.size * info.itemsize;
  if (offset < 0 || num_bytes < 0 || offset > size || num_bytes > size - offset - cache::kSlack || begin < 0 ||
      begin > end || end > num_rows || k < 1 || k > cache::kMaxClasses || vocab_size < k ||
      vocab_size > cache::kMaxVocabSize) {
    throw py::value_error("rows, bytes, k or vocab_size are out of range");
  }
  cache::Outcome outcome;
  {
    py::gil_scoped_release release;
    outcome = cache::decode_rows(static_cast<const uint8_t*>(info.ptr) + offset, num_bytes, num_rows, begin, end, k,
                                 vocab_size, reinterpret_cast<int64_t*>(ids), reinterpret_cast<float*>(log_probs));
  }
  return py::make_tuple(int(outcome.error), outcome.row);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and processor information of reptile_ext.";
  m.def("build_info", &build_info,
        "How this build was made: version, compiler, torch ABI, instruction sets compiled in.");
  m.def(
      "divergences", [] { return names_of(reptile_ext::kDivergenceNames); },
      "The names of the registry, in the order of the operators' numbers.");
  m.def(
      "through_mixture",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < reptile_ext::kNumDivergences; ++i) {
          reptile_ext::with_divergence<float>(reptile_ext::Divergence(i), [&](auto functor) {
            if (decltype(functor)::kMixtureSums > 0) names.emplace_back(reptile_ext::kDivergenceNames[i]);
          });
        }
        return names;
      },
      "Names of the divergences that go through a mixture of both distributions: their row stats have a third part.");
  m.def(
      "row_stats_sizes",
      [] { return std::vector<int>{reptile_ext::kNumMaxima, reptile_ext::kNumSums, reptile_ext::kNumMixtureSums}; },
      "How many numbers a row has in each part of its stats: maxima, sums, mixture sums.");
  m.def(
      "reductions", [] { return names_of(reptile_ext::kReductionNames); },
      "The names of the reductions, in the order of the operators' numbers.");
  m.def(
      "tails", [] { return names_of(reptile_ext::kTailNames); },
      "What becomes of the classes that a sparse teacher does not list, in the order of the operators' numbers.");
  m.def("cpu_info", &cpu_info, "This processor: its machine name and the compiled-in instruction sets it can run.");
  m.def("stream_limit", &stream_limit, py::arg("a"), py::arg("b"), py::arg("out"), py::arg("num_bytes"),
        py::arg("threads"),
        "The yardstick of the benchmarks: read num_bytes at the addresses a and b (0: at a alone) and write as many at "
        "out.");
  m.def(
      "cache_encode", &cache_encode, py::arg("ids"), py::arg("log_probs"), py::arg("num_rows"), py::arg("k"),
      py::arg("vocab_size"), py::arg("max_kl"), py::arg("is_sampled"),
      "(error, row, block, worst KL, sum of KL, worst log-probability error, sum of mass) of rows of a teacher cache.");
  m.def("cache_decode", &cache_decode, py::arg("memory"), py::arg("offset"), py::arg("num_bytes"), py::arg("num_rows"),
        py::arg("begin"), py::arg("end"), py::arg("k"), py::arg("vocab_size"), py::arg("ids"), py::arg("log_probs"),
        "(error, row) of decoding rows of a block into memory at two addresses.");
}
