// The kernels alone, without Python or XLA: accuracy, special values, every tail length between guard pages,
// in-place use. Runs every instruction set that the machine supports, or the one in QUAKE_JAX_ISA.

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "denormals.h"
#include "dispatch.h"
#include "tests/bounds.h"
#include "tests/reference.h"
#include "tests/storage.h"

namespace quake::tests {
namespace {

constexpr double kSmallestNormal = 0x1p-126;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

int failures = 0, checks = 0;

[[gnu::format(printf, 2, 3)]] void check(bool ok, const char* format, ...) {
  ++checks;
  if (ok) return;
  if (++failures > 40) return;
  std::va_list arguments;
  va_start(arguments, format);
  std::fputs("FAILED: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
}

struct Function {
  Elementwise id;
  const char* name;
  const double* bounds;
};

constexpr Function kFunctions[] = {
#define QUAKE_FUNCTION(name, Functor) {Elementwise::k##Functor, #name, bounds::name},
    QUAKE_ELEMENTWISE_KERNELS(QUAKE_FUNCTION)
#undef QUAKE_FUNCTION
};

ElementwiseFn kernel(const KernelTable& table, Elementwise id, DType dtype, int order) {
  return table.elementwise[static_cast<int>(id)][static_cast<int>(dtype)][order - 1];
}

// Whether `actual` is the exact value within the relative bound and the rounding of the storage type.
bool within(double actual, double exact, double bound, const Storage& storage) {
  if (std::isnan(exact)) return std::isnan(actual);
  if (std::isinf(exact)) return actual == exact;
  const double relative = bound + storage.half_ulp * (1 + bound);
  if (std::isinf(actual)) return std::fabs(exact) * (1 + relative) >= storage.largest && actual * exact > 0;
  return std::fabs(actual - exact) <= relative * std::fabs(exact) + storage.absolute;
}

// A float32 that the kernels take as 0.
float flushed(float x) { return std::fabs(x) < kSmallestNormal ? std::copysign(0.0f, x) : x; }

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
      kernel(table, f.id, DType::kFloat32, order)(x.data(), y.data(), x.size(), Stores::kCached);
      for (std::size_t i = 0; i < x.size(); ++i) {
        check(within(y[i], reference[i], f.bounds[order - 1], kStorage[0]),
              "%s %s order %d: f(%.9g) = %.9g, exact %.9g", table.isa, f.name, order, x[i], y[i],
              reference[i]);
        check(y[i] == flushed(y[i]), "%s %s order %d: f(%.9g) = %.9g is denormal", table.isa, f.name,
              order, x[i], y[i]);
      }
    }
  }
}

// All inputs of the two 16-bit types, which covers their special values.
void test_16_bit(const KernelTable& table) {
  for (const Storage& storage : {kStorage[1], kStorage[2]}) {
    std::vector<std::uint16_t> x(65536), y(65536);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint16_t>(i);
    for (const Function& f : kFunctions) {
      for (int order = 1; order <= kMaxOrder; ++order) {
        kernel(table, f.id, storage.dtype, order)(x.data(), y.data(), x.size(), Stores::kCached);
        for (std::size_t i = 0; i < x.size(); ++i) {
          const double in = storage.decode(x[i]), out = storage.decode(y[i]);
          check(within(out, exact(f.id, flushed(static_cast<float>(in))), f.bounds[order - 1], storage),
                "%s %s %s order %d: f(%.9g) = %.9g", table.isa, f.name, storage.name, order, in, out);
        }
      }
    }
  }
}

void test_special_values(const KernelTable& table) {
  struct Case {
    Elementwise function;
    double x, y;
  };
  const Case cases[] = {
      {Elementwise::kExp, kInfinity, kInfinity},      {Elementwise::kExp, -kInfinity, 0},
      {Elementwise::kExp, 89, kInfinity},             {Elementwise::kExp, -88, 0},
      {Elementwise::kSigmoid, kInfinity, 1},          {Elementwise::kSigmoid, -kInfinity, 0},
      {Elementwise::kSilu, kInfinity, kInfinity},     {Elementwise::kSilu, -kInfinity, 0},
      {Elementwise::kTanh, kInfinity, 1},             {Elementwise::kTanh, -kInfinity, -1},
      {Elementwise::kTanh, 3e38, 1},                  {Elementwise::kGeluTanh, kInfinity, kInfinity},
      {Elementwise::kGeluTanh, -kInfinity, 0},        {Elementwise::kGeluErf, kInfinity, kInfinity},
      {Elementwise::kGeluErf, -kInfinity, 0},         {Elementwise::kGeluErf, -3e38, 0},
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
      check(std::isnan(y[0]) && std::isnan(y[1]), "%s %s order %d: NaN gives %g, %g", table.isa, f.name,
            order, y[0], y[1]);
    }
    // The largest softmax weight is not distorted.
    const float zero = 0;
    float one;
    kernel(table, Elementwise::kExp, DType::kFloat32, order)(&zero, &one, 1, Stores::kCached);
    check(order == 1 || one == 1, "%s exp order %d: exp(0) = %.9g", table.isa, order, one);
  }
}

