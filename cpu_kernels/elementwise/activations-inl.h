// The element-wise non-linearities as functors; Tanh is in core/tanh-inl.h. Included inside an instruction
// set's namespace. A functor's apply<Order>() takes one or two vectors of float32 and returns one.
//
// Adding one: a functor here and a row in QUAKE_ELEMENTWISE_KERNELS (kernels.h); docs/design.md has the rest.

struct Exp {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    return exp_product<Order, Range::kAny>(x, set1(kUnit<Order>));
  }
};

// 1/(1 + e^-x). Below -88.3 the sum would overflow; there the reciprocal is below 2^-126, that is 0.
struct Sigmoid {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    x = clamp_below(x, -88.3f);
    const vf e = exp_product<Order, Range::kNoOverflow>(x, set1(-kUnit<Order>));
    return reciprocal(e + 1.0f);
  }
};

// max(x, 0) - z e/(1 + e), which is x sigmoid(a) for z = |x| and e = e^-|a|: nothing cancels on either side,
// and z e is formed before the division. `e` comes multiplied by 2^8, so that it has not underflowed before
// the result does.
constexpr int kTailShift = 8;
constexpr float kTailScale = 1 << kTailShift;

QUAKE_INLINE vf gated(vf x, vf z, vf e) {
  return fma(-(z * e), reciprocal(e + kTailScale), clamp_below(x, 0.0f));
}

struct Silu {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    const vf z = magnitude_below(x, 100.0f);  // silu is 0 from -91.8 on; inf * 0 would be NaN
    return gated(x, z, exp_product<Order, Range::kModerate, kTailShift>(z, set1(-kUnit<Order>)));
  }
};

// x/2 (1 + tanh(a)) = x sigmoid(2a) with a = sqrt(2/pi) (x + 0.044715 x^3).
struct GeluTanh {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    constexpr float kLinear = -1.59576912f * kUnit<Order>;
    const vf z = magnitude_below(x, 12.0f);  // 0 from -10.1 on
    const vf w = fma(z * z, set1(0.044715f * kLinear), set1(kLinear));
    return gated(x, z, exp_product<Order, Range::kModerate, kTailShift>(z, w));
  }
};

// x Phi(x) = max(x, 0) - z Q(z) with z = |x| and Q the upper tail of the standard normal distribution: no
// cancellation on either side. Q(z) = e^(-z^2/2) M(z), where M, smooth and slowly falling, is a polynomial in
// 1/(1 + p z), the substitution of Hastings (1955); or 2^(log2 Q(z)), the logarithm piecewise.
struct GeluErf {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    using namespace constants;
    const vf z = magnitude_below(x, 14.0f);  // 0 from -13.2 on
    if constexpr (kHasLookup && (Order == 2 || Order == 3)) {
      const vf log_tail = piecewise<LogTailSegments<3>>(z);
      const vf tail = exp_product<Order, Range::kModerate, kTailShift>(log_tail, set1(1.0f));
      return fma(z * tail, set1(-1 / kTailScale), clamp_below(x, 0.0f));
    } else {
      const vf u = reciprocal(fma(z, set1(kGeluP[Order]), set1(1.0f)));
      return fma(-(z * gaussian<Order>(z)), mills_ratio<Order>(u), clamp_below(x, 0.0f));
    }
  }

  // e^(-z^2/2)
  template <int Order>
  QUAKE_INLINE vf gaussian(vf z) {
    if constexpr (Order <= 3) {
      return exp_product<Order, Range::kModerate>(z, z * (-0.5f * kUnit<Order>));
    } else {
      const vf square = z * z;
      return exp_product<Order, Range::kModerate>(square, set1(-0.5f), product_error(z, z, square) * -0.5f);
    }
  }

  template <int Order>
  QUAKE_INLINE vf mills_ratio(vf u) {
    using namespace constants;
    if constexpr (Order == 1) return polynomial(u, kGeluM1);
    if constexpr (Order == 2) return polynomial(u, kGeluM2);
    if constexpr (Order == 3) return polynomial(u, kGeluM3);
    if constexpr (Order == 4) return polynomial(u, kGeluM4);
    if constexpr (Order == 5) return polynomial(u, kGeluM5);
  }
};

