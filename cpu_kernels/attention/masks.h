// Which keys a query sees: mask arrays, segments, causal masks, windows and lengths.

#ifndef QUAKE_ATTENTION_MASKS_H_
#define QUAKE_ATTENTION_MASKS_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "attention/kernels.h"
#include "attention/plan.h"
#include "attention/problem.h"

namespace quake {

// A query, and the keys [begin, end) that the masks that are given by numbers keep.
struct Row {
  std::size_t query, head;
  std::size_t begin, end;
  bool valid;  // not past query_lengths
};

// One bit for every piece of a key tile. `mixed` is a subset of `active`.
struct PieceBits {
  std::uint32_t active = 0, mixed = 0;
};

// The bits of the first `count` pieces.
inline std::uint32_t first_pieces(std::size_t count) {
  return static_cast<std::uint32_t>((std::uint64_t{1} << count) - 1);
}

// Calls visit(first, last) for each run [first, last) of neighbouring bits.
template <class Visit>
void for_each_run(std::uint32_t bits, const Visit& visit) {
  for (std::size_t i = 0; bits >> i;) {
    if (!(bits >> i & 1)) {
      ++i;
      continue;
    }
    const std::size_t first = i;
    while (bits >> i & 1) ++i;
    visit(first, i);
  }
}

enum class Kept : unsigned char { kNone, kSome, kAll };

// A mask array, reduced once per call to one Kept for every `rows` queries times kPiece keys; computed once
// where the mask broadcasts over batch, heads or queries.
class MaskSummary {
 public:
  // Returns false if memory is refused.
  bool build(const AttentionProblem& problem, std::size_t rows, ParallelFor parallel);
  // The row of pieces of a query.
  const Kept* row(std::size_t batch, std::size_t head, std::size_t query) const;

 private:
  void summarize(std::size_t batch, std::size_t head, std::size_t group);

  const AttentionProblem* problem_ = nullptr;
  std::size_t rows_ = 1, batches_ = 1, heads_ = 1, queries_ = 1, groups_ = 1, pieces_ = 0;
  std::unique_ptr<Kept[]> kept_;
};

// The segments of the keys, reduced once per call to the range of every kPiece keys. Of texts that lie one
// behind the other nearly all ranges are one segment.
class SegmentSummary {
 public:
  // Returns false if memory is refused.
  bool build(const AttentionProblem& problem, ParallelFor parallel);
  // How many keys of a piece are of the segment.
  Kept judge(std::size_t batch, std::size_t piece, std::int32_t segment) const {
    const Range range = ranges_[batch * pieces_ + piece];
    if (segment < range.least || segment > range.largest) return Kept::kNone;
    return range.least == range.largest ? Kept::kAll : Kept::kSome;
  }

 private:
  struct Range {
    std::int32_t least, largest;
  };

  std::size_t pieces_ = 0;
  std::unique_ptr<Range[]> ranges_;
};

class Masks {
 public:
  Masks(const AttentionProblem& problem, const Plan& plan);

  // Before anything is judged. Returns false if memory is refused.
  bool build(std::size_t row_tile, ParallelFor parallel);

  // Whether something may mask a key.
  bool any() const { return any_; }
  // Describes the rows [first, first + count) of a key/value head.
  void describe_rows(std::size_t batch, std::size_t kv_head, std::size_t first, std::size_t count,
                     Row* rows) const;
  // Judges the pieces of the keys [key, key + count) for a tile of rows.
  PieceBits judge(std::size_t batch, const Row* rows, std::size_t row_count, std::size_t key,
                  std::size_t count) const;
  // One row of scores, those of the keys [key, key + count): what is masked becomes kMaskedLogit.
  void apply(const AttentionKernels& kernels, std::size_t batch, const Row& row, std::size_t key,
             std::size_t count, float* scores) const;
  // Fetches what apply() will read.
  void prefetch(std::size_t batch, const Row& row, std::size_t key, std::size_t count) const;

  // Whether what was skipped as masked counts after all: no kept logit is above a masked one. A row without
  // any kept key is the mean of all values, and one whose kept logits are -inf that of the masked ones.
  static bool counts_masked(const Row& row, float maximum) { return row.valid && !(maximum > kMaskedLogit); }

 private:
  Row describe_row(std::size_t batch, std::size_t head, std::size_t query) const;
  void add_summary(std::size_t batch, const Row* rows, std::size_t row_count, std::size_t piece,
                   PieceBits& bits) const;
  void add_segments(std::size_t batch, const Row* rows, std::size_t row_count, std::size_t piece,
                    PieceBits& bits) const;
  const unsigned char* mask_at(std::size_t batch, const Row& row, std::size_t key) const;
  std::int32_t segment_of(std::size_t batch, const Row& row) const {
    return p_.query_segments[batch * p_.query_length + row.query];
  }

  const AttentionProblem& p_;
  const std::size_t groups_;
  const bool any_;
  MaskSummary summary_;
  SegmentSummary segments_;
};

}  // namespace quake

#endif  // QUAKE_ATTENTION_MASKS_H_
