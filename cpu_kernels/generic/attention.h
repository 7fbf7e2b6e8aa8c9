// The tile kernels of fused attention: packing, the two products, one step of online softmax, the last
// division. Included inside an instruction set's namespace, after softmax.h and activations.h; kernels.h says
// what each does and how tiles are laid out, attention.cc puts them together.

// The register tile of both products: kRowTile rows by 2 vectors, 3/4 of the registers. A row's element is
// broadcast from memory and used twice; tall tiles want least of the packed operand's bandwidth, which
// comes from L2: 10 bytes a cycle with AVX-512 against 21 for 6 rows by 4 vectors.
constexpr int kRowTile = kRegisters >= 32 ? 12 : 6;
constexpr int kPanel = 2 * kLanes;
constexpr std::size_t kScoreStride = AttentionKernels::kScoreStride;

// ---- What the packed words hold ----

// One element, as a float32.
template <class T>
struct FloatWords {
  static constexpr std::size_t kPerWord = 1;
  static constexpr bool kFromMemory = sizeof(T) == sizeof(float);  // packing does not convert
  static constexpr bool kScaleInQueries = true;
  using Vector = vf;

  QUAKE_INLINE vf load_words(const float* p) { return load(p); }
  QUAKE_INLINE vf broadcast(const float* p) { return set1(*p); }
  QUAKE_INLINE vf multiply_add(vf a, vf b, vf c) { return fma(a, b, c); }
  // The words of a row, up to a whole vector, of which `left` elements are left; the others are 0.
  QUAKE_INLINE vf convert(const T* row, std::size_t left) {
    return load_up_to(row, left < kLanes ? left : kLanes);
  }
};

// Two neighbours, as bfloat16.
struct BFloatPairs {
  static constexpr std::size_t kPerWord = 2;
  static constexpr bool kFromMemory = true;
  static constexpr bool kScaleInQueries = false;
  using Vector = vi;

  QUAKE_INLINE vi load_words(const float* p) { return as_int(load(p)); }
  QUAKE_INLINE vi broadcast(const float* p) { return set1_word(p); }
  QUAKE_INLINE vf multiply_add(vi a, vi b, vf c) { return pair_products(a, b, c); }
  QUAKE_INLINE vf convert(const bfloat16* row, std::size_t left) {
    return as_float(load_bfloats(&row->bits, left < 2 * kLanes ? left : 2 * kLanes));
  }
};

template <class Words>
constexpr std::size_t words(std::size_t elements) {
  return (elements + Words::kPerWord - 1) / Words::kPerWord;
}

// ---- Products ----

// c[r][v] += sum over k of a[r, k] b[k, v]; b has rows of kPanel.
template <class Words, int R, int V, int kRowStep, int kDepthStep>
QUAKE_INLINE void multiply_add(const float* a, const float* b, std::size_t depth, vf (&c)[R][V]) {
  for (std::size_t k = 0; k < depth; ++k, a += kDepthStep, b += kPanel) {
    typename Words::Vector column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = Words::load_words(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Words::Vector factor = Words::broadcast(a + r * kRowStep);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] = Words::multiply_add(factor, column[v], c[r][v]);
    }
  }
}

template <class Words, int R, int V>
[[gnu::noinline]] void score_panel(const float* queries, const float* keys, std::size_t depth, float scale,
                                   float* scores) {
  vf c[R][V] = {};
  multiply_add<Words, R, V, 1, kRowTile>(queries, keys, depth, c);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store(scores + r * kScoreStride + v * kLanes, Words::kScaleInQueries ? c[r][v] : c[r][v] * scale);
    }
  }
}

template <class Words, int R, int V>
[[gnu::noinline]] void accumulate_panel(const float* weights, const float* values, std::size_t depth,
                                        float* out, std::size_t stride) {
  vf c[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) c[r][v] = load(out + r * stride + v * kLanes);
  }
  multiply_add<Words, R, V, kScoreStride, 1>(weights, values, depth, c);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + r * stride + v * kLanes, c[r][v]);
  }
}

// Calls body<R>() for the smallest register tile that has `rows` rows.
template <class Body>
QUAKE_INLINE void with_row_tile(std::size_t rows, const Body& body) {
  if (rows <= 1) return body.template run<1>();
  if (rows <= 2) return body.template run<2>();
  if (rows <= 4) return body.template run<4>();
  if constexpr (kRowTile > 6) {
    if (rows <= 6) return body.template run<6>();
    if (rows <= 8) return body.template run<8>();
  }
  return body.template run<kRowTile>();
}

