// The kernels of fused attention: their slice of an instruction set's table.

#ifndef QUAKE_ATTENTION_KERNELS_H_
#define QUAKE_ATTENTION_KERNELS_H_

#include "core/packed.h"
#include "core/types.h"

namespace quake {

// The sum of the weights of a row of attention: as they are multiplied with the values, which may have rounded
// them and is what the output is divided by, and as they were computed, for the log-sum-exp.
struct WeightSum {
  float used = 0, exact = 0;
};

// What the words hold that the two products of attention multiply.
enum class AttentionFormat : int {
  kFloat32,       // a float
  kBFloat16,      // two bfloat16: queries, keys, values and weights are rounded to it
  kInt8,          // four bytes: queries, keys and values have scales, weights are whole 255ths
  kFloat32Split,  // kFloat32 as three bfloat16: the driver's choice for more than few rows
  kCount
};
// Those that a problem may have.
inline constexpr int kAttentionProblemFormats = static_cast<int>(AttentionFormat::kFloat32Split);
inline constexpr int kAttentionFormats = static_cast<int>(AttentionFormat::kCount);

// The pieces of fused attention; driver.cc puts them together. Sums, scores and what is done to them are
// float32. What the two products multiply is packed into words (core/packed.h) of a format, into which the
// packing converts any type. An instruction set that does not multiply a format has none of its kernels.
//
// words(n) is that of the format's layout. A row tile is up to `row_tile` query rows; its packed queries are
// [words(size)][row_tile], or of lines of 16 words [words(size) / 16][row_tile][16], and then `row_words` words
// for each row; rows that do not exist are 0. A key tile is up to kKeyTile keys; its packed keys are a
// PackedMatrix of size x keys, its packed values one of keys x value size. Scores are rows of kScoreStride;
// weights are rows of weight_stride, of words(count) words.
//
// Integers have a scale: of each query, key, and column of a tile's values. Keys are packed less a `centre`
// of `size` floats, padded with 0 to kCentreStep of them: what they have in common would cost them accuracy.
// Scores have the query's product with it again.
struct AttentionKernels {
  static constexpr std::size_t kKeyTile = 256;
  // Not a multiple of 4 KiB / 16, so that the rows of a tile fall into different sets of the L1 cache.
  static constexpr std::size_t kScoreStride = kKeyTile + 16;

  // Up to this many rows of a key/value head, reading keys and values once is all that counts: they are read
  // where they lie (…_in_place), and the rows are not cut into tiles.
  static constexpr std::size_t kFewRows = 8;
  static constexpr std::size_t kMaxRowTile = 32;
  static constexpr std::size_t kCentreStep = 64;

  // `count` pointers to rows of `size` elements. Rows past row_tile are not packed, but where they can be read
  // a faster way is open. Writes up to a vector past the tile's end. `scale` is applied here or by score, of
  // which the other one has 1: bfloat16 has no room for any. Packing returns false where the format has not all
  // of the values, and the others then mean nothing.
  using PackQueriesFn = bool (*)(const void* const* rows, std::size_t count, std::size_t size, float scale,
                                 const float* centre, PackedWord* out);
  // The mean of keys.
  using CentreFn = void (*)(const void* in, std::ptrdiff_t stride, std::size_t keys, std::size_t size,
                            float* centre);
  // The panels have room for `capacity` words of each column; what lies behind those written stays as it is.
  // Values have no centre. Of the type int8 there is none: see packed_dtype.
  using PackFn = bool (*)(const void* in, std::ptrdiff_t stride, std::size_t keys, std::size_t size,
                          std::size_t capacity, const float* centre, float* scales, PackedWord* out);
  // scores = scale * queries · keys, of whole vectors of keys. Of integers they are products, as int32, which
  // scale_scores() makes scores; or weigh_products() takes them, in the place of both it and weigh().
  using ScoreFn = void (*)(const PackedWord* queries, std::size_t rows, const PackedWord* keys,
                           std::size_t count, std::size_t size, float scale, float* scores);
  // What belongs to products: the words behind those of the queries, and the scales of the keys.
  struct ProductScales {
    const PackedWord* rows;
    const float* keys;
  };
  using ScaleFn = void (*)(float* scores, std::size_t rows, std::size_t count, ProductScales scales);
  // One step of online softmax: raises the rows' maxima, writes the words of the weights e^(score - maximum),
  // adds them to the sums, and scales sums and accumulators of rows whose maximum has grown. Weights of scores
  // past `count` up to words(count) are 0. May write where it has read, if weight_stride is kScoreStride.
  using WeighFn = void (*)(float* scores, std::size_t rows, std::size_t count, float* maxima, WeightSum* sums,
                           float* accumulators, std::size_t accumulator_stride, std::size_t size,
                           PackedWord* weights);
  using WeighProductsFn = void (*)(float* products, std::size_t rows, std::size_t count, ProductScales scales,
                                   float* maxima, WeightSum* sums, float* accumulators,
                                   std::size_t accumulator_stride, std::size_t size, PackedWord* weights);
  // accumulators += weights · values. Reads and writes whole vectors of accumulators and up to row_tile rows.
  using AccumulateFn = void (*)(const PackedWord* weights, std::size_t rows, const PackedWord* values,
                                const float* value_scales, std::size_t count, std::size_t capacity,
                                std::size_t size, float* accumulators, std::size_t accumulator_stride);

