// The seam between the NN-LUT kernels (kernels.cc, built for AVX-512) and what times and checks them
// (bench.cc).

#ifndef QUAKE_TESTS_NN_LUT_NN_LUT_H_
#define QUAKE_TESTS_NN_LUT_NN_LUT_H_

#include <cstddef>

#include "table.h"

namespace quake::nn_lut {

enum class Function { kExp, kGelu };

// How the segment of an input is found.
enum class Method {
  kOrder,     // no table: the project's kernel
  kSearch,    // NN-LUT's own breakpoints, by a binary search in registers
  kUniform,   // equally wide segments: the lowest bits of scale z + 2^23
  kBits,      // segments that double in width: the bits of the float scale z + 1/2
  kFraction,  // exp only: the table is of 2^f, f in [0, 1), the exponent is split off as in the project
};

// slopes[k] z + intercepts[k] between breakpoints k - 1 and k. Except for kSearch, the functions are exp(-z)
// and -z Q(z) = gelu(-z) for z from 0 to upper, where they are 0.
template <int N>
struct Table {
  float upper, scale, offset;
  int shift;
  float breakpoints[N - 1], slopes[N], intercepts[N];
};

template <Function F, Method M, int N>
inline constexpr Table<N> kTable = {};

struct Kernel {
  Function function;
  const char* name;
  ElementwiseKernels::UnaryFn map;       // the function
  RowKernels::RowsFn softmax = nullptr;  // softmax with this exponential
  Method method = Method::kOrder;
  int entries = 0;  // of the table, if there is one
  float upper = 0;
  const float *breakpoints = nullptr, *slopes = nullptr, *intercepts = nullptr;
};

extern const Kernel kKernels[];
extern const std::size_t kKernelCount;

}  // namespace quake::nn_lut

#endif  // QUAKE_TESTS_NN_LUT_NN_LUT_H_