template <class Words>
struct ScorePanels {
  const float *queries, *keys;
  std::size_t count, depth;
  float scale;
  float* scores;

  template <int R>
  QUAKE_INLINE_MEMBER void run() const {
    for (std::size_t i = 0; i < count; i += kPanel) {
      const float* panel = keys + i * depth;
      if (count - i > kLanes) {
        score_panel<Words, R, 2>(queries, panel, depth, scale, scores + i);
      } else {
        score_panel<Words, R, 1>(queries, panel, depth, scale, scores + i);
      }
    }
  }
};

template <class Words>
void score(const float* queries, std::size_t rows, const float* keys, std::size_t count, std::size_t size,
           float scale, float* scores) {
  with_row_tile(rows, ScorePanels<Words>{queries, keys, count, words<Words>(size), scale, scores});
}

template <class Words>
struct AccumulatePanels {
  const float *weights, *values;
  std::size_t depth, capacity, size;
  float* out;
  std::size_t stride;

  template <int R>
  QUAKE_INLINE_MEMBER void run() const {
    for (std::size_t i = 0; i < size; i += kPanel) {
      const float* panel = values + i * capacity;
      if (size - i > kLanes) {
        accumulate_panel<Words, R, 2>(weights, panel, depth, out + i, stride);
      } else {
        accumulate_panel<Words, R, 1>(weights, panel, depth, out + i, stride);
      }
    }
  }
};

template <class Words>
void accumulate(const float* weights, std::size_t rows, const float* values, std::size_t count,
                std::size_t capacity, std::size_t size, float* accumulators, std::size_t accumulator_stride) {
  with_row_tile(rows, AccumulatePanels<Words>{weights, values, words<Words>(count), words<Words>(capacity),
                                              size, accumulators, accumulator_stride});
}

// ---- Packing ----

// Rows that are far apart are not fetched by the hardware in time. What is fetched may lie behind the end.
constexpr std::size_t kLineBytes = 64;

template <class T>
QUAKE_INLINE void prefetch_row(const T* row, std::size_t size) {
  for (std::size_t j = 0; j < size; j += kLineBytes / sizeof(T)) __builtin_prefetch(row + j);
}

// Transposes the 4 x 4 blocks in the groups of four vectors.
QUAKE_INLINE void transpose_quads(vf (&v)[4]) {
  const vf a = zip_low(v[0], v[1]), b = zip_high(v[0], v[1]);
  const vf c = zip_low(v[2], v[3]), d = zip_high(v[2], v[3]);
  v[0] = join_low(a, c);
  v[1] = join_high(a, c);
  v[2] = join_low(b, d);
  v[3] = join_high(b, d);
}

// Writes column j of kLanes rows of words, `stride` apart, to out + j * out_stride, times `scale` if there is
// one. Reads whole quads of columns.
template <class... Scale>
QUAKE_INLINE void transpose(const float* in, std::ptrdiff_t stride, std::size_t columns, float* out,
                            std::size_t out_stride, Scale... scale) {
  const auto quad = [&](std::size_t j, std::size_t n) {
    vf v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = (load_quads(in + i * stride + j, 4 * stride) * ... * scale);
    transpose_quads(v);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) {
      if (i < n) store(out + (j + i) * out_stride, v[i]);
    }
  };
  std::size_t j = 0;
  for (; j + 4 <= columns; j += 4) quad(j, 4);
  if (j < columns) quad(j, columns - j);
}

// Columns of words are converted in chunks of this many, into a buffer in L1.
constexpr std::size_t kColumnChunk = 64;

// The words of rows of `size` elements; rows past `count` and words past the last one up to a whole vector are
// 0.
template <class Words, class RowAt>
QUAKE_INLINE void convert_rows(const RowAt& row_at, std::size_t count, std::size_t size,
                               float (&out)[kLanes][kColumnChunk]) {
  constexpr std::size_t kStep = kLanes * Words::kPerWord;
  for (std::size_t r = 0; r < kLanes; ++r) {
    for (std::size_t j = 0; j < size; j += kStep) {
      store(&out[r][j / Words::kPerWord], r < count ? Words::convert(row_at(r) + j, size - j) : vf{});
    }
  }
}

