// Element-wise kernels: their registry, and their slice of an instruction set's table.

#ifndef QUAKE_ELEMENTWISE_KERNELS_H_
#define QUAKE_ELEMENTWISE_KERNELS_H_

#include "core/types.h"

// The kernels of one operand: X(name, Functor). The functor is defined in activations-inl.h and makes the
// enumerator and the row of the table; the name makes the FFI target `quake_jax_<name>`.
#define QUAKE_UNARY_KERNELS(X) \
  X(exp, Exp)                  \
  X(sigmoid, Sigmoid)          \
  X(silu, Silu)                \
  X(tanh, Tanh)                \
  X(gelu_tanh, GeluTanh)       \
  X(gelu_erf, GeluErf)         \
  X(exp2, Exp2)                \
  X(expm1, Expm1)              \
  X(softplus, Softplus)        \
  X(log_sigmoid, LogSigmoid)   \
  X(elu, Elu)                  \
  X(selu, Selu)                \
  X(mish, Mish)                \
  X(quick_gelu, QuickGelu)

// The kernels of two operands, in three groups that differ in their FFI targets. Gated ones are
// activation(gate) * value, biased ones activation(x + bias).
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

enum class Unary : int {
#define QUAKE_ENUMERATOR(name, Functor) k##Functor,
  QUAKE_UNARY_KERNELS(QUAKE_ENUMERATOR)
#undef QUAKE_ENUMERATOR
      kCount
};

enum class Binary : int {
#define QUAKE_ENUMERATOR(name, Functor) k##Functor,
  QUAKE_BINARY_KERNELS(QUAKE_ENUMERATOR)
#undef QUAKE_ENUMERATOR
      kCount
};

// The last index of each array is order - 1.
struct ElementwiseKernels {
  using UnaryFn = void (*)(const void* in, void* out, std::size_t count, Stores stores);
  // Rows of `columns` elements; the rows of an operand are `stride` elements apart (0: one row for all).
  using BinaryFn = void (*)(const void* a, std::size_t a_stride, const void* b, std::size_t b_stride, void* out,
                            std::size_t rows, std::size_t columns, Stores stores);

  UnaryFn unary[static_cast<int>(Unary::kCount)][kDTypes][kMaxOrder];
  BinaryFn binary[static_cast<int>(Binary::kCount)][kDTypes][kMaxOrder];
};

}  // namespace quake

#endif  // QUAKE_ELEMENTWISE_KERNELS_H_
