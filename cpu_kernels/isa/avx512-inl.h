// The vector shim of AVX-512 (F, DQ, BW, VL). Included inside an instruction set's namespace.

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
constexpr bool kHasScalef = true;
constexpr bool kHasLookup = true;
constexpr int kReciprocalBits = 14;
constexpr int kByteOffset = 128;
typedef float vf __attribute__((vector_size(64)));
typedef std::int32_t vi __attribute__((vector_size(64)));
using vh = __m256i;

QUAKE_INLINE __mmask16 first_lanes(std::size_t n) { return static_cast<__mmask16>((1u << n) - 1); }

QUAKE_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
QUAKE_INLINE void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
QUAKE_INLINE void stream(float* p, vf v) { _mm512_stream_ps(p, v); }
QUAKE_INLINE void stream_fence() { _mm_sfence(); }
QUAKE_INLINE vf load_partial(const float* p, std::size_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
QUAKE_INLINE void store_partial(float* p, vf v, std::size_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }

QUAKE_INLINE vh load_words(const std::uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
QUAKE_INLINE void store_words(std::uint16_t* p, vh v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
QUAKE_INLINE void stream_words(std::uint16_t* p, vh v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), v);
}
QUAKE_INLINE vh load_words_partial(const std::uint16_t* p, std::size_t n) {
  return _mm256_maskz_loadu_epi16(first_lanes(n), p);
}
QUAKE_INLINE void store_words_partial(std::uint16_t* p, vh v, std::size_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), v);
}
QUAKE_INLINE vi load_bytes(const std::int8_t* p) {
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
QUAKE_INLINE vi widen(vh v) { return (vi)_mm512_cvtepu16_epi32(v); }
// One shuffle, which leaves the lower halves 0.
QUAKE_INLINE vf bfloat_to_float(vh v) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (vf)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)(lane << 16), _mm512_castsi256_si512(v));
}
QUAKE_INLINE vh narrow(vi v) { return _mm512_cvtepi32_epi16((__m512i)v); }
QUAKE_INLINE vf half_to_float(vh v) { return _mm512_cvtph_ps(v); }
QUAKE_INLINE vh float_to_half(vf v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

QUAKE_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
QUAKE_INLINE vf product_error(vf a, vf b, vf p) { return _mm512_fmsub_ps(a, b, p); }

// maxps and minps return their second operand if either is NaN.
QUAKE_INLINE vf clamp_below(vf x, float lowest) { return _mm512_max_ps(_mm512_set1_ps(lowest), x); }
QUAKE_INLINE vf clamp_above(vf x, float highest) { return _mm512_min_ps(_mm512_set1_ps(highest), x); }
// The smaller magnitude (immediate 0b10), sign cleared (0b10 << 2).
QUAKE_INLINE vf magnitude_below(vf x, float highest) {
  return _mm512_range_ps(x, _mm512_set1_ps(highest), 0b1010);
}
QUAKE_INLINE vf max_skip_nan(vf accumulated, vf x) { return _mm512_max_ps(x, accumulated); }

QUAKE_INLINE vf round(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
QUAKE_INLINE vf floor(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
// x - floor(x); 0 for infinities.
QUAKE_INLINE vf fraction(vf x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
// p * 2^floor(n), saturating to 0 and inf.
QUAKE_INLINE vf scalef(vf p, vf n) { return _mm512_scalef_ps(p, n); }

QUAKE_INLINE vf reciprocal_estimate(vf d) { return _mm512_rcp14_ps(d); }

QUAKE_INLINE vf lookup(const float (&table)[32], vi index) {
  return _mm512_permutex2var_ps(load(table), (__m512i)index, load(table + kLanes));
}

QUAKE_INLINE vf keep_first(vf v, std::size_t n, float fill) {
  return _mm512_mask_blend_ps(first_lanes(n), _mm512_set1_ps(fill), v);
}

QUAKE_INLINE vf keep_where(vf v, const unsigned char* mask, std::size_t n, float fill) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(n), mask);
  return _mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), _mm512_set1_ps(fill), v);
}

QUAKE_INLINE float reduce_add(vf v) { return _mm512_reduce_add_ps(v); }
QUAKE_INLINE float reduce_max(vf v) { return _mm512_reduce_max_ps(v); }

QUAKE_INLINE vf load_quads(const float* p, std::ptrdiff_t stride) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + stride), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * stride), 2);
  return _mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * stride), 3);
}
QUAKE_INLINE vf zip_low(vf a, vf b) { return _mm512_unpacklo_ps(a, b); }
QUAKE_INLINE vf zip_high(vf a, vf b) { return _mm512_unpackhi_ps(a, b); }
QUAKE_INLINE vf join_low(vf a, vf b) { return _mm512_shuffle_ps(a, b, 0x44); }
QUAKE_INLINE vf join_high(vf a, vf b) { return _mm512_shuffle_ps(a, b, 0xee); }
// The sum of the four groups of lanes.
QUAKE_INLINE void store_quad_sum(float* p, vf v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

QUAKE_INLINE vi pair_sums(vi a, vi b, vi c) { return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b) + c; }
QUAKE_INLINE vi to_int(vf v) { return (vi)_mm512_cvtps_epi32(v); }
QUAKE_INLINE void store_bytes(std::int8_t* p, vi v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
}
struct FloatTable {
  vf values;
};
QUAKE_INLINE FloatTable load_table(const float* values) { return {load(values)}; }
QUAKE_INLINE vf look_up(const FloatTable& table, vi index) {
  return _mm512_permutexvar_ps((__m512i)index, table.values);
}
struct ByteTable {
  __m512i values;
};
QUAKE_INLINE ByteTable load_table(const std::int8_t* values) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)))};
}
QUAKE_INLINE vi look_up(const ByteTable& table, vi index) {
  return (vi)_mm512_shuffle_epi8(table.values, (__m512i)index);
}
