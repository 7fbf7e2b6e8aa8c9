// The drivers of element-wise kernels. They know neither XLA nor an instruction set.
//
// They return null, or what went wrong (static text). Work is cut by shape alone, so that a result depends
// neither on `parallel` nor on the number of threads.

#ifndef QUAKE_ELEMENTWISE_DRIVER_H_
#define QUAKE_ELEMENTWISE_DRIVER_H_

#include <cstddef>

#include "core/work.h"
#include "elementwise/kernels.h"

namespace quake {

const char* run_unary(const ElementwiseKernels& kernels, Unary function, DType dtype, int order_index,
                      const void* in, void* out, std::size_t count, ParallelFor parallel);

// Rows of `columns` elements, the rows of an operand being a stride apart, in elements.
struct BinaryProblem {
  const void *a, *b;
  std::size_t a_stride, b_stride;
  void* out;
  std::size_t rows, columns;
};
const char* run_binary(const ElementwiseKernels& kernels, Binary function, DType dtype, int order_index,
                       const BinaryProblem& problem, ParallelFor parallel);

}  // namespace quake

#endif  // QUAKE_ELEMENTWISE_DRIVER_H_
