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
  X(gelu_erf, GeluErf)

namespace quake {

enum class Elementwise : int {
#define QUAKE_ENUMERATOR(name, Functor) k##Functor,
  QUAKE_ELEMENTWISE_KERNELS(QUAKE_ENUMERATOR)
#undef QUAKE_ENUMERATOR
      kCount
};

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
using SoftmaxFn = void (*)(const void* in, void* out, std::size_t rows, std::size_t columns,
                           Stores stores);

// One instruction set's kernels; the last index of each array is order - 1.
struct KernelTable {
  const char* isa;
  ElementwiseFn elementwise[static_cast<int>(Elementwise::kCount)][static_cast<int>(DType::kCount)]
                           [kMaxOrder];
  SoftmaxFn softmax[static_cast<int>(DType::kCount)][kMaxOrder];
};

}  // namespace quake

#endif  // QUAKE_KERNELS_H_
