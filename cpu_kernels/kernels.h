// The seam between XLA and the mathematics: the table of kernel functions, in plain C types.
//
// Above it, ffi_handlers.cc decodes XLA's buffers and splits the work; below it, generic/ and isa/ compute.
// Nothing below this line knows XLA or Python.

#ifndef QUAKE_KERNELS_H_
#define QUAKE_KERNELS_H_

#include <cstddef>
#include <cstdint>

// The registry of element-wise kernels: X(name, Functor). The name makes the enumerator, the FFI target
// `quake_jax_<name>` and the row of the table; the functor is defined in generic/activations.h.
#define QUAKE_ELEMENTWISE_KERNELS(X) \
  X(exp, Exp)                        \
  X(sigmoid, Sigmoid)                \
  X(silu, Silu)                      \
  X(tanh, Tanh)                      \
  X(gelu_tanh, GeluTanh)             \
  X(gelu_erf, GeluErf)               \
  X(exp2, Exp2)                      \
  X(expm1, Expm1)                    \
  X(softplus, Softplus)              \
  X(log_sigmoid, LogSigmoid)         \
  X(elu, Elu)                        \
  X(selu, Selu)                      \
  X(mish, Mish)                      \
  X(quick_gelu, QuickGelu)

// The kernels of two operands: X(name, Functor), in three families that differ in their FFI targets. Gated
// ones are activation(gate) * value, biased ones activation(x + bias).
#define QUAKE_GATED_KERNELS(X) \
  X(glu, Glu)                  \
  X(swiglu, Swiglu)            \
  X(geglu_tanh, GegluTanh)     \
  X(geglu_erf, GegluErf)
#define QUAKE_BIASED_KERNELS(X)   \
  X(bias_silu, BiasSilu)          \
  X(bias_gelu_tanh, BiasGeluTanh) \
  X(bias_gelu_erf, BiasGeluErf)
#define QUAKE_BINARY_KERNELS(X) \
  X(logaddexp, LogAddExp)       \
  QUAKE_GATED_KERNELS(X)        \
  QUAKE_BIASED_KERNELS(X)

namespace quake {

enum class Elementwise : int {
#define QUAKE_ENUMERATOR(name, Functor) k##Functor,
  QUAKE_ELEMENTWISE_KERNELS(QUAKE_ENUMERATOR)
#undef QUAKE_ENUMERATOR
      kCount
};

enum class Binary : int {
#define QUAKE_ENUMERATOR(name, Functor) k##Functor,
  QUAKE_BINARY_KERNELS(QUAKE_ENUMERATOR)
#undef QUAKE_ENUMERATOR
      kCount
};

// What is made of the exponentials along an axis.
enum class Reduction : int { kSoftmax, kLogSoftmax, kLogSumExp, kCount };

// Storage types; the arithmetic is float32 for all of them.
enum class DType : int { kFloat32, kBFloat16, kFloat16, kCount };

inline constexpr int kMaxOrder = 5;

// Contracts shared by all kernels:
//  - `in` and `out` may be the same pointer, otherwise they do not overlap; neither need be aligned;
//  - nothing outside the given elements is read or written, nothing is allocated, nothing is thrown;
//  - denormals are flushed by the caller (FTZ and DAZ, see denormals.h): "too small" becomes 0 for free;
//  - `stores` changes the speed alone.
enum class Stores {
  kCached,
  kStreamed,  // past the caches: for outputs that would not stay there
};
using ElementwiseFn = void (*)(const void* in, void* out, std::size_t count, Stores stores);
// Rows of `columns` elements; the rows of an operand are `stride` elements apart (0: one row for all).
using BinaryFn = void (*)(const void* a, std::size_t a_stride, const void* b, std::size_t b_stride, void* out,
                          std::size_t rows, std::size_t columns, Stores stores);
// Over each row. kLogSumExp writes one element a row.
using RowsFn = void (*)(const void* in, void* out, std::size_t rows, std::size_t columns, Stores stores);
// Over each column of a matrix of `length` rows, `stride` elements apart; kLogSumExp writes one row.
using ColumnsFn = void (*)(const void* in, void* out, std::size_t length, std::size_t stride,
                           std::size_t columns);
// Over the elements of each row whose byte in `mask` is not 0; row r's bytes begin at mask_offsets[r].
using MaskedRowsFn = void (*)(const void* in, const unsigned char* mask, const std::size_t* mask_offsets,
                              void* out, std::size_t rows, std::size_t columns);

// The sum of the weights of a row of attention: as they are multiplied with the values, which may have rounded
// them and is what the output is divided by, and as they were computed, for the log-sum-exp.
struct WeightSum {
  float used = 0, exact = 0;
};

// The pieces of fused attention; attention.cc puts them together. Sums, scores and what is done to them are
// float32. What the two products multiply is packed into 32-bit words: `per_word` neighbours of the axis that
// they sum over. One is a float32, into which the packing converts 16-bit types; two are bfloat16, where the
// instruction set multiplies them directly. The kernels of a dtype belong together.
//
// words(n) is n / per_word, rounded up. A row tile is up to `row_tile` query rows; its packed queries are
// [words(size)][row_tile], rows that do not exist being 0. A key tile is up to kKeyTile keys; its packed keys
// are panels of `panel` keys, [words(size)][panel] each, and its packed values panels of `panel` columns,
// [words(capacity)][panel] each. Scores are rows of kScoreStride, and so are the weights that replace them, of
// words(count) words.
struct AttentionKernels {
  static constexpr std::size_t kKeyTile = 256;
  // Not a multiple of 4 KiB / 16, so that the rows of a tile fall into different sets of the L1 cache.
  static constexpr std::size_t kScoreStride = kKeyTile + 16;

