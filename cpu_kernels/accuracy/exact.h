// The exact element-wise functions in double precision: what the kernels' tests and the accuracy sweep
// compare with. Relative error below 1e-12 in the tails too (a test compares them with mpmath).

#ifndef QUAKE_ACCURACY_EXACT_H_
#define QUAKE_ACCURACY_EXACT_H_

#include <cmath>
#include <limits>

#include "elementwise/kernels.h"

namespace quake {

struct ExactFunction {
  double (*value)(double x);
  bool increasing;  // nowhere falls as x grows
  // Results outside are wrong whatever their error is: the sign of a probability, the size of a tanh.
  double lowest = -std::numeric_limits<double>::infinity();
  double highest = std::numeric_limits<double>::infinity();
  // Largest absolute error where results or intermediate results are flushed.
  double flushed = 0x1p-126;
};

// One for each row of QUAKE_UNARY_KERNELS, of the same name.
namespace exact_functions {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// x / (1 + e^-a), the form of every x * sigmoid(a).
inline double gated(double x, double a) { return x == -kInfinity ? 0 : x / (1 + std::exp(-a)); }

inline constexpr ExactFunction exp = {[](double x) { return std::exp(x); }, true, 0};
inline constexpr ExactFunction exp2 = {[](double x) { return std::exp2(x); }, true, 0};
inline constexpr ExactFunction expm1 = {[](double x) { return std::expm1(x); }, true, -1};
inline constexpr ExactFunction sigmoid = {[](double x) { return 1 / (1 + std::exp(-x)); }, true, 0, 1};
inline constexpr ExactFunction log_sigmoid = {
    [](double x) { return std::fmin(x, 0.0) - std::log1p(std::exp(-std::fabs(x))); }, true, -kInfinity, 0};
inline constexpr ExactFunction softplus = {
    [](double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }, true, 0};
inline constexpr ExactFunction tanh = {[](double x) { return std::tanh(x); }, true, -1, 1};
inline constexpr ExactFunction elu = {[](double x) { return x > 0 ? x : std::expm1(x); }, true, -1};
// The kernel multiplies by 1.76 what may have been flushed before.
inline constexpr ExactFunction selu = {[](double x) {
                                         const double scale = 1.0507009873554804934,
                                                      alpha = 1.6732632423543772848;
                                         return scale * (x > 0 ? x : alpha * std::expm1(x));
                                       },
                                       true, -kInfinity, kInfinity, 0x1p-125};
inline constexpr ExactFunction silu = {[](double x) { return gated(x, x); }, false};
inline constexpr ExactFunction quick_gelu = {[](double x) { return gated(x, 1.702 * x); }, false};
inline constexpr ExactFunction gelu_tanh = {[](double x) {
                                              const double two_sqrt_2_over_pi = 1.5957691216057307118;
                                              return gated(x, two_sqrt_2_over_pi * x * (1 + 0.044715 * x * x));
                                            },
                                            false};
inline constexpr ExactFunction gelu_erf = {
    [](double x) {
      return std::isinf(x) ? std::fmax(x, 0.0) : 0.5 * x * std::erfc(x * -0.70710678118654752440);
    },
    false};
// x tanh(softplus(x)) in terms of w = e^-|x|.
inline constexpr ExactFunction mish = {
    [](double x) {
      if (std::isinf(x)) return std::fmax(x, 0.0);
      const double w = std::exp(-std::fabs(x));
      return x * (x < 0 ? w * (w + 2) / (w * (w + 2) + 2) : (1 + 2 * w) / (1 + 2 * w * (1 + w)));
    },
    false};

}  // namespace exact_functions

// A row of the registry that has no exact function does not compile.
inline constexpr ExactFunction kExactFunctions[] = {
#define QUAKE_EXACT(name, Functor) exact_functions::name,
    QUAKE_UNARY_KERNELS(QUAKE_EXACT)
#undef QUAKE_EXACT
};

inline double exact(Unary function, double x) { return kExactFunctions[static_cast<int>(function)].value(x); }

}  // namespace quake

#endif  // QUAKE_ACCURACY_EXACT_H_
