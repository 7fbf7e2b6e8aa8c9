// Attention in int8, for vectors of 16 lanes: a scale for each query and key, and for each column of a tile's
// values; weights in 255ths. Sums of products are exact. Included inside an instruction set's namespace, after
// the other files of the family.
//
// What an instruction set adds to its shim for it: isa/avx512vnni-inl.h.

// Marks what is in bytes. A vector of their words has kVectorBytes of them.
struct Bytes8 {};
constexpr std::size_t kVectorBytes = 4 * kLanes;
static_assert(kVectorBytes == AttentionKernels::kCentreStep);

QUAKE_INLINE vf add(vf a, vf b) { return a + b; }

// The larger magnitude, by the bits of a float: those of a NaN are larger than any other's.
QUAKE_INLINE vf larger(vf largest, vf magnitude) {
  return as_float(as_int(magnitude) > as_int(largest) ? as_int(magnitude) : as_int(largest));
}

QUAKE_INLINE bool any(vi condition) { return reduce_add(as_float(condition & 0x3f800000)) != 0; }
QUAKE_INLINE bool any_reaches(float limit, vf largest) { return any(as_int(largest) >= as_int(set1(limit))); }
// Of queries and keys: as of those in three parts (matrix-inl.h).
QUAKE_INLINE bool are_moderate(vf largest) { return !any_reaches(0x1p58f, largest); }
// Of values: sums of them times 255 do not overflow, and some are large beside 2^-100.
QUAKE_INLINE bool are_moderate_values(vf largest) {
  return !any_reaches(0x1p100f, largest) && (any_reaches(0x1p-90f, largest) || !any(as_int(largest) > 0));
}

// Of codes, 127 of them the largest magnitude. What is smaller than the least scale has no effect on a logit.
struct ByteScale {
  explicit ByteScale(vf largest) {
    const vf bounded = clamp_below(largest, 0x1p-100f);
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

// The codes of up to kVectorBytes elements, of which `left` are left; element(i) are those from the i-th on.
template <class Element>
QUAKE_INLINE vi codes_of(const Element& element, std::size_t left, vf inverse) {
  const auto part = [&](std::size_t i) QUAKE_INLINE_LAMBDA { return to_int(element(i) * inverse); };
  if (left <= 2 * kLanes) return signed_bytes(part(0), left > kLanes ? part(kLanes) : vi{}, vi{}, vi{});
  return signed_bytes(part(0), part(kLanes), part(2 * kLanes), part(3 * kLanes));
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
// centre of the keys, and the sum of its codes, which vectors alone need.
template <std::size_t kRows>
struct QueryRows {
  static constexpr std::size_t kPadded = round_up(kRows, kLanes), kWords = 3 * kPadded / kRows;
  QUAKE_INLINE_MEMBER explicit QueryRows(PackedWord* words)
      : scales(as_floats(words)),
        offsets(scales + kPadded),
        sums(reinterpret_cast<std::int32_t*>(words) + 2 * kPadded) {}
  QUAKE_INLINE_MEMBER explicit QueryRows(const PackedWord* words) : QueryRows(const_cast<PackedWord*>(words)) {}
  float *scales, *offsets;
  std::int32_t* sums;
};

template <class T>
QUAKE_INLINE vf scaled_query(const void* row, std::size_t at, std::size_t size, float scale) {
  return load_within(static_cast<const T*>(row), at, size) * scale;
}
// The scales and products of kLanes rows from the first one on, of which `count` exist, and what multiplies
// each, the inverse of its scale. Returns their largest magnitudes.
template <class T, class Rows>
QUAKE_INLINE vf describe_queries(const void* const* rows, std::size_t count, std::size_t size, float scale,
                                 const float* centre, const Rows& described, std::size_t first,
                                 float* inverse) {
  vf largest[kLanes] = {}, products[kLanes] = {};
  for (std::size_t r = 0; r < count; ++r) {
    vf m = {}, product = {};
    for (std::size_t j = 0; j < size; j += kLanes) {
      const vf v = scaled_query<T>(rows[first + r], j, size, scale);
      m = larger(m, abs(v));
      product = fma(v, load(centre + j), product);
    }
    largest[r] = m;
    products[r] = product;
  }
  const vf of_rows = fold_lanes(largest, larger);
  const ByteScale scales(of_rows);
  store(inverse + first, scales.inverse);
  store(described.scales + first, scales.scale);
  store(described.offsets + first, fold_lanes(products, add));
  return of_rows;
}
// The codes of the elements of a row from j on.
template <class T>
QUAKE_INLINE vf query_codes(const void* row, std::size_t j, std::size_t size, float scale, float inverse) {
  return as_float(codes_of([&](std::size_t i)
                               QUAKE_INLINE_LAMBDA { return scaled_query<T>(row, j + i, size, scale); },
                           size - j, set1(inverse)));
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
  alignas(kCacheLine) float inverse[kLanes];
  const vf largest = describe_queries<T>(rows, count, size, scale, centre, described, 0, inverse);
  for (std::size_t j = 0; j < size; j += kChunk) {
    const std::size_t columns = size - j < kChunk ? size - j : kChunk;
    for (std::size_t r = 0; r < count; ++r) {
      vi sum = {};
      for (std::size_t k = 0; k < columns; k += kVectorBytes) {
        const vf codes = query_codes<T>(rows[r], j + k, size, scale, inverse[r]);
        store(as_floats(&chunk[r][k / 4]), codes);
        sum = byte_products(vi{} + 0x01010101, as_int(codes), sum);
      }
      described.sums[r] += static_cast<std::int32_t>(reduce_add(to_float(sum)));
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
  vf largest = {};
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
    vf of_row[kLanes] = {};
    for (std::size_t r = 0; r < rows; ++r) {
      vf m = {};
      for (std::size_t j = 0; j < size; j += kLanes) m = larger(m, abs(element(r, j)));
      of_row[r] = m;
    }
    const vf of_rows = fold_lanes(of_row, larger);
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
                             columns - k, set1(inverse[r]));
          }
          store(as_floats(&chunk[r][k / 4]), as_float(codes ^ static_cast<std::int32_t>(kAdded * 0x01010101u)));
        }
      }
      transpose(chunk[0], kColumnChunk, words, to + j / 4 * kPanel, kPanel);
    }
  }
  return are_moderate(largest);
}

