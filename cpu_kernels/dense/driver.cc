#include "dense/driver.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "core/denormals.h"
#include "core/memory.h"

namespace quake {
namespace {

using std::size_t;

// Encoded rows are kept in memory of about this size, and what is longer is done in parts.
constexpr size_t kRowBytes = size_t{16} << 20;
// Rows of a task, whose words stay in the second-level cache while the panels pass by, if they are no more than
// these. Else so many of them at a time, which meet so many steps of panels before the next words do.
constexpr size_t kBlockRows = 192, kBlockWords = kBlockRows * 1024, kLeastSteps = 4, kStepsAtOnce = 8;
// Where there would be fewer tasks, they have fewer steps.
constexpr size_t kFewTasks = 16;
// As many words of a row, or factors of a panel, a block of rows is multiplied with before the next ones: where
// they are expanded, for the second-level cache; of lines, for the first-level one.
constexpr size_t kExpandedDepth = 1024, kLinesDepth = 256;
// Rows whose products are finished at a time: few enough to stay in the first-level cache.
constexpr size_t kRowsAtOnce = 24;
// A task is at least and about so many products.
constexpr size_t kLeastWork = size_t{1} << 19, kMostWork = size_t{1} << 24;
// Turning rows writes up to a vector past a tile.
constexpr size_t kSlack = 16;

// How a part of the rows is cut into tiles: of one shape, or the last ones of the next lower one.
struct Tiling {
  int shape;
  size_t rows, panels;   // of the shape
  bool expanded, lines;  // likewise
  size_t tiles, low_tiles, low_rows;

  bool is_low(size_t tile) const { return tile + low_tiles >= tiles; }
  size_t rows_of(size_t tile) const { return is_low(tile) ? low_rows : rows; }
  size_t first_row(size_t tile) const {
    return is_low(tile) ? (tiles - low_tiles) * rows + (tile + low_tiles - tiles) * low_rows : tile * rows;
  }
};

Tiling cut_rows(const DenseKernels::Format& kernels, size_t rows) {
  const auto* const shapes = kernels.shapes;
  const int last = kernels.shape_count - 1;
  const size_t used = ceil_div(rows, ceil_div(rows, shapes[last].rows));
  int shape = 0;
  while (shapes[shape].rows < used) ++shape;
  // Expanding pays for more tiles than these.
  constexpr size_t kFewTiles = 4;
  if (shape < last && shapes[shape + 1].rows == shapes[shape].rows && rows > kFewTiles * used) ++shape;
  const DenseKernels::Shape& tall = shapes[shape];
  Tiling best = {shape, tall.rows, tall.panels, tall.expanded, tall.lines, ceil_div(rows, tall.rows), 0, 0};
  if (shape == 0 || shape < last) return best;
  const DenseKernels::Shape& low = shapes[shape - 1];
  if (low.panels != tall.panels || low.expanded != tall.expanded || low.lines != tall.lines) return best;
  best.low_rows = low.rows;
  size_t least = best.tiles * tall.rows;
  for (size_t count = 1; count <= 2 && count * low.rows < rows; ++count) {
    const size_t tall_tiles = ceil_div(rows - count * low.rows, tall.rows);
    if (const size_t all = tall_tiles * tall.rows + count * low.rows; all < least) {
      least = all;
      best.tiles = tall_tiles + count;
      best.low_tiles = count;
    }
  }
  return best;
}

// Codes whose values are close have a product of their own for few rows.
bool are_narrow(const DenseProblem& p, const DenseKernels& kernels) {
  if (p.format != DenseFormat::kInt4Quantized || p.group_size == 0) return false;
  const DenseKernels::Format& narrow = kernels.of(DenseFormat::kInt4Narrow);
  if (narrow.shape_count == 0 || p.rows > narrow.shapes[narrow.shape_count - 1].rows) return false;
  const std::int8_t* const values = static_cast<const std::int8_t*>(p.weights[0].panels.table);
  const auto [least, largest] = std::minmax_element(values, values + 16);
  return *largest - *least <= 15;
}

// Splitting floats pays for more rows than a tile has, and for some depth.
bool are_split(const DenseProblem& p, const DenseKernels& kernels) {
  const DenseKernels::Format& split = kernels.of(DenseFormat::kFloat32Split);
  return p.format == DenseFormat::kFloat32 && split.shape_count > 0 && p.rows > split.shapes[0].rows &&
         p.size >= 2 * split.row_elements;
}

// The format that a problem is computed in.
DenseFormat choose_format(const DenseProblem& p, const DenseKernels& kernels) {
  if (are_narrow(p, kernels)) return DenseFormat::kInt4Narrow;
  return are_split(p, kernels) ? DenseFormat::kFloat32Split : p.format;
}

// Of a range [low, high], which is widened to 0: that is one of the integers.
DenseQuantizer quantizer_of(const float* range) {
  ScopedFlushDenormals flush;
  if (!std::isfinite(range[0]) || !std::isfinite(range[1])) {
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    return {.scale = kNaN, .inverse = kNaN};
  }
  const float low = std::min(range[0], 0.0f), high = std::max(range[1], 0.0f);
  DenseQuantizer q = {.scale = std::max(high / 254 - low / 254, kLeastScale)};
  q.inverse = 1 / q.scale;
  q.zero = static_cast<std::int32_t>(std::nearbyint(-low * q.inverse)) - 127;
  return q;
}

class DenseCall {
 public:
  DenseCall(const DenseProblem& problem, const DenseKernels& kernels)
      : p_(problem), kernels_(kernels), format_(kernels.of(choose_format(problem, kernels))) {
    depth_ = p_.weights[0].panels.depth;
    padded_size_ = depth_ * elements_of_word(p_.format);
    row_words_ = factors_of(depth_);
    quantized_ = p_.format == DenseFormat::kInt8Quantized || p_.format == DenseFormat::kInt4Quantized;
    groups_ = p_.group_size ? p_.size / p_.group_size : 1;
    // A weight without columns has none.
    has_offsets_ = std::ranges::any_of(
        p_.weights, [](const DenseWeight& weight) { return weight.panels.offsets != nullptr; });
    if (p_.range) range_ = quantizer_of(p_.range);
    if (p_.out_range) out_range_ = quantizer_of(p_.out_range);
  }

