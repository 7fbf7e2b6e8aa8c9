// Calls of handlers as values: what they take and give, run between guard pages, and the same computed by the
// kernels alone.

#ifndef QUAKE_TESTS_XLA_HANDLER_CALLS_H_
#define QUAKE_TESTS_XLA_HANDLER_CALLS_H_

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "attention/driver.h"
#include "targets.h"
#include "tests/dense/calls.h"
#include "tests/xla/fake_xla.h"
#include "tests/harness.h"

namespace quake::tests {

inline constexpr XLA_FFI_DataType kXlaTypes[] = {XLA_FFI_DataType_F32, XLA_FFI_DataType_BF16,
                                                 XLA_FFI_DataType_F16,
                                                 XLA_FFI_DataType_S8};  // in the order of DType

using Dims = std::vector<std::int64_t>;

inline std::size_t count_of(const Dims& dims) {
  std::size_t count = 1;
  for (const std::int64_t size : dims) count *= static_cast<std::size_t>(size);
  return count;
}

inline std::size_t size_of(XLA_FFI_DataType type) {
  switch (type) {
    case XLA_FFI_DataType_PRED:
    case XLA_FFI_DataType_S8:
    case XLA_FFI_DataType_U8:
      return 1;
    case XLA_FFI_DataType_F16:
    case XLA_FFI_DataType_BF16:
      return 2;
    case XLA_FFI_DataType_F64:
    case XLA_FFI_DataType_S64:
      return 8;
    default:
      return 4;
  }
}

struct Operand {
  XLA_FFI_DataType type;
  Dims dims;
  std::vector<char> bytes;
};

struct Result {
  XLA_FFI_DataType type;
  Dims dims;
  std::size_t bytes() const { return count_of(dims) * size_of(type); }
};

struct HandlerCall {
  std::string target;
  std::vector<Attribute> attributes;
  std::vector<Operand> operands;
  std::vector<Result> results;
  // The same by calling kernels directly: operands' and results' data, in order.
  std::function<void(const std::vector<const char*>&, const std::vector<char*>&)> direct;

  void set(const std::string& name, std::int32_t value) {
    for (Attribute& a : attributes) {
      if (a.name == name) a.value = value;
    }
  }
};

inline XLA_FFI_Handler* find_handler(const std::string& target) {
  static const std::vector<FfiTarget> targets = ffi_targets();
  for (const FfiTarget& t : targets) {
    if (target == t.name) return t.handler;
  }
  std::fprintf(stderr, "no target %s\n", target.c_str());
  std::exit(2);
}

// Where a buffer lies between its inaccessible pages.
enum class Place { kStart, kEnd };

struct Outcome {
  std::string error;
  std::vector<std::vector<char>> results;
};

// Every buffer has inaccessible pages of its own on both sides. Results are filled with `fill` before.
inline Outcome run_call(const HandlerCall& call, Pool& pool, Place place, char fill = 0x7f) {
  std::vector<std::unique_ptr<GuardedBuffer>> memory;
  const auto put = [&](std::size_t bytes) {
    memory.emplace_back(new GuardedBuffer(std::max<std::size_t>(bytes, 1)));
    return place == Place::kEnd ? memory.back()->at_end(bytes) : memory.back()->at_start();
  };
  std::vector<Buffer> arguments, results;
  for (const Operand& operand : call.operands) {
    char* data = put(operand.bytes.size());
    std::copy(operand.bytes.begin(), operand.bytes.end(), data);
    arguments.push_back({operand.type, operand.dims, data});
  }
  for (const Result& result : call.results) {
    char* data = put(result.bytes());
    std::fill_n(data, result.bytes(), fill);
    results.push_back({result.type, result.dims, data});
  }
  Outcome outcome;
  outcome.error = call_handler(find_handler(call.target), pool, call.attributes, arguments, results);
  for (std::size_t i = 0; i < results.size(); ++i) {
    const char* data = static_cast<const char*>(results[i].data);
    outcome.results.emplace_back(data, data + call.results[i].bytes());
  }
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::vector<char>& before = call.operands[i].bytes;
    check(std::equal(before.begin(), before.end(), static_cast<const char*>(arguments[i].data)),
          "%s: operand %zu was written to", call.target.c_str(), i);
  }
  return outcome;
}