// Whether rows `stride` elements apart can be read as words as they are, in whole quads.
template <class Words, class T>
QUAKE_INLINE bool has_words(const T* row, std::ptrdiff_t stride, std::size_t size) {
  return Words::kFromMemory && size % (4 * Words::kPerWord) == 0 &&
         stride % static_cast<std::ptrdiff_t>(Words::kPerWord) == 0 &&
         reinterpret_cast<std::uintptr_t>(row) % sizeof(float) == 0;
}
template <class T>
QUAKE_INLINE const float* as_words(const T* row) {
  return reinterpret_cast<const float*>(row);
}

// Whether `count` rows lie at equal distances, which it returns in `stride`.
template <class T>
QUAKE_INLINE bool evenly_spaced(const void* const* rows, std::size_t count, std::ptrdiff_t& stride) {
  stride = static_cast<const T*>(rows[1]) - static_cast<const T*>(rows[0]);
  for (std::size_t i = 2; i < count; ++i) {
    if (static_cast<const T*>(rows[i]) - static_cast<const T*>(rows[i - 1]) != stride) return false;
  }
  return true;
}

template <class Words>
QUAKE_INLINE void transpose_queries(const float* in, std::ptrdiff_t stride, std::size_t columns, float scale,
                                    float* out) {
  if constexpr (Words::kScaleInQueries) {
    transpose(in, stride, columns, out, kRowTile, scale);
  } else {
    transpose(in, stride, columns, out, kRowTile);
  }
}

// A vector of a column may reach into the next column, which is written after it: columns ascend, and the
// groups of rows descend.
template <class Words, class T>
void pack_queries(const void* const* rows, std::size_t count, std::size_t size, float scale, float* out) {
  constexpr std::size_t kGroups = (kRowTile + kLanes - 1) / kLanes, kChunk = kColumnChunk * Words::kPerWord;
  std::ptrdiff_t stride;
  if (Words::kFromMemory && count >= kGroups * kLanes && evenly_spaced<T>(rows, kGroups * kLanes, stride) &&
      has_words<Words>(static_cast<const T*>(rows[0]), stride, size)) {
    stride /= static_cast<std::ptrdiff_t>(Words::kPerWord);
    for (std::size_t group = kGroups; group-- > 0;) {
      const T* from = static_cast<const T*>(rows[group * kLanes]);
      transpose_queries<Words>(as_words(from), stride, words<Words>(size), scale, out + group * kLanes);
    }
    return;
  }
  if (count > kRowTile) count = kRowTile;
  alignas(64) float chunk[kLanes][kColumnChunk];
  for (std::size_t j = 0; j < size; j += kChunk) {
    const std::size_t columns = size - j < kChunk ? size - j : kChunk;
    for (std::size_t group = kGroups; group-- > 0;) {
      const std::size_t first = group * kLanes, n = count > first ? count - first : 0;
      convert_rows<Words>([&](std::size_t r) { return static_cast<const T*>(rows[first + r]) + j; },
                          n < kLanes ? n : kLanes, columns, chunk);
      transpose_queries<Words>(&chunk[0][0], kColumnChunk, words<Words>(columns), scale,
                               out + j / Words::kPerWord * kRowTile + first);
    }
  }
}

template <class Words, class T>
void pack_keys(const void* in, std::ptrdiff_t stride, std::size_t keys, std::size_t size, float* out) {
  constexpr std::size_t kChunk = kColumnChunk * Words::kPerWord;
  alignas(64) float chunk[kLanes][kColumnChunk];
  const T* base = static_cast<const T*>(in);
  const bool direct = has_words<Words>(base, stride, size);
  for (std::size_t i = 0; i < keys; i += kLanes) {
    const T* from = base + static_cast<std::ptrdiff_t>(i) * stride;
    float* to = out + i / kPanel * kPanel * words<Words>(size) + i % kPanel;
    for (std::size_t r = kLanes; r < 2 * kLanes; ++r) {
      prefetch_row(from + static_cast<std::ptrdiff_t>(r) * stride, size);
    }
    if (direct && keys - i >= kLanes) {
      transpose(as_words(from), stride / static_cast<std::ptrdiff_t>(Words::kPerWord), words<Words>(size), to,
                kPanel);
      continue;
    }
    const std::size_t count = keys - i < kLanes ? keys - i : kLanes;
    for (std::size_t j = 0; j < size; j += kChunk) {
      const std::size_t columns = size - j < kChunk ? size - j : kChunk;
      convert_rows<Words>([&](std::size_t r) { return from + static_cast<std::ptrdiff_t>(r) * stride + j; },
                          count, columns, chunk);
      transpose(&chunk[0][0], kColumnChunk, words<Words>(columns), to + j / Words::kPerWord * kPanel, kPanel);
    }
  }
}

