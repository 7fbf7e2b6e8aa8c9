// FFI targets: what XLA calls, by name.

#ifndef QUAKE_XLA_TARGETS_H_
#define QUAKE_XLA_TARGETS_H_

#include <vector>

#include "xla/ffi/api/c_api.h"

namespace quake {

struct FfiTarget {
  const char* name;
  XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*);
};
using FfiTargets = std::vector<FfiTarget>;

}  // namespace quake

#endif  // QUAKE_XLA_TARGETS_H_
