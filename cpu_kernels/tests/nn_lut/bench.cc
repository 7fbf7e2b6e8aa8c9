// NN-LUT against orders 1 to 3 on this machine: errors, and time in L1 and L2. From the repository root:
//   cmake -S . -B build/kernels -DQUAKE_PYTHON_MODULE=OFF -DQUAKE_KERNEL_TESTS=ON &&
//   cmake --build build/kernels --target bench_nn_lut && build/kernels/cpu_kernels/tests/bench_nn_lut
// With --check only the check that the kernels are what their tables say; exit status 1 if not, 77 without
// AVX-512.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "core/denormals.h"
#include "nn_lut/nn_lut.h"

namespace {

using namespace quake;
using nn_lut::Function;
using nn_lut::Kernel;
using nn_lut::Method;

bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// ---- The check ----

float look_up(const Kernel& kernel, float x) {
  int k = 0;
  while (k < kernel.entries - 1 && x >= kernel.breakpoints[k]) ++k;
  return std::fma(kernel.slopes[k], x, kernel.intercepts[k]);
}

// The table, read entry by entry.
float from_table(const Kernel& kernel, float x) {
  const float z = std::fmin(std::fabs(x), kernel.upper);
  if (kernel.method == Method::kSearch) return look_up(kernel, x);
  if (kernel.method == Method::kFraction) {
    const float t = x * 1.44269502f, n = std::floor(t);
    return std::ldexp(look_up(kernel, t - n), static_cast<int>(n));
  }
  return look_up(kernel, z) + (kernel.function == Function::kGelu ? std::fmax(x, 0.0f) : 0.0f);
}

// A search gives the table's value bit by bit. Elsewhere a rounded sum may give the neighbour of a segment at a
// breakpoint, where both agree but for the rounding of their coefficients.
float tolerance(const Kernel& kernel, float x, float expected) {
  if (kernel.method == Method::kSearch) return 0;
  return 0x1p-20f * (kernel.method == Method::kFraction ? expected : std::fmax(1.0f, std::fabs(x)));
}

std::vector<float> apply(const Kernel& kernel, const std::vector<float>& x) {
  std::vector<float> y(x.size());
  kernel.map(x.data(), y.data(), x.size(), Stores::kCached);
  return y;
}

// Inputs of both tails and all segments, with the floats around the breakpoints that are searched for.
std::vector<float> sweep(Function function) {
  std::vector<float> x;
  const float upper = function == Function::kExp ? 0 : 12;
  for (int i = 0; i <= 240000; ++i) x.push_back(upper - i * 0x1p-13f * 1.001f);
  for (const Kernel* k = nn_lut::kKernels; k < nn_lut::kKernels + nn_lut::kKernelCount; ++k) {
    for (int i = 0; k->function == function && k->method == Method::kSearch && i < k->entries - 1; ++i) {
      const float d = k->breakpoints[i];
      x.insert(x.end(), {std::nextafter(d, -INFINITY), d, std::nextafter(d, INFINITY)});
    }
  }
  x.insert(x.end(), {-87.0f, -1e4f, -1e30f});
  return x;
}

// The largest difference between a row of softmax and the same from the table.
float softmax_difference(const Kernel& kernel) {
  constexpr std::size_t kColumns = 1003;
  std::vector<float> x(kColumns), y(kColumns);
  for (std::size_t i = 0; i < kColumns; ++i) x[i] = 4 + 2 * std::sin(0.1f * i * i);
  kernel.softmax(x.data(), y.data(), 1, kColumns, Stores::kCached);
  const float maximum = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (float& v : x) sum += v = from_table(kernel, v - maximum);
  float largest = 0;
  for (std::size_t i = 0; i < kColumns; ++i) {
    largest = std::fmax(largest, std::fabs(y[i] * static_cast<float>(sum) - x[i]));
  }
  return largest;
}

int check() {
  int failures = 0;
  for (std::size_t i = 0; i < nn_lut::kKernelCount; ++i) {
    const Kernel& kernel = nn_lut::kKernels[i];
    if (kernel.entries == 0) continue;
    const std::vector<float> x = sweep(kernel.function), y = apply(kernel, x);
    int wrong = 0;
    for (std::size_t j = 0; j < x.size(); ++j) {
      const float expected = from_table(kernel, x[j]);
      if (std::fabs(y[j] - expected) <= tolerance(kernel, x[j], expected)) continue;
      if (wrong++ < 3) {
        std::fprintf(stderr, "FAILED: %s: f(%.9g) = %.9g, not %.9g\n", kernel.name, x[j], y[j], expected);
      }
    }
    // The special values of the project's kernels.
    const std::vector<float> ends = apply(kernel, {-INFINITY, NAN});
    if (!(ends[0] == 0 && std::isnan(ends[1]))) {
      std::fprintf(stderr, "FAILED: %s: f(-inf) = %g, f(nan) = %g\n", kernel.name, ends[0], ends[1]);
      ++wrong;
    }
    if (kernel.softmax && !(softmax_difference(kernel) <= 1e-5f)) {
      std::fprintf(stderr, "FAILED: %s: softmax differs by %g\n", kernel.name, softmax_difference(kernel));
      ++wrong;
    }
    failures += wrong;
  }
  std::printf("%zu kernels, %d checks failed\n", nn_lut::kKernelCount, failures);
  return failures;
}

// ---- Errors ----

double exact(Function function, double x) {
  return function == Function::kExp ? std::exp(x) : x / 2 * std::erfc(-x / std::sqrt(2.0));
}

struct Errors {
  double absolute = 0, relative = 0;  // relative where the function is at least 1e-4
};

Errors largest_errors(const Kernel& kernel) {
  const std::vector<float> x = sweep(kernel.function), y = apply(kernel, x);
  Errors errors;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double wanted = exact(kernel.function, x[i]), error = std::fabs(y[i] - wanted);
    errors.absolute = std::fmax(errors.absolute, error);
    if (std::fabs(wanted) >= 1e-4) errors.relative = std::fmax(errors.relative, error / std::fabs(wanted));
  }
  return errors;
}

