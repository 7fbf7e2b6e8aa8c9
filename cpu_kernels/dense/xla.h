// The FFI target of dense layers.

#ifndef QUAKE_DENSE_XLA_H_
#define QUAKE_DENSE_XLA_H_

#include "xla/targets.h"

namespace quake {

FfiTargets dense_targets();

}  // namespace quake

#endif  // QUAKE_DENSE_XLA_H_
