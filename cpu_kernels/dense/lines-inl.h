// The product of dense layers by matrix instructions (core/matrix-inl.h): 16 words of rows and of a panel at a
// time, as the encoder and packing leave them. Included inside an instruction set's namespace, after
// core/matrix-inl.h.

static_assert(kMatrixLines == kPanelColumns && kMatrixLines == kLineWords);
constexpr std::size_t kMatrixWords = kLineWords * kPanelColumns;

// Parts to nearest have both signs: what is left out of a product is small, and has no side. A NaN with other
// bits could become 0 when it is rounded.
struct SplitRow {
  static constexpr std::size_t kElements = kSplitElements, kWords = kSplitWords;
  template <class T>
  QUAKE_INLINE vf convert(const T* x, std::size_t count, PackedWord* out) {
    const vf small = set1(0x1p-64f);
    vf sizes = {};
    for (std::size_t i = 0; i < count; i += kElements, out += kWords) {
      const std::size_t n = count - i;
      vf a = plain_nans(load_up_to(x + i, n < kLanes ? n : kLanes));
      vf b = n <= kLanes ? vf{} : load_up_to(x + i + kLanes, n < kElements ? n - kLanes : kLanes);
      b = plain_nans(b);
#pragma GCC unroll 3
      for (int part = 2; part >= 0; --part) {
        if (part == 2) sizes = fma(abs(nearest_bfloat(a)), small, fma(abs(nearest_bfloat(b)), small, sizes));
        store(as_floats(out + part * kLineWords), take_nearest_parts(a, b));
      }
    }
    return sizes;
  }
};

// The parts of a panel's words.
inline void split_panel(const DensePanels& b, std::size_t first, std::size_t count, PackedWord* out) {
  for (std::size_t k = 0; k < count; k += kSplitElements, out += kSplitWords * kPanelColumns) {
    const PackedWord* from = b.words + (first + k) * kPanelColumns;
    for (std::size_t i = 0; i < kSplitElements; i += 2, from += 2 * kPanelColumns) {
      vf even = k + i < count ? load(as_floats(from)) : vf{};
      vf odd = k + i + 1 < count ? load(as_floats(from + kPanelColumns)) : vf{};
      PackedWord* to = out + 2 * kMatrixWords + i / 2 * kPanelColumns;
#pragma GCC unroll 3
      for (int part = 0; part < 3; ++part, to -= kMatrixWords) {
        store(as_floats(to), take_parts(even, odd));
      }
    }
  }
}

template <int R, int V>
void split_product(const DensePanels& b, const DenseTiles& tiles) {
  const PackedWord* const panels[V] = {b.words, b.words + panel_at<V>(tiles, 1) * b.panel_words};
  for (std::size_t i = 0; i < tiles.count; ++i) {
    const PackedWord* const rows = tiles.rows + i * tiles.row_words;
    float* const tile = tiles.tiles + i * R * V * kPanelColumns;
    tiles.add ? for_sums<R, V>(LoadSums{tile, V * kPanelColumns}) : for_sums<R, V>(ClearSums{});
    for (std::size_t k = 0; k < b.depth; k += kSplitWords) {
      multiply_split<R, V>({rows + k * R, kLineWords, kLineWords * R}, panels, k * kPanelColumns,
                           kPanelColumns);
    }
    for_sums<R, V>(StoreSums{tile, V * kPanelColumns});
  }
}

template <class Matrix, int R, int V>
void lines_product(const DensePanels& b, const DenseTiles& tiles) {
  const std::size_t whole = b.depth / kLineWords * kLineWords;
  // What is left of the depth, and 0.
  alignas(kCacheLine) PackedWord rest[V][kMatrixWords];
  const PackedWord *panels[V], *rests[V];
  for (int v = 0; v < V; ++v) {
    panels[v] = b.words + panel_at<V>(tiles, v) * b.panel_words;
    rests[v] = rest[v];
    if (whole == b.depth) continue;
    const std::size_t words = (b.depth - whole) * kPanelColumns;
    std::memcpy(rest[v], panels[v] + whole * kPanelColumns, words * sizeof(PackedWord));
    std::memset(rest[v] + words, 0, (kMatrixWords - words) * sizeof(PackedWord));
  }
  for (std::size_t i = 0; i < tiles.count; ++i) {
    const PackedWord* const rows = tiles.rows + i * tiles.row_words;
    float* const tile = tiles.tiles + i * R * V * kPanelColumns;
    tiles.add ? for_sums<R, V>(LoadSums{tile, V * kPanelColumns}) : for_sums<R, V>(ClearSums{});
    for (std::size_t k = 0; k < whole; k += kLineWords) {
      multiply_lines<Matrix, R, V>(rows + k * R, kLineWords, panels, k * kPanelColumns, kPanelColumns);
    }
    if (whole < b.depth) multiply_lines<Matrix, R, V>(rows + whole * R, kLineWords, rests, 0, kPanelColumns);
    for_sums<R, V>(StoreSums{tile, V * kPanelColumns});
  }
}

