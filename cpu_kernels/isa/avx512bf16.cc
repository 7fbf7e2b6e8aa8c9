// AVX-512 with BF16, which rounds to bfloat16 and multiplies pairs in one instruction each: the kernels of that
// type. It extends AVX-512, whose kernels serve the other types.

#include <immintrin.h>

#include "core/prelude.h"
#include "isa/sets.h"

namespace quake {
namespace {

#include "isa/avx512-inl.h"
#include "isa/avx512bf16-inl.h"
#include "isa/kernels-inl.h"

}  // namespace

void isa::fill_avx512bf16(KernelTable& table) {
  fill_attention_format<BFloatPairs, float, bfloat16, float16>(table.attention.of(AttentionFormat::kBFloat16));
  fill_dense_bfloats<true, bfloat16, float, float16>(table.dense);
  fill_elementwise<bfloat16>(table.elementwise);
  fill_rows<bfloat16>(table.rows);
}

}  // namespace quake
