// Attention in int8, for vectors of 16 lanes: a scale for each query and key, and for each column of a tile's
// values; weights in 255ths. Sums of products are exact. Included inside an instruction set's namespace, after
// the other files of the family.
//
// What an instruction set adds to its shim for it: isa/avx512vnni-inl.h.

// Marks what is in bytes. A vector of their words has kVectorBytes of them.
struct Bytes8 {};
constexpr std::size_t kVectorBytes = 4 * kLanes;
static_assert(kVectorBytes == AttentionKernels::kCentreStep);

// The largest magnitude of what was seen, as the bits of a float: those of a NaN are larger than any other's.
QUAKE_INLINE vi larger(vi largest, vi bits) { return bits > largest ? bits : largest; }
QUAKE_INLINE vi see(vi largest, vf v) { return larger(largest, as_int(v) & 0x7fffffff); }

QUAKE_INLINE vi bits_of(float limit) { return as_int(set1(limit)); }
QUAKE_INLINE bool any(vi condition) { return reduce_add(as_float(condition & 0x3f800000)) != 0; }
// Of queries and keys: as of those in three parts (matrix-inl.h).
QUAKE_INLINE bool are_moderate(vi largest) { return !any(largest >= bits_of(0x1p58f)); }
// Of values: sums of them times 255 do not overflow, and some are large beside 2^-100.
QUAKE_INLINE bool are_moderate_values(vi largest) {
  return !any(largest >= bits_of(0x1p100f)) && (any(largest >= bits_of(0x1p-90f)) || !any(largest > 0));
}

// Of codes, 127 of them the largest magnitude. What is smaller than the least scale has no effect on a logit.
struct ByteScale {
  explicit ByteScale(vi largest) {
    const vf bounded = clamp_below(as_float(largest), 0x1p-100f);
    scale = bounded * (1.0f / 127);
    inverse = 127.0f / bounded;
  }
  vf scale, inverse;
};

// Elements of a row from `at` on, 0 behind its end.
template <class T>
QUAKE_INLINE vf load_within(const T* row, std::size_t at, std::size_t size) {
  if (at + kLanes <= size) return load(row + at);
  return at < size ? load_partial(row + at, size - at) : vf{};
}

// The codes of kVectorBytes elements; element(i) are those from the i-th on.
template <class Element>
QUAKE_INLINE vi codes_of(const Element& element, vf inverse) {
  return signed_bytes(to_int(element(0) * inverse), to_int(element(kLanes) * inverse),
                      to_int(element(2 * kLanes) * inverse), to_int(element(3 * kLanes) * inverse));
}

template <class T>
void centre_of_keys(const void* in, std::ptrdiff_t stride, std::size_t count, std::size_t size, float* centre) {
  const float factor = 1.0f / static_cast<float>(count);
  const T* const keys = static_cast<const T*>(in);
  for (std::size_t j = 0; j < size; j += kVectorBytes) {
    vf s[4] = {};
    for (std::size_t i = 0; i < count; ++i) {
      const T* const row = keys + static_cast<std::ptrdiff_t>(i) * stride;
#pragma GCC unroll 4
      for (std::size_t k = 0; k < 4; ++k) s[k] += load_within(row, j + k * kLanes, size);
    }
#pragma GCC unroll 4
    for (std::size_t k = 0; k < 4; ++k) store(centre + j + k * kLanes, s[k] * factor);
  }
}

// ---- Queries ----

// What lies behind the words of a tile of queries: of each row the scale of its codes, its product with the
// centre of the keys, and the sum of its codes.
template <std::size_t kRows>
struct QueryRows {
  static constexpr std::size_t kWords = 3;
  QUAKE_INLINE_MEMBER explicit QueryRows(PackedWord* words)
      : scales(as_floats(words)), offsets(scales + kRows), sums(reinterpret_cast<std::int32_t*>(words) + 2 * kRows) {}
  QUAKE_INLINE_MEMBER explicit QueryRows(const PackedWord* words) : QueryRows(const_cast<PackedWord*>(words)) {}
  float *scales, *offsets;
  std::int32_t* sums;
};

