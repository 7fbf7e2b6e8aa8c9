// AVX-512 with VNNI, which multiplies bytes by fours: the kernels of quantised rows and of
// attention in int8 alone. It extends AVX-512.

#include <immintrin.h>

#include "core/prelude.h"
#include "isa/sets.h"

namespace quake {
namespace {

#include "isa/avx512-inl.h"
#include "core/bfloat_words-inl.h"
#include "isa/avx512vnni-inl.h"
#include "isa/kernels-inl.h"

#include "attention/bytes-inl.h"

}  // namespace

void isa::fill_avx512vnni(KernelTable& table) {
  fill_attention_bytes<bfloat16, float, float16>(table.attention.of(AttentionFormat::kInt8));
  fill_dense_quantized<true, bfloat16, float, float16>(table.dense);
}

}  // namespace quake
