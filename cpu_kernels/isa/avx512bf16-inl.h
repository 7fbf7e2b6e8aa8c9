// What AVX512_BF16 adds to AVX-512's shim. Included inside an instruction set's namespace, after it.

QUAKE_INLINE vh float_to_bfloat(vf x) { return (vh)_mm512_cvtneps_pbh(x); }

typedef std::int16_t Words __attribute__((vector_size(64)));

QUAKE_INLINE vi append_bfloats(vf a, vf b) { return (vi)_mm512_cvtne2ps_pbh(b, a); }

QUAKE_INLINE vi join_bfloats(vf even, vf odd) {
  constexpr Words kInTurn = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vi)_mm512_permutexvar_epi16((__m512i)kInTurn, (__m512i)append_bfloats(even, odd));
}

// vdpbf16ps: 32 products in the time of 16 FMAs.
QUAKE_INLINE vf pair_products(vi a, vi b, vf c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

QUAKE_INLINE vi interleave_low(vi a, vi b) {
  constexpr Words kLow = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return (vi)_mm512_permutex2var_epi16((__m512i)a, (__m512i)kLow, (__m512i)b);
}
QUAKE_INLINE vi interleave_high(vi a, vi b) {
  constexpr Words kHigh = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                           24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  return (vi)_mm512_permutex2var_epi16((__m512i)a, (__m512i)kHigh, (__m512i)b);
}

QUAKE_INLINE vi load_bfloats(const std::uint16_t* p, std::size_t n) {
  return (vi)_mm512_maskz_loadu_epi16(_bzhi_u32(~0u, static_cast<unsigned>(n)), p);
}
