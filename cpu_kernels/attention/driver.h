// The driver of fused attention. It knows neither XLA nor an instruction set.

#ifndef QUAKE_ATTENTION_DRIVER_H_
#define QUAKE_ATTENTION_DRIVER_H_

#include "attention/kernels.h"
#include "attention/problem.h"
#include "core/work.h"

namespace quake {

// Returns null, or what went wrong (static text): an impossible problem, or memory that was refused. The work
// is cut by shape alone, so the result depends neither on `parallel` nor on the number of threads. A problem
// that takes less time than a few hops between threads stays on the calling one.
const char* run_attention(const AttentionProblem& problem, const AttentionKernels& kernels, int order_index,
                          ParallelFor parallel);

// The same, but `parallel` is used whatever the size.
const char* run_attention_in_parallel(const AttentionProblem& problem, const AttentionKernels& kernels,
                                      int order_index, ParallelFor parallel);

}  // namespace quake

#endif  // QUAKE_ATTENTION_DRIVER_H_
