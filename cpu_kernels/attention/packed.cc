#include "attention/packed.h"

#include <algorithm>

namespace quake {
namespace {

// Packing writes the words that have elements. The product multiplies others that belong to the same.
void clear_last_words(const PackedMatrix& matrix) {
  const PackedLayout& layout = matrix.layout;
  const std::size_t first = matrix.depth / layout.elements * layout.words_of_elements;
  const std::size_t last = layout.words(matrix.depth);
  if (first == last || layout.elements == 1) return;
  for (std::size_t column = 0; column < matrix.columns; column += layout.panel) {
    PackedWord* const panel = matrix.words + column / layout.panel * matrix.panel_words();
    std::fill(panel + first * layout.panel, panel + last * layout.panel, PackedWord{});
  }
}

}  // namespace

bool pack_keys(const AttentionKernels::Format& format, DType dtype, const void* keys, std::ptrdiff_t stride,
               std::size_t count, std::size_t head_size, PackedWord* memory, PackedMatrix& packed) {
  packed = {memory, head_size, count, head_size, format.layout};
  clear_last_words(packed);
  return format.pack_keys[static_cast<int>(dtype)](keys, stride, count, head_size,
                                                   format.layout.words(head_size), memory);
}

bool pack_values(const AttentionKernels::Format& format, DType dtype, const void* values, std::ptrdiff_t stride,
                 std::size_t count, std::size_t value_size, std::size_t capacity, PackedWord* memory,
                 PackedMatrix& packed) {
  packed = {memory, count, value_size, capacity, format.layout};
  clear_last_words(packed);
  return format.pack_values[static_cast<int>(dtype)](values, stride, count, value_size,
                                                     format.layout.words(capacity), memory);
}

}  // namespace quake
