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
    const auto add = [&](std::size_t at, int k) {
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

template <class Values>
QUAKE_INLINE float mean_of_row(const Values& values, std::size_t size) {
  const double sum = sum_of_row(values, size, [](vf s, vf v) { return s + v; });
  return static_cast<float>(sum / static_cast<double>(size));
}

// `mean` counts if kCentered.
template <bool kCentered, class Values>
QUAKE_INLINE float factor_of_row(const Values& values, std::size_t size, float mean, float epsilon) {
  const vf m = set1(mean);
  const double sum = sum_of_row(values, size, [&](vf s, vf v) {
    const vf d = kCentered ? v - m : v;
    return fma(d, d, s);
  });
  return 1.0f / __builtin_sqrtf(static_cast<float>(sum / static_cast<double>(size)) + epsilon);
}

// Calls write(i, n, v, y) for each vector v of a row, from element i on, with the n normalised elements y.
template <bool kCentered, bool kOffset, class Values, class Write>
QUAKE_INLINE void finish_row_by(const Values& values, std::size_t size, const Norm& norm, float mean,
                                float factor, const Write& write) {
  const vf m = set1(mean), f = set1(factor);
  const auto step = [&](std::size_t i, std::size_t n) {
    const vf v = values.up_to(i, n);
    const vf d = (kCentered ? v - m : v) * f, scale = load_up_to(norm.scale + i, n);
    write(i, n, v, kOffset ? fma(d, scale, load_up_to(norm.offset + i, n)) : d * scale);
  };
  std::size_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    step(i, kLanes);
    step(i + kLanes, kLanes);
  }
  for (; i < size; i += kLanes) step(i, size - i < kLanes ? size - i : kLanes);
}

// The steps of several rows, each done for all of them before the next begins: the reductions and the square
// root at the end of a step are long chains of dependent instructions, and those of different rows overlap.
// values(r) are those of row r, and write_row(r) writes it as finish_row_by() wants.
constexpr std::size_t kNormRows = 8;

template <bool kCentered, bool kOffset, class ValuesOf, class WriteOf>
QUAKE_INLINE void normalize_rows_by(std::size_t rows, std::size_t size, const Norm& norm,
                                    const ValuesOf& values, const WriteOf& write_row) {
  float mean[kNormRows] = {}, factor[kNormRows];
  if constexpr (kCentered) {
    for (std::size_t r = 0; r < rows; ++r) mean[r] = mean_of_row(values(r), size);
  }
  for (std::size_t r = 0; r < rows; ++r) {
    factor[r] = factor_of_row<kCentered>(values(r), size, mean[r], norm.epsilon);
  }
  for (std::size_t r = 0; r < rows; ++r) {
    finish_row_by<kCentered, kOffset>(values(r), size, norm, mean[r], factor[r], write_row(r));
  }
}

// Up to kNormRows rows of any values.
template <class ValuesOf, class WriteOf>
QUAKE_INLINE void normalize_rows(std::size_t rows, std::size_t size, const Norm& norm, const ValuesOf& values,
                                 const WriteOf& write_row) {
  if (norm.centered && norm.offset) {
    normalize_rows_by<true, true>(rows, size, norm, values, write_row);
  } else if (norm.centered) {
    normalize_rows_by<true, false>(rows, size, norm, values, write_row);
  } else if (norm.offset) {
    normalize_rows_by<false, true>(rows, size, norm, values, write_row);
  } else {
    normalize_rows_by<false, false>(rows, size, norm, values, write_row);
  }
}

// A row as float32, not rounded in between. `out` may be x.
template <class T>
[[gnu::noinline]] void normalize_row(const T* x, std::size_t size, const Norm& norm, float* out) {
  normalize_rows(
      1, size, norm, [&](std::size_t) { return RowValues<T>{x}; },
      [&](std::size_t) { return [&](std::size_t i, std::size_t n, vf, vf y) { store_up_to(out + i, y, n); }; });
}
