// XLA's buffers as the handlers see them: their description in errors, and the checks that all have in common.

#ifndef QUAKE_XLA_BUFFERS_H_
#define QUAKE_XLA_BUFFERS_H_

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>

#include "core/types.h"
#include "xla/ffi/api/ffi.h"

namespace quake::handlers {

namespace ffi = xla::ffi;

// ---- Errors; each begins with the name of the target ----

std::string describe(const ffi::AnyBuffer& buffer);
ffi::Error invalid(const char* target, const std::string& problem);
ffi::Error mismatch(const char* target, const ffi::AnyBuffer& a, const ffi::AnyBuffer& b, const char* expected);
ffi::Error not_addressable(const char* target, const ffi::AnyBuffer& buffer);
// What a driver returns: success, or an error of its text.
ffi::Error outcome(const char* target, const char* problem);

// ---- Shapes ----

// Whether the offsets of all bytes can be computed: the products of the sizes and of any of them, which are
// the strides, do not overflow. XLA has no such buffer; its shapes, with an axis of size 0, can be so.
bool is_addressable(const ffi::AnyBuffer& buffer);
// Whether shapes and types are the same.
bool same_dimensions(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b);
bool has_dimensions(const ffi::AnyBuffer& x, std::initializer_list<std::size_t> expected);

inline std::size_t extent(const ffi::AnyBuffer& x, std::size_t axis) {
  return static_cast<std::size_t>(x.dimensions()[axis]);
}
inline std::span<const std::int64_t> shape(const ffi::AnyBuffer& x) {
  return {x.dimensions().begin(), x.dimensions().size()};
}

inline const char* bytes(const ffi::AnyBuffer& buffer) {
  return static_cast<const char*>(buffer.untyped_data());
}

// ---- What all handlers check ----

// The type that kernels know by that name, if they do.
std::optional<DType> dtype_of(ffi::DataType type);

// How a table is indexed for a call.
struct Call {
  DType dtype;
  int order_index;
};

// The order, that `others` have x's type, and that no size overflows.
ffi::ErrorOr<Call> check(const char* target, std::int32_t order, const ffi::AnyBuffer& x,
                         std::initializer_list<const ffi::AnyBuffer*> others);

}  // namespace quake::handlers

#endif  // QUAKE_XLA_BUFFERS_H_
