// The exact functions in double, for the tests of the kernels.

#ifndef QUAKE_TESTS_REFERENCE_H_
#define QUAKE_TESTS_REFERENCE_H_

#include <cmath>

#include "kernels.h"

namespace quake::tests {

inline double exact(Elementwise function, double x) {
  switch (function) {
    case Elementwise::kExp:
      return std::exp(x);
    case Elementwise::kSigmoid:
      return 1 / (1 + std::exp(-x));
    case Elementwise::kSilu:
      return std::isinf(x) && x < 0 ? 0 : x / (1 + std::exp(-x));
    case Elementwise::kTanh:
      return std::tanh(x);
    case Elementwise::kGeluTanh: {
      if (std::isinf(x)) return x < 0 ? 0 : x;
      const double two_sqrt_2_over_pi = 1.5957691216057307118;
      return x / (1 + std::exp(-two_sqrt_2_over_pi * x * (1 + 0.044715 * x * x)));
    }
    case Elementwise::kGeluErf:
      if (std::isinf(x)) return x < 0 ? 0 : x;
      return 0.5 * x * std::erfc(-x * 0.70710678118654752440);
    case Elementwise::kCount:
      break;
  }
  return std::nan("");
}

}  // namespace quake::tests

#endif  // QUAKE_TESTS_REFERENCE_H_