constexpr std::ptrdiff_t kRowsAhead = 16;  // 8 to 32 are equally good

template <class T>
void pack_values(const void* in, std::ptrdiff_t stride, std::size_t keys, std::size_t size,
                 std::size_t capacity, float* out) {
  const T* from = static_cast<const T*>(in);
  for (std::size_t i = 0; i < keys; ++i, from += stride) {
    prefetch_row(from + kRowsAhead * stride, size);
    float* to = out + i * kPanel;
    std::size_t j = 0;
    for (; j + kPanel <= size; j += kPanel, to += capacity * kPanel) {
      store(to, load(from + j));
      store(to + kLanes, load(from + j + kLanes));
    }
    for (; j < size; j += kLanes, to += kLanes) {
      store(to, load_up_to(from + j, size - j < kLanes ? size - j : kLanes));
    }
  }
}

// Pairs of keys; the last one may lack a partner.
inline void pack_value_pairs(const void* in, std::ptrdiff_t stride, std::size_t keys, std::size_t size,
                             std::size_t capacity, float* out) {
  const bfloat16* from = static_cast<const bfloat16*>(in);
  for (std::size_t i = 0; i < keys; i += 2, from += 2 * stride) {
    prefetch_row(from + kRowsAhead * stride, size);
    prefetch_row(from + (kRowsAhead + 1) * stride, size);
    float* to = out + i / 2 * kPanel;
    for (std::size_t j = 0; j < size; j += kPanel, to += words<BFloatPairs>(capacity) * kPanel) {
      const std::size_t n = size - j < kPanel ? size - j : kPanel;
      const vi a = load_bfloats(&from[j].bits, n);
      const vi b = i + 1 < keys ? load_bfloats(&from[stride + static_cast<std::ptrdiff_t>(j)].bits, n) : vi{};
      store(to, as_float(interleave_low(a, b)));
      store(to + kLanes, as_float(interleave_high(a, b)));
    }
  }
}

// ---- Softmax ----

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
    return weight<Reduction::kSoftmax, Order>(difference);
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
  constexpr operator std::size_t() const { return N; }
};

template <int Order, class Count>
QUAKE_INLINE WeightSum weigh_row(float* scores, Count vectors, vf base, FloatWords<float>) {
  vf s[4] = {};
  std::size_t i = 0;
  const auto step = [&](std::size_t at, int k) {
    const vf e = attention_weight<Order>(load(scores + at * kLanes) - base);
    store(scores + at * kLanes, e);
    s[k] += e;
  };
  for (; i + 4 <= vectors; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) step(i + j, j);
  }
  for (; i < vectors; ++i) step(i, 0);
  const float sum = reduce_add((s[0] + s[1]) + (s[2] + s[3]));
  return {sum, sum};
}

