// Calls of dense layers as values: random operands in the order of the handler's, the problem that the driver
// gets of them, and what it must give, computed in double precision from the packed words.

#ifndef QUAKE_TESTS_DENSE_CALLS_H_
#define QUAKE_TESTS_DENSE_CALLS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "dense/driver.h"
#include "tests/bounds.h"
#include "tests/harness.h"

namespace quake::tests {

enum class DenseNorm { kNone, kLayer, kRms };

inline constexpr float kDenseEpsilon = 1e-5f;

// The integers of a range that is known, between layers.
inline constexpr Storage kCodeStorage = {DType::kInt8, "codes", 1, 8, 0, 0, 1, 127, nullptr};

struct DenseShape {
  DenseFormat format = DenseFormat::kFloat32;
  std::size_t group_size = 0;
  bool offsets = false;
  std::size_t rows = 1, size = 1;
  std::vector<std::size_t> columns = {1};  // of each weight
  DenseNorm norm = DenseNorm::kNone;
  bool permutation = false, bias = false, gate = false, gate_bias = false, residual = false;
  bool activation = false;  // silu
  int order = 5;
  bool range = false;  // of x
  // Codes (only with a range in, and without norm and permutation; one result without a residual), or kStorage.
  const Storage *in = &kStorage[0], *out = &kStorage[0];
  // Values so small and whole that float32 has all sums: the result is one number on every instruction set.
  bool integers = false;

