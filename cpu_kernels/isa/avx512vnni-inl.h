// What AVX512_VNNI adds to AVX-512's shim. Included inside an instruction set's namespace, after it.

// Not the intrinsic: GCC 12 copies and spills the sums of a tile of them.
QUAKE_INLINE vi byte_products(vi a, vi b, vi c) {
  asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}

// The lanes of four vectors as bytes, saturated: in order; and side by side, those of a lane in one lane.
QUAKE_INLINE __m512i signed_halves(vi a, vi b) { return _mm512_packs_epi32((__m512i)a, (__m512i)b); }
QUAKE_INLINE vi in_order(__m512i bytes) {
  constexpr vi kOrder = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return (vi)_mm512_permutexvar_epi32((__m512i)kOrder, bytes);
}
QUAKE_INLINE vi signed_bytes(vi a, vi b, vi c, vi d) {
  return in_order(_mm512_packs_epi16(signed_halves(a, b), signed_halves(c, d)));
}
QUAKE_INLINE vi unsigned_bytes(vi a, vi b, vi c, vi d) {
  return in_order(_mm512_packus_epi16(signed_halves(a, b), signed_halves(c, d)));
}
QUAKE_INLINE vi signed_fours(vi a, vi b, vi c, vi d) {
  const __m512i turn = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  return (vi)_mm512_shuffle_epi8(_mm512_packs_epi16(signed_halves(a, b), signed_halves(c, d)), turn);
}

// The largest lane of each of 16 vectors of numbers that are not negative.
QUAKE_INLINE vi largest_lanes(const vi (&v)[16]) {
  const auto of_two = [](vi a, vi b) QUAKE_INLINE_LAMBDA {
    return _mm512_max_epi32(_mm512_unpacklo_epi32((__m512i)a, (__m512i)b),
                            _mm512_unpackhi_epi32((__m512i)a, (__m512i)b));
  };
  __m512i four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = of_two(v[4 * i], v[4 * i + 1]), b = of_two(v[4 * i + 2], v[4 * i + 3]);
    four[i] = _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  const auto of_quads = [](__m512i a, __m512i b) QUAKE_INLINE_LAMBDA {
    return _mm512_max_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  };
  return (vi)of_quads(of_quads(four[0], four[1]), of_quads(four[2], four[3]));
}
