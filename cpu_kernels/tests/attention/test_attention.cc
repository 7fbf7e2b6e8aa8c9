// Fused attention alone, without Python or XLA, against the definition in double precision.
//
// Tolerance of an output: |out - exact| <= (2 e + 2 d + a) max|v| + the rounding of the storage type, where
//   e  is the exponential's relative error of the order (bounds::exp); it counts twice, in the weights and in
//      their sum;
//   d  is the rounding of a logit in float32, the dot product and what is done to it: (sqrt(H) + 8) 2^-24 times
//      the sum of the products' magnitudes, and the tanh of a soft cap to its own bound;
//   a  is the rounding of the sums over the keys, (sqrt(S) + 8) 2^-24.
// Where bfloat16 is multiplied directly, the weights are rounded to it, by u = 2^-8 of each. The output is the
// mean of the values by those weights, which adds u sum p |v - out| / (1 - u); p and out are known to 2 e. The
// log-sum-exp is that of the weights before rounding.
// In int8 bytes_error() says what is added.

#include "attention/driver.h"
#include "tests/bounds.h"
#include "tests/harness.h"

namespace quake::tests {
namespace {

using std::ptrdiff_t;
using std::size_t;

// ---- Cases ----

enum class Values { kNormal, kLarge };
enum class Bias { kNone, kNormal, kLowest, kMinusInfinity };  // the last two: in some places, and in whole rows
enum class Mask { kNone, kRandom, kSparse, kCausal, kBlocks, kLate, kNothing };
// Texts one behind the other; a few segments in no order; none that queries and keys share.
enum class Segments { kNone, kTexts, kRandom, kDisjoint };

// int8 with a scale for each key and head.
constexpr int kCodes = static_cast<int>(DType::kInt8);

struct Case {
  size_t batch = 1, query_length = 1, key_length = 1, kv_heads = 1, groups = 1, head_size = 1, value_size = 1;
  int dtype = 0, order = 5;
  int kv_dtype = -1;                                   // of keys and values: kCodes, or that of queries if -1
  AttentionFormat format = AttentionFormat::kFloat32;  // that of the dtype, if that is bfloat16
  bool packed = false;                                 // queries, keys and values are slices of one array
  float soft_cap = 0;
  Bias bias = Bias::kNone;
  int bias_dtype = 0;
  Mask mask = Mask::kNone;
  int bias_broadcast = 0, mask_broadcast = 0;  // bits: batch, head, query, key
  bool causal = false;
  int window_left = -1, window_right = -1;
  bool query_lengths = false, key_lengths = false;
  Segments segments = Segments::kNone;
  Values values = Values::kNormal;

  size_t heads() const { return kv_heads * groups; }
  int stored() const { return kv_dtype < 0 ? dtype : kv_dtype; }
  size_t stored_size() const { return stored() == kCodes ? 1 : kStorage[stored()].size; }
  std::string describe(const KernelTable& table) const {
    char text[400];
    std::snprintf(text, sizeof text,
                  "%s %s kv %d format %d order %d: B %zu Tq %zu Tk %zu K %zu G %zu H %zu Hv %zu packed %d cap "
                  "%g bias %d (%d, "
                  "%d) mask %d (%d) causal %d window %d %d lengths %d %d segments %d values %d",
                  table.isa, kStorage[dtype].name, kv_dtype, static_cast<int>(format), order, batch,
                  query_length, key_length, kv_heads, groups, head_size, value_size, packed, soft_cap,
                  static_cast<int>(bias), bias_dtype, bias_broadcast, static_cast<int>(mask), mask_broadcast,
                  causal, window_left, window_right, query_lengths, key_lengths, static_cast<int>(segments),
                  static_cast<int>(values));
    return text;
  }
};

// An array that begins or ends at an inaccessible page, or begins some elements behind one.
class Array {
 public:
  static inline bool at_start = false;
  static inline size_t shift = 0;
  char* resize(size_t bytes, size_t element) {
    const size_t needed = bytes + shift * element;
    if (needed > capacity_) {
      capacity_ = std::max(needed, 2 * capacity_);
      buffer_.reset(new GuardedBuffer(capacity_));
    }
    data_ = !buffer_                ? nullptr
            : at_start || shift > 0 ? buffer_->at_start() + shift * element
                                    : buffer_->at_end(bytes);
    return data_;
  }
  char* data() const { return data_; }