  bool quantized() const {
    return format == DenseFormat::kInt8Quantized || format == DenseFormat::kInt4Quantized;
  }
  bool out_range() const { return out == &kCodeStorage; }
  bool is_int4() const { return format == DenseFormat::kInt4 || format == DenseFormat::kInt4Quantized; }
  bool is_int8() const { return format == DenseFormat::kInt8 || format == DenseFormat::kInt8Quantized; }
  std::size_t per_word() const {
    return is_int4() ? 8 : is_int8() ? 4 : format == DenseFormat::kBFloat16 ? 2 : 1;
  }
  std::size_t words() const { return ceil_div(size, per_word()); }
  std::size_t groups() const { return group_size == 0 ? 0 : size / group_size; }
};

inline std::string describe(const DenseShape& s) {
  static constexpr const char* kNames[] = {"float32",        "bfloat16", "int8",
                                           "int8 quantised", "int4",     "int4 quantised"};
  std::string text = std::string(kNames[static_cast<int>(s.format)]) + " of " + s.in->name + " to " +
                     s.out->name + ", " + std::to_string(s.rows) + " x " + std::to_string(s.size) + " x";
  for (const std::size_t columns : s.columns) text += " " + std::to_string(columns);
  const auto add = [&](bool has, const std::string& what) { text += has ? ", " + what : ""; };
  add(s.group_size != 0, "groups of " + std::to_string(s.group_size));
  add(s.offsets, "offsets");
  add(s.norm != DenseNorm::kNone, s.norm == DenseNorm::kRms ? "RMS norm" : "layer norm");
  add(s.permutation, "permutation");
  add(s.bias, "bias");
  add(s.gate, s.gate_bias ? "gate with bias" : "gate");
  add(s.activation, "silu of order " + std::to_string(s.order));
  add(s.residual, "residual");
  add(s.range, "range");
  add(s.integers, "integers");
  return text;
}

// ---- The operands ----

struct DenseArray {
  enum Type { kFloat32, kBFloat16, kFloat16, kInt8, kUInt8, kInt32 };
  const char* what;
  Type type;
  std::vector<std::size_t> dims;
  std::vector<char> bytes;
};

inline std::size_t size_of(DenseArray::Type type) {
  return type == DenseArray::kFloat32 || type == DenseArray::kInt32      ? 4
         : type == DenseArray::kBFloat16 || type == DenseArray::kFloat16 ? 2
                                                                         : 1;
}

// How the operands follow each other: the one place that knows. take(what, type, dims) for each, in order.
template <class Pointer>
struct DenseWeightOperands {
  Pointer codes = {}, scales = {}, sums = {}, offsets = {}, bias = {};
};
template <class Pointer>
struct DenseOperands {
  Pointer x = {}, permutation = {}, norm_scale = {}, norm_offset = {}, table = {}, range = {}, out_range = {};
  std::vector<DenseWeightOperands<Pointer>> weights;  // the gate is the last one
  Pointer residual = {};
};

template <class Pointer, class Take>
DenseOperands<Pointer> dense_operands(const DenseShape& s, const Take& take) {
  using Sizes = std::vector<std::size_t>;
  constexpr DenseArray::Type kStored[] = {DenseArray::kFloat32, DenseArray::kBFloat16, DenseArray::kFloat16,
                                          DenseArray::kInt8};
  constexpr DenseArray::Type kCodes[] = {DenseArray::kFloat32, DenseArray::kBFloat16, DenseArray::kInt8,
                                         DenseArray::kInt8,    DenseArray::kUInt8,    DenseArray::kUInt8};
  DenseOperands<Pointer> o;
  o.x = take("x", kStored[static_cast<int>(s.in->dtype)], Sizes{s.rows, s.size});
  if (s.permutation) o.permutation = take("permutation", DenseArray::kInt32, Sizes{s.size});
  if (s.norm != DenseNorm::kNone) o.norm_scale = take("norm scale", DenseArray::kFloat32, Sizes{s.size});
  if (s.norm == DenseNorm::kLayer) o.norm_offset = take("norm offset", DenseArray::kFloat32, Sizes{s.size});
  if (s.is_int4()) o.table = take("table", DenseArray::kFloat32, Sizes{16});
  if (s.range) o.range = take("range", DenseArray::kFloat32, Sizes{2});
  if (s.out_range()) o.out_range = take("out_range", DenseArray::kFloat32, Sizes{2});
  const auto weight = [&](std::size_t columns, bool bias) {
    const std::size_t panels = ceil_div(columns, kPanelColumns), groups = s.groups();
    DenseWeightOperands<Pointer> w;
    Sizes codes = {panels, s.words(), kPanelColumns};
    if (s.per_word() > 1) codes.push_back(s.is_int4() ? 4 : s.per_word());
    w.codes = take("codes", kCodes[static_cast<int>(s.format)], codes);
    if (s.group_size != 0) {
      w.scales = take("scales", DenseArray::kFloat16, Sizes{panels, groups, kPanelColumns});
    } else if (s.is_int8()) {
      w.scales = take("scales", DenseArray::kFloat32, Sizes{panels, kPanelColumns});
      if (s.quantized()) w.sums = take("sums", DenseArray::kInt32, Sizes{panels, kPanelColumns});
    }
    if (s.offsets) w.offsets = take("offsets", DenseArray::kFloat16, Sizes{panels, groups, kPanelColumns});
    if (bias) w.bias = take("bias", DenseArray::kFloat32, Sizes{columns});
    o.weights.push_back(w);
  };
  for (const std::size_t columns : s.columns) weight(columns, s.bias);
  if (s.gate) weight(s.columns[0], s.gate_bias);
  if (s.residual) {
    o.residual = take("residual", kStored[static_cast<int>(s.out->dtype)], Sizes{s.rows, s.columns[0]});
  }
  return o;
}

template <class T>
T read(const char* data, std::size_t i) {
  T value;
  std::memcpy(&value, data + i * sizeof(T), sizeof(T));
  return value;
}
template <class T>
void write(char* data, std::size_t i, T value) {
  std::memcpy(data + i * sizeof(T), &value, sizeof(T));
}

// What element (k, n) of a weight is as packed: a number, or the integer that multiplies a scale.
inline double packed_code(const DenseShape& s, const char* codes, const char* table, std::size_t k,
                          std::size_t n) {
  const std::size_t per = s.per_word();
  const std::size_t word = (n / kPanelColumns * s.words() + k / per) * kPanelColumns + n % kPanelColumns;
  switch (s.format) {
    case DenseFormat::kFloat32:
      return static_cast<double>(read<float>(codes, word));
    case DenseFormat::kBFloat16:
      return kStorage[1].get(codes, 2 * word + k % 2);
    case DenseFormat::kInt8:
    case DenseFormat::kInt8Quantized:
      return read<std::int8_t>(codes, 4 * word + k % 4);
    default: {
      const auto byte = read<std::uint8_t>(codes, 4 * word + k % 4);
      return static_cast<double>(read<float>(table, k % 8 < 4 ? byte & 15 : byte >> 4));
    }
  }
}

// The words have room for more elements than a column has; those are 0. (Of 4-bit codes there are none.)
inline void clear_padding(const DenseShape& s, char* codes, std::size_t panels) {
  const std::size_t per = s.per_word(), element = sizeof(PackedWord) / per;
  for (std::size_t k = s.size; k < s.words() * per; ++k) {
    for (std::size_t n = 0; n < panels * kPanelColumns; ++n) {
      const std::size_t word = (n / kPanelColumns * s.words() + k / per) * kPanelColumns + n % kPanelColumns;
      std::memset(codes + word * sizeof(PackedWord) + k % per * element, 0, element);
    }
  }
}

inline std::vector<DenseArray> random_operands(const DenseShape& s, std::mt19937& random) {
  std::vector<DenseArray> arrays;
  dense_operands<int>(s, [&](const char* what, DenseArray::Type type, const std::vector<std::size_t>& dims) {
    std::size_t count = 1;
    for (const std::size_t size : dims) count *= size;
    arrays.push_back({what, type, dims, std::vector<char>(count * size_of(type))});
    return 0;
  });
  std::normal_distribution<float> normal(0, 1);
  const auto between = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
  };
  for (std::size_t a = 0; a < arrays.size(); ++a) {
    DenseArray& array = arrays[a];
    char* const data = array.bytes.data();
    const std::string what = array.what;
    const std::size_t count = array.bytes.size() / size_of(array.type);
    // Large arrays repeat so many elements: where all is slow, random numbers take longer than all else.
    const auto fill = [&](const auto& put) {
      constexpr std::size_t kPeriod = 65'521;
      for (std::size_t i = 0; i < std::min(count, kPeriod); ++i) put(i);
      for (std::size_t i = kPeriod * size_of(array.type); i < array.bytes.size(); ++i) {
        data[i] = data[i - kPeriod * size_of(array.type)];
      }
    };
    if (what == "permutation") {
      std::vector<std::int32_t> order(count);
      for (std::size_t i = 0; i < count; ++i) order[i] = static_cast<std::int32_t>(i);
      std::shuffle(order.begin(), order.end(), random);
      for (std::size_t i = 0; i < count; ++i) write(data, i, order[i]);
    } else if (what == "table") {
      // The codes less 8, values close to each other, or any.
      const int kind = between(0, 3), least = between(s.integers ? -20 : -128, s.integers ? 5 : 112);
      for (int i = 0; i < 16; ++i) {
        const bool whole = s.integers || s.quantized();
        const float value = kind == 0   ? static_cast<float>(i - 8)
                            : kind == 1 ? static_cast<float>(least + (i < 2 ? 15 * i : between(0, 15)))
                            : whole
                                ? static_cast<float>(between(s.integers ? -20 : -128, s.integers ? 20 : 127))
                                : normal(random);
        write(data, static_cast<std::size_t>(i), value);
      }
    } else if (what == "range" || what == "out_range") {
      // Of either sign, and narrower than what is quantised or wider.
      const float spread = what == "range" ? 4.0f : s.integers ? 200.0f : 20.0f;
      const float a = spread * normal(random), b = spread * normal(random);
      write(data, 0, std::min(a, b));
      write(data, 1, std::max(a, b));
    } else if ((what == "codes" && (s.is_int8() || s.is_int4())) || array.type == DenseArray::kInt8) {
      fill([&](std::size_t i) {
        data[i] = static_cast<char>(random());
        if (array.type == DenseArray::kInt8 && static_cast<signed char>(data[i]) == -128) data[i] = char{127};
      });
      if (what == "codes") clear_padding(s, data, array.dims[0]);
    } else if (what == "codes") {
      const Storage& storage = s.format == DenseFormat::kFloat32 ? kStorage[0] : kStorage[1];
      fill([&](std::size_t i) {
        storage.put(data, i, s.integers ? static_cast<float>(between(-20, 20)) : normal(random));
      });
      clear_padding(s, data, array.dims[0]);
    } else if (what == "scales") {
      const Storage& storage = s.group_size != 0 ? kStorage[2] : kStorage[0];
      for (std::size_t i = 0; i < count; ++i) {
        storage.put(data, i, s.integers ? 1.0f : 0.01f + 0.02f * std::fabs(normal(random)));
      }
    } else if (what == "sums") {
      for (std::size_t n = 0; n < count; ++n) {
        double sum = 0;
        for (std::size_t k = 0; k < s.size; ++k) {
          sum += packed_code(s, arrays[a - 2].bytes.data(), nullptr, k, n);
        }
        write(data, n, static_cast<std::int32_t>(sum));
      }
    } else {
      constexpr const Storage* kStored[] = {&kStorage[0], &kStorage[1], &kStorage[2]};
      const float spread = what == "offsets" ? 0.1f : 2.0f;
      fill([&](std::size_t i) {
        kStored[static_cast<int>(array.type)]->put(
            data, i, s.integers ? static_cast<float>(between(-6, 6)) : spread * normal(random));
      });
    }
  }
  return arrays;
}

