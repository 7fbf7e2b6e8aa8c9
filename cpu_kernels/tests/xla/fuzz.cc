// Fuzzing the FFI handlers: bytes become a call of one family with any shape, values, masks and attributes, all
// buffers between inaccessible pages. fuzz_target.cc makes libFuzzer targets of it.
//
// Checked: a valid call succeeds, writes all of its result and nothing else, and gives the same bytes whatever
// the placement and the number of threads; element-wise results are those of each element alone, the others are
// within their bounds of the definition in double precision. A call with something changed gives an error if no
// valid call has it so (another rank, a type that fits nowhere, another result, an attribute out of its range),
// may give one if another call has become of it, and writes nothing if it gives one.

#include <cstdint>

#include "accuracy/exact.h"
#include "tests/bounds.h"
#include "tests/rows/exact_norm.h"
#include "tests/xla/fuzz.h"
#include "tests/xla/handler_calls.h"

namespace quake::tests {
namespace {

// ---- From bytes to calls ----

// Takes values off the input; zeros behind its end.
class Source {
 public:
  Source(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  std::uint32_t word() {
    std::uint32_t value = 0;
    for (int i = 0; i < 4; ++i) value = value << 8 | byte();
    return value;
  }
  std::size_t below(std::size_t n) {
    std::size_t value = byte();
    if (n > 256) value = value << 8 | byte();
    return value % n;
  }
  bool one_in(std::size_t n) { return below(n) == n - 1; }  // false once the input is used up
  std::int64_t size(std::size_t most) { return static_cast<std::int64_t>(below(most + 1)); }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

// Values for the operands: ordinary ones, and special ones in some places.
void fill_values(Source& source, Operand& operand) {
  const std::size_t size = size_of(operand.type), count = operand.bytes.size() / size;
  const bool codes = operand.type == XLA_FFI_DataType_S8;
  if (size != 2 && operand.type != XLA_FFI_DataType_F32 && !codes) return;
  static constexpr std::uint32_t kFloat32[] = {0x7f800000, 0xff800000, 0x7fc00000, 0xffc00001, 0x7f7fffff,
                                               0xff7fffff, 0x00000001, 0x80000001, 0x00800000, 0x80000000,
                                               0x42b17218, 0xc2aeac50, 0x7149f2ca, 0xf149f2ca};
  static constexpr std::uint16_t kFloat16[] = {0x7c00, 0xfc00, 0x7e00, 0xfe01, 0x7bff,
                                               0xfbff, 0x0001, 0x8001, 0x0400, 0x8000};
  const std::size_t specials = source.below(8);
  for (std::size_t i = 0; i < specials && count > 0; ++i) {
    const std::size_t place = source.below(count < 65536 ? count : 65536);
    if (source.one_in(4)) {  // any bits
      const std::uint32_t bits = source.word();
      std::memcpy(operand.bytes.data() + place * size, &bits, size);
    } else if (codes) {
      operand.bytes[place] = static_cast<char>(-128);
    } else if (operand.type == XLA_FFI_DataType_F16) {
      std::memcpy(operand.bytes.data() + place * 2, &kFloat16[source.below(std::size(kFloat16))], 2);
    } else {
      const std::uint32_t bits = kFloat32[source.below(std::size(kFloat32))];
      const std::uint16_t high = static_cast<std::uint16_t>(bits >> 16);
      std::memcpy(operand.bytes.data() + place * size,
                  size == 4 ? static_cast<const void*>(&bits) : static_cast<const void*>(&high), size);
    }
  }
}

Dims take_dims(Source& source, std::size_t most_elements) {
  Dims dims(1 + source.below(4));
  // The last axis covers every tail; now and then an array of several chunks of the handlers' work.
  const bool large = source.one_in(16);
  std::size_t left = large ? 200000 : most_elements;
  for (std::size_t i = dims.size(); i-- > 0;) {
    dims[i] = source.size(std::min<std::size_t>(left, i + 1 == dims.size() ? (large ? 65535 : 140) : 9));
    left = dims[i] == 0 ? left : left / static_cast<std::size_t>(dims[i]);
  }
  return dims;
}

const Storage& take_storage(Source& source) { return kStorage[source.below(3)]; }

enum class Change {
  kNone,
  kOpen,  // perhaps another valid call, as of a mask that broadcasts
  kWrong
};

bool is_kernel_type(XLA_FFI_DataType type) {
  return type != XLA_FFI_DataType_S8 &&
         std::find(std::begin(kXlaTypes), std::end(kXlaTypes), type) != std::end(kXlaTypes);
}

// Changes the type or the shape of a buffer.
Change change_buffer(Source& source, XLA_FFI_DataType& type, Dims& dims) {
  static constexpr XLA_FFI_DataType kTypes[] = {
      XLA_FFI_DataType_F32, XLA_FFI_DataType_BF16, XLA_FFI_DataType_F16, XLA_FFI_DataType_F64,
      XLA_FFI_DataType_S32, XLA_FFI_DataType_PRED, XLA_FFI_DataType_S8};
  switch (source.below(4)) {
    case 0: {
      const XLA_FFI_DataType before = type;
      type = kTypes[source.below(std::size(kTypes))];
      if (type == before) return Change::kNone;
      // A bias of attention has a type of its own.
      return is_kernel_type(type) && is_kernel_type(before) ? Change::kOpen : Change::kWrong;
    }
    case 1:
      if (dims.empty()) return Change::kNone;
      dims.erase(dims.begin() + static_cast<std::ptrdiff_t>(source.below(dims.size())));
      return Change::kWrong;
    case 2:
      dims.push_back(source.size(3));
      return Change::kWrong;
    default: {
      if (dims.empty()) return Change::kNone;
      std::int64_t& size = dims[source.below(dims.size())];
      const std::int64_t before = size;
      size = source.size(20);
      return size == before ? Change::kNone : Change::kOpen;
    }
  }
}

Change change_attribute(Source& source, HandlerCall& call) {
  Attribute& a = call.attributes[source.below(call.attributes.size())];
  if (!std::holds_alternative<std::int32_t>(a.value) || a.name == "is_causal" || a.name == "gate_first" ||
      a.name.starts_with("window")) {
    return Change::kNone;  // any value is a valid one
  }
  const Attribute before = a;
  const auto value = static_cast<std::int32_t>(source.word());
  a.value = value;
  if (a.value == before.value) return Change::kNone;
  const auto rank = static_cast<std::int32_t>(call.operands[0].dims.size());
  const bool wrong = a.name == "order"    ? value < 1 || value > kMaxOrder
                     : a.name == "axis"   ? value < 0 || value >= rank
                     : a.name == "format" ? value < 0 || value >= kAttentionProblemFormats
                                          : a.name == "packed_axis" && value != 0 && value != 2 && value != 3;
  return wrong ? Change::kWrong : Change::kOpen;
}

// Changes an attribute, an operand or a result.
Change change(Source& source, HandlerCall& call) {
  switch (source.below(3)) {
    case 0:
      return change_attribute(source, call);
    case 1: {
      const std::size_t i = source.below(call.operands.size());
      Operand& operand = call.operands[i];
      const Change made = change_buffer(source, operand.type, operand.dims);
      operand.bytes.assign(count_of(operand.dims) * size_of(operand.type), 0);
      // The scale of an RMS norm may have more axes or fewer: no offset has to match it. The x of a dense layer
      // may be codes.
      const bool free = (call.target.starts_with("quake_jax_rms_norm") && i == call.results.size()) ||
                        (call.target == "quake_jax_dense" && i == 0);
      return free && made == Change::kWrong ? Change::kOpen : made;
    }
    default: {
      Result& result = call.results[source.below(call.results.size())];
      const Change made = change_buffer(source, result.type, result.dims);
      // The operands determine the results, but for the type and the columns of a dense layer's.
      return made == Change::kNone || call.target == "quake_jax_dense" ? made : Change::kWrong;
    }
  }
}

// ---- Running ----

Pool& pool_of_one() {
  static Pool pool(1);
  return pool;
}
Pool& pool_of_three() {
  static Pool pool(3);
  return pool;
}

// Runs a call that is wrong or may be. An error leaves the results as they were.
void run_changed(const HandlerCall& call, Change change) {
  const Outcome outcome = run_call(call, pool_of_one(), Place::kEnd);
  check(change != Change::kWrong || !outcome.error.empty(), "%s: a wrong call gives no error",
        call.target.c_str());
  if (outcome.error.empty()) return;
  for (const std::vector<char>& result : outcome.results) {
    check(std::all_of(result.begin(), result.end(), [](char byte) { return byte == 0x7f; }),
          "%s: '%s', but wrote", call.target.c_str(), outcome.error.c_str());
  }
}

// Changes one call in eight. Returns whether that was all: a change may have no effect.
bool runs_changed(Source& source, HandlerCall& call) {
  if (!source.one_in(8)) return false;
  const Change made = change(source, call);
  if (made == Change::kNone) return false;
  run_changed(call, made);
  return true;
}

// Runs a valid call in all ways, and returns its results.
std::vector<std::vector<char>> run_valid(const HandlerCall& call) {
  const Outcome first = run_call(call, pool_of_one(), Place::kEnd);
  const Outcome second = run_call(call, pool_of_three(), Place::kStart, 0x11);
  check(first.error.empty(), "%s: %s", call.target.c_str(), first.error.c_str());
  check(first.results == second.results, "%s: depends on threads, placement or what was there",
        call.target.c_str());
  return first.results;
}

bool same_bytes(const char* a, const char* b, std::size_t size) { return std::memcmp(a, b, size) == 0; }

// ---- Oracles ----

// Each element alone gives what it gives among the others. Payloads of NaN are free.
void check_elements(const HandlerCall& call, const Storage& storage, const std::vector<char>& y) {
  std::vector<std::vector<char>> expected = run_directly(call).results;
  for (std::size_t i = 0; i * storage.size < y.size(); ++i) {
    const bool nan = std::isnan(storage.get(expected[0].data(), i)) && std::isnan(storage.get(y.data(), i));
    check(nan || same_bytes(expected[0].data() + i * storage.size, y.data() + i * storage.size, storage.size),
          "%s %s: [%zu] is %g, alone %g", call.target.c_str(), storage.name, i, storage.get(y.data(), i),
          storage.get(expected[0].data(), i));
  }
}

// The numbers of a line, where the definition holds in double: finite, or -inf beside something finite.
struct Line {
  double maximum = -kInfinity, sum = 0;
  bool defined = true;
};

template <class Get>
Line read_line(std::size_t length, const Get& get) {
  Line line;
  for (std::size_t i = 0; i < length; ++i) {
    const double x = get(i);
    line.defined = line.defined && !std::isnan(x) && x != kInfinity;
    line.maximum = std::fmax(line.maximum, x);
  }
  line.defined = line.defined && line.maximum != -kInfinity;
  for (std::size_t i = 0; line.defined && i < length; ++i) line.sum += std::exp(get(i) - line.maximum);
  return line;
}

double input(const Storage& storage, const std::vector<char>& data, std::size_t i) {
  return flushed(static_cast<float>(storage.get(data.data(), i)));
}

// A reduced line against the definition; `kept` says which elements take part.
template <class Kept>
void check_line(const char* what, Reduction reduction, int order, const Storage& storage,
                const std::vector<char>& x, const std::vector<char>& y, std::size_t first, std::size_t stride,
                std::size_t length, std::size_t first_result, const Kept& kept) {
  const Line line = read_line(
      length, [&](std::size_t i) { return kept(i) ? input(storage, x, first + i * stride) : -kInfinity; });
  const auto result = [&](std::size_t i) { return storage.get(y.data(), first_result + i * stride); };
  bool any = false;
  for (std::size_t i = 0; i < length; ++i) any = any || kept(i);
  if (!line.defined) {
    // Without a kept element there are zeros; otherwise NaN or an infinity takes part: softmax has no number.
    if (reduction != Reduction::kSoftmax) return;
    for (std::size_t i = 0; i < length; ++i) {
      check(any && kept(i) ? std::isnan(result(i)) : result(i) == 0, "%s: undefined line gives [%zu] = %g",
            what, i, result(i));
    }
    return;
  }
  const double log_sum = std::log(line.sum), rounding = 0x1p-22;
  if (reduction == Reduction::kLogSumExp) {
    const double expected = line.maximum + log_sum;
    check(within(result(0), expected, 0, storage,
                 bounds::logsumexp_absolute[order - 1] + rounding * std::fabs(expected)),
          "%s order %d: %.9g, exact %.9g", what, order, result(0), expected);
    return;
  }
  double total = 0;
  for (std::size_t i = 0; i < length; ++i) {
    if (reduction == Reduction::kSoftmax) {
      const double expected =
          kept(i) ? std::exp(input(storage, x, first + i * stride) - line.maximum) / line.sum : 0;
      total += result(i);
      // Order 1 scales all exponentials of a row by less than 1 (the factor cancels): they are flushed sooner.
      const double more = order == 1 ? 0.25 * kSmallestNormal : 0;
      check(within(result(i), expected, bounds::softmax[order - 1], storage, more),
            "%s order %d: [%zu] = %.9g, exact %.9g", what, order, i, result(i), expected);
    } else if (!kept(i)) {
      check(result(i) == -kInfinity, "%s: masked [%zu] = %g", what, i, result(i));
    } else {
      const double distance = input(storage, x, first + i * stride) - line.maximum;
      const double expected = distance - log_sum;
      if (std::fabs(expected) > 3e38) continue;  // overflows in float32
      check(within(result(i), expected, 0, storage,
                   bounds::log_softmax_absolute[order - 1] + rounding * std::fabs(distance)),
            "%s order %d: [%zu] = %.9g, exact %.9g", what, order, i, result(i), expected);
    }
  }
  if (reduction == Reduction::kSoftmax) {
    // The computed weights are normalised, so their sum errs by rounding alone; but in the pieces of a long row
    // they are relative to maxima of their own, between which an approximation has another error.
    const double n = static_cast<double>(length), pieces = n > 4096 ? bounds::softmax[order - 1] : 0;
    check(
        std::fabs(total - 1) <= storage.half_ulp + storage.absolute * n + (std::sqrt(n) + 8) * 0x1p-23 + pieces,
        "%s %s order %d: a sum of %.9g of %zu, %zu apart", what, storage.name, order, total, length, stride);
  }
}

// ---- The families ----

void fuzz_elementwise(Source& source) {
  std::mt19937 random(source.word());
  const auto function = static_cast<Unary>(source.below(static_cast<std::size_t>(Unary::kCount)));
  const Storage& storage = take_storage(source);
  const int order = 1 + static_cast<int>(source.below(kMaxOrder));
  HandlerCall call = elementwise_call(function, storage, order, take_dims(source, 2000), random);
  fill_values(source, call.operands[0]);
  if (runs_changed(source, call)) return;
  const ElementwiseKernels::UnaryFn kernel =
      active_table().elementwise.unary[static_cast<int>(function)][static_cast<int>(storage.dtype)][order - 1];
  const std::size_t count = count_of(call.operands[0].dims);
  call.direct = [&](const auto& in, const auto& out) {
    for (std::size_t i = 0; i < count; ++i) {
      kernel(in[0] + i * storage.size, out[0] + i * storage.size, 1, Stores::kCached);
    }
  };
  check_elements(call, storage, run_valid(call)[0]);
}

void fuzz_two_operands(Source& source, bool split) {
  std::mt19937 random(source.word());
  auto function = static_cast<Binary>(source.below(static_cast<std::size_t>(Binary::kCount)));
  if (split) function = static_cast<Binary>(static_cast<std::size_t>(Binary::kGlu) + source.below(4));
  const Storage& storage = take_storage(source);
  const int order = 1 + static_cast<int>(source.below(kMaxOrder));
  const BinaryForm form = split ? BinaryForm::kSplit : forms_of(function)[0];
  const Dims dims = take_dims(source, 2000);
  const bool gate_first = source.one_in(2);
  HandlerCall call = binary_call(function, form, gate_first, storage, order, dims, random);
  for (Operand& operand : call.operands) fill_values(source, operand);
  if (runs_changed(source, call)) return;
  const ElementwiseKernels::BinaryFn kernel =
      active_table().elementwise.binary[static_cast<int>(function)][static_cast<int>(storage.dtype)][order - 1];
  const std::size_t columns = static_cast<std::size_t>(dims.back()), count = count_of(dims),
                    size = storage.size;
  call.direct = [&](const auto& in, const auto& out) {
    for (std::size_t i = 0; i < count; ++i) {
      const char *a = in[0] + i * size, *b = split ? nullptr : in[1] + i * size;
      if (form == BinaryForm::kBiased) b = in[1] + i % columns * size;
      if (split) {
        const char* row = in[0] + i / columns * 2 * columns * size + i % columns * size;
        a = gate_first ? row : row + columns * size;
        b = gate_first ? row + columns * size : row;
      }
      kernel(a, 0, b, 0, out[0] + i * size, 1, 1, Stores::kCached);
    }
  };
  check_elements(call, storage, run_valid(call)[0]);
}

void fuzz_binary(Source& source) { fuzz_two_operands(source, false); }
void fuzz_split(Source& source) { fuzz_two_operands(source, true); }

void fuzz_reduction(Source& source) {
  std::mt19937 random(source.word());
  const auto reduction = static_cast<Reduction>(source.below(3));
  const Storage& storage = take_storage(source);
  const int order = 1 + static_cast<int>(source.below(kMaxOrder));
  Dims dims = take_dims(source, 3000);
  if (dims.size() > 1 && source.one_in(3)) std::swap(dims.front(), dims.back());
  const std::size_t axis = source.below(dims.size());
  const std::size_t length = static_cast<std::size_t>(dims[axis]);
  HandlerCall call = reduction_call(reduction, storage, order, dims, static_cast<int>(axis), random);
  fill_values(source, call.operands[0]);
  if (runs_changed(source, call)) return;
  const bool removed = reduction == Reduction::kLogSumExp;
  if (removed && length == 0) return run_changed(call, Change::kOpen);
  const std::vector<char> y = run_valid(call)[0];
  std::size_t inner = 1;
  for (std::size_t i = axis + 1; i < dims.size(); ++i) inner *= static_cast<std::size_t>(dims[i]);
  const std::size_t count = count_of(dims);
  for (std::size_t line = 0; count != 0 && line < count / length; ++line) {
    const std::size_t outer = line / inner, column = line % inner;
    check_line(call.target.c_str(), reduction, order, storage, call.operands[0].bytes, y,
               outer * length * inner + column, inner, length, removed ? line : outer * length * inner + column,
               [](std::size_t) { return true; });
  }
}

void fuzz_masked(Source& source) {
  std::mt19937 random(source.word());
  const auto reduction = static_cast<Reduction>(source.below(2));
  const Storage& storage = take_storage(source);
  const int order = 1 + static_cast<int>(source.below(kMaxOrder));
  const Dims dims = take_dims(source, 3000);
  Dims mask_dims = dims;
  for (std::size_t i = 0; i + 1 < dims.size(); ++i) {
    if (source.one_in(3)) mask_dims[i] = 1;
  }
  HandlerCall call = masked_call(reduction, storage, order, dims, mask_dims, random);
  fill_values(source, call.operands[0]);
  if (source.one_in(4)) std::fill(call.operands[1].bytes.begin(), call.operands[1].bytes.end(), char{0});
  if (runs_changed(source, call)) return;
  const std::vector<char> y = run_valid(call)[0];
  const std::size_t columns = static_cast<std::size_t>(dims.back()), count = count_of(dims);
  for (std::size_t row = 0; count != 0 && row < count / columns; ++row) {
    std::size_t left = row, stride = columns, offset = 0;
    for (std::size_t axis = dims.size() - 1; axis-- > 0;) {
      const std::size_t index = left % static_cast<std::size_t>(dims[axis]);
      left /= static_cast<std::size_t>(dims[axis]);
      if (mask_dims[axis] != 1) offset += index * stride;
      stride *= static_cast<std::size_t>(mask_dims[axis]);
    }
    check_line(call.target.c_str(), reduction, order, storage, call.operands[0].bytes, y, row * columns, 1,
               columns, row * columns, [&](std::size_t i) { return call.operands[1].bytes[offset + i] != 0; });
  }
}

void fuzz_norm(Source& source) {
  std::mt19937 random(source.word());
  const Storage& storage = take_storage(source);
  const bool centered = source.one_in(2), residual = source.one_in(2);
  const Dims dims = take_dims(source, 3000);
  const std::size_t own_axes = source.below(dims.size());
  HandlerCall call = norm_call(centered, residual, storage, dims, own_axes, random);
  for (Operand& operand : call.operands) {
    if (source.one_in(2)) fill_values(source, operand);
  }
  if (runs_changed(source, call)) return;
  const std::vector<std::vector<char>> results = run_valid(call);
  const std::size_t columns = static_cast<std::size_t>(dims.back()), count = count_of(dims);
  const std::size_t rows = count == 0 ? 0 : count / columns, scales = residual + std::size_t{1};
  const std::size_t groups = count_of(call.operands[scales].dims) / std::max<std::size_t>(columns, 1);
  for (std::size_t row = 0; row < rows; ++row) {
    const std::size_t own = row / (rows / groups) * columns;
    const auto floats = [&](const Operand& operand) {
      return reinterpret_cast<const float*>(operand.bytes.data()) + own;
    };
    const Norm norm = {floats(call.operands[scales]), centered ? floats(call.operands.back()) : nullptr, 1e-5f,
                       centered};
    check_norm_row({storage, call.operands[0].bytes.data(), residual ? call.operands[1].bytes.data() : nullptr,
                    results[0].data(), residual ? results[1].data() : nullptr, row * columns, columns},
                   norm, call.target + " " + storage.name);
  }
}

// ---- Attention ----

bool is_kept(const AttentionProblem& p, std::ptrdiff_t b, std::ptrdiff_t n, std::ptrdiff_t t,
             std::ptrdiff_t s) {
  const AttentionProblem::Strides& m = p.mask_strides;
  if (p.mask && !p.mask[b * m.batch + n * m.head + t * m.query + s * m.key]) return false;
  if (p.is_causal && s > t) return false;
  if (p.window_left >= 0 && t - s > p.window_left) return false;
  if (p.window_right >= 0 && s - t > p.window_right) return false;
  if (p.query_lengths && t >= p.query_lengths[b]) return false;
  if (p.query_segments && p.query_segments[b * static_cast<std::ptrdiff_t>(p.query_length) + t] !=
                              p.key_segments[b * static_cast<std::ptrdiff_t>(p.key_length) + s]) {
    return false;
  }
  return !(p.key_lengths && s >= p.key_lengths[b]);
}

// A row against the definition. What is not finite is not compared: tiles that are skipped differ there.
void check_attention_row(const AttentionProblem& p, const Storage& storage, int order, std::ptrdiff_t b,
                         std::ptrdiff_t n, std::ptrdiff_t t) {
  const auto at = [&](const Storage& type, const void* data, std::ptrdiff_t i) {
    return static_cast<double>(
        flushed(static_cast<float>(type.get(static_cast<const char*>(data), static_cast<std::size_t>(i)))));
  };
  // Of keys and values: float32 numbers, so a code times its scale may be infinite.
  const auto stored = [&](const void* data, const float* scales, std::ptrdiff_t head, std::ptrdiff_t s,
                          std::ptrdiff_t i) {
    if (!scales) return at(kStorage[static_cast<int>(p.kv_dtype)], data, i);
    const auto scale =
        (b * static_cast<std::ptrdiff_t>(p.kv_heads) + head) * static_cast<std::ptrdiff_t>(p.key_length) + s;
    const auto code = static_cast<float>(static_cast<const signed char*>(data)[i]);
    return static_cast<double>(code * static_cast<float>(at(kStorage[0], scales, scale)));
  };
  const auto keys = static_cast<std::ptrdiff_t>(p.key_length),
             values = static_cast<std::ptrdiff_t>(p.value_size);
  const auto size = static_cast<std::ptrdiff_t>(p.head_size),
             heads = static_cast<std::ptrdiff_t>(p.query_heads);
  const std::ptrdiff_t head = n / (heads / static_cast<std::ptrdiff_t>(p.kv_heads));
  const auto key_at = [&](std::ptrdiff_t s, std::ptrdiff_t i) {
    return stored(p.key.data, p.key_scales, head, s, b * p.key.batch + s * p.key.time + head * p.key.head + i);
  };
  // A mean of keys, which is taken off them in int8, may be as large as any.
  const bool bytes = p.format == AttentionFormat::kInt8 && active_table().attention.of(p.format).score;
  double largest_key = 0;
  for (std::ptrdiff_t s = 0; bytes && s < keys; ++s) {
    for (std::ptrdiff_t i = 0; i < size; ++i) largest_key = std::fmax(largest_key, std::fabs(key_at(s, i)));
  }
  std::vector<double> logits;
  double error = 0, maximum = -kInfinity, largest = 0;
  for (std::ptrdiff_t s = 0; s < keys; ++s) {
    double dot = 0, magnitude = 0, largest_query = 0, query_sum = 0, key_sum = 0;
    for (std::ptrdiff_t i = 0; i < size; ++i) {
      const double q = at(storage, p.query.data, b * p.query.batch + t * p.query.time + n * p.query.head + i) *
                       static_cast<double>(p.scale);
      const double k = key_at(s, i), product = q * k;
      dot += product;
      magnitude += std::fabs(product);
      largest_query = std::fmax(largest_query, std::fabs(q));
      query_sum += std::fabs(q);
      key_sum += std::fabs(k) + largest_key;
    }
    if (!(magnitude < 1e30)) return;
    double rounding = (std::sqrt(static_cast<double>(size)) + 8) * 0x1p-24 * magnitude + 0x1p-120;
    // Codes err by half of 1/127 of the largest element, of keys less a mean of them.
    if (bytes) {
      const double both = static_cast<double>(size) * largest_query * 2 * largest_key / 254;
      rounding += 1.001 / 254 * (2 * largest_key * query_sum + largest_query * key_sum + both);
    }
    if (p.soft_cap != 0) {
      dot = p.soft_cap * std::tanh(dot / p.soft_cap);
      rounding += bounds::tanh[order - 1] * std::fabs(dot) + 0x1p-22 * static_cast<double>(p.soft_cap);
    }
    if (p.bias) {
      const AttentionProblem::Strides& m = p.bias_strides;
      dot += at(kStorage[static_cast<int>(p.bias_dtype)], p.bias,
                b * m.batch + n * m.head + t * m.query + s * m.key);
      rounding += 0x1p-23 * std::fabs(dot);
    }
    if (!(std::fabs(dot) < 1e30)) return;
    if (!is_kept(p, b, n, t, s)) dot = kMaskedLogit;
    logits.push_back(dot);
    error = std::fmax(error, rounding);
    maximum = std::fmax(maximum, dot);
  }
  if (error > (bytes ? 0.3 : 0.1)) return;  // logits so large that their rounding decides
  double sum = 0;
  for (const double x : logits) sum += std::exp(x - maximum);
  const bool valid = !p.query_lengths || t < p.query_lengths[b];
  const double e = bounds::exp[order - 1] / (1 - bounds::exp[order - 1]);
  const double u = p.format == AttentionFormat::kBFloat16 && active_table().attention.of(p.format).score
                       ? storage.half_ulp
                       : 0;
  const double a = (std::sqrt(static_cast<double>(keys)) + 8) * 0x1p-24;
  const std::ptrdiff_t row = (b * static_cast<std::ptrdiff_t>(p.query_length) + t) * heads + n;
  for (std::ptrdiff_t j = 0; j < values; ++j) {
    double exact = 0;
    largest = 0;
    for (std::ptrdiff_t s = 0; s < keys; ++s) {
      const double v = stored(p.value.data, p.value_scales, head, s,
                              b * p.value.batch + s * p.value.time + head * p.value.head + j);
      exact += std::exp(logits[static_cast<std::size_t>(s)] - maximum) / sum * v;
      largest = std::fmax(largest, std::isnan(v) ? kInfinity : std::fabs(v));
    }
    if (!(largest < 1e30)) continue;
    // The error of two weights and of their sum; rounded weights move the mean by u of the spread.
    // In int8 they have 1/255 of the largest, and values half of 1/127.
    const double of_bytes = bytes ? std::fmin(2.2 * static_cast<double>(keys) / 255, 1.0) + 1.0 / 254 : 0;
    const double spread = std::fmin(2 * (e + 1.1 * error), 1.0) + a + 2.2 * u + of_bytes;
    const double actual =
        storage.get(static_cast<const char*>(p.out), static_cast<std::size_t>(row * values + j));
    check(within(actual, valid ? exact : 0, 0, storage, valid ? 2 * spread * largest + 0x1p-120 : 0),
          "attention %s order %d: [%td, %td, %td, %td] = %.9g, exact %.9g", storage.name, order, b, t, n, j,
          actual, exact);
  }
  const double residual = valid ? maximum + std::log(sum) : static_cast<double>(kMaskedLogit);
  check(within(p.residual[row], residual, 0x1p-22, kStorage[0],
               bounds::logsumexp_absolute[order - 1] + error + a),
        "attention %s order %d: residual [%td, %td, %td] = %.9g, exact %.9g", storage.name, order, b, t, n,
        static_cast<double>(p.residual[row]), residual);
}

void fuzz_attention(Source& source) {
  std::mt19937 random(source.word());
  const Storage& storage = take_storage(source);
  const int order = 1 + static_cast<int>(source.below(kMaxOrder));
  AttentionShape s;
  const bool long_keys = source.one_in(8);
  s.batch = source.size(3);
  s.kv_heads = source.size(3);
  s.heads = s.kv_heads * (1 + source.size(3));
  s.query_length = source.size(source.one_in(2) ? 70 : 9);
  s.key_length = source.size(long_keys ? 1200 : 90);
  s.head_size = source.size(40);
  s.value_size = source.size(40);
  const std::size_t packed = source.below(4);
  if (packed >= 2) {
    s.packed_axis = static_cast<int>(packed);
    s.key_length = s.query_length;
    s.heads = s.kv_heads;
    s.value_size = s.head_size;
  } else if (source.one_in(2)) {
    s.stored = &take_storage(source);
    s.codes = source.one_in(2);
  }
  s.bias = source.one_in(3);
  s.mask = source.one_in(3);
  s.query_lengths = source.one_in(4);
  s.key_lengths = source.one_in(4);
  s.segments = source.one_in(4);
  s.bias_storage = &take_storage(source);
  s.bias_broadcast = static_cast<unsigned>(source.below(16));
  s.mask_broadcast = static_cast<unsigned>(source.below(16));
  s.is_causal = source.one_in(3);
  if (source.one_in(4)) s.window_left = static_cast<int>(source.below(60));
  if (source.one_in(4)) s.window_right = static_cast<int>(source.below(60));
  if (source.one_in(4)) s.soft_cap = 3;
  // Others would be rounded before they are multiplied by bfloat16.
  if (storage.dtype == DType::kBFloat16 && !s.stored) s.format = AttentionFormat::kBFloat16;
  if (source.one_in(3)) s.format = AttentionFormat::kInt8;
  HandlerCall call = attention_call(s, storage, order, random);
  for (Operand& operand : call.operands) {
    if (source.one_in(4)) fill_values(source, operand);
  }
  if (s.mask && source.one_in(3)) {
    Operand& mask = call.operands[s.packed_axis == 0 ? 3u + s.bias : 1u + s.bias];
    std::fill(mask.bytes.begin(), mask.bytes.end(), static_cast<char>(source.one_in(2)));
  }
  if (runs_changed(source, call)) return;
  if (s.kv_heads == 0) return run_changed(call, Change::kOpen);
  std::vector<std::vector<char>> results = run_valid(call);
  std::vector<const char*> in;
  for (const Operand& operand : call.operands) in.push_back(operand.bytes.data());
  const AttentionProblem p = problem_of(s, storage, in, {results[0].data(), results[1].data()});
  if (s.key_length == 0) return;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    for (std::int64_t n = 0; n < s.heads; ++n) {
      for (std::int64_t t = 0; t < s.query_length; t += 1 + s.query_length / 12) {
        check_attention_row(p, storage, order, b, n, t);
      }
    }
  }
}

void fuzz_dense(Source& source) {
  std::mt19937 random(source.word());
  DenseShape s;
  s.format = static_cast<DenseFormat>(source.below(kDenseProblemFormats));
  s.in = &take_storage(source);
  s.out = &take_storage(source);
  s.order = 1 + static_cast<int>(source.below(kMaxOrder));
  const bool large = source.one_in(16);
  s.rows = source.below(large ? 260 : 30);
  s.size = 1 + source.below(140);
  s.columns = {source.below(large ? 300 : 70)};
  if (s.is_int4() || (s.is_int8() && source.one_in(2))) {
    s.group_size = 32 * (1 + source.below(3));
    s.size = s.group_size * (1 + source.below(4));
    s.offsets = source.one_in(2);
  }
  if (source.one_in(3)) {
    s.columns.push_back(source.below(40));
  } else {
    s.gate = source.one_in(3);
    s.gate_bias = s.gate && source.one_in(2);
    s.residual = source.one_in(3);
  }
  if (source.one_in(3)) s.norm = source.one_in(2) ? DenseNorm::kLayer : DenseNorm::kRms;
  s.permutation = source.one_in(3);
  s.bias = source.one_in(2);
  s.activation = source.one_in(3);
  s.integers = source.one_in(2) && s.norm == DenseNorm::kNone;
  s.range = s.format == DenseFormat::kInt8Quantized && !s.group_size && source.one_in(2);
  if (s.range && s.norm == DenseNorm::kNone && !s.permutation && source.one_in(2)) s.in = &kCodeStorage;
  if (s.columns.size() == 1 && !s.residual && source.one_in(3)) s.out = &kCodeStorage;
  const std::int64_t stack = source.one_in(4) ? source.size(3) : 1;
  HandlerCall call = dense_call(s, stack, source.one_in(2), random);
  if (!s.integers) fill_values(source, call.operands[0]);
  const bool others = source.one_in(8);  // values for which the definition says too little
  for (std::size_t i = 1; others && i < call.operands.size(); ++i) fill_values(source, call.operands[i]);
  if (runs_changed(source, call)) return;
  const std::vector<std::vector<char>> results = run_valid(call);
  // Normalised values that err by little may be quantised to other integers; test_dense bounds that.
  if (others || (s.quantized() && s.norm != DenseNorm::kNone)) return;
  std::vector<const char*> in, out;
  for (const Operand& operand : call.operands) in.push_back(operand.bytes.data());
  for (const std::vector<char>& result : results) out.push_back(result.data());
  for (std::int64_t i = 0; i < stack; ++i) {
    const DensePointers operands = dense_pointers(s, dense_slices(call.operands, in, i));
    for (std::size_t row = 0; row < s.rows; row += 1 + s.rows / 8) {
      bool moderate = true;  // float32 has what the sums come by
      for (std::size_t k = 0; k < s.size; ++k) {
        const double x = s.in->get(operands.x, row * s.size + k);
        moderate = moderate && !(std::isfinite(x) && std::fabs(x) > 1e6);
      }
      if (!moderate) continue;
      check_dense_row(s, operands, dense_slices(call.results, out, i), row, describe(s), 1 + s.columns[0] / 16);
    }
  }
}

}  // namespace

void fuzz(FuzzFamily family, const std::uint8_t* data, std::size_t size) {
  static constexpr void (*kFamilies[])(Source&) = {
#define QUAKE_FAMILY(name) fuzz_##name,
      QUAKE_FUZZ_FAMILIES(QUAKE_FAMILY)
#undef QUAKE_FAMILY
  };
  ScopedFlushDenormals flush;
  Source source(data, size);
  kFamilies[static_cast<int>(family)](source);
  check(live_errors == 0, "an error was not destroyed");
  if (failures != 0) std::abort();
}

}  // namespace quake::tests
