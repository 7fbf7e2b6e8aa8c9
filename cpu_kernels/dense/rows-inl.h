// Encodes rows of x for the product of dense layers: converts or quantises them, and turns a tile of them so
// that the words that are multiplied at the same time lie side by side. Included inside an instruction set's
// namespace, after words-inl.h.

// Words of a row that are encoded before they are turned: they stay in L1.
constexpr std::size_t kRowChunk = 64;
constexpr std::size_t kMaxTileRows = 16;

// Turns `words` words of `tile_rows` rows, of which those that do not exist are 0, to out[word][row]. A vector
// of a column may reach into the next column, which is written after it.
QUAKE_INLINE void turn(const PackedWord (&chunk)[kMaxTileRows][kRowChunk], std::size_t words,
                       std::size_t tile_rows, PackedWord* out) {
  if (tile_rows == 1) {
    std::memcpy(out, chunk, words * sizeof(PackedWord));
    return;
  }
  for (std::size_t group = ceil_div(tile_rows, kLanes); group-- > 0;) {
    transpose(&chunk[group * kLanes][0], kRowChunk, words, out + group * kLanes, tile_rows);
  }
}

// How the elements of a row become its words.
struct FloatRow {
  static constexpr std::size_t kElements = 1;  // in a word
  template <class T>
  QUAKE_INLINE void convert(const T* x, std::size_t count, PackedWord* out) {
    for (std::size_t i = 0; i < count; i += kLanes) {
      store(as_floats(out + i), load_up_to(x + i, count - i < kLanes ? count - i : kLanes));
    }
  }
};

