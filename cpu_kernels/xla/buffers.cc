#include "xla/buffers.h"

#include <algorithm>
#include <sstream>

namespace quake::handlers {

std::string describe(const ffi::AnyBuffer& buffer) {
  std::ostringstream text;
  text << buffer.element_type() << "[";
  for (std::size_t i = 0; i < buffer.dimensions().size(); ++i) {
    text << (i ? "," : "") << buffer.dimensions()[i];
  }
  text << "]";
  return text.str();
}

ffi::Error invalid(const char* target, const std::string& problem) {
  return ffi::Error::InvalidArgument(std::string(target) + ": " + problem);
}

ffi::Error mismatch(const char* target, const ffi::AnyBuffer& a, const ffi::AnyBuffer& b,
                    const char* expected) {
  return invalid(target, "buffers " + describe(a) + " and " + describe(b) + ", expected " + expected);
}

ffi::Error outcome(const char* target, const char* problem) {
  return problem ? invalid(target, problem) : ffi::Error::Success();
}

bool is_addressable(const ffi::AnyBuffer& buffer) {
  std::int64_t bytes = 8;  // of the widest element
  for (const std::int64_t size : buffer.dimensions()) {
    if (size < 0 || __builtin_mul_overflow(bytes, std::max<std::int64_t>(size, 1), &bytes)) return false;
  }
  return true;
}

ffi::Error not_addressable(const char* target, const ffi::AnyBuffer& buffer) {
  return invalid(target,
                 "buffer " + describe(buffer) + ", expected no negative size and less than 2^60 elements");
}

bool same_dimensions(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b) {
  return a.element_type() == b.element_type() && std::ranges::equal(a.dimensions(), b.dimensions());
}

bool has_dimensions(const ffi::AnyBuffer& x, std::initializer_list<std::size_t> expected) {
  return std::ranges::equal(x.dimensions(), expected,
                            [](std::int64_t a, std::size_t b) { return a == static_cast<std::int64_t>(b); });
}

std::optional<DType> dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::F32:
      return DType::kFloat32;
    case ffi::BF16:
      return DType::kBFloat16;
    case ffi::F16:
      return DType::kFloat16;
    default:
      return std::nullopt;
  }
}

ffi::ErrorOr<Call> check(const char* target, std::int32_t order, const ffi::AnyBuffer& x,
                         std::initializer_list<const ffi::AnyBuffer*> others) {
  if (order < 1 || order > kMaxOrder) {
    return ffi::Unexpected(invalid(target, "order is " + std::to_string(order) + ", expected 1 to 5"));
  }
  for (const ffi::AnyBuffer* other : others) {
    if (other->element_type() != x.element_type()) {
      return ffi::Unexpected(
          invalid(target, "buffers " + describe(x) + " and " + describe(*other) + ", expected the same type"));
    }
    if (!is_addressable(*other)) return ffi::Unexpected(not_addressable(target, *other));
  }
  if (!is_addressable(x)) return ffi::Unexpected(not_addressable(target, x));
  if (const auto dtype = dtype_of(x.element_type())) return Call{*dtype, order - 1};
  return ffi::Unexpected(invalid(target, "operand " + describe(x) + ", expected float32, bfloat16 or float16"));
}

}  // namespace quake::handlers
