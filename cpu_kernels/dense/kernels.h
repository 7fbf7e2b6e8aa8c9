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
  kInt4Narrow,     // the same if the table's values differ by at most 15: the driver's choice for few rows
  kFloat32Split,   // kFloat32 as three bfloat16: the driver's choice for many rows
  kCount
};
inline constexpr int kDenseFormats = static_cast<int>(DenseFormat::kCount);
// Those that a problem may have.
inline constexpr int kDenseProblemFormats = static_cast<int>(DenseFormat::kInt4Narrow);

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

// How values become the integers from `lowest` to 127: v is about scale * (q - zero). A scale of NaN has none.
struct DenseQuantizer {
  float scale = 0, inverse = 0;
  std::int32_t zero = 0, lowest = -127;
};
// The least scale, whose inverse float32 has.
constexpr float kLeastScale = 0x1p-118f;
// Among codes of a range: what was NaN or infinite.
constexpr std::int8_t kNoCode = -128;

// Encodes `count` rows of x into a tile of `tile_rows` rows: [depth words of x][tile_rows], the others 0. The
// words of x are what the format's product multiplies with one factor of a word of the weight. With `lines`
// kLineWords of a row stay together: [depth / kLineWords, rounded up][tile_rows][kLineWords].
inline constexpr std::size_t kLineWords = 16;
// How many of a line are multiplied at once, in groups of so many words or without (0).
constexpr std::size_t words_at_once(std::size_t group_words) {
  return group_words % kLineWords == 0 ? kLineWords : kLineWords / 2;
}

struct DenseRows {
  const void* x;  // rows of `size` elements, one after the other; int8 are codes of `range`
  std::size_t count, tile_rows, size;
  std::size_t padded_size;      // the elements that the words of the weight have room for
  std::size_t group_size;       // of the sums; padded_size without groups
  const DenseQuantizer* range;  // of all rows, or null: each by its own
  bool zero_point;              // then with one, or symmetrically
  bool lines;
  PackedWord* out;  // writes up to a vector past the tile's end
  // [tile_rows]. Of quantised rows; NaN if the row has one, or an infinity, or kNoCode. Of split rows:
  // infinite if the row has an infinity, or what rounds to one.
  float* scales;
  std::int32_t* zeros;  // [tile_rows], their zero points
  PackedWord* sums;     // [groups][tile_rows], of the quantised values (int32) or of x (float32), or null
};

// Tiles of rows · panels, for `panels` neighbouring panels of which at least one exists, one after the other:
// [tile_rows][panels * 16] of int32 for quantised rows of a weight without groups, else float32. Panels that do
// not exist are computed from the last one.
struct DenseTiles {
  std::size_t count;
  const PackedWord* rows;
  std::size_t row_words;   // between tiles
  const PackedWord* sums;  // or null
  std::size_t sum_words;   // likewise
  std::size_t panels;      // that exist, up to the kernel's
  bool add;                // to what is in the tiles
  float* tiles;
};

// What a tile is scaled by, and its bias.
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

// Where a tile goes: `columns` of each of its rows.
struct DenseStore {
  std::size_t rows, columns;
  std::size_t tile_stride;
  const float* gate;     // a tile, or null
  const void* residual;  // or null; strides as those of `out`
  void* out;
  std::size_t out_stride;
  const DenseQuantizer* range;  // of int8, which have no residual
};

struct DenseKernels {
  static constexpr int kMaxShapes = 8;
  // Register tiles, rising: rows, and panels beside each other. Panels of words that hold several factors are
  // expanded before they are multiplied with a tall tile, once for all tiles of a block of rows.
  struct Shape {
    std::size_t rows, panels;
    bool expanded = false;
    bool lines = false;  // of the encoded rows, see DenseRows
  };
  using EncodeFn = void (*)(const DenseRows& rows);
  using ExpandFn = void (*)(const DensePanels& b, std::size_t first, std::size_t count, PackedWord* out);
  using ProductFn = void (*)(const DensePanels& b, const DenseTiles& tiles);

  struct Format {
    Shape shapes[kMaxShapes];
    int shape_count;
    std::size_t row_elements, encoded_words;  // of x, and how many words they become
    EncodeFn encode[kDTypes];
    // The factors in `count` words of a panel from the first one on, in the order of the words of x, times the
    // scales of their groups and with the offsets if the rows are floats. Null where words are multiplied as
    // they are.
    ExpandFn expand;
    // Of the words of the weight, or for shapes that are expanded of its factors, 32 bits each.
    ProductFn product[kMaxShapes];
    ProductFn grouped[kMaxShapes];
  };

  Format formats[kDenseFormats];
  // Around the products of a task whose rows are lines: `words` of a column are multiplied at once.
  void (*begin_lines)(std::size_t words);
  void (*end_lines)();
  // A row as float32; `norm` may be null.
  void (*normalize[kDTypes])(const void* x, std::size_t size, const Norm* norm, float* out);
  void (*scale)(float* tile, const DenseScale& how);
  // out = (gate *) tile (+ residual), with the tile scaled first if `how` is not null.
  void (*store[kDTypes])(const float* tile, const DenseScale* how, const DenseStore& to);

  Format& of(DenseFormat format) { return formats[static_cast<int>(format)]; }
  const Format& of(DenseFormat format) const { return formats[static_cast<int>(format)]; }
};

}  // namespace quake

#endif  // QUAKE_DENSE_KERNELS_H_
