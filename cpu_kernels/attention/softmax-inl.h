// One step of online softmax over a tile of scores, and the last division. Included inside an instruction set's
// namespace, after core/words-inl.h.

// The coefficients of e^r for r = f ln 2, as a polynomial in f.
template <std::size_t N>
struct Exp2Coefficients {
  float c[N] = {};
  constexpr explicit Exp2Coefficients(const float (&of_r)[N]) {
    double power = 1;
    for (std::size_t i = 0; i < N; ++i) {
      power *= 0.69314718055994530942;
      c[i] = static_cast<float>(of_r[i] * power);
    }
  }
};
constexpr Exp2Coefficients kWeightPoly4{constants::kExpPoly4};
constexpr Exp2Coefficients kWeightPoly5{constants::kExpPoly5};

// e^difference for a difference of at most 0. Orders 4 and 5 reduce without a low part: the rounding of
// difference * log2(e) is no larger than that of the logit itself, which is a dot product in float32.
template <int Order>
QUAKE_INLINE vf attention_weight(vf difference) {
  if constexpr (Order <= 3) {
    return softmax_weight<Order>(difference);
  } else {
    const vf t = difference * constants::kLog2e;
    vf n, f, p;
    if constexpr (kHasScalef) {
      n = t;
      f = fraction(t);
    } else {
      const vf clamped = clamp_below(t, -127.0f);
      n = floor(clamped);
      f = clamped - n;
    }
    if constexpr (Order == 4) p = fma(polynomial(f, kWeightPoly4.c), f, set1(1.0f));
    if constexpr (Order == 5) p = fma(polynomial(f, kWeightPoly5.c), f, set1(1.0f));
    if constexpr (kHasScalef) {
      return scalef(p, n);
    } else {
      return p * power_of_two(n);
    }
  }
}

// The maximum of a row whose last vector has `last` scores; those after them become -inf.
QUAKE_INLINE float scores_maximum(float* scores, std::size_t vectors, std::size_t last) {
  if (last < kLanes) {
    float* tail = scores + (vectors - 1) * kLanes;
    store(tail, keep_first(load(tail), last, -kInfinity));
  }
  vf m[4] = {set1(-kInfinity), set1(-kInfinity), set1(-kInfinity), set1(-kInfinity)};
  std::size_t i = 0;
  for (; i + 4 <= vectors; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) m[j] = max_skip_nan(m[j], load(scores + (i + j) * kLanes));
  }
  for (; i < vectors; ++i) m[0] = max_skip_nan(m[0], load(scores + i * kLanes));
  return reduce_max(max_skip_nan(max_skip_nan(m[0], m[1]), max_skip_nan(m[2], m[3])));
}

// A number of vectors that the compiler knows.
template <std::size_t N>
struct Whole {
  static_assert(N % 4 == 0);
  constexpr operator std::size_t() const { return N; }
};

// Between rows of weights: most overwrite the scores.
template <class Words>
constexpr std::size_t kWeightStride = kScoreStride;

template <int Order, class Count>
QUAKE_INLINE WeightSum weigh_row(std::size_t, const float* scores, Count vectors, vf base, PackedWord* weights,
                                 FloatWords<float>) {
  float* const out = as_floats(weights);
  vf s[4] = {};
  std::size_t i = 0;
  const auto step = [&](std::size_t at, int k) {
    const vf e = attention_weight<Order>(load(scores + at * kLanes) - base);
    store(out + at * kLanes, e);
    s[k] += e;
  };
  for (; i + 4 <= vectors; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) step(i + j, j);
  }
  if constexpr (std::is_same_v<Count, std::size_t>) {  // else GCC 12 warns of what never runs
    for (; i < vectors; ++i) step(i, 0);
  }
  const float sum = reduce_add((s[0] + s[1]) + (s[2] + s[3]));
  return {sum, sum};
}

