// The typed FFI handlers: decode XLA's buffers, validate them, split the work over threads, call a kernel.
// The only file that knows XLA's buffers.

#include "ffi_handlers.h"

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "attention.h"
#include "denormals.h"
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

bool same_dimensions(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b) {
  return a.element_type() == b.element_type() && std::ranges::equal(a.dimensions(), b.dimensions());
}

ffi::Error invalid(const char* target, const std::string& problem) {
  return ffi::Error::InvalidArgument(std::string(target) + ": " + problem);
}

// Whether the offsets of all bytes can be computed: the products of the sizes and of any of them, which are
// the strides, do not overflow. XLA has no such buffer; its shapes, with an axis of size 0, can be so.
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

// How a table is indexed for a call, and the size of an element.
struct Call {
  int dtype;
  int order_index;
  std::size_t element_size;
};

// Checks what all handlers have in common: the order, that `others` have x's type, and that no size overflows.
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
  switch (x.element_type()) {
    case ffi::F32:
      return Call{static_cast<int>(DType::kFloat32), order - 1, 4};
    case ffi::BF16:
      return Call{static_cast<int>(DType::kBFloat16), order - 1, 2};
    case ffi::F16:
      return Call{static_cast<int>(DType::kFloat16), order - 1, 2};
    default:
      return ffi::Unexpected(
          invalid(target, "operand " + describe(x) + ", expected float32, bfloat16 or float16"));
  }
}

ffi::Error mismatch(const char* target, const ffi::AnyBuffer& a, const ffi::AnyBuffer& b,
                    const char* expected) {
  return invalid(target, "buffers " + describe(a) + " and " + describe(b) + ", expected " + expected);
}

const char* bytes(const ffi::AnyBuffer& buffer) { return static_cast<const char*>(buffer.untyped_data()); }
char* bytes(ffi::Result<ffi::AnyBuffer>& buffer) { return static_cast<char*>(buffer->untyped_data()); }

// ---- Element-wise ----

ffi::Error run_elementwise(const char* target, Elementwise function, ffi::ThreadPool pool, std::int32_t order,
                           ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  const ffi::ErrorOr<Call> call = check(target, order, x, {&*y});
  if (call.has_error()) return call.error();
  if (!same_dimensions(x, *y)) return mismatch(target, x, *y, "the same shape");
  const ElementwiseFn kernel =
      active_table().elementwise[static_cast<int>(function)][call->dtype][call->order_index];
  const char* in = bytes(x);
  char* out = bytes(y);
  const std::size_t count = x.element_count(), size = call->element_size;
  const Stores stores = stores_for(count * size);
  parallel_for(pool, ceil_div(count, kChunkElements), [=](std::size_t chunk) {
    const std::size_t begin = chunk * kChunkElements;
    kernel(in + begin * size, out + begin * size, std::min(kChunkElements, count - begin), stores);
  });
  return ffi::Error::Success();
}

// ---- Two operands ----

// Runs a binary kernel over rows of `columns` elements, the operands' rows being a_stride and b_stride apart.
// A single row is cut into chunks of its own.
void run_binary_rows(Binary function, const Call& call, ffi::ThreadPool pool, const char* a,
                     std::size_t a_stride, const char* b, std::size_t b_stride, char* y, std::size_t rows,
                     std::size_t columns) {
  if (rows == 0 || columns == 0) return;
  const BinaryFn kernel = active_table().binary[static_cast<int>(function)][call.dtype][call.order_index];
  const std::size_t size = call.element_size;
  const Stores stores = stores_for(rows * columns * size);
  if (rows == 1) {
    parallel_for(pool, ceil_div(columns, kChunkElements), [=](std::size_t chunk) {
      const std::size_t begin = chunk * kChunkElements, offset = begin * size;
      kernel(a + offset, 0, b + offset, 0, y + offset, 1, std::min(kChunkElements, columns - begin), stores);
    });
    return;
  }
  const std::size_t chunk_rows = std::max<std::size_t>(1, kChunkElements / columns);
  parallel_for(pool, ceil_div(rows, chunk_rows), [=](std::size_t chunk) {
    const std::size_t begin = chunk * chunk_rows;
    kernel(a + begin * a_stride * size, a_stride, b + begin * b_stride * size, b_stride,
           y + begin * columns * size, std::min(chunk_rows, rows - begin), columns, stores);
  });
}

