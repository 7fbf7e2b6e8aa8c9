// The two products of attention by matrix instructions: queries lie in lines, keys, values and weights as for
// vectors, or all in three parts. Included inside an instruction set's namespace, after core/matrix-inl.h.

constexpr std::size_t kMatrixRows = 2 * kMatrixLines;

// Pairs of bfloat16 times a power of two.
QUAKE_INLINE vf scaled_bfloats(vf pairs, float scale) {
  const vf odd = as_float(as_int(pairs) & ~0xffff), even = as_float(as_int(pairs) << 16);
  return as_float(join_bfloats(even * scale, odd * scale));
}

// Queries in lines of kMatrixLines words: [words / kMatrixLines][kMatrixRows][kMatrixLines].
template <class Words, class T>
bool pack_lines(const void* const* rows, std::size_t count, std::size_t size, float scale, PackedWord* out) {
  constexpr std::size_t kElements = kMatrixLines * Words::kPerWord;
  static_assert(kMatrixLines == kLanes);
  for (std::size_t j = 0; j < size; j += kElements, out += kMatrixRows * kMatrixLines) {
    for (std::size_t r = 0; r < kMatrixRows; ++r) {
      vf words = r < count ? Words::convert(static_cast<const T*>(rows[r]) + j, size - j) : vf{};
      if (scale != 1) words = scaled_bfloats(words, scale);
      store(as_floats(out + r * kMatrixLines), words);
    }
  }
  return true;
}

// The same in bytes.
template <class T>
bool pack_byte_lines(const void* const* rows, std::size_t count, std::size_t size, float scale,
                     const float* centre, PackedWord* out) {
  constexpr std::size_t kLine = kMatrixRows * kMatrixLines;
  const QueryRows<kMatrixRows> described(out + ceil_div(size, kVectorBytes) * kLine);
  alignas(kCacheLine) float inverse[kMatrixRows];
  vf largest = {};
  for (std::size_t first = 0; first < kMatrixRows; first += kLanes) {
    const std::size_t n = count < first ? 0 : count - first < kLanes ? count - first : kLanes;
    largest = larger(largest, describe_queries<T>(rows, n, size, scale, centre, described, first, inverse));
  }
  for (std::size_t j = 0; j < size; j += kVectorBytes, out += kLine) {
    for (std::size_t r = 0; r < kMatrixRows; ++r) {
      store(as_floats(out + r * kMatrixLines),
            r < count ? query_codes<T>(rows[r], j, size, scale, inverse[r]) : vf{});
    }
  }
  return are_moderate(largest);
}

// The words of floats in three parts. 48 for 32 weights do not fit where the scores were.
struct SplitFloats {};
template <>
constexpr std::size_t kWeightStride<SplitFloats> =
    AttentionKernels::kKeyTile / kSplitElements* kSplitWords + kMatrixLines;

// The largest of all values seen, NaN apart: parts have the range of bfloat16, and no subnormals.
struct Largest {
  QUAKE_INLINE_MEMBER void see(vf v) { largest = max_skip_nan(largest, abs(v)); }
  // Of queries and keys: no product of theirs, nor a sum of those of their parts, overflows, and what parts
  // below 2^-126 lose is too small for a logit.
  QUAKE_INLINE_MEMBER bool has_parts() const { return reduce_max(largest) < 0x1p58f; }
  // Of values, which weights of at most 1 multiply: none rounds to infinity, and some are large beside 2^-126.
  QUAKE_INLINE_MEMBER bool values_have_parts() const {
    const float most = reduce_max(largest);
    return most == 0 || (most >= 0x1p-90f && most < 0x1.fep127f);
  }
  vf largest = {};
};

// A pair of vectors of a row, of which `left` elements are left; the others are 0.
template <class T>
QUAKE_INLINE void load_row_pair(const T* x, std::size_t left, vf& a, vf& b) {
  a = plain_nans(load_up_to(x, left < kLanes ? left : kLanes));
  b = left > kLanes ? plain_nans(load_up_to(x + kLanes, left < 2 * kLanes ? left - kLanes : kLanes)) : vf{};
}