  // Up to this many rows of a key/value head, reading keys and values once is all that counts: they are read
  // where they lie (…_in_place), and the rows are not cut into tiles.
  static constexpr std::size_t kFewRows = 8;

  std::size_t row_tile, panel, lanes;
  std::size_t per_word[static_cast<int>(DType::kCount)];

  // `count` pointers to rows of `size` elements. Rows past row_tile are not packed, but where they can be read
  // a faster way is open. Writes up to a vector past the tile's end. `scale` is applied here or by score:
  // bfloat16 queries have no room for it.
  using PackQueriesFn = void (*)(const void* const* rows, std::size_t count, std::size_t size, float scale,
                                 float* out);
  using PackKeysFn = void (*)(const void* in, std::ptrdiff_t stride, std::size_t keys, std::size_t size,
                              float* out);
  using PackValuesFn = void (*)(const void* in, std::ptrdiff_t stride, std::size_t keys, std::size_t size,
                                std::size_t capacity, float* out);
  PackQueriesFn pack_queries[static_cast<int>(DType::kCount)];
  PackKeysFn pack_keys[static_cast<int>(DType::kCount)];
  PackValuesFn pack_values[static_cast<int>(DType::kCount)];

  // scores = scale * queries · keys, of whole vectors of keys.
  using ScoreFn = void (*)(const float* queries, std::size_t rows, const float* keys, std::size_t count,
                           std::size_t size, float scale, float* scores);
  ScoreFn score[static_cast<int>(DType::kCount)];
  // scores = cap * tanh(scores / cap)
  void (*soft_cap[kMaxOrder])(float* scores, std::size_t rows, std::size_t count, float cap);
  // One row: scores += bias, whose elements are `stride` apart.
  void (*add_bias[static_cast<int>(DType::kCount)])(float* scores, const void* bias, std::ptrdiff_t stride,
                                                    std::size_t count);
  // One row: scores = kept ? scores : fill, with contiguous mask bytes.
  void (*apply_mask)(float* scores, const unsigned char* mask, std::size_t count, float fill);
  // One step of online softmax: raises the rows' maxima, replaces the scores by e^(score - maximum), adds
  // them to the sums, and scales sums and accumulators of rows whose maximum has grown. Scores past `count`
  // up to a whole vector become 0.
  using WeighFn = void (*)(float* scores, std::size_t rows, std::size_t count, float* maxima, WeightSum* sums,
                           float* accumulators, std::size_t accumulator_stride, std::size_t size);
  WeighFn weigh[static_cast<int>(DType::kCount)][kMaxOrder];
  // accumulators += weights · values. Reads and writes whole vectors of accumulators and up to row_tile rows.
  using AccumulateFn = void (*)(const float* weights, std::size_t rows, const float* values, std::size_t count,
                                std::size_t capacity, std::size_t size, float* accumulators,
                                std::size_t accumulator_stride);
  AccumulateFn accumulate[static_cast<int>(DType::kCount)];
  // out = accumulators / sum
  void (*finish[static_cast<int>(DType::kCount)])(const float* accumulators, std::size_t size, float sum,
                                                  void* out);
  // What log(sum) lacks: the exponential of order 1 has a constant factor.
  float log_sum_correction[kMaxOrder];

  // For few rows, where packing would cost more than the products: score and accumulate from keys and values
  // where they lie. A step takes a few keys of all heads, so that memory is read in the order in which heads
  // and keys usually lie, which hardware fetches ahead. The rows of a head follow those of the head before, in
  // the queries (of `query_stride` floats, padded with 0 to whole vectors), scores and accumulators alike. What is
  // done in between is float32's.
  struct InPlace {
    std::size_t heads, count;            // key/value heads, and keys
    std::ptrdiff_t head_stride, stride;  // in elements
  };
  void (*score_in_place[static_cast<int>(DType::kCount)])(const float* queries, std::size_t query_stride,
                                                          std::size_t rows, const void* keys, InPlace at,
                                                          std::size_t size, float* scores);
  void (*accumulate_in_place[static_cast<int>(DType::kCount)])(const float* scores, std::size_t rows,
                                                               const void* values, InPlace at, std::size_t size,
                                                               float* accumulators,
                                                               std::size_t accumulator_stride);
};

// One instruction set's kernels; the last index of each array is order - 1.
struct KernelTable {
  const char* isa;
  ElementwiseFn elementwise[static_cast<int>(Elementwise::kCount)][static_cast<int>(DType::kCount)][kMaxOrder];
  BinaryFn binary[static_cast<int>(Binary::kCount)][static_cast<int>(DType::kCount)][kMaxOrder];
  RowsFn rows[static_cast<int>(Reduction::kCount)][static_cast<int>(DType::kCount)][kMaxOrder];
  ColumnsFn columns[static_cast<int>(Reduction::kCount)][static_cast<int>(DType::kCount)][kMaxOrder];
  // kSoftmax and kLogSoftmax only.
  MaskedRowsFn masked_rows[2][static_cast<int>(DType::kCount)][kMaxOrder];
  AttentionKernels attention;
};

}  // namespace quake

#endif  // QUAKE_KERNELS_H_
