// Packed keys and values, as values: made here, used by any number of blocks of rows.

#ifndef QUAKE_ATTENTION_PACKED_H_
#define QUAKE_ATTENTION_PACKED_H_

#include <cstddef>

#include "attention/kernels.h"
#include "attention/problem.h"
#include "core/packed.h"

namespace quake {

// Keys and values of one head, the first of them at the pointers, packed into memory of needed_words(…) words
// of the format's layout. Up to kKeyTile keys, for the kernels of tiles. False where the format has not all of
// the values.
bool pack_keys(const AttentionKernels::Format& format, DType dtype, const void* keys, std::ptrdiff_t stride,
               std::size_t count, std::size_t head_size, PackedWord* memory, PackedMatrix& packed);
// The panels have room for `capacity` keys.
bool pack_values(const AttentionKernels::Format& format, DType dtype, const void* values, std::ptrdiff_t stride,
                 std::size_t count, std::size_t value_size, std::size_t capacity, PackedWord* memory,
                 PackedMatrix& packed);

}  // namespace quake

#endif  // QUAKE_ATTENTION_PACKED_H_