ffi::Error run_binary(const char* target, Binary function, ffi::ThreadPool pool, std::int32_t order,
                      ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> y) {
  const ffi::ErrorOr<Call> call = check(target, order, a, {&b, &*y});
  if (call.has_error()) return call.error();
  if (!same_dimensions(a, b)) return mismatch(target, a, b, "the same shape");
  if (!same_dimensions(a, *y)) return mismatch(target, a, *y, "the same shape");
  run_binary_rows(function, *call, pool, bytes(a), 0, bytes(b), 0, bytes(y), 1, a.element_count());
  return ffi::Error::Success();
}

// Gate and value are the halves of the last axis of x.
ffi::Error run_split(const char* target, Binary function, ffi::ThreadPool pool, std::int32_t order,
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
  const std::size_t rows = y->element_count() / columns;
  const char* first = bytes(x);
  const char* second = first + columns * call->element_size;
  run_binary_rows(function, *call, pool, gate_first ? first : second, 2 * columns, gate_first ? second : first,
                  2 * columns, bytes(y), rows, columns);
  return ffi::Error::Success();
}

ffi::Error run_biased(const char* target, Binary function, ffi::ThreadPool pool, std::int32_t order,
                      ffi::AnyBuffer x, ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y) {
  const ffi::ErrorOr<Call> call = check(target, order, x, {&bias, &*y});
  if (call.has_error()) return call.error();
  if (!same_dimensions(x, *y)) return mismatch(target, x, *y, "the same shape");
  if (x.dimensions().size() == 0 || bias.dimensions().size() != 1 ||
      bias.dimensions()[0] != x.dimensions().back()) {
    return mismatch(target, x, bias, "a bias as long as the operand's last axis");
  }
  const std::size_t columns = static_cast<std::size_t>(x.dimensions().back());
  const std::size_t rows = columns == 0 ? 0 : x.element_count() / columns;
  run_binary_rows(function, *call, pool, bytes(x), columns, bytes(bias), 0, bytes(y), rows, columns);
  return ffi::Error::Success();
}

// ---- Reductions of an axis ----

// A buffer as outer x length x inner around an axis.
struct AxisView {
  std::size_t outer = 1, length = 1, inner = 1;
};

AxisView view(const ffi::AnyBuffer& x, std::int32_t axis) {
  AxisView v;
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(x.dimensions().size()); ++i) {
    const auto size = static_cast<std::size_t>(x.dimensions()[static_cast<std::size_t>(i)]);
    (i < axis ? v.outer : i == axis ? v.length : v.inner) *= size;
  }
  return v;
}

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

ffi::Error run_reduction(const char* target, Reduction reduction, ffi::ThreadPool pool, std::int32_t order,
                         std::int32_t axis, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  const ffi::ErrorOr<Call> call = check(target, order, x, {&*y});
  if (call.has_error()) return call.error();
  const bool removed = reduction == Reduction::kLogSumExp;
  if (ffi::Error error = check_axis(target, axis, x, *y, removed); error.failure()) return error;
  const AxisView v = view(x, axis);
  if (v.outer * v.length * v.inner == 0) {
    // A result without the axis may have elements all the same: the logarithm of an empty sum.
    if (y->element_count() > 0) return invalid(target, "the axis of " + describe(x) + " is empty");
    return ffi::Error::Success();
  }
  const std::size_t size = call->element_size, out_length = removed ? 1 : v.length;
  const Stores stores = stores_for(v.outer * out_length * v.inner * size);
  const char* in = bytes(x);
  char* out = bytes(y);
  if (v.inner == 1) {
    const RowsFn kernel = active_table().rows[static_cast<int>(reduction)][call->dtype][call->order_index];
    const std::size_t chunk_rows = std::max<std::size_t>(1, kChunkElements / v.length);
    parallel_for(pool, ceil_div(v.outer, chunk_rows), [=](std::size_t chunk) {
      const std::size_t begin = chunk * chunk_rows;
      kernel(in + begin * v.length * size, out + begin * out_length * size,
             std::min(chunk_rows, v.outer - begin), v.length, stores);
    });
    return ffi::Error::Success();
  }
  // Whole cache lines of columns, so that no two threads write to one.
  constexpr std::size_t kColumnStep = 64;
  const ColumnsFn kernel = active_table().columns[static_cast<int>(reduction)][call->dtype][call->order_index];
  const std::size_t chunk_columns =
      std::max<std::size_t>(1, kChunkElements / v.length / kColumnStep) * kColumnStep;
  const std::size_t blocks = ceil_div(v.inner, chunk_columns);
  parallel_for(pool, v.outer * blocks, [=](std::size_t chunk) {
    const std::size_t outer = chunk / blocks, column = chunk % blocks * chunk_columns;
    kernel(in + (outer * v.length * v.inner + column) * size,
           out + (outer * out_length * v.inner + column) * size, v.length, v.inner,
           std::min(chunk_columns, v.inner - column));
  });
  return ffi::Error::Success();
}

