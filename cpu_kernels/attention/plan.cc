#include "attention/plan.h"

#include <algorithm>

namespace quake {
namespace {

using std::size_t;

constexpr size_t kKeyTile = AttentionKernels::kKeyTile;

// At least this many tasks are made where the shape allows it, so that many threads have work.
constexpr size_t kWantedTasks = 16;

}  // namespace

bool has_few_rows(const AttentionProblem& p) {
  return p.query_heads / p.kv_heads * p.query_length <= AttentionKernels::kFewRows;
}

Plan make_plan(const AttentionProblem& p, const AttentionKernels& kernels, size_t row_tile) {
  Plan plan = {};
  plan.heads = p.batch * p.kv_heads;
  plan.groups = p.query_heads / p.kv_heads;
  plan.rows = plan.groups * p.query_length;
  plan.padded_value_size = std::max(round_up(p.value_size, kernels.lanes), kernels.lanes);
  const size_t sizes = std::max<size_t>(p.head_size + p.value_size, 1);
  // Queries and accumulators of a block, and a packed tile of keys and values, share a cache of 1 MiB.
  const size_t most_rows = std::clamp<size_t>((std::size_t{96} << 10) / sizes, 96, 512);
  const size_t fewest_rows = std::min<size_t>(most_rows, 256);
  const size_t wanted_blocks = ceil_div(kWantedTasks, plan.heads);
  const size_t limit = std::clamp(ceil_div(plan.rows, wanted_blocks), fewest_rows, most_rows);
  plan.block_rows = round_up(ceil_div(plan.rows, ceil_div(plan.rows, limit)), row_tile);
  plan.blocks = ceil_div(plan.rows, plan.block_rows);
  plan.key_tile = std::clamp<size_t>((std::size_t{64} << 10) / sizes / kPiece * kPiece, 2 * kPiece, kKeyTile);

  plan.in_place = has_few_rows(p);
  size_t splits = 1;
  if (plan.in_place) {
    splits = std::min(ceil_div(2 * kWantedTasks, p.batch), ceil_div(p.key_length, kKeyTile));
  } else if (plan.rows <= 64) {
    splits = std::min(ceil_div(2 * kWantedTasks, plan.heads), ceil_div(p.key_length, 4 * kKeyTile));
  }
  plan.split_keys = round_up(ceil_div(p.key_length, splits), kPiece);
  plan.splits = ceil_div(p.key_length, plan.split_keys);
  return plan;
}

}  // namespace quake
