// What all kernels have in common, in plain C types: dtypes, orders, and the contracts that hold for each.
//
//  - `in` and `out` may be the same pointer, otherwise they do not overlap; neither need be aligned;
//  - nothing outside the given elements is read or written, nothing is allocated, nothing is thrown;
//  - denormals are flushed by the caller (FTZ and DAZ, see denormals.h): "too small" becomes 0 for free;
//  - `stores` changes the speed alone.

#ifndef QUAKE_CORE_TYPES_H_
#define QUAKE_CORE_TYPES_H_

#include <cstddef>
#include <cstdint>

namespace quake {

// Storage types; the arithmetic is float32 for all of them. Dense layers have int8 too, the codes of a range
// that is known beforehand, and attention's keys and values, whose codes have scales.
enum class DType : int { kFloat32, kBFloat16, kFloat16, kInt8, kCount };
inline constexpr int kDTypes = static_cast<int>(DType::kCount);

inline constexpr int kMaxOrder = 5;

enum class Stores {
  kCached,
  kStreamed,  // past the caches: for outputs that would not stay there
};

}  // namespace quake

#endif  // QUAKE_CORE_TYPES_H_
