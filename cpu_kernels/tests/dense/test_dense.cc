// Dense layers on packed weights alone, without Python or XLA: every format and shape against the definition in
// double precision, the memory that they touch, NaN and infinities, threads.

#include <memory>

#include "tests/dense/calls.h"

namespace quake::tests {
namespace {

using std::size_t;

struct Kind {
  DenseFormat format;
  bool grouped, offsets, range = false;
};
constexpr Kind kKinds[] = {
    {DenseFormat::kFloat32, false, false},
    {DenseFormat::kBFloat16, false, false},
    {DenseFormat::kInt8, false, false},
    {DenseFormat::kInt8Quantized, false, false},
    {DenseFormat::kInt8, true, false},
    {DenseFormat::kInt8, true, true},
    {DenseFormat::kInt8Quantized, true, false},
    {DenseFormat::kInt8Quantized, true, true},
    {DenseFormat::kInt4, true, false},
    {DenseFormat::kInt4, true, true},
    {DenseFormat::kInt4Quantized, true, false},
    {DenseFormat::kInt4Quantized, true, true},
    {DenseFormat::kInt8Quantized, false, false, true},
};

DenseShape shape_of(const Kind& kind, size_t rows, size_t size, size_t columns) {
  return {.format = kind.format,
          .group_size = kind.grouped ? size_t{32} : 0,
          .offsets = kind.offsets,
          .rows = rows,
          .size = size,
          .columns = {columns},
          .range = kind.range};
}

std::vector<const char*> pointers(const std::vector<DenseArray>& arrays) {
  std::vector<const char*> in;
  for (const DenseArray& array : arrays) in.push_back(array.bytes.data());
  return in;
}

std::vector<std::vector<char>> results_of(const DenseShape& s, const KernelTable& table,
                                          const std::vector<DenseArray>& arrays, ParallelFor parallel) {
  std::vector<std::vector<char>> results;
  std::vector<char*> out;
  for (const size_t columns : s.columns) results.emplace_back(s.rows * columns * s.out->size, char{0x7f});
  for (std::vector<char>& result : results) out.push_back(result.data());
  const char* error = run_dense(s, table, pointers(arrays), out, parallel);
  check(error == nullptr, "%s: %s", describe(s).c_str(), error);
  return results;
}

// The same with every buffer between inaccessible pages, at the first byte and at the last one.
std::vector<std::vector<char>> placed_results(const DenseShape& s, const KernelTable& table,
                                              const std::vector<DenseArray>& arrays, const std::string& what) {
  static std::vector<std::unique_ptr<GuardedBuffer>> buffers;
  std::vector<std::vector<char>> first;
  for (const bool at_end : {false, true}) {
    size_t next = 0;
    const auto place = [&](size_t bytes) {
      if (next == buffers.size()) buffers.emplace_back(new GuardedBuffer(1 << 17));
      GuardedBuffer& buffer = *buffers[next++];
      return at_end ? buffer.at_end(bytes) : buffer.at_start();
    };
    std::vector<const char*> in;
    std::vector<char*> out;
    for (const DenseArray& array : arrays) {
      char* const data = place(array.bytes.size());
      std::copy(array.bytes.begin(), array.bytes.end(), data);
      in.push_back(data);
    }
    std::vector<std::vector<char>> results;
    for (const size_t columns : s.columns) {
      const size_t bytes = s.rows * columns * s.out->size;
      out.push_back(place(bytes));
      std::fill_n(out.back(), bytes, char{0x7f});
    }
    const char* error = run_dense(s, table, in, out, in_order);
    check(error == nullptr, "%s: %s", what.c_str(), error);
    for (size_t i = 0; i < out.size(); ++i) {
      results.emplace_back(out[i], out[i] + s.rows * s.columns[i] * s.out->size);
    }
    for (size_t i = 0; i < in.size(); ++i) {
      check(std::equal(arrays[i].bytes.begin(), arrays[i].bytes.end(), in[i]), "%s: %s was written to",
            what.c_str(), arrays[i].what);
    }
    if (!at_end) first = results;
    check(first == results, "%s: depends on where the buffers lie", what.c_str());
  }
  return first;
}

void check_shape(const DenseShape& s, const KernelTable& table, std::mt19937& random) {
  const std::vector<DenseArray> arrays = random_operands(s, random);
  const std::string what = std::string(table.isa) + " " + describe(s);
  const std::vector<std::vector<char>> results = placed_results(s, table, arrays, what);
  std::vector<const char*> out;
  for (const std::vector<char>& result : results) out.push_back(result.data());
  const DensePointers operands = dense_pointers(s, pointers(arrays));
  for (size_t row = 0; row < s.rows; ++row) check_dense_row(s, operands, out, row, what);
}

// Every format in every size around those of vectors, words and tiles, each with some of what a layer may have.
void test_shapes(const KernelTable& table) {
  std::mt19937 random(7);
  const auto one_in = [&](unsigned n) { return random() % n == 0; };
  const std::vector<size_t> all_rows =
      thin ? std::vector<size_t>{1, 7, 13} : std::vector<size_t>{1, 2, 3, 5, 7, 12, 13, 30};
  const std::vector<size_t> all_columns =
      thin ? std::vector<size_t>{1, 33} : std::vector<size_t>{1, 3, 31, 32, 64, 96, 150};
  for (const auto& kind : kKinds) {
    for (const size_t rows : all_rows) {
      for (const size_t columns : all_columns) {
        for (const size_t size : {1, 15, 16, 17, 33, 100}) {
          DenseShape s = {.format = kind.format, .offsets = kind.offsets, .rows = rows, .size = size};
          s.range = kind.range;
          if (kind.grouped) {
            s.group_size = one_in(3) ? 64 : 32;
            s.size = s.group_size * (1 + size % 5);
          }
          s.columns = {columns};
          if (one_in(6)) s.columns = {columns, 1 + random() % 40, 17};
          if (one_in(4)) s.norm = one_in(2) ? DenseNorm::kLayer : DenseNorm::kRms;
          s.permutation = one_in(4);
          s.bias = one_in(2);
          s.gate = s.columns.size() == 1 && one_in(4);
          s.gate_bias = s.gate && one_in(2);
          s.residual = s.columns.size() == 1 && one_in(4);
          s.activation = one_in(4);
          s.order = 1 + static_cast<int>(random() % kMaxOrder);
          // Normalised integers are often at a tie of the quantiser.
          s.integers = one_in(2) && !(s.quantized() && s.norm != DenseNorm::kNone);
          if (one_in(3)) s.in = &kStorage[random() % 3];
          if (one_in(3)) s.out = &kStorage[random() % 3];
          if (s.range && s.norm == DenseNorm::kNone && !s.permutation && one_in(2)) s.in = &kCodeStorage;
          if (s.columns.size() == 1 && !s.residual && one_in(3)) s.out = &kCodeStorage;
          check_shape(s, table, random);
        }
      }
    }
  }
}

// Deeper than the words that a block of rows is multiplied with at a time, and more rows than a part has.
void test_deep(const KernelTable& table) {
  std::mt19937 random(8);
  for (const auto& kind : kKinds) {
    DenseShape s = {.format = kind.format, .offsets = kind.offsets, .rows = 260, .columns = {18}, .bias = true};
    s.range = kind.range;
    if (kind.range) s.in = &kCodeStorage;
    s.size = 4097 * s.per_word() + 1 - (s.per_word() > 1 ? s.per_word() : 0);
    s.integers = true;
    if (kind.grouped) {
      s.group_size = 128;
      s.size = 4224;
    }
    const std::vector<DenseArray> arrays = random_operands(s, random);
    const std::string what = std::string(table.isa) + " " + describe(s);
    const std::vector<std::vector<char>> results = results_of(s, table, arrays, in_order);
    const DensePointers operands = dense_pointers(s, pointers(arrays));
    for (const size_t row : {0, 5, 192, 259, 6, 11, 12, 191, 197, 198, 250, 251, 252, 257, 258}) {
      if (thin && row == 6) break;
      check_dense_row(s, operands, {results[0].data()}, row, what, 7);
    }
  }
}

// The result is the same in whatever order and on whatever threads the tasks run.
void test_threads(const KernelTable& table) {
  std::mt19937 random(9);
  for (const auto& kind : kKinds) {
    for (const bool gate : {false, true}) {
      DenseShape s = {.format = kind.format,
                      .group_size = kind.grouped ? size_t{32} : 0,
                      .offsets = kind.offsets,
                      .rows = 205,
                      .size = 96,
                      .columns = {500},
                      .norm = DenseNorm::kRms,
                      .bias = true,
                      .gate = gate,
                      .activation = true,
                      .order = 3,
                      .range = kind.range};
      if (gate && kind.range) s.out = &kCodeStorage;
      if (!gate) s.columns = {300, 1, 90};
      const std::vector<DenseArray> arrays = random_operands(s, random);
      const std::vector<std::vector<char>> expected = results_of(s, table, arrays, in_order);
      check(expected == results_of(s, table, arrays, reversed), "%s: %s depends on the order of tasks",
            table.isa, describe(s).c_str());
      check(expected == results_of(s, table, arrays, on_threads), "%s: %s depends on threads", table.isa,
            describe(s).c_str());
    }
  }
}

// A NaN or an infinity makes its row NaN, or not finite where rows are not quantised, and no other; among codes
// so does -128.
void test_special_values(const KernelTable& table) {
  std::mt19937 random(10);
  static constexpr std::uint32_t kSpecial[] = {0x7fc00000, 0xffc00000, 0x7f800000, 0xff800000,
                                               0x7f800001, 0x7fffffff, 0xffffffff};
  for (const auto& kind : kKinds) {
    for (const Storage* to : {&kStorage[0], &kStorage[1], &kStorage[2], &kCodeStorage}) {
      for (const std::uint32_t bits : kSpecial) {
        const Storage& out = *to;
        const bool codes = kind.range && bits % 4 == 3;
        const bool many = kind.format == DenseFormat::kFloat32 && bits % 2 == 1;  // where floats may be split
        DenseShape s = {.format = kind.format,
                        .group_size = kind.grouped ? size_t{32} : 0,
                        .offsets = kind.offsets,
                        .rows = many ? size_t{40} : 9,
                        .size = kind.grouped ? size_t{96} : 77,
                        .columns = {21},
                        .permutation = bits % 3 == 0 && !codes,
                        .range = kind.range,
                        .in = codes ? &kCodeStorage : &kStorage[0],
                        .out = &out};
        std::vector<DenseArray> arrays = random_operands(s, random);
        const std::vector<char> before = results_of(s, table, arrays, in_order)[0];
        const size_t row = random() % s.rows, at = random() % s.size;
        if (codes) {
          write(arrays[0].bytes.data(), row * s.size + at, std::int8_t{-128});
        } else {
          write(arrays[0].bytes.data(), row * s.size + at, bits);
        }
        const std::vector<char> after = results_of(s, table, arrays, in_order)[0];
        const double x = s.in->get(arrays[0].bytes.data(), row * s.size + at);
        for (size_t i = 0; i < s.rows * s.columns[0]; ++i) {
          const double y = out.get(after.data(), i);
          const bool ok = i / s.columns[0] != row          ? y == out.get(before.data(), i)
                          : std::isnan(x) || s.quantized() ? std::isnan(y)
                                                           : !std::isfinite(y);
          check(ok, "%s %s: %08x in row %zu gives [%zu, %zu] = %g", table.isa, describe(s).c_str(), bits, row,
                i / s.columns[0], i % s.columns[0], y);
        }
      }
    }
  }
}

// Infinities among many rows: the sums of what they are with their weights. So is the largest float, which is
// rounded where floats are split.
void test_infinities(const KernelTable& table) {
  std::mt19937 random(16);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kLargest = std::numeric_limits<float>::max();
  static constexpr float kPairs[][2] = {{kInf, 0}, {-kInf, 2},    {kInf, kInf},      {kInf, -kInf},
                                        {0, kInf}, {-kInf, kNan}, {0, kLargest / 2}, {-kLargest, 0}};
  static constexpr float kUnits[][2] = {{0, 0}, {1, 0}, {0, 1}};
  for (const auto& kind : kKinds) {
    if (kind.format != DenseFormat::kFloat32 && kind.format != DenseFormat::kBFloat16) continue;
    for (const size_t rows : {5, 40}) {
      DenseShape s = shape_of(kind, rows, 130, 70);
      s.bias = s.residual = true;
      std::vector<DenseArray> arrays = random_operands(s, random);
      const auto set_row = [&](size_t row, const float(&pair)[2]) {
        for (size_t k = 0; k < s.size; ++k) {
          const float value = k == 17 ? pair[0] : k == 128 ? pair[1] : 0.0f;
          write(arrays[0].bytes.data(), row * s.size + k, value);
        }
      };
      // Zero, and each of the two weights.
      const size_t row = rows - 2;
      std::vector<double> of[3];
      for (size_t i = 0; i < 3; ++i) {
        set_row(row, kUnits[i]);
        const std::vector<char> out = results_of(s, table, arrays, in_order)[0];
        for (size_t n = 0; n < 70; ++n) of[i].push_back(read<float>(out.data(), row * 70 + n));
      }
      for (const auto& pair : kPairs) {
        if (pair[0] == -kLargest && kind.format == DenseFormat::kBFloat16) continue;  // rounds to an infinity
        for (size_t neighbour = rows / 2; neighbour < rows; ++neighbour) set_row(neighbour, pair);
        const std::vector<char> out = results_of(s, table, arrays, in_order)[0];
        for (size_t n = 0; n < 70; ++n) {
          const float weights[2] = {static_cast<float>(of[1][n] - of[0][n]),
                                    static_cast<float>(of[2][n] - of[0][n])};
          double expected = 0;
          for (int i = 0; i < 2; ++i) expected += pair[i] == 0 ? 0.0 : double{pair[i]} * weights[i];
          const double actual = read<float>(out.data(), row * 70 + n);
          const bool rounded = std::fabs(expected) > 0.99 * double{kLargest};
          // The weights of this test are differences, of two roundings.
          const bool ok = std::isnan(expected)   ? std::isnan(actual)
                          : std::isinf(expected) ? actual == expected
                                                 : rounded || std::fabs(actual / expected - 1) < 0.01;
          check(ok, "%s: %s: %g and %g give [%zu] = %g, not %g", table.isa, describe(s).c_str(),
                double{pair[0]}, double{pair[1]}, n, actual, expected);
        }
      }
    }
  }
}

// Rows of zeros, of values whose range is below what a scale can be, and of the largest values.
void test_ranges(const KernelTable& table) {
  std::mt19937 random(11);
  for (const auto& kind : kKinds) {
    for (const float value : {0.0f, 1e-37f, -1e-36f, 1e30f, -1e35f, 1e20f}) {
      DenseShape s = shape_of(kind, value == 1e20f || value == 1e-37f ? 40 : 3, 64, 5);
      std::vector<DenseArray> arrays = random_operands(s, random);
      for (size_t k = 0; k < s.size; ++k)
        write(arrays[0].bytes.data(), s.size + k, k % 3 ? value : 0.5f * value);
      const std::vector<std::vector<char>> results = results_of(s, table, arrays, in_order);
      const DensePointers operands = dense_pointers(s, pointers(arrays));
      for (size_t row = 0; row < s.rows; ++row) {
        if (row == 1 && value != 0 && std::fabs(value) < 1) {
          for (size_t n = 0; n < 5; ++n) {
            check(std::fabs(read<float>(results[0].data(), 5 + n)) < 1e-30f, "%s %s: tiny values give %g",
                  table.isa, describe(s).c_str(), static_cast<double>(read<float>(results[0].data(), 5 + n)));
          }
          continue;
        }
        check_dense_row(s, operands, {results[0].data()}, row, std::string(table.isa) + " " + describe(s));
      }
    }
  }
}

// Ranges that hold nothing, everything or no number, and those that do not hold 0.
void test_given_ranges(const KernelTable& table) {
  std::mt19937 random(14);
  constexpr float kLargest = std::numeric_limits<float>::max(), kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  static constexpr float kRanges[][2] = {{0, 0},     {3, -2},   {1e-37f, 1e-38f}, {-kLargest, kLargest},
                                         {5, 7},     {-7, -5},  {0, 1e-3f},       {0, kLargest},
                                         {-2, kNan}, {kNan, 2}, {kNan, kNan},     {-kInf, kInf},
                                         {-kInf, 1}, {0, kInf}, {kInf, kInf},     {-0.0f, -kLargest}};
  for (const auto& kind : kKinds) {
    for (const auto& range : kRanges) {
      for (const char* which : {"range", "out_range"}) {
        if (which[0] == 'r' && !kind.range) continue;
        DenseShape s = shape_of(kind, 7, 64, 21);
        if (which[0] == 'o') s.out = &kCodeStorage;
        std::vector<DenseArray> arrays = random_operands(s, random);
        for (DenseArray& array : arrays) {
          if (std::strcmp(array.what, which) == 0) std::memcpy(array.bytes.data(), range, sizeof range);
        }
        const std::vector<std::vector<char>> results = results_of(s, table, arrays, in_order);
        const std::string what = std::string(table.isa) + " " + describe(s) + ", " + which + " " +
                                 std::to_string(range[0]) + " to " + std::to_string(range[1]);
        for (size_t row = 0; row < s.rows; ++row) {
          check_dense_row(s, dense_pointers(s, pointers(arrays)), {results[0].data()}, row, what);
        }
      }
    }
  }
}

// A layer that writes codes and one that reads them give what they give with floats between them.
void test_chain(const KernelTable& table) {
  std::mt19937 random(15);
  for (const auto& kind : kKinds) {
    for (const size_t rows : {1, 2, 7, 25}) {
      for (const bool gate : {false, true}) {
        DenseShape first = shape_of(kind, rows, 64, 16 + random() % 300);
        first.bias = first.activation = true;
        first.gate = gate;
        first.out = &kCodeStorage;
        DenseShape second = {.format = DenseFormat::kInt8Quantized,
                             .rows = rows,
                             .size = first.columns[0],
                             .columns = {1 + random() % 40},
                             .range = true,
                             .in = &kCodeStorage};
        std::vector<DenseArray> a = random_operands(first, random), b = random_operands(second, random);
        write(a[0].bytes.data(), random() % (rows * first.size), std::uint32_t{0x7f800000});
        const auto range = std::find_if(a.begin(), a.end(), [](const DenseArray& array) {
          return std::strcmp(array.what, "out_range") == 0;
        });
        b[1].bytes = range->bytes;
        b[0].bytes = results_of(first, table, a, in_order)[0];
        const std::vector<char> by_codes = results_of(second, table, b, in_order)[0];
        a.erase(range);
        first.out = second.in = &kStorage[0];
        b[0].bytes = results_of(first, table, a, in_order)[0];
        const std::vector<char> by_floats = results_of(second, table, b, in_order)[0];
        for (size_t i = 0; i < rows * second.columns[0]; ++i) {
          const float x = read<float>(by_codes.data(), i), y = read<float>(by_floats.data(), i);
          check(x == y || (std::isnan(x) && std::isnan(y)), "%s %s: [%zu] is %g by codes, %g by floats",
                table.isa, describe(first).c_str(), i, static_cast<double>(x), static_cast<double>(y));
        }
      }
    }
  }
}

// Sums of the largest products.
void test_largest_sums(const KernelTable& table) {
  std::mt19937 random(13);
  for (const auto& kind : kKinds) {
    for (const size_t rows : {1, 2, 4, 13}) {
      for (const int sign : {1, -1}) {
        DenseShape s = {.format = kind.format,
                        .group_size = kind.grouped ? size_t{128} : 0,
                        .rows = rows,
                        .size = 256,
                        .columns = {33},
                        .range = kind.range};
        if (kind.offsets || !s.quantized()) continue;
        for (const int least : {-8, -128, 112}) {
          std::vector<DenseArray> arrays = random_operands(s, random);
          for (size_t i = 0; i < rows * s.size; ++i) write(arrays[0].bytes.data(), i, static_cast<float>(sign));
          for (DenseArray& array : arrays) {
            const std::string what = array.what;
            if (what == "table") {
              for (int i = 0; i < 16; ++i) write(array.bytes.data(), i, static_cast<float>(least + i));
            } else if (what == "codes") {
              std::fill(array.bytes.begin(), array.bytes.end(), s.is_int4() ? char(0xff) : char{127});
            } else if (what == "sums") {
              for (size_t n = 0; n < array.bytes.size() / 4; ++n) write(array.bytes.data(), n, 127 * 256);
            }
          }
          const std::vector<std::vector<char>> results = results_of(s, table, arrays, in_order);
          const DensePointers operands = dense_pointers(s, pointers(arrays));
          for (size_t row = 0; row < rows; ++row) {
            check_dense_row(s, operands, {results[0].data()}, row,
                            std::string(table.isa) + " " + describe(s) + ", the largest");
          }
        }
      }
    }
  }
}

// Indices of a permutation that do not exist read nothing outside; no rows and no columns are no work.
void test_nothing(const KernelTable& table) {
  std::mt19937 random(12);
  DenseShape s = {.rows = 3, .size = 19, .columns = {5}, .permutation = true};
  std::vector<DenseArray> arrays = random_operands(s, random);
  for (const std::int32_t index : {-1, 19, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()}) {
    write(arrays[1].bytes.data(), 7, index);
    placed_results(s, table, arrays, "an index that does not exist");
  }
  for (const auto& kind : kKinds) {
    // Beside a weight without columns, whose arrays may be null pointers.
    DenseShape beside = {.format = kind.format,
                         .group_size = kind.grouped ? size_t{32} : 0,
                         .offsets = kind.offsets,
                         .rows = 3,
                         .size = 32,
                         .columns = {0, 7},
                         .bias = true,
                         .range = kind.range};
    const std::vector<DenseArray> operands = random_operands(beside, random);
    const std::vector<std::vector<char>> results = results_of(beside, table, operands, in_order);
    check_dense_row(beside, dense_pointers(beside, pointers(operands)), {nullptr, results[1].data()}, 1,
                    std::string(table.isa) + " " + describe(beside));
    for (const size_t rows : {0, 3}) {
      DenseShape empty = {.format = kind.format,
                          .group_size = kind.grouped ? size_t{32} : 0,
                          .rows = rows,
                          .size = 32,
                          .columns = {rows ? size_t{0} : 7, 0},
                          .range = kind.range};
      placed_results(empty, table, random_operands(empty, random), describe(empty));
    }
  }
}

}  // namespace
}  // namespace quake::tests

// test_dense [--thin]: fewer sizes, for emulation and the thread sanitizer.
int main(int argc, char** argv) {
  using namespace quake::tests;
  thin = has_option(argc, argv, "--thin");
  return run_all([](const quake::KernelTable& table) {
    test_shapes(table);
    test_deep(table);
    test_threads(table);
    test_special_values(table);
    test_infinities(table);
    test_ranges(table);
    test_given_ranges(table);
    test_chain(table);
    test_largest_sums(table);
    test_nothing(table);
  });
}
