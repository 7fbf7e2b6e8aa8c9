// The kernels of dense layers: their slice of an instruction set's table.

#ifndef QUAKE_DENSE_KERNELS_H_
#define QUAKE_DENSE_KERNELS_H_

#include "core/norm.h"
#include "core/packed.h"
#include "core/types.h"

namespace quake {

// What the words of a packed weight hold, and what they are multiplied with.
enum class DenseFormat : int {
  kFloat32,        // a float
  kBFloat16,       // two bfloat16; x is rounded to bfloat16
  kInt8,           // four int8; x stays float32
  kInt8Quantized,  // four int8; the rows of x are quantised to int8
  kInt4,           // eight codes of four bits, indices of a table of floats; x stays float32
  kInt4Quantized,  // the same of a table of int8; the rows of x are quantised
  kCount
};
inline constexpr int kDenseFormats = static_cast<int>(DenseFormat::kCount);

// How many neighbours of a column a word has.
constexpr std::size_t elements_of_word(DenseFormat format) {
  if (format == DenseFormat::kFloat32) return 1;
  if (format == DenseFormat::kBFloat16) return 2;
  return format == DenseFormat::kInt8 || format == DenseFormat::kInt8Quantized ? 4 : 8;
}

// A weight of depth x columns, as words in panels of kPanelColumns columns: [words][kPanelColumns]. It is the
// same on all instruction sets.
inline constexpr std::size_t kPanelColumns = 16;

struct DensePanels {
  const PackedWord* words;
  std::size_t panel_words;  // between panels
  std::size_t depth;        // words of a column
  // With groups: words of a column in a group, 0 without; a float16 scale, and if there are offsets a float16
  // offset, for each group and column: [groups][kPanelColumns] in each panel.
  std::size_t group_words;
  const std::uint16_t* scales;
  const std::uint16_t* offsets;
  const void* table;  // of 4-bit codes: 16 floats, or 16 int8

  std::size_t groups() const { return group_words == 0 ? 1 : depth / group_words; }
};

// Encodes `count` rows of x into a tile of `tile_rows` rows: [depth words of x][tile_rows], the others 0. The
// words of x are what the format's product multiplies with one factor of a word of the weight.
struct DenseRows {
  const void* x;  // rows of `size` elements, one after the other
  std::size_t count, tile_rows, size;
  std::size_t padded_size;  // the elements that the words of the weight have room for
  std::size_t group_size;   // of the sums; padded_size without groups
  bool zero_point;          // quantise with one, or symmetrically
  PackedWord* out;          // writes up to a vector past the tile's end
  float* scales;            // [tile_rows], of quantised rows; NaN if the row has one, or an infinity
  std::int32_t* zeros;      // [tile_rows], their zero points
  PackedWord* sums;         // [groups][tile_rows], of the quantised values (int32) or of x (float32)
};

// tile = rows · panels, for `panels` neighbouring panels of which at least one exists:
// [tile_rows][panels * 16] of int32 for quantised rows of a weight without groups, else float32. Those that do
// not exist are computed from the last one.
struct DenseTile {
  const PackedWord* rows;
  const PackedWord* sums;
  std::size_t panels;  // that exist, up to the kernel's
  bool add;            // to what is in the tile
  float* tile;
};

// What becomes of a tile before its activation.
struct DenseScale {
  std::size_t rows, columns;  // columns is also the distance between rows
  std::size_t valid;          // the columns that exist
  bool integers;              // the tile is int32
  const float* row_scales;    // or null
  const std::int32_t* row_zeros;
  const float* column_scales;       // or null; whole panels, as the next
  const std::int32_t* column_sums;  // with integers
  const float* bias;                // or null; `valid` of them
};

struct DenseKernels {
  static constexpr int kMaxShapes = 6;
  // Register tiles, rising: rows, and panels beside each other.
  struct Shape {
    std::size_t rows, panels;
  };
  using EncodeFn = void (*)(const DenseRows& rows);
  using ProductFn = void (*)(const DensePanels& b, const DenseTile& tile);

  Shape shapes[kMaxShapes];
  int shape_count;
  // Elements of x in a word of the encoded rows, by format.
  std::size_t row_word[kDenseFormats];
  EncodeFn encode[kDenseFormats][kDTypes];
  // A row as float32; `norm` may be null.
  void (*normalize[kDTypes])(const void* x, std::size_t size, const Norm* norm, float* out);
  ProductFn product[kDenseFormats][kMaxShapes];
  ProductFn grouped[kDenseFormats][kMaxShapes];
  void (*scale)(float* tile, const DenseScale& how);
  // out = (gate *) tile (+ residual), `columns` of each of the rows; gate and residual may be null.
  void (*store[kDTypes])(const float* tile, const float* gate, std::size_t tile_stride, std::size_t rows,
                         std::size_t columns, const void* residual, void* out, std::size_t out_stride);
};

}  // namespace quake

#endif  // QUAKE_DENSE_KERNELS_H_