  // Which scales the queries take.
  enum class QueryScale { kNone, kPowersOfTwo, kAny };

  // The kernels of a format belong together.
  struct Format {
    std::size_t row_tile;  // at most kMaxRowTile
    std::size_t weight_stride;
    PackedLayout layout;
    QueryScale query_scale;
    std::size_t row_words;
    CentreFn centre[kDTypes];  // null where keys are packed as they are
    PackQueriesFn pack_queries[kDTypes];
    PackFn pack_keys[kDTypes], pack_values[kDTypes];
    ScoreFn score;
    ScaleFn scale_scores;  // null where there are no products of integers
    WeighFn weigh[kMaxOrder];
    WeighProductsFn weigh_products[kMaxOrder];
    AccumulateFn accumulate;
    // Before and after a task, or null: the products have registers that have to be set up.
    void (*begin)();
    void (*end)();
  };
  Format formats[kAttentionFormats];
  std::size_t lanes;

  const Format& of(AttentionFormat format) const { return formats[static_cast<int>(format)]; }
  Format& of(AttentionFormat format) { return formats[static_cast<int>(format)]; }

  // scores = cap * tanh(scores / cap)
  void (*soft_cap[kMaxOrder])(float* scores, std::size_t rows, std::size_t count, float cap);
  // One row: scores += bias, whose elements are `stride` apart.
  void (*add_bias[kDTypes])(float* scores, const void* bias, std::ptrdiff_t stride, std::size_t count);
  // One row: scores = kept ? scores : fill, with contiguous mask bytes.
  void (*apply_mask)(float* scores, const unsigned char* mask, std::size_t count, float fill);
  // One row: scores *= factors, of whole vectors of scores.
  void (*multiply)(float* scores, const float* factors, std::size_t count);
  // out = accumulators / sum
  void (*finish[kDTypes])(const float* accumulators, std::size_t size, float sum, void* out);
  // What log(sum) lacks: the exponential of order 1 has a constant factor.
  float log_sum_correction[kMaxOrder];

  // For few rows, where packing would cost more than the products: score and accumulate from keys and values
  // where they lie. A step takes a few keys of all heads, so that memory is read in the order in which heads
  // and keys usually lie, which hardware fetches ahead. The rows of a head follow those of the head before, in
  // the queries (of `query_stride` floats, padded with 0 to whole vectors), scores and accumulators alike. What
  // is done in between is float32's.
  struct InPlace {
    std::size_t heads, count;            // key/value heads, and keys
    std::ptrdiff_t head_stride, stride;  // in elements
  };
  //
  // `out` = scale * the query, as float32, padded with 0 to whole vectors.
  void (*convert_query[kDTypes])(const void* in, std::size_t size, float scale, float* out);
  void (*score_in_place[kDTypes])(const float* queries, std::size_t query_stride, std::size_t rows,
                                  const void* keys, InPlace at, std::size_t size, float* scores);
  void (*accumulate_in_place[kDTypes])(const float* scores, std::size_t rows, const void* values, InPlace at,
                                       std::size_t size, float* accumulators, std::size_t accumulator_stride);
};

// What packing takes of keys and values of a type: codes and scales become float32 first.
inline constexpr DType packed_dtype(DType dtype) { return dtype == DType::kInt8 ? DType::kFloat32 : dtype; }

}  // namespace quake

#endif  // QUAKE_ATTENTION_KERNELS_H_
