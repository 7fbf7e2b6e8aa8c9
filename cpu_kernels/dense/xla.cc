// The FFI handler of dense layers: it decodes and validates XLA's buffers and calls the driver.

#include "dense/xla.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "dense/driver.h"
#include "isa/dispatch.h"
#include "xla/binding.h"
#include "xla/buffers.h"
#include "xla/ffi/api/ffi.h"
#include "xla/pool.h"

namespace quake {
namespace {

using namespace handlers;
using std::size_t;

constexpr const char* kName = "quake_jax_dense";

struct DenseAttributes {
  std::int32_t order, format, group_size, quantized, weights, norm;
  float epsilon;
  std::int32_t has_permutation, has_bias, has_offsets, has_gate, has_gate_bias, has_residual, has_range,
      has_out_range;
  std::string_view activation;
};

// The formats as the attribute counts them.
struct Format {
  DenseFormat plain, quantized;
  ffi::DataType codes;
  std::int64_t of_word;  // the last axis of the codes, 0 for none
};
constexpr Format kFormats[] = {
    {DenseFormat::kFloat32, DenseFormat::kFloat32, ffi::F32, 0},
    {DenseFormat::kBFloat16, DenseFormat::kBFloat16, ffi::BF16, 2},
    {DenseFormat::kInt8, DenseFormat::kInt8Quantized, ffi::S8, 4},
    {DenseFormat::kInt4, DenseFormat::kInt4Quantized, ffi::U8, 4},
};

// A buffer of `1 or stack` times `size` elements; the part of it that belongs to a weight of the stack.
struct Stacked {
  const char* data = nullptr;
  size_t bytes = 0;  // between parts; 0 for one part of all

  template <class T>
  const T* at(size_t i) const {
    return reinterpret_cast<const T*>(data + i * bytes);
  }
};

// Takes the operands in turn. The first failure stays, and what is taken after it is empty.
class Operands {
 public:
  Operands(ffi::RemainingArgs arguments, ffi::RemainingRets results)
      : arguments_(arguments), results_(results) {}

  std::optional<ffi::AnyBuffer> take() {
    if (error) return std::nullopt;
    const auto buffer = arguments_.get<ffi::AnyBuffer>(next_++);
    if (buffer.has_error()) {
      error = buffer.error();
      return std::nullopt;
    }
    if (!is_addressable(*buffer)) {
      error = not_addressable(kName, *buffer);
      return std::nullopt;
    }
    return *buffer;
  }
  // One of shape (1 or stack, …).
  Stacked take_stacked(const char* what, ffi::DataType type, size_t stack, std::vector<std::int64_t> shape) {
    const auto buffer = take();
    if (!buffer) return {};
    const auto dims = buffer->dimensions();
    const bool fits = buffer->element_type() == type && dims.size() == shape.size() + 1 &&
                      (dims[0] == 1 || dims[0] == static_cast<std::int64_t>(stack)) &&
                      std::equal(shape.begin(), shape.end(), dims.begin() + 1);
    if (!fits) {
      std::ostringstream expected;
      expected << type << "[1 or " << stack;
      for (std::int64_t size : shape) expected << "," << size;
      fail(std::string(what) + " " + describe(*buffer) + ", expected " + expected.str() + "]");
      return {};
    }
    return {bytes(*buffer), dims[0] > 1 ? buffer->size_bytes() / static_cast<size_t>(dims[0]) : 0};
  }
  std::optional<ffi::AnyBuffer> take_result() {
    if (error) return std::nullopt;
    auto buffer = results_.get<ffi::AnyBuffer>(next_result_++);
    if (buffer.has_error()) {
      error = buffer.error();
      return std::nullopt;
    }
    if (!is_addressable(**buffer)) {
      error = not_addressable(kName, **buffer);
      return std::nullopt;
    }
    return **buffer;
  }
  void fail(const std::string& problem) {
    if (!error) error = invalid(kName, problem);
  }

  std::optional<ffi::Error> error;

