// The vector interface that the kernels are written against, and the parts of it that all instruction
// sets share. Included inside an instruction set's namespace, after its shim.
//
// A shim (isa/*.cc) defines:
//   kLanes                          floats in a vector
//   vf, vi, vh                      kLanes floats; kLanes int32 (GCC vector types: + - * & | << work);
//                                   kLanes 16-bit words
//   kRegisters                      vector registers
//   kHasScalef                      there are scalef() and fraction(), each one instruction
//   kReciprocalBits                 accuracy of reciprocal_estimate(d); 24 is a true division
//   load(const float*), store, load_partial(p, n), store_partial(p, v, n)       0 < n < kLanes
//   stream(float*, v)               store past the caches, to an address aligned to the vector
//   load_words(const uint16_t*), store_words, stream_words and their _partial forms
//   stream_fence()                  orders streamed stores before whatever follows
//   load_bytes(const int8_t*) -> vi
//   widen(vh) -> vi, narrow(vi) -> vh, half_to_float(vh) -> vf, float_to_half(vf) -> vh
//   float_to_bfloat(vf) -> vh       to nearest even (bfloat_words-inl.h does it by integer operations)
//   join_bfloats(even, odd) -> vi   the same of two vectors, their results in turn
//   Sets that multiply bfloat16 have the next four, for 2 * kLanes of them in a vi:
//     pair_products(a, b, c) -> vf    c + a0 b0 + a1 b1 of the pairs in each lane
//     append_bfloats(a, b) -> vi      a rounded to bfloat16, then b
//     interleave_low(a, b) -> vi, interleave_high   a0 b0 a1 b1 … of the lower half; of the upper half
//     load_bfloats(p, n) -> vi        the first n, 0 < n <= 2 * kLanes; the others are 0
//   fma(a, b, c)                    a*b + c, one rounding where the machine has it, else two
//   product_error(a, b, p)          a*b - p, exact, for p the rounded product
//   clamp_below(x, lowest), clamp_above(x, highest)       a NaN in x stays
//   magnitude_below(x, highest)     min(|x|, highest); what becomes of a NaN is open
//   max_skip_nan(accumulated, x)    a NaN in x is ignored
//   floor(x), round(x)              round is to nearest even
//   fraction(x), scalef(p, n)       x - floor(x), p * 2^floor(n), if kHasScalef
//   kHasLookup                      there is the next: two registers of coefficients, one permutation
//   lookup(table, index)            table[index & 31] in each lane, of 32 floats
//   order1_bits(v)                  the float whose bits are the integer nearest to v, saturated to 0 and
//                                   inf; NaN stays (only without scalef)
//   keep_where(v, mask, n, fill)    those of the first n lanes of v whose byte in mask is not 0, else fill
//   keep_first(v, n, fill)          the first n lanes of v, and fill in the others
//   reduce_add(v), reduce_max(v)    over the lanes
//   load_quads(p, stride)           groups of 4 lanes, from p, p + stride, …
//   zip_low(a, b), zip_high(a, b)   of each group: a0 b0 a1 b1; a2 b2 a3 b3
//   join_low(a, b), join_high(a, b) of each group: a0 a1 b0 b1; a2 a3 b2 b3
//   store_quad_sum(float*, v)       the sum of the groups, 4 floats

// What an instruction set lacks has a name all the same, so that code which `if constexpr` leaves out can be
// read. None of these is defined.
template <class F>
F fraction(F x);
template <class F>
F scalef(F p, F n);
template <class F>
F order1_bits(F v);
template <class I>
vf lookup(const float (&table)[32], I index);
template <class I>
vf pair_products(I a, I b, vf c);
template <class F>
vi append_bfloats(F a, F b);
template <class I>
I interleave_low(I a, I b);
template <class I>
I interleave_high(I a, I b);
template <class I>
vi load_bfloats(const I* p, std::size_t n);

constexpr float kInfinity = __builtin_inff();

QUAKE_INLINE vf set1(float value) { return value - vf{}; }

QUAKE_INLINE vi as_int(vf v) { return (vi)v; }
QUAKE_INLINE vf as_float(vi v) { return (vf)v; }

QUAKE_INLINE vf abs(vf x) { return as_float(as_int(x) & 0x7fffffff); }