inline Outcome run_directly(const HandlerCall& call) {
  ScopedFlushDenormals flush;
  Outcome outcome;
  std::vector<const char*> in;
  std::vector<char*> out;
  for (const Operand& operand : call.operands) in.push_back(operand.bytes.data());
  for (const Result& result : call.results) outcome.results.emplace_back(result.bytes());
  for (std::vector<char>& bytes : outcome.results) out.push_back(bytes.data());
  call.direct(in, out);
  return outcome;
}

// ---- Calls of every target; the direct computation runs on one thread, in one piece ----

inline Operand normal_operand(const Storage& storage, Dims dims, std::mt19937& random) {
  std::vector<char> bytes = random_input(storage, count_of(dims), random);
  return {kXlaTypes[static_cast<int>(storage.dtype)], std::move(dims), std::move(bytes)};
}

inline Result result_of(const Storage& storage, Dims dims) {
  return {kXlaTypes[static_cast<int>(storage.dtype)], std::move(dims)};
}

inline HandlerCall elementwise_call(Unary function, const Storage& storage, int order, Dims dims,
                                    std::mt19937& random) {
  constexpr const char* kNames[] = {
#define QUAKE_NAME(name, Functor) "quake_jax_" #name,
      QUAKE_UNARY_KERNELS(QUAKE_NAME)
#undef QUAKE_NAME
  };
  const ElementwiseKernels::UnaryFn kernel =
      active_table().elementwise.unary[static_cast<int>(function)][static_cast<int>(storage.dtype)][order - 1];
  const std::size_t count = count_of(dims);
  return {kNames[static_cast<int>(function)],
          {{"order", order}},
          {normal_operand(storage, dims, random)},
          {result_of(storage, dims)},
          [=](const auto& in, const auto& out) { kernel(in[0], out[0], count, Stores::kCached); }};
}

enum class BinaryForm { kSameShape, kSplit, kBiased };

inline constexpr const char* kBinaryNames[] = {
#define QUAKE_NAME(name, Functor) "quake_jax_" #name,
    QUAKE_BINARY_KERNELS(QUAKE_NAME)
#undef QUAKE_NAME
};

// The forms that a function has a target for.
inline std::vector<BinaryForm> forms_of(Binary function) {
  if (function >= Binary::kBiasSilu) return {BinaryForm::kBiased};
  if (function == Binary::kLogAddExp) return {BinaryForm::kSameShape};
  return {BinaryForm::kSameShape, BinaryForm::kSplit};
}

// `dims` are those of the result.
inline HandlerCall binary_call(Binary function, BinaryForm form, bool gate_first, const Storage& storage,
                               int order, const Dims& dims, std::mt19937& random) {
  const ElementwiseKernels::BinaryFn kernel =
      active_table().elementwise.binary[static_cast<int>(function)][static_cast<int>(storage.dtype)][order - 1];
  const std::size_t columns = static_cast<std::size_t>(dims.back()), count = count_of(dims);
  const std::size_t rows = columns == 0 ? 0 : count / columns, row = columns * storage.size;
  HandlerCall call;
  call.target = kBinaryNames[static_cast<int>(function)];
  call.attributes = {{"order", order}};
  call.results = {result_of(storage, dims)};
  if (form == BinaryForm::kSplit) {
    call.target += "_split";
    call.attributes.push_back({"gate_first", static_cast<std::int32_t>(gate_first)});
    Dims wide = dims;
    wide.back() *= 2;
    call.operands = {normal_operand(storage, wide, random)};
    call.direct = [=](const auto& in, const auto& out) {
      const char* halves[] = {in[0], in[0] + row};
      kernel(halves[!gate_first], 2 * columns, halves[gate_first], 2 * columns, out[0], rows, columns,
             Stores::kCached);
    };
    return call;
  }
  const bool biased = form == BinaryForm::kBiased;
  call.operands = {normal_operand(storage, dims, random),
                   normal_operand(storage, biased ? Dims{dims.back()} : dims, random)};
  call.direct = [=](const auto& in, const auto& out) {
    kernel(in[0], columns, in[1], biased ? 0 : columns, out[0], rows, columns, Stores::kCached);
  };
  return call;
}

