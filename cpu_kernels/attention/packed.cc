#include "attention/packed.h"

#include <algorithm>

namespace quake {
namespace {

// Words that the product multiplies without there being elements for them.
PackedMatrix padded(const PackedMatrix& matrix) {
  const PackedLayout& layout = matrix.layout;
  const std::size_t first = ceil_div(matrix.depth, layout.per_word), last = layout.words(matrix.depth);
  if (first == last) return matrix;
  for (std::size_t column = 0; column < matrix.columns; column += layout.panel) {
    PackedWord* const panel = matrix.words + column / layout.panel * matrix.panel_words();
    std::fill(panel + first * layout.panel, panel + last * layout.panel, PackedWord{});
  }
  return matrix;
}

}  // namespace

PackedMatrix pack_keys(const AttentionKernels::Format& format, DType dtype, const void* keys,
                       std::ptrdiff_t stride, std::size_t count, std::size_t head_size, PackedWord* memory) {
  const PackedLayout& layout = format.layout;
  format.pack_keys[static_cast<int>(dtype)](keys, stride, count, head_size, layout.words(head_size), memory);
  return padded({memory, head_size, count, head_size, layout});
}

PackedMatrix pack_values(const AttentionKernels::Format& format, DType dtype, const void* values,
                         std::ptrdiff_t stride, std::size_t count, std::size_t value_size, std::size_t capacity,
                         PackedWord* memory) {
  const PackedLayout& layout = format.layout;
  format.pack_values[static_cast<int>(dtype)](values, stride, count, value_size, layout.words(capacity),
                                              memory);
  return padded({memory, count, value_size, capacity, layout});
}

}  // namespace quake
