// x86-64 baseline (SSE2): the vector shim, then the kernels. No FMA, no floor, no float16 conversions: this
// set is for correctness on old machines and as an independent check of the others.

#include <emmintrin.h>

#include "core/prelude.h"
#include "isa/sets.h"

namespace quake {
namespace {

constexpr int kLanes = 4;
constexpr int kRegisters = 16;
constexpr bool kHasScalef = false;
constexpr bool kHasLookup = false;
constexpr int kReciprocalBits = 24;
constexpr int kByteOffset = 128;
typedef float vf __attribute__((vector_size(16)));
typedef std::int32_t vi __attribute__((vector_size(16)));
typedef std::uint16_t vh __attribute__((vector_size(8)));

QUAKE_INLINE vf load(const float* p) { return _mm_loadu_ps(p); }
QUAKE_INLINE void store(float* p, vf v) { _mm_storeu_ps(p, v); }

QUAKE_INLINE void stream(float* p, vf v) { _mm_stream_ps(p, v); }
QUAKE_INLINE void stream_fence() { _mm_sfence(); }

QUAKE_INLINE vh load_words(const std::uint16_t* p) {
  vh v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
QUAKE_INLINE void store_words(std::uint16_t* p, vh v) { std::memcpy(p, &v, sizeof v); }
QUAKE_INLINE void stream_words(std::uint16_t* p, vh v) { store_words(p, v); }
QUAKE_INLINE vi load_bytes(const std::int8_t* p) {
  std::int32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const __m128i v = _mm_cvtsi32_si128(bytes), twice = _mm_unpacklo_epi8(v, v);
  return (vi)_mm_unpacklo_epi16(twice, twice) >> 24;
}
QUAKE_INLINE vi widen(vh v) { return vi{v[0], v[1], v[2], v[3]}; }
QUAKE_INLINE vh narrow(vi v) {
  return vh{static_cast<std::uint16_t>(v[0]), static_cast<std::uint16_t>(v[1]),
            static_cast<std::uint16_t>(v[2]), static_cast<std::uint16_t>(v[3])};
}

QUAKE_INLINE vi choose(vi mask, vi a, vi b) { return (mask & a) | (~mask & b); }

// Integer arithmetic throughout: float16 subnormals are values, and denormal floats are flushed here.
QUAKE_INLINE vf half_to_float(vh v) {
  const vi h = widen(v), magnitude = h & 0x7fff;
  const vi rebiased = (magnitude << 13) + (112 << 23);
  const vi special = rebiased + (112 << 23);                                     // inf and NaN
  const vi subnormal = (vi)(__builtin_convertvector(magnitude, vf) * 0x1p-24f);  // exact
  const vi bits = choose(magnitude >= 0x7c00, special, choose(magnitude < 0x0400, subnormal, rebiased));
  return (vf)(bits | ((h & 0x8000) << 16));
}

// Round to nearest even. (The sum is one of unsigned numbers: a NaN may have all its bits set.)
QUAKE_INLINE vh float_to_half(vf v) {
  typedef std::uint32_t vu __attribute__((vector_size(16)));
  const vi bits = (vi)v, magnitude = bits & 0x7fffffff;
  const vi rounded = (vi)(((vu)magnitude + 0xfff + (((vu)magnitude >> 13) & 1)) >> 13) - (112 << 10);
  const vi subnormal = (vi)_mm_cvtps_epi32((__m128)((vf)magnitude * 0x1p24f));
  vi h = choose(magnitude < (113 << 23), subnormal, rounded);
  h = choose(magnitude >= 0x477ff000, vi{} + 0x7c00, h);  // 65520 and above: inf
  h = choose(magnitude > 0x7f800000, vi{} + 0x7e00, h);
  return narrow(h | ((bits >> 16) & 0x8000));
}

QUAKE_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }

// Dekker's product: the parts of a and b have 12 bits each, so that their products are exact.
QUAKE_INLINE vf product_error(vf a, vf b, vf p) {
  const vf a_scaled = a * 4097.0f, b_scaled = b * 4097.0f;
  const vf a_high = a_scaled - (a_scaled - a), b_high = b_scaled - (b_scaled - b);
  const vf a_low = a - a_high, b_low = b - b_high;
  return ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low;
}

// maxps and minps return their second operand if either is NaN.
QUAKE_INLINE vf clamp_below(vf x, float lowest) { return _mm_max_ps(_mm_set1_ps(lowest), x); }
QUAKE_INLINE vf clamp_above(vf x, float highest) { return _mm_min_ps(_mm_set1_ps(highest), x); }
QUAKE_INLINE vf magnitude_below(vf x, float highest) {
  return clamp_above(_mm_andnot_ps(_mm_set1_ps(-0.0f), x), highest);
}
QUAKE_INLINE vf max_skip_nan(vf accumulated, vf x) { return _mm_max_ps(x, accumulated); }

// For |x| < 2^31, which holds after every clamp.
QUAKE_INLINE vf floor(vf x) {
  const vf truncated = _mm_cvtepi32_ps(_mm_cvttps_epi32(x));
  return truncated - (vf)((truncated > x) & (vi)(vf{} + 1.0f));
}
// To nearest even, for |x| < 2^31.
QUAKE_INLINE vf round(vf x) { return _mm_cvtepi32_ps(_mm_cvtps_epi32(x)); }
QUAKE_INLINE vf reciprocal_estimate(vf d) { return 1.0f / d; }

QUAKE_INLINE vf order1_bits(vf v) {
  v = clamp_above(v, 0x7f800000);
  const vi bits = (vi)_mm_cvtps_epi32(v) & (v >= 0x1p23f);
  return (vf)(bits | ((vi)v & (v != v)));
}

QUAKE_INLINE vf keep_first(vf v, std::size_t n, float fill) {
  const vi lane = {0, 1, 2, 3};
  return (vf)choose(lane < static_cast<int>(n), (vi)v, (vi)(vf{} + fill));
}

QUAKE_INLINE vf keep_where(vf v, const unsigned char* mask, std::size_t n, float fill) {
  for (std::size_t i = 0; i < kLanes; ++i) {
    if (i >= n || mask[i] == 0) v[i] = fill;
  }
  return v;
}

QUAKE_INLINE float reduce_add(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
QUAKE_INLINE float reduce_max(vf v) {
  __m128 s = _mm_max_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

QUAKE_INLINE vf load_quads(const float* p, std::ptrdiff_t) { return load(p); }
QUAKE_INLINE vf zip_low(vf a, vf b) { return _mm_unpacklo_ps(a, b); }
QUAKE_INLINE vf zip_high(vf a, vf b) { return _mm_unpackhi_ps(a, b); }
QUAKE_INLINE vf join_low(vf a, vf b) { return _mm_shuffle_ps(a, b, 0x44); }
QUAKE_INLINE vf join_high(vf a, vf b) { return _mm_shuffle_ps(a, b, 0xee); }
QUAKE_INLINE void store_quad_sum(float* p, vf v) { store(p, v); }

QUAKE_INLINE vi pair_sums(vi a, vi b, vi c) { return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b) + c; }
QUAKE_INLINE vi to_int(vf v) { return (vi)_mm_cvtps_epi32(v); }

#include "core/tables-inl.h"
#include "core/partial_floats-inl.h"
#include "core/partial_words-inl.h"
#include "core/bfloat_words-inl.h"
#include "isa/kernels-inl.h"

}  // namespace

void isa::fill_baseline(KernelTable& table) { fill_all<bfloat16, float, float16>(table); }

}  // namespace quake