// ---- The driver's problem ----

using DensePointers = DenseOperands<const char*>;

// Pointers to the operands, which lie in order.
inline DensePointers dense_pointers(const DenseShape& s, const std::vector<const char*>& in) {
  std::size_t next = 0;
  return dense_operands<const char*>(s, [&](auto&&...) { return in[next++]; });
}

// Runs the driver; returns its error, or null.
inline const char* run_dense(const DenseShape& s, const KernelTable& table, const std::vector<const char*>& in,
                             const std::vector<char*>& out, ParallelFor parallel) {
  const DensePointers o = dense_pointers(s, in);
  DenseProblem p = {.dtype = s.in->dtype,
                    .out_dtype = s.out->dtype,
                    .format = s.format,
                    .rows = s.rows,
                    .size = s.size,
                    .x = o.x,
                    .group_size = s.group_size,
                    .permutation = reinterpret_cast<const std::int32_t*>(o.permutation),
                    .range = reinterpret_cast<const float*>(o.range),
                    .out_range = reinterpret_cast<const float*>(o.out_range),
                    .residual = o.residual};
  const Norm norm = {.scale = reinterpret_cast<const float*>(o.norm_scale),
                     .offset = reinterpret_cast<const float*>(o.norm_offset),
                     .epsilon = kDenseEpsilon,
                     .centered = s.norm == DenseNorm::kLayer};
  if (s.norm != DenseNorm::kNone) p.norm = &norm;
  if (s.activation) p.activation = find_unary(table, "silu", DType::kFloat32, s.order - 1);
  std::int8_t integers[16] = {};
  const void* values = o.table;
  if (s.format == DenseFormat::kInt4Quantized) {
    for (std::size_t i = 0; i < 16; ++i) integers[i] = static_cast<std::int8_t>(read<float>(o.table, i));
    values = integers;
  }
  const auto weight = [&](const DenseWeightOperands<const char*>& w, std::size_t columns, char* y) {
    DenseWeight weight = {.columns = columns, .bias = reinterpret_cast<const float*>(w.bias), .out = y};
    weight.panels = {.words = reinterpret_cast<const PackedWord*>(w.codes),
                     .panel_words = s.words() * kPanelColumns,
                     .depth = s.words(),
                     .group_words = s.group_size / s.per_word(),
                     .scales = reinterpret_cast<const std::uint16_t*>(s.group_size ? w.scales : nullptr),
                     .offsets = reinterpret_cast<const std::uint16_t*>(w.offsets),
                     .table = values};
    weight.column_scales = reinterpret_cast<const float*>(s.group_size ? nullptr : w.scales);
    weight.column_sums = reinterpret_cast<const std::int32_t*>(w.sums);
    return weight;
  };
  for (std::size_t i = 0; i < s.columns.size(); ++i) {
    p.weights.push_back(weight(o.weights[i], s.columns[i], out[i]));
  }
  DenseWeight gate;
  if (s.gate) {
    gate = weight(o.weights.back(), s.columns[0], nullptr);
    p.gate = &gate;
  }
  return run_dense(p, table.dense, parallel);
}

