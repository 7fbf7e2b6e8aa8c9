// Packed keys and values, as values: made here, used by any number of blocks of rows.

#ifndef QUAKE_ATTENTION_PACKED_H_
#define QUAKE_ATTENTION_PACKED_H_

#include <cstddef>

#include "attention/kernels.h"
#include "attention/problem.h"
#include "core/packed.h"

namespace quake {

// Rows of memory, `stride` elements apart.
struct RowsToPack {
  const void* data;
  std::ptrdiff_t stride;
  DType dtype;
};

// Where a packed matrix lies: needed_words(…) words of the format's layout, and as many floats as its panels
// have columns.
struct PackedMemory {
  PackedWord* words;
  float* scales;
};

// Keys and values of one head, packed. Up to kKeyTile keys, for the kernels of tiles. False where the format
// does not have all of the values. The centre is of formats that have one.
bool pack_keys(const AttentionKernels::Format& format, const RowsToPack& keys, std::size_t count,
               std::size_t head_size, const float* centre, const PackedMemory& memory, PackedMatrix& packed);
// The panels have room for `capacity` keys.
bool pack_values(const AttentionKernels::Format& format, const RowsToPack& values, std::size_t count,
                 std::size_t value_size, std::size_t capacity, const PackedMemory& memory,
                 PackedMatrix& packed);

}  // namespace quake

#endif  // QUAKE_ATTENTION_PACKED_H_
