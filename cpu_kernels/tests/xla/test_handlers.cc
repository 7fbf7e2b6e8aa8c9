// The FFI handlers without XLA: valid calls give what the kernels give, whatever the pool and the placement;
// wrong ones give an error that names what is wrong; sizes that overflow are refused; threads share a pool.

#include <sys/mman.h>

#include "tests/xla/handler_calls.h"

namespace quake::tests {
namespace {

constexpr std::int64_t kHuge = std::int64_t{1} << 40;

// ---- Valid calls ----

// Every format, with and without everything that a layer may have.
std::vector<DenseShape> dense_shapes(const Storage& storage) {
  std::vector<DenseShape> shapes;
  for (const DenseFormat format :
       {DenseFormat::kFloat32, DenseFormat::kBFloat16, DenseFormat::kInt8, DenseFormat::kInt8Quantized,
        DenseFormat::kInt4, DenseFormat::kInt4Quantized}) {
    DenseShape s = {.format = format, .size = 96, .columns = {35}, .in = &storage};
    if (s.is_int4()) s.group_size = 32;
    s.columns.push_back(3);
    shapes.push_back(s);
    if (s.is_int8()) s.group_size = 48 * 2;
    s.offsets = s.group_size != 0;
    s.columns = {40};
    s.norm = s.quantized() ? DenseNorm::kRms : DenseNorm::kLayer;
    s.permutation = s.bias = s.gate = s.gate_bias = s.residual = s.activation = true;
    s.out = &kStorage[(static_cast<std::size_t>(format) + static_cast<std::size_t>(storage.dtype)) % 3];
    shapes.push_back(s);
    s.residual = false;
    s.out = &kCodeStorage;
    shapes.push_back(s);
  }
  // With a range: of floats, and of codes.
  DenseShape s = {.format = DenseFormat::kInt8Quantized, .size = 96, .columns = {35, 3}, .range = true};
  for (const Storage* in : {&storage, &kCodeStorage}) {
    s.in = in;
    shapes.push_back(s);
  }
  s.columns = {40};
  s.out = &kCodeStorage;
  shapes.push_back(s);
  s.in = &storage;
  s.norm = DenseNorm::kLayer;
  s.permutation = s.bias = s.gate = s.gate_bias = s.activation = true;
  shapes.push_back(s);
  return shapes;
}

// Every target, in shapes of less than a chunk of the handlers' work and of several.
std::vector<HandlerCall> valid_calls(bool large) {
  std::mt19937 random(1);
  std::vector<HandlerCall> calls;
  for (const Storage& storage : kStorage) {
    const int order = 1 + static_cast<int>(calls.size() % 5);
    const Dims flat = large ? Dims{3, 70001} : Dims{3, 71};
    for (int f = 0; f < static_cast<int>(Unary::kCount); ++f) {
      calls.push_back(elementwise_call(static_cast<Unary>(f), storage, 1 + f % 5, flat, random));
    }
    for (int f = 0; f < static_cast<int>(Binary::kCount); ++f) {
      for (const BinaryForm form : forms_of(static_cast<Binary>(f))) {
        for (const bool gate_first : {false, true}) {
          calls.push_back(
              binary_call(static_cast<Binary>(f), form, gate_first, storage, 1 + f % 5, flat, random));
        }
      }
    }
    for (const Reduction r : {Reduction::kSoftmax, Reduction::kLogSoftmax, Reduction::kLogSumExp}) {
      calls.push_back(reduction_call(r, storage, order, large ? Dims{300, 2, 333} : Dims{5, 2, 33}, 2, random));
      calls.push_back(reduction_call(r, storage, order, large ? Dims{2, 70, 1500} : Dims{2, 7, 37}, 1, random));
      calls.push_back(reduction_call(r, storage, order, large ? Dims{900, 150} : Dims{9, 15}, 0, random));
    }
    for (const Reduction r : {Reduction::kSoftmax, Reduction::kLogSoftmax}) {
      const std::int64_t rows = large ? 170 : 5;
      calls.push_back(masked_call(r, storage, order, {2, rows, 3, 133}, {2, 1, 3, 133}, random));
      calls.push_back(masked_call(r, storage, order, {2, rows, 3, 133}, {1, rows, 1, 133}, random));
      calls.push_back(masked_call(r, storage, order, {rows, 133}, {rows, 133}, random));
    }
    for (const bool centered : {false, true}) {
      for (const bool residual : {false, true}) {
        const std::int64_t rows = large ? 500 : 5;
        calls.push_back(norm_call(centered, residual, storage, {rows, 301}, 0, random));
        calls.push_back(norm_call(centered, residual, storage, {3, rows, 97}, 1, random));
        calls.push_back(norm_call(centered, residual, storage, {rows, 3, 33}, 2, random));
      }
    }
    const std::int64_t time = large ? 90 : 11;
    const auto add = [&](const AttentionShape& shape) {
      calls.push_back(attention_call(shape, storage, order, random));
    };
    add({.batch = 2,
         .query_length = time,
         .key_length = time + 40,
         .heads = 4,
         .kv_heads = 2,
         .head_size = 16,
         .value_size = 24,
         .bias = true,
         .mask = true,
         .query_lengths = true,
         .key_lengths = true,
         .segments = true,
         .bias_storage = &kStorage[2],
         .bias_broadcast = 1,
         .mask_broadcast = 2});
    for (const int axis : {2, 3}) {
      add({.batch = 2,
           .query_length = time,
           .key_length = time,
           .heads = 3,
           .kv_heads = 3,
           .head_size = 17,
           .value_size = 17,
           .packed_axis = axis,
           .is_causal = axis == 2,
           .window_left = axis == 3 ? 7 : -1,
           .window_right = axis == 3 ? 2 : -1,
           .soft_cap = axis == 3 ? 3.0f : 0.0f});
    }
    // Decoding: few queries, keys in several splits.
    add({.batch = 2,
         .query_length = 1,
         .key_length = large ? 3000 : 30,
         .heads = 4,
         .kv_heads = 4,
         .head_size = 24,
         .value_size = 8,
         .key_lengths = true});
    // Keys and values of another type.
    for (const std::int64_t queries : {std::int64_t{1}, time}) {
      AttentionShape cached = {.batch = 2,
                               .query_length = queries,
                               .key_length = large ? 3000 : 30,
                               .heads = 4,
                               .kv_heads = 2,
                               .head_size = 24,
                               .value_size = 8,
                               .key_lengths = true,
                               .stored = &kStorage[1]};
      add(cached);
      cached.codes = true;
      add(cached);
    }
    for (DenseShape& shape : dense_shapes(storage)) {
      shape.rows = large ? 61 : 5;
      if (large) shape.columns[0] = 400;
      shape.order = order;
      for (const std::int64_t stack : {1, 3}) {
        for (const bool shared : {false, true}) {
          if (stack == 1 && shared) continue;
          calls.push_back(with_direct_dense(dense_call(shape, stack, shared, random), shape, stack));
        }
      }
    }
  }
  return calls;
}

void test_valid_calls() {
  Pool one(1), two(2), eight(8), held(4, Pool::Tasks::kHeld), refused(4, Pool::Tasks::kRefused);
  for (const bool large : {false, true}) {
    if (large && thin) continue;
    for (const HandlerCall& call : valid_calls(large)) {
      const std::vector<std::vector<char>> expected = run_directly(call).results;
      for (Pool* pool : {&one, &two, &eight, &held, &refused}) {
        const Place place = pool == &one || pool == &eight ? Place::kStart : Place::kEnd;
        const Outcome outcome = run_call(call, *pool, place);
        check(outcome.error.empty(), "%s: %s", call.target.c_str(), outcome.error.c_str());
        check(outcome.results == expected, "%s, %s: not what the kernel gives, with %d threads",
              call.target.c_str(), large ? "large" : "small", static_cast<int>(pool->size()));
      }
    }
  }
}

// In place: XLA gives a result the memory of an operand.
void test_in_place() {
  std::mt19937 random(3);
  Pool pool(2);
  for (const Storage& storage : kStorage) {
    const HandlerCall calls[] = {
        elementwise_call(Unary::kSilu, storage, 3, {3, 50001}, random),
        reduction_call(Reduction::kSoftmax, storage, 4, {500, 301}, 1, random),
        reduction_call(Reduction::kLogSoftmax, storage, 4, {301, 500}, 0, random),
        masked_call(Reduction::kSoftmax, storage, 2, {500, 301}, {1, 301}, random),
        norm_call(true, false, storage, {500, 301}, 0, random),
        norm_call(false, false, storage, {500, 301}, 1, random),
        binary_call(Binary::kLogAddExp, BinaryForm::kSameShape, false, storage, 5, {150001}, random),
        binary_call(Binary::kBiasGeluErf, BinaryForm::kBiased, false, storage, 5, {300, 501}, random),
    };
    for (const HandlerCall& call : calls) {
      std::vector<std::vector<char>> memory;
      std::vector<Buffer> arguments;
      for (const Operand& operand : call.operands) memory.push_back(operand.bytes);
      for (std::size_t i = 0; i < memory.size(); ++i) {
        arguments.push_back({call.operands[i].type, call.operands[i].dims, memory[i].data()});
      }
      const std::string error = call_handler(find_handler(call.target), pool, call.attributes, arguments,
                                             {{call.results[0].type, call.results[0].dims, memory[0].data()}});
      check(error.empty() && memory[0] == run_directly(call).results[0], "%s in place: %s", call.target.c_str(),
            error.c_str());
    }
  }
}

// ---- Wrong calls ----

struct Wrong {
  HandlerCall call;
  std::string expected;  // a part of the message
};

void check_wrong(const Wrong& wrong) {
  static Pool pool(2);
  const Outcome outcome = run_call(wrong.call, pool, Place::kEnd);
  check(outcome.error.find(wrong.expected) != std::string::npos, "%s: '%s', expected '%s'",
        wrong.call.target.c_str(), outcome.error.c_str(), wrong.expected.c_str());
  for (const std::vector<char>& result : outcome.results) {
    check(std::all_of(result.begin(), result.end(), [](char byte) { return byte == 0x7f; }),
          "%s: wrote a result of a wrong call", wrong.call.target.c_str());
  }
}

// `call` with another operand or result, whose memory has the right size.
HandlerCall with_operand(HandlerCall call, std::size_t i, XLA_FFI_DataType type, Dims dims) {
  std::vector<char> bytes(count_of(dims) * size_of(type));
  call.operands[i] = {type, std::move(dims), std::move(bytes)};
  return call;
}
HandlerCall with_result(HandlerCall call, std::size_t i, XLA_FFI_DataType type, Dims dims) {
  call.results[i] = {type, std::move(dims)};
  return call;
}
HandlerCall with_attribute(HandlerCall call, const std::string& name, std::int32_t value) {
  call.set(name, value);
  return call;
}

constexpr XLA_FFI_DataType kF32 = XLA_FFI_DataType_F32, kF16 = XLA_FFI_DataType_F16,
                           kF64 = XLA_FFI_DataType_F64, kS32 = XLA_FFI_DataType_S32,
                           kPred = XLA_FFI_DataType_PRED, kS8 = XLA_FFI_DataType_S8, kU8 = XLA_FFI_DataType_U8;

// What every target refuses.
void add_common(const HandlerCall& call, std::vector<Wrong>& wrong) {
  const bool has_order = call.attributes[0].name == "order";
  for (const int order : {0, 6, -1, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()}) {
    if (!has_order) break;
    wrong.push_back({with_attribute(call, "order", order),
                     call.target + ": order is " + std::to_string(order) + ", expected 1 to 5"});
  }
  HandlerCall all_float64 = call;
  for (Operand& operand : all_float64.operands) {
    if (operand.type == kF32) operand = {kF64, operand.dims, std::vector<char>(2 * operand.bytes.size())};
  }
  for (Result& result : all_float64.results) result.type = kF64;
  wrong.push_back({all_float64, "expected float32, bfloat16 or float16"});
  wrong.push_back({with_result(call, 0, kF16, call.results[0].dims), "expected the same type"});

  HandlerCall missing = call;
  missing.attributes.erase(missing.attributes.begin());
  wrong.push_back({missing, "Wrong number of attributes"});
  HandlerCall wide = call;
  wide.attributes[0].value = std::int64_t{3};
  wrong.push_back(
      {wide, std::string("Wrong scalar data type: expected ") + (has_order ? "S32" : "F32") + " but got S64"});

  HandlerCall one_less = call, one_more = call, no_result = call, two_results = call;
  one_less.operands.pop_back();
  one_more.operands.push_back(call.operands[0]);
  no_result.results.pop_back();
  two_results.results.push_back(call.results[0]);
  const bool counted_here = !has_order || call.target == "quake_jax_dot_product_attention";
  wrong.push_back({one_less, counted_here ? "operands and" : "Wrong number of arguments"});
  wrong.push_back({one_more, counted_here ? "operands and" : "Wrong number of arguments"});
  wrong.push_back({no_result, counted_here ? "results, expected" : "Wrong number of results"});
  wrong.push_back({two_results, counted_here ? "results, expected" : "Wrong number of results"});
}

void test_wrong_elementwise() {
  std::mt19937 random(1);
  const HandlerCall call = elementwise_call(Unary::kExp, kStorage[0], 3, {4, 5}, random);
  std::vector<Wrong> wrong;
  add_common(call, wrong);
  for (const Dims& dims : {Dims{5, 4}, Dims{20}, Dims{4}, Dims{}, Dims{4, 5, 1}, Dims{4, 0}}) {
    wrong.push_back({with_result(call, 0, kF32, dims), "quake_jax_exp: buffers F32[4,5] and F32["});
    wrong.push_back({with_operand(call, 0, kF32, dims), "expected the same shape"});
  }
  wrong.push_back(
      {with_operand(call, 0, kS32, {4, 5}), "buffers S32[4,5] and F32[4,5], expected the same type"});
  for (const Wrong& w : wrong) check_wrong(w);
}

void test_wrong_binary() {
  std::mt19937 random(1);
  std::vector<Wrong> wrong;
  const HandlerCall same =
      binary_call(Binary::kLogAddExp, BinaryForm::kSameShape, false, kStorage[0], 3, {4, 6}, random);
  add_common(same, wrong);
  for (const Dims& dims : {Dims{6, 4}, Dims{4}, Dims{6}, Dims{4, 1}, Dims{}}) {
    wrong.push_back({with_operand(same, 0, kF32, dims), "expected the same shape"});
    wrong.push_back({with_operand(same, 1, kF32, dims), "expected the same shape"});
    wrong.push_back({with_result(same, 0, kF32, dims), "expected the same shape"});
  }
  wrong.push_back({with_operand(same, 1, kF16, {4, 6}), "expected the same type"});

  const HandlerCall split =
      binary_call(Binary::kSwiglu, BinaryForm::kSplit, true, kStorage[0], 3, {4, 6}, random);
  add_common(split, wrong);
  const std::string half = "expected a result with half of the operand's last axis";
  for (const Dims& dims : {Dims{4, 12}, Dims{4, 5}, Dims{3, 6}, Dims{6}, Dims{}, Dims{4, 6, 1}}) {
    wrong.push_back({with_result(split, 0, kF32, dims), half});
  }
  for (const Dims& dims : {Dims{4, 11}, Dims{4, 13}, Dims{12}, Dims{}, Dims{12, 4}}) {
    wrong.push_back({with_operand(split, 0, kF32, dims), half});
  }

  const HandlerCall biased =
      binary_call(Binary::kBiasSilu, BinaryForm::kBiased, false, kStorage[0], 3, {4, 6}, random);
  add_common(biased, wrong);
  for (const Dims& dims : {Dims{4}, Dims{1, 6}, Dims{1}, Dims{}, Dims{5}, Dims{7}, Dims{0}}) {
    wrong.push_back(
        {with_operand(biased, 1, kF32, dims), "expected a bias as long as the operand's last axis"});
  }
  wrong.push_back({with_operand(biased, 1, kF16, {6}), "expected the same type"});
  wrong.push_back({with_result(biased, 0, kF32, {6, 4}), "expected the same shape"});
  HandlerCall scalar = with_result(with_operand(biased, 0, kF32, {}), 0, kF32, {});
  wrong.push_back({with_operand(scalar, 1, kF32, {1}), "expected a bias as long as the operand's last axis"});
  for (const Wrong& w : wrong) check_wrong(w);
}

void test_wrong_reductions() {
  std::mt19937 random(1);
  std::vector<Wrong> wrong;
  for (const Reduction r : {Reduction::kSoftmax, Reduction::kLogSoftmax, Reduction::kLogSumExp}) {
    const HandlerCall call = reduction_call(r, kStorage[0], 3, {4, 6, 5}, 1, random);
    const bool removed = r == Reduction::kLogSumExp;
    add_common(call, wrong);
    for (const int axis : {-1, 3, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()}) {
      wrong.push_back({with_attribute(call, "axis", axis),
                       "axis is " + std::to_string(axis) + " for F32[4,6,5], expected 0 to 2"});
    }
    for (const Dims& dims : {Dims{4, 6}, Dims{4, 1, 5}, Dims{}, Dims{6, 4, 5}, Dims{4, 6, 5, 1}}) {
      wrong.push_back({with_result(call, 0, kF32, dims),
                       removed ? "expected a result without the axis" : "expected the same shape"});
    }
    wrong.push_back({with_operand(call, 0, kF32, {}), "axis is 1 for F32[]"});
  }
  const HandlerCall sum = reduction_call(Reduction::kLogSumExp, kStorage[0], 3, {4, 6, 5}, 1, random);
  wrong.push_back({with_operand(sum, 0, kF32, {4, 0, 5}), "the axis of F32[4,0,5] is empty"});

  const HandlerCall masked = masked_call(Reduction::kSoftmax, kStorage[0], 3, {4, 6, 5}, {1, 6, 5}, random);
  add_common(masked, wrong);
  const std::string broadcasts = "expected the last axis, and a boolean mask that broadcasts over the others";
  for (const Dims& dims : {Dims{6, 5}, Dims{2, 6, 5}, Dims{1, 6, 1}, Dims{4, 6, 4}, Dims{}, Dims{0, 6, 5},
                           Dims{4, 5, 5}, Dims{1, 4, 6, 5}}) {
    wrong.push_back({with_operand(masked, 1, kPred, dims), broadcasts});
  }
  wrong.push_back({with_operand(masked, 1, kS8, {1, 6, 5}), broadcasts});
  wrong.push_back({with_operand(masked, 1, kF32, {1, 6, 5}), broadcasts});
  wrong.push_back({with_attribute(masked, "axis", 1), broadcasts});
  wrong.push_back({with_attribute(masked, "axis", 3), "axis is 3 for F32[4,6,5], expected 0 to 2"});
  wrong.push_back({with_attribute(masked, "axis", -1), "axis is -1 for F32[4,6,5], expected 0 to 2"});
  for (const Wrong& w : wrong) check_wrong(w);
}

void test_wrong_norms() {
  std::mt19937 random(1);
  std::vector<Wrong> wrong;
  const std::string own = "expected a float32 one of some first axes and the last one";
  for (const bool centered : {false, true}) {
    for (const bool residual : {false, true}) {
      const HandlerCall call = norm_call(centered, residual, kStorage[0], {4, 6, 5}, 1, random);
      const std::size_t scale = residual + std::size_t{1};
      add_common(call, wrong);
      for (const Dims& dims : {Dims{4}, Dims{}, Dims{1}, Dims{6, 5}, Dims{1, 5}, Dims{4, 6}, Dims{4, 1, 5},
                               Dims{4, 6, 5, 5}, Dims{0, 5}}) {
        wrong.push_back({with_operand(call, scale, kF32, dims), own});
        if (centered)
          wrong.push_back({with_operand(call, scale + 1, kF32, dims), "expected scale and offset alike"});
      }
      wrong.push_back({with_operand(call, scale, kF16, {4, 5}), own});
      for (const Dims& dims : {Dims{4, 6}, Dims{6, 4, 5}, Dims{}, Dims{4, 6, 5, 1}, Dims{4, 6, 4}}) {
        for (std::size_t i = 0; i < scale; ++i) {
          wrong.push_back({with_operand(call, i, kF32, dims), "expected the same shape"});
          wrong.push_back({with_result(call, i, kF32, dims), "expected the same shape"});
        }
      }
      for (std::size_t i = 1; i < scale; ++i) {
        wrong.push_back({with_operand(call, i, kF16, {4, 6, 5}), "expected the same type"});
        wrong.push_back({with_result(call, i, kF16, {4, 6, 5}), "expected the same type"});
      }
    }
  }
  HandlerCall scalar = norm_call(false, false, kStorage[0], {4}, 0, random);
  wrong.push_back({with_result(with_operand(scalar, 0, kF32, {}), 0, kF32, {}), own});
  for (const Wrong& w : wrong) check_wrong(w);
}

void test_wrong_attention() {
  std::mt19937 random(1);
  std::vector<Wrong> wrong;
  const AttentionShape shape = {.batch = 2,
                                .query_length = 3,
                                .key_length = 5,
                                .heads = 4,
                                .kv_heads = 2,
                                .head_size = 6,
                                .value_size = 7,
                                .bias = true,
                                .mask = true,
                                .query_lengths = true,
                                .key_lengths = true,
                                .segments = true};
  const HandlerCall call = attention_call(shape, kStorage[0], 3, random);
  add_common(call, wrong);
  for (const int axis : {1, 4, -1, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()}) {
    wrong.push_back({with_attribute(call, "packed_axis", axis),
                     "packed_axis is " + std::to_string(axis) + ", expected 0, 2 or 3"});
  }
  for (const int format : {-1, kAttentionProblemFormats}) {
    wrong.push_back(
        {with_attribute(call, "format", format), "format is " + std::to_string(format) + ", expected 0 to 2"});
  }
  for (const int present : {0, 7, 14, 15}) {
    wrong.push_back({with_attribute(call, "present", present), "9 operands and 2 results, expected "});
  }
  for (const int present : {31, 47}) {
    wrong.push_back({with_attribute(call, "present", present), "segments of queries or of keys alone"});
  }
  wrong.push_back({with_attribute(call, "packed_axis", 2), "9 operands and 2 results, expected 7 and 2"});

  const auto operand = [&](std::size_t i, XLA_FFI_DataType type, const Dims& dims,
                           const std::string& expected) {
    wrong.push_back({with_operand(call, i, type, dims), expected});
  };
  for (std::size_t i = 0; i < 3; ++i) {
    for (const Dims& dims : {Dims{}, Dims{2}, Dims{3, 4, 6}, Dims{2, 3, 4, 6, 1}}) {
      operand(i, kF32, dims, "expected rank 4");
    }
    operand(i, kF16, call.operands[i].dims, "expected the same type");
  }
  const std::string keys = "expected queries and keys with the same batch and head size";
  for (const Dims& dims : {Dims{1, 5, 2, 6}, Dims{2, 5, 2, 7}, Dims{3, 5, 2, 6}, Dims{2, 5, 2, 0}}) {
    operand(1, kF32, dims, keys);
  }
  const std::string values = "expected keys and values with the same batch, length and heads";
  for (const Dims& dims : {Dims{1, 5, 2, 7}, Dims{2, 4, 2, 7}, Dims{2, 5, 4, 7}, Dims{2, 0, 2, 7}}) {
    operand(2, kF32, dims, values);
  }
  operand(1, kF32, {2, 5, 4, 6}, values);
  for (const Dims& dims : {Dims{}, Dims{2, 4, 3}, Dims{2, 4, 5, 3}, Dims{2, 2, 3, 5}, Dims{2, 4, 3, 6},
                           Dims{3, 4, 3, 5}, Dims{2, 4, 3, 0}}) {
    operand(3, kF32, dims, "expected a bias of the logits' shape");
    operand(4, kPred, dims, "expected a boolean mask of the logits' shape");
  }
  operand(3, kF64, {2, 4, 3, 5}, "operand F64[2,4,3,5], expected float32, bfloat16 or float16");
  operand(3, kPred, {2, 4, 3, 5}, "operand PRED[2,4,3,5], expected float32, bfloat16 or float16");
  operand(4, kS8, {2, 4, 3, 5}, "expected a boolean mask of the logits' shape");
  for (const std::size_t i : {std::size_t{5}, std::size_t{6}}) {
    for (const Dims& dims : {Dims{1}, Dims{3}, Dims{}, Dims{2, 1}, Dims{0}}) {
      operand(i, kS32, dims, "expected int32[2]");
    }
    operand(i, XLA_FFI_DataType_S64, {2}, "lengths S64[2], expected int32[2]");
    operand(i, kF32, {2}, "lengths F32[2], expected int32[2]");
  }
  for (const Dims& dims : {Dims{2}, Dims{2, 4}, Dims{}, Dims{3, 3}, Dims{2, 3, 1}}) {
    operand(7, kS32, dims, "expected int32[2,3]");
    operand(8, kS32, dims, "expected int32[2,5]");
  }
  operand(7, kF32, {2, 3}, "segments F32[2,3], expected int32[2,3]");
  operand(8, XLA_FFI_DataType_S64, {2, 5}, "segments S64[2,5], expected int32[2,5]");
  for (const Dims& dims : {Dims{2, 3, 4, 6}, Dims{2, 3, 4}, Dims{2, 4, 3, 7}, Dims{}, Dims{2, 3, 4, 7, 1}}) {
    wrong.push_back(
        {with_result(call, 0, kF32, dims), "expected a result of shape (batch, queries, heads, value size)"});
  }
  for (const Dims& dims : {Dims{2, 3, 4, 1}, Dims{2, 4, 3}, Dims{}, Dims{24}}) {
    wrong.push_back(
        {with_result(call, 1, kF32, dims), "expected a float32 residual of shape (batch, queries, heads)"});
  }
  wrong.push_back({with_result(call, 1, kF16, {2, 3, 4}), "expected a float32 residual"});

  AttentionShape codes = shape;
  codes.codes = true;
  const HandlerCall of_codes = attention_call(codes, kStorage[0], 3, random);
  add_common(of_codes, wrong);
  wrong.push_back({with_operand(of_codes, 2, kF32, {2, 5, 2, 7}), "expected the same type"});
  const std::string both = "scales of keys and values belong to int8 alone, which need both";
  wrong.push_back({with_operand(with_operand(of_codes, 1, kF32, {2, 5, 2, 6}), 2, kF32, {2, 5, 2, 7}), both});
  wrong.push_back({with_operand(with_operand(call, 1, kS8, {2, 5, 2, 6}), 2, kS8, {2, 5, 2, 7}), both});
  for (const std::size_t i : {std::size_t{9}, std::size_t{10}}) {
    for (const Dims& dims : {Dims{2, 5, 2}, Dims{2, 2}, Dims{}, Dims{2, 2, 5, 1}, Dims{1, 2, 5}}) {
      wrong.push_back({with_operand(of_codes, i, kF32, dims), "expected float32[2,2,5]"});
    }
    wrong.push_back({with_operand(of_codes, i, kF16, {2, 2, 5}), "scales F16[2,2,5], expected float32[2,2,5]"});
  }

  AttentionShape uneven = shape;
  uneven.heads = 3;
  wrong.push_back({attention_call(uneven, kStorage[0], 3, random),
                   "the number of query heads is not a multiple of the number of key/value heads"});
  uneven.kv_heads = 0;
  wrong.push_back({attention_call(uneven, kStorage[0], 3, random), "is not a multiple of"});

  const AttentionShape packed = {.query_length = 3,
                                 .key_length = 3,
                                 .heads = 4,
                                 .kv_heads = 4,
                                 .head_size = 6,
                                 .value_size = 6,
                                 .packed_axis = 2};
  const HandlerCall packed_call = attention_call(packed, kStorage[0], 3, random);
  add_common(packed_call, wrong);
  wrong.push_back({with_operand(packed_call, 0, kF32, {1, 3, 4, 6}), "expected rank 5"});
  wrong.push_back({with_operand(packed_call, 0, kF32, {1, 3, 2, 4, 6}), "expected an axis of size 3"});
  wrong.push_back({with_attribute(packed_call, "packed_axis", 3), "expected an axis of size 3"});
  for (const Wrong& w : wrong) check_wrong(w);
}

// Every operand and result of dense layers in other shapes and types; all attributes outside their ranges.
void test_wrong_dense() {
  std::mt19937 random(1);
  std::vector<Wrong> wrong;
  for (const DenseShape& shape : dense_shapes(kStorage[0])) {
    const HandlerCall call = dense_call(shape, 2, false, random);
    const std::vector<DenseArray> arrays = random_operands(shape, random);
    const auto counts = [&](std::size_t operands, std::size_t results) {
      return "quake_jax_dense: " + std::to_string(operands) + " operands and " + std::to_string(results) +
             " results, expected " + std::to_string(call.operands.size()) + " and " +
             std::to_string(call.results.size());
    };
    HandlerCall changed = call;
    changed.operands.pop_back();
    wrong.push_back({changed, counts(call.operands.size() - 1, call.results.size())});
    changed = call;
    changed.operands.clear();
    wrong.push_back({changed, counts(0, call.results.size())});
    changed = call;
    changed.operands.push_back(call.operands[0]);
    wrong.push_back({changed, counts(call.operands.size() + 1, call.results.size())});
    changed = call;
    changed.results.push_back(call.results[0]);
    wrong.push_back({changed, counts(call.operands.size(), call.results.size() + 1)});
    changed = call;
    changed.results.clear();
    wrong.push_back({changed, counts(call.operands.size(), 0)});

    for (std::size_t i = 0; i < arrays.size(); ++i) {
      const std::string name = arrays[i].what;
      const Operand& operand = call.operands[i];
      // The other sizes of x do not fit what follows it; a residual is compared with the result.
      const std::string expected = name == "x"          ? ", expected float32, bfloat16 or float16 of rank 3"
                                   : name == "residual" ? "expected a residual of the result's shape and type"
                                                        : ", expected ";
      const std::string begin = name == "x" || name == "residual" ? "" : "quake_jax_dense: " + name + " ";
      for (const XLA_FFI_DataType type : {kF64, kPred, kS32, kU8, kS8, kF16}) {
        if (type == operand.type || (name == "x" && type == kF16)) continue;
        if (name == "x" && type == kS8 && shape.range && shape.norm == DenseNorm::kNone) continue;
        wrong.push_back({with_operand(call, i, type, operand.dims), expected});
        if (!begin.empty()) wrong.push_back({with_operand(call, i, type, operand.dims), begin});
      }
      Dims dims = operand.dims;
      dims.pop_back();
      wrong.push_back({with_operand(call, i, operand.type, dims), expected});
      dims = operand.dims;
      dims.push_back(1);
      wrong.push_back({with_operand(call, i, operand.type, dims), expected});
      wrong.push_back({with_operand(call, i, operand.type, {}), expected});
      for (std::size_t axis = 0; axis < operand.dims.size(); ++axis) {
        for (const std::int64_t size : {operand.dims[axis] + 1, operand.dims[axis] - 1, std::int64_t{0}}) {
          if (axis == 0 && size == 1 && name != "x" && name != "residual") continue;  // shared by all
          // Words that are not full have room for less or more.
          const auto per_word = static_cast<std::int64_t>(shape.per_word());
          if (name == "x" && axis == 2 &&
              (size + per_word - 1) / per_word == static_cast<std::int64_t>(shape.words()))
            continue;
          dims = operand.dims;
          dims[axis] = size;
          wrong.push_back({with_operand(call, i, operand.type, dims), name == "x" ? "expected" : begin});
        }
      }
    }
    for (std::size_t i = 0; i < call.results.size(); ++i) {
      const Dims& dims = call.results[i].dims;
      const std::string rows = shape.out_range() ? "an int8 result of the same rows"
                                                 : "results of the same rows and one floating-point type";
      for (const Dims& other : {Dims{}, Dims{dims[1], dims[2]}, Dims{2, 5, 1, 1}, Dims{1, dims[1], dims[2]},
                                Dims{2, dims[1] + 1, dims[2]}, Dims{2, 0, dims[2]}}) {
        wrong.push_back({with_result(call, i, call.results[i].type, other), rows});
      }
      for (const XLA_FFI_DataType type : {kF64, kS32, kPred, kU8, shape.out_range() ? kF32 : kS8}) {
        wrong.push_back({with_result(call, i, type, dims), rows});
      }
      wrong.push_back({with_result(call, i, call.results[i].type, {2, dims[1], dims[2] + 16}), "codes "});
      if (i != 0) wrong.push_back({with_result(call, i, kF16, dims), rows});
    }
    const auto attribute = [&](const char* name, std::int32_t value, const std::string& expected) {
      wrong.push_back({with_attribute(call, name, value),
                       "quake_jax_dense: " + std::string(name) + " is " + std::to_string(value) + expected});
    };
    for (const std::int32_t value : {-1, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()}) {
      attribute("order", value, ", expected 1 to 5");
      attribute("format", value, ", expected 0 to 3");
      attribute("norm", value, ", expected 0 to 2");
      attribute("group_size", value, ", expected 0 or a multiple of 32");
    }
    attribute("order", 0, ", expected 1 to 5");
    attribute("order", 6, ", expected 1 to 5");
    attribute("format", 4, ", expected 0 to 3");
    attribute("norm", 3, ", expected 0 to 2");
    attribute("weights", 0, ", expected at least 1");
    attribute("weights", -7, ", expected at least 1");
    attribute("group_size", 31, ", expected 0 or a multiple of 32");
    const bool integers = shape.is_int8() || shape.is_int4(), everything = shape.gate;
    if (!integers) {
      attribute("group_size", 32, ", expected 0 for a format of floats");
      attribute("quantized", 1, ", expected 0 for a format of floats");
    }
    if (shape.is_int4())
      wrong.push_back({with_attribute(call, "group_size", 64), "group_size is 64, expected a"});
    if (shape.is_int4() && !everything) {
      attribute("group_size", 0, ", expected groups for int4");
    }
    if (!shape.group_size) attribute("has_offsets", 1, ", expected 0 without groups");
    if (shape.range) {
      wrong.push_back({with_attribute(call, "quantized", 0), "has_range is 1, expected 0 unless rows are"});
      wrong.push_back({with_attribute(call, "group_size", 96), "has_range is 1, expected 0 unless rows are"});
      wrong.push_back({with_attribute(call, "has_range", 0), " operands and "});
    } else if (shape.format == DenseFormat::kInt8Quantized && !shape.group_size) {
      wrong.push_back({with_attribute(call, "has_range", 1), " operands and "});
    } else {
      attribute("has_range", 1, ", expected 0 unless rows are quantised for int8 without groups");
    }
    if (shape.columns.size() > 1 || shape.residual) {
      attribute("has_out_range", 1, ", expected 0 with several weights or a residual");
    } else {
      wrong.push_back({with_attribute(call, "has_out_range", !shape.out_range()), " operands and "});
    }
    if (everything) {
      attribute("weights", 2, ", expected 1 with a gate or a residual");
    } else {
      attribute("has_gate_bias", 1, ", expected 0 without a gate");
      for (const char* name : {"has_permutation", "has_bias"}) {
        wrong.push_back({with_attribute(call, name, 1), " operands and "});
      }
      wrong.push_back({with_attribute(call, "weights", std::numeric_limits<int>::max()),
                       shape.out_range() ? "has_out_range is 1, expected 0 with several" : " operands and "});
      wrong.push_back({with_attribute(call, "norm", 1), " operands and "});
      wrong.push_back({with_attribute(call, "norm", 2), " operands and "});
    }
    for (const char* name : {"silu_", "relu", "GELU", "exp\n", "logaddexp", "swiglu"}) {
      changed = call;
      for (Attribute& a : changed.attributes) {
        if (a.name == "activation") a.value = name;
      }
      wrong.push_back({changed, "activation '" + std::string(name) + "' has no kernel"});
    }
    changed = call;
    changed.attributes.pop_back();
    wrong.push_back({changed, "Wrong number of attributes"});
    for (std::size_t i = 0; i < call.attributes.size(); ++i) {
      changed = call;
      changed.attributes[i].value = std::int64_t{1};
      wrong.push_back({changed, "Wrong "});
    }
  }
  for (const Wrong& w : wrong) check_wrong(w);
}

void test_wrong_stage() {
  std::mt19937 random(1);
  Pool pool(1);
  for (const XLA_FFI_ExecutionStage stage : {XLA_FFI_ExecutionStage_INSTANTIATE, XLA_FFI_ExecutionStage_PREPARE,
                                             XLA_FFI_ExecutionStage_INITIALIZE}) {
    for (const FfiTarget& target : ffi_targets()) {
      const std::string error = call_handler(target.handler, pool, {}, {}, {}, stage);
      check(error.find("Wrong execution stage") != std::string::npos, "%s: %s", target.name, error.c_str());
    }
  }
}

// ---- Sizes ----

// A call without memory: whatever is read or written ends the process.
std::string call_without_memory(const HandlerCall& call) {
  static Pool pool(2);
  std::vector<Buffer> arguments, results;
  for (const Operand& operand : call.operands) arguments.push_back({operand.type, operand.dims, nullptr});
  for (const Result& result : call.results) results.push_back({result.type, result.dims, nullptr});
  return call_handler(find_handler(call.target), pool, call.attributes, arguments, results);
}

// Of the calls in these tests the dimensions alone matter.
HandlerCall shapes(const std::string& target, std::vector<Attribute> attributes, std::vector<Dims> operands,
                   std::vector<Dims> results) {
  HandlerCall call;
  call.target = "quake_jax_" + target;
  call.attributes = std::move(attributes);
  call.attributes.push_back({"order", 3});
  for (Dims& dims : operands) call.operands.push_back({kF32, std::move(dims), {}});
  for (Dims& dims : results) call.results.push_back({kF32, std::move(dims)});
  return call;
}

HandlerCall norm_shapes(const std::string& target, std::vector<Dims> operands, std::vector<Dims> results) {
  HandlerCall call = shapes(target, {}, std::move(operands), std::move(results));
  call.attributes = {{"epsilon", 1e-6f}};
  return call;
}

HandlerCall attention_shapes(std::vector<Dims> operands, std::vector<Dims> results, int packed_axis = 0,
                             int present = 0) {
  return shapes("dot_product_attention",
                {{"scale", 1.0f},
                 {"soft_cap", 0.0f},
                 {"is_causal", 0},
                 {"window_left", -1},
                 {"window_right", -1},
                 {"packed_axis", packed_axis},
                 {"present", present},
                 {"format", 0}},
                std::move(operands), std::move(results));
}

// Without elements there is nothing to do, and no memory.
void test_zero_sizes() {
  std::vector<HandlerCall> calls;
  for (const Dims& dims : {Dims{0}, Dims{0, 3}, Dims{3, 0}, Dims{0, 0}, Dims{kHuge, 0}, Dims{0, kHuge},
                           Dims{1 << 20, 0, 1 << 20}}) {
    Dims wide = dims, first = dims;
    wide.back() *= 2;
    first.erase(first.begin());
    calls.push_back(shapes("exp", {}, {dims}, {dims}));
    calls.push_back(shapes("logaddexp", {}, {dims, dims}, {dims}));
    calls.push_back(shapes("swiglu_split", {{"gate_first", 1}}, {wide}, {dims}));
    calls.push_back(shapes("bias_silu", {}, {dims, {dims.back()}}, {dims}));
    for (int axis = 0; axis < static_cast<int>(dims.size()); ++axis) {
      calls.push_back(shapes("softmax", {{"axis", axis}}, {dims}, {dims}));
      calls.push_back(shapes("log_softmax", {{"axis", axis}}, {dims}, {dims}));
    }
    if (count_of(first) == 0) calls.push_back(shapes("logsumexp", {{"axis", 0}}, {dims}, {first}));
    HandlerCall masked =
        shapes("softmax_where", {{"axis", static_cast<int>(dims.size()) - 1}}, {dims, dims}, {dims});
    masked.operands[1].type = kPred;
    calls.push_back(masked);
    calls.push_back(norm_shapes("rms_norm", {dims, {dims.back()}}, {dims}));
    calls.push_back(norm_shapes("layer_norm_residual", {dims, dims, dims, dims}, {dims, dims}));
  }
  // No batch, no queries, no heads; heads without values still have a residual.
  calls.push_back(attention_shapes({{0, 3, 4, 5}, {0, 6, 2, 5}, {0, 6, 2, 7}}, {{0, 3, 4, 7}, {0, 3, 4}}));
  calls.push_back(attention_shapes({{2, 0, 4, 5}, {2, 6, 2, 5}, {2, 6, 2, 7}}, {{2, 0, 4, 7}, {2, 0, 4}}));
  calls.push_back(attention_shapes({{2, 3, 0, 5}, {2, 6, 0, 5}, {2, 6, 0, 7}}, {{2, 3, 0, 7}, {2, 3, 0}}));
  calls.push_back(attention_shapes({{0, kHuge, 3, 4, 5}}, {{0, kHuge, 4, 5}, {0, kHuge, 4}}, 2));
  for (const HandlerCall& call : calls) {
    const std::string error = call_without_memory(call);
    check(error.empty(), "%s: %s", call.target.c_str(), error.c_str());
  }
  std::mt19937 random(1);
  Pool pool(2);
  const auto empty = [&](const HandlerCall& call) {
    const std::string error = run_call(call, pool, Place::kEnd).error;
    check(error.empty(), "%s: %s", call.target.c_str(), error.c_str());
  };
  for (DenseShape& shape : dense_shapes(kStorage[0])) {
    empty(dense_call(shape, 0, false, random));
    empty(dense_call(shape, 0, true, random));
    shape.rows = 0;
    empty(dense_call(shape, 2, false, random));
    empty(dense_call(shape, 2, true, random));
    shape.size = 0;
    empty(dense_call(shape, 1, false, random));
    shape.columns.assign(shape.columns.size(), 0);
    empty(dense_call(shape, 1, false, random));
    shape.rows = 3;
    shape.size = 96;
    empty(dense_call(shape, 1, false, random));
    empty(dense_call(shape, 3, true, random));
  }
  for (const AttentionShape& shape :
       {AttentionShape{
            .query_length = 3, .key_length = 0, .heads = 2, .kv_heads = 2, .head_size = 4, .value_size = 4},
        AttentionShape{
            .query_length = 3, .key_length = 5, .heads = 2, .kv_heads = 2, .head_size = 0, .value_size = 4},
        AttentionShape{.query_length = 30,
        .key_length = 50,
        .heads = 2,
        .kv_heads = 2,
        .head_size = 4,
        .value_size = 0,
        .key_lengths = true},
        AttentionShape{.query_length = 30,
        .key_length = 50,
        .heads = 2,
        .kv_heads = 1,
        .head_size = 0,
        .value_size = 0,
        .mask = true}}) {
    for (const Storage& storage : kStorage) {
      const HandlerCall call = attention_call(shape, storage, 3, random);
      const Outcome outcome = run_call(call, pool, Place::kEnd);
      check(outcome.error.empty() && outcome.results == run_directly(call).results, "attention of size 0: %s",
            outcome.error.c_str());
    }
  }
}

// Products of sizes that overflow 64 bits, to 0 or to something small: refused before anything is computed.
void test_overflowing_sizes() {
  const Dims squares[] = {{std::int64_t{1} << 32, std::int64_t{1} << 32},
                          {(std::int64_t{1} << 32) + 1, std::int64_t{1} << 32},
                          {std::numeric_limits<std::int64_t>::max()},
                          {std::numeric_limits<std::int64_t>::max(), 2},
                          {std::int64_t{1} << 60},
                          {kHuge, kHuge, 0},
                          {0, kHuge, kHuge},
                          {-1, 4},
                          {-4, -4},
                          {std::numeric_limits<std::int64_t>::min(), 2}};
  const auto refuses = [](const HandlerCall& call) {
    const std::string error = call_without_memory(call);
    check(error.find("expected no negative size and less than 2^60 elements") != std::string::npos, "%s: '%s'",
          call.target.c_str(), error.c_str());
  };
  for (const Dims& dims : squares) {
    Dims first(dims.begin() + 1, dims.end());
    refuses(shapes("gelu_erf", {}, {dims}, {dims}));
    refuses(shapes("exp", {}, {{1}}, {dims}));
    refuses(shapes("logaddexp", {}, {dims, dims}, {dims}));
    refuses(shapes("logaddexp", {}, {{1}, dims}, {{1}}));
    refuses(shapes("swiglu_split", {{"gate_first", 1}}, {dims}, {dims}));
    refuses(shapes("bias_silu", {}, {dims, {dims.back()}}, {dims}));
    refuses(shapes("softmax", {{"axis", 0}}, {dims}, {dims}));
    refuses(norm_shapes("rms_norm", {dims, {dims.back()}}, {dims}));
    refuses(norm_shapes("layer_norm_residual", {{1}, {1}, dims, dims}, {{1}, {1}}));
    refuses(shapes("logsumexp", {{"axis", 0}}, {dims}, {first}));
    HandlerCall masked =
        shapes("softmax_where", {{"axis", static_cast<int>(dims.size()) - 1}}, {dims, dims}, {dims});
    masked.operands[1].type = kPred;
    refuses(masked);
  }
  const std::int64_t side = std::int64_t{1} << 21;
  const Dims small = {2, 3, 4, 5}, cube = {side, side, side, 5};
  refuses(attention_shapes({cube, small, small}, {small, {2, 3, 4}}));
  refuses(attention_shapes({small, cube, small}, {small, {2, 3, 4}}));
  refuses(attention_shapes({small, small, cube}, {small, {2, 3, 4}}));
  refuses(attention_shapes({small, small, small}, {cube, {2, 3, 4}}));
  refuses(attention_shapes({small, small, small}, {small, {side, side, side}}));
  refuses(attention_shapes({{side, side, 3, side, 5}}, {{side, side, side, 5}, {side, side, side}}, 2));
  for (const DenseShape& shape : dense_shapes(kStorage[0])) {
    std::mt19937 random(1);
    const HandlerCall call = dense_call(shape, 1, false, random);
    for (const Dims& dims : squares) {
      for (std::size_t i = 0; i < call.operands.size(); ++i) {
        HandlerCall large = call;
        large.operands[i].dims = dims;
        refuses(large);
      }
      for (std::size_t i = 0; i < call.results.size(); ++i) {
        HandlerCall large = call;
        large.results[i].dims = dims;
        refuses(large);
      }
    }
  }
  // Operands of 2^41 elements each, logits of 2^62.
  const std::int64_t length = std::int64_t{1} << 31;
  const auto wide = [&](XLA_FFI_DataType type, int present) {
    HandlerCall call = attention_shapes(
        {{1, length, 1, 1024}, {1, length, 1, 1024}, {1, length, 1, 1024}, {1, 1, length, length}},
        {{1, length, 1, 1024}, {1, length, 1}}, 0, present);
    call.operands[3].type = type;
    return call;
  };
  refuses(wide(kF32, 1));
  refuses(wide(kPred, 2));
}

#ifdef __linux__

// Memory of `bytes` that is `period` bytes again and again, so that arrays of many GiB cost little.
class Repeated {
 public:
  Repeated(std::size_t bytes, std::size_t period) : bytes_(bytes) {
    const int file = memfd_create("repeated", 0);
    base_ =
        static_cast<char*>(mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    bool ok = file >= 0 && base_ != MAP_FAILED && ftruncate(file, static_cast<off_t>(period)) == 0;
    for (std::size_t at = 0; ok && at < bytes; at += period) {
      const std::size_t size = std::min(period, bytes - at);
      ok = mmap(base_ + at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != MAP_FAILED;
    }
    if (!ok) {
      std::perror("repeated memory");
      std::exit(2);
    }
    close(file);
  }
  ~Repeated() { munmap(base_, bytes_); }
  Repeated(const Repeated&) = delete;
  Repeated& operator=(const Repeated&) = delete;
  char* data() { return base_; }

 private:
  std::size_t bytes_;
  char* base_;
};

// 2^31 elements and more, in every kind of handler but attention's. Input and output repeat after a number of
// pages that does not divide 2^32 bytes, so an offset that lost its upper bits would read or write another
// place of the period.
void test_large_arrays() {
  const Storage& storage = kStorage[1];
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  // An odd number of pages in about 4 MiB; a row has so many elements, a period a power of two of rows.
  const std::size_t columns = (std::size_t{4} << 20) / page - 3, period = columns * page;
  const std::size_t rows = page / 2, elements = rows * columns;
  const std::size_t repeats = (std::size_t{1} << 32) / period + 2;
  Repeated in(repeats * period, period), out(repeats * period, period);
  std::mt19937 random(8);
  const std::vector<char> values = random_input(storage, elements, random);
  std::copy(values.begin(), values.end(), in.data());
  std::vector<char> expected(period);
  Pool pool(2);
  // Runs a call on `in`, and on a second operand if there is one.
  const auto run = [&](const HandlerCall& call, void* second = nullptr) {
    std::vector<Buffer> arguments = {{XLA_FFI_DataType_BF16, call.operands[0].dims, in.data()}};
    if (second != nullptr) arguments.push_back({call.operands[1].type, call.operands[1].dims, second});
    std::fill_n(out.data(), period, char{0x7f});
    const std::string error = call_handler(find_handler(call.target), pool, call.attributes, arguments,
                                           {{XLA_FFI_DataType_BF16, call.results[0].dims, out.data()}});
    check(error.empty() && std::equal(expected.begin(), expected.end(), out.data()), "%s of 2^31 elements: %s",
          call.target.c_str(), error.c_str());
  };
  ScopedFlushDenormals flush;
  const KernelTable& table = active_table();
  const int d = static_cast<int>(storage.dtype);
  const auto size = [](std::size_t n) { return static_cast<std::int64_t>(n); };
  const Dims dims = {size(repeats), size(rows), size(columns)};

  const int silu = static_cast<int>(Unary::kSilu);
  table.elementwise.unary[silu][d][2](values.data(), expected.data(), elements, Stores::kCached);
  run(shapes("silu", {}, {{size(repeats * elements)}}, {{size(repeats * elements)}}));

  const int softmax = static_cast<int>(Reduction::kSoftmax),
            log_sum_exp = static_cast<int>(Reduction::kLogSumExp);
  table.rows.rows[softmax][d][2](values.data(), expected.data(), rows, columns, Stores::kCached);
  run(shapes("softmax", {{"axis", 2}}, {dims}, {dims}));

  const int bias_silu = static_cast<int>(Binary::kBiasSilu);
  table.elementwise.binary[bias_silu][d][2](values.data(), columns, values.data(), 0, expected.data(), rows,
                                            columns, Stores::kCached);
  HandlerCall biased = shapes("bias_silu", {}, {dims, {size(columns)}}, {dims});
  biased.operands[1].type = XLA_FFI_DataType_BF16;
  std::vector<char> bias(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(2 * columns));
  run(biased, bias.data());

  const std::vector<float> scale(columns, 0.75f);
  const Norm norm = {scale.data(), nullptr, 1e-6f, false};
  table.rows.norm[d](values.data(), nullptr, norm, expected.data(), nullptr, rows, columns, Stores::kCached);
  std::vector<float> scales = scale;
  run(norm_shapes("rms_norm", {dims, {size(columns)}}, {dims}), scales.data());

  // The second row of a pair gates the first; the result has half the period.
  const int swiglu = static_cast<int>(Binary::kSwiglu);
  for (char* to : {expected.data(), expected.data() + period / 2}) {
    table.elementwise.binary[swiglu][d][2](values.data() + 2 * columns, 2 * columns, values.data(), 2 * columns,
                                           to, rows / 2, columns, Stores::kCached);
  }
  run(shapes("swiglu_split", {{"gate_first", 0}}, {{size(repeats * rows / 2), size(2 * columns)}},
             {{size(repeats * rows / 2), size(columns)}}));

  // The mask has a byte for each element, and half the period.
  std::vector<char> kept(elements);
  for (char& byte : kept) byte = random() % 3 != 0;
  Repeated mask(repeats * elements, period);
  std::copy(kept.begin(), kept.end(), mask.data());
  std::copy(kept.begin(), kept.end(), mask.data() + elements);
  for (std::size_t row = 0; row < rows; ++row) {
    const std::size_t at = row * columns;
    table.rows.masked[softmax][d][2](values.data() + 2 * at, reinterpret_cast<unsigned char*>(kept.data()), &at,
                                     expected.data() + 2 * at, 1, columns);
  }
  HandlerCall masked = shapes("softmax_where", {{"axis", 2}}, {dims, dims}, {dims});
  masked.operands[1].type = kPred;
  run(masked, mask.data());

  // One row of results for each period: together less than a period.
  expected.resize(repeats * 2 * columns);
  for (std::size_t at = 0; at < expected.size(); at += 2 * columns) {
    table.rows.columns[log_sum_exp][d][2](values.data(), expected.data() + at, rows, columns, columns);
  }
  run(shapes("logsumexp", {{"axis", 1}}, {dims}, {{size(repeats), size(columns)}}));
}

#else

void test_large_arrays() { std::printf("arrays of 2^31 elements: left out, memfd_create is Linux's\n"); }

#endif

// ---- Threads ----

// Several threads call all kinds of handlers on one pool, more often than it has threads.
void test_concurrent_calls() {
  std::vector<HandlerCall> calls;
  for (const bool large : {false, true}) {
    std::vector<HandlerCall> all = valid_calls(large && !thin);
    for (std::size_t i = large ? 7 : 0; i < all.size(); i += thin ? 17 : 11) calls.push_back(std::move(all[i]));
  }
  std::vector<std::vector<std::vector<char>>> expected;
  for (const HandlerCall& call : calls) expected.push_back(run_directly(call).results);
  std::atomic<int> wrong{0};
  {
    Pool pool(2);
    std::vector<std::thread> callers;
    for (std::size_t t = 0; t < 6; ++t) {
      callers.emplace_back([&, t] {
        for (std::size_t i = 0; i < 2 * calls.size(); ++i) {
          const HandlerCall& call = calls[(i * 5 + t * 3) % calls.size()];
          std::vector<Buffer> arguments, results;
          std::vector<std::vector<char>> memory;
          for (const Operand& operand : call.operands) {
            arguments.push_back({operand.type, operand.dims, const_cast<char*>(operand.bytes.data())});
          }
          for (const Result& result : call.results) memory.emplace_back(result.bytes());
          for (std::size_t k = 0; k < memory.size(); ++k) {
            results.push_back({call.results[k].type, call.results[k].dims, memory[k].data()});
          }
          const std::string error =
              call_handler(find_handler(call.target), pool, call.attributes, arguments, results);
          wrong += !error.empty() || memory != expected[(i * 5 + t * 3) % calls.size()];
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
  }
  check(wrong == 0, "%d of the concurrent calls gave something else", wrong.load());
}

}  // namespace
}  // namespace quake::tests

// test_handlers [--thin] [--large]: fewer sizes, for valgrind and emulation; arrays of 2^31 elements (on
// Linux).
int main(int argc, char** argv) {
  using namespace quake::tests;
  if (lacks_wanted_isa()) return kSkipped;
  std::printf("%s\n", quake::active_table().isa);
  thin = has_option(argc, argv, "--thin");
  test_valid_calls();
  test_in_place();
  test_wrong_elementwise();
  test_wrong_binary();
  test_wrong_reductions();
  test_wrong_norms();
  test_wrong_attention();
  test_wrong_dense();
  test_wrong_stage();
  test_zero_sizes();
  test_overflowing_sizes();
  test_concurrent_calls();
  if (has_option(argc, argv, "--large")) test_large_arrays();
  check(live_errors == 0, "%d errors were not destroyed", live_errors.load());
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
