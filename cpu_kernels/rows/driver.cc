#include "rows/driver.h"

#include <algorithm>
#include <vector>

namespace quake {

AxisView view_axis(std::span<const std::int64_t> shape, std::size_t axis) {
  AxisView v;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    (i < axis ? v.outer : i == axis ? v.length : v.inner) *= static_cast<std::size_t>(shape[i]);
  }
  return v;
}

namespace {

// Rows in chunks of whole ones.
const char* run_rows(RowKernels::RowsFn kernel, const AxisView& v, std::size_t out_length, std::size_t size,
                     const char* in, char* out, ParallelFor parallel) {
  if (!kernel) return kNoKernel;
  const Stores stores = stores_for(v.outer * out_length * size);
  const std::size_t chunk_rows = std::max<std::size_t>(1, kChunkElements / v.length);
  parallel(ceil_div(v.outer, chunk_rows), [=](std::size_t chunk) {
    const std::size_t begin = chunk * chunk_rows;
    kernel(in + begin * v.length * size, out + begin * out_length * size, std::min(chunk_rows, v.outer - begin),
           v.length, stores);
  });
  return nullptr;
}

// Columns in chunks of whole cache lines, whatever the type, so that no two threads write to one.
const char* run_columns(RowKernels::ColumnsFn kernel, const AxisView& v, std::size_t out_length,
                        std::size_t size, const char* in, char* out, ParallelFor parallel) {
  if (!kernel) return kNoKernel;
  constexpr std::size_t kColumnStep = kCacheLine;
  const std::size_t chunk_columns =
      std::max<std::size_t>(1, kChunkElements / v.length / kColumnStep) * kColumnStep;
  const std::size_t blocks = ceil_div(v.inner, chunk_columns);
  parallel(v.outer * blocks, [=](std::size_t chunk) {
    const std::size_t outer = chunk / blocks, column = chunk % blocks * chunk_columns;
    kernel(in + (outer * v.length * v.inner + column) * size,
           out + (outer * out_length * v.inner + column) * size, v.length, v.inner,
           std::min(chunk_columns, v.inner - column));
  });
  return nullptr;
}

// For each row of an array, where its bytes begin in the mask.
std::vector<std::size_t> mask_offsets(std::span<const std::int64_t> shape,
                                      std::span<const std::int64_t> mask_shape, std::size_t rows) {
  std::vector<std::size_t> offsets = {0};
  std::size_t stride = static_cast<std::size_t>(mask_shape.back());
  std::size_t inner_rows = 1;
  offsets.resize(rows);
  // From the last axis but one outwards: repeat what is there with the axis's offset added.
  for (std::size_t i = shape.size() - 1; i-- > 0;) {
    const auto size = static_cast<std::size_t>(shape[i]);
    const auto mask_size = static_cast<std::size_t>(mask_shape[i]);
    for (std::size_t k = 1; k < size; ++k) {
      for (std::size_t r = 0; r < inner_rows; ++r) {
        offsets[k * inner_rows + r] = offsets[r] + (mask_size == 1 ? 0 : k * stride);
      }
    }
    inner_rows *= size;
    stride *= mask_size;
  }
  return offsets;
}

}  // namespace

const char* run_reduction(const RowKernels& kernels, Reduction reduction, DType dtype, int order_index,
                          const AxisView& view, const void* in, void* out, ParallelFor parallel) {
  const int r = static_cast<int>(reduction), i = static_cast<int>(dtype);
  const std::size_t size = element_size(dtype),
                    out_length = reduction == Reduction::kLogSumExp ? 1 : view.length;
  const char* const x = static_cast<const char*>(in);
  char* const y = static_cast<char*>(out);
  if (view.inner == 1) {
    return run_rows(kernels.rows[r][i][order_index], view, out_length, size, x, y, parallel);
  }
  return run_columns(kernels.columns[r][i][order_index], view, out_length, size, x, y, parallel);
}

const char* run_masked_reduction(const RowKernels& kernels, Reduction reduction, DType dtype, int order_index,
                                 const MaskedProblem& p, ParallelFor parallel) {
  const auto kernel = kernels.masked[static_cast<int>(reduction)][static_cast<int>(dtype)][order_index];
  if (!kernel) return kNoKernel;
  const AxisView v = view_axis(p.shape, p.shape.size() - 1);
  const std::size_t rows = v.outer, columns = v.length, row_size = columns * element_size(dtype);
  const std::size_t chunk_rows = std::max<std::size_t>(1, kChunkElements / columns);
  const std::vector<std::size_t> offsets = mask_offsets(p.shape, p.mask_shape, rows);
  const char* const in = static_cast<const char*>(p.in);
  char* const out = static_cast<char*>(p.out);
  const unsigned char* const mask = p.mask;
  const std::size_t* const row_offsets = offsets.data();
  parallel(ceil_div(rows, chunk_rows), [=](std::size_t chunk) {
    const std::size_t begin = chunk * chunk_rows;
    kernel(in + begin * row_size, mask, row_offsets + begin, out + begin * row_size,
           std::min(chunk_rows, rows - begin), columns);
  });
  return nullptr;
}

const char* run_norm(const RowKernels& kernels, DType dtype, const NormProblem& p, ParallelFor parallel) {
  const auto kernel = kernels.norm[static_cast<int>(dtype)];
  if (!kernel) return kNoKernel;
  const std::size_t rows = p.groups * p.rows, row_size = p.columns * element_size(dtype);
  const std::size_t chunk_rows = std::max<std::size_t>(1, kChunkElements / p.columns);
  const Stores stores = stores_for(rows * row_size * (p.sum ? 2 : 1));
  parallel(ceil_div(rows, chunk_rows), [=](std::size_t chunk) {
    const std::size_t end = std::min(rows, (chunk + 1) * chunk_rows);
    // The part of a chunk that lies in one group.
    for (std::size_t begin = chunk * chunk_rows; begin < end;) {
      const std::size_t group = begin / p.rows, part_end = std::min(end, (group + 1) * p.rows);
      const auto at = [&](auto* data) { return data ? data + begin * row_size : data; };
      Norm norm = p.norm;
      norm.scale += group * p.columns;
      if (norm.offset) norm.offset += group * p.columns;
      kernel(at(static_cast<const char*>(p.in)), at(static_cast<const char*>(p.residual)), norm,
             at(static_cast<char*>(p.out)), at(static_cast<char*>(p.sum)), part_end - begin, p.columns, stores);
      begin = part_end;
    }
  });
  return nullptr;
}

}  // namespace quake