struct Exp2 {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    if constexpr (Order <= 3) {
      // kUnit has the unit of a power of two in it, and log2(e).
      return exp_product<Order, Range::kAny>(x, set1(Order == 1 && !kHasScalef ? 0x1p23f : 1.0f));
    } else {
      x = clamp_above(clamp_below(x, -127.0f), 128.0f);
      const vf n = floor(x);
      return exp_reduced<Order>(n, (x - n) * 0.693147181f);
    }
  }
};

struct Expm1 {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    return copy_sign(exp_minus_1<Order>(x), x);  // the sign is that of x, also for -0
  }
};

// max(x, 0) + log(1 + e^-|x|), log(1 + e) being e times a polynomial: relative accuracy where x < 0.
struct Softplus {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    const vf e = exp_product<Order, Range::kNoOverflow>(abs(x), set1(-kUnit<Order>));
    return fma(e, log1p_over_e<Order>(e), clamp_below(x, 0.0f));
  }
};

// -softplus(-x)
struct LogSigmoid {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    const vf e = exp_product<Order, Range::kNoOverflow>(abs(x), set1(-kUnit<Order>));
    return fma(-e, log1p_over_e<Order>(e), clamp_above(x, 0.0f));
  }
};

struct Elu {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    return clamp_below(x, 0.0f) + exp_minus_1<Order>(clamp_above(x, 0.0f));
  }
};

// Klambauer et al., arXiv 1706.02515: scale (x > 0 ? x : alpha (e^x - 1)).
struct Selu {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    constexpr float kScale = 1.05070099f, kScaleAlpha = 1.75809934f;
    return fma(exp_minus_1<Order>(clamp_above(x, 0.0f)), set1(kScaleAlpha), clamp_below(x, 0.0f) * kScale);
  }
};

// x tanh(softplus(x)) = max(x, 0) - z w (b w + c)/(a + w (b w + 2)), z = |x|, w = e^-z, where (a, b, c) is
// (1, 2, 0) for x >= 0 and (2, 1, 2) for x < 0. As in gated(), z w is formed from w times 2^8.
struct Mish {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    const vf z = magnitude_below(x, 100.0f);
    const vf scaled = exp_product<Order, Range::kModerate, kTailShift>(z, set1(-kUnit<Order>));
    const vf w = scaled * (1 / kTailScale);
    const vf s = copy_sign(set1(0.5f), x), bw = (s + 1.5f) * w;
    const vf numerator = (1.0f - 2.0f * s + bw) * (1 / kTailScale);
    const vf denominator = fma(w, bw + 2.0f, 1.5f - s);
    return fma(-(z * scaled), numerator * reciprocal(denominator), clamp_below(x, 0.0f));
  }
};

// x sigmoid(1.702 x)
struct QuickGelu {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    const vf z = magnitude_below(x, 60.0f);  // 0 from -53.7 on
    return gated(x, z, exp_product<Order, Range::kModerate, kTailShift>(z, set1(-1.702f * kUnit<Order>)));
  }
};

// ---- Two operands ----

// log(e^a + e^b) = max(a, b) + log(1 + e^-|a - b|)
struct LogAddExp {
  template <int Order>
  QUAKE_INLINE vf apply(vf a, vf b) {
    // Equal infinities have difference 0; a NaN stays in the difference.
    constexpr float kLargest = 0x1.fffffep127f;
    const vf difference =
        clamp_above(clamp_below(a, -kLargest), kLargest) - clamp_above(clamp_below(b, -kLargest), kLargest);
    const vf e = exp_product<Order, Range::kNoOverflow>(abs(difference), set1(-kUnit<Order>));
    return fma(e, log1p_over_e<Order>(e), max_skip_nan(a, b));
  }
};

template <class Activation>
struct Gated {
  template <int Order>
  QUAKE_INLINE vf apply(vf gate, vf value) {
    return Activation::template apply<Order>(gate) * value;
  }
};
using Glu = Gated<Sigmoid>;
using Swiglu = Gated<Silu>;
using GegluTanh = Gated<GeluTanh>;
using GegluErf = Gated<GeluErf>;

template <class Activation>
struct Biased {
  template <int Order>
  QUAKE_INLINE vf apply(vf x, vf bias) {
    return Activation::template apply<Order>(x + bias);
  }
};
using BiasSilu = Biased<Silu>;
using BiasGeluTanh = Biased<GeluTanh>;
using BiasGeluErf = Biased<GeluErf>;
