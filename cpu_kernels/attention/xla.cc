// The FFI handlers of fused attention: they decode and validate XLA's buffers and call the driver.

#include "attention/xla.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "attention/driver.h"
#include "isa/dispatch.h"
#include "xla/binding.h"
#include "xla/buffers.h"
#include "xla/ffi/api/ffi.h"
#include "xla/pool.h"

namespace quake {
namespace {

using namespace handlers;

// What the call has beside queries, keys and values; the operands come in this order.
enum AttentionOperand : std::int32_t {
  kHasBias = 1,
  kHasMask = 2,
  kHasQueryLengths = 4,
  kHasKeyLengths = 8,
  kHasQuerySegments = 16,
  kHasKeySegments = 32,
  kHasKeyScales = 64,
  kHasValueScales = 128
};

struct AttentionAttributes {
  std::int32_t order;
  float scale, soft_cap;                              // soft_cap: 0 for none
  std::int32_t is_causal, window_left, window_right;  // windows: negative for no limit
  std::int32_t packed_axis;  // 2 or 3: of the one operand that holds queries, keys and values; else 0
  std::int32_t present;      // a sum of AttentionOperand
  std::int32_t format;       // an AttentionFormat
};

// ---- Operands ----

// Queries, keys or values of shape (batch, time, heads, size).
AttentionProblem::Operand whole_operand(const ffi::AnyBuffer& x) {
  const auto size = static_cast<std::ptrdiff_t>(x.dimensions()[3]);
  const std::ptrdiff_t time = static_cast<std::ptrdiff_t>(x.dimensions()[2]) * size;
  return {x.untyped_data(), static_cast<std::ptrdiff_t>(x.dimensions()[1]) * time, time, size};
}

// One of the three slices of x, of shape (batch, time, 3, heads, size) or (batch, time, heads, 3, size).
AttentionProblem::Operand packed_operand(const ffi::AnyBuffer& x, std::int32_t packed_axis, std::size_t slice,
                                         std::size_t bytes_each) {
  const auto dims = x.dimensions();
  const auto size = static_cast<std::ptrdiff_t>(dims[4]);
  const auto heads = static_cast<std::ptrdiff_t>(packed_axis == 2 ? dims[3] : dims[2]);
  const std::ptrdiff_t time = 3 * heads * size;
  const std::size_t begin = slice * static_cast<std::size_t>(packed_axis == 2 ? heads * size : size);
  // The address of an empty array may be null.
  const char* data = x.element_count() == 0 ? bytes(x) : bytes(x) + begin * bytes_each;
  return {data, static_cast<std::ptrdiff_t>(dims[1]) * time, time, packed_axis == 2 ? size : 3 * size};
}

// The strides of an array of the logits' shape, any of whose axes may have size 1 instead; nothing if it has
// another shape.
std::optional<AttentionProblem::Strides> broadcast_strides(const ffi::AnyBuffer& x, const AttentionProblem& p) {
  const std::size_t full[4] = {p.batch, p.query_heads, p.query_length, p.key_length};
  if (x.dimensions().size() != 4) return std::nullopt;
  std::ptrdiff_t strides[4], stride = 1;
  for (std::size_t i = 4; i-- > 0;) {
    const std::size_t size = extent(x, i);
    if (size != full[i] && size != 1) return std::nullopt;
    strides[i] = size == 1 ? 0 : stride;
    stride *= static_cast<std::ptrdiff_t>(size);
  }
  return AttentionProblem::Strides{strides[0], strides[1], strides[2], strides[3]};
}

// Fills in the queries, keys and values, from one operand or three.
ffi::Error take_operands(const char* target, const AttentionAttributes& attributes,
                         const std::vector<ffi::AnyBuffer>& x, AttentionProblem& p) {
  p.batch = extent(x[0], 0);
  p.query_length = extent(x[0], 1);
  if (attributes.packed_axis != 0) {
    const std::size_t packed = static_cast<std::size_t>(attributes.packed_axis);
    if (extent(x[0], packed) != 3) return invalid(target, describe(x[0]) + ", expected an axis of size 3");
    p.key_length = p.query_length;
    p.query_heads = p.kv_heads = extent(x[0], 5 - packed);
    p.head_size = p.value_size = extent(x[0], 4);
    p.query = packed_operand(x[0], attributes.packed_axis, 0, element_size(p.dtype));
    p.key = packed_operand(x[0], attributes.packed_axis, 1, element_size(p.dtype));
    p.value = packed_operand(x[0], attributes.packed_axis, 2, element_size(p.dtype));
    return ffi::Error::Success();
  }
  p.query_heads = extent(x[0], 2);
  p.head_size = extent(x[0], 3);
  p.key_length = extent(x[1], 1);
  p.kv_heads = extent(x[1], 2);
  p.value_size = extent(x[2], 3);
  if (!has_dimensions(x[1], {p.batch, p.key_length, p.kv_heads, p.head_size})) {
    return mismatch(target, x[0], x[1], "queries and keys with the same batch and head size");
  }
  if (!has_dimensions(x[2], {p.batch, p.key_length, p.kv_heads, p.value_size})) {
    return mismatch(target, x[1], x[2], "keys and values with the same batch, length and heads");
  }
  p.query = whole_operand(x[0]);
  p.key = whole_operand(x[1]);
  p.value = whole_operand(x[2]);
  return ffi::Error::Success();
}

// The operands and results of a call, as many as its attributes say.
struct Buffers {
  std::vector<ffi::AnyBuffer> operands, results;
};

ffi::ErrorOr<Buffers> take_buffers(const char* target, const AttentionAttributes& attributes,
                                   ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  Buffers buffers;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const ffi::ErrorOr<ffi::AnyBuffer> argument = arguments.get<ffi::AnyBuffer>(i);
    if (argument.has_error()) return ffi::Unexpected(argument.error());
    buffers.operands.push_back(*argument);
  }
  std::size_t expected = attributes.packed_axis != 0 ? 1 : 3;
  for (const auto operand : {kHasBias, kHasMask, kHasQueryLengths, kHasKeyLengths, kHasQuerySegments,
                             kHasKeySegments, kHasKeyScales, kHasValueScales}) {
    expected += (attributes.present & operand) != 0;
  }
  if (buffers.operands.size() != expected || results.size() != 2) {
    return ffi::Unexpected(invalid(target, std::to_string(buffers.operands.size()) + " operands and " +
                                               std::to_string(results.size()) + " results, expected " +
                                               std::to_string(expected) + " and 2"));
  }
  for (std::size_t i = 0; i < 2; ++i) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> result = results.get<ffi::AnyBuffer>(i);
    if (result.has_error()) return ffi::Unexpected(result.error());
    buffers.results.push_back(**result);
  }
  return buffers;
}

