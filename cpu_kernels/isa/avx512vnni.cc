// AVX-512 with VNNI, which multiplies bytes by fours: the kernels of quantised rows alone. It extends AVX-512.

#include <immintrin.h>

#include "core/prelude.h"
#include "isa/sets.h"

namespace quake {
namespace {

#include "isa/avx512-inl.h"
#include "core/bfloat_words-inl.h"

// Not the intrinsic: GCC 12 copies and spills the sums of a tile of them.
QUAKE_INLINE vi byte_products(vi a, vi b, vi c) {
  asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}

#include "isa/kernels-inl.h"

}  // namespace

void isa::fill_avx512vnni(KernelTable& table) {
  fill_dense_quantized<true, bfloat16, float, float16>(table.dense);
}

}  // namespace quake