// Queries in lines: [elements / kSplitElements][3][kMatrixRows][kMatrixLines].
template <class T>
bool pack_split_lines(const void* const* rows, std::size_t count, std::size_t size, float scale,
                      PackedWord* out) {
  constexpr std::size_t kPart = kMatrixRows * kMatrixLines;
  Largest values;
  for (std::size_t j = 0; j < size; j += kSplitElements, out += 3 * kPart) {
    for (std::size_t r = 0; r < kMatrixRows; ++r) {
      vf a = {}, b = {};
      if (r < count) load_row_pair(static_cast<const T*>(rows[r]) + j, size - j, a, b);
      a *= scale;
      b *= scale;
      values.see(a);
      values.see(b);
#pragma GCC unroll 3
      for (int part = 2; part >= 0; --part) {
        store(as_floats(out + part * kPart + r * kMatrixLines), take_nearest_parts(a, b));
      }
    }
  }
  return values.has_parts();
}

// Keys in panels: [elements / kSplitElements][3][kMatrixLines][kPanel].
template <class T>
bool pack_split_keys(const void* in, std::ptrdiff_t stride, std::size_t count, std::size_t size,
                     std::size_t capacity, PackedWord* out) {
  constexpr std::size_t kPart = kMatrixLines * kPanel;
  alignas(kCacheLine) PackedWord parts[3][kMatrixLines][kMatrixLines];
  Largest values;
  for (std::size_t i = 0; i < count; i += kMatrixLines) {
    const T* const from = static_cast<const T*>(in) + static_cast<std::ptrdiff_t>(i) * stride;
    for (std::size_t r = kMatrixLines; r < 2 * kMatrixLines; ++r) {
      prefetch_row(from + static_cast<std::ptrdiff_t>(r) * stride, size);
    }
    PackedWord* to = out + i / kPanel * kPanel * capacity + i % kPanel;
    for (std::size_t j = 0; j < size; j += kSplitElements, to += 3 * kPart) {
      for (std::size_t r = 0; r < kMatrixLines; ++r) {
        vf a = {}, b = {};
        if (i + r < count) load_row_pair(from + static_cast<std::ptrdiff_t>(r) * stride + j, size - j, a, b);
        values.see(a);
        values.see(b);
#pragma GCC unroll 3
        for (int part = 2; part >= 0; --part) store(as_floats(parts[part][r]), take_nearest_parts(a, b));
      }
      for (int part = 0; part < 3; ++part) {
        transpose(parts[part][0], kMatrixLines, kMatrixLines, to + part * kPart, kPanel);
      }
    }
  }
  return values.has_parts();
}

// Values in panels: [keys / kSplitElements][3][kMatrixLines][kPanel].
template <class T>
bool pack_split_values(const void* in, std::ptrdiff_t stride, std::size_t depth, std::size_t columns,
                       std::size_t capacity, PackedWord* out) {
  constexpr std::size_t kPart = kMatrixLines * kPanel;
  const T* from = static_cast<const T*>(in);
  Largest values;
  for (std::size_t i = 0; i < depth; i += 2, from += 2 * stride) {
    prefetch_row(from + kRowsAhead * stride, columns);
    prefetch_row(from + (kRowsAhead + 1) * stride, columns);
    PackedWord* const to = out + i / kSplitElements * 3 * kPart + i % kSplitElements / 2 * kPanel;
    for (std::size_t j = 0; j < columns; j += kLanes) {
      const std::size_t n = columns - j < kLanes ? columns - j : kLanes;
      vf even = plain_nans(load_up_to(from + j, n));
      vf odd = i + 1 < depth ? plain_nans(load_up_to(from + stride + j, n)) : vf{};
      values.see(even);
      values.see(odd);
      PackedWord* const panel = to + j / kPanel * kPanel * capacity + j % kPanel;
#pragma GCC unroll 3
      for (int part = 2; part >= 0; --part) store(as_floats(panel + part * kPart), take_parts(even, odd));
    }
  }
  return values.values_have_parts();
}

// What is cut off the lowest parts is below 2^-24 of a weight.
template <int Order, class Count>
QUAKE_INLINE WeightSum weigh_row(std::size_t, const float* scores, Count vectors, vf base, PackedWord* weights,
                                 SplitFloats) {
  vf s[2] = {};
  for (std::size_t i = 0; i < vectors; i += 2, weights += kSplitWords) {
    vf a = attention_weight<Order>(load(scores + i * kLanes) - base), b = {};
    if (i + 1 < vectors) b = attention_weight<Order>(load(scores + (i + 1) * kLanes) - base);
    s[0] += a;
    s[1] += b;
    store(as_floats(weights + 2 * kMatrixLines), take_nearest_parts(a, b));
    store(as_floats(weights + kMatrixLines), take_nearest_parts(a, b));
    store(as_floats(weights), as_float(append_halves(a, b)));
  }
  const float sum = reduce_add(s[0] + s[1]);
  return {sum, sum};
}