// For each row of x, where its bytes begin in a mask of the same rank whose axes other than the last may be 1.
std::vector<std::size_t> mask_offsets(const ffi::AnyBuffer& x, const ffi::AnyBuffer& mask) {
  std::vector<std::size_t> offsets = {0};
  std::size_t stride = static_cast<std::size_t>(mask.dimensions().back());
  std::size_t inner_rows = 1;
  offsets.resize(x.element_count() / stride);
  // From the last axis but one outwards: repeat what is there with the axis's offset added.
  for (std::size_t i = x.dimensions().size() - 1; i-- > 0;) {
    const auto size = static_cast<std::size_t>(x.dimensions()[i]);
    const auto mask_size = static_cast<std::size_t>(mask.dimensions()[i]);
    for (std::size_t k = 1; k < size; ++k) {
      for (std::size_t r = 0; r < inner_rows; ++r) {
        offsets[k * inner_rows + r] = offsets[r] + (mask_size == 1 ? 0 : k * stride);
      }
    }
    inner_rows *= size;
    stride *= mask_size;
  }
  return offsets;
}

ffi::Error run_masked(const char* target, Reduction reduction, ffi::ThreadPool pool, std::int32_t order,
                      std::int32_t axis, ffi::AnyBuffer x, ffi::AnyBuffer mask, ffi::Result<ffi::AnyBuffer> y) {
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
  const MaskedRowsFn kernel =
      active_table().masked_rows[static_cast<int>(reduction)][call->dtype][call->order_index];
  const std::size_t columns = static_cast<std::size_t>(dims.back()), rows = x.element_count() / columns;
  const std::size_t row_size = columns * call->element_size;
  const std::size_t chunk_rows = std::max<std::size_t>(1, kChunkElements / columns);
  const std::vector<std::size_t> offsets = mask_offsets(x, mask);
  const char* in = bytes(x);
  char* out = bytes(y);
  const auto* kept = static_cast<const unsigned char*>(mask.untyped_data());
  const std::size_t* row_offsets = offsets.data();
  parallel_for(pool, ceil_div(rows, chunk_rows), [=](std::size_t chunk) {
    const std::size_t begin = chunk * chunk_rows;
    kernel(in + begin * row_size, kept, row_offsets + begin, out + begin * row_size,
           std::min(chunk_rows, rows - begin), columns);
  });
  return ffi::Error::Success();
}

// ---- Attention ----

// What the call has beside queries, keys and values; the operands come in this order.
enum AttentionOperand : std::int32_t { kHasBias = 1, kHasMask = 2, kHasQueryLengths = 4, kHasKeyLengths = 8 };

struct AttentionAttributes {
  std::int32_t order;
  float scale, soft_cap;                              // soft_cap: 0 for none
  std::int32_t is_causal, window_left, window_right;  // windows: negative for no limit
  std::int32_t packed_axis;  // 2 or 3: of the one operand that holds queries, keys and values; else 0
  std::int32_t present;      // a sum of AttentionOperand
};

std::size_t extent(const ffi::AnyBuffer& x, std::size_t axis) {
  return static_cast<std::size_t>(x.dimensions()[axis]);
}

// Queries, keys or values of shape (batch, time, heads, size).
AttentionProblem::Operand whole_operand(const ffi::AnyBuffer& x) {
  const auto size = static_cast<std::ptrdiff_t>(x.dimensions()[3]);
  const std::ptrdiff_t time = static_cast<std::ptrdiff_t>(x.dimensions()[2]) * size;
  return {x.untyped_data(), static_cast<std::ptrdiff_t>(x.dimensions()[1]) * time, time, size};
}

