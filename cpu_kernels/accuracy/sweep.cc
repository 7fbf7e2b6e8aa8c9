#include "accuracy/sweep.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "core/denormals.h"
#include "isa/dispatch.h"
#include "accuracy/exact.h"
#include "accuracy/storage.h"

namespace quake {
namespace {

constexpr int kWidth = 8;
typedef float vf __attribute__((vector_size(4 * kWidth)));
typedef double vd __attribute__((vector_size(8 * kWidth)));

// Enough to hide the calls, few enough that a block's arrays stay in L2.
constexpr std::size_t kBlock = 1 << 13;

constexpr double kTiny = 1e-300, kHuge = 1e300;

const Storage& storage_of(DType dtype) { return kStorage[static_cast<int>(dtype)]; }

// Inputs and exact results of one block. Element 0 is the neighbour before the first input; it is NaN if there
// is none. Elements from `size` on are padding of NaNs up to a multiple of kWidth.
struct Block {
  std::size_t size = 0;
  std::vector<std::uint32_t> bits = std::vector<std::uint32_t>(kBlock + 1);
  std::vector<std::uint16_t> words = std::vector<std::uint16_t>(kBlock + 1);  // the same for 16-bit types
  std::vector<float> x = std::vector<float>(1 + kBlock + kWidth);
  std::vector<double> wanted = std::vector<double>(1 + kBlock + kWidth);   // within ±kHuge
  std::vector<double> inverse = std::vector<double>(1 + kBlock + kWidth);  // 1/max(|wanted|, kTiny)
  std::vector<double> per_ulp = std::vector<double>(1 + kBlock + kWidth);  // 1/ulp(wanted)
};

// The input as the kernels take it.
float decode(const Storage& storage, std::uint32_t bits) {
  const float x = storage.dtype == DType::kFloat32
                      ? float_from_bits(bits)
                      : static_cast<float>(storage.decode(static_cast<std::uint16_t>(bits)));
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

// 1/(spacing of the storage type's numbers at `value`), for values in its normal range.
double inverse_ulp(double value, int digits) {
  std::uint64_t word;
  std::memcpy(&word, &value, sizeof word);
  const std::uint64_t exponent = (word >> 52) & 0x7ff;
  word = (2 * 1023 + static_cast<std::uint64_t>(digits) - 1 - exponent) << 52;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

void fill_block(Block& block, Unary function, const Storage& storage, const InputRange& range,
                std::uint64_t begin, std::size_t count) {
  block.size = count + 1;
  const std::uint64_t first = range.first + begin * range.stride;
  for (std::size_t i = 0; i < block.size; ++i) {
    // Without a neighbour before it, the first input stands for it and is replaced below.
    const bool absent = i == 0 && first < range.stride;
    const auto bits = static_cast<std::uint32_t>(absent ? first : first + i * range.stride - range.stride);
    block.bits[i] = bits;
    block.words[i] = static_cast<std::uint16_t>(bits);
    block.x[i] = absent ? NAN : decode(storage, bits);
    const double y = std::clamp(exact(function, block.x[i]), -kHuge, kHuge);
    const double size = std::fabs(y);
    block.wanted[i] = y;
    block.inverse[i] = 1 / std::max(size, kTiny);
    block.per_ulp[i] = inverse_ulp(std::clamp(size, storage.smallest_normal, storage.largest), storage.digits);
  }
  const std::size_t padded = 1 + (count + kWidth - 1) / kWidth * kWidth;
  for (std::size_t i = block.size; i < padded; ++i) {
    block.x[i] = NAN;
    block.wanted[i] = NAN;
    block.inverse[i] = block.per_ulp[i] = 0;
  }
}

void run_kernel(const Block& block, const Storage& storage, ElementwiseKernels::UnaryFn kernel,
                std::vector<std::uint16_t>& words, std::vector<float>& y) {
  const ScopedFlushDenormals flush;
  if (storage.dtype == DType::kFloat32) {
    kernel(block.bits.data(), y.data(), block.size, Stores::kCached);
  } else {
    kernel(block.words.data(), words.data(), block.size, Stores::kCached);
    for (std::size_t i = 0; i < block.size; ++i) y[i] = static_cast<float>(storage.decode(words[i]));
  }
  if (std::isnan(block.x[0])) y[0] = NAN;
  std::fill(y.begin() + static_cast<std::ptrdiff_t>(block.size), y.end(), NAN);
}

// What compare() needs to know of the function and the dtype.
struct Rules {
  double lowest, highest;
  double smallest_normal, largest;
  double slack, slack_below;
  bool increasing, flushes;
};

// The largest positive value in each lane and its index.
struct LaneMaximum {
  vd value = {}, index = {};

  [[gnu::always_inline]] void take(const vd& candidate, const vd& at) {
    index = candidate > value ? at : index;  // false for NaN
    value = candidate > value ? candidate : value;
  }
};

// Everything is a double, counts and indices too, and every comparison the condition of a ?: that is not inside
// another, because GCC 12 computes what else one may write with wide vectors element by element.
struct Comparison {
  LaneMaximum relative, absolute, ulp, fall;
  vd falls = {}, nan_made = {}, nan_lost = {}, out_of_range = {}, denormal = {};
};

template <class V, class T>
[[gnu::always_inline]] inline void load(V& vector, const T* from) {
  std::memcpy(&vector, from, sizeof vector);
}

[[gnu::always_inline]] inline void load(vd& vector, const float* from) {
  vf narrow;
  load(narrow, from);
  vector = __builtin_convertvector(narrow, vd);
}

// Compares the results `y` with the block, elements 1 to size - 1.
[[gnu::always_inline]] inline void compare_block(const Block& block, const float* y, const Rules& rules,
                                                 Comparison& out) {
  Comparison result;  // in registers
  const vd zero = {}, one = zero + 1.0, most = zero + rules.largest;
  const vd infinity = zero + std::numeric_limits<double>::infinity();
  vd at = {1, 2, 3, 4, 5, 6, 7, 8};
  for (std::size_t i = 1; i < block.size; i += kWidth, at += kWidth) {
    vd x, got, before, wanted, inverse, per_ulp;
    load(x, &block.x[i]);
    load(got, y + i);
    load(before, y + i - 1);
    load(wanted, &block.wanted[i]);
    load(inverse, &block.inverse[i]);
    load(per_ulp, &block.per_ulp[i]);
    const vd got_size = got < zero ? -got : got;
    const vd wanted_size = wanted < zero ? -wanted : wanted;

    const vd beyond = wanted_size > most ? wanted_size : most;  // what an infinite result stands for
    const vd bounded = got_size > most ? (got < zero ? -beyond : beyond) : got;
    const vd difference = bounded - wanted;
    const vd absolute = difference < zero ? -difference : difference;
    const vd smaller = got_size < wanted_size ? got_size : wanted_size;
    const vd error = absolute - (smaller < rules.slack_below ? zero + rules.slack : zero);
    result.relative.take(error * inverse, at);
    result.absolute.take(absolute, at);
    result.ulp.take(error * per_ulp, at);

    const vd got_number = got_size <= infinity ? one : zero;
    const vd wanted_number = wanted_size <= infinity ? one : zero;
    result.nan_made += wanted_number * (one - got_number);
    result.nan_lost += got_number * (one - wanted_number);
    result.out_of_range += (got < rules.lowest ? one : zero) + (got > rules.highest ? one : zero);
    if (rules.flushes) {
      result.denormal += (got_size < rules.smallest_normal ? one : zero) - (got_size <= zero ? one : zero);
    }
    if (rules.increasing) {
      // The bits of negative numbers grow as the numbers fall.
      const vd fall = x < zero ? got - before : before - got;
      const vd largest_inverse = zero + 1 / rules.smallest_normal;
      result.falls += fall > zero ? one : zero;
      result.fall.take(fall * (inverse < largest_inverse ? inverse : largest_inverse), at);
    }
  }
  out = result;
}

// The same code for wider registers: it is as much work as the kernels that it judges.
using CompareFn = void (*)(const Block&, const float*, const Rules&, Comparison&);
void compare_portable(const Block& block, const float* y, const Rules& rules, Comparison& result) {
  compare_block(block, y, rules, result);
}
#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] void compare_avx2(const Block& block, const float* y, const Rules& rules,
                                              Comparison& result) {
  compare_block(block, y, rules, result);
}
[[gnu::target("avx512f,avx512dq,avx512vl,avx512bw")]] void compare_avx512(const Block& block, const float* y,
                                                                          const Rules& rules,
                                                                          Comparison& result) {
  compare_block(block, y, rules, result);
}
#endif

CompareFn best_compare() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
    return compare_avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return compare_avx2;
#endif
  return compare_portable;
}

std::uint64_t sum(const vd& lanes) {
  std::uint64_t total = 0;
  for (int k = 0; k < kWidth; ++k) total += static_cast<std::uint64_t>(lanes[k]);
  return total;
}

void update(Extreme& extreme, const LaneMaximum& lanes, const Block& block, const std::vector<float>& y) {
  for (int k = 0; k < kWidth; ++k) {
    if (!(lanes.value[k] > extreme.value)) continue;
    const auto i = static_cast<std::size_t>(lanes.index[k]);
    extreme = {lanes.value[k], block.bits[i], y[i], block.wanted[i]};
  }
}

}  // namespace

std::vector<KernelAccuracy> measure_accuracy(Unary function, DType dtype, InputRange range,
                                             const std::vector<const KernelTable*>& tables,
                                             const std::vector<int>& orders) {
  const Storage& storage = storage_of(dtype);
  const ExactFunction& properties = kExactFunctions[static_cast<int>(function)];
  const bool flushes = dtype != DType::kFloat16;
  // Twice the smallest normal number: intermediate results are flushed too.
  const Rules rules = {properties.lowest,
                       properties.highest,
                       storage.smallest_normal,
                       storage.largest,
                       flushes ? properties.flushed : storage.absolute,
                       flushes ? 2 * storage.smallest_normal : storage.smallest_normal,
                       properties.increasing,
                       flushes};
  const CompareFn compare = best_compare();
  std::vector<KernelAccuracy> results;
  std::vector<ElementwiseKernels::UnaryFn> kernels;
  for (const KernelTable* table : tables) {
    for (const int order : orders) {
      results.push_back({table->isa, order, {}, {}, {}, {}});
      kernels.push_back(
          table->elementwise.unary[static_cast<int>(function)][static_cast<int>(dtype)][order - 1]);
    }
  }
  // An instruction set may take a kernel from another one; its result is then the same.
  const auto first = [&](std::size_t k) {
    return static_cast<std::size_t>(std::find(kernels.begin(), kernels.end(), kernels[k]) - kernels.begin());
  };
  Block block;
  std::vector<float> y(1 + kBlock + kWidth);
  std::vector<std::uint16_t> words(kBlock + 1);
  for (std::uint64_t begin = 0; begin < range.count; begin += kBlock) {
    fill_block(block, function, storage, range, begin, std::min<std::uint64_t>(kBlock, range.count - begin));
    for (std::size_t k = 0; k < kernels.size(); ++k) {
      if (first(k) != k) continue;
      run_kernel(block, storage, kernels[k], words, y);
      Comparison found;
      compare(block, y.data(), rules, found);
      KernelAccuracy& result = results[k];
      update(result.relative, found.relative, block, y);
      update(result.absolute, found.absolute, block, y);
      update(result.ulp, found.ulp, block, y);
      update(result.fall, found.fall, block, y);
      result.falls += sum(found.falls);
      result.nan_made += sum(found.nan_made);
      result.nan_lost += sum(found.nan_lost);
      result.out_of_range += sum(found.out_of_range);
      result.denormal += sum(found.denormal);
    }
  }
  for (std::size_t k = 0; k < kernels.size(); ++k) {
    const char* isa = results[k].isa;
    results[k] = results[first(k)];
    results[k].isa = isa;
  }
  return results;
}

std::vector<double> evaluate(Unary function, DType dtype, const KernelTable* table, int order,
                             const std::vector<std::uint32_t>& inputs) {
  const Storage& storage = storage_of(dtype);
  std::vector<double> results;
  for (const std::uint32_t bits : inputs) {
    if (table == nullptr) {
      results.push_back(exact(function, decode(storage, bits)));
      continue;
    }
    const ElementwiseKernels::UnaryFn kernel =
        table->elementwise.unary[static_cast<int>(function)][static_cast<int>(dtype)][order - 1];
    std::uint32_t out = 0;
    const auto word = static_cast<std::uint16_t>(bits);
    {
      const ScopedFlushDenormals flush;
      kernel(dtype == DType::kFloat32 ? static_cast<const void*>(&bits) : &word, &out, 1, Stores::kCached);
    }
    results.push_back(storage.get(reinterpret_cast<const char*>(&out), 0));
  }
  return results;
}

Unary find_function(const std::string& name) {
  for (int i = 0; i < static_cast<int>(Unary::kCount); ++i) {
    if (name == kFunctionNames[i]) return static_cast<Unary>(i);
  }
  throw std::invalid_argument("unknown function: " + name);
}

DType find_dtype(const std::string& name) {
  for (const Storage& storage : kStorage) {
    if (name == storage.name) return storage.dtype;
  }
  throw std::invalid_argument("unknown dtype: " + name);
}

const KernelTable* find_table(const std::string& isa) {
  for (const KernelTable* table : supported_tables()) {
    if (isa == table->isa) return table;
  }
  throw std::invalid_argument("unknown instruction set: " + isa);
}

void check_order(int order) {
  if (order < 1 || order > kMaxOrder) throw std::invalid_argument("no such order: " + std::to_string(order));
}

}  // namespace quake
