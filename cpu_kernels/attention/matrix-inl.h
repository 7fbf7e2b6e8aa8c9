// The two products of attention's tiles by matrix instructions: queries lie in lines, keys, values and weights as
// for vectors. Included inside an instruction set's namespace, after core/matrix-inl.h.

constexpr std::size_t kMatrixRows = 2 * kMatrixLines;

// Pairs of bfloat16 times a power of two.
QUAKE_INLINE vf scaled_bfloats(vf pairs, float scale) {
  const vf odd = as_float(as_int(pairs) & ~0xffff), even = as_float(as_int(pairs) << 16);
  return as_float(join_bfloats(even * scale, odd * scale));
}

// Queries in lines of kMatrixLines words: [words / kMatrixLines][kMatrixRows][kMatrixLines].
template <class Words, class T>
void pack_lines(const void* const* rows, std::size_t count, std::size_t size, float scale, PackedWord* out) {
  constexpr std::size_t kElements = kMatrixLines * Words::kPerWord;
  static_assert(kMatrixLines == kLanes);
  for (std::size_t j = 0; j < size; j += kElements, out += kMatrixRows * kMatrixLines) {
    for (std::size_t r = 0; r < kMatrixRows; ++r) {
      vf words = r < count ? Words::convert(static_cast<const T*>(rows[r]) + j, size - j) : vf{};
      if (scale != 1) words = scaled_bfloats(words, scale);
      store(as_floats(out + r * kMatrixLines), words);
    }
  }
}

template <int R, int V>
QUAKE_INLINE void score_lines(const PackedWord* queries, const PackedWord* keys, std::size_t depth, float scale,
                              float* scores) {
  const PackedWord* const panels[] = {keys, keys + kMatrixLines};
  const auto& used = reinterpret_cast<const PackedWord* const(&)[V]>(panels);
  for_sums<R, V>(ClearSums{});
  for (std::size_t k = 0; k < depth; k += kMatrixLines) {
    multiply_lines<MatrixBFloats, R, V>(queries + k * kMatrixRows, kMatrixLines, used, k * kPanel, kPanel);
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

template <int R>
void score_rows(const PackedWord* queries, const PackedWord* keys, std::size_t count, std::size_t depth,
                float scale, float* scores) {
  for (std::size_t i = 0; i < count; i += kPanel) {
    const PackedWord* panel = keys + i * depth;
    if (count - i > kLanes) {
      score_lines<R, 2>(queries, panel, depth, scale, scores + i);
    } else {
      score_lines<R, 1>(queries, panel, depth, scale, scores + i);
    }
  }
}

inline std::size_t whole_lines(std::size_t words) { return round_up(words, kMatrixLines); }

template <class Words>
void score_by_matrices(const PackedWord* queries, std::size_t rows, const PackedWord* keys, std::size_t count,
                       std::size_t size, float scale, float* scores) {
  (rows <= kMatrixLines ? score_rows<kMatrixLines> : score_rows<kMatrixRows>)(queries, keys, count,
                                                                              whole_lines(words<Words>(size)),
                                                                              scale, scores);
}

template <int R, int V>
QUAKE_INLINE void accumulate_lines(const PackedWord* weights, const PackedWord* values, std::size_t depth,
                                   float* out, std::size_t stride) {
  const PackedWord* const panels[] = {values, values + kMatrixLines};
  const auto& used = reinterpret_cast<const PackedWord* const(&)[V]>(panels);
  for_sums<R, V>(LoadSums{out, stride});
  for (std::size_t k = 0; k < depth; k += kMatrixLines) {
    multiply_lines<MatrixBFloats, R, V>(weights + k, kScoreStride, used, k * kPanel, kPanel);
  }
  for_sums<R, V>(StoreSums{out, stride});
}

template <int R>
void accumulate_rows(const PackedWord* weights, const PackedWord* values, std::size_t depth,
                     std::size_t capacity, std::size_t size, float* out, std::size_t stride) {
  for (std::size_t i = 0; i < size; i += kPanel) {
    const PackedWord* panel = values + i * capacity;
    if (size - i > kLanes) {
      accumulate_lines<R, 2>(weights, panel, depth, out + i, stride);
    } else {
      accumulate_lines<R, 1>(weights, panel, depth, out + i, stride);
    }
  }
}

template <class Words>
void accumulate_by_matrices(const PackedWord* weights, std::size_t rows, const PackedWord* values,
                            std::size_t count, std::size_t capacity, std::size_t size, float* accumulators,
                            std::size_t stride) {
  (rows <= kMatrixLines ? accumulate_rows<kMatrixLines>
                        : accumulate_rows<kMatrixRows>)(weights, values, whole_lines(words<Words>(count)),
                                                        whole_lines(words<Words>(capacity)), size, accumulators,
                                                        stride);
}

inline void begin_attention() { begin_matrices(kMatrixLines); }

// The extended set's packing of keys and values stays.
template <template <class> class Words, class... T>
void fill_attention_matrices(AttentionKernels::Format& format) {
  static_assert(kMatrixRows <= AttentionKernels::kMaxRowTile);
  format.row_tile = kMatrixRows;
  format.layout.words_at_a_time = kMatrixLines;
  format.query_scale = AttentionKernels::QueryScale::kPowersOfTwo;
  ((format.pack_queries[static_cast<int>(kDTypeOf<T>)] = pack_lines<Words<T>, T>), ...);
  format.score = score_by_matrices<Words<float>>;
  format.accumulate = accumulate_by_matrices<Words<float>>;
  format.begin = begin_attention;
  format.end = end_matrices;
}