// Up to four vectors of columns of values, of which the last has `last`.
template <std::size_t V, class T>
vf pack_byte_columns(const T* from, std::ptrdiff_t stride, std::size_t depth, std::size_t last,
                     std::size_t capacity, float* scales, PackedWord* out) {
  const auto element = [&](std::size_t i, std::size_t v) QUAKE_INLINE_LAMBDA {
    const T* const at = from + static_cast<std::ptrdiff_t>(i) * stride + v * kLanes;
    return v + 1 < V ? load(at) : load_up_to(at, last);
  };
  vf largest[V] = {}, inverse[V], most = {};
  for (std::size_t i = 0; i < depth; ++i) {
    prefetch_row(from + (static_cast<std::ptrdiff_t>(i) + kRowsAhead) * stride, V * kLanes);
#pragma GCC unroll 4
    for (std::size_t v = 0; v < V; ++v) largest[v] = larger(largest[v], abs(element(i, v)));
  }
#pragma GCC unroll 4
  for (std::size_t v = 0; v < V; ++v) {
    const ByteScale scale(largest[v]);
    store(scales + v * kLanes, scale.scale);
    inverse[v] = scale.inverse;
    most = larger(most, largest[v]);
  }
  for (std::size_t i = 0; i < depth; i += 4, out += kPanel) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < V; ++v) {
      vi codes[4] = {};
#pragma GCC unroll 4
      for (std::size_t k = 0; k < 4; ++k) {
        if (i + k < depth) codes[k] = to_int(element(i + k, v) * inverse[v]);
      }
      store(as_floats(out + v * kLanes / kPanel * kPanel * capacity + v * kLanes % kPanel),
            as_float(signed_fours(codes[0], codes[1], codes[2], codes[3])));
    }
  }
  return most;
}

// Values in panels.
template <class T>
bool pack_byte_values(const void* in, std::ptrdiff_t stride, std::size_t depth, std::size_t columns,
                      std::size_t capacity, const float*, float* scales, PackedWord* out) {
  static_assert(4 * kLanes % kPanel == 0);
  vf largest = {};
  for (std::size_t j = 0; j < columns; j += 4 * kLanes) {
    const std::size_t n = columns - j < 4 * kLanes ? columns - j : 4 * kLanes, last = (n - 1) % kLanes + 1;
    const auto pack = n <= kLanes       ? pack_byte_columns<1, T>
                      : n <= 2 * kLanes ? pack_byte_columns<2, T>
                      : n <= 3 * kLanes ? pack_byte_columns<3, T>
                                        : pack_byte_columns<4, T>;
    largest = larger(largest, pack(static_cast<const T*>(in) + j, stride, depth, last, capacity, scales + j,
                                   out + j * capacity));
  }
  return are_moderate_values(largest);
}

