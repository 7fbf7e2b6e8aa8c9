// The families of handlers that are fuzzed, one target each.

#ifndef QUAKE_TESTS_XLA_FUZZ_H_
#define QUAKE_TESTS_XLA_FUZZ_H_

#include <cstddef>
#include <cstdint>

// clang-format off
#define QUAKE_FUZZ_FAMILIES(X) \
  X(elementwise) X(binary) X(split) X(reduction) X(masked) X(norm) X(attention) X(dense)
// clang-format on

namespace quake::tests {

enum class FuzzFamily {
#define QUAKE_ENUMERATOR(name) name,
  QUAKE_FUZZ_FAMILIES(QUAKE_ENUMERATOR)
#undef QUAKE_ENUMERATOR
};

// Makes a call of the bytes, runs and checks it; aborts if something is wrong.
void fuzz(FuzzFamily family, const std::uint8_t* data, std::size_t size);

}  // namespace quake::tests

#endif  // QUAKE_TESTS_XLA_FUZZ_H_
