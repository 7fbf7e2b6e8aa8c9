// exp, softmax and GELU from piecewise linear tables of 16 or 32 entries: NN-LUT (Yu et al., DAC 2022, arXiv
// 2112.02191) where a table fits into one or two AVX-512 registers and a permutation looks it up. A study, in
// the loops of generic/ and beside the project's own kernels; what comes out is in docs/approximations.md.

#include <immintrin.h>

#include "core/prelude.h"
#include "elementwise/kernels.h"
#include "rows/kernels.h"
#include "nn_lut/nn_lut.h"
#include "nn_lut/tables.h"

namespace quake {
namespace {

#include "isa/avx512-inl.h"
#include "core/bfloat_words-inl.h"
#include "core/vector-inl.h"
#include "core/exponential-inl.h"
#include "core/tanh-inl.h"
#include "elementwise/activations-inl.h"

using nn_lut::Function;
using nn_lut::Method;

// The loops of generic/ are templates over the order; here it stands for a method and a number of entries.
constexpr int code(Method method, int entries) { return 100 * static_cast<int>(method) + entries; }
constexpr Method method_of(int code) { return static_cast<Method>(code / 100); }
constexpr int entries_of(int code) { return code % 100; }

template <int N>
QUAKE_INLINE vf look_up(const float (&table)[N], vi index) {
  if constexpr (N == kLanes) return _mm512_permutexvar_ps((__m512i)index, load(table));
  if constexpr (N == 2 * kLanes) return lookup(table, index);
}

// A table in the order in which the kernels index it, for the argument sign * z.
template <Function F, Method M, int N>
struct Coefficients {
  float slopes[N] = {}, intercepts[N] = {};

  constexpr explicit Coefficients(float sign = 1) {
    constexpr auto& t = nn_lut::kTable<F, M, N>;
    for (int k = 0; k < N; ++k) {
      const int row = row_of(k);
      slopes[row] = sign * t.slopes[k];
      intercepts[row] = t.intercepts[k];
    }
  }

  static constexpr int row_of(int k) {
    constexpr auto& t = nn_lut::kTable<F, M, N>;
    if constexpr (M == Method::kSearch) {  // the first comparison decides the lowest bit
      int row = 0;
      for (int bit = 1; bit < N; bit *= 2) row = 2 * row + (k & bit ? 1 : 0);
      return row;
    } else {
      return ((__builtin_bit_cast(std::int32_t, t.offset) >> t.shift) + k) % N;
    }
  }
};

// What a level of the search compares with, by the outcomes of those before it: outcome i is bit i.
template <Function F, int N, int Level>
struct Thresholds {
  float values[kLanes] = {};