// |tanh| <= 1, 0 <= sigmoid <= 1.
void test_ranges(const KernelTable& table, std::uint32_t stride) {
  const std::vector<float> x = sweep(stride);
  std::vector<float> y(x.size());
  for (int order = 1; order <= kMaxOrder; ++order) {
    kernel(table, Elementwise::kTanh, DType::kFloat32, order)(x.data(), y.data(), x.size(), Stores::kCached);
    for (std::size_t i = 0; i < x.size(); ++i) {
      check(std::fabs(y[i]) <= 1 && std::signbit(y[i]) == std::signbit(x[i]),
            "%s tanh order %d: f(%.9g) = %.9g", table.isa, order, x[i], y[i]);
    }
    kernel(table, Elementwise::kSigmoid, DType::kFloat32, order)(x.data(), y.data(), x.size(), Stores::kCached);
    for (std::size_t i = 0; i < x.size(); ++i) {
      check(y[i] >= 0 && y[i] <= 1, "%s sigmoid order %d: f(%.9g) = %.9g", table.isa, order, x[i], y[i]);
    }
  }
}

// A buffer whose accessible bytes end (or begin) at an inaccessible page, so that a kernel that touches one
// byte too many dies here.
class GuardedBuffer {
 public:
  explicit GuardedBuffer(std::size_t bytes) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    size_ = (bytes + page - 1) / page * page;
    base_ = static_cast<char*>(
        mmap(nullptr, size_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page, size_, PROT_READ | PROT_WRITE) != 0) {
      std::perror("guard pages");
      std::exit(2);
    }
    data_ = base_ + page;
    total_ = size_ + 2 * page;
  }
  ~GuardedBuffer() { munmap(base_, total_); }
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;
  char* at_start() { return data_; }
  char* at_end(std::size_t bytes) { return data_ + size_ - bytes; }

 private:
  char *base_, *data_;
  std::size_t size_, total_;
};

// Runs `call(in, out)` on `bytes` of input placed at both ends of guarded buffers, out of place and in place,
// and checks that all four give the same bytes.
template <class Call>
void check_placements(const std::vector<char>& input, const Call& call, const std::string& what) {
  static GuardedBuffer in(1 << 16), out(1 << 16);
  const std::size_t bytes = input.size();
  std::vector<char> first(bytes);
  bool begun = false;
  for (const bool at_end : {false, true}) {
    for (const bool in_place : {false, true}) {
      char* x = at_end ? in.at_end(bytes) : in.at_start();
      char* y = in_place ? x : at_end ? out.at_end(bytes) : out.at_start();
      std::memcpy(x, input.data(), bytes);
      call(x, y);
      if (!begun) std::memcpy(first.data(), y, bytes);
      begun = true;
      check(std::memcmp(first.data(), y, bytes) == 0, "%s: at_end %d, in_place %d differs", what.c_str(),
            at_end, in_place);
    }
  }
}

std::vector<char> random_input(const Storage& storage, std::size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal(0, 3);
  std::vector<char> bytes(count * storage.size);
  for (std::size_t i = 0; i < count; ++i) storage.put(bytes.data(), i, normal(random));
  return bytes;
}

// Every length up to four vectors of 16 lanes and one more; each element as if it stood alone.
void test_tails(const KernelTable& table) {
  std::mt19937 random(1);
  for (const Storage& storage : kStorage) {
    for (const Function& f : kFunctions) {
      for (int order = 1; order <= kMaxOrder; ++order) {
        const ElementwiseFn run = kernel(table, f.id, storage.dtype, order);
        for (std::size_t count = 1; count <= 65; ++count) {
          const std::vector<char> input = random_input(storage, count, random);
          const std::string what = std::string(table.isa) + " " + f.name + " " + storage.name + " order " +
                                   std::to_string(order) + " count " + std::to_string(count);
          check_placements(input, [&](char* x, char* y) { run(x, y, count, Stores::kStreamed); }, what);
          std::vector<char> whole(input.size()), single(input.size());
          run(input.data(), whole.data(), count, Stores::kCached);
          for (std::size_t i = 0; i < count; ++i) {
            run(input.data() + i * storage.size, single.data() + i * storage.size, 1,
                Stores::kCached);
          }
          check(whole == single, "%s: differs from element by element", what.c_str());
        }
      }
    }
  }
}

