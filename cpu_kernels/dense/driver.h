// The driver of dense layers. It knows neither XLA nor an instruction set.

#ifndef QUAKE_DENSE_DRIVER_H_
#define QUAKE_DENSE_DRIVER_H_

#include "core/work.h"
#include "dense/kernels.h"
#include "dense/problem.h"

namespace quake {

// Returns null, or what went wrong (static text). The work is cut by shape alone, so the result depends neither
// on `parallel` nor on the number of threads.
const char* run_dense(const DenseProblem& problem, const DenseKernels& kernels, ParallelFor parallel);

}  // namespace quake

#endif  // QUAKE_DENSE_DRIVER_H_
