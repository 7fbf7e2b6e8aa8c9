// Layer norm and RMS norm alone, without Python or XLA.

#include "tests/rows/exact_norm.h"

namespace quake::tests {
namespace {

std::vector<float> random_floats(std::size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// What a kernel is called for.
struct Form {
  bool centered, residual;
};
constexpr Form kForms[] = {{true, false}, {true, true}, {false, false}, {false, true}};

std::string name_of(const KernelTable& table, const Form& form, const Storage& storage, std::size_t rows,
                    std::size_t columns) {
  const std::string name =
      std::string(form.centered ? "layer_norm" : "rms_norm") + (form.residual ? " of a sum" : "");
  return describe(table, name.c_str(), storage, 0, rows, columns);
}

void check_rows(const KernelTable& table, const Form& form, const Storage& storage, std::size_t rows,
                std::size_t columns, std::mt19937& random, bool guarded) {
  const RowKernels::NormFn run = table.rows.norm[static_cast<int>(storage.dtype)];
  const std::string what = name_of(table, form, storage, rows, columns);
  const std::vector<char> input = random_input(storage, rows * columns, random);
  const std::vector<char> residual = random_input(storage, rows * columns, random);
  const std::vector<float> scale = random_floats(columns, random), offset = random_floats(columns, random);
  std::vector<char> output(input.size()), sum(input.size());
  const Norm norm = {scale.data(), form.centered ? offset.data() : nullptr, 1e-6f, form.centered};
  if (guarded) {
    static GuardedBuffer residuals(1 << 18), sums(1 << 18), scales(1 << 15), offsets(1 << 15);
    int calls = 0;
    bool begun = false;
    const auto call = [&](char* x, char* y) {
      // At the start of the pages, then at their end; the sum in the residual's place every other time.
      const bool at_end = calls / 2 % 2 != 0, in_place = calls++ % 2 != 0;
      const auto place = [&](GuardedBuffer& buffer, const auto& values) {
        const std::size_t bytes = values.size() * sizeof values[0];
        char* const data = at_end ? buffer.at_end(bytes) : buffer.at_start();
        std::copy_n(reinterpret_cast<const char*>(values.data()), bytes, data);
        return data;
      };
      const auto* const s = reinterpret_cast<float*>(place(scales, scale));
      const auto* const o = reinterpret_cast<float*>(place(offsets, offset));
      char *r = nullptr, *total = nullptr;
      if (form.residual) {
        r = place(residuals, residual);
        total = in_place ? r : at_end ? sums.at_end(sum.size()) : sums.at_start();
      }
      run(x, r, {s, form.centered ? o : nullptr, norm.epsilon, norm.centered}, y, total, rows, columns,
          Stores::kStreamed);
      if (!form.residual) return;
      if (!begun) std::copy_n(total, sum.size(), sum.data());
      begun = true;
      check(std::equal(sum.begin(), sum.end(), total), "%s: another sum in another place", what.c_str());
    };
    output = check_placements(input, output.size(), true, call, what);
    if (is_around_vectors(columns)) check_misalignments(input, output, storage.size, call, what);
  } else {
    run(input.data(), form.residual ? residual.data() : nullptr, norm, output.data(),
        form.residual ? sum.data() : nullptr, rows, columns, Stores::kCached);
  }
  for (std::size_t row = 0; row < rows; ++row) {
    check_norm_row({storage, input.data(), form.residual ? residual.data() : nullptr, output.data(), sum.data(),
                    row * columns, columns},
                   norm, what);
  }
}

void test_norms(const KernelTable& table) {
  std::mt19937 random(3);
  for (const Form& form : kForms) {
    for (const Storage& storage : kStorage) {
      for (std::size_t columns = 0; columns <= 300; ++columns) {
        if (columns > 70 && (columns % 13 != 5 || thin)) continue;
        for (const std::size_t rows : {0, 1, 9}) {
          check_rows(table, form, storage, rows, columns, random, true);
        }
      }
      for (const std::size_t columns : {768, 1024, 4096, 4097, 50257}) {
        if (thin && columns == 50257) continue;
        check_rows(table, form, storage, 3, columns, random, columns == 4097);
      }
    }
  }
}

// Rows far from 0, whose variance would cancel in a difference of squares; and of millions of elements, whose
// sum would lose some in float32.
void test_hard_rows(const KernelTable& table) {
  const Storage& storage = kStorage[0];
  for (const std::size_t columns : {std::size_t{768}, thin ? std::size_t{10'000} : std::size_t{10'000'000}}) {
    std::vector<float> x(columns), y(columns);
    const std::vector<float> scale(columns, 1.0f), offset(columns, 0.0f);
    for (std::size_t i = 0; i < columns; ++i) {
      x[i] = 1000 + static_cast<float>(i % 7) / 64 + static_cast<float>(i) / static_cast<float>(columns);
    }
    for (const bool centered : {true, false}) {
      const Norm norm = {scale.data(), centered ? offset.data() : nullptr, 1e-6f, centered};
      table.rows.norm[0](x.data(), nullptr, norm, y.data(), nullptr, 1, columns, Stores::kCached);
      check_norm_row({storage, reinterpret_cast<const char*>(x.data()), nullptr,
                      reinterpret_cast<const char*>(y.data()), nullptr, 0, columns},
                     norm, name_of(table, {centered, false}, storage, 1, columns) + " far from 0");
    }
  }
}

// What a row with something special in it gives, wherever that is; and NaN of any bits in a scale.
void test_special_rows(const KernelTable& table) {
  const float inf = INFINITY, nan = NAN;
  for (const std::size_t columns : {1, 3, 19, 64, 197, 5000}) {
    std::vector<float> x(columns), y(columns), scale(columns, 1.0f), offset(columns, 0.5f);
    const auto run = [&](bool centered, float epsilon) {
      const Norm norm = {scale.data(), centered ? offset.data() : nullptr, epsilon, centered};
      table.rows.norm[0](x.data(), nullptr, norm, y.data(), nullptr, 1, columns, Stores::kCached);
    };
    const auto all = [&](const auto& holds) { return std::all_of(y.begin(), y.end(), holds); };
    const auto is_nan = [](float value) { return std::isnan(value); };
    for (const std::size_t at : {std::size_t{0}, columns / 2, columns - 1}) {
      for (const float special : {nan, inf, -inf}) {
        std::fill(x.begin(), x.end(), 1.0f);
        x[at] = special;
        run(true, 1e-6f);
        check(all(is_nan), "%s layer_norm: %g at %zu of %zu", table.isa, special, at, columns);
        run(false, 1e-6f);
        for (std::size_t i = 0; i < columns; ++i) {
          const bool ok = std::isnan(special) || i == at ? std::isnan(y[i]) : y[i] == 0;
          check(ok, "%s rms_norm: %g at %zu of %zu: y[%zu] = %g", table.isa, special, at, columns, i, y[i]);
        }
      }
    }
    std::fill(x.begin(), x.end(), 0.0f);
    run(false, 1e-6f);
    check(all([](float value) { return value == 0; }), "%s rms_norm: a row of 0", table.isa);
    run(false, 0);
    check(all(is_nan), "%s rms_norm: a row of 0, epsilon 0", table.isa);
    std::fill(x.begin(), x.end(), 3.0f);
    run(true, 1e-6f);
    check(all([](float value) { return value == 0.5f; }), "%s layer_norm: a row of 3", table.isa);
    run(true, 0);
    check(all(is_nan), "%s layer_norm: a row of 3, epsilon 0", table.isa);

    for (const Storage& storage : kStorage) {
      for (const std::uint32_t bits : {0x7fffffffu, 0xffffffffu, 0x7f800001u, 0xffc00000u}) {
        const std::vector<char> ones = [&] {
          std::vector<char> bytes(columns * storage.size);
          for (std::size_t i = 0; i < columns; ++i) storage.put(bytes.data(), i, 1.0f);
          return bytes;
        }();
        std::vector<char> out(ones.size());
        const std::vector<float> nans(columns, float_from_bits(bits));
        for (const bool in_scale : {true, false}) {
          const Norm norm = {in_scale ? nans.data() : scale.data(), in_scale ? offset.data() : nans.data(), 1,
                             true};
          table.rows.norm[static_cast<int>(storage.dtype)](ones.data(), nullptr, norm, out.data(), nullptr, 1,
                                                           columns, Stores::kCached);
          for (std::size_t i = 0; i < columns; ++i) {
            check(std::isnan(storage.get(out.data(), i)), "%s %s: a NaN of bits %08x gives %g", table.isa,
                  storage.name, bits, storage.get(out.data(), i));
          }
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
    test_norms(table);
    test_hard_rows(table);
    test_special_rows(table);
  });
}
