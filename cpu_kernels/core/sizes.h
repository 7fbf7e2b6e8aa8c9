// Arithmetic of sizes, for kernels and drivers. Internal linkage, since kernels include it (see prelude.h).

#ifndef QUAKE_CORE_SIZES_H_
#define QUAKE_CORE_SIZES_H_

#include <cstddef>

namespace quake {

// In bytes. Some processors have larger ones, and lose nothing by this.
constexpr std::size_t kCacheLine = 64;

[[gnu::always_inline]] static constexpr inline std::size_t ceil_div(std::size_t a, std::size_t b) {
  return (a + b - 1) / b;
}
[[gnu::always_inline]] static constexpr inline std::size_t round_up(std::size_t a, std::size_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace quake

#endif  // QUAKE_CORE_SIZES_H_