inline HandlerCall reduction_call(Reduction reduction, const Storage& storage, int order, const Dims& dims,
                                  int axis, std::mt19937& random) {
  constexpr const char* kNames[] = {"quake_jax_softmax", "quake_jax_log_softmax", "quake_jax_logsumexp"};
  const int r = static_cast<int>(reduction), d = static_cast<int>(storage.dtype);
  const bool removed = reduction == Reduction::kLogSumExp;
  std::size_t outer = 1, inner = 1;
  for (int i = 0; i < static_cast<int>(dims.size()); ++i) {
    if (i < axis) outer *= static_cast<std::size_t>(dims[static_cast<std::size_t>(i)]);
    if (i > axis) inner *= static_cast<std::size_t>(dims[static_cast<std::size_t>(i)]);
  }
  const std::size_t length = static_cast<std::size_t>(dims[static_cast<std::size_t>(axis)]);
  const std::size_t size = storage.size;
  const RowKernels::RowsFn rows = active_table().rows.rows[r][d][order - 1];
  const RowKernels::ColumnsFn columns = active_table().rows.columns[r][d][order - 1];
  Dims to = dims;
  if (removed) to.erase(to.begin() + axis);
  return {kNames[r],
          {{"order", order}, {"axis", axis}},
          {normal_operand(storage, dims, random)},
          {result_of(storage, to)},
          [=](const auto& in, const auto& out) {
            if (inner == 1) {
              rows(in[0], out[0], outer, length, Stores::kCached);
              return;
            }
            for (std::size_t i = 0; i < outer; ++i) {
              columns(in[0] + i * length * inner * size, out[0] + i * (removed ? 1 : length) * inner * size,
                      length, inner, inner);
            }
          }};
}

inline Operand mask_operand(Dims dims, std::mt19937& random) {
  std::vector<char> bytes(count_of(dims));
  for (char& byte : bytes) byte = random() % 3 != 0;
  return {XLA_FFI_DataType_PRED, std::move(dims), std::move(bytes)};
}

// Over the last axis. `mask_dims` may have 1 in place of others.
inline HandlerCall masked_call(Reduction reduction, const Storage& storage, int order, const Dims& dims,
                               const Dims& mask_dims, std::mt19937& random) {
  constexpr const char* kNames[] = {"quake_jax_softmax_where", "quake_jax_log_softmax_where"};
  const int r = static_cast<int>(reduction);
  const RowKernels::MaskedFn kernel = active_table().rows.masked[r][static_cast<int>(storage.dtype)][order - 1];
  const std::size_t columns = static_cast<std::size_t>(dims.back());
  const std::size_t row = columns * storage.size;
  return {kNames[r],
          {{"order", order}, {"axis", static_cast<std::int32_t>(dims.size()) - 1}},
          {normal_operand(storage, dims, random), mask_operand(mask_dims, random)},
          {result_of(storage, dims)},
          [=](const auto& in, const auto& out) {
            // The mask row of a row, from the indices of the axes.
            const std::size_t rows = columns == 0 ? 0 : count_of(dims) / columns;
            for (std::size_t i = 0; i < rows; ++i) {
              std::size_t left = i, stride = columns, offset = 0;
              for (std::size_t axis = dims.size() - 1; axis-- > 0;) {
                const std::size_t index = left % static_cast<std::size_t>(dims[axis]);
                left /= static_cast<std::size_t>(dims[axis]);
                if (mask_dims[axis] != 1) offset += index * stride;
                stride *= static_cast<std::size_t>(mask_dims[axis]);
              }
              kernel(in[0] + i * row, reinterpret_cast<const unsigned char*>(in[1]), &offset, out[0] + i * row,
                     1, columns);
            }
          }};
}

