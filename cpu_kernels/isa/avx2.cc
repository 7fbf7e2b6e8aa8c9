// AVX2 with FMA and F16C: the vector shim, then the kernels.

#include <immintrin.h>

#include "core/prelude.h"
#include "isa/sets.h"

namespace quake {
namespace {

#include "isa/avx2-inl.h"
#include "core/partial_words-inl.h"
#include "core/bfloat_words-inl.h"
#include "isa/kernels-inl.h"

}  // namespace

void isa::fill_avx2(KernelTable& table) {
  fill_all<bfloat16, float, float16>(table);
  fill_byte_codes(table.dense);
  fill_dense_narrow<bfloat16, float, float16>(table.dense);
}

}  // namespace quake
