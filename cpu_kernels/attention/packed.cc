#include "attention/packed.h"

namespace quake {

PackedMatrix pack_keys(const AttentionKernels& kernels, DType dtype, const void* keys, std::ptrdiff_t stride,
                       std::size_t count, std::size_t head_size, PackedWord* memory) {
  const int i = static_cast<int>(dtype);
  kernels.pack_keys[i](keys, stride, count, head_size, memory);
  return {memory, head_size, count, head_size, kernels.layout[i]};
}

PackedMatrix pack_values(const AttentionKernels& kernels, DType dtype, const void* values,
                         std::ptrdiff_t stride, std::size_t count, std::size_t value_size, std::size_t capacity,
                         PackedWord* memory) {
  const int i = static_cast<int>(dtype);
  kernels.pack_values[i](values, stride, count, value_size, capacity, memory);
  return {memory, count, value_size, capacity, kernels.layout[i]};
}

}  // namespace quake
