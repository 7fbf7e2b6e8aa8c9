// All FFI targets: those of each family.

#ifndef QUAKE_TARGETS_H_
#define QUAKE_TARGETS_H_

#include "xla/targets.h"

namespace quake {

FfiTargets ffi_targets();

}  // namespace quake

#endif  // QUAKE_TARGETS_H_