// ---- The definition, in double precision ----

// A number, and how far from it float32 may end.
struct Approximate {
  double value, error;
};

inline float round_to_bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  return float_from_bits(bits);
}

// The quantiser of a range, in float32 as in the kernels: the integers are theirs.
struct DenseRange {
  explicit DenseRange(const char* range) {
    const float low = std::fmin(read<float>(range, 0), 0.0f), high = std::fmax(read<float>(range, 1), 0.0f);
    finite = std::isfinite(read<float>(range, 0)) && std::isfinite(read<float>(range, 1));
    scale = std::fmax(high / 254 - low / 254, 0x1p-118f);
    zero = finite ? std::nearbyint(static_cast<double>(-low * (1 / scale))) - 127 : 0;
  }
  double code(double v) const {
    const double scaled = static_cast<double>(static_cast<float>(v) * (1 / scale));
    return std::nearbyint(std::fmin(std::fmax(scaled, -127 - zero), 127 - zero)) + zero;
  }

  bool finite;
  float scale;
  double zero;
};

// A row of x as it is multiplied.
class DenseRow {
 public:
  DenseRow(const DenseShape& s, const DensePointers& o, std::size_t row)
      : shape_(s), values_(s.size), errors_(s.size), exact_(s.norm == DenseNorm::kNone) {
    std::vector<double> x(s.size), error(s.size);
    for (std::size_t k = 0; k < s.size; ++k) {
      x[k] = flushed(static_cast<float>(s.in->get(o.x, row * s.size + k)));
      finite_ = finite_ && std::isfinite(x[k]);
    }
    if (!exact_) normalize(o, x, error);
    for (std::size_t k = 0; k < s.size; ++k) {
      const std::size_t from =
          s.permutation ? static_cast<std::size_t>(read<std::int32_t>(o.permutation, k)) : k;
      values_[k] = x[from];
      errors_[k] = error[from];
    }
    if (s.range) {
      const DenseRange range(o.range);
      finite_ = finite_ && range.finite;
      scale_ = range.scale;
      zero_ = range.zero;
      for (double& v : values_) v = s.in == &kCodeStorage ? v : range.code(v);
    } else if (s.quantized()) {
      quantize();
    } else if (s.format == DenseFormat::kBFloat16) {
      for (double& v : values_) v = static_cast<double>(round_to_bfloat16(static_cast<float>(v)));
    }
  }
  bool finite() const { return finite_; }