// A norm of the rows of x (with `residual`, of its sum with another array); a scale and, in layer norm, an
// offset for each index of the first `own_axes` axes.
inline HandlerCall norm_call(bool centered, bool residual, const Storage& storage, const Dims& dims,
                             std::size_t own_axes, std::mt19937& random) {
  const RowKernels::NormFn kernel = active_table().rows.norm[static_cast<int>(storage.dtype)];
  Dims own(dims.begin(), dims.begin() + static_cast<std::ptrdiff_t>(own_axes));
  const std::size_t groups = count_of(own), columns = static_cast<std::size_t>(dims.back());
  own.push_back(dims.back());
  HandlerCall call;
  call.target = centered ? "quake_jax_layer_norm" : "quake_jax_rms_norm";
  if (residual) call.target += "_residual";
  call.attributes = {{"epsilon", 1e-5f}};
  for (int i = 0; i <= residual; ++i) {
    call.operands.push_back(normal_operand(storage, dims, random));
    call.results.push_back(result_of(storage, dims));
  }
  for (int i = 0; i <= centered; ++i) call.operands.push_back(normal_operand(kStorage[0], own, random));
  call.direct = [=, count = count_of(dims), size = storage.size](const auto& in, const auto& out) {
    const auto* const scale = reinterpret_cast<const float*>(in[residual + std::size_t{1}]);
    const auto* const offset = centered ? reinterpret_cast<const float*>(in.back()) : nullptr;
    for (std::size_t i = 0; count != 0 && i < groups; ++i) {
      const std::size_t at = i * (count / groups) * size;
      kernel(in[0] + at, residual ? in[1] + at : nullptr,
             {scale + i * columns, centered ? offset + i * columns : nullptr, 1e-5f, centered}, out[0] + at,
             residual ? out[1] + at : nullptr, count / groups / columns, columns, Stores::kCached);
    }
  };
  return call;
}

struct AttentionShape {
  std::int64_t batch = 1, query_length = 1, key_length = 1, heads = 1, kv_heads = 1, head_size = 1,
               value_size = 1;
  int packed_axis = 0;  // then key_length, kv_heads and value_size are those of the queries
  bool bias = false, mask = false, query_lengths = false, key_lengths = false, segments = false;
  const Storage* stored = nullptr;  // of keys and values, or null: the type of the queries
  bool codes = false;               // they are int8
  const Storage* bias_storage = &kStorage[0];
  unsigned bias_broadcast = 0, mask_broadcast = 0;  // bits: batch, head, query, key
  bool is_causal = false;
  int window_left = -1, window_right = -1;
  float soft_cap = 0;
  AttentionFormat format = AttentionFormat::kFloat32;
};

inline Dims broadcast_dims(const AttentionShape& s, unsigned broadcast) {
  Dims dims = {s.batch, s.heads, s.query_length, s.key_length};
  for (std::size_t i = 0; i < 4; ++i) {
    if (broadcast >> i & 1) dims[i] = 1;
  }
  return dims;
}

inline AttentionProblem::Strides broadcast_strides(const Dims& dims) {
  std::ptrdiff_t strides[4], next = 1;
  for (std::size_t i = 4; i-- > 0;) {
    strides[i] = dims[i] == 1 ? 0 : next;
    next *= dims[i];
  }
  return {strides[0], strides[1], strides[2], strides[3]};
}

inline Operand lengths_operand(std::int64_t batch, std::int64_t length, std::mt19937& random) {
  std::vector<char> bytes(static_cast<std::size_t>(batch) * 4);
  for (std::size_t i = 0; i < static_cast<std::size_t>(batch); ++i) {
    const auto value = static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(length + 3)) - 1;
    std::memcpy(bytes.data() + 4 * i, &value, 4);
  }
  return {XLA_FFI_DataType_S32, {batch}, std::move(bytes)};
}