  const char* run(ParallelFor parallel) {
    const Tiling whole = cut_rows(format_, p_.rows);
    const size_t block = block_rows(whole);
    const size_t part_rows = std::max<size_t>(1, kRowBytes / (row_words_ * block * sizeof(PackedWord))) * block;
    for (size_t first = 0; first < p_.rows; first += part_rows) {
      if (!run_part(first, std::min(part_rows, p_.rows - first), parallel)) return "not enough memory";
    }
    return nullptr;
  }

 private:
  // How many words of a row, or factors of a column, meet so many words of a column; and the other way round.
  size_t factors_of(size_t words) const {
    return ceil_div(words * elements_of_word(p_.format), format_.row_elements) * format_.encoded_words;
  }
  size_t words_of(size_t factors) const {
    return factors / format_.encoded_words * format_.row_elements / elements_of_word(p_.format);
  }

  // Of the rows that a part begins with.
  struct Part {
    size_t first, rows;
    Tiling tiling;
    PackedWord* words = nullptr;
    size_t tile_words = 0;       // between tiles
    PackedWord* sums = nullptr;  // [tiles][groups][rows of the shape], or null
    float* scales = nullptr;     // of all rows, and of those that the last tile lacks; and so the next
    std::int32_t* zeros = nullptr;

    // Those that exist, of tiles one after the other.
    size_t rows_of(size_t first_tile, size_t count) const {
      const size_t end = first_tile + count < tiling.tiles ? tiling.first_row(first_tile + count) : rows;
      return end - tiling.first_row(first_tile);
    }
  };

