// exp, softmax and GELU from piecewise linear tables of 16 or 32 entries, which fit into one or two AVX-512
// registers, where a permutation looks them up; in the loops of cpu_kernels/, and beside the project's own
// kernels. `nn_lut.py` compiles this with a header of its own, which has
//   Table<Code>   slopes and intercepts, of the argument up to `end`, and 0 beyond it, where the segment is
//                 read off the bits of the float scale x + offset; or by levels the `thresholds` of a search.
//                 A code is more than the largest order.
//   KERNELS       KERNEL(a name to export, a loop<a functor, a code or an order>) of each.

#include <immintrin.h>

#include "core/denormals.h"
#include "core/prelude.h"
#include "elementwise/kernels.h"
#include "rows/kernels.h"

namespace quake {
namespace {

#include "isa/avx512-inl.h"
#include "core/bfloat_words-inl.h"
#include "core/vector-inl.h"
#include "core/exponential-inl.h"
#include "core/tanh-inl.h"
#include "elementwise/activations-inl.h"

template <int Code>
struct Table;
#include "nn_lut_tables.h"

template <int N>
QUAKE_INLINE vf look_up(const float (&table)[N], vi index) {
  if constexpr (N == kLanes) return _mm512_permutexvar_ps((__m512i)index, load(table));
  if constexpr (N == 2 * kLanes) return lookup(table, index);
}

template <class T>
QUAKE_INLINE vf line(vi row, vf x) {
  return fma(look_up(T::slopes, row), x, look_up(T::intercepts, row));
}

template <class T>
concept Searched = requires {
  T::thresholds;
};

// The row of a table that is searched, a comparison for each bit; a NaN is left of all thresholds.
template <class T, int Level = 0>
QUAKE_INLINE vi search(vf x, vi path = vi{}) {
  if constexpr (Level == sizeof(T::thresholds) / sizeof(T::thresholds[0])) {
    return path;
  } else {
    const __mmask16 right = _mm512_cmp_ps_mask(x, look_up(T::thresholds[Level], path), _CMP_GE_OQ);
    const __m512i bit = _mm512_set1_epi32(1 << Level);
    return search<T, Level + 1>(x, (vi)_mm512_mask_or_epi32((__m512i)path, right, (__m512i)path, bit));
  }
}

template <class T>
QUAKE_INLINE vf by_search(vf x) {
  x = clamp_below(x, -0x1.fffffep127f);  // the slope there is 0, and 0 * inf would be NaN
  return line<T>(search<T>(x), x);
}

template <class T>
QUAKE_INLINE vf by_bits(vf x) {
  return line<T>(as_int(fma(x, set1(T::scale), set1(T::offset))) >> T::shift, x);
}

// e^x for x of at most 0.
struct LutExp {
  template <int Code>
  QUAKE_INLINE vf apply(vf x) {
    using T = Table<Code>;
    if constexpr (Searched<T>) return by_search<T>(x);
    if constexpr (!Searched<T>) return by_bits<T>(clamp_below(x, T::end));
  }
};

// max(x, 0) and a table of gelu(-|x|), or a table of all of it.
struct LutGelu {
  template <int Code>
  QUAKE_INLINE vf apply(vf x) {
    using T = Table<Code>;
    if constexpr (Searched<T>) return by_search<T>(x);
    if constexpr (!Searched<T>) return by_bits<T>(magnitude_below(x, T::end)) + clamp_below(x, 0.0f);
  }
};

// What softmax-inl.h calls, for codes.
template <int Code, Range kRange>
requires(Code > kMaxOrder) QUAKE_INLINE vf exp_product(vf x, vf, NoCorrection, float) {
  return LutExp::apply<Code>(x);
}

#include "elementwise/map-inl.h"
#include "rows/softmax-inl.h"

constexpr std::size_t kColumns = 1024;  // of a row

template <class Functor, int Code>
void mapped(const float* x, float* y, std::size_t count) {
  map<Functor, float, Code>(x, y, count, Stores::kCached);
}

template <int Code>
void softmaxed(const float* x, float* y, std::size_t count) {
  const std::size_t columns = count < kColumns ? count : kColumns;
  reduce_rows<Reduction::kSoftmax, float, Code>(x, y, count / columns, columns, Stores::kCached);
}

}  // namespace

#define KERNEL(name, ...)                                                         \
  extern "C" void name(const float* x, float* y, std::size_t count, long calls) { \
    ScopedFlushDenormals flush;                                                   \
    for (long i = 0; i < calls; ++i) __VA_ARGS__(x, y, count);                    \
  }
KERNELS

}  // namespace quake
