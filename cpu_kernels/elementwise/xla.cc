// The FFI handlers of element-wise functions: they decode and validate XLA's buffers and call the driver.

#include "elementwise/xla.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "elementwise/driver.h"
#include "isa/dispatch.h"
#include "xla/binding.h"
#include "xla/buffers.h"
#include "xla/ffi/api/ffi.h"
#include "xla/pool.h"

namespace quake {
namespace {

using namespace handlers;

ffi::Error call_unary(const char* target, Unary function, ffi::ThreadPool pool, std::int32_t order,
                      ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  const ffi::ErrorOr<Call> call = check(target, order, x, {&*y});
  if (call.has_error()) return call.error();
  if (!same_dimensions(x, *y)) return mismatch(target, x, *y, "the same shape");
  return outcome(target, run_unary(active_table().elementwise, function, call->dtype, call->order_index,
                                   bytes(x), y->untyped_data(), x.element_count(), on_pool(pool)));
}

ffi::Error call_binary(const char* target, Binary function, const Call& call, ffi::ThreadPool& pool,
                       const BinaryProblem& problem) {
  return outcome(target, run_binary(active_table().elementwise, function, call.dtype, call.order_index, problem,
                                    on_pool(pool)));
}

ffi::Error call_same_shape(const char* target, Binary function, ffi::ThreadPool pool, std::int32_t order,
                           ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> y) {
  const ffi::ErrorOr<Call> call = check(target, order, a, {&b, &*y});
  if (call.has_error()) return call.error();
  if (!same_dimensions(a, b)) return mismatch(target, a, b, "the same shape");
  if (!same_dimensions(a, *y)) return mismatch(target, a, *y, "the same shape");
  return call_binary(target, function, *call, pool,
                     {.a = bytes(a),
                      .b = bytes(b),
                      .a_stride = 0,
                      .b_stride = 0,
                      .out = y->untyped_data(),
                      .rows = 1,
                      .columns = a.element_count()});
}

// Gate and value are the halves of the last axis of x.
ffi::Error call_split(const char* target, Binary function, ffi::ThreadPool pool, std::int32_t order,
                      std::int32_t gate_first, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  const ffi::ErrorOr<Call> call = check(target, order, x, {&*y});
  if (call.has_error()) return call.error();
  const auto from = x.dimensions(), to = y->dimensions();
  const std::size_t rank = from.size();
  if (rank == 0 || to.size() != rank || from.back() != 2 * to.back() ||
      !std::equal(from.begin(), from.end() - 1, to.begin())) {
    return mismatch(target, x, *y, "a result with half of the operand's last axis");
  }
  if (y->element_count() == 0) return ffi::Error::Success();  // its address may be null
  const std::size_t columns = static_cast<std::size_t>(to.back());
  const char* const first = bytes(x);
  const char* const second = first + columns * element_size(call->dtype);
  return call_binary(target, function, *call, pool,
                     {.a = gate_first ? first : second,
                      .b = gate_first ? second : first,
                      .a_stride = 2 * columns,
                      .b_stride = 2 * columns,
                      .out = y->untyped_data(),
                      .rows = y->element_count() / columns,
                      .columns = columns});
}

ffi::Error call_biased(const char* target, Binary function, ffi::ThreadPool pool, std::int32_t order,
                       ffi::AnyBuffer x, ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y) {
  const ffi::ErrorOr<Call> call = check(target, order, x, {&bias, &*y});
  if (call.has_error()) return call.error();
  if (!same_dimensions(x, *y)) return mismatch(target, x, *y, "the same shape");
  if (x.dimensions().size() == 0 || bias.dimensions().size() != 1 ||
      bias.dimensions()[0] != x.dimensions().back()) {
    return mismatch(target, x, bias, "a bias as long as the operand's last axis");
  }
  const std::size_t columns = static_cast<std::size_t>(x.dimensions().back());
  return call_binary(target, function, *call, pool,
                     {.a = bytes(x),
                      .b = bytes(bias),
                      .a_stride = columns,
                      .b_stride = 0,
                      .out = y->untyped_data(),
                      .rows = columns == 0 ? 0 : x.element_count() / columns,
                      .columns = columns});
}

// ---- The handlers: one function per target ----

#define QUAKE_NAME(name, Functor) "quake_jax_" #name,
constexpr const char* kUnaryNames[] = {QUAKE_UNARY_KERNELS(QUAKE_NAME)};
constexpr const char* kBinaryNames[] = {QUAKE_BINARY_KERNELS(QUAKE_NAME)};
#undef QUAKE_NAME
#define QUAKE_SPLIT_NAME(name, Functor) "quake_jax_" #name "_split",
constexpr const char* kSplitNames[] = {QUAKE_GATED_KERNELS(QUAKE_SPLIT_NAME)};
#undef QUAKE_SPLIT_NAME
constexpr int kFirstGated = static_cast<int>(Binary::kGlu);

template <Unary function>
XLA_FFI_Error* unary_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler =
      bind()
          .Arg<ffi::AnyBuffer>()
          .Ret<ffi::AnyBuffer>()
          .To([](auto... arguments) {
            return call_unary(kUnaryNames[static_cast<int>(function)], function, arguments...);
          })
          .release();
  return handler->Call(frame);
}

// The handler of operands of one shape, or of an operand and a bias.
template <Binary function, auto call>
XLA_FFI_Error* binary_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler = bind()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .To([](auto... arguments) {
                               return call(kBinaryNames[static_cast<int>(function)], function, arguments...);
                             })
                             .release();
  return handler->Call(frame);
}

template <Binary function>
XLA_FFI_Error* split_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler =
      bind()
          .Attr<std::int32_t>("gate_first")
          .Arg<ffi::AnyBuffer>()
          .Ret<ffi::AnyBuffer>()
          .To([](auto... arguments) {
            return call_split(kSplitNames[static_cast<int>(function) - kFirstGated], function, arguments...);
          })
          .release();
  return handler->Call(frame);
}

}  // namespace

FfiTargets elementwise_targets() {
#define QUAKE_UNARY(name, Functor) {"quake_jax_" #name, unary_handler<Unary::k##Functor>},
#define QUAKE_SAME_SHAPE(name, Functor) \
  {"quake_jax_" #name, binary_handler<Binary::k##Functor, call_same_shape>},
#define QUAKE_SPLIT(name, Functor) {"quake_jax_" #name "_split", split_handler<Binary::k##Functor>},
#define QUAKE_BIASED(name, Functor) {"quake_jax_" #name, binary_handler<Binary::k##Functor, call_biased>},
  return {
      QUAKE_UNARY_KERNELS(QUAKE_UNARY)        //
      QUAKE_SAME_SHAPE(logaddexp, LogAddExp)  //
      QUAKE_GATED_KERNELS(QUAKE_SAME_SHAPE)   //
      QUAKE_GATED_KERNELS(QUAKE_SPLIT)        //
      QUAKE_BIASED_KERNELS(QUAKE_BIASED)      //
  };
}

}  // namespace quake