// Texts of a few tokens, one behind the other.
inline Operand segments_operand(std::int64_t batch, std::int64_t length, std::mt19937& random) {
  std::vector<char> bytes(static_cast<std::size_t>(batch * length) * 4);
  std::int32_t segment = -1;
  for (std::size_t i = 0; i < static_cast<std::size_t>(batch * length); ++i) {
    segment = i % static_cast<std::size_t>(length) == 0 ? -1 : segment + (random() % 16 == 0);
    std::memcpy(bytes.data() + 4 * i, &segment, 4);
  }
  return {XLA_FFI_DataType_S32, {batch, length}, std::move(bytes)};
}

inline Operand codes_operand(const Dims& dims, std::mt19937& random) {
  std::vector<char> bytes(count_of(dims));
  for (char& byte : bytes) byte = static_cast<char>(static_cast<int>(random() % 255) - 127);
  return {XLA_FFI_DataType_S8, dims, std::move(bytes)};
}

inline AttentionProblem problem_of(const AttentionShape& s, const Storage& storage,
                                   const std::vector<const char*>& in, const std::vector<char*>& out) {
  AttentionProblem p;
  p.dtype = storage.dtype;
  p.kv_dtype = s.codes ? DType::kInt8 : s.stored ? s.stored->dtype : storage.dtype;
  p.format = s.format;
  p.batch = static_cast<std::size_t>(s.batch);
  p.query_length = static_cast<std::size_t>(s.query_length);
  p.key_length = static_cast<std::size_t>(s.key_length);
  p.query_heads = static_cast<std::size_t>(s.heads);
  p.kv_heads = static_cast<std::size_t>(s.kv_heads);
  p.head_size = static_cast<std::size_t>(s.head_size);
  p.value_size = static_cast<std::size_t>(s.value_size);
  std::size_t next = 3;
  if (s.packed_axis != 0) {
    next = 1;
    const std::ptrdiff_t time = 3 * s.heads * s.head_size;
    const std::ptrdiff_t slice = s.packed_axis == 2 ? s.heads * s.head_size : s.head_size;
    const std::ptrdiff_t head = s.packed_axis == 2 ? s.head_size : 3 * s.head_size;
    AttentionProblem::Operand* const operands[] = {&p.query, &p.key, &p.value};
    for (std::ptrdiff_t i = 0; i < 3; ++i) {
      // Without elements there is no memory, and no offset into it.
      const std::ptrdiff_t offset =
          in[0] == nullptr ? 0 : i * slice * static_cast<std::ptrdiff_t>(storage.size);
      *operands[i] = {in[0] + offset, s.query_length * time, time, head};
    }
  } else {
    const auto whole = [](const char* data, std::int64_t time, std::int64_t heads, std::int64_t size) {
      return AttentionProblem::Operand{data, time * heads * size, heads * size, size};
    };
    p.query = whole(in[0], s.query_length, s.heads, s.head_size);
    p.key = whole(in[1], s.key_length, s.kv_heads, s.head_size);
    p.value = whole(in[2], s.key_length, s.kv_heads, s.value_size);
  }
  if (s.bias) {
    p.bias = in[next++];
    p.bias_dtype = s.bias_storage->dtype;
    p.bias_strides = broadcast_strides(broadcast_dims(s, s.bias_broadcast));
  }
  if (s.mask) {
    p.mask = reinterpret_cast<const unsigned char*>(in[next++]);
    p.mask_strides = broadcast_strides(broadcast_dims(s, s.mask_broadcast));
  }
  if (s.query_lengths) p.query_lengths = reinterpret_cast<const std::int32_t*>(in[next++]);
  if (s.key_lengths) p.key_lengths = reinterpret_cast<const std::int32_t*>(in[next++]);
  if (s.segments) {
    p.query_segments = reinterpret_cast<const std::int32_t*>(in[next++]);
    p.key_segments = reinterpret_cast<const std::int32_t*>(in[next++]);
  }
  if (s.codes) {
    p.key_scales = reinterpret_cast<const float*>(in[next++]);
    p.value_scales = reinterpret_cast<const float*>(in[next++]);
  }
  p.out = out[0];
  p.residual = reinterpret_cast<float*>(out[1]);
  p.scale = 0.25f;
  p.soft_cap = s.soft_cap;
  p.is_causal = s.is_causal;
  p.window_left = s.window_left;
  p.window_right = s.window_right;
  return p;
}