  // The product with column n of a weight, without its bias.
  Approximate times(const DenseWeightOperands<const char*>& w, const char* table, std::size_t n) const {
    const DenseShape& s = shape_;
    const std::size_t group = s.group_size ? s.group_size : s.size, groups = s.size / group;
    double sum = 0, size = 0, from_row = 0, largest = 0;  // size: of what is added up
    for (std::size_t g = 0; g < groups; ++g) {
      const std::size_t at = (n / kPanelColumns * groups + g) * kPanelColumns + n % kPanelColumns;
      const double scale = s.group_size ? kStorage[2].get(w.scales, at) : 1;
      const double offset = s.offsets ? kStorage[2].get(w.offsets, at) : 0;
      double codes = 0, ones = 0;
      for (std::size_t k = g * group; k < (g + 1) * group; ++k) {
        const double code = packed_code(s, w.codes, table, k, n), v = values_[k];
        codes += (v - zero_) * code;
        ones += v;
        size += std::fabs(v * scale * code) + std::fabs(v * offset);
        from_row += errors_[k] * std::fabs(scale * code + offset);
        largest = std::fmax(largest, std::fabs(scale * code) + std::fabs(offset));
      }
      sum += scale * codes + offset * ones;
    }
    const double rounding = (4 * std::sqrt(static_cast<double>(s.size)) + 16) * 0x1p-24;
    const double column_scale =
        s.is_int8() && !s.group_size ? static_cast<double>(read<float>(w.scales, n)) : 1;
    if (!s.quantized()) {
      double error = rounding * size + from_row;
      // A value that falls to the other side of a tie of bfloat16.
      if (s.format == DenseFormat::kBFloat16 && !exact_)
        error += 0x1p-6 * size / static_cast<double>(s.size) * 8;
      return {sum * column_scale, s.integers && exact_ ? 0 : error * column_scale};
    }
    const bool whole = !s.group_size || s.integers;  // sums of integers, of which float32 has every one
    const double row_scale = static_cast<double>(scale_) * column_scale;
    if (whole && exact_) {
      // Column scales are multiplied with the row's first.
      return {static_cast<double>(static_cast<float>(sum) * (scale_ * static_cast<float>(column_scale))), 0};
    }
    // Quantising turns where the normalised value errs: at most two of the integers.
    const double turned = exact_ ? 0 : 2 * largest + 0x1p-17 * size;
    return {sum * row_scale, ((whole ? 0 : rounding * size) + turned + 0x1p-22 * std::fabs(sum)) * row_scale};
  }

