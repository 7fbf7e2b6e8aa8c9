// The product of dense layers: a register tile over the whole depth of its panels. Included inside an
// instruction set's namespace, after words-inl.h.

constexpr int kPanelVectors = static_cast<int>(kPanelColumns) / kLanes;

// As many sums as the registers hold beside a column and a factor: enough independent ones to hide the latency,
// for one row from several panels, which memory delivers faster than one.
struct DenseShapes {
  int count;
  DenseKernels::Shape at[DenseKernels::kMaxShapes];
};
constexpr DenseShapes kDenseShapes =
    kLanes == 16       ? DenseShapes{6, {{1, 8}, {2, 8}, {4, 4}, {6, 4}, {8, 3}, {12, 2}}}
    : kLanes == 8      ? DenseShapes{5, {{1, 4}, {2, 2}, {4, 1}, {4, 1, true}, {6, 1, true}}}
    : kRegisters >= 32 ? DenseShapes{5, {{1, 2}, {2, 2}, {4, 1}, {4, 1, true}, {6, 1, true}}}
                       : DenseShapes{3, {{1, 1}, {2, 1}, {2, 1, true}}};

// Words of a panel, and groups whose scales, that few rows, which wait for memory, fetch ahead.
constexpr std::size_t kFetchWords = 256, kFetchGroups = 16;
constexpr int kFewRows = 8;

// c[r][v] += sum over k of rows[k, r] · panels[k, v]. Where panels are read to their ends, those ends are
// `left` words ahead, and the panels that are read then `skip` words behind them.
template <class Words, int R, int V>
QUAKE_INLINE void multiply_add(const Words& words, const PackedWord* rows, const PackedWord* const (&panels)[V],
                               std::size_t depth, std::size_t left, std::size_t skip,
                               typename Words::Sum (&c)[R][V * kPanelVectors]) {
  for (std::size_t k = 0; k < depth * kPanelColumns; k += kPanelColumns) {
    if constexpr (R <= kFewRows) {
      const std::size_t ahead = k + kFetchWords;
      const std::size_t fetched = ahead < left ? ahead : ahead + skip;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) __builtin_prefetch(panels[v] + fetched);
    }
    // Of few rows each vector is finished before the next is decoded: registers for all would spill.
    if constexpr (R <= 2 && Words::kFactors == 8 && kRegisters < 32) {
#pragma GCC unroll 8
      for (int v = 0; v < V * kPanelVectors; ++v) {
        asm volatile("" ::: "memory");
#pragma GCC unroll 8
        for (int i = 0; i < Words::kFactors; ++i) {
          const auto column = words.factor(panels[v / kPanelVectors] + k + v % kPanelVectors * kLanes, i);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) {
            c[r][v] = Words::multiply_add(Words::broadcast(rows + i * R + r), column, c[r][v]);
          }
        }
      }
      rows += Words::kFactors * R;
      continue;
    }
#pragma GCC unroll 8
    for (int i = 0; i < Words::kFactors; ++i, rows += R) {
      // The columns of the next factor are loaded after this one's are used: registers for both would spill.
      if constexpr (Words::kFactors > 1 && kRegisters < 32) asm volatile("" ::: "memory");
      typename Words::Vector column[V * kPanelVectors];
#pragma GCC unroll 8
      for (int v = 0; v < V * kPanelVectors; ++v) {
        column[v] = words.factor(panels[v / kPanelVectors] + k + v % kPanelVectors * kLanes, i);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        if constexpr (R > 4 && kRegisters < 32) asm volatile("" ::: "memory");
        const typename Words::Vector factor = Words::broadcast(rows + r);
#pragma GCC unroll 8
        for (int v = 0; v < V * kPanelVectors; ++v) c[r][v] = Words::multiply_add(factor, column[v], c[r][v]);
      }
    }
  }
}

// The panels that exist, and the last one again for those that do not.
template <int V>
QUAKE_INLINE std::size_t panel_at(const DenseTiles& tiles, int v) {
  return static_cast<std::size_t>(v) < tiles.panels ? static_cast<std::size_t>(v) : tiles.panels - 1;
}

template <class Words, int R, int V>
void dense_product(const DensePanels& b, const DenseTiles& tiles) {
  constexpr int kVectors = V * kPanelVectors;
  const Words words(b.table);
  const PackedWord* panels[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) panels[v] = b.words + panel_at<V>(tiles, v) * b.panel_words;
  const PackedWord *rows = tiles.rows, *sums = tiles.sums;
  float* tile = tiles.tiles;
  for (std::size_t i = 0; i < tiles.count; ++i, rows += tiles.row_words, sums += tiles.sum_words) {
    typename Words::Sum c[R][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        c[r][v] = tiles.add ? (typename Words::Sum)load(tile + (r * kVectors + v) * kLanes)
                            : words.first_sum(sums + r);
      }
    }
    multiply_add<Words, R, V>(words, rows, panels, b.depth, b.panel_words, (V - 1) * b.panel_words, c);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v, tile += kLanes) store(tile, (vf)c[r][v]);
    }
  }
}

