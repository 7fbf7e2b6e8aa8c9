// The two products of attention's tiles: scores, and what they weigh. Included inside an instruction set's
// namespace, after core/product-inl.h; kernels.h says how tiles are laid out.

constexpr std::size_t kScoreStride = AttentionKernels::kScoreStride;

template <class Words, int R, int V>
[[gnu::noinline]] void score_panel(const PackedWord* queries, const PackedWord* keys, std::size_t depth,
                                   float scale, float* scores) {
  vf c[R][V] = {};
  multiply_add<Words, R, V, 1, kRowTile>(queries, keys, depth, c);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store(scores + r * kScoreStride + v * kLanes, Words::kTakesScale ? c[r][v] : c[r][v] * scale);
    }
  }
}

template <class Words, int R, int V>
[[gnu::noinline]] void accumulate_panel(const PackedWord* weights, const PackedWord* values, std::size_t depth,
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

// panel.operator()<V>(i) for the panels of `count` columns, each from the column i on with V vectors.
template <class Panel>
QUAKE_INLINE void for_panels(std::size_t count, const Panel& panel) {
  for (std::size_t i = 0; i < count; i += kPanel) {
    count - i > kLanes ? panel.template operator()<2>(i) : panel.template operator()<1>(i);
  }
}

template <class Words>
struct ScorePanels {
  const PackedWord *queries, *keys;
  std::size_t count, depth;
  float scale;
  float* scores;

  template <int R>
  QUAKE_INLINE_MEMBER void run() const {
    for_panels(count, [&]<int V>(std::size_t i) QUAKE_INLINE_LAMBDA {
      score_panel<Words, R, V>(queries, keys + i * depth, depth, scale, scores + i);
    });
  }
};

template <class Words>
void score(const PackedWord* queries, std::size_t rows, const PackedWord* keys, std::size_t count,
           std::size_t size, float scale, float* scores) {
  with_row_tile(rows, ScorePanels<Words>{queries, keys, count, words<Words>(size), scale, scores});
}

template <class Words>
struct AccumulatePanels {
  const PackedWord *weights, *values;
  std::size_t depth, capacity, size;
  float* out;
  std::size_t stride;

  template <int R>
  QUAKE_INLINE_MEMBER void run() const {
    for_panels(size, [&]<int V>(std::size_t i) QUAKE_INLINE_LAMBDA {
      accumulate_panel<Words, R, V>(weights, values + i * capacity, depth, out + i, stride);
    });
  }
};

template <class Words>
void accumulate(const PackedWord* weights, std::size_t rows, const PackedWord* values, const float*,
                std::size_t count, std::size_t capacity, std::size_t size, float* accumulators,
                std::size_t accumulator_stride) {
  with_row_tile(rows, AccumulatePanels<Words>{weights, values, words<Words>(count), words<Words>(capacity),
                                              size, accumulators, accumulator_stride});
}