  constexpr Thresholds() {
    for (int path = 0; path < 1 << Level; ++path) {
      int k = N >> (Level + 1);
      for (int bit = 0; bit < Level; ++bit) k += (path >> bit & 1) * (N >> (bit + 1));
      values[path] = nn_lut::kTable<F, Method::kSearch, N>.breakpoints[k - 1];
    }
  }
};

// The row of NN-LUT's own table: a comparison for each bit. A NaN is left of all breakpoints.
template <Function F, int N, int Level = 0>
QUAKE_INLINE vi search(vf x, vi path = vi{}) {
  if constexpr (1 << Level == N) {
    return path;
  } else {
    static constexpr Thresholds<F, N, Level> kThresholds;
    const vf threshold = Level == 0 ? set1(kThresholds.values[0]) : look_up(kThresholds.values, path);
    const __mmask16 right = _mm512_cmp_ps_mask(x, threshold, _CMP_GE_OQ);
    const vi next =
        (vi)_mm512_mask_or_epi32((__m512i)path, right, (__m512i)path, _mm512_set1_epi32(1 << Level));
    return search<F, N, Level + 1>(x, next);
  }
}

template <Function F, int N>
QUAKE_INLINE vf by_search(vf x) {
  static constexpr Coefficients<F, Method::kSearch, N> kCoefficients;
  x = clamp_below(x, -0x1.fffffep127f);  // the slope there is 0, and 0 * inf would be NaN
  const vi row = search<F, N>(x);
  return fma(look_up(kCoefficients.slopes, row), x, look_up(kCoefficients.intercepts, row));
}

// The table of z = Sign x, which is between 0 and the table's upper end.
template <Function F, Method M, int N, int Sign>
QUAKE_INLINE vf by_bits(vf x) {
  constexpr auto& t = nn_lut::kTable<F, M, N>;
  static constexpr Coefficients<F, M, N> kCoefficients(Sign);
  const vi row = as_int(fma(x, set1(Sign * t.scale), set1(t.offset))) >> t.shift;
  return fma(look_up(kCoefficients.slopes, row), x, look_up(kCoefficients.intercepts, row));
}

// e^x for x of at most 0.
template <int Code>
QUAKE_INLINE vf lut_exp(vf x) {
  constexpr Method M = method_of(Code);
  constexpr int N = entries_of(Code);
  if constexpr (M == Method::kSearch) {
    return by_search<Function::kExp, N>(x);
  } else if constexpr (M == Method::kFraction) {
    static constexpr Coefficients<Function::kExp, M, N> kCoefficients;
    const vf t = x * constants::kLog2e;
    // floor(N t) in the lowest bits.
    const vi row =
        (vi)_mm512_fmadd_round_ps(t, set1(N), set1(0x1.8p23f), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return scalef(fma(look_up(kCoefficients.slopes, row), fraction(t), look_up(kCoefficients.intercepts, row)),
                  t);
  } else {
    return by_bits<Function::kExp, M, N, -1>(clamp_below(x, -nn_lut::kTable<Function::kExp, M, N>.upper));
  }
}

template <Function F>
struct Lut;

template <>
struct Lut<Function::kExp> {
  template <int Code>
  QUAKE_INLINE vf apply(vf x) {
    return lut_exp<Code>(x);
  }
};

template <>
struct Lut<Function::kGelu> {
  template <int Code>
  QUAKE_INLINE vf apply(vf x) {
    constexpr Method M = method_of(Code);
    constexpr int N = entries_of(Code);
    if constexpr (M == Method::kSearch) {
      return by_search<Function::kGelu, N>(x);
    } else {
      const vf z = magnitude_below(x, nn_lut::kTable<Function::kGelu, M, N>.upper);
      return by_bits<Function::kGelu, M, N, 1>(z) + clamp_below(x, 0.0f);
    }
  }
};

// What softmax.h calls, for codes.
template <int Code, Range kRange>
requires(Code > kMaxOrder) QUAKE_INLINE vf exp_product(vf x, vf, NoCorrection, float) {
  return lut_exp<Code>(x);
}

#include "elementwise/map-inl.h"
#include "rows/softmax-inl.h"

using nn_lut::Kernel;

template <int Order>
constexpr Kernel exp_order(const char* name) {
  return {Function::kExp, name, map<Exp, float, Order>, reduce_rows<Reduction::kSoftmax, float, Order>};
}

template <class Functor, int Order>
constexpr Kernel gelu_order(const char* name) {
  return {Function::kGelu, name, map<Functor, float, Order>};
}

template <Function F, Method M, int N>
constexpr Kernel table_kernel(const char* name) {
  constexpr auto& t = nn_lut::kTable<F, M, N>;
  Kernel kernel = {F, name, map<Lut<F>, float, code(M, N)>};
  if constexpr (F == Function::kExp) kernel.softmax = reduce_rows<Reduction::kSoftmax, float, code(M, N)>;
  kernel.method = M;
  kernel.entries = N;
  kernel.upper = t.upper;
  kernel.breakpoints = t.breakpoints;
  kernel.slopes = t.slopes;
  kernel.intercepts = t.intercepts;
  return kernel;
}

}  // namespace

constinit const Kernel nn_lut::kKernels[] = {
    exp_order<1>("order 1"),
    exp_order<2>("order 2"),
    exp_order<3>("order 3"),
    table_kernel<Function::kExp, Method::kSearch, 16>("NN-LUT 16, own breakpoints"),
    table_kernel<Function::kExp, Method::kSearch, 32>("NN-LUT 32, own breakpoints"),
    table_kernel<Function::kExp, Method::kUniform, 16>("NN-LUT 16, equal segments"),
    table_kernel<Function::kExp, Method::kUniform, 32>("NN-LUT 32, equal segments"),
    table_kernel<Function::kExp, Method::kBits, 16>("NN-LUT 16, doubling segments"),
    table_kernel<Function::kExp, Method::kBits, 32>("NN-LUT 32, doubling segments"),
    table_kernel<Function::kExp, Method::kFraction, 16>("NN-LUT 16, of the fraction"),
    table_kernel<Function::kExp, Method::kFraction, 32>("NN-LUT 32, of the fraction"),
    gelu_order<GeluErf, 1>("erf form, order 1"),
    gelu_order<GeluErf, 2>("erf form, order 2"),
    gelu_order<GeluErf, 3>("erf form, order 3"),
    gelu_order<GeluTanh, 1>("tanh form, order 1"),
    gelu_order<GeluTanh, 2>("tanh form, order 2"),
    gelu_order<GeluTanh, 3>("tanh form, order 3"),
    table_kernel<Function::kGelu, Method::kSearch, 16>("NN-LUT 16, own breakpoints"),
    table_kernel<Function::kGelu, Method::kSearch, 32>("NN-LUT 32, own breakpoints"),
    table_kernel<Function::kGelu, Method::kUniform, 16>("NN-LUT 16, equal segments"),
    table_kernel<Function::kGelu, Method::kUniform, 32>("NN-LUT 32, equal segments"),
};
constinit const std::size_t nn_lut::kKernelCount = sizeof kKernels / sizeof kKernels[0];

}  // namespace quake