  bool run_part(size_t first, size_t rows, ParallelFor parallel) {
    Part part = {.first = first, .rows = rows, .tiling = cut_rows(format_, rows)};
    const Tiling& t = part.tiling;
    const size_t words = t.lines ? round_up(row_words_, kLineWords) : row_words_;
    part.tile_words = round_up(words * t.rows + kSlack, kCacheLine / sizeof(PackedWord));
    const auto carve = [&](Carver carver) {
      part.words = carver.take<PackedWord>(part.tile_words * t.tiles);
      // Lines multiply signed bytes, so that nothing is to be taken off.
      const bool sums = has_offsets_ || (quantized_ && !t.lines);
      part.sums = sums ? carver.take<PackedWord>(t.tiles * groups_ * t.rows) : nullptr;
      part.scales = carver.take<float>(t.tiles * t.rows);
      part.zeros = carver.take<std::int32_t>(t.tiles * t.rows);
      return carver.used();
    };
    char* const memory = workspace(carve(Carver(nullptr)));
    if (!memory) return false;
    carve(Carver(memory));

    const size_t tiles_at_once = std::max<size_t>(1, kChunkElements / (p_.size * t.rows + 1));
    parallel(ceil_div(t.tiles, tiles_at_once), [&](size_t task) {
      for (size_t tile = task * tiles_at_once; tile < std::min(t.tiles, (task + 1) * tiles_at_once); ++tile) {
        encode(part, tile);
      }
    });
    if (failed_) return false;

    const size_t block_tiles = block_rows(t) / t.rows;
    const size_t blocks = ceil_div(t.tiles, block_tiles);
    const size_t rows_of_block = std::min(block_tiles, t.tiles) * t.rows;
    size_t all_panels = 0;
    for (const DenseWeight& weight : p_.weights) all_panels += ceil_div(weight.columns, kPanelColumns);
    const size_t of_step = rows_of_block * padded_size_ * t.panels * kPanelColumns * (p_.gate ? 2 : 1);
    // The words of a block's rows that stay in the cache serve all columns of a task.
    const bool wait = block_step(t) < depth_;
    const size_t most_work = wait ? std::max(kMostWork, kStepsAtOnce * of_step) : kMostWork;
    const size_t work = std::clamp(rows * p_.size * all_panels * kPanelColumns / 32, kLeastWork, most_work);
    const size_t steps_of_many = blocks * ceil_div(all_panels, t.panels) / kFewTasks;
    const size_t least_steps = wait ? std::clamp<size_t>(steps_of_many, 1, kLeastSteps) : 1;
    const size_t steps_at_once = std::max(least_steps, work / of_step);
    // The columns of one weight after the other.
    std::vector<Columns> tasks;
    for (const DenseWeight& weight : p_.weights) {
      const size_t panels = ceil_div(weight.columns, kPanelColumns);
      for (size_t from = 0; from < panels; from += steps_at_once * t.panels) {
        tasks.push_back({&weight, from, std::min(panels, from + steps_at_once * t.panels)});
      }
    }
    parallel(blocks * tasks.size(), [&](size_t task) {
      const size_t block = task / tasks.size();
      multiply(part, block * block_tiles, std::min(t.tiles, (block + 1) * block_tiles),
               tasks[task % tasks.size()]);
    });
    return !failed_ && multiply_infinite(part, parallel);
  }

  // Rows with infinities lose them when they are split: so few at a time that they are not.
  bool multiply_infinite(const Part& part, ParallelFor parallel) const {
    if (&format_ != &kernels_.of(DenseFormat::kFloat32Split)) return true;
    std::vector<size_t> rows;
    for (size_t row = 0; row < part.rows; ++row) {
      if (std::isinf(part.scales[row])) rows.push_back(part.first + row);
    }
    for (size_t i = 0, count; i < rows.size(); i += count) {
      count = 1;
      while (i + count < rows.size() && rows[i + count] == rows[i] + count && count < format_.shapes[0].rows) {
        ++count;
      }
      DenseProblem few = p_;
      few.rows = count;
      few.x = static_cast<const char*>(p_.x) + rows[i] * p_.size * element_size(p_.dtype);
      for (DenseWeight& weight : few.weights) {
        const size_t bytes = rows[i] * weight.columns * element_size(p_.out_dtype);
        weight.out = static_cast<char*>(weight.out) + bytes;
        if (p_.residual) few.residual = static_cast<const char*>(p_.residual) + bytes;
      }
      if (DenseCall(few, kernels_).run(parallel)) return false;
    }
    return true;
  }

