// Attention of few query rows, from keys and values where they lie. Included inside an instruction set's
// namespace, after softmax-inl.h.

// The sums over the lanes of four vectors.
QUAKE_INLINE void store_sums(float* to, const vf (&s)[4]) {
  const vf a = zip_low(s[0], s[1]) + zip_high(s[0], s[1]);
  const vf b = zip_low(s[2], s[3]) + zip_high(s[2], s[3]);
  store_quad_sum(to, join_low(a, b) + join_high(a, b));
}

// Fetches what lies some keys behind N elements. Hardware alone does so in time for float, whose elements take
// longest to read. What is fetched may lie behind the end.
template <int N, class T>
QUAKE_INLINE void fetch_ahead(const T* from) {
  constexpr std::size_t kBytesAhead = 6144;
  if constexpr (sizeof(T) < sizeof(float)) {
#pragma GCC unroll 8
    for (std::size_t j = 0; j < N * sizeof(T); j += kCacheLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(from) + kBytesAhead + j);
    }
  }
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
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) fetch_ahead<Vectors * kLanes>(keys + i * stride);
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

// A query as float32, times `scale`, padded with 0 to whole vectors.
template <class T>
void convert_query(const void* in, std::size_t size, float scale, float* out) {
  const T* x = static_cast<const T*>(in);
  for (std::size_t j = 0; j < size; j += kLanes) {
    const std::size_t n = size - j < kLanes ? size - j : kLanes;
    store(out + j, keep_up_to(load_up_to(x + j, n) * scale, n, 0.0f));
  }
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
    if constexpr (V > 1) fetch_ahead<V * kLanes>(values);
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