// ---- Validation; each part fills in its part of the problem ----

// The type of keys and values: that of queries need not be the same. int8 are codes.
ffi::ErrorOr<DType> kv_dtype(const char* target, const AttentionAttributes& attributes,
                             const ffi::AnyBuffer& key, const ffi::AnyBuffer& value) {
  if (key.element_type() != ffi::S8) {
    const ffi::ErrorOr<Call> call = check(target, attributes.order, key, {&value});
    if (call.has_error()) return ffi::Unexpected(call.error());
    return call->dtype;
  }
  if (value.element_type() != ffi::S8) {
    return ffi::Unexpected(mismatch(target, key, value, "the same type"));
  }
  if (!is_addressable(key)) return ffi::Unexpected(not_addressable(target, key));
  if (!is_addressable(value)) return ffi::Unexpected(not_addressable(target, value));
  return DType::kInt8;
}

// Queries, keys and values; returns how many operands those were.
ffi::ErrorOr<std::size_t> decode_operands(const char* target, const AttentionAttributes& attributes,
                                          const Buffers& buffers, AttentionProblem& p) {
  const bool packed = attributes.packed_axis != 0;
  const std::vector<ffi::AnyBuffer>& x = buffers.operands;
  const ffi::AnyBuffer& out = buffers.results[0];
  const ffi::ErrorOr<Call> call = check(target, attributes.order, x[0], {&out});
  if (call.has_error()) return ffi::Unexpected(call.error());
  p.dtype = p.kv_dtype = call->dtype;
  if (!packed) {
    const auto dtype = kv_dtype(target, attributes, x[1], x[2]);
    if (dtype.has_error()) return ffi::Unexpected(dtype.error());
    p.kv_dtype = *dtype;
  }
  const std::size_t count = packed ? 1 : 3, rank = packed ? 5 : 4;
  for (std::size_t i = 0; i < count; ++i) {
    if (x[i].dimensions().size() != rank) {
      return ffi::Unexpected(
          invalid(target, "operand " + describe(x[i]) + ", expected rank " + std::to_string(rank)));
    }
  }
  if (ffi::Error error = take_operands(target, attributes, x, p); error.failure())
    return ffi::Unexpected(error);
  return count;
}