// Rounded to bfloat16, in pairs or as floats.
template <bool kInPairs>
struct BFloatRow {
  static constexpr std::size_t kElements = kInPairs ? 2 : 1;
  template <class T>
  QUAKE_INLINE void convert(const T* x, std::size_t count, PackedWord* out) {
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

template <class Row, class T>
void encode_converted(const DenseRows& t) {
  constexpr std::size_t kChunk = kRowChunk * Row::kElements;
  alignas(kCacheLine) PackedWord chunk[kMaxTileRows][kRowChunk] = {};
  for (std::size_t j = 0; j < t.padded_size; j += kChunk) {
    const std::size_t padded = t.padded_size - j < kChunk ? t.padded_size - j : kChunk;
    const std::size_t count = t.size - j < padded ? t.size - j : padded;
    for (std::size_t r = 0; r < t.count; ++r) {
      // What the last words lack, the weight has as 0; here it must not be NaN.
      if (count < padded) std::memset(&chunk[r][0], 0, sizeof chunk[r]);
      Row::convert(row_at<T>(t, r) + j, count, &chunk[r][0]);
    }
    turn(chunk, padded / Row::kElements, t.tile_rows, t.out + j / Row::kElements * t.tile_rows);
  }
  if (t.sums != nullptr) {
    std::memset(t.sums, 0, t.size / t.group_size * t.tile_rows * sizeof(PackedWord));
    sum_groups<T>(t);
  }
}

// How a row is quantised: v is about scale * (q - zero).
struct Quantizer {
  float inverse = 0;
  std::int32_t zero = 0, lowest = -127;
};

template <class T>
QUAKE_INLINE Quantizer quantizer(const T* x, std::size_t size, bool zero_point, float& scale) {
  constexpr float kSmallest = 0x1p-118f;
  vf high[2] = {}, low[2] = {}, poison[2] = {};
  for (std::size_t i = 0, k = 0; i < size; i += kLanes, k ^= 1) {
    const vf v = load_up_to(x + i, size - i < kLanes ? size - i : kLanes);
    high[k] = max_skip_nan(high[k], v);
    low[k] = max_skip_nan(low[k], -v);
    poison[k] = fma(v, vf{}, poison[k]);  // NaN if there is one, or an infinity
  }
  // Before anything becomes an integer.
  if (const float sum = reduce_add(poison[0] + poison[1]); sum != sum) {
    scale = sum;
    return {.inverse = 0, .zero = 0, .lowest = -128};
  }
  const float up = reduce_max(max_skip_nan(high[0], high[1])), down = reduce_max(max_skip_nan(low[0], low[1]));
  const float range = zero_point ? up / 255 + down / 255 : (up > down ? up : down) / 127;
  scale = range > kSmallest ? range : kSmallest;
  Quantizer q = {.inverse = 1 / scale};
  if (zero_point) {
    q.zero = static_cast<std::int32_t>(__builtin_rintf(down * q.inverse)) - 128;
    q.lowest = -128;
  }
  return q;
}

// `count` values as bytes; their sum in each `block` of at least two vectors is added up by add(first, sum).
template <class T, class Add>
QUAKE_INLINE void quantize_row(const T* x, std::size_t count, const Quantizer& q, std::size_t block,
                               std::int8_t* out, const Add& add) {
  const vi zero = q.zero - vi{}, lowest = q.lowest - vi{}, highest = 127 - vi{};
  for (std::size_t first = 0; first < count; first += block) {
    const std::size_t end = count - first < block ? count : first + block;
    vi sum = {};
    for (std::size_t i = first; i < end; i += kLanes) {
      const std::size_t n = end - i < kLanes ? end - i : kLanes;
      vi v = to_int(load_up_to(x + i, n) * q.inverse) + zero;
      v = v < lowest ? lowest : v;
      v = v > highest ? highest : v;
      v = as_int(keep_up_to(as_float(v), n, 0.0f));
      sum += v;
      store_bytes(out + i, v);
    }
    add(first, static_cast<std::int32_t>(reduce_add(to_float(sum))));
  }
}

// The words of fours of bytes in turn, or of the pairs of int16 that they are.
template <std::size_t kElements>
QUAKE_INLINE void turn_bytes(const PackedWord (&chunk)[kMaxTileRows][kRowChunk], std::size_t words,
                             std::size_t tile_rows, PackedWord* out) {
  if constexpr (kElements == 4) {
    turn(chunk, words, tile_rows, out);
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
  alignas(kCacheLine) PackedWord chunk[kMaxTileRows][kRowChunk] = {};
  Quantizer quantizers[kMaxTileRows];
  const bool grouped = t.group_size < t.padded_size;
  const std::size_t groups = grouped ? t.size / t.group_size : 1;
  std::memset(t.sums, 0, groups * t.tile_rows * sizeof(PackedWord));
  for (std::size_t r = 0; r < t.tile_rows; ++r) {
    t.scales[r] = 0;
    if (r < t.count) quantizers[r] = quantizer(row_at<T>(t, r), t.size, t.zero_point, t.scales[r]);
    t.zeros[r] = quantizers[r].zero;
  }
  for (std::size_t j = 0; j < t.padded_size; j += kChunk) {
    const std::size_t padded = t.padded_size - j < kChunk ? t.padded_size - j : kChunk;
    const std::size_t count = t.size - j < padded ? t.size - j : padded;
    for (std::size_t r = 0; r < t.count; ++r) {
      if (count < padded) std::memset(&chunk[r][0], 0, sizeof chunk[r]);
      quantize_row(row_at<T>(t, r) + j, count, quantizers[r], grouped ? kBlock : kChunk,
                   reinterpret_cast<std::int8_t*>(&chunk[r][0]), [&](std::size_t first, std::int32_t sum) {
                     const std::size_t group = grouped ? (j + first) / t.group_size : 0;
                     t.sums[group * t.tile_rows + r].bits += static_cast<std::uint32_t>(sum);
                   });
    }
    turn_bytes<kElements>(chunk, padded / 4, t.tile_rows, t.out + j / kElements * t.tile_rows);
  }
}

// The encoders as the table is filled with them.
template <class Row>
struct EncodeConverted {
  static constexpr std::size_t kElements = Row::kElements;
  template <class T>
  static constexpr DenseKernels::EncodeFn encode = encode_converted<Row, T>;
};
template <std::size_t kPerWord>
struct EncodeQuantized {
  static constexpr std::size_t kElements = kPerWord;
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