// Mean total variation of softmax of 400 rows of 128 logits of N(0, 2^2).
double total_variation(const Kernel& kernel) {
  constexpr std::size_t kRows = 400, kColumns = 128;
  std::mt19937 random(0);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> x(kRows * kColumns), y(x.size());
  for (float& v : x) v = normal(random);
  kernel.softmax(x.data(), y.data(), kRows, kColumns, Stores::kCached);
  double total = 0;
  for (std::size_t row = 0; row < kRows; ++row) {
    const float *in = &x[row * kColumns], *out = &y[row * kColumns];
    double sum = 0;
    for (std::size_t i = 0; i < kColumns; ++i) sum += std::exp(double(in[i]));
    for (std::size_t i = 0; i < kColumns; ++i) total += std::fabs(out[i] - std::exp(double(in[i])) / sum) / 2;
  }
  return total / kRows;
}

// ---- Time ----

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Nanoseconds of a cycle, from a chain of dependent multiplications.
double cycle() {
  constexpr int kSteps = 100000;
  std::uint64_t v = 1;
  const double begin = now();
  for (int i = 0; i < kSteps; i += 8) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      v *= 0x9e3779b97f4a7c15u;
      asm volatile("" : "+r"(v));
    }
  }
  asm volatile("" : : "r"(v));
  return (now() - begin) / kSteps / 3 * 1e9;  // a 64-bit multiplication takes 3 cycles
}

struct Timing {
  const Kernel* kernel;  // null: a copy
  bool softmax;
  std::size_t count;
  std::vector<double> readings = {};  // ns per element

