// The FFI handlers of reductions of an axis and of norms: they decode and validate XLA's buffers and call the
// driver.

#include "rows/xla.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "rows/driver.h"
#include "isa/dispatch.h"
#include "xla/binding.h"
#include "xla/buffers.h"
#include "xla/ffi/api/ffi.h"
#include "xla/pool.h"

namespace quake {
namespace {

using namespace handlers;

ffi::Error check_axis(const char* target, std::int32_t axis, const ffi::AnyBuffer& x, const ffi::AnyBuffer& y,
                      bool removed) {
  const auto from = x.dimensions(), to = y.dimensions();
  const auto rank = static_cast<std::int32_t>(from.size());
  if (axis < 0 || axis >= rank) {
    return invalid(target, "axis is " + std::to_string(axis) + " for " + describe(x) + ", expected 0 to " +
                               std::to_string(rank - 1));
  }
  std::vector<std::int64_t> expected(from.begin(), from.end());
  if (removed) expected.erase(expected.begin() + axis);
  if (!std::ranges::equal(expected, to)) {
    return mismatch(target, x, y, removed ? "a result without the axis" : "the same shape");
  }
  return ffi::Error::Success();
}

ffi::Error call_reduction(const char* target, Reduction reduction, ffi::ThreadPool pool, std::int32_t order,
                          std::int32_t axis, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  const ffi::ErrorOr<Call> call = check(target, order, x, {&*y});
  if (call.has_error()) return call.error();
  const bool removed = reduction == Reduction::kLogSumExp;
  if (ffi::Error error = check_axis(target, axis, x, *y, removed); error.failure()) return error;
  if (x.element_count() == 0) {
    // A result without the axis may have elements all the same: the logarithm of an empty sum.
    if (y->element_count() > 0) return invalid(target, "the axis of " + describe(x) + " is empty");
    return ffi::Error::Success();
  }
  return outcome(target, run_reduction(active_table().rows, reduction, call->dtype, call->order_index,
                                       view_axis(shape(x), static_cast<std::size_t>(axis)), bytes(x),
                                       y->untyped_data(), on_pool(pool)));
}

ffi::Error call_masked(const char* target, Reduction reduction, ffi::ThreadPool pool, std::int32_t order,
                       std::int32_t axis, ffi::AnyBuffer x, ffi::AnyBuffer mask,
                       ffi::Result<ffi::AnyBuffer> y) {
  const ffi::ErrorOr<Call> call = check(target, order, x, {&*y});
  if (call.has_error()) return call.error();
  if (ffi::Error error = check_axis(target, axis, x, *y, false); error.failure()) return error;
  const auto dims = x.dimensions(), mask_dims = mask.dimensions();
  bool fits =
      mask.element_type() == ffi::PRED && mask_dims.size() == dims.size() && mask_dims.back() == dims.back();
  for (std::size_t i = 0; fits && i < dims.size(); ++i) {
    fits = mask_dims[i] == dims[i] || mask_dims[i] == 1;
  }
  if (!fits || axis + 1 != static_cast<std::int32_t>(dims.size())) {
    return mismatch(target, x, mask, "the last axis, and a boolean mask that broadcasts over the others");
  }
  if (x.element_count() == 0) return ffi::Error::Success();
  const MaskedProblem problem = {.in = bytes(x),
                                 .out = y->untyped_data(),
                                 .shape = shape(x),
                                 .mask = static_cast<const unsigned char*>(mask.untyped_data()),
                                 .mask_shape = shape(mask)};
  return outcome(target, run_masked_reduction(active_table().rows, reduction, call->dtype, call->order_index,
                                              problem, on_pool(pool)));
}

// ---- Norms ----

enum class NormForm : int { kLayer, kRms, kLayerResidual, kRmsResidual };
constexpr const char* kNormNames[] = {"quake_jax_layer_norm", "quake_jax_rms_norm",
                                      "quake_jax_layer_norm_residual", "quake_jax_rms_norm_residual"};

// How many groups of rows of x have a scale (or an offset) each: `buffer` has some first axes of x, and the
// last.
ffi::ErrorOr<std::size_t> groups_of(const char* target, const ffi::AnyBuffer& x, const ffi::AnyBuffer& buffer) {
  const auto dims = x.dimensions(), own = buffer.dimensions();
  if (!is_addressable(buffer)) return ffi::Unexpected(not_addressable(target, buffer));
  bool fits = buffer.element_type() == ffi::F32 && dims.size() > 0 && own.size() > 0 &&
              own.size() <= dims.size() && own.back() == dims.back();
  std::size_t groups = 1;
  for (std::size_t i = 0; fits && i + 1 < own.size(); ++i) {
    fits = own[i] == dims[i];
    groups *= static_cast<std::size_t>(own[i]);
  }
  if (!fits) {
    return ffi::Unexpected(mismatch(target, x, buffer, "a float32 one of some first axes and the last one"));
  }
  return groups;
}

ffi::Error call_norm(NormForm form, ffi::ThreadPool pool, float epsilon, ffi::RemainingArgs arguments,
                     ffi::RemainingRets results) {
  const char* const target = kNormNames[static_cast<int>(form)];
  const bool centered = form == NormForm::kLayer || form == NormForm::kLayerResidual;
  const bool summed = form == NormForm::kLayerResidual || form == NormForm::kRmsResidual;
  // x, the residual, scale and offset; the norm and the sum.
  const std::size_t inputs = summed + centered + std::size_t{2}, outputs = summed + std::size_t{1};
  if (arguments.size() != inputs || results.size() != outputs) {
    return invalid(target, std::to_string(arguments.size()) + " operands and " +
                               std::to_string(results.size()) + " results, expected " + std::to_string(inputs) +
                               " and " + std::to_string(outputs));
  }
  std::vector<ffi::AnyBuffer> buffers;
  for (std::size_t i = 0; i < inputs; ++i) {
    const ffi::ErrorOr<ffi::AnyBuffer> argument = arguments.get<ffi::AnyBuffer>(i);
    if (argument.has_error()) return argument.error();
    buffers.push_back(*argument);
  }
  for (std::size_t i = 0; i < outputs; ++i) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> result = results.get<ffi::AnyBuffer>(i);
    if (result.has_error()) return result.error();
    buffers.push_back(**result);
  }
  const ffi::AnyBuffer &x = buffers[0], &scale = buffers[summed + std::size_t{1}], &y = buffers[inputs];
  const ffi::AnyBuffer &residual = buffers[summed], &sum = buffers[inputs + summed];  // x and y without one
  constexpr std::int32_t kAnyOrder = 1;                                               // there is none here
  const ffi::ErrorOr<Call> call = check(target, kAnyOrder, x, {&residual, &y, &sum});
  if (call.has_error()) return call.error();
  for (const ffi::AnyBuffer* other : {&residual, &y, &sum}) {
    if (!same_dimensions(x, *other)) return mismatch(target, x, *other, "the same shape");
  }
  const ffi::ErrorOr<std::size_t> groups = groups_of(target, x, scale);
  if (groups.has_error()) return groups.error();
  const float* offset = nullptr;
  if (centered) {
    const ffi::AnyBuffer& buffer = buffers[inputs - 1];
    if (!same_dimensions(scale, buffer)) return mismatch(target, scale, buffer, "scale and offset alike");
    offset = static_cast<const float*>(buffer.untyped_data());
  }
  if (x.element_count() == 0) return ffi::Error::Success();
  const AxisView view = view_axis(shape(x), x.dimensions().size() - 1);
  const NormProblem problem = {
      .in = bytes(x),
      .residual = summed ? bytes(residual) : nullptr,
      .norm = {static_cast<const float*>(scale.untyped_data()), offset, epsilon, centered},
      .out = y.untyped_data(),
      .sum = summed ? sum.untyped_data() : nullptr,
      .groups = *groups,
      .rows = view.outer / *groups,
      .columns = view.length};
  return outcome(target, run_norm(active_table().rows, call->dtype, problem, on_pool(pool)));
}

// ---- The handlers: one function per target ----

constexpr const char* kReductionNames[] = {"quake_jax_softmax", "quake_jax_log_softmax", "quake_jax_logsumexp"};
constexpr const char* kMaskedNames[] = {"quake_jax_softmax_where", "quake_jax_log_softmax_where"};

template <Reduction reduction>
XLA_FFI_Error* reduction_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler =
      bind()
          .Attr<std::int32_t>("axis")
          .Arg<ffi::AnyBuffer>()
          .Ret<ffi::AnyBuffer>()
          .To([](auto... arguments) {
            return call_reduction(kReductionNames[static_cast<int>(reduction)], reduction, arguments...);
          })
          .release();
  return handler->Call(frame);
}

