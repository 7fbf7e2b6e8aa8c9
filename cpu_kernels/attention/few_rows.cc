#include "attention/few_rows.h"

#include <algorithm>
#include <limits>

#include "core/memory.h"

namespace quake {
namespace {

using std::size_t;

constexpr size_t kScoreStride = AttentionKernels::kScoreStride;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

AttentionOfFewRows::AttentionOfFewRows(AttentionCall& call)
    : call_(call),
      p_(call.p),
      kernels_(call.kernels),
      plan_(call.plan),
      query_stride_(round_up(std::max<size_t>(p_.head_size, 1), kernels_.lanes)),
      heads_at_a_time_(std::min({p_.kv_heads, kMostRows / plan_.rows, kMostHeads})),
      chunk_(kPiece * (2 * sizeof(float) / element_size(p_.kv_dtype))) {}

void AttentionOfFewRows::run(size_t task) const {
  const size_t split = task % plan_.splits;
  Heads all;
  if (!begin(task / plan_.splits, split, all)) return;
  const size_t first = split * plan_.split_keys, last = std::min(p_.key_length, first + plan_.split_keys);
  for (size_t key = first; key < last; key += chunk_) {
    for (size_t kv_head = 0; kv_head < p_.kv_heads; kv_head += heads_at_a_time_) {
      Heads heads = all;
      heads.first = kv_head;
      heads.count = std::min(heads_at_a_time_, p_.kv_heads - kv_head);
      heads.queries += kv_head * plan_.rows * query_stride_;
      attend(heads, key, std::min(chunk_, last - key));
    }
  }
}

// Converts the queries of all heads, and empties their partials; false if memory is refused.
bool AttentionOfFewRows::begin(size_t batch, size_t split, Heads& heads) const {
  const size_t query_count = p_.kv_heads * plan_.rows * query_stride_;
  const size_t score_count = heads_at_a_time_ * plan_.rows * kScoreStride;
  float* const queries = reinterpret_cast<float*>(workspace((query_count + score_count) * sizeof(float)));
  if (!queries) {
    call_.failed = true;
    return false;
  }
  heads = {batch, split, 0, p_.kv_heads, queries, queries + query_count};
  std::fill_n(heads.scores, score_count, 0.0f);
  for (size_t kv_head = 0; kv_head < p_.kv_heads; ++kv_head) {
    Row rows[AttentionKernels::kFewRows];
    call_.masks.describe_rows(batch, kv_head, 0, plan_.rows, rows);
    for (size_t r = 0; r < plan_.rows; ++r) {
      float* const query = queries + (kv_head * plan_.rows + r) * query_stride_;
      std::fill_n(query, query_stride_, 0.0f);  // a head without elements has a vector too
      kernels_.convert_query[call_.dtype](call_.query_row(batch, rows[r]), p_.head_size, p_.scale, query);
      const Partial part = call_.partials.at(batch * p_.kv_heads + kv_head, r, split);
      part.header() = {-kInfinity, WeightSum{}};
      std::fill_n(part.accumulators(), plan_.padded_value_size, 0.0f);
    }
  }
  return true;
}

// The keys [key, key + keys), at most a chunk. Heads that have the same pieces to compute go together.
void AttentionOfFewRows::attend(Heads heads, size_t key, size_t keys) const {
  Row rows[AttentionKernels::kFewRows];
  PieceBits bits[kMostHeads];
  for (size_t h = 0; h < heads.count; ++h) {
    if (call_.masks.any()) call_.masks.describe_rows(heads.batch, heads.first + h, 0, plan_.rows, rows);
    bits[h] = call_.masks.judge(heads.batch, rows, plan_.rows, key, keys);
  }
  for (size_t first = 0, last = 0; first < heads.count; first = last) {
    while (last < heads.count && bits[last].active == bits[first].active) ++last;
    if (bits[first].active == 0) continue;
    Heads some = heads;
    some.first += first;
    some.count = last - first;
    some.queries += first * plan_.rows * query_stride_;
    attend_pieces(some, key, keys, bits + first);
  }
}

// From the first to the last active piece; what is masked in between is replaced like the mixed pieces.
void AttentionOfFewRows::attend_pieces(const Heads& heads, size_t key, size_t keys,
                                       const PieceBits* bits) const {
  const std::uint32_t active = bits->active;
  size_t first = 0, last = 0;
  while (!(active >> first & 1)) ++first;
  for (size_t i = first; active >> i; ++i) last = i + 1;
  const size_t begin = key + first * kPiece, n = std::min(key + keys, key + last * kPiece) - begin;
  kernels_.score_in_place[call_.kv_dtype](
      heads.queries, query_stride_, plan_.rows, call_.key_row(p_.key, heads.batch, heads.first, begin),
      {heads.count, n, p_.key.head, p_.key.time}, p_.head_size, heads.scores);
  for (size_t h = 0; h < heads.count; ++h) {
    weigh(heads, h, begin, n, (bits[h].mixed >> first | ~(active >> first)) & first_pieces(last - first));
  }
  const Partial part = call_.partials.at(heads.batch * p_.kv_heads + heads.first, 0, heads.split);
  kernels_.accumulate_in_place[call_.kv_dtype](heads.scores, plan_.rows,
                                               call_.key_row(p_.value, heads.batch, heads.first, begin),
                                               {heads.count, n, p_.value.head, p_.value.time}, p_.value_size,
                                               part.accumulators(), call_.partials.row_stride());
}

// The scores of the head `h` of them, which become weights.
void AttentionOfFewRows::weigh(const Heads& heads, size_t h, size_t key, size_t keys,
                               std::uint32_t mixed) const {
  const size_t kv_head = heads.first + h, count = plan_.rows;
  Row rows[AttentionKernels::kFewRows];
  float maxima[AttentionKernels::kFewRows];
  WeightSum sums[AttentionKernels::kFewRows];
  float* const scores = heads.scores + h * count * kScoreStride;
  const auto part = [&](size_t r) {
    return call_.partials.at(heads.batch * p_.kv_heads + kv_head, r, heads.split);
  };
  call_.masks.describe_rows(heads.batch, kv_head, 0, count, rows);
  const auto multiply = [&](const float* scales) {
    if (!scales) return;
    for (size_t r = 0; r < count; ++r) kernels_.multiply(scores + r * kScoreStride, scales, keys);
  };
  multiply(call_.scales_at(p_.key_scales, heads.batch, kv_head, key));
  call_.adjust(heads.batch, rows, count, key, keys, mixed, scores);
  for (size_t r = 0; r < count; ++r) {
    maxima[r] = part(r).header().maximum;
    sums[r] = part(r).header().sum;
  }
  // Weights that are not packed are float32's.
  kernels_.of(AttentionFormat::kFloat32)
      .weigh[call_.order](scores, count, keys, maxima, sums, part(0).accumulators(),
                          call_.partials.row_stride(), p_.value_size, reinterpret_cast<PackedWord*>(scores));
  for (size_t r = 0; r < count; ++r) part(r).header() = {maxima[r], sums[r]};
  multiply(call_.scales_at(p_.value_scales, heads.batch, kv_head, key));
}

}  // namespace quake
