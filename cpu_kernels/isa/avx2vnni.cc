// AVX2 with AVX-VNNI, which multiplies bytes by fours: the kernels of quantised rows alone. It extends AVX2.

#include <immintrin.h>

#include "core/prelude.h"
#include "isa/sets.h"

namespace quake {
namespace {

#include "isa/avx2-inl.h"
#include "core/partial_words-inl.h"
#include "core/bfloat_words-inl.h"

// Not the intrinsic: GCC 12 copies and spills the sums of a tile of them.
QUAKE_INLINE vi byte_products(vi a, vi b, vi c) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
  return c;
}

#include "isa/kernels-inl.h"

}  // namespace

void isa::fill_avx2vnni(KernelTable& table) {
  fill_dense_quantized<true, bfloat16, float, float16>(table.dense);
  table.dense.of(DenseFormat::kInt4Narrow) = {};  // which is for pairs
}

}  // namespace quake