template <Reduction reduction>
XLA_FFI_Error* masked_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler =
      bind()
          .Attr<std::int32_t>("axis")
          .Arg<ffi::AnyBuffer>()
          .Arg<ffi::AnyBuffer>()
          .Ret<ffi::AnyBuffer>()
          .To([](auto... arguments) {
            return call_masked(kMaskedNames[static_cast<int>(reduction)], reduction, arguments...);
          })
          .release();
  return handler->Call(frame);
}

template <NormForm form>
XLA_FFI_Error* norm_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Attr<float>("epsilon")
                             .RemainingArgs()
                             .RemainingRets()
                             .To([](auto... arguments) { return call_norm(form, arguments...); })
                             .release();
  return handler->Call(frame);
}

}  // namespace

FfiTargets rows_targets() {
  return {
      {kReductionNames[0], reduction_handler<Reduction::kSoftmax>},
      {kReductionNames[1], reduction_handler<Reduction::kLogSoftmax>},
      {kReductionNames[2], reduction_handler<Reduction::kLogSumExp>},
      {kMaskedNames[0], masked_handler<Reduction::kSoftmax>},
      {kMaskedNames[1], masked_handler<Reduction::kLogSoftmax>},
      {kNormNames[0], norm_handler<NormForm::kLayer>},
      {kNormNames[1], norm_handler<NormForm::kRms>},
      {kNormNames[2], norm_handler<NormForm::kLayerResidual>},
      {kNormNames[3], norm_handler<NormForm::kRmsResidual>},
  };
}

}  // namespace quake