// One of the three slices of x, of shape (batch, time, 3, heads, size) or (batch, time, heads, 3, size).
AttentionProblem::Operand packed_operand(const ffi::AnyBuffer& x, std::int32_t packed_axis, std::size_t slice,
                                         std::size_t element_size) {
  const auto dims = x.dimensions();
  const auto size = static_cast<std::ptrdiff_t>(dims[4]);
  const auto heads = static_cast<std::ptrdiff_t>(packed_axis == 2 ? dims[3] : dims[2]);
  const std::ptrdiff_t time = 3 * heads * size;
  const std::size_t begin = slice * static_cast<std::size_t>(packed_axis == 2 ? heads * size : size);
  // The address of an empty array may be null.
  const char* data = x.element_count() == 0 ? bytes(x) : bytes(x) + begin * element_size;
  return {data, static_cast<std::ptrdiff_t>(dims[1]) * time, time,
          packed_axis == 2 ? size : 3 * size};
}

// The strides of an array of shape `full`, any of whose axes may have size 1 instead; nothing if it has
// another shape.
std::optional<AttentionProblem::Strides> broadcast_strides(const ffi::AnyBuffer& x,
                                                           const std::size_t (&full)[4]) {
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

ffi::Error check_lengths(const char* target, const ffi::AnyBuffer& lengths, std::size_t batch) {
  if (lengths.element_type() != ffi::S32 || lengths.dimensions().size() != 1 || extent(lengths, 0) != batch) {
    return invalid(target, "lengths " + describe(lengths) + ", expected int32[" + std::to_string(batch) + "]");
  }
  return ffi::Error::Success();
}

bool has_dimensions(const ffi::AnyBuffer& x, std::initializer_list<std::size_t> expected) {
  return std::ranges::equal(x.dimensions(), expected,
                            [](std::int64_t a, std::size_t b) { return a == static_cast<std::int64_t>(b); });
}

// Fills in the queries, keys and values, from one operand or three.
ffi::Error take_operands(const char* target, const AttentionAttributes& attributes,
                         const std::vector<ffi::AnyBuffer>& x, std::size_t element_size, AttentionProblem& p) {
  p.batch = extent(x[0], 0);
  p.query_length = extent(x[0], 1);
  if (attributes.packed_axis != 0) {
    const std::size_t packed = static_cast<std::size_t>(attributes.packed_axis);
    if (extent(x[0], packed) != 3) return invalid(target, describe(x[0]) + ", expected an axis of size 3");
    p.key_length = p.query_length;
    p.query_heads = p.kv_heads = extent(x[0], 5 - packed);
    p.head_size = p.value_size = extent(x[0], 4);
    p.query = packed_operand(x[0], attributes.packed_axis, 0, element_size);
    p.key = packed_operand(x[0], attributes.packed_axis, 1, element_size);
    p.value = packed_operand(x[0], attributes.packed_axis, 2, element_size);
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

// Whether a call takes less time than a few hops through the pool. Results do not depend on it.
bool is_small(const AttentionProblem& p) {
  const std::size_t sizes = p.head_size + p.value_size;
  const std::size_t read = p.batch * p.key_length * p.kv_heads * sizes;
  return read < (std::size_t{1} << 17) &&
         p.batch * p.query_heads * p.query_length * p.key_length * sizes < (std::size_t{1} << 20);
}

ffi::Error run_attention_call(const char* target, ffi::ThreadPool pool, const AttentionAttributes& attributes,
                              ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  const bool packed = attributes.packed_axis != 0;
  if (packed && attributes.packed_axis != 2 && attributes.packed_axis != 3) {
    return invalid(target, "packed_axis is " + std::to_string(attributes.packed_axis) + ", expected 0, 2 or 3");
  }
  std::vector<ffi::AnyBuffer> x;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const ffi::ErrorOr<ffi::AnyBuffer> argument = arguments.get<ffi::AnyBuffer>(i);
    if (argument.has_error()) return argument.error();
    x.push_back(*argument);
  }
  std::size_t next = packed ? 1 : 3, expected = next;
  for (const auto operand : {kHasBias, kHasMask, kHasQueryLengths, kHasKeyLengths}) {
    expected += (attributes.present & operand) != 0;
  }
  if (x.size() != expected || results.size() != 2) {
    return invalid(target, std::to_string(x.size()) + " operands and " + std::to_string(results.size()) +
                               " results, expected " + std::to_string(expected) + " and 2");
  }
  ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> out_or = results.get<ffi::AnyBuffer>(0);
  if (out_or.has_error()) return out_or.error();
  ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> residual_or = results.get<ffi::AnyBuffer>(1);
  if (residual_or.has_error()) return residual_or.error();
  const ffi::AnyBuffer& out = **out_or;
  const ffi::AnyBuffer& residual = **residual_or;

  const ffi::ErrorOr<Call> call = packed ? check(target, attributes.order, x[0], {&out})
                                         : check(target, attributes.order, x[0], {&x[1], &x[2], &out});
  if (call.has_error()) return call.error();
  for (std::size_t i = 0; i < next; ++i) {
    const std::size_t rank = packed ? 5 : 4;
    if (x[i].dimensions().size() != rank) {
      return invalid(target, "operand " + describe(x[i]) + ", expected rank " + std::to_string(rank));
    }
  }
  AttentionProblem p;
  p.dtype = static_cast<DType>(call->dtype);
  if (ffi::Error error = take_operands(target, attributes, x, call->element_size, p); error.failure()) {
    return error;
  }
  if (!has_dimensions(out, {p.batch, p.query_length, p.query_heads, p.value_size})) {
    return mismatch(target, x[0], out, "a result of shape (batch, queries, heads, value size)");
  }
  if (!is_addressable(residual)) return not_addressable(target, residual);
  if (residual.element_type() != ffi::F32 ||
      !has_dimensions(residual, {p.batch, p.query_length, p.query_heads})) {
    return mismatch(target, out, residual, "a float32 residual of shape (batch, queries, heads)");
  }
  p.out = out.untyped_data();
  p.residual = static_cast<float*>(residual.untyped_data());

  const std::size_t full[4] = {p.batch, p.query_heads, p.query_length, p.key_length};
  if (attributes.present & kHasBias) {
    const ffi::AnyBuffer& bias = x[next++];
    const ffi::ErrorOr<Call> type = check(target, attributes.order, bias, {});
    if (type.has_error()) return type.error();
    const auto strides = broadcast_strides(bias, full);
    if (!strides) return mismatch(target, x[0], bias, "a bias of the logits' shape");
    p.bias = bias.untyped_data();
    p.bias_dtype = static_cast<DType>(type->dtype);
    p.bias_strides = *strides;
  }
  if (attributes.present & kHasMask) {
    const ffi::AnyBuffer& mask = x[next++];
    if (!is_addressable(mask)) return not_addressable(target, mask);
    const auto strides = broadcast_strides(mask, full);
    if (mask.element_type() != ffi::PRED || !strides) {
      return mismatch(target, x[0], mask, "a boolean mask of the logits' shape");
    }
    p.mask = static_cast<const unsigned char*>(mask.untyped_data());
    p.mask_strides = *strides;
  }
  if (attributes.present & kHasQueryLengths) {
    const ffi::AnyBuffer& lengths = x[next++];
    if (ffi::Error error = check_lengths(target, lengths, p.batch); error.failure()) return error;
    p.query_lengths = static_cast<const std::int32_t*>(lengths.untyped_data());
  }
  if (attributes.present & kHasKeyLengths) {
    const ffi::AnyBuffer& lengths = x[next++];
    if (ffi::Error error = check_lengths(target, lengths, p.batch); error.failure()) return error;
    p.key_lengths = static_cast<const std::int32_t*>(lengths.untyped_data());
  }
  p.scale = attributes.scale;
  p.soft_cap = attributes.soft_cap;
  p.is_causal = attributes.is_causal != 0;
  p.window_left = std::max<std::ptrdiff_t>(attributes.window_left, -1);
  p.window_right = std::max<std::ptrdiff_t>(attributes.window_right, -1);

  const bool small = is_small(p);
  const ParallelFor parallel = [&](std::size_t tasks, const std::function<void(std::size_t)>& body) {
    if (small) {
      ScopedFlushDenormals flush;
      for (std::size_t task = 0; task < tasks; ++task) body(task);
    } else {
      parallel_for(pool, tasks, body);
    }
  };
  if (const char* problem = run_attention(p, active_table(), call->order_index, parallel)) {
    return invalid(target, problem);
  }
  return ffi::Error::Success();
}

// ---- The handlers: one function per target ----

#define QUAKE_NAME(name, Functor) "quake_jax_" #name,
constexpr const char* kElementwiseNames[] = {QUAKE_ELEMENTWISE_KERNELS(QUAKE_NAME)};
constexpr const char* kBinaryNames[] = {QUAKE_BINARY_KERNELS(QUAKE_NAME)};
#define QUAKE_SPLIT_NAME(name, Functor) "quake_jax_" #name "_split",
constexpr const char* kSplitNames[] = {QUAKE_GATED_KERNELS(QUAKE_SPLIT_NAME)};
constexpr int kFirstGated = static_cast<int>(Binary::kGlu);
constexpr const char* kReductionNames[] = {"quake_jax_softmax", "quake_jax_log_softmax", "quake_jax_logsumexp"};
constexpr const char* kMaskedNames[] = {"quake_jax_softmax_where", "quake_jax_log_softmax_where"};
constexpr const char* kAttentionName = "quake_jax_dot_product_attention";

auto bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<std::int32_t>("order"); }

template <Elementwise function>
XLA_FFI_Error* elementwise_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler =
      bind()
          .Arg<ffi::AnyBuffer>()
          .Ret<ffi::AnyBuffer>()
          .To([](auto... arguments) {
            return run_elementwise(kElementwiseNames[static_cast<int>(function)], function, arguments...);
          })
          .release();
  return handler->Call(frame);
}