 private:
  ffi::RemainingArgs arguments_;
  ffi::RemainingRets results_;
  size_t next_ = 0, next_result_ = 0;
};

// The arrays of a weight, of which the stack may have several.
struct WeightArrays {
  size_t columns = 0, panels = 0;
  Stacked codes = {}, scales = {}, sums = {}, offsets = {}, bias = {};
};

// The type of x or of a result, which may be codes of a range.
std::optional<DType> dtype_or_codes(ffi::DataType type, bool may_be_codes) {
  return may_be_codes && type == ffi::S8 ? DType::kInt8 : dtype_of(type);
}

// What all weights of a call have in common.
struct Shared {
  size_t stack, size, words, groups;
  const Format* format;
  bool quantized;
};

WeightArrays take_weight(Operands& operands, const DenseAttributes& a, const Shared& s, size_t columns,
                         bool has_bias) {
  WeightArrays w = {.columns = columns, .panels = ceil_div(columns, kPanelColumns)};
  const auto panels = static_cast<std::int64_t>(w.panels), words = static_cast<std::int64_t>(s.words);
  const auto groups = static_cast<std::int64_t>(s.groups);
  constexpr auto kColumns = static_cast<std::int64_t>(kPanelColumns);
  std::vector<std::int64_t> codes = {panels, words, kColumns};
  if (s.format->of_word) codes.push_back(s.format->of_word);
  w.codes = operands.take_stacked("codes", s.format->codes, s.stack, codes);
  const bool integers = s.format->plain == DenseFormat::kInt8 || s.format->plain == DenseFormat::kInt4;
  if (integers && a.group_size) {
    w.scales = operands.take_stacked("scales", ffi::F16, s.stack, {panels, groups, kColumns});
  } else if (integers) {
    w.scales = operands.take_stacked("scales", ffi::F32, s.stack, {panels, kColumns});
    if (s.quantized) w.sums = operands.take_stacked("sums", ffi::S32, s.stack, {panels, kColumns});
  }
  if (a.has_offsets)
    w.offsets = operands.take_stacked("offsets", ffi::F16, s.stack, {panels, groups, kColumns});
  if (has_bias) w.bias = operands.take_stacked("bias", ffi::F32, s.stack, {static_cast<std::int64_t>(columns)});
  return w;
}

DenseWeight weight_at(const WeightArrays& w, const Shared& s, size_t i, const void* table) {
  DenseWeight weight = {.columns = w.columns};
  weight.panels = {.words = w.codes.at<PackedWord>(i),
                   .panel_words = s.words * kPanelColumns,
                   .depth = s.words,
                   .group_words = s.groups ? s.words / s.groups : 0,
                   .scales = s.groups ? w.scales.at<std::uint16_t>(i) : nullptr,
                   .offsets = w.offsets.data ? w.offsets.at<std::uint16_t>(i) : nullptr,
                   .table = table};
  if (!s.groups && w.scales.data) weight.column_scales = w.scales.at<float>(i);
  if (w.sums.data) weight.column_sums = w.sums.at<std::int32_t>(i);
  if (w.bias.data) weight.bias = w.bias.at<float>(i);
  return weight;
}

// What is wrong with the attributes, whatever the operands; empty if nothing is.
std::string check_attributes(const DenseAttributes& a) {
  const auto wrong = [](const char* what, std::int32_t value, const char* expected) {
    return std::string(what) + " is " + std::to_string(value) + ", expected " + expected;
  };
  if (a.order < 1 || a.order > kMaxOrder) return wrong("order", a.order, "1 to 5");
  if (a.format < 0 || a.format >= static_cast<std::int32_t>(std::size(kFormats))) {
    return wrong("format", a.format, "0 to 3");
  }
  if (a.norm < 0 || a.norm > 2) return wrong("norm", a.norm, "0 to 2");
  if (a.weights < 1) return wrong("weights", a.weights, "at least 1");
  if (a.group_size < 0 || a.group_size % 32 != 0) {
    return wrong("group_size", a.group_size, "0 or a multiple of 32");
  }
  const bool integers = a.format >= 2;
  if (!integers && a.group_size) return wrong("group_size", a.group_size, "0 for a format of floats");
  if (!integers && a.quantized) return wrong("quantized", a.quantized, "0 for a format of floats");
  if (a.format == 3 && !a.group_size) return wrong("group_size", a.group_size, "groups for int4");
  if (a.has_offsets && !a.group_size) return wrong("has_offsets", a.has_offsets, "0 without groups");
  if (a.weights > 1 && (a.has_gate || a.has_residual)) {
    return wrong("weights", a.weights, "1 with a gate or a residual");
  }
  if (a.has_gate_bias && !a.has_gate) return wrong("has_gate_bias", a.has_gate_bias, "0 without a gate");
  if (a.has_range && (a.format != 2 || !a.quantized || a.group_size)) {
    return wrong("has_range", a.has_range, "0 unless rows are quantised for int8 without groups");
  }
  if (a.has_out_range && (a.weights > 1 || a.has_residual)) {
    return wrong("has_out_range", a.has_out_range, "0 with several weights or a residual");
  }
  return {};
}

size_t operand_count(const DenseAttributes& a) {
  const size_t scales = a.format >= 2, sums = a.quantized && !a.group_size;
  const size_t of_weight = 1 + scales + sums + (a.has_offsets != 0);
  const size_t before = 1 + (a.has_permutation != 0) + static_cast<size_t>(a.norm == 1 ? 2 : a.norm / 2) +
                        (a.format == 3) + (a.has_range != 0) + (a.has_out_range != 0);
  return before + static_cast<size_t>(a.weights) * (of_weight + (a.has_bias != 0)) +
         (a.has_gate ? of_weight + (a.has_gate_bias != 0) : 0) + (a.has_residual != 0);
}

ffi::Error call_dense(ffi::ThreadPool pool, const DenseAttributes& a, ffi::RemainingArgs arguments,
                      ffi::RemainingRets results) {
  if (const std::string problem = check_attributes(a); !problem.empty()) return invalid(kName, problem);
  if (arguments.size() != operand_count(a) || results.size() != static_cast<size_t>(a.weights)) {
    return invalid(kName, std::to_string(arguments.size()) + " operands and " + std::to_string(results.size()) +
                              " results, expected " + std::to_string(operand_count(a)) + " and " +
                              std::to_string(a.weights));
  }
  Operands operands(arguments, results);
  const auto x = operands.take();
  if (!x) return *operands.error;
  const bool may_be_codes = a.has_range && !a.norm && !a.has_permutation;
  const std::optional<DType> dtype = dtype_or_codes(x->element_type(), may_be_codes);
  if (!dtype || x->dimensions().size() != 3) {
    return invalid(kName, "x " + describe(*x) + ", expected float32, bfloat16 or float16 of rank 3" +
                              (may_be_codes ? ", or int8" : ""));
  }
  const size_t stack = extent(*x, 0), rows = extent(*x, 1), size = extent(*x, 2);
  const Format& format = kFormats[a.format];
  const auto group_size = static_cast<size_t>(a.group_size);
  if (group_size && size % group_size != 0) {
    return invalid(kName, "group_size is " + std::to_string(a.group_size) +
                              ", expected a divisor of the last axis of x " + describe(*x));
  }
  const Shared shared = {stack,
                         size,
                         ceil_div(size, elements_of_word(format.plain)),
                         group_size ? size / group_size : 0,
                         &format,
                         a.quantized != 0};
  const auto k = static_cast<std::int64_t>(size);
  Stacked permutation, norm_scale, norm_offset, table, range, out_range;
  if (a.has_permutation) permutation = operands.take_stacked("permutation", ffi::S32, stack, {k});
  if (a.norm) norm_scale = operands.take_stacked("norm scale", ffi::F32, stack, {k});
  if (a.norm == 1) norm_offset = operands.take_stacked("norm offset", ffi::F32, stack, {k});
  if (a.format == 3) table = operands.take_stacked("table", ffi::F32, stack, {16});
  if (a.has_range) range = operands.take_stacked("range", ffi::F32, stack, {2});
  if (a.has_out_range) out_range = operands.take_stacked("out_range", ffi::F32, stack, {2});

  std::vector<WeightArrays> weights;
  std::vector<ffi::AnyBuffer> out;
  for (std::int32_t i = 0; i < a.weights; ++i) {
    const auto y = operands.take_result();
    if (!y) return *operands.error;
    const auto dims = y->dimensions();
    const bool fits = a.has_out_range ? y->element_type() == ffi::S8 : dtype_of(y->element_type()).has_value();
    if (!fits || dims.size() != 3 || extent(*y, 0) != stack || extent(*y, 1) != rows ||
        y->element_type() != (out.empty() ? *y : out[0]).element_type()) {
      return mismatch(kName, *x, *y,
                      a.has_out_range ? "an int8 result of the same rows"
                                      : "results of the same rows and one floating-point type");
    }
    out.push_back(*y);
    weights.push_back(take_weight(operands, a, shared, extent(*y, 2), a.has_bias != 0));
  }
  std::optional<WeightArrays> gate;
  if (a.has_gate) gate = take_weight(operands, a, shared, extent(out[0], 2), a.has_gate_bias != 0);
  std::optional<ffi::AnyBuffer> residual;
  if (a.has_residual) {
    residual = operands.take();
    if (residual && !same_dimensions(*residual, out[0])) {
      return mismatch(kName, out[0], *residual, "a residual of the result's shape and type");
    }
  }
  if (operands.error) return *operands.error;

  const KernelTable& kernels = active_table();
  DenseProblem p = {.dtype = *dtype,
                    .out_dtype = *dtype_or_codes(out[0].element_type(), a.has_out_range),
                    .format = a.quantized ? format.quantized : format.plain,
                    .rows = rows,
                    .size = size,
                    .x = nullptr,
                    .group_size = group_size};
  if (!a.activation.empty()) {
    p.activation = find_unary(kernels, a.activation, DType::kFloat32, a.order - 1);
    if (!p.activation) return invalid(kName, "activation '" + std::string(a.activation) + "' has no kernel");
  }
  if (size == 0 && rows * stack > 0) return invalid(kName, "the last axis of x " + describe(*x) + " is empty");
  for (size_t i = 0; i < stack; ++i) {
    const size_t x_bytes = rows * size * element_size(p.dtype);
    p.x = bytes(*x) + i * x_bytes;
    Norm norm;
    if (a.norm) {
      norm = {.scale = norm_scale.at<float>(i),
              .offset = a.norm == 1 ? norm_offset.at<float>(i) : nullptr,
              .epsilon = a.epsilon,
              .centered = a.norm == 1};
      p.norm = &norm;
    }
    if (a.has_permutation) p.permutation = permutation.at<std::int32_t>(i);
    if (a.has_range) p.range = range.at<float>(i);
    if (a.has_out_range) p.out_range = out_range.at<float>(i);
    const void* values = nullptr;
    std::int8_t integers[16] = {};
    if (a.format == 3) {
      values = table.at<float>(i);
      if (a.quantized) {
        for (int j = 0; j < 16; ++j) {
          const float value = table.at<float>(i)[j];
          integers[j] = static_cast<std::int8_t>(value > -128 ? (value < 127 ? std::lrint(value) : 127) : -128);
        }
        values = integers;
      }
    }
    p.weights.clear();
    for (size_t w = 0; w < weights.size(); ++w) {
      p.weights.push_back(weight_at(weights[w], shared, i, values));
      const size_t bytes_each = rows * weights[w].columns * element_size(p.out_dtype);
      p.weights.back().out = static_cast<char*>(out[w].untyped_data()) + i * bytes_each;
    }
    DenseWeight gate_weight;
    if (gate) {
      gate_weight = weight_at(*gate, shared, i, values);
      p.gate = &gate_weight;
    }
    if (residual) {
      p.residual = bytes(*residual) + i * rows * weights[0].columns * element_size(p.out_dtype);
    }
    if (ffi::Error error = outcome(kName, run_dense(p, kernels.dense, on_pool(pool))); error.failure())
      return error;
  }
  return ffi::Error::Success();
}

XLA_FFI_Error* dense_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler =
      bind()
          .Attr<std::int32_t>("format")
          .Attr<std::int32_t>("group_size")
          .Attr<std::int32_t>("quantized")
          .Attr<std::int32_t>("weights")
          .Attr<std::int32_t>("norm")
          .Attr<float>("epsilon")
          .Attr<std::int32_t>("has_permutation")
          .Attr<std::int32_t>("has_bias")
          .Attr<std::int32_t>("has_offsets")
          .Attr<std::int32_t>("has_gate")
          .Attr<std::int32_t>("has_gate_bias")
          .Attr<std::int32_t>("has_residual")
          .Attr<std::int32_t>("has_range")
          .Attr<std::int32_t>("has_out_range")
          .Attr<std::string_view>("activation")
          .RemainingArgs()
          .RemainingRets()
          .To([](ffi::ThreadPool pool, std::int32_t order, std::int32_t format, std::int32_t group_size,
                 std::int32_t quantized, std::int32_t weights, std::int32_t norm, float epsilon,
                 std::int32_t has_permutation, std::int32_t has_bias, std::int32_t has_offsets,
                 std::int32_t has_gate, std::int32_t has_gate_bias, std::int32_t has_residual,
                 std::int32_t has_range, std::int32_t has_out_range, std::string_view activation,
                 ffi::RemainingArgs arguments, ffi::RemainingRets results) {
            const DenseAttributes attributes = {order,        format,      group_size,    quantized,
                                                weights,      norm,        epsilon,       has_permutation,
                                                has_bias,     has_offsets, has_gate,      has_gate_bias,
                                                has_residual, has_range,   has_out_range, activation};
            return call_dense(pool, attributes, arguments, results);
          })
          .release();
  return handler->Call(frame);
}

}  // namespace

FfiTargets dense_targets() { return {{kName, dense_handler}}; }

}  // namespace quake
