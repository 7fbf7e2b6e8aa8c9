// The exponential: 2^t = 2^floor(t) * 2^fraction(t), the first factor written into the exponent field, the
// second a polynomial of degree `Order`. Source: QuAKE, arXiv 2412.00408 (its methods are orders 1 and 2);
// the constants are derived in tools/derive_constants.py. Included inside an instruction set's namespace.
//
// Maximum relative error where the result is normal and finite: 2.99e-2, 2.7e-3, 1.08e-4, 3.6e-6, 2.5e-7.

// A function by a polynomial for each of 32 segments (constants.h): cheaper than one polynomial for all of
// its domain where a lookup costs no more than an operation.
template <class Segments>
QUAKE_INLINE vf piecewise(vf z) {
  const vf y = fma(z, set1(Segments::kScale), set1(Segments::kOffset));
  const vi row = as_int(y) >> Segments::kShift;
  constexpr int kDegree = sizeof(Segments::c) / sizeof(Segments::c[0]) - 1;
  const vf x = Segments::kLocal ? z - lookup(Segments::kStart, row) : z;
  vf p = lookup(Segments::c[kDegree], row);
#pragma GCC unroll 8
  for (int i = kDegree - 1; i >= 0; --i) p = fma(p, x, lookup(Segments::c[i], row));
  return p;
}

// The argument is a product x*w whose factor w carries the conversion into the unit that an order works in:
// one nat is kUnit units. Order 1 without scalef wants 2^-23 of a power of two (one step of the result's
// bits), orders 1 to 3 powers of two, orders 4 and 5 nats, because they reduce with a low part.
template <int Order>
constexpr float kUnit = Order >= 4                  ? 1.0f
                        : Order == 1 && !kHasScalef ? constants::kLog2e * 0x1p23f
                                                    : constants::kLog2e;

// c[0] + c[1] x + … of the first Count coefficients, times `scale`.
template <int Count, std::size_t N>
QUAKE_INLINE vf horner(vf x, const float (&c)[N], float scale = 1.0f) {
  vf p = set1(c[Count - 1] * scale);
#pragma GCC unroll 16
  for (int i = Count - 2; i >= 0; --i) p = fma(p, x, set1(c[i] * scale));
  return p;
}

// The same of all coefficients.
template <std::size_t N>
QUAKE_INLINE vf polynomial(vf x, const float (&c)[N], float scale = 1.0f) {
  return horner<static_cast<int>(N)>(x, c, scale);
}

// 2^n for integral n with 0 <= n + 127 + Shift <= 255, times 2^Shift (0 and inf at the two ends).
template <int Shift = 0>
QUAKE_INLINE vf power_of_two(vf n) {
  return as_float(as_int(n + (0x1p23f + 127 + Shift)) << 23);
}

// p 2^n, and 2^Shift, which scalef() has in p already.
template <int Shift>
QUAKE_INLINE vf times_power_of_two(vf p, vf n) {
  if constexpr (kHasScalef) {
    return scalef(p, n);
  } else {
    return p * power_of_two<Shift>(n);
  }
}

// What the caller knows of u = x*w, in nats: whatever it rules out need not be clamped.
enum class Range {
  kAny,         // nothing
  kNoOverflow,  // u + Shift ln 2 < 128 ln 2, or NaN
  kModerate,    // that, and u > -2^16
};

// 2^n e^r 2^Shift, with e^r as 1 + r (c1 + …): orders 4 and 5, r in [0, ln 2].
template <int Order, int Shift = 0>
QUAKE_INLINE vf exp_reduced(vf n, vf r) {
  using namespace constants;
  constexpr float kScale = kHasScalef ? 1 << Shift : 1.0f;
  vf p;
  if constexpr (Order == 4) p = fma(horner<4>(r, kExpPoly4, kScale), r, set1(kScale));
  if constexpr (Order == 5) p = fma(horner<5>(r, kExpPoly5, kScale), r, set1(kScale));
  return times_power_of_two<Shift>(p, n);
}

struct NoCorrection {};
QUAKE_INLINE vf corrected(vf r, NoCorrection) { return r; }
QUAKE_INLINE vf corrected(vf r, vf low) { return r + low; }

