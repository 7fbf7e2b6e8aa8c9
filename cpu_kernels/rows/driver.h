// The drivers of reductions of an axis and of norms. They know neither XLA nor an instruction set.
//
// They return null, or what went wrong (static text). Work is cut by shape alone, so that a result depends
// neither on `parallel` nor on the number of threads.

#ifndef QUAKE_ROWS_DRIVER_H_
#define QUAKE_ROWS_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/work.h"
#include "rows/kernels.h"

namespace quake {

// An array as outer x length x inner around an axis.
struct AxisView {
  std::size_t outer = 1, length = 1, inner = 1;
};
AxisView view_axis(std::span<const std::int64_t> shape, std::size_t axis);

// No size may be 0. kLogSumExp's output lacks the axis.
const char* run_reduction(const RowKernels& kernels, Reduction reduction, DType dtype, int order_index,
                          const AxisView& view, const void* in, void* out, ParallelFor parallel);

// kSoftmax or kLogSoftmax of the last axis, over what a mask keeps.
struct MaskedProblem {
  const void* in;
  void* out;
  std::span<const std::int64_t> shape;  // no size is 0
  const unsigned char* mask;
  std::span<const std::int64_t> mask_shape;  // of the same rank; axes but the last may be 1
};
const char* run_masked_reduction(const RowKernels& kernels, Reduction reduction, DType dtype, int order_index,
                                 const MaskedProblem& problem, ParallelFor parallel);

// Layer norm or RMS norm of rows, or of their sums with those of `residual`.
struct NormProblem {
  const void* in;
  const void* residual;  // or null
  Norm norm;             // of the first group
  void* out;
  void* sum;  // null without a residual
  // No size is 0. The rows of a group share a scale and an offset, those of the next one lie behind.
  std::size_t groups, rows, columns;  // rows of a group
};
const char* run_norm(const RowKernels& kernels, DType dtype, const NormProblem& problem, ParallelFor parallel);

}  // namespace quake

#endif  // QUAKE_ROWS_DRIVER_H_
