// Encodes rows of x for the product of dense layers: converts or quantises them, and turns a tile of them so
// that the words that are multiplied at the same time lie side by side. Included inside an instruction set's
// namespace, after words-inl.h.

// Words of a row that are encoded before they are turned: they stay in L1.
constexpr std::size_t kRowChunk = 64;
constexpr std::size_t kMaxTileRows = 32;

using RowsChunk = PackedWord[kMaxTileRows][kRowChunk];

// Of `words` words of each row, the lines.
QUAKE_INLINE void split_lines(const RowsChunk& chunk, std::size_t words, std::size_t tile_rows,
                              PackedWord* out) {
  for (std::size_t k = 0; k < words; k += kLineWords) {
    for (std::size_t r = 0; r < tile_rows; ++r, out += kLineWords) {
#pragma GCC unroll 4
      for (std::size_t i = 0; i < kLineWords; i += kLanes) {
        store(as_floats(out + i), load(as_floats(&chunk[r][k + i])));
      }
    }
  }
}

// Turns `words` words of `tile_rows` rows, of which those that do not exist are 0, to out[word][row]. A vector
// of a column may reach into the next column, which is written after it.
QUAKE_INLINE void turn(const RowsChunk& chunk, std::size_t words, std::size_t tile_rows, PackedWord* out) {
  if (tile_rows == 1) {
    std::memcpy(out, chunk, words * sizeof(PackedWord));
    return;
  }
  for (std::size_t group = ceil_div(tile_rows, kLanes); group-- > 0;) {
    transpose(&chunk[group * kLanes][0], kRowChunk, words, out + group * kLanes, tile_rows);
  }
}

// How the elements of a row become its words, kElements of them kWords. What is returned becomes its scale.
struct FloatRow {
  static constexpr std::size_t kElements = 1, kWords = 1;
  template <class T>
  QUAKE_INLINE vf convert(const T* x, std::size_t count, PackedWord* out) {
    for (std::size_t i = 0; i < count; i += kLanes) {
      store(as_floats(out + i), load_up_to(x + i, count - i < kLanes ? count - i : kLanes));
    }
    return vf{};
  }
};

// Rounded to bfloat16, in pairs or as floats.
template <bool kInPairs>
struct BFloatRow {
  static constexpr std::size_t kElements = kInPairs ? 2 : 1, kWords = 1;
  template <class T>
  QUAKE_INLINE vf convert(const T* x, std::size_t count, PackedWord* out) {
    const auto part = [&](std::size_t i) {
      return i >= count ? vf{} : plain_nans(load_up_to(x + i, count - i < kLanes ? count - i : kLanes));
    };
    for (std::size_t i = 0; i < count; i += kElements * kLanes) {
      if constexpr (kInPairs) {
        store(as_floats(out + i / 2), as_float(append_bfloats(part(i), part(i + kLanes))));
      } else {
        store(as_floats(out + i), bfloat_to_float(float_to_bfloat(part(i))));
      }
    }
    return vf{};
  }
};

template <class T>
QUAKE_INLINE const T* row_at(const DenseRows& t, std::size_t r) {
  return static_cast<const T*>(t.x) + r * t.size;
}

// Sums of x in each group, for offsets.
template <class T>
void sum_groups(const DenseRows& t) {
  for (std::size_t r = 0; r < t.count; ++r) {
    for (std::size_t i = 0; i < t.size; i += t.group_size) {
      vf sum = {};
      for (std::size_t j = i; j < i + t.group_size; j += kLanes) sum += load(row_at<T>(t, r) + j);
      *as_floats(t.sums + i / t.group_size * t.tile_rows + r) = reduce_add(sum);
    }
  }
}

// The rows that a tile lacks, and those of its last vector.
QUAKE_INLINE void clear_missing(const DenseRows& t, RowsChunk& chunk) {
  const std::size_t rows = round_up(t.tile_rows, kLanes);
  std::memset(&chunk[t.count], 0, (rows - t.count) * sizeof chunk[0]);
}

