// The error of element-wise kernels over a range of inputs, against the exact functions in double precision.
// Behind `python -m quake_jax.accuracy`, which runs it over all inputs.

#ifndef QUAKE_ACCURACY_SWEEP_H_
#define QUAKE_ACCURACY_SWEEP_H_

#include <cstdint>
#include <string>
#include <vector>

#include "table.h"

namespace quake {

// The inputs whose bits are first, first + stride, …: `count` of them, none beyond the dtype's last.
struct InputRange {
  std::uint64_t first, count, stride;
};

// The largest value of a measure and where it was first seen.
struct Extreme {
  double value = 0;
  std::uint32_t input = 0;  // bits
  double got = 0, wanted = 0;
};

// The errors of one kernel. A result `got` is compared with the exact result `wanted` of the input, which is
// taken as 0 if it is a denormal float32, as the kernels do.
//  - The error is |got - wanted|. Where either is below 2^-125 only what exceeds ExactFunction::flushed counts,
//    because results and intermediate results below 2^-126 are flushed; in float16, below 2^-14, what exceeds
//    2^-25, half a step of its subnormals. An infinite result is right where `wanted` is beyond the largest
//    finite number, and counts as that number where it is not.
//  - Neighbours are successive inputs of the range with the same sign.
struct KernelAccuracy {
  const char* isa;
  int order;
  Extreme relative;            // error / |wanted|
  Extreme absolute;            // |got - wanted|
  Extreme ulp;                 // error in units of the last place of `wanted` in the dtype
  Extreme fall;                // fall of an increasing function between neighbours, relative to |wanted| or the
                               // smallest normal number; `input` is the neighbour with the smaller result
  std::uint64_t falls = 0;     // neighbours of an increasing function whose results fall
  std::uint64_t nan_made = 0;  // NaN from an input that is not NaN
  std::uint64_t nan_lost = 0;  // a number from NaN
  std::uint64_t out_of_range = 0;  // results outside the function's range
  std::uint64_t denormal = 0;      // float32 and bfloat16 results that should have been flushed to 0
};

// The kernels of `function` of all `tables` and `orders`, in that nesting. The exact results are computed once
// for all of them. Runs on the calling thread.
std::vector<KernelAccuracy> measure_accuracy(Unary function, DType dtype, InputRange range,
                                             const std::vector<const KernelTable*>& tables,
                                             const std::vector<int>& orders);

// The results of one kernel, or of the exact function if `table` is null, for inputs given by their bits.
std::vector<double> evaluate(Unary function, DType dtype, const KernelTable* table, int order,
                             const std::vector<std::uint32_t>& inputs);

// By name. `python -m quake_jax.accuracy` checks its arguments, so a name that is not found here is a mistake
// in quake_jax; it throws std::invalid_argument, and so does an order that does not exist.
inline constexpr const char* kFunctionNames[] = {
#define QUAKE_NAME(name, Functor) #name,
    QUAKE_UNARY_KERNELS(QUAKE_NAME)
#undef QUAKE_NAME
};
Unary find_function(const std::string& name);
DType find_dtype(const std::string& name);
const KernelTable* find_table(const std::string& isa);
void check_order(int order);

}  // namespace quake

#endif  // QUAKE_ACCURACY_SWEEP_H_
