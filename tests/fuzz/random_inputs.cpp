// Runs a libFuzzer target where there is no libFuzzer, on inputs that are drawn at random: random_inputs NUMBER [SEED].
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  const long number = argc > 1 ? std::atol(argv[1]) : 0;
  if (number < 1) {
    std::fprintf(stderr, "usage: %s NUMBER [SEED]\n", argv[0]);
    return 2;
  }
  std::mt19937 random(argc > 2 ? unsigned(std::atol(argv[2])) : 1u);
  for (long i = 0; i < number; ++i) {
    std::vector<uint8_t> input(random() % 401);
    // Many bytes of 0, which is the plain choice everywhere: of every case some things are unusual, and not all.
    const unsigned plain = random() % 4;
    for (uint8_t& byte : input) byte = random() % 4 < plain ? 0 : uint8_t(random());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%ld inputs, no finding\n", number);
}
