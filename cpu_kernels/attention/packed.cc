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

bool pack_keys(const AttentionKernels::Format& format, const RowsToPack& keys, std::size_t count,
               std::size_t head_size, const float* centre, const PackedMemory& memory, PackedMatrix& packed) {
  packed = {memory.words, head_size, count, head_size, format.layout, memory.scales};
  clear_last_words(packed);
  return format.pack_keys[static_cast<int>(keys.dtype)](keys.data, keys.stride, count, head_size,
                                                        format.layout.words(head_size), centre, memory.scales,
                                                        memory.words);
}

bool pack_values(const AttentionKernels::Format& format, const RowsToPack& values, std::size_t count,
                 std::size_t value_size, std::size_t capacity, const PackedMemory& memory,
                 PackedMatrix& packed) {
  packed = {memory.words, count, value_size, capacity, format.layout, memory.scales};
  clear_last_words(packed);
  return format.pack_values[static_cast<int>(values.dtype)](values.data, values.stride, count, value_size,
                                                            format.layout.words(capacity), nullptr,
                                                            memory.scales, memory.words);
}

}  // namespace quake
