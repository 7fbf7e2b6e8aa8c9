// What the bindings of all handlers begin with.

#ifndef QUAKE_XLA_BINDING_H_
#define QUAKE_XLA_BINDING_H_

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace quake::handlers {

// The thread pool and the order.
inline auto bind() { return xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Attr<std::int32_t>("order"); }

}  // namespace quake::handlers

#endif  // QUAKE_XLA_BINDING_H_