// What is done with the registers before the products of a group: the sums of the last one are stored, and
// those of the one before, which were, are added to the tile. So products, stores and additions overlap.
template <int R, int V>
struct NextGroup {
  template <int I>
  QUAKE_INLINE_MEMBER void run(std::size_t row, std::size_t panel) const {
    float* const stored = sums_of_group + I * kMatrixWords;
    float* const to = tile + (row * V + panel) * kPanelColumns;
    if (group == 0) {
#pragma GCC unroll 16
      for (std::size_t r = 0; r < kMatrixLines; ++r) store(to + r * V * kPanelColumns, vf{});
    } else if (group > 1) {
      add_group<static_cast<int>(kMatrixLines), V>(
          b, (panel_at<V>(tiles, panel) * groups + group - 2) * kPanelColumns,
          b.offsets ? sums + (group - 2) * R + row : nullptr,
          [&](int r) QUAKE_INLINE_LAMBDA { return (vi)load(stored + r * kPanelColumns); }, to);
    }
    if (group > 0) store_matrix<I>(stored, kPanelColumns);
    clear_matrix<I>();
  }
  const DensePanels& b;
  const DenseTiles& tiles;
  const PackedWord* sums;  // of the tile, as the next
  float *tile, *sums_of_group;
  std::size_t groups, group;
};

// With a scale, and perhaps an offset, for every group, whose words are a multiple of `kWords`.
template <class Matrix, int R, int V, std::size_t kWords>
void grouped_lines_product_of(const DensePanels& b, const DenseTiles& tiles) {
  const std::size_t groups = b.groups();
  const PackedWord* panels[V];
  for (int v = 0; v < V; ++v) panels[v] = b.words + panel_at<V>(tiles, v) * b.panel_words;
  alignas(kCacheLine) float sums_of_group[R * V * kPanelColumns];
  for (std::size_t i = 0; i < tiles.count; ++i) {
    const PackedWord* const rows = tiles.rows + i * tiles.row_words;
    float* const tile = tiles.tiles + i * R * V * kPanelColumns;
    NextGroup<R, V> next = {b, tiles, tiles.sums + i * tiles.sum_words, tile, sums_of_group, groups, 0};
    const auto multiply = [&](std::size_t k, const auto& before) QUAKE_INLINE_LAMBDA {
      multiply_lines<Matrix, R, V>(rows + k / kLineWords * kLineWords * R + k % kLineWords, kLineWords, panels,
                                   k * kPanelColumns, kPanelColumns, before);
    };
    for (std::size_t k = 0; next.group < groups; ++next.group) {
      const std::size_t end = k + b.group_words;
      multiply(k, next);
      while ((k += kWords) < end) multiply(k, KeepSums{});
    }
    for (int j = 0; j < 2; ++j, ++next.group) for_sums<R, V>(next);
  }
}

template <class Matrix, int R, int V>
void grouped_lines_product(const DensePanels& b, const DenseTiles& tiles) {
  (words_at_once(b.group_words) == kLineWords
       ? grouped_lines_product_of<Matrix, R, V, kLineWords>
       : grouped_lines_product_of<Matrix, R, V, kLineWords / 2>)(b, tiles);
}

// From shape `kFirst` on: of fewer rows, the extended set's products stay.
template <class Matrix, bool kGrouped, int kFirst, int I = 0>
void fill_lines_products(DenseKernels::Format& f, DenseKernels::ExpandFn expand = nullptr) {
  static_assert(kLanes == kPanelColumns && kFirst + 3 <= DenseKernels::kMaxShapes);
  static_assert(kFirst == 0 || kDenseShapes.at[kFirst > 0 ? kFirst - 1 : 0].rows <= 8);
  constexpr DenseKernels::Shape kShapes[] = {{16, 4}, {16, 2}, {32, 2}};
  if constexpr (I < 3) {
    constexpr int kRows = static_cast<int>(kShapes[I].rows), kPanels = static_cast<int>(kShapes[I].panels);
    f.expand = expand;
    f.shape_count = kFirst + 3;
    f.shapes[kFirst + I] = {kShapes[I].rows, kShapes[I].panels, expand != nullptr, true};
    f.product[kFirst + I] = lines_product<Matrix, kRows, kPanels>;
    if constexpr (kGrouped) f.grouped[kFirst + I] = grouped_lines_product<Matrix, kRows, kPanels>;
    fill_lines_products<Matrix, kGrouped, kFirst, I + 1>(f, expand);
  }
}

template <class... T>
void fill_split_products(DenseKernels& table) {
  DenseKernels::Format& f = table.of(DenseFormat::kFloat32Split);
  f.expand = split_panel;
  f.shape_count = 2;
  f.shapes[0] = {16, 2, true, true};
  f.shapes[1] = {32, 2, true, true};
  f.product[0] = split_product<16, 2>;
  f.product[1] = split_product<32, 2>;
  fill_dense_rows<EncodeConverted<SplitRow>, T...>(table, DenseFormat::kFloat32Split);
}

// 4-bit codes as the signed bytes of their table.
struct MatrixCodes {
  using Vector = vi;
  static constexpr int kFactors = 2;
  explicit MatrixCodes(const void* values) : table(load_table(static_cast<const std::int8_t*>(values))) {}
  QUAKE_INLINE_MEMBER vi factor(const PackedWord* p, int i) const {
    return look_up(table, i == 0 ? low_codes(load_bits(p)) : high_codes(load_bits(p)));
  }
  ByteTable table;
};

template <class... T>
void fill_dense_lines(DenseKernels& table) {
  table.begin_lines = begin_matrices;
  table.end_lines = end_matrices;
  // Integers of up to 8 rows stay with vectors, which expand no codes. Sums of bfloat16 are rounded in another
  // order than theirs, so all rows have these: a row's result does not depend on the number of rows.
  fill_lines_products<MatrixBFloats, false, 0>(table.of(DenseFormat::kBFloat16));
  fill_lines_products<MatrixBytes, true, 5>(table.of(DenseFormat::kInt8Quantized));
  fill_lines_products<MatrixBytes, true, 5>(table.of(DenseFormat::kInt4Quantized), expand_panel<MatrixCodes>);
  fill_split_products<T...>(table);
}
