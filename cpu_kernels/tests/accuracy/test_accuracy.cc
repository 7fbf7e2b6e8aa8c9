// The accuracy sweep finds planted faults: a kernel that is right but for a few inputs is measured with just
// these, wherever they stand in a block.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>

#include "accuracy/sweep.h"
#include "accuracy/exact.h"
#include "accuracy/storage.h"

namespace quake::tests {
namespace {

int failures = 0;

void check(bool ok, const char* what, double got) {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s: %.17g\n", what, got);
}

std::map<std::uint32_t, float> planted;  // results by input

// The exact function rounded to float32, with the planted results.
template <Unary function>
void kernel(const void* in, void* out, std::size_t count, Stores) {
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, static_cast<const char*>(in) + 4 * i, 4);
    const auto fault = planted.find(bits);
    float y = static_cast<float>(exact(function, float_from_bits(bits)));
    if (std::fabs(y) < 0x1p-126f) y = 0;
    if (fault != planted.end()) y = fault->second;
    std::memcpy(static_cast<char*>(out) + 4 * i, &y, 4);
  }
}

template <Unary function>
KernelAccuracy measure(InputRange range) {
  KernelTable table = {};
  table.isa = "planted";
  table.elementwise.unary[static_cast<int>(function)][static_cast<int>(DType::kFloat32)][0] = kernel<function>;
  return measure_accuracy(function, DType::kFloat32, range, {&table}, {1})[0];
}

std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Inputs from 2^-127 up, of many blocks and a rest that fills no vector.
constexpr std::uint32_t kFirst = 0x00400000;
constexpr InputRange kRange = {kFirst, 100003, 1};

void test_tanh() {
  constexpr Unary kTanh = Unary::kTanh;
  planted.clear();
  const KernelAccuracy clean = measure<kTanh>(kRange);
  check(clean.relative.value <= 0x1p-24, "a rounded tanh, relative", clean.relative.value);
  check(clean.ulp.value <= 0.5, "a rounded tanh, ulp", clean.ulp.value);
  check(clean.falls + clean.nan_made + clean.nan_lost + clean.out_of_range + clean.denormal == 0,
        "a rounded tanh, counts", 0);

  const InputRange near_one = {bits_of(1.0f), 100003, 1};
  for (const std::uint32_t offset : {0u, 1u, 7u, 8191u, 8192u, 8193u, 100002u}) {
    const std::uint32_t input = bits_of(1.0f) + offset;
    const double wanted = std::tanh(static_cast<double>(float_from_bits(input)));
    planted = {{input, 2.0f}};
    KernelAccuracy found = measure<kTanh>(near_one);
    check(found.relative.input == input && found.relative.got == 2 && found.relative.wanted == wanted,
          "the worst input", found.relative.input);
    check(std::fabs(found.relative.value - (2 - wanted) / wanted) < 1e-15, "relative", found.relative.value);
    check(found.absolute.value == 2 - wanted, "absolute", found.absolute.value);
    check(found.ulp.value == (2 - wanted) * 0x1p24, "ulp of a result in [1/2, 1)", found.ulp.value);
    check(found.out_of_range == 1, "out of range", static_cast<double>(found.out_of_range));
    // The next result is smaller, unless the range ends here.
    check(found.falls == (offset != 100002), "falls", static_cast<double>(found.falls));

    planted = {{input, NAN}};
    found = measure<kTanh>(near_one);
    check(found.nan_made == 1 && found.nan_lost == 0 && found.relative.value <= 0x1p-24, "NaN made",
          static_cast<double>(found.nan_made));
  }

  // The neighbour before the range takes part: cutting a sweep loses no pair.
  planted = {{bits_of(1.0f) - 1, 0.9f}};
  check(measure<kTanh>(near_one).falls == 1, "a fall from the neighbour before", 0);
  // Of negative inputs the successor is the smaller number.
  planted = {{bits_of(-1.0f), -0.9f}};
  check(measure<kTanh>({bits_of(-1.0f) - 9, 20, 1}).falls == 1, "a fall among negative inputs", 0);

  planted = {{0x7fc00001, 1.0f}};
  const KernelAccuracy lost = measure<kTanh>({0x7fc00000, 20, 1});
  check(lost.nan_lost == 1 && lost.nan_made == 0, "NaN lost", static_cast<double>(lost.nan_lost));

  planted = {{kFirst, 0x1p-127f}};
  check(measure<kTanh>(kRange).denormal == 1, "denormal", 0);
}

void test_exp() {
  constexpr Unary kExp = Unary::kExp;
  const float infinity = std::numeric_limits<float>::infinity(), largest = 0x1.fffffep127f;
  const std::uint32_t overflow = bits_of(88.72284f);  // the first input whose result is beyond `largest`
  const InputRange near_overflow = {overflow - 1000, 2001, 1};
  planted.clear();
  check(measure<kExp>(near_overflow).relative.value <= 0x1p-24, "inf where the result overflows", 0);
  planted = {{overflow - 1, infinity}};
  double error = measure<kExp>(near_overflow).relative.value;
  check(error > 0 && error < 1e-5, "inf just below the overflow", error);
  planted = {{bits_of(80.0f), infinity}};
  error = measure<kExp>({bits_of(80.0f), 1, 1}).relative.value;
  check(error > 1000, "inf far below the overflow", error);
  planted = {{bits_of(100.0f), largest}};
  error = measure<kExp>({bits_of(100.0f), 1, 1}).relative.value;
  check(error > 0.9, "a number far beyond the overflow", error);

  const std::uint32_t underflow = bits_of(-87.33654f);  // about e^x = 2^-126
  const InputRange near_underflow = {underflow - 1000, 2001, 1};
  planted.clear();
  check(measure<kExp>(near_underflow).relative.value <= 0x1p-24, "0 where the result underflows", 0);
  planted = {{bits_of(-100.0f), 0x1p-120f}};
  error = measure<kExp>({bits_of(-100.0f), 1, 1}).relative.value;
  check(error > 1, "a number far below the underflow", error);
  planted = {{bits_of(-80.0f), 0.0f}};
  error = measure<kExp>({bits_of(-80.0f), 1, 1}).relative.value;
  check(error > 0.99, "0 far above the underflow", error);
}

}  // namespace
}  // namespace quake::tests

int main() {
  quake::tests::test_tanh();
  quake::tests::test_exp();
  std::printf("accuracy sweep: %d failed\n", quake::tests::failures);
  return quake::tests::failures != 0;
}
