// The storage types of the kernels, decoded and encoded bit by bit: independent of the vector shims.

#ifndef QUAKE_ACCURACY_STORAGE_H_
#define QUAKE_ACCURACY_STORAGE_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/types.h"

namespace quake {

inline float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline double decode_bfloat16(std::uint16_t bits) {
  return float_from_bits(static_cast<std::uint32_t>(bits) << 16);
}

inline double decode_float16(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  double value = exponent == 0    ? std::ldexp(mantissa, -24)
                 : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                  : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -value : value;
}

struct Storage {
  DType dtype;
  const char* name;
  std::size_t size;
  int digits;       // of the mantissa, the hidden one included
  double half_ulp;  // largest relative rounding error of a normal value
  double absolute;  // largest absolute error below the smallest normal value
  double smallest_normal;
  double largest;  // largest finite value
  double (*decode)(std::uint16_t);

  // Of the codes of a range (int8) -128 is NaN.
  double get(const char* data, std::size_t i) const {
    if (dtype == DType::kInt8) {
      const auto code = static_cast<signed char>(data[i]);
      return code == -128 ? NAN : code;
    }
    if (dtype == DType::kFloat32) {
      float value;
      std::memcpy(&value, data + 4 * i, 4);
      return value;
    }
    std::uint16_t bits;
    std::memcpy(&bits, data + 2 * i, 2);
    return decode(bits);
  }

  // Stores a value near `value`: 16-bit types take the mantissa's leading bits.
  void put(char* data, std::size_t i, float value) const {
    if (dtype == DType::kFloat32) {
      std::memcpy(data + 4 * i, &value, 4);
      return;
    }
    std::uint32_t wide;
    std::memcpy(&wide, &value, 4);
    std::uint16_t bits = static_cast<std::uint16_t>(wide >> 16);
    if (dtype == DType::kFloat16) {
      const int exponent = static_cast<int>((wide >> 23) & 255) - 112;
      bits = static_cast<std::uint16_t>((wide >> 16) & 0x8000);
      if (exponent > 0) {
        bits = static_cast<std::uint16_t>(bits | (exponent < 31 ? exponent << 10 : 30 << 10) |
                                          ((wide >> 13) & 1023));
      }
    }
    std::memcpy(data + 2 * i, &bits, 2);
  }
};

// A float32 or bfloat16 result below 2^-126 is flushed to 0; a float16 has subnormals of step 2^-24.
inline constexpr Storage kStorage[] = {
    {DType::kFloat32, "float32", 4, 24, 0, 0x1p-126, 0x1p-126, 0x1.fffffep127, nullptr},
    {DType::kBFloat16, "bfloat16", 2, 8, 0x1p-8, 0x1p-126, 0x1p-126, 0x1.fep127, decode_bfloat16},
    {DType::kFloat16, "float16", 2, 11, 0x1p-11, 0x1p-25, 0x1p-14, 65504, decode_float16},
};

}  // namespace quake

#endif  // QUAKE_ACCURACY_STORAGE_H_
