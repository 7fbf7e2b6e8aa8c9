// The vector shim of AVX2 with FMA and F16C. Included inside an instruction set's namespace.

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
constexpr bool kHasScalef = false;
constexpr bool kHasLookup = false;
constexpr int kReciprocalBits = 11;
constexpr int kByteOffset = 128;
typedef float vf __attribute__((vector_size(32)));
typedef std::int32_t vi __attribute__((vector_size(32)));
using vh = __m128i;

QUAKE_INLINE __m256i first_lanes(std::size_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

QUAKE_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
QUAKE_INLINE void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
QUAKE_INLINE void stream(float* p, vf v) { _mm256_stream_ps(p, v); }
QUAKE_INLINE void stream_fence() { _mm_sfence(); }
QUAKE_INLINE vf load_partial(const float* p, std::size_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
QUAKE_INLINE void store_partial(float* p, vf v, std::size_t n) { _mm256_maskstore_ps(p, first_lanes(n), v); }

QUAKE_INLINE vh load_words(const std::uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
QUAKE_INLINE void store_words(std::uint16_t* p, vh v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
QUAKE_INLINE void stream_words(std::uint16_t* p, vh v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), v); }
QUAKE_INLINE vi load_bytes(const std::int8_t* p) {
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
QUAKE_INLINE vi widen(vh v) { return (vi)_mm256_cvtepu16_epi32(v); }
QUAKE_INLINE vh narrow(vi v) {
  const __m256i w = (__m256i)v;
  return _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
}
QUAKE_INLINE vf half_to_float(vh v) { return _mm256_cvtph_ps(v); }
QUAKE_INLINE vh float_to_half(vf v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

QUAKE_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
QUAKE_INLINE vf product_error(vf a, vf b, vf p) { return _mm256_fmsub_ps(a, b, p); }

// maxps and minps return their second operand if either is NaN.
QUAKE_INLINE vf clamp_below(vf x, float lowest) { return _mm256_max_ps(_mm256_set1_ps(lowest), x); }
QUAKE_INLINE vf clamp_above(vf x, float highest) { return _mm256_min_ps(_mm256_set1_ps(highest), x); }
QUAKE_INLINE vf magnitude_below(vf x, float highest) {
  return clamp_above(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), highest);
}
QUAKE_INLINE vf max_skip_nan(vf accumulated, vf x) { return _mm256_max_ps(x, accumulated); }

QUAKE_INLINE vf round(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
QUAKE_INLINE vf floor(vf x) { return _mm256_floor_ps(x); }
QUAKE_INLINE vf reciprocal_estimate(vf d) { return _mm256_rcp_ps(d); }

QUAKE_INLINE vf order1_bits(vf v) {
  v = clamp_above(v, 0x7f800000);
  const __m256 normal = _mm256_cmp_ps(v, _mm256_set1_ps(0x00800000), _CMP_GE_OQ);
  const __m256 bits = _mm256_castsi256_ps(_mm256_cvtps_epi32(v));
  const __m256 nan = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_or_ps(_mm256_and_ps(bits, normal), nan);
}

QUAKE_INLINE vf keep_first(vf v, std::size_t n, float fill) {
  return _mm256_blendv_ps(_mm256_set1_ps(fill), v, _mm256_castsi256_ps(first_lanes(n)));
}

QUAKE_INLINE vf keep_where(vf v, const unsigned char* mask, std::size_t n, float fill) {
  std::uint64_t bytes = 0;
  if (n == kLanes) {
    std::memcpy(&bytes, mask, 8);
  } else {
    for (std::size_t i = 0; i < n; ++i) bytes |= static_cast<std::uint64_t>(mask[i]) << (8 * i);
  }
  const __m256i words = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes)));
  const __m256i dropped = _mm256_cmpeq_epi32(words, _mm256_setzero_si256());
  return _mm256_blendv_ps(v, _mm256_set1_ps(fill), _mm256_castsi256_ps(dropped));
}

QUAKE_INLINE float reduce_add(vf v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
QUAKE_INLINE float reduce_max(vf v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

QUAKE_INLINE vf load_quads(const float* p, std::ptrdiff_t stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
}
QUAKE_INLINE vf zip_low(vf a, vf b) { return _mm256_unpacklo_ps(a, b); }
QUAKE_INLINE vf zip_high(vf a, vf b) { return _mm256_unpackhi_ps(a, b); }
QUAKE_INLINE vf join_low(vf a, vf b) { return _mm256_shuffle_ps(a, b, 0x44); }
QUAKE_INLINE vf join_high(vf a, vf b) { return _mm256_shuffle_ps(a, b, 0xee); }
// The sum of the two groups of lanes.
QUAKE_INLINE void store_quad_sum(float* p, vf v) {
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}

QUAKE_INLINE vi pair_sums(vi a, vi b, vi c) { return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b) + c; }
QUAKE_INLINE vi byte_pairs(vi a, vi b, vi c) {
  return (vi)_mm256_add_epi16((__m256i)c, _mm256_maddubs_epi16((__m256i)a, (__m256i)b));
}
QUAKE_INLINE vi to_int(vf v) { return (vi)_mm256_cvtps_epi32(v); }
QUAKE_INLINE void store_bytes(std::int8_t* p, vi v) {
  const __m256i in_halves = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
  const __m128i both =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(in_halves), _mm256_extracti128_si256(in_halves, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), both);
}
struct FloatTable {
  vf low, high;
};
QUAKE_INLINE FloatTable load_table(const float* values) { return {load(values), load(values + kLanes)}; }
QUAKE_INLINE vf look_up(const FloatTable& table, vi index) {
  const __m256i i = (__m256i)index;
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, i), _mm256_permutevar8x32_ps(table.high, i),
                          _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
struct ByteTable {
  __m256i values;
};
QUAKE_INLINE ByteTable load_table(const std::int8_t* values) {
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)))};
}
QUAKE_INLINE vi look_up(const ByteTable& table, vi index) {
  return (vi)_mm256_shuffle_epi8(table.values, (__m256i)index);
}
