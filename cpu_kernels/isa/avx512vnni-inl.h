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

// Of each of 16 vectors op over its lanes, in the lane of its number. Op takes two vectors.
template <class Op>
QUAKE_INLINE vf fold_lanes(const vf (&v)[16], const Op& op) {
  vf four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vf a = op(zip_low(v[4 * i], v[4 * i + 1]), zip_high(v[4 * i], v[4 * i + 1]));
    const vf b = op(zip_low(v[4 * i + 2], v[4 * i + 3]), zip_high(v[4 * i + 2], v[4 * i + 3]));
    four[i] = op(join_low(a, b), join_high(a, b));
  }
  const auto of_quads = [&](vf a, vf b) QUAKE_INLINE_LAMBDA {
    return op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return of_quads(of_quads(four[0], four[1]), of_quads(four[2], four[3]));
}
