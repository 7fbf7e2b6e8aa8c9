// Attention of few rows (decoding), which is cut along the keys: keys and values are read once, where they lie.

#ifndef QUAKE_ATTENTION_FEW_ROWS_H_
#define QUAKE_ATTENTION_FEW_ROWS_H_

#include <cstddef>

#include "attention/call.h"

namespace quake {

class AttentionOfFewRows {
 public:
  explicit AttentionOfFewRows(AttentionCall& call);

  std::size_t tasks() const { return p_.batch * plan_.splits; }
  // One split of the keys for all heads of one batch element, in chunks whose keys and values stay in cache.
  void run(std::size_t task) const;

 private:
  // Heads that are scored together, and their rows in all.
  static constexpr std::size_t kMostHeads = 32, kMostRows = 64;

  // Neighbouring key/value heads of a batch element, and their memory.
  struct Heads {
    std::size_t batch, split;
    std::size_t first, count;
    const float* queries;  // of the rows of `first`
    float* scores;
  };

  bool begin(std::size_t batch, std::size_t split, Heads& heads) const;
  void attend(Heads heads, std::size_t key, std::size_t keys) const;
  void attend_pieces(const Heads& heads, std::size_t key, std::size_t keys, const PieceBits* bits) const;
  void weigh(const Heads& heads, std::size_t h, std::size_t key, std::size_t keys, std::uint32_t mixed) const;

  AttentionCall& call_;
  const AttentionProblem& p_;
  const AttentionKernels& kernels_;
  const Plan& plan_;
  const std::size_t query_stride_;  // of a row's query, in floats
  const std::size_t heads_at_a_time_;
  const std::size_t chunk_;  // keys that are scored, then weighed: of the same memory, whatever their type
};

}  // namespace quake

#endif  // QUAKE_ATTENTION_FEW_ROWS_H_
