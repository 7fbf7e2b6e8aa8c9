// NEON with dot products of bytes (Armv8.2 and later): the kernels of quantised rows alone. It extends NEON.

#include <arm_neon.h>

#include "core/prelude.h"
#include "isa/sets.h"

namespace quake {
namespace {

#include "isa/neon-inl.h"

QUAKE_INLINE vi byte_products(vi a, vi b, vi c) {
  return (vi)vdotq_s32((int32x4_t)c, (int8x16_t)a, (int8x16_t)b);
}

#include "isa/kernels-inl.h"

}  // namespace

void isa::fill_neondot(KernelTable& table) {
  fill_dense_quantized<true, bfloat16, float, float16>(table.dense);
}

}  // namespace quake