template <class Row, class T>
void encode_converted(const DenseRows& t) {
  constexpr std::size_t kChunk = kRowChunk / Row::kWords * Row::kElements;
  alignas(kCacheLine) RowsChunk chunk;
  clear_missing(t, chunk);
  vf scales[kMaxTileRows] = {};
  for (std::size_t j = 0; j < t.padded_size; j += kChunk) {
    const std::size_t padded = t.padded_size - j < kChunk ? t.padded_size - j : kChunk;
    const std::size_t count = t.size - j < padded ? t.size - j : padded;
    for (std::size_t r = 0; r < t.count; ++r) {
      // What the last words lack, the weight has as 0; here it must not be NaN.
      if (count < kChunk) std::memset(&chunk[r][0], 0, sizeof chunk[r]);
      scales[r] += Row::convert(row_at<T>(t, r) + j, count, &chunk[r][0]);
    }
    const std::size_t words = ceil_div(padded, Row::kElements) * Row::kWords;
    PackedWord* const out = t.out + j / Row::kElements * Row::kWords * t.tile_rows;
    t.lines ? split_lines(chunk, words, t.tile_rows, out) : turn(chunk, words, t.tile_rows, out);
  }
  for (std::size_t r = 0; r < t.tile_rows; ++r) t.scales[r] = reduce_add(scales[r]);
  if (t.sums != nullptr) {
    std::memset(t.sums, 0, t.size / t.group_size * t.tile_rows * sizeof(PackedWord));
    sum_groups<T>(t);
  }
}

// The vectors of a quantiser.
struct Quantize {
  explicit Quantize(const DenseQuantizer& q)
      : inverse(set1(q.inverse)),
        lowest(set1(static_cast<float>(q.lowest - q.zero))),
        highest(static_cast<float>(127 - q.zero)),
        zero(q.zero - vi{}) {}
  // Bounded as floats, so that whatever v is, the integer exists.
  QUAKE_INLINE_MEMBER vi operator()(vf v) const {
    return to_int(clamp_above(max_skip_nan(lowest, v * inverse), highest)) + zero;
  }
  vf inverse, lowest;
  float highest;
  vi zero;
};

// Of a row that has neither NaN nor infinities; of another one, any.
template <class T>
QUAKE_INLINE DenseQuantizer quantizer(const T* x, std::size_t size, bool zero_point) {
  constexpr float kLargest = 0x1.fffffep127f;
  vf high[2] = {}, low[2] = {};
  for (std::size_t i = 0, k = 0; i < size; i += kLanes, k ^= 1) {
    const vf v = load_up_to(x + i, size - i < kLanes ? size - i : kLanes);
    high[k] = max_skip_nan(high[k], v);
    low[k] = max_skip_nan(low[k], -v);
  }
  const float up = reduce_max(clamp_above(max_skip_nan(high[0], high[1]), kLargest));
  const float down = reduce_max(clamp_above(max_skip_nan(low[0], low[1]), kLargest));
  const float range = zero_point ? up / 255 + down / 255 : (up > down ? up : down) / 127;
  DenseQuantizer q = {.scale = range > kLeastScale ? range : kLeastScale};
  q.inverse = 1 / q.scale;
  if (zero_point) {
    q.zero = static_cast<std::int32_t>(__builtin_rintf(down * q.inverse)) - 128;
    q.lowest = -128;
  }
  return q;
}

// `count` values as bytes; their sum in each `block` of at least two vectors is added up by add(first, sum).
// `poison` becomes NaN if there is one, or an infinity.
template <class T, class Add>
QUAKE_INLINE void quantize_row(const T* x, std::size_t count, const DenseQuantizer& q, std::size_t block,
                               std::int8_t* out, vf& poison, const Add& add) {
  const Quantize quantize(q);
  vf poisoned = poison;
  for (std::size_t first = 0; first < count; first += block) {
    const std::size_t end = count - first < block ? count : first + block;
    vi sum = {};
    for (std::size_t i = first; i < end; i += kLanes) {
      const std::size_t n = end - i < kLanes ? end - i : kLanes;
      const vf v = load_up_to(x + i, n);
      poisoned = fma(v, vf{}, poisoned);
      const vi codes = as_int(keep_up_to(as_float(quantize(v)), n, 0.0f));
      sum += codes;
      store_bytes(out + i, codes);
    }
    add(first, static_cast<std::int32_t>(reduce_add(to_float(sum))));
  }
  poison = poisoned;
}

// The same of values that are codes already, without groups.
template <class Add>
QUAKE_INLINE void quantize_row(const std::int8_t* x, std::size_t count, const DenseQuantizer&, std::size_t,
                               std::int8_t* out, vf& poison, const Add& add) {
  std::memcpy(out, x, count);
  const PackedWord* const words = reinterpret_cast<const PackedWord*>(out);
  const std::size_t size = ceil_div(count, sizeof(PackedWord));
  const vi ones = vi{} + 0x00010001;
  vi sum = {}, none = {};
  for (std::size_t i = 0; i < size; i += kLanes) {
    const vi codes = as_int(load_up_to(as_floats(words + i), size - i < kLanes ? size - i : kLanes));
    sum = pair_sums(even_bytes(codes), ones, pair_sums(odd_bytes(codes), ones, sum));
    none |= (vi)((Bytes)codes == kNoCode);
  }
  poison = as_float(as_int(poison) | (vi)(none != 0));  // all bits are a NaN
  add(0, static_cast<std::int32_t>(reduce_add(to_float(sum))));
}