ffi::Error decode_results(const char* target, const Buffers& buffers, AttentionProblem& p) {
  const ffi::AnyBuffer &out = buffers.results[0], &residual = buffers.results[1];
  if (!has_dimensions(out, {p.batch, p.query_length, p.query_heads, p.value_size})) {
    return mismatch(target, buffers.operands[0], out, "a result of shape (batch, queries, heads, value size)");
  }
  if (!is_addressable(residual)) return not_addressable(target, residual);
  if (residual.element_type() != ffi::F32 ||
      !has_dimensions(residual, {p.batch, p.query_length, p.query_heads})) {
    return mismatch(target, out, residual, "a float32 residual of shape (batch, queries, heads)");
  }
  p.out = out.untyped_data();
  p.residual = static_cast<float*>(residual.untyped_data());
  return ffi::Error::Success();
}

ffi::Error decode_bias(const char* target, const AttentionAttributes& attributes, const ffi::AnyBuffer& query,
                       const ffi::AnyBuffer& bias, AttentionProblem& p) {
  const ffi::ErrorOr<Call> type = check(target, attributes.order, bias, {});
  if (type.has_error()) return type.error();
  const auto strides = broadcast_strides(bias, p);
  if (!strides) return mismatch(target, query, bias, "a bias of the logits' shape");
  p.bias = bias.untyped_data();
  p.bias_dtype = type->dtype;
  p.bias_strides = *strides;
  return ffi::Error::Success();
}

ffi::Error decode_mask(const char* target, const ffi::AnyBuffer& query, const ffi::AnyBuffer& mask,
                       AttentionProblem& p) {
  if (!is_addressable(mask)) return not_addressable(target, mask);
  const auto strides = broadcast_strides(mask, p);
  if (mask.element_type() != ffi::PRED || !strides) {
    return mismatch(target, query, mask, "a boolean mask of the logits' shape");
  }
  p.mask = static_cast<const unsigned char*>(mask.untyped_data());
  p.mask_strides = *strides;
  return ffi::Error::Success();
}

// An array of 32-bit elements T.
template <class T>
ffi::Error decode_array(const char* target, const char* what, const ffi::AnyBuffer& buffer,
                        std::initializer_list<std::size_t> dims, const T*& elements) {
  constexpr bool kIntegers = std::is_same_v<T, std::int32_t>;
  if (buffer.element_type() != (kIntegers ? ffi::S32 : ffi::F32) || !has_dimensions(buffer, dims)) {
    std::string expected;
    for (const std::size_t size : dims) expected += (expected.empty() ? "" : ",") + std::to_string(size);
    return invalid(target, what + (" " + describe(buffer)) + ", expected " + (kIntegers ? "int32" : "float32") +
                               "[" + expected + "]");
  }
  elements = static_cast<const T*>(buffer.untyped_data());
  return ffi::Error::Success();
}

