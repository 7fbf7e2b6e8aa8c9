// The FFI targets, by name. The handlers themselves are in ffi_handlers.cc, the only file that knows XLA's
// buffers.

#ifndef QUAKE_FFI_HANDLERS_H_
#define QUAKE_FFI_HANDLERS_H_

#include <vector>

#include "xla/ffi/api/c_api.h"

namespace quake {

struct FfiTarget {
  const char* name;
  XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*);
};

std::vector<FfiTarget> ffi_targets();

}  // namespace quake

#endif  // QUAKE_FFI_HANDLERS_H_
