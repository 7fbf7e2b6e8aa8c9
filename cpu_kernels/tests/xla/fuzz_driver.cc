// Runs a fuzz target where there is no libFuzzer, on random inputs or on files:
//   fuzz_FAMILY RUNS [SEED [FIRST]]
//   fuzz_FAMILY FILE...
// QUAKE_JAX_ISA chooses the instruction set; exit code 77 where the machine lacks it.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "tests/harness.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int argc, char** argv) {
  if (quake::tests::lacks_wanted_isa()) return quake::tests::kSkipped;
  if (argc > 1 && std::strspn(argv[1], "0123456789") != std::strlen(argv[1])) {
    for (int i = 1; i < argc; ++i) {
      std::ifstream file(argv[i], std::ios::binary);
      const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
      LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
    }
    return 0;
  }
  const auto number = [&](int i, unsigned long otherwise) {
    return argc > i ? std::strtoul(argv[i], nullptr, 10) : otherwise;
  };
  const unsigned long runs = number(1, 1000), seed = number(2, 1), first = number(3, 0);
  for (unsigned long i = first; i < first + runs; ++i) {
    // The last line before a failure says how to repeat it alone: 1 SEED FIRST.
    if (i % 100 == 0) std::fprintf(stderr, "seed %lu, from %lu\n", seed, i);
    std::seed_seq sequence{seed, i};
    std::mt19937 random(sequence);
    std::vector<std::uint8_t> input(random() % 160);
    for (std::uint8_t& byte : input) byte = static_cast<std::uint8_t>(random());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  return 0;
}
