// The element-wise kernels alone, without Python or XLA: accuracy, special values, every tail length between
// guard pages, in-place use.

#include "accuracy/exact.h"
#include "tests/bounds.h"
#include "tests/harness.h"

namespace quake::tests {
namespace {

struct Function {
  Unary id;
  const char* name;
  const double* bounds;
};

constexpr Function kFunctions[] = {
#define QUAKE_FUNCTION(name, Functor) {Unary::k##Functor, #name, bounds::name},
    QUAKE_UNARY_KERNELS(QUAKE_FUNCTION)
#undef QUAKE_FUNCTION
};

ElementwiseKernels::UnaryFn kernel(const KernelTable& table, Unary id, DType dtype, int order) {
  return table.elementwise.unary[static_cast<int>(id)][static_cast<int>(dtype)][order - 1];
}

// selu multiplies by 1.76 what may have been flushed before: its absolute error reaches 2^-125.
double slack(const Function& f) { return f.id == Unary::kSelu ? kSmallestNormal : 0; }

// Every `stride`-th float32, both signs, NaN left out.
std::vector<float> sweep(std::uint32_t stride) {
  std::vector<float> values;
  for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += stride) {
    const float x = float_from_bits(static_cast<std::uint32_t>(bits));
    if (!std::isnan(x)) values.push_back(x);
  }
  return values;
}

void test_accuracy(const KernelTable& table, std::uint32_t stride) {
  const std::vector<float> x = sweep(stride);
  std::vector<float> y(x.size());
  for (const Function& f : kFunctions) {
    std::vector<double> reference;
    for (float value : x) reference.push_back(exact(f.id, flushed(value)));
    for (int order = 1; order <= kMaxOrder; ++order) {
      if (skips(order)) continue;
      kernel(table, f.id, DType::kFloat32, order)(x.data(), y.data(), x.size(), Stores::kCached);
      for (std::size_t i = 0; i < x.size(); ++i) {
        check(within(y[i], reference[i], f.bounds[order - 1], kStorage[0], slack(f)),
              "%s %s order %d: f(%.9g) = %.9g, exact %.9g", table.isa, f.name, order, x[i], y[i], reference[i]);
        check(y[i] == flushed(y[i]), "%s %s order %d: f(%.9g) = %.9g is denormal", table.isa, f.name, order,
              x[i], y[i]);
      }
    }
  }
}

// All inputs of the two 16-bit types, which covers their special values.
void test_16_bit(const KernelTable& table) {
  for (const Storage& storage : {kStorage[1], kStorage[2]}) {
    const std::size_t step = thin ? 97 : 1;
    std::vector<std::uint16_t> x(65536 / step), y(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint16_t>(i * step);
    for (const Function& f : kFunctions) {
      for (int order = 1; order <= kMaxOrder; ++order) {
        if (skips(order)) continue;
        kernel(table, f.id, storage.dtype, order)(x.data(), y.data(), x.size(), Stores::kCached);
        for (std::size_t i = 0; i < x.size(); ++i) {
          const double in = storage.decode(x[i]), out = storage.decode(y[i]);
          check(
              within(out, exact(f.id, flushed(static_cast<float>(in))), f.bounds[order - 1], storage, slack(f)),
              "%s %s %s order %d: f(%.9g) = %.9g", table.isa, f.name, storage.name, order, in, out);
        }
      }
    }
  }
}

void test_special_values(const KernelTable& table) {
  struct Case {
    Unary function;
    double x, y;
  };
  const Case cases[] = {
      {Unary::kExp, kInfinity, kInfinity},
      {Unary::kExp, -kInfinity, 0},
      {Unary::kExp, 89, kInfinity},
      {Unary::kExp, -88, 0},
      {Unary::kSigmoid, kInfinity, 1},
      {Unary::kSigmoid, -kInfinity, 0},
      {Unary::kSilu, kInfinity, kInfinity},
      {Unary::kSilu, -kInfinity, 0},
      {Unary::kTanh, kInfinity, 1},
      {Unary::kTanh, -kInfinity, -1},
      {Unary::kTanh, 3e38, 1},
      {Unary::kGeluTanh, kInfinity, kInfinity},
      {Unary::kGeluTanh, -kInfinity, 0},
      {Unary::kGeluErf, kInfinity, kInfinity},
      {Unary::kGeluErf, -kInfinity, 0},
      {Unary::kGeluErf, -3e38, 0},
  };
  for (int order = 1; order <= kMaxOrder; ++order) {
    for (const Case& c : cases) {
      const float x = static_cast<float>(c.x);
      float y;
      kernel(table, c.function, DType::kFloat32, order)(&x, &y, 1, Stores::kCached);
      check(y == c.y, "%s %s order %d: f(%g) = %g, expected %g", table.isa,
            kFunctions[static_cast<int>(c.function)].name, order, c.x, y, c.y);
    }
    for (const Function& f : kFunctions) {
      float x[2] = {float_from_bits(0x7fffffff), float_from_bits(0xff800001)}, y[2];
      kernel(table, f.id, DType::kFloat32, order)(x, y, 2, Stores::kCached);
      check(std::isnan(y[0]) && std::isnan(y[1]), "%s %s order %d: NaN gives %g, %g", table.isa, f.name, order,
            y[0], y[1]);
    }
    // The largest softmax weight is not distorted.
    const float zero = 0;
    float one;
    kernel(table, Unary::kExp, DType::kFloat32, order)(&zero, &one, 1, Stores::kCached);
    check(order == 1 || one == 1, "%s exp order %d: exp(0) = %.9g", table.isa, order, one);
  }
}

// |tanh| <= 1, 0 <= sigmoid <= 1.
void test_ranges(const KernelTable& table, std::uint32_t stride) {
  const std::vector<float> x = sweep(stride);
  std::vector<float> y(x.size());
  for (int order = 1; order <= kMaxOrder; ++order) {
    kernel(table, Unary::kTanh, DType::kFloat32, order)(x.data(), y.data(), x.size(), Stores::kCached);
    for (std::size_t i = 0; i < x.size(); ++i) {
      check(std::fabs(y[i]) <= 1 && std::signbit(y[i]) == std::signbit(x[i]),
            "%s tanh order %d: f(%.9g) = %.9g", table.isa, order, x[i], y[i]);
    }
    kernel(table, Unary::kSigmoid, DType::kFloat32, order)(x.data(), y.data(), x.size(), Stores::kCached);
    for (std::size_t i = 0; i < x.size(); ++i) {
      check(y[i] >= 0 && y[i] <= 1, "%s sigmoid order %d: f(%.9g) = %.9g", table.isa, order, x[i], y[i]);
    }
  }
}

// Every length from 0 to four vectors (of 16 floats, or of 32 16-bit elements) and one more; each element as if
// it stood alone.
void test_tails(const KernelTable& table) {
  std::mt19937 random(1);
  for (const Storage& storage : kStorage) {
    for (const Function& f : kFunctions) {
      for (int order = 1; order <= kMaxOrder; ++order) {
        if (skips(order)) continue;
        const ElementwiseKernels::UnaryFn run = kernel(table, f.id, storage.dtype, order);
        for (std::size_t count = 0; count <= 256 / storage.size + 1; ++count) {
          const std::vector<char> input = random_input(storage, count, random);
          const std::string what = describe(table, f.name, storage, order, 1, count);
          const auto streamed = [&](char* x, char* y) { run(x, y, count, Stores::kStreamed); };
          check_placements(input, input.size(), true, streamed, what);
          std::vector<char> whole(input.size()), single(input.size());
          run(input.data(), whole.data(), count, Stores::kCached);
          for (std::size_t i = 0; i < count; ++i) {
            run(input.data() + i * storage.size, single.data() + i * storage.size, 1, Stores::kCached);
          }
          check(whole == single, "%s: differs from element by element", what.c_str());
          if (is_around_vectors(count)) check_misalignments(input, whole, storage.size, streamed, what);
        }
      }
    }
  }
}

// ---- Two operands ----

using Exact2 = double (*)(double, double);

struct BinaryFunction {
  Binary id;
  const char* name;
  const double* bounds;
  bool absolute;  // the bound is absolute, with rounding of the result
  Exact2 exact;
};

double exact_logaddexp(double a, double b) {
  if (a == b) return a + std::log(2.0);
  return std::fmax(a, b) + std::log1p(std::exp(-std::fabs(a - b)));
}

template <Unary activation>
double exact_gated(double gate, double value) {
  return exact(activation, gate) * value;
}

// The sum is rounded to float32, as in the kernel.
template <Unary activation>
double exact_biased(double x, double bias) {
  return exact(activation, static_cast<float>(x + bias));
}

constexpr BinaryFunction kBinaryFunctions[] = {
    {Binary::kLogAddExp, "logaddexp", bounds::logaddexp_absolute, true, exact_logaddexp},
    {Binary::kGlu, "glu", bounds::sigmoid, false, exact_gated<Unary::kSigmoid>},
    {Binary::kSwiglu, "swiglu", bounds::silu, false, exact_gated<Unary::kSilu>},
    {Binary::kGegluTanh, "geglu_tanh", bounds::gelu_tanh, false, exact_gated<Unary::kGeluTanh>},
    {Binary::kGegluErf, "geglu_erf", bounds::gelu_erf, false, exact_gated<Unary::kGeluErf>},
    {Binary::kBiasSilu, "bias_silu", bounds::silu, false, exact_biased<Unary::kSilu>},
    {Binary::kBiasGeluTanh, "bias_gelu_tanh", bounds::gelu_tanh, false, exact_biased<Unary::kGeluTanh>},
    {Binary::kBiasGeluErf, "bias_gelu_erf", bounds::gelu_erf, false, exact_biased<Unary::kGeluErf>},
};
static_assert(std::size(kBinaryFunctions) == static_cast<std::size_t>(Binary::kCount));

// No row and three rows of every width, the second operand one row for all or a row each. Orders share the wide
// ones.
void test_binary(const KernelTable& table) {
  static GuardedBuffer second(1 << 16);
  std::mt19937 random(4);
  for (const Storage& storage : kStorage) {
    for (const BinaryFunction& f : kBinaryFunctions) {
      for (int order = 1; order <= kMaxOrder; ++order) {
        const ElementwiseKernels::BinaryFn run =
            table.elementwise.binary[static_cast<int>(f.id)][static_cast<int>(storage.dtype)][order - 1];
        if (skips(order)) continue;
        for (std::size_t columns = 0; columns <= 256 / storage.size + 1; ++columns) {
          if (columns > 35 && columns % kMaxOrder != static_cast<std::size_t>(order - 1)) continue;
          for (const bool broadcast : {false, true}) {
            const std::size_t rows = 3, b_stride = broadcast ? 0 : columns;
            const auto no_row = [&](char* x, char* out) {
              char* b = second.at_end(0);
              run(x, columns, b, b_stride, out, 0, columns, Stores::kStreamed);
            };
            check_placements({}, 0, true, no_row, describe(table, f.name, storage, order, 0, columns));
            const std::vector<char> input = random_input(storage, rows * columns, random);
            const std::vector<char> b_input = random_input(storage, (broadcast ? 1 : rows) * columns, random);
            const std::string what = describe(table, f.name, storage, order, rows, columns);
            int calls = 0;
            const auto streamed = [&](char* x, char* out) {
              // Out of place and in place, at the start of its pages; then at their end.
              char* b = calls++ / 2 % 2 == 0 ? second.at_start() : second.at_end(b_input.size());
              std::copy(b_input.begin(), b_input.end(), b);
              run(x, columns, b, b_stride, out, rows, columns, Stores::kStreamed);
            };
            const std::vector<char> y = check_placements(input, input.size(), true, streamed, what);
            std::size_t shift = 0;
            const auto shifted = [&](char* x, char* out) {
              char* b = second.at_start() + shift * 3 % 64;  // again another misalignment
              shift += storage.size;
              std::copy(b_input.begin(), b_input.end(), b);
              run(x, columns, b, b_stride, out, rows, columns, Stores::kStreamed);
            };
            if (is_around_vectors(columns)) check_misalignments(input, y, storage.size, shifted, what);
            for (std::size_t i = 0; i < rows * columns; ++i) {
              const double u = storage.get(input.data(), i);
              const double v = storage.get(b_input.data(), broadcast ? i % columns : i);
              const double expected = f.exact(u, v), bound = f.bounds[order - 1];
              const double rounding = 0x1p-22 * std::fabs(expected);
              check(f.absolute ? within(storage.get(y.data(), i), expected, 0, storage, bound + rounding)
                               : within(storage.get(y.data(), i), expected, bound + 0x1p-24, storage,
                                        kSmallestNormal * std::fabs(v)),
                    "%s: f(%.9g, %.9g) = %.9g, exact %.9g", what.c_str(), u, v, storage.get(y.data(), i),
                    expected);
            }
          }
        }
      }
    }
  }
}

void test_logaddexp_special_values(const KernelTable& table) {
  const float inf = INFINITY, nan = NAN;
  const float a[] = {inf, -inf, inf, -inf, 0, nan, 1, -inf, 3e38f};
  const float b[] = {inf, -inf, -inf, inf, -inf, 1, nan, 2, -3e38f};
  const float expected[] = {inf, -inf, inf, inf, 0, nan, nan, 2, 3e38f};
  for (int order = 1; order <= kMaxOrder; ++order) {
    float y[9];
    table.elementwise.binary[static_cast<int>(Binary::kLogAddExp)][0][order - 1](a, 0, b, 0, y, 1, 9,
                                                                                 Stores::kCached);
    for (int i = 0; i < 9; ++i) {
      check(y[i] == expected[i] || (std::isnan(y[i]) && std::isnan(expected[i])),
            "%s logaddexp order %d: f(%g, %g) = %g", table.isa, order, a[i], b[i], y[i]);
    }
  }
}

}  // namespace
}  // namespace quake::tests

int main(int argc, char** argv) {
  using namespace quake::tests;
  // The step through the float32 bit patterns: a prime, smaller for a denser sweep.
  thin = has_option(argc, argv, "--thin");
  const auto stride = static_cast<std::uint32_t>(thin       ? 10000019
                                                 : argc > 1 ? std::strtoul(argv[1], nullptr, 10)
                                                            : 10007);
  return run_all([&](const quake::KernelTable& table) {
    test_accuracy(table, stride);
    test_16_bit(table);
    test_special_values(table);
    test_ranges(table, stride);
    test_tails(table);
    test_binary(table);
    test_logaddexp_special_values(table);
  });
}