  void encode(const Part& part, size_t tile) {
    const Tiling& t = part.tiling;
    const size_t count = part.rows_of(tile, 1), row_in_part = t.first_row(tile),
                 first = part.first + row_in_part;
    const size_t bytes = p_.size * element_size(p_.dtype);
    const char* const x = static_cast<const char*>(p_.x) + first * bytes;
    DenseRows rows = {.x = x,
                      .count = count,
                      .tile_rows = t.rows_of(tile),
                      .size = p_.size,
                      .padded_size = padded_size_,
                      .group_size = p_.group_size ? p_.group_size : padded_size_,
                      .range = p_.range ? &range_ : nullptr,
                      .zero_point = p_.format == DenseFormat::kInt8Quantized && !p_.group_size,
                      .lines = t.lines,
                      .out = part.words + tile * part.tile_words,
                      .scales = part.scales + row_in_part,
                      .zeros = part.zeros + row_in_part,
                      .sums = part.sums ? part.sums + tile * groups_ * t.rows : nullptr};
    if (!p_.norm && !p_.permutation) return format_.encode[static_cast<int>(p_.dtype)](rows);
    char* const memory = workspace((count + 1) * p_.size * sizeof(float), WorkspaceOf::kTask);
    if (!memory) {
      failed_ = true;
      return;
    }
    float* const values = reinterpret_cast<float*>(memory);
    float* const row = values + count * p_.size;
    for (size_t r = 0; r < count; ++r) {
      float* const to = values + r * p_.size;
      kernels_.normalize[static_cast<int>(p_.dtype)](x + r * bytes, p_.size, p_.norm,
                                                     p_.permutation ? row : to);
      if (!p_.permutation) continue;
      for (size_t k = 0; k < p_.size; ++k) {
        // An index that does not exist takes the nearest, as in jax.numpy.take: nothing outside is read.
        const auto from =
            std::clamp<std::int64_t>(p_.permutation[k], 0, static_cast<std::int64_t>(p_.size) - 1);
        to[k] = row[from];
      }
    }
    rows.x = values;
    format_.encode[static_cast<int>(DType::kFloat32)](rows);
  }

  // Panels [from, to) of a weight.
  struct Columns {
    const DenseWeight* weight;
    size_t from, to;
  };

  void multiply(const Part& part, size_t first_tile, size_t last_tile, const Columns& columns) {
    const Tiling& t = part.tiling;
    const size_t columns_of_tile = t.panels * kPanelColumns, first_row = t.first_row(first_tile);
    const size_t size = (last_tile - first_tile) * t.rows * columns_of_tile;
    const size_t step = block_step(t);
    // Sums of all columns if they wait for the next words.
    const bool wait = step < depth_;
    const size_t kept = size * (wait ? ceil_div(columns.to - columns.from, t.panels) : 1);
    float *values = nullptr, *gates = nullptr;
    PackedWord* factors = nullptr;
    const auto carve = [&](Carver carver) {
      values = carver.take<float>(kept);
      if (p_.gate) gates = carver.take<float>(kept);
      if (t.expanded) factors = carver.take<PackedWord>(columns_of_tile * factors_of(panel_step(t)));
      return carver.used();
    };
    char* const memory = workspace(carve(Carver(nullptr)), WorkspaceOf::kTask);
    if (!memory) {
      failed_ = true;
      return;
    }
    carve(Carver(memory));
    if (t.lines) {
      kernels_.begin_lines(words_at_once(sums_groups(t) ? p_.group_size / format_.row_elements : 0));
    }
    for (size_t k = 0; k < depth_; k += step) {
      const size_t last = std::min(depth_, k + step);
      for (size_t panel = columns.from; panel < columns.to; panel += t.panels) {
        const Panels panels = {columns.weight, panel, std::min(t.panels, columns.to - panel)};
        const size_t kept_at = wait ? (panel - columns.from) / t.panels * size : 0;
        float* const sums = values + kept_at;
        float* const gate_sums = gates ? gates + kept_at : nullptr;
        if (gates) {
          product(part, first_tile, last_tile, p_.gate->panels, panels, k, last, factors, gate_sums,
                  [](size_t, size_t) {});
        }
        product(part, first_tile, last_tile, columns.weight->panels, panels, k, last, factors, sums,
                [&](size_t tile, size_t count) {
                  if (last < depth_) return;
                  const size_t row = t.first_row(tile), at = (row - first_row) * columns_of_tile;
                  finish(part, row, part.rows_of(tile, count), panels, sums + at,
                         gates ? gate_sums + at : nullptr);
                });
      }
    }
    if (t.lines) kernels_.end_lines();
  }