// What multiplies the words of a format, of queries in lines and of weights in rows.
template <class Words>
struct MatrixProducts {  // pairs of bfloat16
  static constexpr std::size_t kElements = 2 * kMatrixLines, kWords = kMatrixLines;
  template <int R, int V>
  QUAKE_INLINE void of_queries(const PackedWord* rows, const PackedWord* const (&panels)[V], std::size_t at) {
    multiply_lines<MatrixBFloats, R, V>(rows, kMatrixLines, panels, at, kPanel);
  }
  template <int R, int V>
  QUAKE_INLINE void of_weights(const PackedWord* rows, const PackedWord* const (&panels)[V], std::size_t at) {
    multiply_lines<MatrixBFloats, R, V>(rows, kWeightStride<Words>, panels, at, kPanel);
  }
};
template <>
struct MatrixProducts<SplitFloats> {
  static constexpr std::size_t kElements = kSplitElements, kWords = kSplitWords;
  template <int R, int V>
  QUAKE_INLINE void of_queries(const PackedWord* rows, const PackedWord* const (&panels)[V], std::size_t at) {
    multiply_split<R, V>({rows, kMatrixLines, kMatrixRows * kMatrixLines}, panels, at, kPanel);
  }
  template <int R, int V>
  QUAKE_INLINE void of_weights(const PackedWord* rows, const PackedWord* const (&panels)[V], std::size_t at) {
    multiply_split<R, V>({rows, kWeightStride<SplitFloats>, kMatrixLines}, panels, at, kPanel);
  }
};
template <>
struct MatrixProducts<Bytes8> {
  static constexpr std::size_t kElements = 4 * kMatrixLines, kWords = kMatrixLines;
  template <int R, int V>
  QUAKE_INLINE void of_queries(const PackedWord* rows, const PackedWord* const (&panels)[V], std::size_t at) {
    multiply_lines<MatrixBytes, R, V>(rows, kMatrixLines, panels, at, kPanel);
  }
  template <int R, int V>
  QUAKE_INLINE void of_weights(const PackedWord* rows, const PackedWord* const (&panels)[V], std::size_t at) {
    multiply_lines<MatrixUnsignedBytes, R, V>(rows, kWeightStride<Bytes8>, panels, at, kPanel);
  }
};
template <class Words>
constexpr std::size_t matrix_words(std::size_t elements) {
  return ceil_div(elements, MatrixProducts<Words>::kElements) * MatrixProducts<Words>::kWords;
}

// R rows times V halves of a panel; `words` of a column.
template <class Words, int R, int V>
QUAKE_INLINE void score_lines(const PackedWord* queries, const PackedWord* keys, std::size_t words, float scale,
                              float* scores) {
  const PackedWord* panels[V];
  for (int v = 0; v < V; ++v) panels[v] = keys + v * kMatrixLines;
  for_sums<R, V>(ClearSums{});
  for (std::size_t k = 0; k < words; k += MatrixProducts<Words>::kWords) {
    MatrixProducts<Words>::template of_queries<R, V>(queries + k * kMatrixRows, panels, k * kPanel);
  }
  for_sums<R, V>(StoreSums{scores, kScoreStride});
  if (scale == 1) return;
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* const at = scores + r * kScoreStride + v * kLanes;
      store(at, load(at) * scale);
    }
  }
}

template <class Words, int R, int V>
QUAKE_INLINE void accumulate_lines(const PackedWord* weights, const PackedWord* values,
                                   const float* value_scales, std::size_t words, float* out,
                                   std::size_t stride) {
  constexpr bool kIntegers = std::is_same_v<Words, Bytes8>;
  const PackedWord* panels[V];
  for (int v = 0; v < V; ++v) panels[v] = values + v * kMatrixLines;
  kIntegers ? for_sums<R, V>(ClearSums{}) : for_sums<R, V>(LoadSums{out, stride});
  for (std::size_t k = 0; k < words; k += MatrixProducts<Words>::kWords) {
    MatrixProducts<Words>::template of_weights<R, V>(weights + k, panels, k * kPanel);
  }
  if constexpr (!kIntegers) return for_sums<R, V>(StoreSums{out, stride});
  alignas(kCacheLine) float sums[R][V * kLanes];
  for_sums<R, V>(StoreSums{sums[0], V * kLanes});
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* const to = out + r * stride + v * kLanes;
      store(to, add_products(as_int(load(&sums[r][v * kLanes])), load(value_scales + v * kLanes), load(to)));
    }
  }
}