// Rounded to bfloat16 the weights no longer add up to the sum of the exact ones. The output is divided by the
// sum of those that were used: a weighted mean, exact for values that are equal, and what rounding adds to it
// is proportional to how far the values are from their mean. The weights of a pair of vectors overwrite the
// scores of one that has been read.
template <int Order, class Count>
QUAKE_INLINE WeightSum weigh_row(float* scores, Count vectors, vf base, BFloatPairs) {
  const vi ones = vi{} + 0x3f803f80;
  vf used[2] = {}, exact[4] = {};
  const auto step = [&](std::size_t at, int k, bool whole) {
    const vf a = attention_weight<Order>(load(scores + at * kLanes) - base);
    const vf b = whole ? attention_weight<Order>(load(scores + (at + 1) * kLanes) - base) : vf{};
    const vi pairs = append_bfloats(a, b);
    store(scores + at / 2 * kLanes, as_float(pairs));
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

template <class Words, int Order, class Count>
QUAKE_INLINE void weigh_rows(float* scores, std::size_t rows, Count vectors, const float* base,
                             WeightSum* sums) {
  for (std::size_t r = 0; r < rows; ++r) {
    const WeightSum sum = weigh_row<Order>(scores + r * kScoreStride, vectors, set1(base[r]), Words{});
    sums[r].used += sum.used;
    sums[r].exact += sum.exact;
  }
}

template <class Words, int Order>
void weigh(float* scores, std::size_t rows, std::size_t count, float* maxima, WeightSum* sums,
           float* accumulators, std::size_t accumulator_stride, std::size_t size) {
  const std::size_t vectors = (count + kLanes - 1) / kLanes, last = count - (vectors - 1) * kLanes;
  float base[kRowTile > AttentionKernels::kFewRows ? kRowTile : AttentionKernels::kFewRows];
  for (std::size_t r = 0; r < rows; ++r) {
    base[r] = scores_maximum(scores + r * kScoreStride, vectors, last);
  }
  for (std::size_t r = 0; r < rows; ++r) {
    if (base[r] > maxima[r]) {
      if (sums[r].exact != 0) {
        const float factor = shrink(accumulators + r * accumulator_stride, size, maxima[r], base[r]);
        sums[r].used *= factor;
        sums[r].exact *= factor;
      }
      maxima[r] = base[r];
    }
    // With a maximum of -inf nothing is subtracted: the weights are 0, and a later tile may have better ones.
    base[r] = maxima[r] == -kInfinity ? 0.0f : maxima[r];
  }
  // A row of a whole tile is unrolled where it has few vectors: 10 to 20 % faster.
  constexpr std::size_t kWhole = AttentionKernels::kKeyTile / kLanes;
  if (kWhole <= 16 && vectors == kWhole) {
    weigh_rows<Words, Order>(scores, rows, Whole<(kWhole <= 16 ? kWhole : 1)>{}, base, sums);
  } else {
    weigh_rows<Words, Order>(scores, rows, vectors, base, sums);
  }
}

template <int Order>
void soft_cap(float* scores, std::size_t rows, std::size_t count, float cap) {
  const float inverse = 1.0f / cap;
  for (std::size_t r = 0; r < rows; ++r, scores += kScoreStride) {
    for (std::size_t i = 0; i < count; i += kLanes) {
      store(scores + i, Tanh::apply<Order>(load(scores + i) * inverse) * cap);
    }
  }
}

template <class T>
void add_bias(float* scores, const void* bias, std::ptrdiff_t stride, std::size_t count) {
  const T* b = static_cast<const T*>(bias);
  for (std::size_t i = 0; i < count; i += kLanes) {
    const std::size_t n = count - i < kLanes ? count - i : kLanes;
    vf v;
    if (stride == 1) {
      v = load_up_to(b + i, n);
    } else {
      T gathered[kLanes] = {};
      for (std::size_t j = 0; j < n; ++j) gathered[j] = b[static_cast<std::ptrdiff_t>(i + j) * stride];
      v = load(gathered);
    }
    store(scores + i, load(scores + i) + v);
  }
}

void apply_mask(float* scores, const unsigned char* mask, std::size_t count, float fill) {
  for (std::size_t i = 0; i < count; i += kLanes) {
    const std::size_t n = count - i < kLanes ? count - i : kLanes;
    store(scores + i, keep_where(load(scores + i), mask + i, n, fill));
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

// ---- Few rows ----

// The sums over the lanes of four vectors.
QUAKE_INLINE void store_sums(float* to, const vf (&s)[4]) {
  const vf a = zip_low(s[0], s[1]) + zip_high(s[0], s[1]);
  const vf b = zip_low(s[2], s[3]) + zip_high(s[2], s[3]);
  store_quad_sum(to, join_low(a, b) + join_high(a, b));
}

// The scores of R queries and four keys. Where memory is waited for, a branch less is a line more in flight:
// Vectors, if not 0, is how many whole vectors a key has.
template <int R, int Vectors, class T>
QUAKE_INLINE void score_four(const float* queries, std::size_t query_stride, const T* keys,
                             std::ptrdiff_t stride, std::size_t size, float* scores) {
  vf s[R][4] = {};
  const auto step = [&](std::size_t j, std::size_t n) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const vf k = load_up_to(keys + i * stride + j, n);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) s[r][i] = fma(load(queries + r * query_stride + j), k, s[r][i]);
    }
  };
  if constexpr (Vectors > 0) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) step(v * kLanes, kLanes);
  } else {
    std::size_t j = 0;
    for (; j + kLanes <= size; j += kLanes) step(j, kLanes);
    if (j < size) step(j, size - j);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) store_sums(scores + r * kScoreStride, s[r]);
}