// The handler of operands of one shape, or of an operand and a bias.
template <Binary function, auto run>
XLA_FFI_Error* binary_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler = bind()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .To([](auto... arguments) {
                               return run(kBinaryNames[static_cast<int>(function)], function, arguments...);
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
            return run_split(kSplitNames[static_cast<int>(function) - kFirstGated], function, arguments...);
          })
          .release();
  return handler->Call(frame);
}

template <Reduction reduction>
XLA_FFI_Error* reduction_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler =
      bind()
          .Attr<std::int32_t>("axis")
          .Arg<ffi::AnyBuffer>()
          .Ret<ffi::AnyBuffer>()
          .To([](auto... arguments) {
            return run_reduction(kReductionNames[static_cast<int>(reduction)], reduction, arguments...);
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
            return run_masked(kMaskedNames[static_cast<int>(reduction)], reduction, arguments...);
          })
          .release();
  return handler->Call(frame);
}

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
          .RemainingArgs()
          .RemainingRets()
          .To([](ffi::ThreadPool pool, std::int32_t order, float scale, float soft_cap, std::int32_t is_causal,
                 std::int32_t window_left, std::int32_t window_right, std::int32_t packed_axis,
                 std::int32_t present, ffi::RemainingArgs arguments, ffi::RemainingRets results) {
            const AttentionAttributes attributes = {order,       scale,        soft_cap,    is_causal,
                                                    window_left, window_right, packed_axis, present};
            return run_attention_call(kAttentionName, pool, attributes, arguments, results);
          })
          .release();
  return handler->Call(frame);
}

}  // namespace