// Calls body<R, V>(first column) for the panels of `columns`: the last one may have half as many.
template <int R, class Body>
QUAKE_INLINE void for_panels(std::size_t columns, const Body& body) {
  for (std::size_t i = 0; i < columns; i += kPanel) {
    if (columns - i > kLanes) {
      body.template run<R, 2>(i);
    } else {
      body.template run<R, 1>(i);
    }
  }
}
template <class Body>
QUAKE_INLINE void for_row_panels(std::size_t rows, std::size_t columns, const Body& body) {
  rows <= kMatrixLines ? for_panels<kMatrixLines>(columns, body) : for_panels<kMatrixRows>(columns, body);
}

template <class Words>
struct ScoreLines {
  const PackedWord *queries, *keys;
  std::size_t words;
  float scale;
  float* scores;
  template <int R, int V>
  QUAKE_INLINE_MEMBER void run(std::size_t i) const {
    score_lines<Words, R, V>(queries, keys + i * words, words, scale, scores + i);
  }
};
template <class Words>
void score_by_matrices(const PackedWord* queries, std::size_t rows, const PackedWord* keys, std::size_t count,
                       std::size_t size, float scale, float* scores) {
  for_row_panels(rows, count, ScoreLines<Words>{queries, keys, matrix_words<Words>(size), scale, scores});
}

template <class Words>
struct AccumulateLines {
  const PackedWord *weights, *values;
  const float* value_scales;
  std::size_t words, capacity;
  float* out;
  std::size_t stride;
  template <int R, int V>
  QUAKE_INLINE_MEMBER void run(std::size_t i) const {
    accumulate_lines<Words, R, V>(weights, values + i * capacity, value_scales + i, words, out + i, stride);
  }
};
template <class Words>
void accumulate_by_matrices(const PackedWord* weights, std::size_t rows, const PackedWord* values,
                            const float* value_scales, std::size_t count, std::size_t capacity,
                            std::size_t size, float* accumulators, std::size_t stride) {
  for_row_panels(rows, size,
                 AccumulateLines<Words>{weights, values, value_scales, matrix_words<Words>(count),
                                        matrix_words<Words>(capacity), accumulators, stride});
}

inline void begin_attention() { begin_matrices(kMatrixLines); }

template <class Words>
void fill_attention_products(AttentionKernels::Format& format) {
  static_assert(kMatrixRows <= AttentionKernels::kMaxRowTile);
  format.row_tile = kMatrixRows;
  format.weight_stride = kWeightStride<Words>;
  format.layout = {MatrixProducts<Words>::kElements, MatrixProducts<Words>::kWords, kPanel};
  format.score = score_by_matrices<Words>;
  format.accumulate = accumulate_by_matrices<Words>;
  format.begin = begin_attention;
  format.end = end_matrices;
}

template <class T>
void fill_attention_lines_of(AttentionKernels& table) {
  constexpr int i = static_cast<int>(kDTypeOf<T>);
  table.of(AttentionFormat::kBFloat16).pack_queries[i] =
      pack_queries_as_they_are<pack_lines<BFloatPairs<T>, T>>;
  AttentionKernels::Format& split = table.of(AttentionFormat::kFloat32Split);
  split.pack_queries[i] = pack_queries_as_they_are<pack_split_lines<T>>;
  split.pack_keys[i] = pack_as_they_are<pack_split_keys<T>>;
  split.pack_values[i] = pack_as_they_are<pack_split_values<T>>;
  AttentionKernels::Format& bytes = table.of(AttentionFormat::kInt8);
  bytes.pack_queries[i] = pack_byte_lines<T>;
  bytes.pack_keys[i] = pack_byte_keys<T, kMatrixLines, 0>;
}

// Of bfloat16, the extended set's packing of keys and values and its weights stay; of bytes that of values.
template <class... T>
void fill_attention_lines(AttentionKernels& table) {
  (fill_attention_lines_of<T>(table), ...);
  AttentionKernels::Format& pairs = table.of(AttentionFormat::kBFloat16);
  fill_attention_products<BFloatPairs<float>>(pairs);
  pairs.query_scale = AttentionKernels::QueryScale::kPowersOfTwo;
  AttentionKernels::Format& split = table.of(AttentionFormat::kFloat32Split);
  fill_attention_products<SplitFloats>(split);
  split.query_scale = AttentionKernels::QueryScale::kAny;
  fill_orders(split.weigh, []<int Order>() { return weigh<SplitFloats, Order>; });
  AttentionKernels::Format& bytes = table.of(AttentionFormat::kInt8);
  fill_attention_products<Bytes8>(bytes);
  fill_byte_weights<kMatrixRows>(bytes);
}
