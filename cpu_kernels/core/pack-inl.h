// Packs the operands of the matrix product (packed.h). Included inside an instruction set's namespace, after
// product-inl.h.

// Rows that are far apart are not fetched by the hardware in time. What is fetched may lie behind the end.
template <class T>
QUAKE_INLINE void prefetch_row(const T* row, std::size_t size) {
  for (std::size_t j = 0; j < size; j += kCacheLine / sizeof(T)) __builtin_prefetch(row + j);
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
QUAKE_INLINE void transpose(const PackedWord* in, std::ptrdiff_t stride, std::size_t columns, PackedWord* out,
                            std::size_t out_stride, Scale... scale) {
  const auto quad = [&](std::size_t j, std::size_t n) {
    vf v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = (load_quads(as_floats(in + i * stride + j), 4 * stride) * ... * scale);
    transpose_quads(v);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) {
      if (i < n) store(as_floats(out + (j + i) * out_stride), v[i]);
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
                               PackedWord (&out)[kLanes][kColumnChunk]) {
  constexpr std::size_t kStep = kLanes * Words::kPerWord;
  for (std::size_t r = 0; r < kLanes; ++r) {
    for (std::size_t j = 0; j < size; j += kStep) {
      store(as_floats(&out[r][j / Words::kPerWord]),
            r < count ? Words::convert(row_at(r) + j, size - j) : vf{});
    }
  }
}

// Whether rows `stride` elements apart can be read as words as they are, in whole quads.
template <class Words, class T>
QUAKE_INLINE bool has_words(const T* row, std::ptrdiff_t stride, std::size_t size) {
  return Words::kFromMemory && size % (4 * Words::kPerWord) == 0 &&
         stride % static_cast<std::ptrdiff_t>(Words::kPerWord) == 0 &&
         reinterpret_cast<std::uintptr_t>(row) % sizeof(PackedWord) == 0;
}
template <class T>
QUAKE_INLINE const PackedWord* as_words(const T* row) {
  return reinterpret_cast<const PackedWord*>(row);
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
QUAKE_INLINE void transpose_rows(const PackedWord* in, std::ptrdiff_t stride, std::size_t columns, float scale,
                                 PackedWord* out) {
  if constexpr (Words::kTakesScale) {
    transpose(in, stride, columns, out, kRowTile, scale);
  } else {
    transpose(in, stride, columns, out, kRowTile);
  }
}

// Packing returns whether the words hold all values: these do.
//
// The left operand: a tile of rows as [words(size)][kRowTile], times `scale` where its words have room for it.
// A vector of a column may reach into the next column, which is written after it: columns ascend, and the
// groups of rows descend.
template <class Words, class T>
bool pack_rows(const void* const* rows, std::size_t count, std::size_t size, float scale, PackedWord* out) {
  constexpr std::size_t kGroups = ceil_div(kRowTile, kLanes), kChunk = kColumnChunk * Words::kPerWord;
  std::ptrdiff_t stride;
  if (Words::kFromMemory && count >= kGroups * kLanes && evenly_spaced<T>(rows, kGroups * kLanes, stride) &&
      has_words<Words>(static_cast<const T*>(rows[0]), stride, size)) {
    stride /= static_cast<std::ptrdiff_t>(Words::kPerWord);
    for (std::size_t group = kGroups; group-- > 0;) {
      const T* from = static_cast<const T*>(rows[group * kLanes]);
      transpose_rows<Words>(as_words(from), stride, words<Words>(size), scale, out + group * kLanes);
    }
    return true;
  }
  if (count > kRowTile) count = kRowTile;
  alignas(kCacheLine) PackedWord chunk[kLanes][kColumnChunk];
  for (std::size_t j = 0; j < size; j += kChunk) {
    const std::size_t columns = size - j < kChunk ? size - j : kChunk;
    for (std::size_t group = kGroups; group-- > 0;) {
      const std::size_t first = group * kLanes, n = count > first ? count - first : 0;
      convert_rows<Words>([&](std::size_t r) { return static_cast<const T*>(rows[first + r]) + j; },
                          n < kLanes ? n : kLanes, columns, chunk);
      transpose_rows<Words>(&chunk[0][0], kColumnChunk, words<Words>(columns), scale,
                            out + j / Words::kPerWord * kRowTile + first);
    }
  }
  return true;
}

// The right operand from rows of memory that are its columns: `count` rows of `size` elements that the product
// sums over. The panels have room for `capacity` words of each.
template <class Words, class T>
bool pack_transposed(const void* in, std::ptrdiff_t stride, std::size_t count, std::size_t size,
                     std::size_t capacity, PackedWord* out) {
  constexpr std::size_t kChunk = kColumnChunk * Words::kPerWord;
  alignas(kCacheLine) PackedWord chunk[kLanes][kColumnChunk];
  const T* base = static_cast<const T*>(in);
  const bool direct = has_words<Words>(base, stride, size);
  for (std::size_t i = 0; i < count; i += kLanes) {
    const T* from = base + static_cast<std::ptrdiff_t>(i) * stride;
    PackedWord* to = out + i / kPanel * kPanel * capacity + i % kPanel;
    for (std::size_t r = kLanes; r < 2 * kLanes; ++r) {
      prefetch_row(from + static_cast<std::ptrdiff_t>(r) * stride, size);
    }
    if (direct && count - i >= kLanes) {
      transpose(as_words(from), stride / static_cast<std::ptrdiff_t>(Words::kPerWord), words<Words>(size), to,
                kPanel);
      continue;
    }
    const std::size_t rows = count - i < kLanes ? count - i : kLanes;
    for (std::size_t j = 0; j < size; j += kChunk) {
      const std::size_t columns = size - j < kChunk ? size - j : kChunk;
      convert_rows<Words>([&](std::size_t r) { return from + static_cast<std::ptrdiff_t>(r) * stride + j; },
                          rows, columns, chunk);
      transpose(&chunk[0][0], kColumnChunk, words<Words>(columns), to + j / Words::kPerWord * kPanel, kPanel);
    }
  }
  return true;
}

constexpr std::ptrdiff_t kRowsAhead = 16;  // 8 to 32 are equally good

// The right operand from rows of memory that are its rows: `depth` of them, of `columns` elements. The panels
// have room for `capacity` words of a column.
template <class T>
bool pack_panels(const void* in, std::ptrdiff_t stride, std::size_t depth, std::size_t columns,
                 std::size_t capacity, PackedWord* out) {
  const T* from = static_cast<const T*>(in);
  for (std::size_t i = 0; i < depth; ++i, from += stride) {
    prefetch_row(from + kRowsAhead * stride, columns);
    float* to = as_floats(out + i * kPanel);
    std::size_t j = 0;
    for (; j + kPanel <= columns; j += kPanel, to += capacity * kPanel) {
      store(to, load(from + j));
      store(to + kLanes, load(from + j + kLanes));
    }
    for (; j < columns; j += kLanes, to += kLanes) {
      store(to, load_up_to(from + j, columns - j < kLanes ? columns - j : kLanes));
    }
  }
  return true;
}

// The pairs of two rows, a vector for each half of a panel; the second row may be missing.
template <class T>
QUAKE_INLINE void load_row_pairs(const T* a, const T* b, std::size_t n, vi (&pairs)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const vi even = load_bfloats(&a->bits, n), odd = b ? load_bfloats(&b->bits, n) : vi{};
    pairs[0] = interleave_low(even, odd);
    pairs[1] = interleave_high(even, odd);
  } else {
#pragma GCC unroll 2
    for (std::size_t half = 0; half < 2; ++half, a += kLanes, b += b ? kLanes : 0) {
      const std::size_t left = n > half * kLanes ? n - half * kLanes : 0, m = left < kLanes ? left : kLanes;
      pairs[half] = m == 0 ? vi{} : join_bfloats(load_up_to(a, m), b ? load_up_to(b, m) : vf{});
    }
  }
}

// The same of pairs of rows; the last one may lack a partner.
template <class T>
bool pack_pair_panels(const void* in, std::ptrdiff_t stride, std::size_t depth, std::size_t columns,
                      std::size_t capacity, PackedWord* out) {
  const T* from = static_cast<const T*>(in);
  for (std::size_t i = 0; i < depth; i += 2, from += 2 * stride) {
    prefetch_row(from + kRowsAhead * stride, columns);
    prefetch_row(from + (kRowsAhead + 1) * stride, columns);
    float* to = as_floats(out + i / 2 * kPanel);
    for (std::size_t j = 0; j < columns; j += kPanel, to += capacity * kPanel) {
      const std::size_t n = columns - j < kPanel ? columns - j : kPanel;
      vi pairs[2];
      load_row_pairs(from + j, i + 1 < depth ? from + stride + static_cast<std::ptrdiff_t>(j) : nullptr, n,
                     pairs);
      store(to, as_float(pairs[0]));
      store(to + kLanes, as_float(pairs[1]));
    }
  }
  return true;
}
