// Chooses the kernel table for this machine, once per process.

#ifndef QUAKE_ISA_DISPATCH_H_
#define QUAKE_ISA_DISPATCH_H_

#include <string>
#include <string_view>
#include <vector>

#include "table.h"

namespace quake {

// The tables that were compiled in and that this machine can run, best last; never empty.
const std::vector<const KernelTable*>& supported_tables();

// The table in use: the best supported one, or the one that the environment variable QUAKE_JAX_ISA
// names. Throws std::runtime_error with the list of supported names if that name is not among them.
const KernelTable& active_table();

// The element-wise kernel of that name, or null.
ElementwiseKernels::UnaryFn find_unary(const KernelTable& table, std::string_view name, DType dtype,
                                       int order_index);

}  // namespace quake

#endif  // QUAKE_ISA_DISPATCH_H_
