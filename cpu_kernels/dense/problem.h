// What a call of dense layers has to do.

#ifndef QUAKE_DENSE_PROBLEM_H_
#define QUAKE_DENSE_PROBLEM_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/types.h"
#include "dense/kernels.h"

namespace quake {

// A packed weight, and what its products become.
struct DenseWeight {
  DensePanels panels = {};
  std::size_t columns = 0;
  const float* column_scales = nullptr;       // without groups
  const std::int32_t* column_sums = nullptr;  // for a zero point
  const float* bias = nullptr;                // or null
  void* out = nullptr;                        // rows x columns
};

struct DenseProblem {
  // An element-wise kernel of float32, or null.
  using Activation = void (*)(const void* in, void* out, std::size_t count, Stores stores);

  DType dtype, out_dtype;
  DenseFormat format;
  std::size_t rows, size;  // x is rows x size
  const void* x;
  std::size_t group_size = 0;
  const Norm* norm = nullptr;
  const std::int32_t* permutation = nullptr;  // the packed order of x's columns
  // Of what is quantised: [low, high], known beforehand. Null for x: each row has its own. An int8 x or result
  // is codes of its range; such an x has neither norm nor permutation, such a result no residual.
  const float *range = nullptr, *out_range = nullptr;
  std::vector<DenseWeight> weights = {};  // of the same format
  const DenseWeight* gate = nullptr;      // of the same columns as the only weight
  Activation activation = nullptr;        // of the gate if there is one
  const void* residual = nullptr;         // rows x columns
};

}  // namespace quake

#endif  // QUAKE_DENSE_PROBLEM_H_
