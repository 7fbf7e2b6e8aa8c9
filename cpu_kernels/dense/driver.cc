#include "dense/driver.h"

#include <algorithm>
#include <atomic>

#include "core/memory.h"

namespace quake {
namespace {

using std::size_t;

// Encoded rows are kept in memory of about this size, and what is longer is done in parts.
constexpr size_t kRowBytes = size_t{4} << 20;
// Rows of a task: their words stay in the second-level cache while the panels pass by.
constexpr size_t kBlockRows = 192;
// Words of a panel that a block of rows is multiplied with before the next ones, for the same reason.
constexpr size_t kDepth = 4096;
// A task is at least and about so many products.
constexpr size_t kLeastWork = size_t{1} << 19, kMostWork = size_t{1} << 24;
// Turning rows writes up to a vector past a tile.
constexpr size_t kSlack = 16;

// How a part of the rows is cut into tiles, all of one shape.
struct Tiling {
  int shape;
  size_t rows, panels;  // of the shape
  size_t tile_rows;     // that are used
  size_t tiles;
};

Tiling cut_rows(const DenseKernels& kernels, size_t rows) {
  const size_t tiles = ceil_div(rows, kernels.shapes[kernels.shape_count - 1].rows);
  const size_t used = ceil_div(rows, tiles);
  int shape = 0;
  while (kernels.shapes[shape].rows < used) ++shape;
  return {shape, kernels.shapes[shape].rows, kernels.shapes[shape].panels, used, ceil_div(rows, used)};
}

class DenseCall {
 public:
  DenseCall(const DenseProblem& problem, const DenseKernels& kernels)
      : p_(problem), kernels_(kernels), format_(static_cast<int>(problem.format)) {
    depth_ = p_.weights[0].panels.depth;
    padded_size_ = depth_ * elements_of_word(p_.format);
    row_words_ = padded_size_ / kernels_.row_word[format_];
    quantized_ = p_.format == DenseFormat::kInt8Quantized || p_.format == DenseFormat::kInt4Quantized;
    groups_ = p_.group_size ? p_.size / p_.group_size : 1;
    // A weight without columns has no offsets.
    has_sums_ = quantized_ || std::ranges::any_of(p_.weights, [](const DenseWeight& weight) {
                  return weight.panels.offsets != nullptr;
                });
  }

  const char* run(ParallelFor parallel) {
    const Tiling whole = cut_rows(kernels_, p_.rows);
    const size_t part_tiles =
        std::max<size_t>(kBlockRows / whole.rows, kRowBytes / (row_words_ * whole.rows * sizeof(PackedWord)));
    const size_t part_rows = part_tiles * whole.tile_rows;
    for (size_t first = 0; first < p_.rows; first += part_rows) {
      if (!run_part(first, std::min(part_rows, p_.rows - first), parallel)) return "not enough memory";
    }
    return nullptr;
  }

 private:
  // Of the rows that a part begins with.
  struct Part {
    size_t first, rows;
    Tiling tiling;
    PackedWord* words = nullptr;
    size_t tile_words = 0;       // between tiles
    PackedWord* sums = nullptr;  // [tiles][groups][rows of the shape]
    float* scales = nullptr;     // [tiles][rows of the shape], and so the next
    std::int32_t* zeros = nullptr;

    size_t rows_of(size_t tile) const { return std::min(tiling.tile_rows, rows - tile * tiling.tile_rows); }
  };

