// The vector shim of NEON. Included inside an instruction set's namespace.

constexpr int kLanes = 4;
constexpr int kRegisters = 32;
constexpr bool kHasScalef = false;
constexpr bool kHasLookup = false;
constexpr int kReciprocalBits = 8;
constexpr int kByteOffset = 0;
typedef float vf __attribute__((vector_size(16)));
typedef std::int32_t vi __attribute__((vector_size(16)));
using vh = uint16x4_t;

QUAKE_INLINE vf load(const float* p) { return (vf)vld1q_f32(p); }
QUAKE_INLINE void store(float* p, vf v) { vst1q_f32(p, (float32x4_t)v); }
// The hint for streaming stores (stnp) has no intrinsic, and little effect.
QUAKE_INLINE void stream(float* p, vf v) { store(p, v); }
QUAKE_INLINE void stream_fence() {}
QUAKE_INLINE vh load_words(const std::uint16_t* p) { return vld1_u16(p); }
QUAKE_INLINE void store_words(std::uint16_t* p, vh v) { vst1_u16(p, v); }
QUAKE_INLINE void stream_words(std::uint16_t* p, vh v) { store_words(p, v); }
QUAKE_INLINE vi load_bytes(const std::int8_t* p) {
  std::int32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return (vi)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes)))));
}
QUAKE_INLINE vi widen(vh v) { return (vi)vmovl_u16(v); }
QUAKE_INLINE vh narrow(vi v) { return vmovn_u32((uint32x4_t)v); }
QUAKE_INLINE vf half_to_float(vh v) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(v)); }
QUAKE_INLINE vh float_to_half(vf v) { return vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)); }

QUAKE_INLINE vf fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
QUAKE_INLINE vf product_error(vf a, vf b, vf p) { return fma(a, b, -p); }

// fmax and fmin return NaN if either operand is NaN, fmaxnm the other operand.
QUAKE_INLINE vf clamp_below(vf x, float lowest) { return (vf)vmaxq_f32((float32x4_t)x, vdupq_n_f32(lowest)); }
QUAKE_INLINE vf clamp_above(vf x, float highest) { return (vf)vminq_f32((float32x4_t)x, vdupq_n_f32(highest)); }
QUAKE_INLINE vf magnitude_below(vf x, float highest) {
  return clamp_above((vf)vabsq_f32((float32x4_t)x), highest);
}
QUAKE_INLINE vf max_skip_nan(vf accumulated, vf x) {
  return (vf)vmaxnmq_f32((float32x4_t)accumulated, (float32x4_t)x);
}

QUAKE_INLINE vf round(vf x) { return (vf)vrndnq_f32((float32x4_t)x); }
QUAKE_INLINE vf floor(vf x) { return (vf)vrndmq_f32((float32x4_t)x); }
QUAKE_INLINE vf reciprocal_estimate(vf d) { return (vf)vrecpeq_f32((float32x4_t)d); }

QUAKE_INLINE vf order1_bits(vf v) {
  v = clamp_above(v, 0x7f800000);
  const vi bits = (vi)vcvtnq_s32_f32((float32x4_t)v) & (vi)(v >= 0x1p23f);
  return (vf)(bits | ((vi)v & (vi)(v != v)));
}

QUAKE_INLINE vf keep_first(vf v, std::size_t n, float fill) {
  const vi lane = {0, 1, 2, 3};
  const vi kept = (vi)(lane < static_cast<int>(n));
  return (vf)((kept & (vi)v) | (~kept & (vi)(vf{} + fill)));
}

QUAKE_INLINE vf keep_where(vf v, const unsigned char* mask, std::size_t n, float fill) {
  for (std::size_t i = 0; i < kLanes; ++i) {
    if (i >= n || mask[i] == 0) v[i] = fill;
  }
  return v;
}

QUAKE_INLINE float reduce_add(vf v) { return vaddvq_f32((float32x4_t)v); }
QUAKE_INLINE float reduce_max(vf v) { return vmaxnmvq_f32((float32x4_t)v); }

QUAKE_INLINE vf load_quads(const float* p, std::ptrdiff_t) { return load(p); }
QUAKE_INLINE vf zip_low(vf a, vf b) { return (vf)vzip1q_f32((float32x4_t)a, (float32x4_t)b); }
QUAKE_INLINE vf zip_high(vf a, vf b) { return (vf)vzip2q_f32((float32x4_t)a, (float32x4_t)b); }
QUAKE_INLINE vf join_low(vf a, vf b) { return (vf)vzip1q_f64((float64x2_t)a, (float64x2_t)b); }
QUAKE_INLINE vf join_high(vf a, vf b) { return (vf)vzip2q_f64((float64x2_t)a, (float64x2_t)b); }
QUAKE_INLINE void store_quad_sum(float* p, vf v) { store(p, v); }

QUAKE_INLINE vi pair_sums(vi a, vi b, vi c) {
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return (vi)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)) + c;
}
QUAKE_INLINE vi to_int(vf v) { return (vi)vcvtnq_s32_f32((float32x4_t)v); }

#include "core/tables-inl.h"
#include "core/partial_floats-inl.h"
#include "core/partial_words-inl.h"
#include "core/bfloat_words-inl.h"
