// tanh, which is an activation and caps the logits of attention. Included inside an instruction set's
// namespace, after exponential-inl.h.

// Piecewise, or E/(E + 2) with E = e^(2|x|) - 1 = 2^n f q(f) + (2^n - 1): near 0, n is 0 and E is f q(f), whose
// relative error is the polynomial's, so nothing cancels.
struct Tanh {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    using namespace constants;
    if constexpr (kHasLookup) {
      using Segments = TanhSegments<Order>;
      return copy_sign(piecewise<Segments>(clamp_above(abs(x), Segments::kUpper)), x);
    }
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
    if constexpr (Order == 1) return polynomial(f, kExpm1Poly1);
    if constexpr (Order == 2) return polynomial(f, kExpm1Poly2);
    if constexpr (Order == 3) return polynomial(f, kExpm1Poly3);
    if constexpr (Order == 4) return polynomial(f, kExpm1Poly4);
    if constexpr (Order == 5) return polynomial(f, kExpm1Poly5);
  }
};