// Describes row r but for the sum of its codes; returns what multiplies it, its scale and that of the call.
template <class T, class Rows>
QUAKE_INLINE vf describe_query(const T* row, std::size_t size, float scale, const float* centre, const Rows& rows,
                               std::size_t r, vi& largest) {
  vi of_row = {};
  vf product = {};
  for (std::size_t j = 0; j < size; j += kLanes) {
    const vf v = load_within(row, j, size) * scale;
    of_row = see(of_row, v);
    product = fma(v, load(centre + j), product);
  }
  largest = larger(largest, of_row);
  const ByteScale s(as_int(set1(reduce_max(as_float(of_row)))));
  rows.scales[r] = s.scale[0];
  rows.offsets[r] = reduce_add(product);
  return s.inverse;
}
// The codes of the elements of row r from j on, whose sum is added.
template <class T, class Rows>
QUAKE_INLINE vf query_codes(const T* row, std::size_t j, std::size_t size, float scale, vf inverse,
                            const Rows& rows, std::size_t r) {
  const auto element = [&](std::size_t i) QUAKE_INLINE_LAMBDA { return load_within(row, j + i, size) * scale; };
  const vi codes = codes_of(element, inverse), sum = byte_products(vi{} + 0x01010101, codes, vi{});
  rows.sums[r] += static_cast<std::int32_t>(reduce_add(__builtin_convertvector(sum, vf)));
  return as_float(codes);
}

// In [words][kRowTile]. See pack_rows() for vectors that reach into the next column.
template <class T>
bool pack_byte_rows(const void* const* rows, std::size_t count, std::size_t size, float scale,
                    const float* centre, PackedWord* out) {
  static_assert(kRowTile <= kLanes);
  constexpr std::size_t kChunk = 4 * kColumnChunk;
  alignas(kCacheLine) PackedWord chunk[kLanes][kColumnChunk] = {};
  alignas(kCacheLine) PackedWord of_rows[QueryRows<kRowTile>::kWords * kRowTile] = {};
  const QueryRows<kRowTile> described(of_rows);
  if (count > kRowTile) count = kRowTile;
  vf inverse[kRowTile];
  vi largest = {};
  for (std::size_t r = 0; r < count; ++r) {
    inverse[r] = describe_query(static_cast<const T*>(rows[r]), size, scale, centre, described, r, largest);
  }
  for (std::size_t j = 0; j < size; j += kChunk) {
    const std::size_t columns = size - j < kChunk ? size - j : kChunk;
    for (std::size_t r = 0; r < count; ++r) {
      for (std::size_t k = 0; k < columns; k += kVectorBytes) {
        store(as_floats(&chunk[r][k / 4]),
              query_codes(static_cast<const T*>(rows[r]), j + k, size, scale, inverse[r], described, r));
      }
    }
    transpose(chunk[0], kColumnChunk, ceil_div(columns, 4), out + j / 4 * kRowTile, kRowTile);
  }
  std::memcpy(out + ceil_div(size, 4) * kRowTile, of_rows, sizeof of_rows);
  return are_moderate(largest);
}

// ---- Keys and values ----

// Keys in panels: their words, of which so many belong together, plus kAdded in every byte.
template <class T, std::size_t kTogether, std::int32_t kAdded>
bool pack_byte_keys(const void* in, std::ptrdiff_t stride, std::size_t count, std::size_t size,
                    std::size_t capacity, const float* centre, float* scales, PackedWord* out) {
  constexpr std::size_t kChunk = 4 * kColumnChunk;
  alignas(kCacheLine) PackedWord chunk[kLanes][kColumnChunk];
  vi largest = {};
  for (std::size_t i = 0; i < count; i += kLanes) {
    const std::size_t rows = count - i < kLanes ? count - i : kLanes;
    const T* const from = static_cast<const T*>(in) + static_cast<std::ptrdiff_t>(i) * stride;
    for (std::size_t r = kLanes; r < 2 * kLanes; ++r) {
      prefetch_row(from + static_cast<std::ptrdiff_t>(r) * stride, size);
    }
    const auto element = [&](std::size_t r, std::size_t j) QUAKE_INLINE_LAMBDA {
      const T* const row = from + static_cast<std::ptrdiff_t>(r) * stride;
      return load_within(row, j, size) - load(centre + j);
    };
    vi of_row[kLanes] = {};
    for (std::size_t r = 0; r < rows; ++r) {
      vi m = {};
      for (std::size_t j = 0; j < size; j += kLanes) m = see(m, element(r, j));
      of_row[r] = m;
    }
    const vi of_rows = largest_lanes(of_row);
    largest = larger(largest, of_rows);
    const ByteScale scale(of_rows);
    store(scales + i, scale.scale);
    alignas(kCacheLine) float inverse[kLanes];
    store(inverse, scale.inverse);
    PackedWord* const to = out + i / kPanel * kPanel * capacity + i % kPanel;
    for (std::size_t j = 0; j < size; j += kChunk) {
      const std::size_t columns = size - j < kChunk ? size - j : kChunk;
      const std::size_t words = ceil_div(columns, 4 * kTogether) * kTogether;
      for (std::size_t r = 0; r < kLanes; ++r) {
        for (std::size_t k = 0; k < columns; k += kVectorBytes) {
          vi codes = {};
          if (r < rows) {
            codes = codes_of([&](std::size_t l) QUAKE_INLINE_LAMBDA { return element(r, j + k + l); },
                             set1(inverse[r]));
          }
          store(as_floats(&chunk[r][k / 4]), as_float(codes ^ static_cast<std::int32_t>(kAdded * 0x01010101u)));
        }
      }
      transpose(chunk[0], kColumnChunk, words, to + j / 4 * kPanel, kPanel);
    }
  }
  return are_moderate(largest);
}