void check_softmax(const KernelTable& table, const Storage& storage, int order, std::size_t rows,
                   std::size_t columns, const std::vector<char>& input) {
  const SoftmaxFn run = table.softmax[static_cast<int>(storage.dtype)][order - 1];
  std::vector<char> output(input.size());
  run(input.data(), output.data(), rows, columns, Stores::kCached);
  for (std::size_t r = 0; r < rows; ++r) {
    double maximum = -kInfinity, sum = 0;
    for (std::size_t c = 0; c < columns; ++c) {
      maximum = std::fmax(maximum, storage.get(input.data(), r * columns + c));
    }
    for (std::size_t c = 0; c < columns; ++c) {
      sum += std::exp(storage.get(input.data(), r * columns + c) - maximum);
    }
    for (std::size_t c = 0; c < columns; ++c) {
      const double x = storage.get(input.data(), r * columns + c);
      const double y = storage.get(output.data(), r * columns + c);
      check(within(y, std::exp(x - maximum) / sum, bounds::softmax[order - 1], storage),
            "%s softmax %s order %d, %zu x %zu: y[%zu, %zu] = %.9g, exact %.9g", table.isa, storage.name,
            order, rows, columns, r, c, y, std::exp(x - maximum) / sum);
    }
  }
}

void test_softmax(const KernelTable& table) {
  std::mt19937 random(2);
  for (const Storage& storage : kStorage) {
    for (int order = 1; order <= kMaxOrder; ++order) {
      const SoftmaxFn run = table.softmax[static_cast<int>(storage.dtype)][order - 1];
      for (std::size_t columns = 1; columns <= 70; ++columns) {
        for (const std::size_t rows : {std::size_t{1}, std::size_t{9}}) {
          const std::vector<char> input = random_input(storage, rows * columns, random);
          check_softmax(table, storage, order, rows, columns, input);
          check_placements(input, [&](char* x, char* y) { run(x, y, rows, columns, Stores::kStreamed); },
                           std::string(table.isa) + " softmax " + storage.name + " order " +
                               std::to_string(order) + " " + std::to_string(rows) + " x " +
                               std::to_string(columns));
        }
      }
      for (const std::size_t columns : {197, 1024, 4095, 4096, 4097, 50257}) {
        check_softmax(table, storage, order, 3, columns, random_input(storage, 3 * columns, random));
      }
    }
  }
}

void test_softmax_special_rows(const KernelTable& table) {
  const float inf = INFINITY, nan = NAN;
  for (int order = 1; order <= kMaxOrder; ++order) {
    const SoftmaxFn run = table.softmax[0][order - 1];
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

// The sum over a million elements keeps the exponential's error.
void test_softmax_long_row(const KernelTable& table) {
  const std::size_t columns = 1 << 20;
  std::mt19937 random(3);
  const std::vector<char> input = random_input(kStorage[0], columns, random);
  for (int order = 3; order <= kMaxOrder; ++order) {
    check_softmax(table, kStorage[0], order, 1, columns, input);
  }
}

}  // namespace
}  // namespace quake::tests

int main(int argc, char** argv) {
  using namespace quake::tests;
  // The step through the float32 bit patterns: a prime, smaller for a denser sweep.
  const auto stride = static_cast<std::uint32_t>(argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 10007);
  quake::ScopedFlushDenormals flush;
  std::vector<const quake::KernelTable*> tables = quake::supported_tables();
  if (std::getenv("QUAKE_JAX_ISA") != nullptr) tables = {&quake::active_table()};
  for (const quake::KernelTable* table : tables) {
    std::printf("%s\n", table->isa);
    test_accuracy(*table, stride);
    test_16_bit(*table);
    test_special_values(*table);
    test_ranges(*table, stride);
    test_tails(*table);
    test_softmax(*table);
    test_softmax_special_rows(*table);
    test_softmax_long_row(*table);
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
