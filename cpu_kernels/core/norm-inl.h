// Layer norm and RMS norm of a row. Included inside an instruction set's namespace, after vector-inl.h.
//
//   layer norm: (v - mean) * factor * scale + offset, factor = 1 / sqrt(mean of (v - mean)^2 + epsilon)
//   RMS norm:   v * factor * scale,                   factor = 1 / sqrt(mean of v^2 + epsilon)
//
// The variance is that of the differences from the mean that was found before, so nothing cancels in it. NaN
// and infinities take the way of these formulas: a NaN makes its row NaN, a difference whose square overflows
// makes the factor 0.

// Sums are float32's within so many elements; those of the pieces are added in double precision.
constexpr std::size_t kNormPiece = 4096;

// A row as float32.
template <class T>
struct RowValues {
  static constexpr bool kSummed = false;
  const T* x;

  QUAKE_INLINE_MEMBER Pair pair(std::size_t i) const { return load_pair(x + i); }
  QUAKE_INLINE_MEMBER vf up_to(std::size_t i, std::size_t n) const { return load_up_to(x + i, n); }
};

// The sum over a row of what step(sum, v) adds to a sum for the elements v. Eight sums run side by side: they
// hide the latency of an addition.
template <class Values, class Step>
QUAKE_INLINE double sum_of_row(const Values& values, std::size_t size, const Step& step) {
  double total = 0;
  for (std::size_t i = 0; i < size;) {
    const std::size_t end = size - i < kNormPiece ? size : i + kNormPiece;
    vf s[8] = {};
    const auto add = [&](std::size_t at, int k) QUAKE_INLINE_LAMBDA {
      const Pair v = values.pair(at);
      s[k] = step(s[k], v.first);
      s[k + 1] = step(s[k + 1], v.second);
    };
    for (; i + 8 * kLanes <= end; i += 8 * kLanes) {
      add(i, 0);
      add(i + 2 * kLanes, 2);
      add(i + 4 * kLanes, 4);
      add(i + 6 * kLanes, 6);
    }
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) add(i, 0);
    for (; i < end; i += kLanes) {
      const std::size_t n = end - i < kLanes ? end - i : kLanes;
      s[2] += keep_up_to(step(vf{}, values.up_to(i, n)), n, 0.0f);
    }
    total += reduce_add(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
  }
  return total;
}

// Of up to kNormRows rows. Each step is done for all of them before the next begins: the reductions at its end
// are long chains of dependent instructions, and those of different rows overlap.
constexpr std::size_t kNormRows = 8;
struct Moments {
  float mean[kNormRows] = {}, factor[kNormRows];
};

// values(r) are those of row r.
template <bool kCentered, class ValuesOf>
QUAKE_INLINE Moments moments_of_rows(std::size_t rows, std::size_t size, float epsilon,
                                     const ValuesOf& values) {
  Moments moments;
  double sums[kNormRows] = {};
  const double share = 1 / static_cast<double>(size);
  if constexpr (kCentered) {
    for (std::size_t r = 0; r < rows; ++r) {
      sums[r] = sum_of_row(values(r), size, [](vf s, vf v) QUAKE_INLINE_LAMBDA { return s + v; });
    }
    for (std::size_t r = 0; r < kNormRows; ++r) moments.mean[r] = static_cast<float>(sums[r] * share);
  }
  for (std::size_t r = 0; r < rows; ++r) {
    const vf mean = set1(moments.mean[r]);
    sums[r] = sum_of_row(values(r), size, [&](vf s, vf v) QUAKE_INLINE_LAMBDA {
      const vf d = kCentered ? v - mean : v;
      return fma(d, d, s);
    });
  }
  // For all of them, so that one division and one square root of vectors serve.
  for (std::size_t r = 0; r < kNormRows; ++r) {
    moments.factor[r] = 1.0f / __builtin_sqrtf(static_cast<float>(sums[r] * share) + epsilon);
  }
  return moments;
}

// The result for elements v of a row, with or without an offset.
template <bool kCentered, bool kOffset>
QUAKE_INLINE vf normalized(vf v, vf mean, vf factor, vf scale, vf offset) {
  const vf d = (kCentered ? v - mean : v) * factor;
  return kOffset ? fma(d, scale, offset) : d * scale;
}

template <bool kCentered, bool kOffset, class T>
[[gnu::noinline]] void normalize_row_as(const T* x, std::size_t size, const float* scale, const float* offset,
                                        float epsilon, float* out) {
  const RowValues<T> values = {x};
  const Moments moments =
      moments_of_rows<kCentered>(1, size, epsilon, [&](std::size_t) QUAKE_INLINE_LAMBDA { return values; });
  const vf mean = set1(moments.mean[0]), factor = set1(moments.factor[0]);
  const auto step = [&](std::size_t i, std::size_t n) QUAKE_INLINE_LAMBDA {
    const vf last = kOffset ? load_up_to(offset + i, n) : vf{};
    const vf v = load_up_to(x + i, n);
    store_up_to(out + i, normalized<kCentered, kOffset>(v, mean, factor, load_up_to(scale + i, n), last), n);
  };
  std::size_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    step(i, kLanes);
    step(i + kLanes, kLanes);
  }
  for (; i < size; i += kLanes) step(i, size - i < kLanes ? size - i : kLanes);
}

// A row as float32, not rounded in between. `out` may be x.
template <class T>
QUAKE_INLINE void normalize_row(const T* x, std::size_t size, const Norm& norm, float* out) {
  const auto run = norm.centered
                       ? norm.offset ? normalize_row_as<true, true, T> : normalize_row_as<true, false, T>
                   : norm.offset ? normalize_row_as<false, true, T>
                                 : normalize_row_as<false, false, T>;
  run(x, size, norm.scale, norm.offset, norm.epsilon, out);
}