inline HandlerCall attention_call(const AttentionShape& s, const Storage& storage, int order,
                                  std::mt19937& random) {
  HandlerCall call;
  call.target = "quake_jax_dot_product_attention";
  if (s.packed_axis == 2) {
    call.operands = {normal_operand(storage, {s.batch, s.query_length, 3, s.heads, s.head_size}, random)};
  } else if (s.packed_axis == 3) {
    call.operands = {normal_operand(storage, {s.batch, s.query_length, s.heads, 3, s.head_size}, random)};
  } else {
    call.operands = {normal_operand(storage, {s.batch, s.query_length, s.heads, s.head_size}, random)};
    for (const std::int64_t size : {s.head_size, s.value_size}) {
      const Dims dims = {s.batch, s.key_length, s.kv_heads, size};
      call.operands.push_back(s.codes ? codes_operand(dims, random)
                                      : normal_operand(s.stored ? *s.stored : storage, dims, random));
    }
  }
  if (s.bias) {
    call.operands.push_back(normal_operand(*s.bias_storage, broadcast_dims(s, s.bias_broadcast), random));
  }
  if (s.mask) call.operands.push_back(mask_operand(broadcast_dims(s, s.mask_broadcast), random));
  if (s.query_lengths) call.operands.push_back(lengths_operand(s.batch, s.query_length, random));
  if (s.key_lengths) call.operands.push_back(lengths_operand(s.batch, s.key_length, random));
  if (s.segments) {
    call.operands.push_back(segments_operand(s.batch, s.query_length, random));
    call.operands.push_back(segments_operand(s.batch, s.key_length, random));
  }
  for (int i = 0; i < 2 * s.codes; ++i) {
    call.operands.push_back(normal_operand(kStorage[0], {s.batch, s.kv_heads, s.key_length}, random));
  }
  const std::int32_t present = s.bias + 2 * s.mask + 4 * s.query_lengths + 8 * s.key_lengths +
                               (16 + 32) * s.segments + (64 + 128) * s.codes;
  call.attributes = {{"order", order},
                     {"scale", 0.25f},
                     {"soft_cap", s.soft_cap},
                     {"is_causal", static_cast<std::int32_t>(s.is_causal)},
                     {"window_left", s.window_left},
                     {"window_right", s.window_right},
                     {"packed_axis", s.packed_axis},
                     {"present", present},
                     {"format", static_cast<std::int32_t>(s.format)}};
  call.results = {result_of(storage, {s.batch, s.query_length, s.heads, s.value_size}),
                  {XLA_FFI_DataType_F32, {s.batch, s.query_length, s.heads}}};
  call.direct = [=](const auto& in, const auto& out) {
    const AttentionProblem p = problem_of(s, storage, in, out);
    const char* error =
        run_attention(p, active_table().attention, order - 1, [](std::size_t tasks, const auto& body) {
          for (std::size_t i = 0; i < tasks; ++i) body(i);
        });
    check(error == nullptr, "attention: %s", error);
  };
  return call;
}

