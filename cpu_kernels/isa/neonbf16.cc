// NEON with products of bfloat16 pairs (Armv8.6 and later): the kernels of dense layers in bfloat16 alone. It
// extends NEON with dot products of bytes.

#include <arm_neon.h>

#include "core/prelude.h"
#include "isa/sets.h"

namespace quake {
namespace {

#include "isa/neon-inl.h"

QUAKE_INLINE vi append_bfloats(vf a, vf b) {
  const bfloat16x8_t low = vcvtq_low_bf16_f32((float32x4_t)a);
  return (vi)vcvtq_high_bf16_f32(low, (float32x4_t)b);
}
QUAKE_INLINE vf pair_products(vi a, vi b, vf c) {
  return (vf)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b);
}

#include "isa/kernels-inl.h"

}  // namespace

void isa::fill_neonbf16(KernelTable& table) { fill_dense_bfloats<true, bfloat16, float, float16>(table.dense); }

}  // namespace quake