// ---- Scores and weights ----

// A vector of products times the scales of its keys.
QUAKE_INLINE vf scaled_products(const float* products, const float* key_scales, std::size_t i) {
  return to_float(as_int(load(products + i * kLanes))) * load(key_scales + i * kLanes);
}

template <std::size_t kRows>
void scale_scores(float* scores, std::size_t rows, std::size_t count, AttentionKernels::ProductScales scales) {
  const QueryRows<kRows> of_rows(scales.rows);
  for (std::size_t r = 0; r < rows; ++r, scores += kScoreStride) {
    const vf scale = set1(of_rows.scales[r]), offset = set1(of_rows.offsets[r]);
    for (std::size_t i = 0; i * kLanes < count; ++i) {
      store(scores + i * kLanes, fma(scaled_products(scores, scales.keys, i), scale, offset));
    }
  }
}

// A weight in 255ths, of a power of two.
template <int Order>
QUAKE_INLINE vf byte_weight(vf t) {
  constexpr float k255 = 255;
  if constexpr (Order == 1) t -= constants::kSoftmaxShift;
  const vf f = fraction(t);
  vf p;
  if constexpr (Order == 1) p = set1(k255);
  if constexpr (Order == 2) p = polynomial(f, constants::kExp2Poly2, k255);
  if constexpr (Order == 3) p = polynomial(f, constants::kExp2Poly3, k255);
  if constexpr (Order == 4) p = polynomial(f, kWeightPoly4.c, k255);
  if constexpr (Order == 5) p = polynomial(f, kWeightPoly5.c, k255);
  return scalef(fma(p, f, set1(k255)), t);
}

// What is added to weights before they are rounded, evenly spread over [-1/2, 1/2) for neighbouring keys, and
// for a key over neighbouring queries. Weights below half of 1/255 would all be lost else, and with them most
// of a row that has one large weight and many small ones.
struct Dither {
  static constexpr std::size_t kShifts = kLanes;  // of whole vectors
  constexpr Dither() {
    std::uint32_t fraction = 0;
    for (float& v : values) {
      v = static_cast<float>(static_cast<std::int32_t>(fraction)) * 0x1p-32f;
      fraction += 0x9e3779b9;  // the golden ratio
    }
  }
  const float* of_row(std::size_t r) const { return values + r % kShifts * kLanes; }
  float values[AttentionKernels::kKeyTile + (kShifts - 1) * kLanes] = {};
};
alignas(kCacheLine) constexpr Dither kDither;

// The sums of a row's weights by lanes, in 255ths: as they are rounded, and before. Those are NaN together.
struct ByteSums {
  vf used, exact;
};

// Four vectors of weights of row r at a time become bytes, and may overwrite the scores of one that has been
// read. weight(i) are those of a vector of scores.
template <class Count, class Weight>
QUAKE_INLINE ByteSums weigh_bytes(std::size_t r, Count vectors, PackedWord* weights, const Weight& weight) {
  const float* const dither = kDither.of_row(r);
  vi used = {};
  vf exact[4] = {};
  const auto step = [&](std::size_t at, std::size_t n) QUAKE_INLINE_LAMBDA {
    vi parts[4] = {};
#pragma GCC unroll 4
    for (std::size_t k = 0; k < n; ++k) {
      const vf e = weight(at + k);
      exact[k] += e;
      parts[k] = to_int(e + load(dither + (at + k) * kLanes));
    }
    const vi bytes = unsigned_bytes(parts[0], parts[1], parts[2], parts[3]);
    store(as_floats(weights + at / 4 * kLanes), as_float(bytes));
    used = byte_products(bytes, vi{} + 0x01010101, used);
  };
  const std::size_t whole = vectors / 4 * 4;
#pragma GCC unroll 4
  for (std::size_t i = 0; i < whole; i += 4) step(i, 4);
  if constexpr (std::is_same_v<Count, std::size_t>) {
    if (whole < vectors) step(whole, vectors - whole);
  }
  const vf sums = (exact[0] + exact[1]) + (exact[2] + exact[3]);
  return {fma(sums, vf{}, to_float(used)), sums};
}