// What the call has beside queries, keys and values, from the operand `next` on.
ffi::Error decode_present(const char* target, const AttentionAttributes& attributes,
                          const std::vector<ffi::AnyBuffer>& x, std::size_t next, AttentionProblem& p) {
  if (attributes.present & kHasBias) {
    if (ffi::Error error = decode_bias(target, attributes, x[0], x[next++], p); error.failure()) return error;
  }
  if (attributes.present & kHasMask) {
    if (ffi::Error error = decode_mask(target, x[0], x[next++], p); error.failure()) return error;
  }
  ffi::Error error = ffi::Error::Success();
  const auto take = [&](AttentionOperand operand, const char* what, std::initializer_list<std::size_t> dims,
                        auto& elements) {
    if (error.success() && attributes.present & operand) {
      error = decode_array(target, what, x[next++], dims, elements);
    }
  };
  take(kHasQueryLengths, "lengths", {p.batch}, p.query_lengths);
  take(kHasKeyLengths, "lengths", {p.batch}, p.key_lengths);
  take(kHasQuerySegments, "segments", {p.batch, p.query_length}, p.query_segments);
  take(kHasKeySegments, "segments", {p.batch, p.key_length}, p.key_segments);
  take(kHasKeyScales, "scales", {p.batch, p.kv_heads, p.key_length}, p.key_scales);
  take(kHasValueScales, "scales", {p.batch, p.kv_heads, p.key_length}, p.value_scales);
  return error;
}

ffi::Error call_attention(const char* target, ffi::ThreadPool pool, const AttentionAttributes& attributes,
                          ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  if (attributes.packed_axis != 0 && attributes.packed_axis != 2 && attributes.packed_axis != 3) {
    return invalid(target, "packed_axis is " + std::to_string(attributes.packed_axis) + ", expected 0, 2 or 3");
  }
  if (attributes.format < 0 || attributes.format >= kAttentionProblemFormats) {
    return invalid(target, "format is " + std::to_string(attributes.format) + ", expected 0 to " +
                               std::to_string(kAttentionProblemFormats - 1));
  }
  if (!(attributes.present & kHasQuerySegments) != !(attributes.present & kHasKeySegments)) {
    return invalid(target, "segments of queries or of keys alone");
  }
  const ffi::ErrorOr<Buffers> buffers = take_buffers(target, attributes, arguments, results);
  if (buffers.has_error()) return buffers.error();
  AttentionProblem p;
  p.format = static_cast<AttentionFormat>(attributes.format);
  const ffi::ErrorOr<std::size_t> next = decode_operands(target, attributes, *buffers, p);
  if (next.has_error()) return next.error();
  const std::int32_t scales = attributes.present & (kHasKeyScales | kHasValueScales);
  if (scales != (p.kv_dtype == DType::kInt8 ? kHasKeyScales | kHasValueScales : 0)) {
    return invalid(target, "scales of keys and values belong to int8 alone, which need both");
  }
  if (ffi::Error error = decode_results(target, *buffers, p); error.failure()) return error;
  if (ffi::Error error = decode_present(target, attributes, buffers->operands, *next, p); error.failure()) {
    return error;
  }
  p.scale = attributes.scale;
  p.soft_cap = attributes.soft_cap;
  p.is_causal = attributes.is_causal != 0;
  p.window_left = std::max<std::ptrdiff_t>(attributes.window_left, -1);
  p.window_right = std::max<std::ptrdiff_t>(attributes.window_right, -1);
  return outcome(target, run_attention(p, active_table().attention, attributes.order - 1, on_pool(pool)));
}

// ---- The handler ----

constexpr const char* kAttentionName = "quake_jax_dot_product_attention";

XLA_FFI_Error* attention_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler =
      bind()
          .Attr<float>("scale")
          .Attr<float>("soft_cap")
          .Attr<std::int32_t>("is_causal")
          .Attr<std::int32_t>("window_left")
          .Attr<std::int32_t>("window_right")
          .Attr<std::int32_t>("packed_axis")
          .Attr<std::int32_t>("present")
          .Attr<std::int32_t>("format")
          .RemainingArgs()
          .RemainingRets()
          .To([](ffi::ThreadPool pool, std::int32_t order, float scale, float soft_cap, std::int32_t is_causal,
                 std::int32_t window_left, std::int32_t window_right, std::int32_t packed_axis,
                 std::int32_t present, std::int32_t format, ffi::RemainingArgs arguments,
                 ffi::RemainingRets results) {
            const AttentionAttributes attributes = {order,        scale,       soft_cap, is_causal, window_left,
                                                    window_right, packed_axis, present,  format};
            return call_attention(kAttentionName, pool, attributes, arguments, results);
          })
          .release();
  return handler->Call(frame);
}

}  // namespace

FfiTargets attention_targets() { return {{kAttentionName, attention_handler}}; }

}  // namespace quake