// |magnitude| with the sign of `sign`.
QUAKE_INLINE vf copy_sign(vf magnitude, vf sign) {
  return as_float((as_int(magnitude) & 0x7fffffff) | (as_int(sign) & INT32_MIN));
}

// A shim may have a shorter one.
template <class Words>
QUAKE_INLINE vf bfloat_to_float(Words words) {
  return as_float(widen(words) << 16);
}

QUAKE_INLINE vf load(const bfloat16* p) { return bfloat_to_float(load_words(&p->bits)); }
QUAKE_INLINE vf load(const float16* p) { return half_to_float(load_words(&p->bits)); }
QUAKE_INLINE vf load(const std::int8_t* p) { return __builtin_convertvector(load_bytes(p), vf); }
QUAKE_INLINE vf load_partial(const bfloat16* p, std::size_t n) {
  return bfloat_to_float(load_words_partial(&p->bits, n));
}
QUAKE_INLINE vf load_partial(const float16* p, std::size_t n) {
  return half_to_float(load_words_partial(&p->bits, n));
}
QUAKE_INLINE vf load_partial(const std::int8_t* p, std::size_t n) {
  std::int8_t values[kLanes] = {};
  for (std::size_t i = 0; i < n; ++i) values[i] = p[i];
  return load(values);
}
QUAKE_INLINE void store(bfloat16* p, vf v) { store_words(&p->bits, float_to_bfloat(v)); }
QUAKE_INLINE void store(float16* p, vf v) { store_words(&p->bits, float_to_half(v)); }
QUAKE_INLINE void stream(bfloat16* p, vf v) { stream_words(&p->bits, float_to_bfloat(v)); }
QUAKE_INLINE void stream(float16* p, vf v) { stream_words(&p->bits, float_to_half(v)); }
QUAKE_INLINE void store_partial(bfloat16* p, vf v, std::size_t n) {
  store_words_partial(&p->bits, float_to_bfloat(v), n);
}
QUAKE_INLINE void store_partial(float16* p, vf v, std::size_t n) {
  store_words_partial(&p->bits, float_to_half(v), n);
}

// The first n elements, 0 < n <= kLanes.
template <class T>
QUAKE_INLINE vf load_up_to(const T* p, std::size_t n) {
  return n == kLanes ? load(p) : load_partial(p, n);
}
template <class T>
QUAKE_INLINE void store_up_to(T* p, vf v, std::size_t n) {
  n == kLanes ? store(p, v) : store_partial(p, v, n);
}
QUAKE_INLINE vf keep_up_to(vf v, std::size_t n, float fill) { return n == kLanes ? v : keep_first(v, n, fill); }

// A NaN of any bits as one whose low half is clear, which float_to_bfloat keeps.
QUAKE_INLINE vf plain_nans(vf v) { return v != v ? set1(__builtin_nanf("")) : v; }

// 2 * kLanes consecutive elements of an array as two vectors. The order of the elements in them depends on the
// type alone: bfloat16 splits into even and odd ones, which takes a shift and a mask where widening takes
// shuffles, and joins as cheaply.
struct Pair {
  vf first, second;
};

template <class T>
QUAKE_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
QUAKE_INLINE Pair load_pair(const bfloat16* p) {
  vi words;
  std::memcpy(&words, p, sizeof words);
  return {as_float(words << 16), as_float(words & ~0xffff)};
}

// The kind of stores to use for an output and a distance between the rows in it: streaming needs alignment.
template <class T>
QUAKE_INLINE bool streamable(const T* y, std::size_t stride, Stores stores) {
  return stores == Stores::kStreamed && stride % (2 * kLanes) == 0 &&
         reinterpret_cast<std::uintptr_t>(y) % (2 * kLanes * sizeof(T)) == 0;
}

template <class T>
QUAKE_INLINE void store_pair(T* p, Pair v, bool streamed) {
  if (streamed) {
    stream(p, v.first);
    stream(p + kLanes, v.second);
  } else {
    store(p, v.first);
    store(p + kLanes, v.second);
  }
}
QUAKE_INLINE void store_pair(bfloat16* p, Pair v, bool streamed) {
  const vi words = join_bfloats(v.first, v.second);
  if (streamed) {
    stream(reinterpret_cast<float*>(p), as_float(words));
  } else {
    std::memcpy(p, &words, sizeof words);
  }
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