template <int Order, class Count>
QUAKE_INLINE WeightSum weigh_row(std::size_t r, const float* scores, Count vectors, vf base,
                                 PackedWord* weights, Bytes8) {
  const ByteSums sums = weigh_bytes(r, vectors, weights, [&](std::size_t i) QUAKE_INLINE_LAMBDA {
    return byte_weight<Order>((load(scores + i * kLanes) - base) * constants::kLog2e);
  });
  return {reduce_add(sums.used), reduce_add(sums.exact) / 255};
}

template <int Order, class Count>
QUAKE_INLINE void weigh_product_rows(const float* products, std::size_t rows, Count vectors,
                                     const float* factors, const float* addends, WeightSum* sums,
                                     PackedWord* weights) {
  for (std::size_t first = 0; first < rows; first += kLanes) {
    const std::size_t n = rows - first < kLanes ? rows - first : kLanes;
    vf used[kLanes] = {}, exact[kLanes] = {};
    for (std::size_t i = 0; i < n; ++i, products += kScoreStride, weights += kWeightStride<Bytes8>) {
      const vf factor = set1(factors[first + i]), addend = set1(addends[first + i]);
      const ByteSums of_row = weigh_bytes(first + i, vectors, weights, [&](std::size_t k) QUAKE_INLINE_LAMBDA {
        return byte_weight<Order>(fma(load(products + k * kLanes), factor, addend));
      });
      used[i] = of_row.used;
      exact[i] = of_row.exact;
    }
    const vf all_used = fold_lanes(used, add), all_exact = fold_lanes(exact, add) / 255;
    for (std::size_t i = 0; i < n; ++i) {
      sums[first + i].used += all_used[i];
      sums[first + i].exact += all_exact[i];
    }
  }
}

// Products of a row times the scales of the keys; returns the largest by lanes.
QUAKE_INLINE vf scale_by_keys(float* row, std::size_t vectors, std::size_t last, const float* key_scales) {
  vf m[4] = {set1(-kInfinity), set1(-kInfinity), set1(-kInfinity), set1(-kInfinity)};
  const auto step = [&](std::size_t i, vf& largest, std::size_t n) QUAKE_INLINE_LAMBDA {
    const vf x = keep_up_to(scaled_products(row, key_scales, i), n, -kInfinity);
    store(row + i * kLanes, x);
    largest = max_skip_nan(largest, x);
  };
  std::size_t i = 0;
  for (; i + 4 < vectors; i += 4) {
#pragma GCC unroll 4
    for (std::size_t k = 0; k < 4; ++k) step(i + k, m[k], kLanes);
  }
  for (; i + 1 < vectors; ++i) step(i, m[1], kLanes);
  step(i, m[0], last);
  return max_skip_nan(max_skip_nan(m[0], m[1]), max_skip_nan(m[2], m[3]));
}

template <int Order, std::size_t kRows>
void weigh_products(float* products, std::size_t rows, std::size_t count,
                    AttentionKernels::ProductScales scales, float* maxima, WeightSum* sums, float* accumulators,
                    std::size_t accumulator_stride, std::size_t size, PackedWord* weights) {
  const std::size_t vectors = ceil_div(count, kLanes), last = count - (vectors - 1) * kLanes;
  const QueryRows<kRows> of_rows(scales.rows);
  alignas(kCacheLine) float factors[round_up(kRows, kLanes)];
  float addends[kRows];
  for (std::size_t first = 0; first < rows; first += kLanes) {
    vf largest[kLanes] = {};
    for (std::size_t i = 0; i < kLanes && first + i < rows; ++i) {
      largest[i] = scale_by_keys(products + (first + i) * kScoreStride, vectors, last, scales.keys);
    }
    store(factors + first, fold_lanes(largest, max_skip_nan));
  }
  // Beyond this, logits that are rounded in another way than their maximum may be well above it.
  bool are_large = false;
  for (std::size_t r = 0; r < rows; ++r) {
    are_large = are_large ||
                __builtin_fabsf(factors[r] * of_rows.scales[r]) + __builtin_fabsf(of_rows.offsets[r]) > 0x1p16f;
  }
  if (are_large) {
    for (std::size_t r = 0; r < rows; ++r) {
      float* const row = products + r * kScoreStride;
      const vf scale = set1(of_rows.scales[r]), offset = set1(of_rows.offsets[r]);
      for (std::size_t i = 0; i < vectors; ++i) {
        store(row + i * kLanes, fma(load(row + i * kLanes), scale, offset));
      }
    }
    weigh<Bytes8, Order>(products, rows, count, maxima, sums, accumulators, accumulator_stride, size, weights);
    return;
  }
  for (std::size_t r = 0; r < rows; ++r) {
    const float scale = of_rows.scales[r], offset = of_rows.offsets[r];
    raise_maximum(factors[r] * scale + offset, maxima[r], sums[r], accumulators + r * accumulator_stride, size);
    factors[r] = scale * constants::kLog2e;
    addends[r] = (offset - maxima[r]) * constants::kLog2e;
  }
  if (vectors == AttentionKernels::kKeyTile / kLanes) {
    weigh_product_rows<Order>(products, rows, Whole<AttentionKernels::kKeyTile / kLanes>{}, factors, addends,
                              sums, weights);
  } else {
    weigh_product_rows<Order>(products, rows, vectors, factors, addends, sums, weights);
  }
}

