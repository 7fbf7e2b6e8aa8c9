// The FFI targets of fused attention.

#ifndef QUAKE_ATTENTION_XLA_H_
#define QUAKE_ATTENTION_XLA_H_

#include "xla/targets.h"

namespace quake {

FfiTargets attention_targets();

}  // namespace quake

#endif  // QUAKE_ATTENTION_XLA_H_
