// The element-wise non-linearities as functors, and the loop that maps one over an array. Included inside
// an instruction set's namespace. A functor's apply<Order>() takes and returns one vector of float32.
//
// Adding one: a functor here, a row in QUAKE_ELEMENTWISE_KERNELS (kernels.h), and on the Python side a row
// in _primitives.py, a function in reference.py and one in activations.py.

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

// x Phi(x) = max(x, 0) - z Q(z) with z = |x| and Q the upper tail of the standard normal distribution,
// Q(z) = e^(-z^2/2) M(z): no cancellation on either side. M, smooth and slowly falling, is a polynomial
// in 1/(1 + p z), the substitution of Hastings (1955).
struct GeluErf {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    using namespace constants;
    const vf z = magnitude_below(x, 14.0f);  // 0 from -13.2 on
    const vf u = reciprocal(fma(z, set1(kGeluP[Order]), set1(1.0f)));
    vf e;
    if constexpr (Order <= 3) {
      e = exp_product<Order, Range::kModerate>(z, z * (-0.5f * kUnit<Order>));
    } else {
      const vf square = z * z;
      e = exp_product<Order, Range::kModerate>(square, set1(-0.5f),
                                                product_error(z, z, square) * -0.5f);
    }
    return fma(-(z * e), mills_ratio<Order>(u), clamp_below(x, 0.0f));
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

  template <std::size_t N>
  QUAKE_INLINE vf polynomial(vf u, const float (&c)[N]) {
    return horner<static_cast<int>(N)>(u, c);
  }
};

// E/(E + 2) with E = e^(2|x|) - 1 = 2^n f q(f) + (2^n - 1): near 0, n is 0 and E is f q(f), whose relative
// error is the polynomial's, so nothing cancels.
struct Tanh {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    using namespace constants;
    const vf t = clamp_above(abs(x) * (2 * kLog2e), 29.0f);  // integral, so that the limit is exactly 1
    vf n_power, f;
    if constexpr (kHasScalef) {
      n_power = scalef(set1(1.0f), t);
      f = fraction(t);
    } else {
      const vf n = floor(t);
      n_power = power_of_two(n);
      f = t - n;
    }
    const vf e = fma(n_power * f, quotient<Order>(f), n_power - 1.0f);
    return copy_sign(clamp_above(e * reciprocal(e + 2.0f), 1.0f), x);
  }

  template <int Order>
  QUAKE_INLINE vf quotient(vf f) {
    using namespace constants;
    if constexpr (Order == 1) return horner<2>(f, kExpm1Poly1);
    if constexpr (Order == 2) return horner<3>(f, kExpm1Poly2);
    if constexpr (Order == 3) return horner<4>(f, kExpm1Poly3);
    if constexpr (Order == 4) return horner<5>(f, kExpm1Poly4);
    if constexpr (Order == 5) return horner<6>(f, kExpm1Poly5);
  }
};

// Four independent vectors at a time hide the latency of the polynomial.
template <class Functor, class T, int Order>
void map(const void* in, void* out, std::size_t count, Stores stores) {
  const T* x = static_cast<const T*>(in);
  T* y = static_cast<T*>(out);
  const bool streamed = streamable(y, 0, stores);
  std::size_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    Pair v[2] = {load_pair(x + i), load_pair(x + i + 2 * kLanes)};
#pragma GCC unroll 2
    for (Pair& pair : v) {
      pair = {Functor::template apply<Order>(pair.first), Functor::template apply<Order>(pair.second)};
    }
    store_pair(y + i, v[0], streamed);
    store_pair(y + i + 2 * kLanes, v[1], streamed);
  }
  for (; i + kLanes <= count; i += kLanes) {
    store(y + i, Functor::template apply<Order>(load(x + i)));
  }
  if (i < count) {
    const std::size_t n = count - i;
    store_partial(y + i, Functor::template apply<Order>(load_partial(x + i, n)), n);
  }
  if (streamed) stream_fence();
}
