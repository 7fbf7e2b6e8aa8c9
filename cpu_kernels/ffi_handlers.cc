// The typed FFI handlers: decode XLA's buffers, validate them, split the work over threads, call a kernel.
// The only file that knows XLA's buffers.

#include "ffi_handlers.h"

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <string>

#include "dispatch.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace quake {
namespace {

namespace ffi = xla::ffi;

// Work is cut into chunks of about this many elements, by shape alone, so that a result never depends on the
// number of threads. A hop through the pool costs 10 to 30 µs, a chunk about as much: smaller calls stay on
// the calling thread.
constexpr std::size_t kChunkElements = std::size_t{1} << 16;

// Outputs larger than the last-level cache are written past it: reading a line before overwriting it would be
// a third of the traffic.
Stores stores_for(std::size_t output_bytes) {
  static const std::size_t cache = [] {
    std::size_t bytes = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const long reported = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (reported > 0) bytes = static_cast<std::size_t>(reported);
#endif
    return std::max(bytes, std::size_t{32} << 20);
  }();
  return output_bytes > cache ? Stores::kStreamed : Stores::kCached;
}

constexpr std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

std::string describe(const ffi::AnyBuffer& buffer) {
  std::ostringstream text;
  text << buffer.element_type() << "[";
  for (std::size_t i = 0; i < buffer.dimensions().size(); ++i) {
    text << (i ? "," : "") << buffer.dimensions()[i];
  }
  text << "]";
  return text.str();
}

// What every handler checks of its one operand, one result and order.
struct Call {
  int dtype;
  int order_index;
  std::size_t element_size;
};

ffi::ErrorOr<Call> check(const char* target, std::int32_t order, const ffi::AnyBuffer& in,
                         const ffi::AnyBuffer& out) {
  if (order < 1 || order > kMaxOrder) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(std::string(target) + ": order is " +
                                                       std::to_string(order) +
                                                       ", expected 1 to 5"));
  }
  bool same = in.element_type() == out.element_type() &&
              in.dimensions().size() == out.dimensions().size();
  for (std::size_t i = 0; same && i < in.dimensions().size(); ++i) {
    same = in.dimensions()[i] == out.dimensions()[i];
  }
  if (!same) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        std::string(target) + ": the operand is " + describe(in) + " and the result " +
        describe(out) + ", expected the same type and shape"));
  }
  switch (in.element_type()) {
    case ffi::F32:
      return Call{static_cast<int>(DType::kFloat32), order - 1, 4};
    case ffi::BF16:
      return Call{static_cast<int>(DType::kBFloat16), order - 1, 2};
    case ffi::F16:
      return Call{static_cast<int>(DType::kFloat16), order - 1, 2};
    default:
      return ffi::Unexpected(ffi::Error::InvalidArgument(
          std::string(target) + ": the operand is " + describe(in) +
          ", expected float32, bfloat16 or float16"));
  }
}

ffi::Error run_elementwise(const char* target, Elementwise function, ffi::ThreadPool pool,
                           std::int32_t order, const ffi::AnyBuffer& x, ffi::AnyBuffer& y) {
  const ffi::ErrorOr<Call> call = check(target, order, x, y);
  if (call.has_error()) return call.error();
  const ElementwiseFn kernel =
      active_table().elementwise[static_cast<int>(function)][call->dtype][call->order_index];
  const char* in = static_cast<const char*>(x.untyped_data());
  char* out = static_cast<char*>(y.untyped_data());
  const std::size_t count = x.element_count(), size = call->element_size;
  const Stores stores = stores_for(count * size);
  parallel_for(pool, ceil_div(count, kChunkElements), [=](std::size_t chunk) {
    const std::size_t begin = chunk * kChunkElements;
    kernel(in + begin * size, out + begin * size, std::min(kChunkElements, count - begin), stores);
  });
  return ffi::Error::Success();
}

ffi::Error run_softmax(ffi::ThreadPool pool, std::int32_t order, ffi::AnyBuffer x,
                       ffi::Result<ffi::AnyBuffer> y) {
  const ffi::ErrorOr<Call> call = check("quake_jax_softmax", order, x, *y);
  if (call.has_error()) return call.error();
  if (x.dimensions().size() == 0) {
    return ffi::Error::InvalidArgument("quake_jax_softmax: the operand has rank 0, expected 1 or more");
  }
  const std::size_t columns = static_cast<std::size_t>(x.dimensions().back());
  const std::size_t count = x.element_count();
  if (count == 0) return ffi::Error::Success();
  const SoftmaxFn kernel = active_table().softmax[call->dtype][call->order_index];
  const char* in = static_cast<const char*>(x.untyped_data());
  char* out = static_cast<char*>(y->untyped_data());
  const std::size_t rows = count / columns;
  const std::size_t chunk_rows = std::max<std::size_t>(1, kChunkElements / columns);
  const std::size_t row_size = columns * call->element_size;
  const Stores stores = stores_for(rows * row_size);
  parallel_for(pool, ceil_div(rows, chunk_rows), [=](std::size_t chunk) {
    const std::size_t begin = chunk * chunk_rows;
    kernel(in + begin * row_size, out + begin * row_size, std::min(chunk_rows, rows - begin),
           columns, stores);
  });
  return ffi::Error::Success();
}

#define QUAKE_ELEMENTWISE_HANDLER(name, Functor)                                              \
  XLA_FFI_DEFINE_HANDLER(                                                                     \
      k##Functor##Handler,                                                                    \
      [](ffi::ThreadPool pool, std::int32_t order, ffi::AnyBuffer x,                          \
         ffi::Result<ffi::AnyBuffer> y) {                                                     \
        return run_elementwise("quake_jax_" #name, Elementwise::k##Functor, pool, order, x, *y); \
      },                                                                                      \
      ffi::Ffi::Bind()                                                                        \
          .Ctx<ffi::ThreadPool>()                                                             \
          .Attr<std::int32_t>("order")                                                        \
          .Arg<ffi::AnyBuffer>()                                                              \
          .Ret<ffi::AnyBuffer>());
QUAKE_ELEMENTWISE_KERNELS(QUAKE_ELEMENTWISE_HANDLER)
#undef QUAKE_ELEMENTWISE_HANDLER

XLA_FFI_DEFINE_HANDLER(kSoftmaxHandler, run_softmax,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<std::int32_t>("order")
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>());

}  // namespace

std::vector<FfiTarget> ffi_targets() {
  return {
#define QUAKE_TARGET(name, Functor) {"quake_jax_" #name, k##Functor##Handler},
      QUAKE_ELEMENTWISE_KERNELS(QUAKE_TARGET)
#undef QUAKE_TARGET
          {"quake_jax_softmax", kSoftmaxHandler},
  };
}

}  // namespace quake
