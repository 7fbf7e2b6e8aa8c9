// The seam between XLA and the mathematics: the table of kernel functions, in plain C types.
//
// Above it, ffi_handlers.cc decodes XLA's buffers and splits the work; below it, generic/ and isa/ compute.
// Nothing below this line knows XLA or Python.

#ifndef QUAKE_KERNELS_H_
#define QUAKE_KERNELS_H_

#include <cstddef>
#include <cstdint>

// The registry of element-wise kernels: X(name, Functor). The name makes the enumerator, the FFI target
// `quake_jax_<name>` and the row of the table; the functor is defined in generic/activations.h.
#define QUAKE_ELEMENTWISE_KERNELS(X) \
  X(exp, Exp)                        \
  X(sigmoid, Sigmoid)                \
  X(silu, Silu)                      \
  X(tanh, Tanh)                      \
  X(gelu_tanh, GeluTanh)             \
  X(gelu_erf, GeluErf)               \
  X(exp2, Exp2)                      \
  X(expm1, Expm1)                    \
  X(softplus, Softplus)              \
  X(log_sigmoid, LogSigmoid)         \
  X(elu, Elu)                        \
  X(selu, Selu)                      \
  X(mish, Mish)                      \
  X(quick_gelu, QuickGelu)

// The kernels of two operands: X(name, Functor), in three families that differ in their FFI targets. Gated
// ones are activation(gate) * value, biased ones activation(x + bias).
#define QUAKE_GATED_KERNELS(X) \
  X(glu, Glu)                  \
  X(swiglu, Swiglu)            \
  X(geglu_tanh, GegluTanh)     \
  X(geglu_erf, GegluErf)
#define QUAKE_BIASED_KERNELS(X)   \
  X(bias_silu, BiasSilu)          \
  X(bias_gelu_tanh, BiasGeluTanh) \
  X(bias_gelu_erf, BiasGeluErf)
#define QUAKE_BINARY_KERNELS(X) \
  X(logaddexp, LogAddExp)       \
  QUAKE_GATED_KERNELS(X)        \
  QUAKE_BIASED_KERNELS(X)

namespace quake {

enum class Elementwise : int {
#define QUAKE_ENUMERATOR(name, Functor) k##Functor,
  QUAKE_ELEMENTWISE_KERNELS(QUAKE_ENUMERATOR)
#undef QUAKE_ENUMERATOR
      kCount
};

enum class Binary : int {
#define QUAKE_ENUMERATOR(name, Functor) k##Functor,
  QUAKE_BINARY_KERNELS(QUAKE_ENUMERATOR)
#undef QUAKE_ENUMERATOR
      kCount
};

// What is made of the exponentials along an axis.
enum class Reduction : int { kSoftmax, kLogSoftmax, kLogSumExp, kCount };

// Storage types; the arithmetic is float32 for all of them.
enum class DType : int { kFloat32, kBFloat16, kFloat16, kCount };

inline constexpr int kMaxOrder = 5;

// Contracts shared by all kernels:
//  - `in` and `out` may be the same pointer, otherwise they do not overlap; neither need be aligned;
//  - nothing outside the given elements is read or written, nothing is allocated, nothing is thrown;
//  - denormals are flushed by the caller (FTZ and DAZ, see denormals.h): "too small" becomes 0 for free;
//  - `stores` changes the speed alone.
enum class Stores {
  kCached,
  kStreamed,  // past the caches: for outputs that would not stay there
};
using ElementwiseFn = void (*)(const void* in, void* out, std::size_t count, Stores stores);
// Rows of `columns` elements; the rows of an operand are `stride` elements apart (0: one row for all).
using BinaryFn = void (*)(const void* a, std::size_t a_stride, const void* b, std::size_t b_stride, void* out,
                          std::size_t rows, std::size_t columns, Stores stores);
// Over each row. kLogSumExp writes one element a row.
using RowsFn = void (*)(const void* in, void* out, std::size_t rows, std::size_t columns, Stores stores);
// Over each column of a matrix of `length` rows, `stride` elements apart; kLogSumExp writes one row.
using ColumnsFn = void (*)(const void* in, void* out, std::size_t length, std::size_t stride,
                           std::size_t columns);
// Over the elements of each row whose byte in `mask` is not 0; row r's bytes begin at mask_offsets[r].
using MaskedRowsFn = void (*)(const void* in, const unsigned char* mask, const std::size_t* mask_offsets,
                              void* out, std::size_t rows, std::size_t columns);

// One instruction set's kernels; the last index of each array is order - 1.
struct KernelTable {
  const char* isa;
  ElementwiseFn elementwise[static_cast<int>(Elementwise::kCount)][static_cast<int>(DType::kCount)][kMaxOrder];
  BinaryFn binary[static_cast<int>(Binary::kCount)][static_cast<int>(DType::kCount)][kMaxOrder];
  RowsFn rows[static_cast<int>(Reduction::kCount)][static_cast<int>(DType::kCount)][kMaxOrder];
  ColumnsFn columns[static_cast<int>(Reduction::kCount)][static_cast<int>(DType::kCount)][kMaxOrder];
  // kSoftmax and kLogSoftmax only.
  MaskedRowsFn masked_rows[2][static_cast<int>(DType::kCount)][kMaxOrder];
};

}  // namespace quake

#endif  // QUAKE_KERNELS_H_
