// The kernels that reduce an axis, and those that normalise rows: their slice of an instruction set's table.

#ifndef QUAKE_ROWS_KERNELS_H_
#define QUAKE_ROWS_KERNELS_H_

#include "core/norm.h"
#include "core/types.h"

namespace quake {

// What is made of the exponentials along an axis.
enum class Reduction : int { kSoftmax, kLogSoftmax, kLogSumExp, kCount };

// The last index of the reductions' arrays is order - 1.
struct RowKernels {
  // Over each row. kLogSumExp writes one element a row.
  using RowsFn = void (*)(const void* in, void* out, std::size_t rows, std::size_t columns, Stores stores);
  // Over each column of a matrix of `length` rows, `stride` elements apart; kLogSumExp writes one row.
  using ColumnsFn = void (*)(const void* in, void* out, std::size_t length, std::size_t stride,
                             std::size_t columns);
  // Over the elements of each row whose byte in `mask` is not 0; row r's bytes begin at mask_offsets[r].
  using MaskedFn = void (*)(const void* in, const unsigned char* mask, const std::size_t* mask_offsets,
                            void* out, std::size_t rows, std::size_t columns);

  // Each row, or each of the sums with `residual`, which go to `sum` (otherwise both are null). `residual` and
  // `sum` are as `in` and `out` are; the two outputs do not overlap. Layer norm has an offset, RMS norm none.
  using NormFn = void (*)(const void* in, const void* residual, const Norm& norm, void* out, void* sum,
                          std::size_t rows, std::size_t columns, Stores stores);

  RowsFn rows[static_cast<int>(Reduction::kCount)][kDTypes][kMaxOrder];
  ColumnsFn columns[static_cast<int>(Reduction::kCount)][kDTypes][kMaxOrder];
  MaskedFn masked[2][kDTypes][kMaxOrder];  // kSoftmax and kLogSoftmax
  NormFn norm[kDTypes];
};

}  // namespace quake

#endif  // QUAKE_ROWS_KERNELS_H_
