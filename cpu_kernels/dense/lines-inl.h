// The product of dense layers by matrix instructions, which multiply 16 lines of rows with 16 columns of a
// panel: 16 words of each at a time, as the encoder and packing leave them. Included inside an instruction
// set's namespace, after isa/kernels-inl.h.
//
// What an instruction set adds to its shim for them, of registers of 16 x 16 words (0 to 3 are sums, 4 and 5
// rows, 6 and 7 panels):
//   clear_matrix<T>()                        register T is 0
//   load_matrix<T>(p, stride)                its lines are `stride` words apart
//   store_matrix<T>(p, stride)
//   begin_matrices(words), end_matrices()    between them, of 4 to 7 only that many words deep: 8 or 16
//   MatrixBytes, MatrixBFloats               multiply_add<C, A, B>(): C += A · B

constexpr std::size_t kMatrixWords = kLineWords * kPanelColumns;

template <class Matrix, int R, int V>
QUAKE_INLINE void multiply_lines(const PackedWord* rows, const PackedWord* const (&panels)[V], std::size_t at) {
  static_assert((R == 32 && V == 2) || (R == 16 && (V == 2 || V == 4)));
  load_matrix<4>(rows, kLineWords);
  load_matrix<6>(panels[0] + at, kPanelColumns);
  load_matrix<7>(panels[1] + at, kPanelColumns);
  Matrix::template multiply_add<0, 4, 6>();
  if constexpr (V == 4) load_matrix<6>(panels[2] + at, kPanelColumns);
  if constexpr (R == 32) load_matrix<5>(rows + kMatrixWords, kLineWords);
  Matrix::template multiply_add<1, 4, 7>();
  if constexpr (V == 4) load_matrix<7>(panels[3] + at, kPanelColumns);
  if constexpr (R == 32 || V == 4) {
    Matrix::template multiply_add<2, V == 4 ? 4 : 5, 6>();
    Matrix::template multiply_add<3, V == 4 ? 4 : 5, 7>();
  }
}

// Registers I to the last one of the sums: action.run<I>(row, panel).
template <int R, int V, int I = 0, class Action>
QUAKE_INLINE void for_sums(const Action& action) {
  if constexpr (I < R / 16 * V) {
    action.template run<I>(std::size_t{I / V * 16}, std::size_t{I % V});
    for_sums<R, V, I + 1>(action);
  }
}
struct ClearSums {
  template <int I>
  QUAKE_INLINE_MEMBER void run(std::size_t, std::size_t) const {
    clear_matrix<I>();
  }
};
// To and from [R][V * kPanelColumns].
template <int V>
struct LoadSums {
  template <int I>
  QUAKE_INLINE_MEMBER void run(std::size_t row, std::size_t panel) const {
    load_matrix<I>(from + (row * V + panel) * kPanelColumns, V * kPanelColumns);
  }
  const float* from;
};
template <int V>
struct StoreSums {
  template <int I>
  QUAKE_INLINE_MEMBER void run(std::size_t row, std::size_t panel) const {
    store_matrix<I>(to + (row * V + panel) * kPanelColumns, V * kPanelColumns);
  }
  float* to;
};

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
    tiles.add ? for_sums<R, V>(LoadSums<V>{tile}) : for_sums<R, V>(ClearSums{});
    for (std::size_t k = 0; k < whole; k += kLineWords) {
      multiply_lines<Matrix, R, V>(rows + k * R, panels, k * kPanelColumns);
    }
    if (whole < b.depth) multiply_lines<Matrix, R, V>(rows + whole * R, rests, 0);
    for_sums<R, V>(StoreSums<V>{tile});
  }
}

// With a scale, and perhaps an offset, for every group, whose words are a multiple of `kWords`.
template <class Matrix, int R, int V, std::size_t kWords>
void grouped_lines_product_of(const DensePanels& b, const DenseTiles& tiles) {
  const std::size_t groups = b.groups();
  const PackedWord* panels[V];
  for (int v = 0; v < V; ++v) panels[v] = b.words + panel_at<V>(tiles, v) * b.panel_words;
  alignas(kCacheLine) float sums_of_group[R * V * kPanelColumns];
  for (std::size_t i = 0; i < tiles.count; ++i) {
    const PackedWord *const rows = tiles.rows + i * tiles.row_words, *sums = tiles.sums + i * tiles.sum_words;
    float* const tile = tiles.tiles + i * R * V * kPanelColumns;
    for (int j = 0; j < R * V; ++j) store(tile + j * kLanes, vf{});
    std::size_t k = 0;
    for (std::size_t group = 0; group < groups; ++group, sums += R) {
      for_sums<R, V>(ClearSums{});
      for (const std::size_t end = k + b.group_words; k < end; k += kWords) {
        multiply_lines<Matrix, R, V>(rows + k / kLineWords * kLineWords * R + k % kLineWords, panels,
                                     k * kPanelColumns);
      }
      for_sums<R, V>(StoreSums<V>{sums_of_group});
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        add_group<R, V>(
            b, (panel_at<V>(tiles, v) * groups + group) * kPanelColumns, sums,
            [&](int r) QUAKE_INLINE_LAMBDA { return (vi)load(sums_of_group + (r * V + v) * kPanelColumns); },
            tile + v * kPanelColumns);
      }
    }
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

inline void fill_dense_lines(DenseKernels& table) {
  table.begin_lines = begin_matrices;
  table.end_lines = end_matrices;
  // Integers of up to 8 rows stay with vectors, which expand no codes. Sums of bfloat16 are rounded in another
  // order than theirs, so all rows have these: a row's result does not depend on the number of rows.
  fill_lines_products<MatrixBFloats, false, 0>(table.of(DenseFormat::kBFloat16));
  fill_lines_products<MatrixBytes, true, 5>(table.of(DenseFormat::kInt8Quantized));
  fill_lines_products<MatrixBytes, true, 5>(table.of(DenseFormat::kInt4Quantized), expand_panel<MatrixCodes>);
}