// e^(x*w) * 2^Shift for w in units. `low` corrects the rounding of the product (orders 4 and 5 only).
// Overflow gives inf, a result below 2^-126 gives 0 (denormals are flushed), NaN gives NaN.
template <int Order, Range kRange, int Shift = 0, class Low = NoCorrection>
QUAKE_INLINE vf exp_product(vf x, vf w, Low low = {}, float order1_shift = constants::kOrder1Shift) {
  using namespace constants;
  if constexpr (Order == 1 && !kHasScalef) {
    // The bits of the result as a number: exponent and mantissa in one sum.
    return order1_bits(fma(x, w, set1((127 - order1_shift + Shift) * 0x1p23f)));
  } else {
    // scalef() saturates by itself, but the reduction of orders 4 and 5 would subtract infinities.
    constexpr bool kClampAbove = kRange == Range::kAny && (!kHasScalef || Order >= 4);
    constexpr bool kClampBelow = !kHasScalef || (Order >= 4 && kRange != Range::kModerate);
    // scalef() has room for Shift in the polynomial's coefficients, the exponent field in the exponent.
    constexpr float kScale = kHasScalef ? 1 << Shift : 1.0f;
    vf n, f, p;
    if constexpr (Order <= 3) {
      n = Order == 1 ? fma(x, w, set1(-order1_shift)) : x * w;
      if constexpr (kHasScalef) {
        f = fraction(n);  // scalef() takes the floor itself, and saturates
      } else {
        vf t = clamp_below(n, -127.0f - Shift);
        if constexpr (kClampAbove) t = clamp_above(t, 128.0f - Shift);
        n = floor(t);
        f = t - n;
      }
      if constexpr (Order == 1) p = fma(f, set1(kScale), set1(kScale));
      if constexpr (Order == 2) p = fma(horner<2>(f, kExp2Poly2, kScale), f, set1(kScale));
      if constexpr (Order == 3) p = fma(horner<3>(f, kExp2Poly3, kScale), f, set1(kScale));
    } else {
      // Inside the range of power_of_two() by 0.01, so that floor() cannot leave it.
      constexpr float kLn2 = 0.693147181f;
      vf u = x * w;
      if constexpr (kClampBelow) u = clamp_below(u, (-127.0f - Shift) * kLn2 + 0.01f);
      if constexpr (kClampAbove) u = clamp_above(u, (128.0f - Shift) * kLn2 + 0.01f);
      n = floor(u * kLog2e);
      f = corrected(fma(n, set1(-kLn2Lo), fma(n, set1(-kLn2Hi), u)), low);
      return exp_reduced<Order, Shift>(n, f);
    }
    return times_power_of_two<Shift>(p, n);
  }
}

// A weight of a softmax: e^difference, for a difference of at most 0. A constant factor cancels there, so order
// 1 has a constant of its own.
template <int Order>
QUAKE_INLINE vf softmax_weight(vf difference) {
  return exp_product<Order, Range::kNoOverflow>(difference, set1(kUnit<Order>), NoCorrection{},
                                                constants::kSoftmaxShift);
}

// e^x - 1 = 2^n g + (2^n - 1), g = 2^f - 1 = f q(f), for n the integer nearest to x log2(e): near 0, n is 0
// and the result is g, whose relative error is the polynomial's. With h = 2^(n-1), which stays finite, it is
// (h 2g + (h - 1/2)) + (h - 1/2).
template <int Order>
QUAKE_INLINE vf exp_minus_1(vf x) {
  using namespace constants;
  vf n, f, q;  // q is twice the polynomial
  if constexpr (Order <= 3) {
    const vf t = clamp_above(clamp_below(x * kLog2e, -30.0f), 128.5f);
    n = round(t);
    f = t - n;
  } else {
    x = clamp_above(clamp_below(x, -20.7f), 89.0f);
    n = round(x * kLog2e);
    f = fma(n, set1(-kLn2Lo), fma(n, set1(-kLn2Hi), x)) * kLog2e;
  }
  if constexpr (Order == 1) q = polynomial(f, kExpm1Centered1, 2.0f);
  if constexpr (Order == 2) q = polynomial(f, kExpm1Centered2, 2.0f);
  if constexpr (Order == 3) q = polynomial(f, kExpm1Centered3, 2.0f);
  if constexpr (Order == 4) q = polynomial(f, kExpm1Centered4, 2.0f);
  if constexpr (Order == 5) q = polynomial(f, kExpm1Centered5, 2.0f);
  vf h;
  if constexpr (kHasScalef) {
    h = scalef(set1(0.5f), n);
  } else {
    h = power_of_two<-1>(n);
  }
  return fma(h, f * q, h - 0.5f) + (h - 0.5f);
}

// log(1 + e) for e in [0, 1], less the factor e.
template <int Order>
QUAKE_INLINE vf log1p_over_e(vf e) {
  using namespace constants;
  if constexpr (Order == 1) return polynomial(e, kLog1p1);
  if constexpr (Order == 2) return polynomial(e, kLog1p2);
  if constexpr (Order == 3) return polynomial(e, kLog1p3);
  if constexpr (Order == 4) return polynomial(e, kLog1p4);
  if constexpr (Order == 5) return polynomial(e, kLog1p5);
}
