// The product of dense layers: a register tile over the whole depth of its panels. Included inside an
// instruction set's namespace, after words-inl.h.

constexpr int kPanelVectors = static_cast<int>(kPanelColumns) / kLanes;

// As many sums as the registers hold beside a column and a factor: enough independent ones to hide the latency,
// for one row from several panels, which memory delivers faster than one.
struct DenseShapes {
  int count;
  DenseKernels::Shape at[DenseKernels::kMaxShapes];
};
constexpr DenseShapes kDenseShapes = kLanes == 16
                                         ? DenseShapes{6, {{1, 8}, {2, 8}, {4, 4}, {6, 4}, {8, 3}, {12, 2}}}
                                     : kLanes == 8      ? DenseShapes{4, {{1, 4}, {2, 2}, {4, 1}, {6, 1}}}
                                     : kRegisters >= 32 ? DenseShapes{4, {{1, 2}, {2, 2}, {4, 1}, {6, 1}}}
                                                        : DenseShapes{2, {{1, 1}, {2, 1}}};

// Bytes of a panel that few rows, which wait for memory, fetch ahead.
constexpr std::size_t kFetchWords = 256;

// c[r][v] += sum over k of rows[k, r] · panels[k, v].
template <class Words, int R, int V>
QUAKE_INLINE void multiply_add(const Words& words, const PackedWord* rows, const PackedWord* const (&panels)[V],
                               std::size_t depth, typename Words::Sum (&c)[R][V * kPanelVectors]) {
  for (std::size_t k = 0; k < depth * kPanelColumns; k += kPanelColumns) {
    if constexpr (R <= 4) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) __builtin_prefetch(panels[v] + k + kFetchWords);
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
        const typename Words::Vector factor = Words::broadcast(rows + r);
#pragma GCC unroll 8
        for (int v = 0; v < V * kPanelVectors; ++v) c[r][v] = Words::multiply_add(factor, column[v], c[r][v]);
      }
    }
  }
}

// What the sums of a row begin with.
template <class Words>
QUAKE_INLINE typename Words::Sum first_sum(const PackedWord* sum) {
  if constexpr (Words::kOffset == 0) {
    return typename Words::Sum{};
  } else {
    return broadcast_bits(sum) * -Words::kOffset;
  }
}

// The panels that exist, and the last one again for those that do not.
template <int V>
QUAKE_INLINE std::size_t panel_at(const DenseTile& tile, int v) {
  return static_cast<std::size_t>(v) < tile.panels ? static_cast<std::size_t>(v) : tile.panels - 1;
}

template <class Words, int R, int V>
void dense_product(const DensePanels& b, const DenseTile& tile) {
  constexpr int kVectors = V * kPanelVectors;
  const Words words(b.table);
  const PackedWord* panels[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) panels[v] = b.words + panel_at<V>(tile, v) * b.panel_words;
  typename Words::Sum c[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* const at = tile.tile + (r * kVectors + v) * kLanes;
      c[r][v] = tile.add ? (typename Words::Sum)load(at) : first_sum<Words>(tile.sums + r);
    }
  }
  multiply_add<Words, R, V>(words, tile.rows, panels, b.depth, c);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(tile.tile + (r * kVectors + v) * kLanes, (vf)c[r][v]);
  }
}

QUAKE_INLINE vf load_halves(const std::uint16_t* p) { return half_to_float(load_words(p)); }

// With a scale, and perhaps an offset, for every group: the sums of a group are in registers, those of all in
// the tile, where they become float32.
template <class Words, int R, int V>
void grouped_product(const DensePanels& b, const DenseTile& tile) {
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
  for (int i = 0; i < R * kVectors; ++i) store(tile.tile + i * kLanes, vf{});
  const PackedWord *rows = tile.rows, *sums = tile.sums;
  for (std::size_t group = 0; group < groups; ++group, sums += R) {
    typename Words::Sum c[R][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) c[r][v] = first_sum<Words>(sums + r);
    }
    multiply_add<Words, R, V>(words, rows, panels, b.group_words, c);
    rows += b.group_words * Words::kFactors * R;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) panels[v] += b.group_words * kPanelColumns;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const std::size_t from = at[v / kPanelVectors] + group * kPanelColumns + v % kPanelVectors * kLanes;
      const vf scale = load_halves(b.scales + from);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        float* const to = tile.tile + (r * kVectors + v) * kLanes;
        store(to, fma(scale, to_float(c[r][v]), load(to)));
      }
      if (b.offsets != nullptr) {
        const vf offset = load_halves(b.offsets + from);
        for (int r = 0; r < R; ++r) {
          float* const to = tile.tile + (r * kVectors + v) * kLanes;
          store(to, fma(offset, to_float((typename Words::Sum)broadcast_bits(sums + r)), load(to)));
        }
      }
    }
  }
}