  // From a panel on.
  DensePanels panel_of(const DensePanels& weight, size_t panel) const {
    DensePanels b = weight;
    b.words += panel * b.panel_words;
    if (p_.group_size != 0) {
      b.scales += panel * groups_ * kPanelColumns;
      if (b.offsets) b.offsets += panel * groups_ * kPanelColumns;
    }
    return b;
  }

  // Rows of a block: more where many share what is expanded, if the cache has room for the depth they need.
  size_t block_rows(const Tiling& t) const {
    constexpr size_t kMore = 2 * kBlockRows;
    const bool more = t.expanded && t.lines && (!sums_groups(t) || kMore * row_words_ <= kBlockWords);
    return (more ? kMore : kBlockRows) / t.rows * t.rows;
  }
  // Words of all panels of a task that a block of rows is multiplied with before the next words.
  size_t block_step(const Tiling& t) const {
    const size_t rows = std::min(t.tiles * t.rows, block_rows(t));
    return sums_groups(t) || rows * row_words_ <= kBlockWords ? depth_ : words_of(kBlockWords / rows);
  }
  // Words of a panel that all tiles of a block are multiplied with before the next ones.
  size_t panel_step(const Tiling& t) const {
    if (sums_groups(t)) return depth_;
    if (t.lines && t.tiles > 1) return std::min(depth_, words_of(kLinesDepth));
    return t.expanded ? std::min(depth_, words_of(kExpandedDepth)) : depth_;
  }
  // Whether the product has the scales of groups; those of float factors are in what is expanded.
  bool sums_groups(const Tiling& t) const { return p_.group_size != 0 && (quantized_ || !t.expanded); }

  // Panels beside each other: of the columns of a weight, or of its gate.
  struct Panels {
    const DenseWeight* weight;
    size_t first, count;
  };

  // The rows of tiles times the words [first, last) of panels, one after the other in `out`: added to what is
  // there, but for word 0. `factors` has room for the words of all panels that are multiplied at a time, or
  // is null where words are multiplied. finished(tile, count) is called with some at a time.
  template <class Finished>
  void product(const Part& part, size_t first_tile, size_t last_tile, const DensePanels& weight,
               const Panels& panels, size_t first, size_t last, PackedWord* factors, float* out,
               const Finished& finished) const {
    const Tiling& t = part.tiling;
    const auto& kernels = sums_groups(t) ? format_.grouped : format_.product;
    const size_t at_once = std::max<size_t>(1, kRowsAtOnce / t.rows), step = panel_step(t);
    for (size_t k = first; k < last; k += step) {
      DensePanels b = panel_of(weight, panels.first);
      b.depth = std::min(step, last - k);
      if (factors) {
        const size_t words = factors_of(b.depth) * kPanelColumns;
        for (size_t i = 0; i < panels.count; ++i) {
          format_.expand(panel_of(weight, panels.first + i), k, b.depth, factors + i * words);
        }
        b.words = factors;
        b.panel_words = words;
        b.depth = factors_of(b.depth);
        b.group_words = factors_of(b.group_words);
      } else {
        b.words += k * kPanelColumns;
      }
      for (size_t tile = first_tile, count; tile < last_tile; tile += count) {
        const bool low = t.is_low(tile);
        const size_t end = low ? last_tile : std::min(last_tile, t.tiles - t.low_tiles);
        const size_t rows = t.rows_of(tile);
        count = std::min(at_once, end - tile);
        kernels[t.shape - low](
            b, {.count = count,
                .rows = part.words + tile * part.tile_words + factors_of(k) * rows,
                .row_words = part.tile_words,
                .sums = part.sums ? part.sums + tile * groups_ * t.rows : nullptr,
                .sum_words = part.sums ? groups_ * t.rows : 0,
                .panels = panels.count,
                .add = k > 0,
                .tiles = out + (t.first_row(tile) - t.first_row(first_tile)) * t.panels * kPanelColumns});
        if (k + step >= last) finished(tile, count);
      }
    }
  }

