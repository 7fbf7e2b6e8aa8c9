// AVX-512 with AMX, whose instructions multiply matrices of bytes, or of pairs of bfloat16: the products of
// dense layers and of attention. It extends AVX-512 with BF16.

#include <immintrin.h>

#include "core/prelude.h"
#include "isa/sets.h"

namespace quake {
namespace {

#include "isa/avx512-inl.h"
#include "isa/avx512vnni-inl.h"
#include "isa/avx512bf16-inl.h"
#include "isa/kernels-inl.h"

// In assembly: the intrinsics take the registers' numbers as literals alone.
template <int T>
QUAKE_INLINE void clear_matrix() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
QUAKE_INLINE void load_matrix(const void* p, std::size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride * sizeof(PackedWord)), "i"(T) : "memory");
}
template <int T>
QUAKE_INLINE void store_matrix(void* p, std::size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride * sizeof(PackedWord)), "i"(T) : "memory");
}
struct MatrixBytes {
  template <int C, int A, int B>
  QUAKE_INLINE void multiply_add() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
struct MatrixUnsignedBytes {
  template <int C, int A, int B>
  QUAKE_INLINE void multiply_add() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
struct MatrixBFloats {
  template <int C, int A, int B>
  QUAKE_INLINE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

// What ldtilecfg reads.
struct alignas(64) Configuration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_of_row[16] = {};
  std::uint8_t rows[16] = {};
};

void begin_matrices(std::size_t words) {
  Configuration c;
  for (int t = 0; t < 8; ++t) {
    c.rows[t] = static_cast<std::uint8_t>(t < 6 ? 16 : words);
    c.bytes_of_row[t] = static_cast<std::uint16_t>((t == 4 || t == 5 ? words : 16) * sizeof(PackedWord));
  }
  asm volatile("ldtilecfg %0" ::"m"(c));
}
// Else the registers would be saved whenever the thread is interrupted.
void end_matrices() { asm volatile("tilerelease"); }

QUAKE_INLINE vi append_halves(vf a, vf b) {
  constexpr Words kUpper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                            33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return (vi)_mm512_permutex2var_epi16((__m512i)a, (__m512i)kUpper, (__m512i)b);
}

#include "core/matrix-inl.h"
#include "attention/bytes-inl.h"
#include "attention/matrix-inl.h"
#include "dense/lines-inl.h"

}  // namespace

void isa::fill_avx512bf16amx(KernelTable& table) {
  fill_attention_lines<bfloat16, float, float16>(table.attention);
  fill_dense_lines<bfloat16, float, float16>(table.dense);
}

}  // namespace quake
