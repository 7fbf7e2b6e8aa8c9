// AVX-512 with BF16, which rounds to bfloat16 in one instruction: the kernels for that type alone. dispatch.cc
// takes the others from AVX-512.

#include <immintrin.h>

#include "generic/prelude.h"

namespace quake {
namespace {

constexpr bool kOnlyBFloat16 = true;
#include "isa/avx512_shim.h"

QUAKE_INLINE vh float_to_bfloat(vf x) { return (vh)_mm512_cvtneps_pbh(x); }

QUAKE_INLINE vi join_bfloats(vf even, vf odd) {
  typedef std::int16_t Words __attribute__((vector_size(64)));
  constexpr Words kInTurn = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vi)_mm512_permutexvar_epi16((__m512i)kInTurn, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

#include "generic/all.h"

}  // namespace

extern const KernelTable kAvx512Bf16Table = make_table("avx512bf16");

}  // namespace quake