QUAKE_INLINE vf load_halves(const std::uint16_t* p) { return half_to_float(load_words(p)); }

// Adds a group's products for a vector of columns, sum(row), to a tile. Scales and offsets are read at `from`.
template <int R, int kVectors, class SumOf>
QUAKE_INLINE void add_group(const DensePanels& b, std::size_t from, const PackedWord* sums, const SumOf& sum,
                            float* tile) {
  constexpr int kStride = kVectors * kLanes;
  const vf scale = load_halves(b.scales + from);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(tile + r * kStride, fma(scale, to_float(sum(r)), load(tile + r * kStride)));
  }
  if (b.offsets == nullptr) return;
  const vf offset = load_halves(b.offsets + from);
  for (int r = 0; r < R; ++r) {
    const vf ones = to_float((decltype(sum(r)))broadcast_bits(sums + r));
    store(tile + r * kStride, fma(offset, ones, load(tile + r * kStride)));
  }
}

// With a scale, and perhaps an offset, for every group: the sums of a group are in registers, those of all in
// the tile, where they become float32. A function of its own: around it, the loop over tiles costs GCC
// registers.
template <class Words, int R, int V>
[[gnu::noinline]] void grouped_tile(const DensePanels& b, const DenseTiles& tile) {
  constexpr int kVectors = V * kPanelVectors;
  const Words words(b.table);
  const std::size_t groups = b.groups();
  const PackedWord* panels[V];
  std::size_t at[V];  // of the scales
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    panels[v] = b.words + panel_at<V>(tile, v) * b.panel_words;
    at[v] = panel_at<V>(tile, v) * groups * kPanelColumns;
  }
  for (int j = 0; j < R * kVectors; ++j) store(tile.tiles + j * kLanes, vf{});
  const PackedWord *rows = tile.rows, *sums = tile.sums;
  const std::size_t group_words = b.group_words * kPanelColumns;
  std::size_t left = b.panel_words;
  for (std::size_t group = 0; group < groups; ++group, sums += R, left -= group_words) {
    typename Words::Sum c[R][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) c[r][v] = words.first_sum(sums + r);
    }
    multiply_add<Words, R, V>(words, rows, panels, b.group_words, left, (V - 1) * b.panel_words, c);
    if constexpr (R <= kFewRows) {
      const std::size_t ahead = group + kFetchGroups;
      const std::size_t fetched = (ahead < groups ? ahead : ahead + (V - 1) * groups) * kPanelColumns;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) __builtin_prefetch(b.scales + at[v] + fetched);
      if (b.offsets != nullptr) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) __builtin_prefetch(b.offsets + at[v] + fetched);
      }
    }
    rows += b.group_words * Words::kFactors * R;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) panels[v] += group_words;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      add_group<R, kVectors>(
          b, at[v / kPanelVectors] + group * kPanelColumns + v % kPanelVectors * kLanes, sums,
          [&](int r) QUAKE_INLINE_LAMBDA { return c[r][v]; }, tile.tiles + v * kLanes);
    }
  }
}

template <class Words, int R, int V>
void grouped_product(const DensePanels& b, const DenseTiles& tiles) {
  DenseTiles tile = tiles;
  for (std::size_t i = 0; i < tiles.count; ++i) {
    grouped_tile<Words, R, V>(b, tile);
    tile.rows += tiles.row_words;
    tile.sums += tiles.sum_words;
    tile.tiles += R * V * kPanelColumns;
  }
}