// `stack` calls at once: x, the residual and the results have an axis of as many, and so have the other
// operands, if they are not `shared` by all.
inline HandlerCall dense_call(const DenseShape& s, std::int64_t stack, bool shared, std::mt19937& random) {
  constexpr XLA_FFI_DataType kTypes[] = {XLA_FFI_DataType_F32, XLA_FFI_DataType_BF16, XLA_FFI_DataType_F16,
                                         XLA_FFI_DataType_S8,  XLA_FFI_DataType_U8,   XLA_FFI_DataType_S32};
  HandlerCall call;
  call.target = "quake_jax_dense";
  const auto flag = [](bool has) { return static_cast<std::int32_t>(has); };
  const std::int32_t format = s.is_int4() ? 3 : s.is_int8() ? 2 : static_cast<std::int32_t>(s.format);
  call.attributes = {{"order", s.order},
                     {"format", format},
                     {"group_size", static_cast<std::int32_t>(s.group_size)},
                     {"quantized", flag(s.quantized())},
                     {"weights", static_cast<std::int32_t>(s.columns.size())},
                     {"norm", static_cast<std::int32_t>(s.norm)},
                     {"epsilon", kDenseEpsilon},
                     {"has_permutation", flag(s.permutation)},
                     {"has_bias", flag(s.bias)},
                     {"has_offsets", flag(s.offsets)},
                     {"has_gate", flag(s.gate)},
                     {"has_gate_bias", flag(s.gate_bias)},
                     {"has_residual", flag(s.residual)},
                     {"has_range", flag(s.range)},
                     {"has_out_range", flag(s.out_range())},
                     {"activation", std::string(s.activation ? "silu" : "")}};
  const auto each = [](const DenseArray& array) {
    return std::strcmp(array.what, "x") == 0 || std::strcmp(array.what, "residual") == 0;
  };
  for (std::int64_t i = 0; i == 0 || i < stack; ++i) {
    const std::vector<DenseArray> arrays = random_operands(s, random);
    for (std::size_t a = 0; a < arrays.size(); ++a) {
      const DenseArray& array = arrays[a];
      if (i == 0) {
        Dims dims = {shared && !each(array) ? 1 : stack};
        for (const std::size_t size : array.dims) dims.push_back(static_cast<std::int64_t>(size));
        call.operands.push_back({kTypes[array.type], std::move(dims), {}});
      }
      Operand& operand = call.operands[a];
      if (i < operand.dims[0])
        operand.bytes.insert(operand.bytes.end(), array.bytes.begin(), array.bytes.end());
    }
  }
  for (const std::size_t columns : s.columns) {
    call.results.push_back(
        result_of(*s.out, {stack, static_cast<std::int64_t>(s.rows), static_cast<std::int64_t>(columns)}));
  }
  return call;
}

// The buffers of call `i` of the stack.
template <class Buffer, class Pointer>
std::vector<Pointer> dense_slices(const std::vector<Buffer>& buffers, const std::vector<Pointer>& data,
                                  std::int64_t i) {
  std::vector<Pointer> slices;
  for (std::size_t b = 0; b < buffers.size(); ++b) {
    const Dims one(buffers[b].dims.begin() + 1, buffers[b].dims.end());
    const bool moves = buffers[b].dims[0] > 1;
    slices.push_back(data[b] +
                     (moves ? static_cast<std::size_t>(i) * count_of(one) * size_of(buffers[b].type) : 0));
  }
  return slices;
}

inline HandlerCall with_direct_dense(HandlerCall call, const DenseShape& s, std::int64_t stack) {
  call.direct = [=, operands = call.operands, results = call.results](const auto& in, const auto& out) {
    for (std::int64_t i = 0; i < stack; ++i) {
      const char* error = run_dense(s, active_table(), dense_slices(operands, in, i),
                                    dense_slices(results, out, i), [](std::size_t tasks, const auto& body) {
                                      for (std::size_t task = 0; task < tasks; ++task) body(task);
                                    });
      check(error == nullptr, "dense: %s", error);
    }
  };
  return call;
}

}  // namespace quake::tests

#endif  // QUAKE_TESTS_XLA_HANDLER_CALLS_H_