 private:
  void normalize(const DensePointers& o, std::vector<double>& x, std::vector<double>& error) {
    const bool centered = shape_.norm == DenseNorm::kLayer;
    const double size = static_cast<double>(shape_.size);
    double mean = 0, square = 0, magnitude = 0;
    for (const double v : x) mean += centered ? v / size : 0;
    for (const double v : x) square += (v - mean) * (v - mean) / size;
    for (const double v : x) magnitude = std::fmax(magnitude, std::fabs(v));
    const double factor = 1 / std::sqrt(square + static_cast<double>(kDenseEpsilon));
    for (std::size_t k = 0; k < shape_.size; ++k) {
      const double scale = static_cast<double>(read<float>(o.norm_scale, k));
      const double offset = centered ? static_cast<double>(read<float>(o.norm_offset, k)) : 0;
      error[k] = 0x1p-20 * (magnitude * factor * std::fabs(scale) + std::fabs(offset));
      x[k] = (x[k] - mean) * factor * scale + offset;
    }
  }
  // As the kernels do it, in float32: the integers are theirs.
  void quantize() {
    float low = 0, high = 0;
    for (const double v : values_) {
      low = std::fmin(low, static_cast<float>(v));
      high = std::fmax(high, static_cast<float>(v));
    }
    const bool zero_point = !shape_.group_size;
    const float range = zero_point ? high / 255 - low / 255 : std::fmax(high, -low) / 127;
    scale_ = std::fmax(range, 0x1p-118f);
    const float inverse = 1 / scale_;
    zero_ = zero_point ? std::nearbyint(static_cast<double>(-low * inverse)) - 128 : 0;
    for (double& v : values_) {
      const double q = std::nearbyint(static_cast<double>(static_cast<float>(v) * inverse)) + zero_;
      v = std::fmin(std::fmax(q, zero_point ? -128 : -127), 127);
    }
  }

  const DenseShape& shape_;
  std::vector<double> values_, errors_;  // what is multiplied; quantised, integers
  const bool exact_;                     // float32 has the values
  bool finite_ = true;
  float scale_ = 1;
  double zero_ = 0;
};

// Checks row `row` of the results against the definition; quantised rows that are not finite are NaN.
inline void check_dense_row(const DenseShape& s, const DensePointers& o, const std::vector<const char*>& out,
                            std::size_t row, const std::string& what, std::size_t step = 1) {
  const DenseRow x(s, o, row);
  const double bound = s.activation ? bounds::silu[s.order - 1] : 0;
  for (std::size_t i = 0; i < s.columns.size(); ++i) {
    for (std::size_t n = 0; n < s.columns[i]; n += step) {
      const double actual = s.out->get(out[i], row * s.columns[i] + n);
      if (!x.finite()) {
        if (s.activation && !s.quantized()) continue;  // silu(-inf) is 0
        check(!std::isfinite(actual) && (!s.quantized() || std::isnan(actual)), "%s: [%zu, %zu] = %g of NaN",
              what.c_str(), row, n, actual);
        continue;
      }
      const auto biased = [&](const DenseWeightOperands<const char*>& w) {
        Approximate y = x.times(w, o.table, n);
        if (w.bias == nullptr) return y;
        const double sum = y.value + static_cast<double>(read<float>(w.bias, n));
        return Approximate{sum, y.error + 0x1p-23 * std::fabs(sum)};
      };
      const auto active = [&](const Approximate& y) {
        if (!s.activation) return y;
        const double value = y.value / (1 + std::exp(-y.value));
        return Approximate{value, 1.1 * y.error + bound * std::fabs(value) + kSmallestNormal};
      };
      Approximate y = biased(o.weights[i]);
      if (s.gate) {
        const Approximate g = active(biased(o.weights.back()));
        y = {y.value * g.value, y.error * std::fabs(g.value) + g.error * (std::fabs(y.value) + y.error) +
                                    0x1p-23 * std::fabs(y.value * g.value)};
      } else {
        y = active(y);
      }
      if (s.residual) {
        y.value += s.out->get(o.residual, row * s.columns[i] + n);
        y.error += 0x1p-23 * std::fabs(y.value);
      }
      bool ok = within(actual, y.value, 0, *s.out, y.error);
      if (s.out_range()) {
        const DenseRange range(o.out_range);
        ok = range.finite ? actual >= range.code(y.value - y.error) && actual <= range.code(y.value + y.error)
                          : std::isnan(actual);
      }
      check(ok, "%s: [%zu, %zu] of weight %zu = %.9g, exact %.9g ± %.2g", what.c_str(), row, n, i, actual,
            y.value, y.error);
    }
  }
}

}  // namespace quake::tests

#endif  // QUAKE_TESTS_DENSE_CALLS_H_