  void take(const float* x, float* y) {
    constexpr std::size_t kElements = 1 << 19;  // a reading: tens of microseconds, to fit between interruptions
    constexpr std::size_t kColumns = 1024;
    const std::size_t calls = kElements / count;
    const auto call = [&] {
      if (kernel == nullptr) {
        std::memcpy(y, x, count * sizeof *x);
      } else if (softmax) {
        kernel->softmax(x, y, count / kColumns, kColumns, Stores::kCached);
      } else {
        kernel->map(x, y, count, Stores::kCached);
      }
      asm volatile("" : : "r"(y) : "memory");
    };
    call();
    const double begin = now();
    for (std::size_t i = 0; i < calls; ++i) call();
    readings.push_back((now() - begin) / (calls * count) * 1e9);
  }
};

double quantile(std::vector<double> values, double q) {
  const std::size_t k = static_cast<std::size_t>(q * (values.size() - 1) + 0.5);
  std::nth_element(values.begin(), values.begin() + k, values.end());
  return values[k];
}

constexpr std::size_t kCounts[] = {4096, 65536};  // input and output together: 32 KiB (L1), 512 KiB (L2)
constexpr int kRounds = 301;

// The median, and the quartiles beside it.
void print_times(const std::vector<double>& readings) {
  std::printf(" %7.4f (%.4f-%.4f)", quantile(readings, 0.5), quantile(readings, 0.25),
              quantile(readings, 0.75));
}

void report(const char* title, const std::vector<Timing>& timings, double ns_per_cycle) {
  const bool softmax = timings[0].softmax;
  std::printf("\n%s, %.2f GHz\n%-28s %-24s %-9s %-24s %s\n", title, 1 / ns_per_cycle, "", " ns/element, L1",
              "cycles/16", " ns/element, L2", softmax ? "total variation" : "largest error, relative");
  for (std::size_t i = 0; i < timings.size(); i += 2) {
    const Kernel* kernel = timings[i].kernel;
    std::printf("%-28s", kernel ? kernel->name : "copy");
    print_times(timings[i].readings);
    std::printf(" %9.2f", quantile(timings[i].readings, 0.5) * 16 / ns_per_cycle);
    print_times(timings[i + 1].readings);
    if (kernel && softmax) std::printf(" %9.2e", total_variation(*kernel));
    if (kernel && !softmax) {
      const Errors errors = largest_errors(*kernel);
      std::printf(" %9.2e %9.2e", errors.absolute, errors.relative);
    }
    std::printf("\n");
  }
}

// All kernels in turn, round by round, so that whatever slows the machine down meets them all.
void measure(const char* title, Function function, bool softmax) {
  std::vector<Timing> timings;
  for (const std::size_t count : kCounts) timings.push_back({nullptr, softmax, count});
  for (std::size_t i = 0; i < nn_lut::kKernelCount; ++i) {
    const Kernel* kernel = &nn_lut::kKernels[i];
    if (kernel->function != function) continue;
    for (const std::size_t count : kCounts) timings.push_back({kernel, softmax, count});
  }
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 2);
  alignas(64) static float in[kCounts[1]], out[kCounts[1]];
  for (std::size_t i = 0; i < kCounts[1]; ++i) {
    const float v = normal(random);
    in[i] = function == Function::kExp && !softmax ? -std::fabs(v) : v;
  }
  std::vector<double> cycles;
  for (int round = 0; round < kRounds; ++round) {
    cycles.push_back(cycle());
    for (Timing& timing : timings) timing.take(in, out);
  }
  report(title, timings, quantile(cycles, 0.5));
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_avx512()) {
    std::puts("skipped: no AVX-512");
    return 77;
  }
  ScopedFlushDenormals flush;
  if (check() != 0) return 1;
  if (argc > 1 && std::strcmp(argv[1], "--check") == 0) return 0;
  measure("exp of x <= 0", Function::kExp, false);
  measure("softmax, rows of 1024", Function::kExp, true);
  measure("GELU", Function::kGelu, false);
  return 0;
}
