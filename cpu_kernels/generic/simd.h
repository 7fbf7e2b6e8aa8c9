// The vector interface that the kernels are written against, and the parts of it that all instruction
// sets share. Included inside an instruction set's namespace, after its shim.
//
// A shim (isa/*.cc) defines:
//   kLanes                          floats in a vector
//   vf, vi, vh                      kLanes floats; kLanes int32 (GCC vector types: + - * & | << work);
//                                   kLanes 16-bit words
//   kHasScalef                      scalef() and fraction() are single instructions
//   kReciprocalBits                 accuracy of reciprocal_estimate(d); 24 is a true division
//   load(const float*), store, load_partial(p, n), store_partial(p, v, n)       0 < n < kLanes
//   load_words(const uint16_t*), store_words and their _partial forms
//   widen(vh) -> vi, narrow(vi) -> vh, half_to_float(vh) -> vf, float_to_half(vf) -> vh
//   fma(a, b, c)                    a*b + c, one rounding where the machine has it, else two
//   product_error(a, b, p)          a*b - p, exact, for p the rounded product
//   clamp_below(x, lowest), clamp_above(x, highest)       a NaN in x stays
//   magnitude_below(x, highest)     min(|x|, highest); what becomes of a NaN is open
//   max_skip_nan(accumulated, x)    a NaN in x is ignored
//   floor(x), and with scalef: fraction(x) = x - floor(x), scalef(p, n) = p * 2^floor(n)
//   order1_bits(v)                  the float whose bits are the integer nearest to v, saturated to 0 and
//                                   inf; NaN stays (only without scalef)
//   keep_first(v, n, fill)          the first n lanes of v, and fill in the others
//   reduce_add(v), reduce_max(v)    over the lanes

QUAKE_INLINE vf set1(float value) { return vf{} + value; }

QUAKE_INLINE vi as_int(vf v) { return (vi)v; }
QUAKE_INLINE vf as_float(vi v) { return (vf)v; }

QUAKE_INLINE vf abs(vf x) { return as_float(as_int(x) & 0x7fffffff); }

// |magnitude| with the sign of `sign`.
QUAKE_INLINE vf copy_sign(vf magnitude, vf sign) {
  return as_float((as_int(magnitude) & 0x7fffffff) | (as_int(sign) & INT32_MIN));
}

QUAKE_INLINE vf bfloat_to_float(vh words) { return as_float(widen(words) << 16); }

// Round to nearest even. The NaNs that reach this have their low half clear (they come from a bfloat16
// or from an invalid operation), so the addition cannot carry them into an infinity.
QUAKE_INLINE vh float_to_bfloat(vf x) {
  const vi bits = as_int(x);
  return narrow(((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff);
}

QUAKE_INLINE vf load(const bfloat16* p) { return bfloat_to_float(load_words(&p->bits)); }
QUAKE_INLINE vf load(const float16* p) { return half_to_float(load_words(&p->bits)); }
QUAKE_INLINE vf load_partial(const bfloat16* p, std::size_t n) {
  return bfloat_to_float(load_words_partial(&p->bits, n));
}
QUAKE_INLINE vf load_partial(const float16* p, std::size_t n) {
  return half_to_float(load_words_partial(&p->bits, n));
}
QUAKE_INLINE void store(bfloat16* p, vf v) { store_words(&p->bits, float_to_bfloat(v)); }
QUAKE_INLINE void store(float16* p, vf v) { store_words(&p->bits, float_to_half(v)); }
QUAKE_INLINE void store_partial(bfloat16* p, vf v, std::size_t n) {
  store_words_partial(&p->bits, float_to_bfloat(v), n);
}
QUAKE_INLINE void store_partial(float16* p, vf v, std::size_t n) {
  store_words_partial(&p->bits, float_to_half(v), n);
}

// 1/d for positive d < 2^128; 0 where 1/d is below 2^-126. Of an estimate r with e = 1 - d r, Newton's step
// r (1 + e) doubles the bits and r (1 + e + e^2) triples them; both approach from below, so that 1/(1 + x) is
// at most 1, and it is 1 for x = 0.
QUAKE_INLINE vf reciprocal(vf d) {
  vf r = reciprocal_estimate(d);
#pragma GCC unroll 2
  for (int bits = kReciprocalBits; bits < 24;) {
    const vf e = fma(-d, r, set1(1.0f));
    const bool tripled = bits * 2 < 24 && bits * 3 > 30;
    r = fma(r, tripled ? fma(e, e, e) : e, r);
    bits *= tripled ? 3 : 2;
  }
  return r;
}
