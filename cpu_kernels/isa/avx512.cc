// AVX-512 (F, DQ, BW, VL): the vector shim, then the kernels.

#include <immintrin.h>

#include "core/prelude.h"
#include "isa/sets.h"

namespace quake {
namespace {

#include "isa/avx512-inl.h"
#include "core/bfloat_words-inl.h"
#include "isa/kernels-inl.h"

}  // namespace

void isa::fill_avx512(KernelTable& table) { fill_all<bfloat16, float, float16>(table); }

}  // namespace quake