// Rounded to bfloat16 the weights no longer add up to the sum of the exact ones. The output is divided by the
// sum of those that were used: a weighted mean, exact for values that are equal, and what rounding adds to it
// is proportional to how far the values are from their mean. The weights of a pair of vectors may overwrite the
// scores of one that has been read.
template <int Order, class Count>
QUAKE_INLINE WeightSum weigh_row(std::size_t, const float* scores, Count vectors, vf base, PackedWord* weights,
                                 BFloatPairs<float>) {
  const vi ones = vi{} + 0x3f803f80;
  vf used[2] = {}, exact[4] = {};
  const auto step = [&](std::size_t at, int k, bool whole) {
    const vf a = attention_weight<Order>(load(scores + at * kLanes) - base);
    const vf b = whole ? attention_weight<Order>(load(scores + (at + 1) * kLanes) - base) : vf{};
    const vi pairs = append_bfloats(a, b);
    store(as_floats(weights + at / 2 * kLanes), as_float(pairs));
    used[k] = pair_products(pairs, ones, used[k]);
    // An addition on the multipliers, which have less to do here.
    exact[2 * k] = fma(a, set1(1.0f), exact[2 * k]);
    exact[2 * k + 1] = fma(b, set1(1.0f), exact[2 * k + 1]);
  };
  std::size_t i = 0;
  for (; i + 4 <= vectors; i += 4) {
    step(i, 0, true);
    step(i + 2, 1, true);
  }
  if (i + 2 <= vectors) {
    step(i, 0, true);
    i += 2;
  }
  if (i < vectors) step(i, 1, false);
  return {reduce_add(used[0] + used[1]), reduce_add((exact[0] + exact[1]) + (exact[2] + exact[3]))};
}

// A row's maximum has grown: what was accumulated relative to the old one shrinks. The factor is that of
// order 5, whatever the order: it would enter the results systematically.
QUAKE_INLINE float shrink(float* accumulators, std::size_t size, float old_maximum, float maximum) {
  const vf factor = attention_weight<5>(set1(old_maximum) - maximum);
  for (std::size_t j = 0; j < size; j += kLanes) store(accumulators + j, load(accumulators + j) * factor);
  return factor[0];
}

// Raises a row's maximum, and with it what is relative to it.
QUAKE_INLINE void raise_maximum(float to, float& maximum, WeightSum& sum, float* accumulators,
                                std::size_t size) {
  if (!(to > maximum)) return;
  if (sum.exact != 0) {
    const float factor = shrink(accumulators, size, maximum, to);
    sum.used *= factor;
    sum.exact *= factor;
  }
  maximum = to;
}

template <class Words, int Order, class Count>
QUAKE_INLINE void weigh_rows(const float* scores, std::size_t rows, Count vectors, const float* base,
                             WeightSum* sums, PackedWord* weights) {
  for (std::size_t r = 0; r < rows; ++r) {
    const WeightSum sum = weigh_row<Order>(r, scores + r * kScoreStride, vectors, set1(base[r]),
                                           weights + r * kWeightStride<Words>, Words{});
    sums[r].used += sum.used;
    sums[r].exact += sum.exact;
  }
}

template <class Words, int Order>
void weigh(float* scores, std::size_t rows, std::size_t count, float* maxima, WeightSum* sums,
           float* accumulators, std::size_t accumulator_stride, std::size_t size, PackedWord* weights) {
  // Not by ceil_div(): with it GCC 12 counts the loops of weigh_row() by other registers.
  const std::size_t vectors = (count + kLanes - 1) / kLanes, last = count - (vectors - 1) * kLanes;
  float base[AttentionKernels::kMaxRowTile];
  for (std::size_t r = 0; r < rows; ++r) {
    base[r] = scores_maximum(scores + r * kScoreStride, vectors, last);
  }
  for (std::size_t r = 0; r < rows; ++r) {
    raise_maximum(base[r], maxima[r], sums[r], accumulators + r * accumulator_stride, size);
    // With a maximum of -inf nothing is subtracted: the weights are 0, and a later tile may have better ones.
    base[r] = maxima[r] == -kInfinity ? 0.0f : maxima[r];
  }
  // A row of a whole tile is unrolled where it has few vectors: 10 to 20 % faster.
  constexpr std::size_t kWhole = AttentionKernels::kKeyTile / kLanes;
  if (kWhole <= 16 && vectors == kWhole) {
    weigh_rows<Words, Order>(scores, rows, Whole<(kWhole <= 16 ? kWhole : 4)>{}, base, sums, weights);
  } else {
    weigh_rows<Words, Order>(scores, rows, vectors, base, sums, weights);
  }
}

template <class T>
void finish(const float* accumulators, std::size_t size, float sum, void* out) {
  T* y = static_cast<T*>(out);
  const float factor = 1.0f / sum;
  for (std::size_t j = 0; j < size; j += kLanes) {
    store_up_to(y + j, load(accumulators + j) * factor, size - j < kLanes ? size - j : kLanes);
  }
}