// The same with sums of 16 bits in a block, for one panel after the other: a group's sums are in registers.
template <class Words, int R, int V>
QUAKE_INLINE void narrow_product_of(const Words& words, const DensePanels& weight, const DenseTiles& all) {
  const DensePanels b = weight;  // which what is stored does not overlap
  const DenseTiles tiles = all;
  constexpr int kVectors = V * kPanelVectors, kN = kPanelVectors;
  constexpr std::size_t kStep = Words::kFactors * R;
  const vi ones = vi{} + 0x00010001;
  const std::size_t groups = b.groups(), depth = b.group_words;
  float* tile = tiles.tiles;
  for (std::size_t i = 0; i < tiles.count; ++i, tile += R * kVectors * kLanes) {
    for (int j = 0; j < R * kVectors; ++j) store(tile + j * kLanes, vf{});
    const PackedWord *rows = tiles.rows + i * tiles.row_words, *sums = tiles.sums + i * tiles.sum_words;
    for (std::size_t group = 0; group < groups; ++group, sums += R, rows += depth * kStep) {
      for (int p = 0; p < V; ++p) {
        const std::size_t panel = panel_at<V>(tiles, p);
        const PackedWord* word = b.words + panel * b.panel_words + group * depth * kPanelColumns;
        const PackedWord *x = rows, *const end = rows + depth * kStep;
        vi c[kN][R];
#pragma GCC unroll 4
        for (int v = 0; v < kN; ++v) {
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) c[v][r] = words.first_sum(sums + r);
        }
        do {
          vi block[kN][R] = {};
#pragma GCC unroll 4
          for (std::size_t j = 0; j < Words::kBlock; ++j, x += kStep, word += kPanelColumns) {
            __builtin_prefetch(word + 2 * kFetchWords);
#pragma GCC unroll 4
            for (int v = 0; v < kN; ++v) {
              const vi low = words.factor(word + v * kLanes, 0), high = words.factor(word + v * kLanes, 1);
#pragma GCC unroll 4
              for (int r = 0; r < R; ++r) {
                block[v][r] = byte_pairs(low, Words::broadcast(x + r), block[v][r]);
                block[v][r] = byte_pairs(high, Words::broadcast(x + R + r), block[v][r]);
              }
            }
          }
#pragma GCC unroll 4
          for (int v = 0; v < kN; ++v) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) c[v][r] = pair_sums(block[v][r], ones, c[v][r]);
          }
        } while (x != end);
#pragma GCC unroll 4
        for (int v = 0; v < kN; ++v) {
          add_group<R, kVectors>(
              b, (panel * groups + group) * kPanelColumns + v * kLanes, sums,
              [&](int r) QUAKE_INLINE_LAMBDA { return c[v][r]; }, tile + (p * kN + v) * kLanes);
        }
      }
    }
  }
}

template <int R, int V>
void narrow_product(const DensePanels& b, const DenseTiles& tiles) {
  const NarrowTable table(b.table);
  if (table.are_codes) return narrow_product_of<NarrowCodes<true>, R, V>(NarrowCodes<true>(table), b, tiles);
  narrow_product_of<NarrowCodes<false>, R, V>(NarrowCodes<false>(table), b, tiles);
}

// The factors of a panel's words (kernels.h).
template <class Words>
void expand_panel(const DensePanels& b, std::size_t first, std::size_t count, PackedWord* out) {
  const Words words(b.table);
  const bool scaled = std::is_same_v<typename Words::Vector, vf> && b.group_words != 0;
  const std::size_t run = scaled ? b.group_words : count;  // of words with one scale
  for (std::size_t k = first, end; k < first + count; k = end) {
    end = scaled ? (k / run + 1) * run : k + run;
    if (end > first + count) end = first + count;
    vf scale[kPanelVectors], offset[kPanelVectors] = {};
    if (scaled) {
      const std::size_t at = k / run * kPanelColumns;
      for (int v = 0; v < kPanelVectors; ++v) {
        scale[v] = load_halves(b.scales + at + v * kLanes);
        if (b.offsets != nullptr) offset[v] = load_halves(b.offsets + at + v * kLanes);
      }
    }
    for (std::size_t j = k; j < end; ++j) {
      const PackedWord* const from = b.words + j * kPanelColumns;
      __builtin_prefetch(from + kFetchWords);
#pragma GCC unroll 8
      for (int i = 0; i < Words::kFactors; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVectors; ++v, out += kLanes) {
          auto factor = words.factor(from + v * kLanes, i);
          if constexpr (std::is_same_v<typename Words::Vector, vf>) {
            if (scaled) factor = fma(factor, scale[v], offset[v]);
          }
          store(as_floats(out), (vf)factor);
        }
      }
    }
  }
}

// Codes by a table of bytes if it has the values.
template <DenseKernels::ProductFn kBytes, DenseKernels::ProductFn kFloats>
void product_of_codes(const DensePanels& b, const DenseTiles& tiles) {
  (DenseByteCodes::bytes_of(b.table).exact ? kBytes : kFloats)(b, tiles);
}
template <DenseKernels::ExpandFn kBytes, DenseKernels::ExpandFn kFloats>
void expand_codes(const DensePanels& b, std::size_t first, std::size_t count, PackedWord* out) {
  (DenseByteCodes::bytes_of(b.table).exact ? kBytes : kFloats)(b, first, count, out);
}
