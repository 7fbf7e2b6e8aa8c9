#include "attention/blocks.h"

#include <algorithm>
#include <limits>

#include "core/memory.h"

namespace quake {
namespace {

using std::size_t;

constexpr size_t kScoreStride = AttentionKernels::kScoreStride;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The registers of the products, set up for as long as it lives.
class Registers {
 public:
  explicit Registers(const AttentionKernels::Format& format) : end_(format.end) {
    if (format.begin) format.begin();
  }
  ~Registers() {
    if (end_) end_();
  }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;

 private:
  void (*end_)();
};

// Of each group of `at_once` pieces, those before one of them too: runs begin where a group does.
std::uint32_t from_groups(std::uint32_t pieces, size_t at_once) {
  std::uint32_t all = 0;
  for (size_t i = 0; pieces >> i; i += at_once) {
    std::uint32_t group = pieces >> i & first_pieces(at_once);
    for (size_t k = 1; k < at_once; ++k) group |= group >> 1;
    all |= group << i;
  }
  return all;
}

}  // namespace

AttentionBlocks::AttentionBlocks(AttentionCall& call)
    : call_(call),
      p_(call.p),
      kernels_(call.kernels),
      plan_(call.plan),
      format_(call.format),
      layout_(format_.layout) {}

void AttentionBlocks::run(size_t task) const {
  if (call_.lacks_values) return;
  // Blocks descend: those at the end are the long ones of a causal mask. Heads innermost among the blocks of
  // equal rank, splits within.
  task = tasks() - 1 - task;
  const size_t split = task % plan_.splits, head = task / plan_.splits % plan_.heads;
  Block block;
  if (!begin(block, head, task / plan_.splits / plan_.heads * plan_.block_rows)) return;
  const Registers registers(format_);
  const size_t first = split * plan_.split_keys, last = std::min(p_.key_length, first + plan_.split_keys);
  attend(block, first, last, true);
  if (plan_.splits > 1) {
    keep(block, split);
  } else {
    repair(block);
    finish(block);
  }
}

void AttentionBlocks::compute_again(size_t head) const {
  const Registers registers(format_);
  for (size_t first = 0; first < plan_.rows; first += plan_.block_rows) {
    Block block;
    if (!begin(block, head, first)) return;
    std::fill_n(block.scratch.skipped, ceil_div(block.count, format_.row_tile), true);
    attend(block, 0, p_.key_length, false);
    finish(block);
  }
}

// ---- Memory and state ----

// Returns false if memory is refused.
bool AttentionBlocks::take_scratch(Scratch& scratch) const {
  const size_t rows = plan_.block_rows, tiles = rows / format_.row_tile;
  const auto carve = [&](Carver memory) {
    scratch.queries = memory.take<PackedWord>(tiles * query_tile_words());
    const auto take_packed = [&](size_t capacity, size_t columns) -> PackedMemory {
      return {memory.take<PackedWord>(PackedMatrix::needed_words(capacity, columns, layout_)),
              memory.take<float>(format_.row_words > 0 ? round_up(columns, layout_.panel) : 0)};
    };
    scratch.keys = take_packed(p_.head_size, plan_.key_tile);
    scratch.values = take_packed(plan_.key_tile, p_.value_size);
    scratch.centre = memory.take<float>(centre_size());
    scratch.scores = memory.take<float>(format_.row_tile * kScoreStride);
    scratch.weights = format_.weight_stride == kScoreStride
                          ? reinterpret_cast<PackedWord*>(scratch.scores)
                          : memory.take<PackedWord>(format_.row_tile * format_.weight_stride);
    scratch.maxima = memory.take<float>(rows);
    scratch.accumulators = memory.take<float>(rows * plan_.padded_value_size);
    scratch.sums = memory.take<WeightSum>(rows);
    scratch.rows = memory.take<Row>(rows);
    scratch.bits = memory.take<PieceBits>(tiles);
    scratch.skipped = memory.take<bool>(tiles);
    scratch.packed = memory.take<bool>(tiles);
    const size_t size = p_.kv_dtype == DType::kInt8 ? std::max(p_.head_size, p_.value_size) : 0;
    scratch.floats = memory.take<float>(plan_.key_tile * size);
    return memory.used();
  };
  char* const memory = workspace(carve(Carver(nullptr)));
  if (!memory) {
    call_.failed = true;
    return false;
  }
  carve(Carver(memory));
  // Rows of a register tile that do not exist are multiplied too: without effect, but not with denormals.
  std::fill_n(scratch.scores, format_.row_tile * kScoreStride, 0.0f);
  std::fill_n(scratch.weights, format_.row_tile * format_.weight_stride, PackedWord{});
  return true;
}

float* AttentionBlocks::accumulator(const Scratch& scratch, size_t row) const {
  return scratch.accumulators + row * plan_.padded_value_size;
}

// Packing writes up to a vector past a tile's end.
size_t AttentionBlocks::query_tile_words() const {
  return round_up(format_.row_tile * (layout_.words(p_.head_size) + format_.row_words) + kernels_.lanes,
                  kCacheLine / sizeof(PackedWord));
}

size_t AttentionBlocks::centre_size() const {
  return format_.row_words > 0 ? round_up(p_.head_size, AttentionKernels::kCentreStep) : 0;
}

PackedWord* AttentionBlocks::packed_queries(const Scratch& scratch, size_t row) const {
  return scratch.queries + row / format_.row_tile * query_tile_words();
}

// The block of a key/value head whose first row is `first`, with an empty state; false if memory is refused.
bool AttentionBlocks::begin(Block& block, size_t head, size_t first) const {
  if (!take_scratch(block.scratch)) return false;
  block.head = head;
  block.batch = head / p_.kv_heads;
  block.kv_head = head % p_.kv_heads;
  block.first = first;
  block.has_centre = false;
  block.count = std::min(plan_.block_rows, plan_.rows - first);
  const size_t tiles = ceil_div(block.count, format_.row_tile);
  call_.masks.describe_rows(block.batch, block.kv_head, first, block.count, block.scratch.rows);
  reset(block.scratch, 0, tiles * format_.row_tile);
  std::fill_n(block.scratch.skipped, tiles, false);
  std::fill_n(block.scratch.packed, tiles, false);
  return true;
}

void AttentionBlocks::reset(const Scratch& scratch, size_t first, size_t count) const {
  std::fill_n(scratch.maxima + first, count, -kInfinity);
  std::fill_n(scratch.sums + first, count, WeightSum{});
  std::fill_n(accumulator(scratch, first), count * plan_.padded_value_size, 0.0f);
}

// ---- Tiles ----

// Attends to the keys [begin, end). With `skip`, pieces without any kept key are left out, and that is
// noted; without, only the row tiles that are noted are worked on.
void AttentionBlocks::attend(Block& block, size_t begin, size_t end, bool skip) const {
  const Scratch& scratch = block.scratch;
  const size_t row_tile = format_.row_tile;
  for (size_t key = begin; key < end; key += plan_.key_tile) {
    const size_t keys = std::min(plan_.key_tile, end - key);
    if (judge_tiles(block, key, keys, skip) == 0) continue;
    PackedTile tile;
    if (!pack(block, key, keys, tile)) {
      call_.lacks_values = true;
      return;
    }
    const Next next = next_tile(block.head, key, end);
    for (size_t r = 0; r < block.count; r += row_tile) {
      fetch_share(next, r, std::min(r + row_tile, block.count), block.count);
      if (scratch.bits[r / row_tile].active == 0) continue;
      pack_queries(block, r);
      attend_tile(block, tile, r, key, keys);
    }
  }
}

// Decides for each row tile which pieces of the keys [key, key + keys) are computed; returns those of any.
std::uint32_t AttentionBlocks::judge_tiles(Block& block, size_t key, size_t keys, bool skip) const {
  const size_t row_tile = format_.row_tile;
  const std::uint32_t all = first_pieces(ceil_div(keys, kPiece));
  const size_t at_once = ceil_div(layout_.elements, kPiece);
  std::uint32_t any = 0;
  for (size_t r = 0; r < block.count; r += row_tile) {
    PieceBits& bits = block.scratch.bits[r / row_tile];
    bool& skipped = block.scratch.skipped[r / row_tile];
    if (skip) {
      bits = call_.masks.judge(block.batch, &block.scratch.rows[r], std::min(row_tile, block.count - r), key,
                               keys);
      const std::uint32_t active = from_groups(bits.active, at_once);
      bits = {active, bits.mixed | (active & ~bits.active)};
      skipped = skipped || bits.active != all;
    } else {
      bits = skipped ? PieceBits{all, all} : PieceBits{};
    }
    any |= bits.active;
  }
  return any;
}

// A row tile and a key tile: run by run of neighbouring active pieces.
void AttentionBlocks::attend_tile(Block& block, const PackedTile& tile, size_t row, size_t key,
                                  size_t keys) const {
  const Scratch& scratch = block.scratch;
  const size_t count = std::min(format_.row_tile, block.count - row);
  const PieceBits bits = scratch.bits[row / format_.row_tile];
  const Row* const rows = &scratch.rows[row];
  float* const accumulators = accumulator(scratch, row);
  for_each_run(bits.active, [&](size_t first_piece, size_t last_piece) {
    const size_t first = first_piece * kPiece, n = std::min(last_piece * kPiece, keys) - first;
    const std::uint32_t mixed = bits.mixed >> first_piece & first_pieces(last_piece - first_piece);
    call_.prefetch_adjustments(block.batch, rows, count, key + first, n, mixed != 0);
    const PackedWord* const queries = packed_queries(scratch, row);
    const AttentionKernels::ProductScales scales = {queries + format_.row_tile * layout_.words(p_.head_size),
                                                    tile.keys.scales + first};
    format_.score(queries, count, tile.keys.at_column(first), n, p_.head_size, call_.score_scale,
                  scratch.scores);
    if (format_.scale_scores && !call_.adjusts(mixed)) {
      format_.weigh_products[call_.order](scratch.scores, count, n, scales, scratch.maxima + row,
                                          scratch.sums + row, accumulators, plan_.padded_value_size,
                                          p_.value_size, scratch.weights);
    } else {
      if (format_.scale_scores) format_.scale_scores(scratch.scores, count, n, scales);
      call_.adjust(block.batch, rows, count, key + first, n, mixed, scratch.scores);
      format_.weigh[call_.order](scratch.scores, count, n, scratch.maxima + row, scratch.sums + row,
                                 accumulators, plan_.padded_value_size, p_.value_size, scratch.weights);
    }
    format_.accumulate(scratch.weights, count, tile.values.at_depth(first), tile.values.scales, n,
                       tile.values.capacity, p_.value_size, accumulators, plan_.padded_value_size);
  });
}

// Packs the keys and values [key, key + keys). Their centre is that of the block's first keys: any will do,
// since scores have its product with the query again.
bool AttentionBlocks::pack(Block& block, size_t key, size_t keys, PackedTile& tile) const {
  const Scratch& scratch = block.scratch;
  const RowsToPack k = rows_to_pack(block, p_.key, p_.key_scales, p_.head_size, key, keys);
  const auto centre = format_.centre[static_cast<int>(k.dtype)];
  if (centre && !block.has_centre) {
    std::fill_n(scratch.centre, centre_size(), 0.0f);
    centre(k.data, k.stride, keys, p_.head_size, scratch.centre);
    block.has_centre = true;
  }
  if (!quake::pack_keys(format_, k, keys, p_.head_size, scratch.centre, scratch.keys, tile.keys)) return false;
  const RowsToPack v = rows_to_pack(block, p_.value, p_.value_scales, p_.value_size, key, keys);
  return quake::pack_values(format_, v, keys, p_.value_size, plan_.key_tile, scratch.values, tile.values);
}

// The keys or values [key, key + keys), of a type that packing takes.
RowsToPack AttentionBlocks::rows_to_pack(const Block& block, const AttentionProblem::Operand& operand,
                                         const float* scales, size_t size, size_t key, size_t keys) const {
  const char* const data = call_.key_row(operand, block.batch, block.kv_head, key);
  if (p_.kv_dtype != DType::kInt8) return {data, operand.time, p_.kv_dtype};
  const float* const scale = call_.scales_at(scales, block.batch, block.kv_head, key);
  for (size_t i = 0; i < keys; ++i) {
    const auto* const codes = reinterpret_cast<const std::int8_t*>(data) + offset(i, operand.time);
    for (size_t j = 0; j < size; ++j) block.scratch.floats[i * size + j] = codes[j] * scale[i];
  }
  return {block.scratch.floats, static_cast<std::ptrdiff_t>(size), packed_dtype(p_.kv_dtype)};
}

// Packs the queries of a row tile where they are first used.
void AttentionBlocks::pack_queries(Block& block, size_t row) const {
  const Scratch& scratch = block.scratch;
  bool& packed = scratch.packed[row / format_.row_tile];
  if (packed) return;
  packed = true;
  // The next tile's queries are fetched while this one is worked on.
  for (size_t i = row + format_.row_tile; i < std::min(block.count, row + 2 * format_.row_tile); ++i) {
    fetch(call_.query_row(block.batch, scratch.rows[i]), p_.head_size * element_size(p_.dtype));
  }
  const void* rows[AttentionKernels::kMaxRowTile];
  const size_t n = std::min(AttentionKernels::kMaxRowTile, block.count - row);
  for (size_t i = 0; i < n; ++i) rows[i] = call_.query_row(block.batch, scratch.rows[row + i]);
  if (!format_.pack_queries[call_.dtype](rows, n, p_.head_size, call_.query_scale, scratch.centre,
                                         packed_queries(scratch, row))) {
    call_.lacks_values = true;
  }
}

// The following tile's keys, or the first ones of the head that the same thread most likely has next.
AttentionBlocks::Next AttentionBlocks::next_tile(size_t head, size_t key, size_t end) const {
  if (key + plan_.key_tile < end) {
    key += plan_.key_tile;
  } else {
    if (head == 0 || plan_.splits > 1) return {};
    --head;
    key = 0;
    end = p_.key_length;
  }
  return {head / p_.kv_heads, head % p_.kv_heads, key, std::min(plan_.key_tile, end - key)};
}

// Fetches the part of them that falls to the rows [row, last) of `count`.
void AttentionBlocks::fetch_share(const Next& next, size_t row, size_t last, size_t count) const {
  const size_t size = element_size(p_.kv_dtype);
  for (size_t i = next.keys * row / count; i < next.keys * last / count; ++i) {
    fetch(call_.key_row(p_.key, next.batch, next.kv_head, next.key + i), p_.head_size * size);
    fetch(call_.key_row(p_.value, next.batch, next.kv_head, next.key + i), p_.value_size * size);
  }
}

// ---- The end of a block ----

// Computes again, with every key, the row tiles in which what was skipped counts.
void AttentionBlocks::repair(Block& block) const {
  const Scratch& scratch = block.scratch;
  const size_t row_tile = format_.row_tile;
  bool any = false;
  for (size_t r = 0; r < block.count; r += row_tile) {
    bool& wanted = scratch.skipped[r / row_tile];
    bool counts = false;
    for (size_t i = r; i < std::min(block.count, r + row_tile); ++i) {
      counts = counts || Masks::counts_masked(scratch.rows[i], scratch.maxima[i]);
    }
    wanted = wanted && counts;
    if (wanted) reset(scratch, r, row_tile);
    any = any || wanted;
  }
  if (any) attend(block, 0, p_.key_length, false);
}

void AttentionBlocks::finish(const Block& block) const {
  const Scratch& scratch = block.scratch;
  for (size_t r = 0; r < block.count; ++r) {
    call_.finish_row(block.batch, scratch.rows[r], scratch.maxima[r], scratch.sums[r], accumulator(scratch, r));
  }
}

// Keeps the state for the joining of splits.
void AttentionBlocks::keep(const Block& block, size_t split) const {
  const Scratch& scratch = block.scratch;
  for (size_t r = 0; r < block.count; ++r) {
    const Partial part = call_.partials.at(block.head, block.first + r, split);
    part.header() = {scratch.maxima[r], scratch.sums[r]};
    std::copy_n(accumulator(scratch, r), plan_.padded_value_size, part.accumulators());
  }
}

}  // namespace quake
