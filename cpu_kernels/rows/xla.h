// The FFI targets of reductions of an axis and of norms.

#ifndef QUAKE_ROWS_XLA_H_
#define QUAKE_ROWS_XLA_H_

#include "xla/targets.h"

namespace quake {

FfiTargets rows_targets();

}  // namespace quake

#endif  // QUAKE_ROWS_XLA_H_
