// The FFI targets of element-wise functions.

#ifndef QUAKE_ELEMENTWISE_XLA_H_
#define QUAKE_ELEMENTWISE_XLA_H_

#include "xla/targets.h"

namespace quake {

FfiTargets elementwise_targets();

}  // namespace quake

#endif  // QUAKE_ELEMENTWISE_XLA_H_