 private:
  std::unique_ptr<GuardedBuffer> buffer_;
  size_t capacity_ = 0;
  char* data_ = nullptr;
};

struct Inputs {
  Array arrays[7];
  AttentionProblem problem;
  Array length_arrays[2], segment_arrays[2], scale_arrays[2];
};

AttentionProblem::Strides strides_of(const Case& c, int broadcast) {
  const ptrdiff_t extents[] = {static_cast<ptrdiff_t>(c.batch), static_cast<ptrdiff_t>(c.heads()),
                               static_cast<ptrdiff_t>(c.query_length), static_cast<ptrdiff_t>(c.key_length)};
  ptrdiff_t strides[4], next = 1;
  for (int i = 3; i >= 0; --i) {
    strides[i] = broadcast >> i & 1 ? 0 : next;
    if (!(broadcast >> i & 1)) next *= extents[i];
  }
  return {strides[0], strides[1], strides[2], strides[3]};
}

size_t count_of(const Case& c, int broadcast) {
  return (broadcast & 1 ? 1 : c.batch) * (broadcast & 2 ? 1 : c.heads()) *
         (broadcast & 4 ? 1 : c.query_length) * (broadcast & 8 ? 1 : c.key_length);
}

void fill_normal(const Storage& storage, char* data, size_t count, double deviation, std::mt19937& random) {
  std::normal_distribution<float> normal(0, static_cast<float>(deviation));
  for (size_t i = 0; i < count; ++i) storage.put(data, i, normal(random));
}

void make_operands(const Case& c, Inputs& in, std::mt19937& random) {
  AttentionProblem& p = in.problem;
  const Storage& storage = kStorage[c.dtype];
  const double deviation = c.values == Values::kLarge ? 30 : 1;
  const ptrdiff_t h = static_cast<ptrdiff_t>(c.head_size), hv = static_cast<ptrdiff_t>(c.value_size);
  const ptrdiff_t n = static_cast<ptrdiff_t>(c.heads()), k = static_cast<ptrdiff_t>(c.kv_heads);
  const ptrdiff_t tq = static_cast<ptrdiff_t>(c.query_length), tk = static_cast<ptrdiff_t>(c.key_length);
  if (c.packed) {  // one array of (batch, time, heads of q, of k, of v); tq == tk
    const ptrdiff_t row = n * h + k * h + k * hv;
    const size_t count = static_cast<size_t>(row * tq) * c.batch;
    char* data = in.arrays[0].resize(count * storage.size, storage.size);
    fill_normal(storage, data, count, deviation, random);
    const ptrdiff_t size = static_cast<ptrdiff_t>(storage.size);
    p.query = {data, row * tq, row, h};
    p.key = {data + n * h * size, row * tq, row, h};
    p.value = {data + (n + k) * h * size, row * tq, row, hv};
    return;
  }
  const auto make = [&](int i, ptrdiff_t time, ptrdiff_t heads, ptrdiff_t size) -> AttentionProblem::Operand {
    const size_t count = c.batch * static_cast<size_t>(time * heads * size);
    const size_t bytes_each = i == 0 ? storage.size : c.stored_size();
    char* data = in.arrays[i].resize(count * bytes_each, bytes_each);
    if (i == 0 || c.stored() != kCodes) {
      fill_normal(kStorage[i == 0 ? c.dtype : c.stored()], data, count, i == 2 ? 1 : deviation, random);
    } else {
      for (size_t j = 0; j < count; ++j) data[j] = static_cast<char>(static_cast<int>(random() % 255) - 127);
    }
    return {data, time * heads * size, heads * size, size};
  };
  p.query = make(0, tq, n, h);
  p.key = make(1, tk, k, h);
  p.value = make(2, tk, k, hv);
  if (c.stored() != kCodes) return;
  const auto make_scales = [&](int i, double largest) {
    const size_t count = c.batch * c.kv_heads * c.key_length;
    auto* scales = reinterpret_cast<float*>(in.scale_arrays[i].resize(count * 4, 4));
    std::uniform_real_distribution<float> uniform(0, static_cast<float>(largest / 127));
    for (size_t j = 0; j < count; ++j) scales[j] = uniform(random);
    return scales;
  };
  p.key_scales = make_scales(0, 2 * deviation);
  p.value_scales = make_scales(1, 2);
}

void make_bias(const Case& c, Inputs& in, std::mt19937& random) {
  if (c.bias == Bias::kNone) return;
  const Storage& storage = kStorage[c.bias_dtype];
  const size_t count = count_of(c, c.bias_broadcast);
  char* data = in.arrays[3].resize(count * storage.size, storage.size);
  fill_normal(storage, data, count, 1, random);
  const size_t row = c.bias_broadcast & 8 ? 1 : c.key_length;
  for (size_t i = 0; c.bias != Bias::kNormal && i < count; ++i) {
    if (i / row % 5 != 0 && random() % 3 != 0) continue;
    if (c.bias == Bias::kLowest) {
      storage.put(data, i, static_cast<float>(-storage.largest));
    } else if (storage.dtype == DType::kFloat32) {
      const float low = -INFINITY;
      std::memcpy(data + 4 * i, &low, 4);
    } else {
      const std::uint16_t low = storage.dtype == DType::kFloat16 ? 0xfc00 : 0xff80;
      std::memcpy(data + 2 * i, &low, 2);
    }
  }
  in.problem.bias = data;
  in.problem.bias_dtype = storage.dtype;
  in.problem.bias_strides = strides_of(c, c.bias_broadcast);
}

void make_mask(const Case& c, Inputs& in, std::mt19937& random) {
  if (c.mask == Mask::kNone) return;
  const size_t count = count_of(c, c.mask_broadcast);
  auto* data = reinterpret_cast<unsigned char*>(in.arrays[4].resize(count, 1));
  const size_t columns = c.mask_broadcast & 8 ? 1 : c.key_length;
  const size_t rows = c.mask_broadcast & 4 ? 1 : c.query_length;
  for (size_t i = 0; i < count; ++i) {
    const size_t key = i % columns, query = i / columns % rows;
    bool kept = false;
    if (c.mask == Mask::kRandom) kept = random() & 1;
    if (c.mask == Mask::kSparse) kept = random() % 64 == 0;
    if (c.mask == Mask::kCausal) kept = key <= query;
    if (c.mask == Mask::kBlocks) kept = (key / 64 + query / 24) % 2;
    if (c.mask == Mask::kLate) kept = query / 12 % 2 == 1 || key >= 300;
    data[i] = kept;
  }
  in.problem.mask = data;
  in.problem.mask_strides = strides_of(c, c.mask_broadcast);
}

void make_segments(const Case& c, Inputs& in, std::mt19937& random) {
  if (c.segments == Segments::kNone) return;
  const size_t text = 1 + random() % 100;
  const auto make = [&](Array& array, size_t length, std::int32_t first) {
    auto* segments = reinterpret_cast<std::int32_t*>(array.resize(c.batch * length * 4, 4));
    for (size_t i = 0; i < c.batch * length; ++i) {
      const size_t nth = c.segments == Segments::kRandom ? random() % 3 : (i % length + i / length) / text;
      segments[i] = first + static_cast<std::int32_t>(nth);
    }
    return segments;
  };
  in.problem.query_segments = make(in.segment_arrays[0], c.query_length, -1);
  in.problem.key_segments =
      make(in.segment_arrays[1], c.key_length, c.segments == Segments::kDisjoint ? 1000 : -1);
}

void make_inputs(const Case& c, Inputs& in, std::mt19937& random) {
  in.problem = {};
  AttentionProblem& p = in.problem;
  p.dtype = kStorage[c.dtype].dtype;
  p.kv_dtype = static_cast<DType>(c.stored());
  const bool is_default = c.format == AttentionFormat::kFloat32;
  p.format = is_default && p.dtype == DType::kBFloat16 ? AttentionFormat::kBFloat16 : c.format;
  p.batch = c.batch;
  p.query_length = c.query_length;
  p.key_length = c.key_length;
  p.query_heads = c.heads();
  p.kv_heads = c.kv_heads;
  p.head_size = c.head_size;
  p.value_size = c.value_size;
  p.scale = static_cast<float>(1 / std::sqrt(c.head_size));
  p.soft_cap = c.soft_cap;
  p.is_causal = c.causal;
  p.window_left = c.window_left;
  p.window_right = c.window_right;
  make_operands(c, in, random);
  make_bias(c, in, random);
  make_mask(c, in, random);
  make_segments(c, in, random);
  const auto make_lengths = [&](Array& array, size_t most) {
    auto* lengths = reinterpret_cast<std::int32_t*>(array.resize(c.batch * 4, 4));
    for (size_t b = 0; b < c.batch; ++b) lengths[b] = static_cast<std::int32_t>(random() % (most + 2));
    return lengths;
  };
  const std::int32_t* query_lengths = make_lengths(in.length_arrays[0], c.query_length);
  const std::int32_t* key_lengths = make_lengths(in.length_arrays[1], c.key_length);
  if (c.query_lengths) p.query_lengths = query_lengths;
  if (c.key_lengths) p.key_lengths = key_lengths;
}

// ---- The definition ----

double get(const Storage& storage, const void* data, ptrdiff_t i) {
  return storage.get(static_cast<const char*>(data), static_cast<size_t>(i));
}

// Whether the products of many rows are of a format where that is allowed.
bool has(AttentionFormat format, const KernelTable& table) { return table.attention.of(format).score; }
// Whether the products of a problem are. Few rows are multiplied as they are.
bool multiplies(AttentionFormat format, const KernelTable& table, const AttentionProblem& p) {
  return p.format == format && has(format, table) &&
         p.query_heads / p.kv_heads * p.query_length > AttentionKernels::kFewRows;
}

// To nearest even.
double rounded_to_bfloat(double x) {
  const auto value = static_cast<float>(x);
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return decode_bfloat16(static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}

// The vectors of a head in a batch element, one behind the other, as the products have them. The scales are
// those of int8, of every head.
std::vector<double> decoded(const Case& c, int dtype, const AttentionProblem::Operand& o, const float* scales,
                            size_t b, size_t times, size_t head, size_t size, bool rounded) {
  std::vector<double> result;
  result.reserve(times * size);
  for (size_t t = 0; t < times; ++t) {
    const ptrdiff_t first = static_cast<ptrdiff_t>(b) * o.batch + static_cast<ptrdiff_t>(t) * o.time +
                            static_cast<ptrdiff_t>(head) * o.head;
    for (size_t i = 0; i < size; ++i) {
      const ptrdiff_t at = first + static_cast<ptrdiff_t>(i);
      const double x = scales ? static_cast<const signed char*>(o.data)[at] *
                                    static_cast<double>(scales[(b * c.kv_heads + head) * times + t])
                              : get(kStorage[dtype], o.data, at);
      result.push_back(rounded ? rounded_to_bfloat(x) : x);
    }
  }
  return result;
}

struct Head {
  std::vector<double> queries, keys, values;
  std::vector<double> largest_keys, largest_values;  // of each column
};

std::vector<double> largest_of_columns(const std::vector<double>& rows, size_t columns) {
  std::vector<double> largest(columns);
  for (size_t i = 0; i < rows.size(); ++i) {
    largest[i % columns] = std::fmax(largest[i % columns], std::fabs(rows[i]));
  }
  return largest;
}

struct Logits {
  std::vector<double> values;
  double rounding = 0;  // largest error of one
  double coding = 0;    // the same of int8
};

// What a logit errs by in int8. A code errs by half a scale, 1/127 of the largest element of the query, or of
// the key less its centre, which is a mean of keys.
double coding_error(const std::vector<double>& query, const double* key, const Head& head) {
  double of_query = 0, of_key = 0, query_sum = 0, key_sum = 0;
  for (size_t i = 0; i < query.size(); ++i) {
    const double k = std::fabs(key[i]) + head.largest_keys[i];
    of_query = std::fmax(of_query, std::fabs(query[i]) / 254);
    of_key = std::fmax(of_key, k / 254);
    query_sum += std::fabs(query[i]);
    key_sum += k;
  }
  const double both = static_cast<double>(query.size()) * of_query * of_key;
  return 1.001 * (of_key * query_sum + of_query * key_sum + both);
}

bool is_kept(const AttentionProblem& p, size_t b, size_t n, size_t t, size_t s) {
  const ptrdiff_t ti = static_cast<ptrdiff_t>(t), si = static_cast<ptrdiff_t>(s);
  const AttentionProblem::Strides& m = p.mask_strides;
  if (p.mask && !p.mask[static_cast<ptrdiff_t>(b) * m.batch + static_cast<ptrdiff_t>(n) * m.head +
                        ti * m.query + si * m.key]) {
    return false;
  }
  if (p.is_causal && si > ti) return false;
  if (p.window_left >= 0 && ti > si + p.window_left) return false;
  if (p.window_right >= 0 && ti < si - p.window_right) return false;
  if (p.query_lengths && ti >= p.query_lengths[b]) return false;
  if (p.query_segments && p.query_segments[b * p.query_length + t] != p.key_segments[b * p.key_length + s]) {
    return false;
  }
  return !(p.key_lengths && si >= p.key_lengths[b]);
}

Logits exact_logits(const Case& c, const AttentionProblem& p, const Head& head, size_t b, size_t n, size_t t) {
  Logits logits;
  std::vector<double> query(head.queries.begin() + static_cast<ptrdiff_t>(t * p.head_size),
                            head.queries.begin() + static_cast<ptrdiff_t>((t + 1) * p.head_size));
  for (double& q : query) q = flushed(static_cast<float>(q)) * static_cast<double>(p.scale);
  for (size_t s = 0; s < p.key_length; ++s) {
    const double* key = &head.keys[s * p.head_size];
    double dot = 0, magnitude = 0;
    for (size_t i = 0; i < p.head_size; ++i) {
      const double product = query[i] * key[i];
      dot += product;
      magnitude += std::fabs(product);
    }
    double error = (std::sqrt(static_cast<double>(p.head_size)) + 8) * 0x1p-24 * magnitude;
    if (p.soft_cap != 0) {
      dot = p.soft_cap * std::tanh(dot / p.soft_cap);
      error += bounds::tanh[c.order - 1] * std::fabs(dot) + 0x1p-22 * p.soft_cap;
    }
    if (p.bias) {
      const AttentionProblem::Strides& m = p.bias_strides;
      const ptrdiff_t i = static_cast<ptrdiff_t>(b) * m.batch + static_cast<ptrdiff_t>(n) * m.head +
                          static_cast<ptrdiff_t>(t) * m.query + static_cast<ptrdiff_t>(s) * m.key;
      // Rounded as in float32, where a huge bias swallows the logit.
      dot = static_cast<float>(dot + get(kStorage[c.bias_dtype], p.bias, i));
      error += std::fabs(dot) < 1e6 ? 0x1p-23 * std::fabs(dot) : 0;
    }
    if (!is_kept(p, b, n, t, s)) dot = kMaskedLogit;
    logits.values.push_back(dot);
    logits.rounding = std::fmax(logits.rounding, error);
    logits.coding = std::fmax(logits.coding, coding_error(query, key, head));
  }
  return logits;
}

// What int8 adds to the error of an output. Values err by half of their scales. A weight has a relative error
// E, of its logit and the exponential, and one of 1/255 of the largest one. With weights p that moves the
// mean of the values by (E sum p |v - out| + sum |v - out| / (255 sum)) / (1 - E - S / (255 sum)), and never
// out of their range.
double bytes_error(double e, double coding, double sum, double keys, double deviation, double distances,
                   double largest) {
  const double of_weights = std::exp(coding) * (1 + e) - 1, rounding = 1 / (255 * (1 - e) * sum);
  const double kept = 1 - of_weights - keys * rounding;
  const double moved = kept > 0 ? (of_weights * deviation + rounding * distances) / kept : 2 * largest;
  return std::fmin(moved, 2 * largest) + 1.001 * largest / 254;
}

void check_row(const KernelTable& table, const Case& c, const AttentionProblem& p, const Head& head, size_t b,
               size_t n, size_t t, const std::string& what) {
  const Storage& storage = kStorage[c.dtype];
  const Logits logits = exact_logits(c, p, head, b, n, t);
  const bool valid = !p.query_lengths || static_cast<ptrdiff_t>(t) < p.query_lengths[b];
  double maximum = -kInfinity, sum = 0, largest = 0;
  for (const double x : logits.values) maximum = std::fmax(maximum, x);
  const double base = maximum == -kInfinity ? 0 : maximum;
  for (const double x : logits.values) sum += std::exp(x - base);
  const size_t row = (b * p.query_length + t) * p.query_heads + n;
  std::vector<double> exact(p.value_size), deviation(p.value_size);
  const auto for_each_value = [&](const auto& visit) {
    for (size_t s = 0; s < p.key_length; ++s) {
      const double weight = std::exp(logits.values[s] - base) / sum;
      for (size_t j = 0; j < p.value_size; ++j) visit(weight, j, head.values[s * p.value_size + j]);
    }
  };
  for_each_value([&](double weight, size_t j, double v) {
    exact[j] += weight * v;
    largest = std::fmax(largest, std::fabs(v));
  });
  const double u = multiplies(AttentionFormat::kBFloat16, table, p) ? kStorage[1].half_ulp : 0;
  const bool bytes = multiplies(AttentionFormat::kInt8, table, p);
  std::vector<double> distances(p.value_size);  // of all values, alike
  if (u != 0 || bytes) {
    for_each_value([&](double weight, size_t j, double v) {
      deviation[j] += weight * std::fabs(v - exact[j]);
      distances[j] += std::fabs(v - exact[j]);
    });
  }
  const double e = bounds::exp[c.order - 1] / (1 - bounds::exp[c.order - 1]);
  const double a = (std::sqrt(static_cast<double>(p.key_length)) + 8) * 0x1p-24;
  const double in_float32 = (2 * e + 2 * logits.rounding + a) * largest;
  for (size_t j = 0; j < p.value_size; ++j) {
    double tolerance = in_float32 + u / (1 - u) * (1 + 2 * e) * (deviation[j] + in_float32);
    if (bytes) {
      tolerance += bytes_error(e, logits.coding, sum, static_cast<double>(p.key_length), deviation[j],
                               distances[j], head.largest_values[j]);
    }
    const double actual = get(storage, p.out, static_cast<ptrdiff_t>(row * p.value_size + j));
    const double expected = valid ? exact[j] : 0;
    check(within(actual, expected, 0, storage, valid ? tolerance * (1 + storage.half_ulp) : 0),
          "%s: out[%zu, %zu, %zu, %zu] = %.9g, exact %.9g, tolerance %.3g", what.c_str(), b, t, n, j, actual,
          expected, tolerance);
  }
  const double residual = maximum + std::log(sum), actual = p.residual[row];
  check(within(actual, residual, 0x1p-23, kStorage[0],
               bounds::logsumexp_absolute[c.order - 1] + logits.rounding + (bytes ? logits.coding : 0) + a),
        "%s: residual[%zu, %zu, %zu] = %.9g, exact %.9g", what.c_str(), b, t, n, actual, residual);
}

void check_case(const KernelTable& table, const Case& c, std::mt19937& random) {
  static Inputs in;
  Array::at_start = !Array::at_start;  // of every second case
  make_inputs(c, in, random);
  AttentionProblem& p = in.problem;
  const std::string what = c.describe(table);
  const size_t rows = c.batch * c.query_length * c.heads();
  const size_t bytes = rows * c.value_size * kStorage[c.dtype].size;
  p.out = in.arrays[5].resize(bytes, kStorage[c.dtype].size);
  p.residual = reinterpret_cast<float*>(in.arrays[6].resize(rows * 4, 4));
  std::vector<char> first;
  for (const auto& parallel : {in_order, reversed, on_threads}) {
    std::memset(p.out, 0x7f, bytes);
    const char* error = run_attention_in_parallel(p, table.attention, c.order - 1, parallel);
    check(error == nullptr, "%s: %s", what.c_str(), error);
    if (first.empty()) first.assign(static_cast<char*>(p.out), static_cast<char*>(p.out) + bytes);
    check(std::memcmp(first.data(), p.out, bytes) == 0, "%s: depends on the order of tasks", what.c_str());
  }
  const bool rounded = multiplies(AttentionFormat::kBFloat16, table, p);
  for (size_t b = 0; b < c.batch; ++b) {
    for (size_t n = 0; n < c.heads(); ++n) {
      const size_t shared = n / c.groups;
      Head head = {
          decoded(c, c.dtype, p.query, nullptr, b, p.query_length, n, p.head_size, rounded),
          decoded(c, c.stored(), p.key, p.key_scales, b, p.key_length, shared, p.head_size, rounded),
          decoded(c, c.stored(), p.value, p.value_scales, b, p.key_length, shared, p.value_size, rounded),
          {},
          {}};
      head.largest_keys = largest_of_columns(head.keys, p.head_size);
      head.largest_values = largest_of_columns(head.values, p.value_size);
      for (size_t t = 0; t < c.query_length; ++t) check_row(table, c, p, head, b, n, t, what);
    }
  }
}

// ---- Tests ----

// Every kind of shape, mask and bias in random combinations.
void test_random_cases(const KernelTable& table) {
  std::mt19937 random(11);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  const auto one_in = [&](size_t n) { return below(n) == 0; };
  const size_t head_sizes[] = {1, 3, 8, 16, 20, 32, 40, 64, 65, 128};
  for (int i = 0; i < (thin ? 60 : 400); ++i) {
    Case c;
    c.batch = 1 + below(2);
    c.kv_heads = 1 + below(2);
    c.groups = one_in(3) ? 1 + below(4) : 1;
    c.query_length = one_in(2) ? 1 + below(8) : 1 + below(70);
    c.key_length = one_in(3) ? 1 + below(40) : 1 + below(300);
    c.head_size = head_sizes[below(10)];
    c.value_size = one_in(2) ? c.head_size : head_sizes[below(10)];
    c.dtype = one_in(2) ? 0 : static_cast<int>(below(3));
    if (one_in(2)) c.format = static_cast<AttentionFormat>(1 + below(kAttentionProblemFormats - 1));
    c.order = 1 + static_cast<int>(below(5));
    c.packed = one_in(5);
    if (c.packed) {
      c.key_length = c.query_length;
    } else if (one_in(2)) {
      c.kv_dtype = static_cast<int>(below(kDTypes));
    }
    if (one_in(6)) c.soft_cap = 5;
    if (one_in(3)) c.bias = static_cast<Bias>(below(4));
    c.bias_dtype = static_cast<int>(below(3));
    c.bias_broadcast = static_cast<int>(below(16));
    if (one_in(2)) c.mask = static_cast<Mask>(below(7));
    c.mask_broadcast = static_cast<int>(below(16));
    c.causal = one_in(3);
    if (one_in(5)) c.window_left = static_cast<int>(below(50));
    if (one_in(5)) c.window_right = static_cast<int>(below(50));
    c.query_lengths = one_in(5);
    c.key_lengths = one_in(4);
    if (one_in(3)) c.segments = static_cast<Segments>(below(4));
    if (one_in(8)) c.values = Values::kLarge;
    check_case(table, c, random);
  }
}

// Every remainder of rows, keys and head sizes.
void test_remainders(const KernelTable& table) {
  std::mt19937 random(12);
  for (size_t i = 1; i <= 40; ++i) {
    check_case(table,
               {.query_length = i, .key_length = 41 - i, .head_size = i, .value_size = 41 - i, .order = 5},
               random);
    check_case(table, {.query_length = 30, .key_length = i, .head_size = 8, .value_size = i, .order = 3},
               random);
    // Words of two elements: odd heads, keys and values, partners that lie behind the end.
    for (const size_t queries : {9 + i % 12, 9 + i}) {
      check_case(table,
                 {.query_length = queries,
                  .key_length = 3 * i,
                  .head_size = 2 * i + queries % 2,
                  .value_size = 41 - i,
                  .format = AttentionFormat::kInt8},
                 random);
    }
    if (!has(AttentionFormat::kBFloat16, table)) continue;
    check_case(table,
               {.query_length = 9 + i % 12, .key_length = i, .head_size = 41 - i, .value_size = i, .dtype = 1},
               random);
    check_case(table,
               {.query_length = 9 + i,
                .key_length = 3 * i,
                .head_size = 2 * i,
                .value_size = 41 - i,
                .format = AttentionFormat::kBFloat16},
               random);
  }
  // Rows whose words are not aligned, or lie at odd distances.
  for (const size_t value_size : {size_t{3}, size_t{16}}) {
    check_case(table,
               {.batch = 2,
                .query_length = 35,
                .key_length = 35,
                .head_size = 16,
                .value_size = value_size,
                .dtype = 1,
                .packed = true},
               random);
  }
}

// Operands and results at every misalignment of whole elements, of rows that are packed and of few that are
// not.
void test_misalignments(const KernelTable& table) {
  std::mt19937 random(17);
  for (int dtype = 0; dtype < 3; ++dtype) {
    const size_t shifts = 64 / kStorage[dtype].size;
    for (size_t shift = 1; shift < shifts; shift += thin ? 5 : 1) {
      Array::shift = shift;
      for (const size_t queries : {size_t{3}, size_t{19}}) {
        for (const int kv_dtype : {-1, kCodes}) {
          check_case(table,
                     {.query_length = queries,
                      .key_length = 37,
                      .kv_heads = 2,
                      .head_size = 17,
                      .value_size = 33,
                      .dtype = dtype,
                      .kv_dtype = kv_dtype,
                      .bias = Bias::kNormal,
                      .bias_dtype = dtype,
                      .mask = Mask::kRandom,
                      .key_lengths = true},
                     random);
        }
      }
    }
  }
  Array::shift = 0;
}

// Several blocks of rows, several tiles, splits of the keys.
void test_large_shapes(const KernelTable& table) {
  std::mt19937 random(13);
  check_case(table, {.query_length = 700, .key_length = 530, .head_size = 16, .value_size = 8}, random);
  check_case(table, {.query_length = 600, .key_length = 600, .head_size = 8, .value_size = 8, .causal = true},
             random);
  check_case(table, {.query_length = 20, .key_length = 2500, .head_size = 16, .value_size = 8, .dtype = 1},
             random);
  // Every second row tile begins later than the next one.
  check_case(table,
             {.query_length = 100, .key_length = 600, .head_size = 9, .value_size = 8, .mask = Mask::kLate},
             random);
  for (const Mask mask : {Mask::kNone, Mask::kLate, Mask::kBlocks}) {
    check_case(
        table,
        {.query_length = 300, .key_length = 601, .head_size = 16, .value_size = 8, .dtype = 1, .mask = mask},
        random);
  }
  for (const Segments segments : {Segments::kTexts, Segments::kDisjoint}) {
    for (const bool causal : {false, true}) {
      check_case(table,
                 {.batch = 2,
                  .query_length = 300,
                  .key_length = 601,
                  .groups = 2,
                  .head_size = 16,
                  .value_size = 8,
                  .causal = causal,
                  .segments = segments},
                 random);
    }
  }
  check_case(table, {.query_length = 40, .key_length = 40, .head_size = 512, .value_size = 512}, random);
  check_case(table, {.query_length = 30, .key_length = 300, .head_size = 257, .value_size = 300}, random);
  for (const size_t queries : {1, 3, 8}) {
    for (int order = 1; order <= kMaxOrder; ++order) {
      if (skips(order)) continue;
      check_case(table,
                 {.query_length = queries,
                  .key_length = 3000,
                  .kv_heads = 2,
                  .head_size = 64,
                  .value_size = 64,
                  .order = order},
                 random);
      check_case(table,
                 {.batch = 2,
                  .query_length = queries,
                  .key_length = 2050,
                  .groups = 2,
                  .head_size = 20,
                  .value_size = 24,
                  .order = order,
                  .mask = Mask::kBlocks,
                  .key_lengths = true},
                 random);
    }
    for (int kv_dtype = 1; kv_dtype < kDTypes; ++kv_dtype) {
      check_case(table,
                 {.batch = 2,
                  .query_length = queries,
                  .key_length = 2050,
                  .kv_heads = 3,
                  .head_size = 64,
                  .value_size = 64,
                  .kv_dtype = kv_dtype,
                  .key_lengths = true},
                 random);
    }
    check_case(table,
               {.batch = 2,
                .query_length = queries,
                .key_length = 2050,
                .kv_heads = 2,
                .head_size = 8,
                .value_size = 8,
                .segments = Segments::kTexts},
               random);
    // Nothing is kept in any split, or nothing that is above a masked logit.
    check_case(
        table,
        {.query_length = queries, .key_length = 3000, .head_size = 8, .value_size = 8, .mask = Mask::kNothing},
        random);
    check_case(table,
               {.query_length = queries,
                .key_length = 3000,
                .head_size = 8,
                .value_size = 8,
                .bias = Bias::kMinusInfinity,
                .window_left = 40},
               random);
  }
}

// Rows whose kept keys lie below what a masked logit is replaced with.
void test_dominated_rows(const KernelTable& table) {
  std::mt19937 random(14);
  for (const Bias bias : {Bias::kLowest, Bias::kMinusInfinity}) {
    for (const Mask mask : {Mask::kNone, Mask::kCausal, Mask::kBlocks, Mask::kNothing}) {
      for (const bool causal : {false, true}) {
        check_case(table,
                   {.batch = 2,
                    .query_length = 50,
                    .key_length = 90,
                    .head_size = 8,
                    .value_size = 8,
                    .bias = bias,
                    .mask = mask,
                    .causal = causal},
                   random);
      }
    }
  }
}

void test_not_a_number(const KernelTable& table) {
  std::mt19937 random(15);
  static Inputs in;
  for (const size_t queries : {size_t{2}, size_t{20}}) {
    for (int i = 0; i < 6; ++i) {
      const Storage& storage = kStorage[i % 3];
      const Case c = {.query_length = queries,
                      .key_length = 100,
                      .head_size = 16,
                      .value_size = 16,
                      .dtype = i % 3,
                      .format = i < 3 ? AttentionFormat::kFloat32 : AttentionFormat::kInt8};
      make_inputs(c, in, random);
      std::vector<char> out(queries * 16 * storage.size);
      in.problem.out = out.data();
      put_nan(storage, in.arrays[0].data(), 16);  // of query 1
      check(run_attention(in.problem, table.attention, 2, in_order) == nullptr, "%s: NaN", table.isa);
      for (size_t i = 0; i < queries * 16; ++i) {
        const double y = storage.get(out.data(), i);
        check(std::isnan(y) == (i / 16 == 1), "%s %s: NaN in query 1 gives out[%zu] = %g", table.isa,
              storage.name, i, y);
      }
    }
  }
}

// A bias is added to scores of every format; NaN there is one of its row.
void test_not_a_number_in_bias(const KernelTable& table) {
  std::mt19937 random(19);
  static Inputs in;
  for (int format = 0; format < kAttentionProblemFormats; ++format) {
    const Case c = {.query_length = 20,
                    .key_length = 100,
                    .head_size = 16,
                    .value_size = 16,
                    .format = static_cast<AttentionFormat>(format),
                    .bias = Bias::kNormal};
    make_inputs(c, in, random);
    std::vector<float> out(20 * 16);
    in.problem.out = out.data();
    put_nan(kStorage[0], in.arrays[3].data(), 3 * 100 + 7);
    check(run_attention(in.problem, table.attention, 2, in_order) == nullptr, "%s: NaN in bias", table.isa);
    for (size_t i = 0; i < out.size(); ++i) {
      check(std::isnan(out[i]) == (i / 16 == 3), "%s format %d: NaN in bias of query 3 gives out[%zu] = %g",
            table.isa, format, i, static_cast<double>(out[i]));
    }
  }
}

// Logits of -inf have no weight, as if their keys were masked, and an infinite value is the result.
void test_infinities(const KernelTable& table) {
  std::mt19937 random(18);
  static Inputs in;
  for (const size_t queries : {size_t{2}, size_t{40}}) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      const Storage& storage = kStorage[dtype];
      const Case c = {.query_length = queries,
                      .key_length = 100,
                      .head_size = 16,
                      .value_size = 16,
                      .dtype = dtype,
                      .mask = Mask::kNothing,
                      .mask_broadcast = 7};
      make_inputs(c, in, random);
      char *query = in.arrays[0].data(), *mask = in.arrays[4].data();
      for (size_t i = 0; i < queries; ++i) storage.put(query, i * 16, 1);
      const auto run = [&](char kept) {
        std::memset(mask, 1, c.key_length);
        mask[5] = kept;
        std::vector<char> out(queries * 16 * storage.size);
        in.problem.out = out.data();
        check(run_attention(in.problem, table.attention, 4, in_order) == nullptr, "%s: infinities", table.isa);
        return out;
      };
      const std::vector<char> masked = run(0);
      put_infinity(storage, in.arrays[1].data(), 5 * 16, true);
      put_infinity(storage, in.arrays[2].data(), 7 * 16 + 3, false);
      const std::vector<char> out = run(1);
      for (size_t i = 0; i < queries * 16; ++i) {
        const double y = storage.get(out.data(), i), without = storage.get(masked.data(), i);
        check(i % 16 == 3 ? std::isinf(y) && y > 0 : std::fabs(y - without) <= 0x1p-6,
              "%s %s: out[%zu] = %g, not %g", table.isa, storage.name, i, y, without);
      }
    }
  }
}

// The mean of equal values is that value, however the weights are rounded. Nearly all keys are equal, so
// that the rounding of their weights does not average out; the value is one near which bfloat16 is finest.
void test_equal_values(const KernelTable& table) {
  std::mt19937 random(16);
  static Inputs in;
  constexpr double kValue = 2 - 0x1p-7;
  for (int i = 0; i < 6; ++i) {
    const Storage& storage = kStorage[i % 3];
    for (const size_t keys : {size_t{30}, size_t{2500}}) {  // the latter are split
      const Case c = {.query_length = 50,
                      .key_length = keys,
                      .head_size = 16,
                      .value_size = 16,
                      .dtype = i % 3,
                      .format = i < 3 ? AttentionFormat::kFloat32 : AttentionFormat::kInt8};
      make_inputs(c, in, random);
      char *key = in.arrays[1].data(), *value = in.arrays[2].data();
      const size_t row = 16 * storage.size;
      for (size_t i = 2; i < keys; ++i) std::memcpy(key + i * row, key + (i % 500 == 0 ? 0 : row), row);
      for (size_t i = 0; i < keys * 16; ++i) storage.put(value, i, kValue);
      std::vector<char> out(50 * row);
      in.problem.out = out.data();
      check(run_attention(in.problem, table.attention, 4, in_order) == nullptr, "%s: equal values", table.isa);
      for (size_t i = 0; i < 50 * 16; ++i) {
        const double y = storage.get(out.data(), i);
        // Sums of equal addends: their roundings may add up.
        const double rounding = static_cast<double>(keys + 8) * 0x1p-24 * 2 * kValue;
        check(std::fabs(y - kValue) <= rounding, "%s %s: the mean of %zu times %g is %.9g", table.isa,
              storage.name, keys, kValue, y);
      }
    }
  }
}

void test_no_keys_and_errors(const KernelTable& table) {
  std::vector<float> out(6, 1), residual(2);
  AttentionProblem p;
  p.batch = 1;
  p.query_length = 2;
  p.query_heads = p.kv_heads = 1;
  p.head_size = p.value_size = 3;
  p.out = out.data();
  p.residual = residual.data();
  check(run_attention(p, table.attention, 2, in_order) == nullptr, "%s: no keys", table.isa);
  for (const float x : out) check(x == 0, "%s: no keys: %g", table.isa, x);
  check(residual[1] == -INFINITY, "%s: no keys: residual %g", table.isa, residual[1]);
  p.query_heads = 3;
  p.kv_heads = 2;
  check(run_attention(p, table.attention, 2, in_order) != nullptr, "%s: 3 heads over 2", table.isa);
  p.query_heads = 2;
  check(run_attention(p, table.attention, 5, in_order) != nullptr, "%s: order 6", table.isa);
}

}  // namespace
}  // namespace quake::tests

int main(int argc, char** argv) {
  using namespace quake::tests;
  thin = has_option(argc, argv, "--thin");
  return run_all([](const quake::KernelTable& table) {
    test_random_cases(table);
    test_remainders(table);
    test_misalignments(table);
    test_large_shapes(table);
    test_dominated_rows(table);
    test_not_a_number(table);
    test_not_a_number_in_bias(table);
    test_infinities(table);
    test_equal_values(table);
    test_no_keys_and_errors(table);
  });
}