template <class T>
QUAKE_INLINE float dot(const float* query, const T* key, std::size_t size) {
  vf s = {};
  for (std::size_t j = 0; j < size; j += kLanes) {
    s = fma(load(query + j), load_up_to(key + j, size - j < kLanes ? size - j : kLanes), s);
  }
  return reduce_add(s);
}

// Rows that share what is loaded.
constexpr std::size_t kSharing = kRegisters >= 32 ? 4 : 2;

// Four keys of all heads at a time; returns how many keys those were.
template <int Vectors, class T>
std::size_t score_fours(const float* queries, std::size_t query_stride, std::size_t rows, const T* keys,
                        AttentionKernels::InPlace at, std::size_t size, float* scores) {
  std::size_t i = 0;
  for (; i + 4 <= at.count; i += 4, keys += 4 * at.stride) {
    const float* q = queries;
    float* s = scores + i;
    const T* k = keys;
    for (std::size_t head = 0; head < at.heads; ++head, k += at.head_stride) {
      std::size_t r = rows;
      for (; r >= kSharing; r -= kSharing, q += kSharing * query_stride, s += kSharing * kScoreStride) {
        score_four<kSharing, Vectors>(q, query_stride, k, at.stride, size, s);
      }
      for (; r > 0; --r, q += query_stride, s += kScoreStride) {
        score_four<1, Vectors>(q, query_stride, k, at.stride, size, s);
      }
    }
  }
  return i;
}

template <class T>
void score_in_place(const float* queries, std::size_t query_stride, std::size_t rows, const void* keys,
                    AttentionKernels::InPlace at, std::size_t size, float* scores) {
  const T* k = static_cast<const T*>(keys);
  const auto fours = size == 4 * kLanes   ? score_fours<4, T>
                     : size == 8 * kLanes ? score_fours<8, T>
                                          : score_fours<0, T>;
  for (std::size_t i = fours(queries, query_stride, rows, k, at, size, scores); i < at.count; ++i) {
    for (std::size_t row = 0; row < at.heads * rows; ++row) {
      const std::ptrdiff_t head = static_cast<std::ptrdiff_t>(row / rows);
      const T* from = k + head * at.head_stride + static_cast<std::ptrdiff_t>(i) * at.stride;
      scores[row * kScoreStride + i] = dot(queries + row * query_stride, from, size);
    }
  }
}

// Values of so many keys are added at a time: loading and storing the accumulators costs little, and the values
// of a block, of all heads, are read in the order in which they lie.
constexpr std::size_t kBlock = 8;

// R rows and V vectors of columns, of which only the last may be partial. Count, if not 0, is `count`.
template <int R, int V, int Count, class T>
QUAKE_INLINE void add_values(const float* scores, const T* values, std::ptrdiff_t stride, std::size_t count,
                             std::size_t last, float* out, std::size_t out_stride) {
  vf c[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) c[r][v] = load(out + r * out_stride + v * kLanes);
  }
  const auto add = [&](std::size_t i) {
    vf column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V - 1; ++v) column[v] = load(values + v * kLanes);
    column[V - 1] = load_up_to(values + (V - 1) * kLanes, last);
    values += stride;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf factor = set1(scores[r * kScoreStride + i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] = fma(factor, column[v], c[r][v]);
    }
  };
  if constexpr (Count > 0) {
#pragma GCC unroll 8
    for (std::size_t i = 0; i < Count; ++i) add(i);
  } else {
    for (std::size_t i = 0; i < count; ++i) add(i);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + r * out_stride + v * kLanes, c[r][v]);
  }
}

template <int R, int Count, class T>
QUAKE_INLINE void add_value_rows(const float* scores, const T* values, std::ptrdiff_t stride, std::size_t count,
                                 std::size_t size, float* out, std::size_t out_stride) {
  std::size_t j = 0;
  for (; j + 4 * kLanes <= size; j += 4 * kLanes) {
    add_values<R, 4, Count>(scores, values + j, stride, count, kLanes, out + j, out_stride);
  }
  for (; j < size; j += kLanes) {
    const std::size_t last = size - j < kLanes ? size - j : kLanes;
    add_values<R, 1, 0>(scores, values + j, stride, count, last, out + j, out_stride);
  }
}

