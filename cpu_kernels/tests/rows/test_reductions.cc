// Softmax, log-softmax and log-sum-exp alone, without Python or XLA: over rows, over columns and masked.

#include "tests/bounds.h"
#include "tests/harness.h"

namespace quake::tests {
namespace {

constexpr const char* kNames[] = {"softmax", "log_softmax", "logsumexp"};

RowKernels::RowsFn rows_kernel(const KernelTable& table, Reduction reduction, const Storage& storage,
                               int order) {
  return table.rows.rows[static_cast<int>(reduction)][static_cast<int>(storage.dtype)][order - 1];
}

// Elements `stride` apart of an array, of which a mask may leave some out.
struct Line {
  const Storage& storage;
  const char* data;
  std::size_t first, length, stride;
  const unsigned char* mask = nullptr;

  double operator[](std::size_t i) const { return storage.get(data, first + i * stride); }
  bool kept(std::size_t i) const { return mask == nullptr || mask[i] != 0; }
};

// Checks a reduction of x against the exact one.
void check_line(Reduction reduction, int order, const Line& x, const Line& y, const std::string& what) {
  double maximum = -kInfinity, sum = 0;
  bool any = false;
  for (std::size_t i = 0; i < x.length; ++i) {
    if (x.kept(i)) maximum = std::fmax(maximum, x[i]);
    any = any || x.kept(i);
  }
  for (std::size_t i = 0; i < x.length; ++i) {
    if (x.kept(i)) sum += std::exp(x[i] - maximum);
  }
  const double log_sum = std::log(sum), rounding = 0x1p-22;
  if (reduction == Reduction::kLogSumExp) {
    const double expected = maximum + log_sum;
    const double more = bounds::logsumexp_absolute[order - 1] + rounding * std::fabs(expected);
    check(within(y[0], expected, 0, x.storage, more), "%s: %.9g, exact %.9g", what.c_str(), y[0], expected);
    return;
  }
  for (std::size_t i = 0; i < x.length; ++i) {
    if (reduction == Reduction::kSoftmax) {
      const double expected = x.kept(i) && any ? std::exp(x[i] - maximum) / sum : 0;
      check(within(y[i], expected, bounds::softmax[order - 1], x.storage), "%s: y[%zu] = %.9g, exact %.9g",
            what.c_str(), i, y[i], expected);
    } else if (!x.kept(i)) {
      check(y[i] == -kInfinity, "%s: masked y[%zu] = %.9g", what.c_str(), i, y[i]);
    } else {
      const double expected = x[i] - maximum - log_sum;
      const double more = bounds::log_softmax_absolute[order - 1] + rounding * std::fabs(x[i] - maximum);
      check(within(y[i], expected, 0, x.storage, more), "%s: y[%zu] = %.9g, exact %.9g", what.c_str(), i, y[i],
            expected);
    }
  }
}

void check_rows(const KernelTable& table, Reduction reduction, const Storage& storage, int order,
                std::size_t rows, std::size_t columns, std::mt19937& random, bool guarded) {
  const RowKernels::RowsFn run = rows_kernel(table, reduction, storage, order);
  const bool sums = reduction == Reduction::kLogSumExp;
  const std::vector<char> input = random_input(storage, rows * columns, random);
  const std::size_t out_columns = sums ? 1 : columns;
  const std::string what = describe(table, kNames[static_cast<int>(reduction)], storage, order, rows, columns);
  std::vector<char> output(rows * out_columns * storage.size);
  if (guarded) {
    const auto streamed = [&](char* x, char* y) { run(x, y, rows, columns, Stores::kStreamed); };
    output = check_placements(input, output.size(), !sums, streamed, what);
    if (is_around_vectors(columns)) check_misalignments(input, output, storage.size, streamed, what);
  } else {
    run(input.data(), output.data(), rows, columns, Stores::kCached);
  }
  for (std::size_t r = 0; r < rows; ++r) {
    check_line(reduction, order, {storage, input.data(), r * columns, columns, 1},
               {storage, output.data(), r * out_columns, out_columns, 1}, what);
  }
}

constexpr Reduction kReductions[] = {Reduction::kSoftmax, Reduction::kLogSoftmax, Reduction::kLogSumExp};

void test_rows(const KernelTable& table) {
  std::mt19937 random(2);
  for (const Reduction reduction : kReductions) {
    for (const Storage& storage : kStorage) {
      for (int order = 1; order <= kMaxOrder; ++order) {
        if (skips(order)) continue;
        for (std::size_t columns = 0; columns <= 270; ++columns) {
          // Orders share the wide ones.
          if (columns > 70 && (columns % 13 != 5 || thin) &&
              (columns > 129 || columns % kMaxOrder != static_cast<std::size_t>(order - 1))) {
            continue;
          }
          for (const std::size_t rows : {0, 1, 9}) {
            check_rows(table, reduction, storage, order, rows, columns, random, true);
          }
        }
        for (const std::size_t columns : {1024, 4095, 4096, 4097, 50257}) {
          if (thin && columns == 50257) continue;
          check_rows(table, reduction, storage, order, 3, columns, random, columns == 4097);
        }
      }
    }
  }
}

// The sum of millions of elements keeps the exponential's error, whichever way they lie.
void test_long_sums(const KernelTable& table) {
  constexpr int kOrder = kMaxOrder;  // has the tightest bound
  constexpr std::size_t kLength = 10'000'000;
  const Storage& storage = kStorage[0];
  // Ascending, so that the maximum rises again and again; near each other, so that roundings add up.
  std::vector<char> input(kLength * storage.size);
  for (std::size_t i = 0; i < kLength; ++i) storage.put(input.data(), i, 1e-10f * static_cast<float>(i));
  std::vector<char> output(input.size());
  std::vector<unsigned char> mask(kLength);
  for (std::size_t i = 0; i < kLength; ++i) mask[i] = i % 3 != 0;
  for (const Reduction reduction : kReductions) {
    const int r = static_cast<int>(reduction);
    const std::string name = describe(table, kNames[r], storage, kOrder, 1, kLength);
    const Line x = {storage, input.data(), 0, kLength, 1}, y = {storage, output.data(), 0, kLength, 1};
    rows_kernel(table, reduction, storage, kOrder)(x.data, output.data(), 1, kLength, Stores::kCached);
    check_line(reduction, kOrder, x, y, name);
    table.rows.columns[r][0][kOrder - 1](x.data, output.data(), kLength, 1, 1);
    check_line(reduction, kOrder, x, y, name + " columns");
    if (reduction == Reduction::kLogSumExp) continue;
    const std::size_t offset = 0;
    table.rows.masked[r][0][kOrder - 1](x.data, mask.data(), &offset, output.data(), 1, kLength);
    check_line(reduction, kOrder, {storage, input.data(), 0, kLength, 1, mask.data()}, y, name + " masked");
  }
}

void test_columns(const KernelTable& table) {
  std::mt19937 random(5);
  for (const Reduction reduction : kReductions) {
    for (const Storage& storage : kStorage) {
      for (int order = 1; order <= kMaxOrder; ++order) {
        const RowKernels::ColumnsFn run =
            table.rows.columns[static_cast<int>(reduction)][static_cast<int>(storage.dtype)][order - 1];
        if (skips(order)) continue;
        for (const std::size_t length : {0, 1, 2, 7, 300}) {
          for (std::size_t columns = 0; columns <= 65; ++columns) {
            // Orders share the widths.
            if (columns > 17 && columns != 33 &&
                (columns + length) % kMaxOrder != static_cast<std::size_t>(order - 1)) {
              continue;
            }
            const bool sums = reduction == Reduction::kLogSumExp;
            const std::vector<char> input = random_input(storage, length * columns, random);
            const std::string what =
                describe(table, kNames[static_cast<int>(reduction)], storage, order, length, columns) +
                " columns";
            const auto call = [&](char* x, char* y) { run(x, y, length, columns, columns); };
            const std::vector<char> output =
                check_placements(input, (sums ? 1 : length) * columns * storage.size, !sums, call, what);
            if (is_around_vectors(columns) && length < 10) {
              check_misalignments(input, output, storage.size, call, what);
            }
            for (std::size_t c = 0; c < columns; ++c) {
              check_line(reduction, order, {storage, input.data(), c, length, columns},
                         {storage, output.data(), c, sums ? 1 : length, columns}, what);
            }
          }
        }
      }
    }
  }
}

// Masks with every density, among them empty rows; what is masked is NaN.
void test_masked_rows(const KernelTable& table) {
  std::mt19937 random(6);
  for (const Reduction reduction : {Reduction::kSoftmax, Reduction::kLogSoftmax}) {
    for (const Storage& storage : kStorage) {
      for (int order = 1; order <= kMaxOrder; ++order) {
        const RowKernels::MaskedFn run =
            table.rows.masked[static_cast<int>(reduction)][static_cast<int>(storage.dtype)][order - 1];
        if (skips(order)) continue;
        for (std::size_t columns = 0; columns <= 256 / storage.size + 1; ++columns) {
          if (columns > 35 && columns % kMaxOrder != static_cast<std::size_t>(order - 1)) continue;
          const std::size_t rows = 6;
          std::vector<char> input = random_input(storage, rows * columns, random);
          std::vector<unsigned char> mask(rows * columns);
          std::vector<std::size_t> offsets;
          for (std::size_t r = 0; r < rows; ++r) {
            // Rows share mask rows in pairs; the first pair keeps nothing.
            offsets.push_back(r / 2 * 2 * columns);
            for (std::size_t c = 0; c < columns; ++c) {
              if (r % 2 == 0) mask[r * columns + c] = random() % 5 < r;
              if (mask[offsets[r] + c] == 0) put_nan(storage, input.data(), r * columns + c);
            }
          }
          const std::string what =
              describe(table, kNames[static_cast<int>(reduction)], storage, order, rows, columns) + " masked";
          static GuardedBuffer mask_buffer(1 << 12), offsets_buffer(1 << 12);
          int calls = 0;
          const auto call = [&](char* x, char* y) {
            // Out of place and in place, at the start of the pages; then at their end.
            const bool at_end = calls++ / 2 % 2 != 0;
            char* const m = at_end ? mask_buffer.at_end(mask.size()) : mask_buffer.at_start();
            char* const o =
                at_end ? offsets_buffer.at_end(rows * sizeof(std::size_t)) : offsets_buffer.at_start();
            std::copy(mask.begin(), mask.end(), m);
            std::memcpy(o, offsets.data(), rows * sizeof(std::size_t));
            run(x, reinterpret_cast<unsigned char*>(m), reinterpret_cast<std::size_t*>(o), y, rows, columns);
          };
          const auto no_row = [&](char* x, char* y) {
            const auto* m = reinterpret_cast<unsigned char*>(mask_buffer.at_end(0));
            run(x, m, reinterpret_cast<std::size_t*>(offsets_buffer.at_end(0)), y, 0, columns);
          };
          check_placements({}, 0, true, no_row, what + " of no row");
          const std::vector<char> output = check_placements(input, input.size(), true, call, what);
          std::size_t shift = 0;
          const auto shifted = [&](char* x, char* y) {
            char* const m = mask_buffer.at_start() + shift++ * 3 % 64;  // odd ones too
            std::copy(mask.begin(), mask.end(), m);
            run(x, reinterpret_cast<unsigned char*>(m), offsets.data(), y, rows, columns);
          };
          if (is_around_vectors(columns)) check_misalignments(input, output, storage.size, shifted, what);
          for (std::size_t r = 0; r < rows; ++r) {
            check_line(reduction, order,
                       {storage, input.data(), r * columns, columns, 1, mask.data() + offsets[r]},
                       {storage, output.data(), r * columns, columns, 1}, what);
          }
        }
      }
    }
  }
}

void test_log_sum_exp_special_rows(const KernelTable& table) {
  const float inf = INFINITY, nan = NAN;
  const float rows[][3] = {{-inf, -inf, -inf}, {1, inf, 2},     {1, nan, 2},
                           {inf, nan, 0},      {-inf, 3, -inf}, {3e38f, -3e38f, 0}};
  const float expected[] = {-inf, inf, nan, nan, 3, 3e38f};
  for (int order = 1; order <= kMaxOrder; ++order) {
    float y[6];
    rows_kernel(table, Reduction::kLogSumExp, kStorage[0], order)(rows, y, 6, 3, Stores::kCached);
    for (int r = 0; r < 6; ++r) {
      const bool ok = std::isnan(expected[r]) ? std::isnan(y[r])
                      : std::isinf(expected[r])
                          ? y[r] == expected[r]
                          : std::fabs(y[r] - expected[r]) <= bounds::logsumexp_absolute[order - 1];
      check(ok, "%s logsumexp order %d: row %d gives %g", table.isa, order, r, y[r]);
    }
  }
}

void test_softmax_special_rows(const KernelTable& table) {
  const float inf = INFINITY, nan = NAN;
  for (int order = 1; order <= kMaxOrder; ++order) {
    const RowKernels::RowsFn run = rows_kernel(table, Reduction::kSoftmax, kStorage[0], order);
    for (const std::size_t columns : {3, 19, 64, 197, 5000}) {
      std::vector<float> x(columns), y(columns);
      const auto all_nan = [&] {
        run(x.data(), y.data(), 1, columns, Stores::kCached);
        for (float value : y) {
          if (!std::isnan(value)) return false;
        }
        return true;
      };
      for (const std::size_t at : {std::size_t{0}, columns / 2, columns - 1}) {
        std::fill(x.begin(), x.end(), 1.0f);
        x[at] = nan;
        check(all_nan(), "%s order %d: a NaN at %zu of %zu", table.isa, order, at, columns);
        x[at] = inf;
        check(all_nan(), "%s order %d: an infinity at %zu of %zu", table.isa, order, at, columns);
        std::fill(x.begin(), x.end(), -inf);
        x[at] = -3.0f;
        run(x.data(), y.data(), 1, columns, Stores::kCached);
        for (std::size_t c = 0; c < columns; ++c) {
          check(std::fabs(y[c] - (c == at)) < 1e-6, "%s order %d: one finite logit at %zu of %zu: y[%zu] = %g",
                table.isa, order, at, columns, c, y[c]);
        }
      }
      std::fill(x.begin(), x.end(), -inf);
      check(all_nan(), "%s order %d: a row of -inf of %zu", table.isa, order, columns);
      // Logits so large that x * log2(e) overflows or is all rounding: no NaN, and the right weights.
      for (const float large : {1e10f, 3e38f, -1e10f, -3e38f}) {
        std::fill(x.begin(), x.end(), large);
        run(x.data(), y.data(), 1, columns, Stores::kCached);
        for (float value : y) {
          check(std::fabs(value * columns - 1) <= bounds::softmax[order - 1] + 1e-6,
                "%s order %d: softmax of equal logits %g gives %g of 1/%zu", table.isa, order, large, value,
                columns);
        }
        x[columns / 2] = -large;
        run(x.data(), y.data(), 1, columns, Stores::kCached);
        for (std::size_t c = 0; c < columns; ++c) {
          const bool is_maximum = (c == columns / 2) == (large < 0);
          const double expected = is_maximum ? (large < 0 ? 1 : 1.0 / (columns - 1)) : 0;
          check(std::fabs(y[c] - expected) <= bounds::softmax[order - 1] * expected + 1e-6,
                "%s order %d: logits ±%g: y[%zu] = %g, expected %g", table.isa, order, large, c, y[c],
                expected);
        }
      }
    }
  }
}

}  // namespace
}  // namespace quake::tests

int main(int argc, char** argv) {
  using namespace quake::tests;
  thin = has_option(argc, argv, "--thin");
  return run_all([](const quake::KernelTable& table) {
    test_rows(table);
    if (!thin) test_long_sums(table);
    test_columns(table);
    test_masked_rows(table);
    test_softmax_special_rows(table);
    test_log_sum_exp_special_rows(table);
  });
}