std::vector<FfiTarget> ffi_targets() {
#define QUAKE_ELEMENTWISE(name, Functor) {"quake_jax_" #name, elementwise_handler<Elementwise::k##Functor>},
#define QUAKE_SAME_SHAPE(name, Functor) {"quake_jax_" #name, binary_handler<Binary::k##Functor, run_binary>},
#define QUAKE_SPLIT(name, Functor) {"quake_jax_" #name "_split", split_handler<Binary::k##Functor>},
#define QUAKE_BIASED(name, Functor) {"quake_jax_" #name, binary_handler<Binary::k##Functor, run_biased>},
  return {
      QUAKE_ELEMENTWISE_KERNELS(QUAKE_ELEMENTWISE)  //
      QUAKE_SAME_SHAPE(logaddexp, LogAddExp)        //
      QUAKE_GATED_KERNELS(QUAKE_SAME_SHAPE)         //
      QUAKE_GATED_KERNELS(QUAKE_SPLIT)              //
      QUAKE_BIASED_KERNELS(QUAKE_BIASED)            //
      {kReductionNames[0], reduction_handler<Reduction::kSoftmax>},
      {kReductionNames[1], reduction_handler<Reduction::kLogSoftmax>},
      {kReductionNames[2], reduction_handler<Reduction::kLogSumExp>},
      {kMaskedNames[0], masked_handler<Reduction::kSoftmax>},
      {kMaskedNames[1], masked_handler<Reduction::kLogSoftmax>},
      {kAttentionName, attention_handler},
  };
}

}  // namespace quake