// Adds the values of `count` keys, for all heads.
template <int Count, class T>
QUAKE_INLINE void add_block(const float* scores, std::size_t rows, const T* values,
                            AttentionKernels::InPlace at, std::size_t count, std::size_t size,
                            float* accumulators, std::size_t stride) {
  for (std::size_t head = 0; head < at.heads; ++head, values += at.head_stride) {
    std::size_t r = rows;
    for (; r >= kSharing; r -= kSharing, scores += kSharing * kScoreStride, accumulators += kSharing * stride) {
      add_value_rows<kSharing, 0>(scores, values, at.stride, count, size, accumulators, stride);
    }
    for (; r > 0; --r, scores += kScoreStride, accumulators += stride) {
      add_value_rows<1, Count>(scores, values, at.stride, count, size, accumulators, stride);
    }
  }
}

template <class T>
void accumulate_in_place(const float* scores, std::size_t rows, const void* values,
                         AttentionKernels::InPlace at, std::size_t size, float* accumulators,
                         std::size_t stride) {
  const T* v = static_cast<const T*>(values);
  std::size_t i = 0;
  for (; i + kBlock <= at.count; i += kBlock, v += kBlock * at.stride) {
    add_block<kBlock>(scores + i, rows, v, at, kBlock, size, accumulators, stride);
  }
  if (i < at.count) add_block<0>(scores + i, rows, v, at, at.count - i, size, accumulators, stride);
}

// ---- The table ----

template <class Words, int Order = kMaxOrder>
constexpr void fill_weigh(AttentionKernels::WeighFn (&of_order)[kMaxOrder]) {
  of_order[Order - 1] = weigh<Words, Order>;
  if constexpr (Order > 1) fill_weigh<Words, Order - 1>(of_order);
}

// The kernels whose operands or results are of type T, and those that multiply its words.
template <class T, class Words, class Product>
constexpr void fill_attention(AttentionKernels& table, DType dtype) {
  const int i = static_cast<int>(dtype);
  table.per_word[i] = Words::kPerWord;
  table.pack_queries[i] = pack_queries<Words, T>;
  table.pack_keys[i] = pack_keys<Words, T>;
  table.pack_values[i] = pack_values<T>;
  if constexpr (Words::kPerWord == 2) table.pack_values[i] = pack_value_pairs;
  table.score[i] = score<Product>;
  fill_weigh<Product>(table.weigh[i]);
  table.accumulate[i] = accumulate<Product>;
  table.finish[i] = finish<T>;
}

// The others that depend on the type, and convert as they read.
template <class T>
constexpr void fill_conversions(AttentionKernels& table, DType dtype) {
  const int i = static_cast<int>(dtype);
  table.add_bias[i] = add_bias<T>;
  table.score_in_place[i] = score_in_place<T>;
  table.accumulate_in_place[i] = accumulate_in_place<T>;
}

template <int Order>
constexpr void fill_soft_cap(AttentionKernels& table) {
  table.soft_cap[Order - 1] = soft_cap<Order>;
  if constexpr (Order > 1) fill_soft_cap<Order - 1>(table);
}

constexpr AttentionKernels attention_kernels() {
  AttentionKernels table = {};
  if constexpr (kHasBFloatProducts) {
    fill_attention<bfloat16, BFloatPairs, BFloatPairs>(table, DType::kBFloat16);
  } else {
    fill_attention<bfloat16, FloatWords<bfloat16>, FloatWords<float>>(table, DType::kBFloat16);
  }
  if constexpr (!kOnlyBFloat16) {
    fill_attention<float, FloatWords<float>, FloatWords<float>>(table, DType::kFloat32);
    fill_attention<float16, FloatWords<float16>, FloatWords<float>>(table, DType::kFloat16);
    fill_conversions<float>(table, DType::kFloat32);
    fill_conversions<bfloat16>(table, DType::kBFloat16);
    fill_conversions<float16>(table, DType::kFloat16);
    fill_soft_cap<kMaxOrder>(table);
    table.row_tile = kRowTile;
    table.panel = kPanel;
    table.lanes = kLanes;
    table.apply_mask = apply_mask;
    table.log_sum_correction[0] = (constants::kSoftmaxShift - constants::kOrder1Shift) * 0.693147181f;
  }
  return table;
}
