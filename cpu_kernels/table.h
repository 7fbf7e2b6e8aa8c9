// The table of an instruction set's kernels: one slice per family, in plain C types. The seam between the
// drivers, which cut the work, and the kernels, which compute.
//
// A slot is null where an instruction set has no kernel; the drivers say so.

#ifndef QUAKE_TABLE_H_
#define QUAKE_TABLE_H_

#include "attention/kernels.h"
#include "dense/kernels.h"
#include "elementwise/kernels.h"
#include "rows/kernels.h"

namespace quake {

struct KernelTable {
  const char* isa;
  ElementwiseKernels elementwise;
  RowKernels rows;
  AttentionKernels attention;
  DenseKernels dense;
};

}  // namespace quake

#endif  // QUAKE_TABLE_H_