  bool run_part(size_t first, size_t rows, ParallelFor parallel) {
    Part part = {.first = first, .rows = rows, .tiling = cut_rows(kernels_, rows)};
    const Tiling& t = part.tiling;
    part.tile_words = round_up(row_words_ * t.rows + kSlack, kCacheLine / sizeof(PackedWord));
    const auto carve = [&](Carver carver) {
      part.words = carver.take<PackedWord>(part.tile_words * t.tiles);
      part.sums = has_sums_ ? carver.take<PackedWord>(t.tiles * groups_ * t.rows) : nullptr;
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

    const size_t block_tiles = std::max<size_t>(1, kBlockRows / t.rows);
    const size_t blocks = ceil_div(t.tiles, block_tiles);
    const size_t rows_of_block = std::min(block_tiles, t.tiles) * t.rows;
    size_t all_panels = 0;
    for (const DenseWeight& weight : p_.weights) all_panels += ceil_div(weight.columns, kPanelColumns);
    const size_t work = std::clamp(rows * p_.size * all_panels * kPanelColumns / 32, kLeastWork, kMostWork);
    const size_t of_step = rows_of_block * padded_size_ * t.panels * kPanelColumns * (p_.gate ? 2 : 1);
    const size_t steps_at_once = std::max<size_t>(1, work / of_step);
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
    return !failed_;
  }

  void encode(const Part& part, size_t tile) {
    const size_t count = part.rows_of(tile), first = part.first + tile * part.tiling.tile_rows;
    const size_t bytes = p_.size * element_size(p_.dtype);
    const char* const x = static_cast<const char*>(p_.x) + first * bytes;
    DenseRows rows = {.x = x,
                      .count = count,
                      .tile_rows = part.tiling.rows,
                      .size = p_.size,
                      .padded_size = padded_size_,
                      .group_size = p_.group_size ? p_.group_size : padded_size_,
                      .zero_point = p_.format == DenseFormat::kInt8Quantized && !p_.group_size,
                      .out = part.words + tile * part.tile_words,
                      .scales = part.scales + tile * part.tiling.rows,
                      .zeros = part.zeros + tile * part.tiling.rows,
                      .sums = has_sums_ ? part.sums + tile * groups_ * part.tiling.rows : nullptr};
    if (!p_.norm && !p_.permutation) return kernels_.encode[format_][static_cast<int>(p_.dtype)](rows);
    const Bytes memory = allocate((count + 1) * p_.size * sizeof(float));
    if (!memory) {
      failed_ = true;
      return;
    }
    float* const values = reinterpret_cast<float*>(memory.get());
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
    kernels_.encode[format_][static_cast<int>(DType::kFloat32)](rows);
  }

  // Panels [from, to) of a weight.
  struct Columns {
    const DenseWeight* weight;
    size_t from, to;
  };

  void multiply(const Part& part, size_t first_tile, size_t last_tile, const Columns& columns) {
    const Tiling& t = part.tiling;
    const size_t tile_size = t.rows * t.panels * kPanelColumns, tiles = last_tile - first_tile;
    const Bytes memory = allocate(tiles * tile_size * sizeof(float) * (p_.gate ? 2 : 1));
    if (!memory) {
      failed_ = true;
      return;
    }
    float* const values = reinterpret_cast<float*>(memory.get());
    float* const gates = p_.gate ? values + tiles * tile_size : nullptr;
    for (size_t panel = columns.from; panel < columns.to; panel += t.panels) {
      const size_t panels = std::min(t.panels, columns.to - panel);
      product(part, first_tile, last_tile, columns.weight->panels, panel, panels, values);
      if (gates) product(part, first_tile, last_tile, p_.gate->panels, panel, panels, gates);
      for (size_t tile = first_tile; tile < last_tile; ++tile) {
        finish(part, tile, *columns.weight, panel, panels, values + (tile - first_tile) * tile_size,
               gates ? gates + (tile - first_tile) * tile_size : nullptr);
      }
    }
  }

  void product(const Part& part, size_t first_tile, size_t last_tile, const DensePanels& weight, size_t panel,
               size_t panels, float* out) const {
    const Tiling& t = part.tiling;
    DensePanels b = weight;
    b.words += panel * b.panel_words;
    const bool grouped = p_.group_size != 0;
    if (grouped) {
      b.scales += panel * groups_ * kPanelColumns;
      if (b.offsets) b.offsets += panel * groups_ * kPanelColumns;
    }
    const auto kernel = grouped ? kernels_.grouped[format_][t.shape] : kernels_.product[format_][t.shape];
    const size_t step = grouped || t.tiles == 1 ? depth_ : kDepth;
    for (size_t k = 0; k == 0 || k < depth_; k += step) {
      b.depth = std::min(step, depth_ - k);
      for (size_t tile = first_tile; tile < last_tile; ++tile) {
        kernel(b, {.rows = part.words + tile * part.tile_words +
                           k * (row_words_ / std::max<size_t>(depth_, 1)) * t.rows,
                   .sums = has_sums_ ? part.sums + tile * groups_ * t.rows : nullptr,
                   .panels = panels,
                   .add = k > 0,
                   .tile = out + (tile - first_tile) * t.rows * t.panels * kPanelColumns});
      }
      b.words += step * kPanelColumns;
    }
  }

  void scale(const Part& part, size_t tile, const DenseWeight& weight, size_t panel, size_t valid,
             float* values) const {
    const size_t at = panel * kPanelColumns;
    const bool grouped = p_.group_size != 0;
    kernels_.scale(values, {.rows = part.rows_of(tile),
                            .columns = part.tiling.panels * kPanelColumns,
                            .valid = valid,
                            .integers = quantized_ && !grouped,
                            .row_scales = quantized_ ? part.scales + tile * part.tiling.rows : nullptr,
                            .row_zeros = part.zeros + tile * part.tiling.rows,
                            .column_scales = weight.column_scales ? weight.column_scales + at : nullptr,
                            .column_sums = weight.column_sums ? weight.column_sums + at : nullptr,
                            .bias = weight.bias ? weight.bias + at : nullptr});
  }

  void finish(const Part& part, size_t tile, const DenseWeight& weight, size_t panel, size_t panels,
              float* values, float* gates) const {
    const size_t stride = part.tiling.panels * kPanelColumns, rows = part.rows_of(tile);
    const size_t at = panel * kPanelColumns;
    const size_t valid = std::min(panels * kPanelColumns, weight.columns - at);
    scale(part, tile, weight, panel, valid, values);
    if (gates) scale(part, tile, *p_.gate, panel, valid, gates);
    if (p_.activation) {
      float* const active = gates ? gates : values;
      p_.activation(active, active, rows * stride, Stores::kCached);
    }
    const size_t offset = (part.first + tile * part.tiling.tile_rows) * weight.columns + at;
    const size_t bytes = offset * element_size(p_.out_dtype);
    const char* const residual = static_cast<const char*>(p_.residual);
    kernels_.store[static_cast<int>(p_.out_dtype)](values, gates, stride, rows, valid,
                                                   residual ? residual + bytes : nullptr,
                                                   static_cast<char*>(weight.out) + bytes, weight.columns);
  }

  const DenseProblem& p_;
  const DenseKernels& kernels_;
  const int format_;
  size_t depth_, padded_size_, row_words_, groups_;
  bool quantized_, has_sums_;
  std::atomic<bool> failed_ = false;
};

}  // namespace

const char* run_dense(const DenseProblem& p, const DenseKernels& kernels, ParallelFor parallel) {
  const int format = static_cast<int>(p.format);
  if (kernels.shape_count == 0 || !kernels.encode[format][static_cast<int>(p.dtype)] ||
      !kernels.product[format][0]) {
    return kNoKernel;
  }
  size_t columns = 0;
  for (const DenseWeight& weight : p.weights) columns += weight.columns;
  if (p.rows == 0 || p.size == 0 || columns == 0) return nullptr;
  DenseCall call(p, kernels);
  if (p.rows * p.size * columns <= kLeastWork) return call.run(in_order);
  return call.run(parallel);
}

}  // namespace quake
