// How attention's work is cut.

#ifndef QUAKE_ATTENTION_PLAN_H_
#define QUAKE_ATTENTION_PLAN_H_

#include <cstddef>

#include "attention/kernels.h"
#include "attention/problem.h"

namespace quake {

// Masks are judged in pieces of this many keys; a multiple of every instruction set's panel.
inline constexpr std::size_t kPiece = 32;

// Of the shape alone.
//
// Rows. The query heads that share a key/value head share its packed keys, so their queries are the rows of
// one matrix: row r of a key/value head is query r % query_length of its query head r / query_length.
struct Plan {
  std::size_t heads;       // key/value heads of all batch elements
  std::size_t groups;      // query heads per key/value head
  std::size_t rows;        // of a key/value head
  std::size_t block_rows;  // of a task, a multiple of the row tile
  std::size_t blocks;
  std::size_t key_tile;    // a multiple of kPiece
  std::size_t splits;      // of the keys
  std::size_t split_keys;  // a multiple of kPiece
  bool in_place;           // few rows: one task has all heads, and packs nothing
  std::size_t padded_value_size;
};

// Whether a key/value head has so few rows that nothing is packed for them.
bool has_few_rows(const AttentionProblem& problem);

Plan make_plan(const AttentionProblem& problem, const AttentionKernels& kernels, std::size_t row_tile);

}  // namespace quake

#endif  // QUAKE_ATTENTION_PLAN_H_
