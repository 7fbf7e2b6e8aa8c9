// AVX-512 (F, DQ, BW, VL): the vector shim, then the kernels.

#include <immintrin.h>

#include "generic/prelude.h"

namespace quake {
namespace {

constexpr bool kOnlyBFloat16 = false;
#include "isa/avx512_shim.h"
#include "generic/bfloat_words.h"
#include "generic/all.h"

}  // namespace

extern const KernelTable kAvx512Table = make_table("avx512");

}  // namespace quake