// Values in panels.
template <class T>
bool pack_byte_values(const void* in, std::ptrdiff_t stride, std::size_t depth, std::size_t columns,
                      std::size_t capacity, const float*, float* scales, PackedWord* out) {
  vi largest = {};
  for (std::size_t j = 0; j < columns; j += kLanes) {
    const std::size_t n = columns - j < kLanes ? columns - j : kLanes;
    const T* const from = static_cast<const T*>(in) + j;
    const auto row = [&](std::size_t i) QUAKE_INLINE_LAMBDA {
      return i < depth ? load_up_to(from + static_cast<std::ptrdiff_t>(i) * stride, n) : vf{};
    };
    vi of_columns = {};
    for (std::size_t i = 0; i < depth; ++i) of_columns = see(of_columns, row(i));
    largest = larger(largest, of_columns);
    const ByteScale scale(of_columns);
    store(scales + j, scale.scale);
    PackedWord* const to = out + j / kPanel * kPanel * capacity + j % kPanel;
    for (std::size_t i = 0; i < depth; i += 4) {
      const auto codes = [&](std::size_t k) QUAKE_INLINE_LAMBDA { return to_int(row(i + k) * scale.inverse); };
      store(as_floats(to + i / 4 * kPanel), as_float(signed_fours(codes(0), codes(1), codes(2), codes(3))));
    }
  }
  return are_moderate_values(largest);
}

// ---- Weights ----

// In 255ths; what they add up to as well. Four vectors of them may overwrite the scores of one that has been
// read. A row with a NaN is one.
template <int Order, class Count>
QUAKE_INLINE WeightSum weigh_row(const float* scores, Count vectors, vf base, PackedWord* weights, Bytes8) {
  vi used = {};
  vf exact[4] = {};
  for (std::size_t i = 0; i < vectors; i += 4) {
    vi parts[4] = {};
#pragma GCC unroll 4
    for (std::size_t k = 0; k < 4; ++k) {
      if (k > 0 && i + k >= vectors) break;
      const vf e = attention_weight<Order>(load(scores + (i + k) * kLanes) - base);
      exact[k] += e;
      parts[k] = to_int(e * 255.0f);
    }
    const vi bytes = unsigned_bytes(parts[0], parts[1], parts[2], parts[3]);
    store(as_floats(weights + i / 4 * kLanes), as_float(bytes));
    used = byte_products(bytes, vi{} + 0x01010101, used);
  }
  const float sum = reduce_add((exact[0] + exact[1]) + (exact[2] + exact[3]));
  return {reduce_add(__builtin_convertvector(used, vf)) + sum * 0.0f, sum};
}

// ---- The products of vectors ----

// The words of queries and keys, and of weights and values: the first ones of each are a row's. One of each
// pair is unsigned, of keys by kAdded.
constexpr std::int32_t kAddedToKeys = 128;
struct ByteVectors {
  using Vector = vi;
  QUAKE_INLINE vi load_words(const PackedWord* p) { return as_int(load(as_floats(p))); }
  QUAKE_INLINE vi broadcast(const PackedWord* p) {
    std::int32_t word;
    std::memcpy(&word, p, sizeof word);
    return word - vi{};
  }
};
struct QueryBytes : ByteVectors {
  QUAKE_INLINE vi multiply_add(vi a, vi b, vi c) { return byte_products(b, a, c); }
};
struct WeightBytes : ByteVectors {
  QUAKE_INLINE vi multiply_add(vi a, vi b, vi c) { return byte_products(a, b, c); }
};

