// Attention of many rows, with online softmax (Milakov & Gimelshein, arXiv 1805.02867; Dao et al., arXiv
// 2205.14135) over tiles of keys.
//
// A task is a block of rows times a range of keys. It packs the keys and values of a tile itself and uses them
// for all rows of the block: with hundreds of rows that costs a percent or two, and spares both a buffer for
// whole heads and a barrier.

#ifndef QUAKE_ATTENTION_BLOCKS_H_
#define QUAKE_ATTENTION_BLOCKS_H_

#include <cstddef>

#include "attention/call.h"
#include "attention/packed.h"
#include "core/packed.h"

namespace quake {

class AttentionBlocks {
 public:
  explicit AttentionBlocks(AttentionCall& call);

  std::size_t tasks() const { return plan_.heads * plan_.blocks * plan_.splits; }
  void run(std::size_t task) const;
  // All rows of a key/value head, with every key.
  void compute_again(std::size_t head) const;

 private:
  // The memory of a task, carved out of this thread's workspace.
  struct Scratch {
    PackedWord *queries, *weights;
    PackedMemory keys, values;
    float *scores, *maxima, *accumulators;  // the last two: the state of online softmax
    float* centre;                          // of the keys, where the format has one
    WeightSum* sums;
    Row* rows;
    PieceBits* bits;  // of every row tile, for the current key tile
    bool* skipped;    // of every row tile: a piece was left out
    bool* packed;     // of every row tile: its queries are packed
    float* floats;    // the keys or values of a tile of int8
  };
  // The rows [first, first + count) of a key/value head, and their state.
  struct Block {
    std::size_t head, batch, kv_head, first, count;
    bool has_centre;
    Scratch scratch;
  };
  // The keys and values that are packed next.
  struct Next {
    std::size_t batch = 0, kv_head = 0, key = 0, keys = 0;
  };
  struct PackedTile {
    PackedMatrix keys, values;
  };

  bool take_scratch(Scratch& scratch) const;
  float* accumulator(const Scratch& scratch, std::size_t row) const;
  PackedWord* packed_queries(const Scratch& scratch, std::size_t row) const;
  std::size_t query_tile_words() const;
  std::size_t centre_size() const;
  bool begin(Block& block, std::size_t head, std::size_t first) const;
  void reset(const Scratch& scratch, std::size_t first, std::size_t count) const;
  void attend(Block& block, std::size_t begin, std::size_t end, bool skip) const;
  std::uint32_t judge_tiles(Block& block, std::size_t key, std::size_t keys, bool skip) const;
  void attend_tile(Block& block, const PackedTile& tile, std::size_t row, std::size_t key,
                   std::size_t keys) const;
  bool pack(Block& block, std::size_t key, std::size_t keys, PackedTile& tile) const;
  RowsToPack rows_to_pack(const Block& block, const AttentionProblem::Operand& operand, const float* scales,
                          std::size_t size, std::size_t key, std::size_t keys) const;
  void pack_queries(Block& block, std::size_t row) const;
  Next next_tile(std::size_t head, std::size_t key, std::size_t end) const;
  void fetch_share(const Next& next, std::size_t row, std::size_t last, std::size_t count) const;
  void repair(Block& block) const;
  void finish(const Block& block) const;
  void keep(const Block& block, std::size_t split) const;

  AttentionCall& call_;
  const AttentionProblem& p_;
  const AttentionKernels& kernels_;
  const Plan& plan_;
  const AttentionKernels::Format& format_;
  const PackedLayout& layout_;
};

}  // namespace quake

#endif  // QUAKE_ATTENTION_BLOCKS_H_
