// Operands of the matrix product, packed into words. A packed operand is a value: where its words are, and how
// they lie. Packing is a call of its own, and what it has packed serves any number of products.

#ifndef QUAKE_CORE_PACKED_H_
#define QUAKE_CORE_PACKED_H_

#include <cstddef>
#include <cstdint>

#include "core/sizes.h"

namespace quake {

// What the product multiplies at a time: 32 bits that hold neighbours of the axis that it sums over, one
// float32, two bfloat16 or four bytes. Which, PackedLayout says; nothing but the kernels that make and
// multiply them looks inside.
struct PackedWord {
  std::uint32_t bits;
};

// How the instruction set's product wants the words of a format: so many for so many neighbours, which are
// there as a whole, and so many columns in a panel.
struct PackedLayout {
  std::size_t elements, words_of_elements, panel;

  std::size_t words(std::size_t count) const { return ceil_div(count, elements) * words_of_elements; }
};

// The right operand, a matrix of depth x columns whose products are sums over the depth: panels of
// `layout.panel` columns, each of [words(capacity)][panel] words, of which words(depth) are filled.
struct PackedMatrix {
  PackedWord* words = nullptr;
  std::size_t depth = 0, columns = 0;
  std::size_t capacity = 0;  // at least the depth
  PackedLayout layout = {1, 1, 1};
  float* scales = nullptr;  // of every column, where the words hold integers

  std::size_t panel_words() const { return layout.words(capacity) * layout.panel; }
  // The memory that packing needs.
  static std::size_t needed_words(std::size_t capacity, std::size_t columns, const PackedLayout& layout) {
    return layout.words(capacity) * round_up(columns, layout.panel);
  }
  // The words of the columns from `first` on, a multiple of the panel.
  const PackedWord* at_column(std::size_t first) const { return words + first / layout.panel * panel_words(); }
  // The words of the first panel's rows from `first` on, a multiple of the layout's elements.
  const PackedWord* at_depth(std::size_t first) const { return words + layout.words(first) * layout.panel; }
};

}  // namespace quake

#endif  // QUAKE_CORE_PACKED_H_