// A vector of scores of a row.
QUAKE_INLINE vf score_of(vi products, vf key_scales, float query_scale, float offset) {
  return fma(__builtin_convertvector(products, vf) * key_scales, set1(query_scale), set1(offset));
}

// Accumulators with the products of weights and values.
QUAKE_INLINE vf add_products(vi products, vf value_scales, vf accumulators) {
  return fma(__builtin_convertvector(products, vf), value_scales, accumulators);
}

struct ScoreBytes {
  const PackedWord *queries, *keys;
  const float* key_scales;
  std::size_t count, depth;
  float* scores;

  template <int R>
  QUAKE_INLINE_MEMBER void run() const {
    for (std::size_t i = 0; i < count; i += kPanel) {
      count - i > kLanes ? panel<R, 2>(i) : panel<R, 1>(i);
    }
  }
  template <int R, int V>
  [[gnu::noinline]] void panel(std::size_t i) const {
    const QueryRows<kRowTile> rows(queries + depth * kRowTile);
    vi c[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] = vi{} - kAddedToKeys * rows.sums[r];
    }
    multiply_add<QueryBytes, R, V, 1, kRowTile>(queries, keys + i * depth, depth, c);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        store(scores + static_cast<std::size_t>(r) * kScoreStride + i + v * kLanes,
              score_of(c[r][v], load(key_scales + i + v * kLanes), rows.scales[r], rows.offsets[r]));
      }
    }
  }
};

inline void score_bytes(const PackedWord* queries, std::size_t rows, const PackedWord* keys,
                        const float* key_scales, std::size_t count, std::size_t size, float, float* scores) {
  with_row_tile(rows, ScoreBytes{queries, keys, key_scales, count, ceil_div(size, 4), scores});
}

struct AccumulateBytes {
  const PackedWord *weights, *values;
  const float* value_scales;
  std::size_t depth, capacity, size;
  float* out;
  std::size_t stride;

  template <int R>
  QUAKE_INLINE_MEMBER void run() const {
    for (std::size_t i = 0; i < size; i += kPanel) {
      size - i > kLanes ? panel<R, 2>(i) : panel<R, 1>(i);
    }
  }
  template <int R, int V>
  [[gnu::noinline]] void panel(std::size_t i) const {
    vi c[R][V] = {};
    multiply_add<WeightBytes, R, V, kScoreStride, 1>(weights, values + i * capacity, depth, c);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* const to = out + static_cast<std::size_t>(r) * stride + i + v * kLanes;
        store(to, add_products(c[r][v], load(value_scales + i + v * kLanes), load(to)));
      }
    }
  }
};

inline void accumulate_bytes(const PackedWord* weights, std::size_t rows, const PackedWord* values,
                             const float* value_scales, std::size_t count, std::size_t capacity, std::size_t size,
                             float* accumulators, std::size_t stride) {
  with_row_tile(rows, AccumulateBytes{weights, values, value_scales, ceil_div(count, 4), ceil_div(capacity, 4),
                                      size, accumulators, stride});
}

// ---- The format ----

template <class T>
void fill_byte_packing(AttentionKernels::Format& format) {
  constexpr int i = static_cast<int>(kDTypeOf<T>);
  format.centre[i] = centre_of_keys<T>;
  format.pack_queries[i] = pack_byte_rows<T>;
  format.pack_keys[i] = pack_byte_keys<T, 1, kAddedToKeys>;
  format.pack_values[i] = pack_byte_values<T>;
}

template <class... T>
void fill_attention_bytes(AttentionKernels::Format& format) {
  format.row_tile = kRowTile;
  format.weight_stride = kScoreStride;
  format.layout = {4, 1, kPanel};
  format.query_scale = AttentionKernels::QueryScale::kAny;
  format.row_words = QueryRows<kRowTile>::kWords;
  (fill_byte_packing<T>(format), ...);
  format.score = score_bytes;
  fill_orders(format.weigh, []<int Order>() { return weigh<Bytes8, Order>; });
  format.accumulate = accumulate_bytes;
}