// ---- The products of vectors ----

// The words of queries and keys, and of weights and values: the first ones of each are a row's. One of each
// pair is unsigned, of keys by kAdded.
constexpr std::int32_t kAddedToKeys = 128;
struct ByteVectors {
  using Vector = vi;
  QUAKE_INLINE vi load_words(const PackedWord* p) { return load_bits(p); }
  QUAKE_INLINE vi broadcast(const PackedWord* p) { return broadcast_bits(p); }
};
struct QueryBytes : ByteVectors {
  QUAKE_INLINE vi multiply_add(vi a, vi b, vi c) { return byte_products(b, a, c); }
};
struct WeightBytes : ByteVectors {
  QUAKE_INLINE vi multiply_add(vi a, vi b, vi c) { return byte_products(a, b, c); }
};

// Accumulators with the products of weights and values.
QUAKE_INLINE vf add_products(vi products, vf value_scales, vf accumulators) {
  return fma(to_float(products), value_scales, accumulators);
}

struct ScoreBytes {
  const PackedWord *queries, *keys;
  std::size_t count, depth;
  float* products;

  template <int R>
  QUAKE_INLINE_MEMBER void run() const {
    for_panels(count, [&]<int V>(std::size_t i) QUAKE_INLINE_LAMBDA { panel<R, V>(i); });
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
        store(products + static_cast<std::size_t>(r) * kScoreStride + i + v * kLanes, as_float(c[r][v]));
      }
    }
  }
};

inline void score_bytes(const PackedWord* queries, std::size_t rows, const PackedWord* keys, std::size_t count,
                        std::size_t size, float, float* scores) {
  with_row_tile(rows, ScoreBytes{queries, keys, count, ceil_div(size, 4), scores});
}

struct AccumulateBytes {
  const PackedWord *weights, *values;
  const float* value_scales;
  std::size_t depth, capacity, size;
  float* out;
  std::size_t stride;

  template <int R>
  QUAKE_INLINE_MEMBER void run() const {
    for_panels(size, [&]<int V>(std::size_t i) QUAKE_INLINE_LAMBDA { panel<R, V>(i); });
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
                             const float* value_scales, std::size_t count, std::size_t capacity,
                             std::size_t size, float* accumulators, std::size_t stride) {
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

// What lies behind the queries of kRows rows.
template <std::size_t kRows>
void fill_byte_weights(AttentionKernels::Format& format) {
  format.row_words = QueryRows<kRows>::kWords;
  format.scale_scores = scale_scores<kRows>;
  fill_orders(format.weigh, []<int Order>() { return weigh<Bytes8, Order>; });
  fill_orders(format.weigh_products, []<int Order>() { return weigh_products<Order, kRows>; });
}

template <class... T>
void fill_attention_bytes(AttentionKernels::Format& format) {
  format.row_tile = kRowTile;
  format.weight_stride = kScoreStride;
  format.layout = {4, 1, kPanel};
  format.query_scale = AttentionKernels::QueryScale::kAny;
  fill_byte_weights<kRowTile>(format);
  (fill_byte_packing<T>(format), ...);
  format.score = score_bytes;
  format.accumulate = accumulate_bytes;
}