template <class T>
QUAKE_INLINE DenseQuantizer quantizer_of_row(const DenseRows& t, std::size_t r) {
  if constexpr (!std::is_same_v<T, std::int8_t>) {
    if (t.range == nullptr) return quantizer(row_at<T>(t, r), t.size, t.zero_point);
  }
  return *t.range;
}

// The words of fours of bytes in turn, or of the pairs of int16 that they are.
template <std::size_t kElements>
QUAKE_INLINE void turn_bytes(const RowsChunk& chunk, std::size_t words, std::size_t tile_rows, bool lines,
                             PackedWord* out) {
  if constexpr (kElements == 4) {
    lines ? split_lines(chunk, words, tile_rows, out) : turn(chunk, words, tile_rows, out);
  } else {
    alignas(kCacheLine) PackedWord turned[kRowChunk * kMaxTileRows + kLanes];
    turn(chunk, words, tile_rows, turned);
    for (std::size_t k = 0; k < words; ++k, out += 2 * tile_rows) {
      for (std::size_t r = 0; r < tile_rows; r += kLanes) {
        store(as_floats(out + r), as_float(even_bytes(load_bits(turned + k * tile_rows + r))));
      }
      for (std::size_t r = 0; r < tile_rows; r += kLanes) {
        store(as_floats(out + tile_rows + r), as_float(odd_bytes(load_bits(turned + k * tile_rows + r))));
      }
    }
  }
}

template <std::size_t kElements, class T>
void encode_quantized(const DenseRows& t) {
  constexpr std::size_t kChunk = 4 * kRowChunk, kBlock = 32;
  alignas(kCacheLine) RowsChunk chunk;
  clear_missing(t, chunk);
  DenseQuantizer quantizers[kMaxTileRows];
  vf poison[kMaxTileRows] = {};
  const bool grouped = t.sums != nullptr && t.group_size < t.padded_size;
  const std::size_t groups = grouped ? t.size / t.group_size : 1;
  if (t.sums != nullptr) std::memset(t.sums, 0, groups * t.tile_rows * sizeof(PackedWord));
  for (std::size_t r = 0; r < t.tile_rows; ++r) {
    if (r < t.count) quantizers[r] = quantizer_of_row<T>(t, r);
    t.zeros[r] = quantizers[r].zero;
  }
  for (std::size_t j = 0; j < t.padded_size; j += kChunk) {
    const std::size_t padded = t.padded_size - j < kChunk ? t.padded_size - j : kChunk;
    const std::size_t count = t.size - j < padded ? t.size - j : padded;
    for (std::size_t r = 0; r < t.count; ++r) {
      if (count < kChunk) std::memset(&chunk[r][0], 0, sizeof chunk[r]);
      quantize_row(row_at<T>(t, r) + j, count, quantizers[r], grouped ? kBlock : kChunk,
                   reinterpret_cast<std::int8_t*>(&chunk[r][0]), poison[r],
                   [&](std::size_t first, std::int32_t sum) {
                     if (t.sums == nullptr) return;
                     const std::size_t group = grouped ? (j + first) / t.group_size : 0;
                     t.sums[group * t.tile_rows + r].bits += static_cast<std::uint32_t>(sum);
                   });
    }
    turn_bytes<kElements>(chunk, padded / 4, t.tile_rows, t.lines, t.out + j / kElements * t.tile_rows);
  }
  for (std::size_t r = 0; r < t.tile_rows; ++r) t.scales[r] = quantizers[r].scale + reduce_add(poison[r]);
}

// The encoders as the table is filled with them.
template <class Row>
struct EncodeConverted {
  static constexpr std::size_t kElements = Row::kElements, kWords = Row::kWords;
  template <class T>
  static constexpr DenseKernels::EncodeFn encode = encode_converted<Row, T>;
};
template <std::size_t kPerWord>
struct EncodeQuantized {
  static constexpr std::size_t kElements = kPerWord, kWords = 1;
  template <class T>
  static constexpr DenseKernels::EncodeFn encode = encode_quantized<kPerWord, T>;
};

template <class T>
void normalize_of(const void* x, std::size_t size, const Norm* norm, float* out) {
  if (norm) return normalize_row(static_cast<const T*>(x), size, *norm, out);
  for (std::size_t i = 0; i < size; i += kLanes) {
    const std::size_t n = size - i < kLanes ? size - i : kLanes;
    store_up_to(out + i, load_up_to(static_cast<const T*>(x) + i, n), n);
  }
}