  DenseScale scale_of(const Part& part, size_t row, size_t rows, const DenseWeight& weight,
                      const Panels& panels, size_t valid) const {
    const size_t at = panels.first * kPanelColumns;
    return {.rows = rows,
            .columns = part.tiling.panels * kPanelColumns,
            .valid = valid,
            .integers = quantized_ && !p_.group_size,
            .row_scales = quantized_ ? part.scales + row : nullptr,
            .row_zeros = part.zeros + row,
            .column_scales = weight.column_scales ? weight.column_scales + at : nullptr,
            .column_sums = weight.column_sums ? weight.column_sums + at : nullptr,
            .bias = weight.bias ? weight.bias + at : nullptr};
  }

  // What rows from `row` of the part on become of their products.
  void finish(const Part& part, size_t row, size_t rows, const Panels& panels, float* values,
              float* gates) const {
    const DenseWeight& weight = *panels.weight;
    const size_t stride = part.tiling.panels * kPanelColumns, at = panels.first * kPanelColumns;
    const size_t valid = std::min(panels.count * kPanelColumns, weight.columns - at);
    const DenseScale how = scale_of(part, row, rows, weight, panels, valid);
    float* const active = gates ? gates : values;
    if (gates) {
      kernels_.scale(gates, scale_of(part, row, rows, *p_.gate, panels, valid));
    } else if (p_.activation) {
      kernels_.scale(values, how);
    }
    if (p_.activation) p_.activation(active, active, rows * stride, Stores::kCached);
    const size_t bytes = ((part.first + row) * weight.columns + at) * element_size(p_.out_dtype);
    const char* const residual = static_cast<const char*>(p_.residual);
    kernels_.store[static_cast<int>(p_.out_dtype)](values, gates || !p_.activation ? &how : nullptr,
                                                   {.rows = rows,
                                                    .columns = valid,
                                                    .tile_stride = stride,
                                                    .gate = gates,
                                                    .residual = residual ? residual + bytes : nullptr,
                                                    .out = static_cast<char*>(weight.out) + bytes,
                                                    .out_stride = weight.columns,
                                                    .range = &out_range_});
  }

  const DenseProblem& p_;
  const DenseKernels& kernels_;
  const DenseKernels::Format& format_;
  size_t depth_, padded_size_, groups_;
  size_t row_words_;  // of an encoded row
  bool quantized_, has_offsets_;
  DenseQuantizer range_, out_range_;  // if the problem has them
  std::atomic<bool> failed_ = false;
};

}  // namespace

const char* run_dense(const DenseProblem& p, const DenseKernels& kernels, ParallelFor parallel) {
  const DenseKernels::Format& format = kernels.of(p.format);
  if (!format.encode[static_cast<int>(p.dtype)] || !format.product[0]) return kNoKernel;
  size_t columns = 0;
  for (const DenseWeight& weight : p.weights) columns += weight.columns;
  if (p.rows == 0 || p.size == 0 || columns == 0) return nullptr;
  DenseCall call(p, kernels);
  if (p.rows * p.size * columns <= kLeastWork) return call.run(in_order);
  return call.run(parallel);
}

}  // namespace quake
