// The fuzz target of one family, QUAKE_FUZZ_FAMILY.

#include "tests/xla/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  quake::tests::fuzz(quake::tests::FuzzFamily::QUAKE_FUZZ_FAMILY, data, size);
  return 0;
}
