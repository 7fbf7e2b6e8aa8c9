#include "elementwise/driver.h"

#include <algorithm>

namespace quake {

const char* run_unary(const ElementwiseKernels& kernels, Unary function, DType dtype, int order_index,
                      const void* in, void* out, std::size_t count, ParallelFor parallel) {
  const auto kernel = kernels.unary[static_cast<int>(function)][static_cast<int>(dtype)][order_index];
  if (!kernel) return kNoKernel;
  const char* const x = static_cast<const char*>(in);
  char* const y = static_cast<char*>(out);
  const std::size_t size = element_size(dtype);
  const Stores stores = stores_for(count * size);
  parallel(ceil_div(count, kChunkElements), [=](std::size_t chunk) {
    const std::size_t begin = chunk * kChunkElements;
    kernel(x + begin * size, y + begin * size, std::min(kChunkElements, count - begin), stores);
  });
  return nullptr;
}

// A single row is cut into chunks of its own.
const char* run_binary(const ElementwiseKernels& kernels, Binary function, DType dtype, int order_index,
                       const BinaryProblem& problem, ParallelFor parallel) {
  const auto kernel = kernels.binary[static_cast<int>(function)][static_cast<int>(dtype)][order_index];
  if (!kernel) return kNoKernel;
  const BinaryProblem p = problem;
  if (p.rows == 0 || p.columns == 0) return nullptr;
  const char *const a = static_cast<const char*>(p.a), *const b = static_cast<const char*>(p.b);
  char* const y = static_cast<char*>(p.out);
  const std::size_t size = element_size(dtype);
  const Stores stores = stores_for(p.rows * p.columns * size);
  if (p.rows == 1) {
    parallel(ceil_div(p.columns, kChunkElements), [=](std::size_t chunk) {
      const std::size_t begin = chunk * kChunkElements, offset = begin * size;
      kernel(a + offset, 0, b + offset, 0, y + offset, 1, std::min(kChunkElements, p.columns - begin), stores);
    });
    return nullptr;
  }
  const std::size_t chunk_rows = std::max<std::size_t>(1, kChunkElements / p.columns);
  parallel(ceil_div(p.rows, chunk_rows), [=](std::size_t chunk) {
    const std::size_t begin = chunk * chunk_rows;
    kernel(a + begin * p.a_stride * size, p.a_stride, b + begin * p.b_stride * size, p.b_stride,
           y + begin * p.columns * size, std::min(chunk_rows, p.rows - begin), p.columns, stores);
  });
  return nullptr;
}

}  // namespace quake
