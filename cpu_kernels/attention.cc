// The driver of fused attention: cuts the work into tasks, decides which tiles a mask leaves anything of, and
// puts the tile kernels of an instruction set (generic/attention.h) together.
//
// Rows. The query heads that share a key/value head share its packed keys, so their queries are the rows of
// one matrix: row r of a key/value head is query r % query_length of its query head r / query_length.
//
// A task is a block of rows times a range of keys, with online softmax (Milakov & Gimelshein, arXiv
// 1805.02867; Dao et al., arXiv 2205.14135) over tiles of keys. It packs the keys and values of a tile itself
// and uses them for all rows of the block: with hundreds of rows that costs a percent or two, and spares both
// a buffer for whole heads and a barrier. Few rows (decoding) are cut along the keys instead; the parts are
// combined at the end.

#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

namespace quake {
namespace {

using std::size_t;

constexpr size_t kKeyTile = AttentionKernels::kKeyTile;
constexpr size_t kScoreStride = AttentionKernels::kScoreStride;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kFloat = static_cast<int>(DType::kFloat32);

// Masks are judged in pieces of this many keys; a multiple of every instruction set's panel.
constexpr size_t kPiece = 32;
constexpr size_t kPiecesPerTile = kKeyTile / kPiece;
// Upper bound of AttentionKernels::row_tile.
constexpr size_t kMaxRowTile = 16;

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
constexpr size_t round_up(size_t a, size_t b) { return ceil_div(a, b) * b; }

std::ptrdiff_t offset(size_t index, std::ptrdiff_t stride) {
  return static_cast<std::ptrdiff_t>(index) * stride;
}

size_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const char* advance(const void* data, std::ptrdiff_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * static_cast<std::ptrdiff_t>(element_size(dtype));
}

constexpr size_t kLine = 64;

// The hardware does not expect short pieces of rows that are far apart.
void fetch(const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(from) + i);
}

struct FreeBytes {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t{kLine}); }
};
using Bytes = std::unique_ptr<char[], FreeBytes>;

// Bytes aligned to a cache line, or null if memory is refused.
Bytes allocate(size_t count) {
  return Bytes(static_cast<char*>(::operator new[](count, std::align_val_t{kLine}, std::nothrow)));
}

// This thread's work memory, or null if it is refused. A thread keeps it from call to call, since fresh memory
// would cost a tenth of the time of a call; it is one or two MiB, whatever the length of the sequences.
char* workspace(size_t count) {
  thread_local Bytes memory;
  thread_local size_t capacity = 0;
  if (count > capacity) {
    memory.reset();
    capacity = 0;
    memory = allocate(count);
    if (memory) capacity = count;
  }
  return memory.get();
}

// ---- Which pieces of the logits a mask keeps ----

enum class Kept : unsigned char { kNone, kSome, kAll };

// A mask array, reduced once per call to one Kept for every `rows` queries times kPiece keys; computed once
// where the mask broadcasts over batch, heads or queries.
class MaskSummary {
 public:
  // Returns false if memory is refused.
  bool build(const AttentionProblem& p, size_t rows, const ParallelFor& parallel) {
    problem_ = &p;
    rows_ = rows;
    batches_ = p.mask_strides.batch == 0 ? 1 : p.batch;
    heads_ = p.mask_strides.head == 0 ? 1 : p.query_heads;
    queries_ = p.mask_strides.query == 0 ? 1 : p.query_length;
    pieces_ = ceil_div(p.key_length, kPiece);
    groups_ = ceil_div(queries_, rows);
    const size_t slices = batches_ * heads_;
    kept_.reset(new (std::nothrow) Kept[slices * groups_ * pieces_]);
    if (!kept_) return false;
    constexpr size_t kGroupsPerTask = 32;
    const size_t parts = ceil_div(groups_, kGroupsPerTask);
    parallel(slices * parts, [&](size_t task) {
      const size_t slice = task / parts, begin = task % parts * kGroupsPerTask;
      for (size_t group = begin; group < std::min(groups_, begin + kGroupsPerTask); ++group) {
        summarize(slice / heads_, slice % heads_, group);
      }
    });
    return true;
  }

  // The row of pieces of a query.
  const Kept* row(size_t batch, size_t head, size_t query) const {
    const size_t slice = (batches_ == 1 ? 0 : batch) * heads_ + (heads_ == 1 ? 0 : head);
    return kept_.get() + (slice * groups_ + (queries_ == 1 ? 0 : query / rows_)) * pieces_;
  }

 private:
  void summarize(size_t batch, size_t head, size_t group) {
    const AttentionProblem& p = *problem_;
    Kept* kept = kept_.get() + ((batch * heads_ + head) * groups_ + group) * pieces_;
    const size_t first = group * rows_, last = std::min(queries_, first + rows_);
    for (size_t query = first; query < last; ++query) {
      const unsigned char* bytes = p.mask + offset(batch, p.mask_strides.batch) +
                                   offset(head, p.mask_strides.head) + offset(query, p.mask_strides.query);
      for (size_t piece = 0; piece < pieces_; ++piece) {
        if (query != first && kept[piece] == Kept::kSome) continue;
        const size_t key = piece * kPiece, count = std::min(kPiece, p.key_length - key);
        const Kept now = judge(bytes + offset(key, p.mask_strides.key), p.mask_strides.key, count);
        kept[piece] = query == first || kept[piece] == now ? now : Kept::kSome;
      }
    }
  }

  static Kept judge(const unsigned char* bytes, std::ptrdiff_t stride, size_t count) {
    if (stride == 0) return *bytes ? Kept::kAll : Kept::kNone;
    if (stride == 1 && count == kPiece) return judge_words(bytes);
    size_t kept = 0;
    for (size_t i = 0; i < count; ++i) kept += bytes[offset(i, stride)] != 0;
    return kept == 0 ? Kept::kNone : kept == count ? Kept::kAll : Kept::kSome;
  }

  static Kept judge_words(const unsigned char* bytes) {
    constexpr std::uint64_t kOnes = 0x0101010101010101, kTops = 0x8080808080808080;
    std::uint64_t any = 0, zero_byte = 0;
    for (size_t i = 0; i < kPiece; i += 8) {
      std::uint64_t word;
      std::memcpy(&word, bytes + i, 8);
      any |= word;
      zero_byte |= (word - kOnes) & ~word & kTops;  // not 0 if and only if a byte of the word is 0
    }
    return any == 0 ? Kept::kNone : zero_byte == 0 ? Kept::kAll : Kept::kSome;
  }

  const AttentionProblem* problem_ = nullptr;
  size_t rows_ = 1, batches_ = 1, heads_ = 1, queries_ = 1, groups_ = 1, pieces_ = 0;
  std::unique_ptr<Kept[]> kept_;
};

// One bit for every piece of a key tile. `mixed` is a subset of `active`.
struct PieceBits {
  std::uint32_t active = 0, mixed = 0;
};

// A row of a task: its query, and the keys [begin, end) that the masks that are given by numbers keep.
struct Row {
  size_t query, head;
  size_t begin, end;
  bool valid;  // not past query_lengths
};

// ---- The plan ----

// Of the shape alone.
struct Plan {
  size_t groups;      // query heads per key/value head
  size_t rows;        // of a key/value head
  size_t block_rows;  // of a task, a multiple of the row tile
  size_t blocks;
  size_t key_tile;    // a multiple of kPiece
  size_t splits;      // of the keys
  size_t split_keys;  // a multiple of kPiece
  bool in_place;      // few rows: one task has all heads, and packs nothing
  size_t depth;       // words of a packed query or key
  size_t padded_value_size;
};

// At least this many tasks are made where the shape allows it, so that many threads have work.
constexpr size_t kWantedTasks = 16;

Plan make_plan(const AttentionProblem& p, const AttentionKernels& kernels) {
  Plan plan = {};
  plan.groups = p.query_heads / p.kv_heads;
  plan.rows = plan.groups * p.query_length;
  plan.depth = ceil_div(p.head_size, kernels.per_word[static_cast<int>(p.dtype)]);
  plan.padded_value_size = std::max(round_up(p.value_size, kernels.lanes), kernels.lanes);
  const size_t heads = p.batch * p.kv_heads, sizes = std::max<size_t>(p.head_size + p.value_size, 1);
  // Queries and accumulators of a block, and a packed tile of keys and values, share a cache of 1 MiB.
  const size_t most_rows = std::clamp<size_t>((std::size_t{96} << 10) / sizes, 96, 512);
  const size_t fewest_rows = std::min<size_t>(most_rows, 256);
  const size_t wanted_blocks = ceil_div(kWantedTasks, heads);
  const size_t limit = std::clamp(ceil_div(plan.rows, wanted_blocks), fewest_rows, most_rows);
  plan.block_rows = round_up(ceil_div(plan.rows, ceil_div(plan.rows, limit)), kernels.row_tile);
  plan.blocks = ceil_div(plan.rows, plan.block_rows);
  plan.key_tile = std::clamp<size_t>((std::size_t{64} << 10) / sizes / kPiece * kPiece, 2 * kPiece, kKeyTile);

  plan.in_place = plan.rows <= AttentionKernels::kFewRows;
  size_t splits = 1;
  if (plan.in_place) {
    splits = std::min(ceil_div(2 * kWantedTasks, p.batch), ceil_div(p.key_length, kKeyTile));
  } else if (plan.rows <= 64) {
    splits = std::min(ceil_div(2 * kWantedTasks, heads), ceil_div(p.key_length, 4 * kKeyTile));
  }
  plan.split_keys = round_up(ceil_div(p.key_length, splits), kPiece);
  plan.splits = ceil_div(p.key_length, plan.split_keys);
  return plan;
}

// ---- Running ----

class Attention {
 public:
  Attention(const AttentionProblem& problem, const KernelTable& table, int order_index)
      : p_(problem),
        kernels_(table.attention),
        order_(order_index),
        plan_(make_plan(problem, table.attention)),
        dtype_(static_cast<int>(problem.dtype)),
        masked_(p_.mask || p_.is_causal || p_.window_left >= 0 || p_.window_right >= 0 || p_.query_lengths ||
                p_.key_lengths) {}

  const char* run(const ParallelFor& parallel) {
    constexpr const char* kRefused = "not enough memory";
    if (p_.mask && !summary_.build(p_, kernels_.row_tile, parallel)) return kRefused;
    const size_t heads = p_.batch * p_.kv_heads;
    if (plan_.in_place || plan_.splits > 1) {
      partials_ = allocate(heads * plan_.rows * plan_.splits * partial_stride() * sizeof(float));
      if (!partials_) return kRefused;
    }
    if (plan_.in_place) {
      parallel(p_.batch * plan_.splits, [&](size_t task) { run_in_place(task); });
    } else {
      const size_t tasks = heads * plan_.blocks * plan_.splits;
      // Blocks descend: those at the end are the long ones of a causal mask.
      parallel(tasks, [&](size_t task) { run_block(tasks - 1 - task); });
    }
    if (partials_ && !failed_) {
      parallel(heads, [&](size_t head) { combine(head); });
    }
    return failed_ ? kRefused : nullptr;
  }

 private:
  // The state of online softmax for one row of a task.
  struct State {
    float *maxima, *accumulators;
    WeightSum* sums;
  };

  // The memory of a task that packs, carved out of this thread's workspace.
  struct Scratch {
    float *queries, *keys, *values, *scores;
    State state;
    Row* rows;
    PieceBits* bits;  // of every row tile, for the current key tile
    bool* skipped;    // of every row tile: a piece was left out
    bool* packed;     // of every row tile: its queries are packed
  };

  // ---- Memory ----

  // Returns false if memory is refused.
  bool take_scratch(Scratch& scratch) {
    const size_t rows = plan_.block_rows, tiles = rows / kernels_.row_tile;
    float** const parts[] = {&scratch.queries, &scratch.keys,         &scratch.values,
                             &scratch.scores,  &scratch.state.maxima, &scratch.state.accumulators};
    const size_t sizes[] = {tiles * query_tile_stride(),
                            plan_.key_tile * plan_.depth,
                            plan_.key_tile / per_word() * round_up(p_.value_size, kernels_.panel),
                            kernels_.row_tile * kScoreStride,
                            rows,
                            rows * plan_.padded_value_size};
    const size_t row_bytes = rows * sizeof(Row), sum_bytes = rows * sizeof(WeightSum);
    const size_t bit_bytes = tiles * sizeof(PieceBits);
    size_t total = row_bytes + sum_bytes + bit_bytes + 2 * tiles * sizeof(bool);
    for (const size_t size : sizes) total += round_up(size * sizeof(float), kLine);
    char* next = workspace(total);
    if (!next) {
      failed_ = true;
      return false;
    }
    for (size_t i = 0; i < std::size(parts); ++i) {
      *parts[i] = reinterpret_cast<float*>(next);
      next += round_up(sizes[i] * sizeof(float), kLine);
    }
    scratch.rows = reinterpret_cast<Row*>(next);
    scratch.state.sums = reinterpret_cast<WeightSum*>(next + row_bytes);
    scratch.bits = reinterpret_cast<PieceBits*>(next + row_bytes + sum_bytes);
    scratch.skipped = reinterpret_cast<bool*>(next + row_bytes + sum_bytes + bit_bytes);
    scratch.packed = scratch.skipped + tiles;
    // Rows of a register tile that do not exist are multiplied too: without effect, but not with denormals.
    std::fill_n(scratch.scores, kernels_.row_tile * kScoreStride, 0.0f);
    return true;
  }

  // Of a row and a split: the maximum, the two sums, the accumulators.
  size_t partial_stride() const { return plan_.padded_value_size + 16; }
  float* partial(size_t kv_head_of_all, size_t row, size_t split) const {
    float* partials = reinterpret_cast<float*>(partials_.get());
    return partials + ((kv_head_of_all * plan_.rows + row) * plan_.splits + split) * partial_stride();
  }

  static WeightSum sum_of(const float* part) { return {part[1], part[2]}; }
  static void store_sum(float* part, const WeightSum& sum) {
    part[1] = sum.used;
    part[2] = sum.exact;
  }

  // ---- Rows and masks ----

  // Describes the rows [first, first + count) of a key/value head.
  void describe_rows(size_t batch, size_t kv_head, size_t first, size_t count, Row* rows) const {
    size_t query = first % p_.query_length, head = kv_head * plan_.groups + first / p_.query_length;
    for (size_t i = 0; i < count; ++i) {
      rows[i] = describe_row(batch, head, query);
      if (++query == p_.query_length) {
        query = 0;
        ++head;
      }
    }
  }

  Row describe_row(size_t batch, size_t head, size_t query) const {
    Row r;
    r.query = query;
    r.head = head;
    r.begin = 0;
    r.end = p_.key_length;
    if (p_.is_causal) r.end = std::min(r.end, r.query + 1);
    if (p_.window_right >= 0) r.end = std::min(r.end, r.query + 1 + static_cast<size_t>(p_.window_right));
    if (p_.window_left >= 0 && r.query > static_cast<size_t>(p_.window_left)) {
      r.begin = r.query - static_cast<size_t>(p_.window_left);
    }
    if (p_.key_lengths) r.end = std::min(r.end, static_cast<size_t>(std::max(p_.key_lengths[batch], 0)));
    r.valid = !p_.query_lengths || static_cast<std::ptrdiff_t>(r.query) < p_.query_lengths[batch];
    if (!r.valid || r.begin >= r.end) r.begin = r.end = 0;
    return r;
  }

  const char* query_row(size_t batch, const Row& row) const {
    const std::ptrdiff_t at =
        offset(batch, p_.query.batch) + offset(row.query, p_.query.time) + offset(row.head, p_.query.head);
    return advance(p_.query.data, at, p_.dtype);
  }
  const char* key_row(const AttentionProblem::Operand& operand, size_t batch, size_t kv_head,
                      size_t key) const {
    const std::ptrdiff_t at =
        offset(batch, operand.batch) + offset(key, operand.time) + offset(kv_head, operand.head);
    return advance(operand.data, at, p_.dtype);
  }

  // Judges the pieces of the keys [key, key + count) for a tile of rows.
  PieceBits judge(size_t batch, const Row* rows, size_t row_count, size_t key, size_t count) const {
    const std::uint32_t all = static_cast<std::uint32_t>((std::uint64_t{1} << ceil_div(count, kPiece)) - 1);
    if (!masked_) return {all, 0};
    size_t first_begin = p_.key_length, last_begin = 0, first_end = p_.key_length, last_end = 0;
    bool any_valid = false;
    for (size_t r = 0; r < row_count; ++r) {
      if (!rows[r].valid) continue;
      any_valid = true;
      first_end = std::min(first_end, rows[r].end);
      last_end = std::max(last_end, rows[r].end);
      last_begin = std::max(last_begin, rows[r].begin);
      if (rows[r].begin < rows[r].end) first_begin = std::min(first_begin, rows[r].begin);
    }
    if (!any_valid) return {0, 0};
    PieceBits bits = {all, 0};
    if (first_begin > key || last_begin > key || first_end < key + count || last_end < key + count) {
      for (size_t i = 0; i < ceil_div(count, kPiece); ++i) {
        const size_t begin = key + i * kPiece, end = std::min(begin + kPiece, key + count);
        if (end <= first_begin || begin >= last_end) {
          bits.active &= ~(1u << i);
        } else if (begin < last_begin || end > first_end) {
          bits.mixed |= 1u << i;
        }
      }
    }
    if (p_.mask && bits.active) add_summary(batch, rows, row_count, key / kPiece, bits);
    return bits;
  }

  void add_summary(size_t batch, const Row* rows, size_t row_count, size_t piece, PieceBits& bits) const {
    std::uint32_t none = bits.active, some = 0;
    const Kept* last = nullptr;
    for (size_t r = 0; r < row_count; ++r) {
      if (!rows[r].valid) continue;
      const Kept* kept = summary_.row(batch, rows[r].head, rows[r].query) + piece;
      if (kept == last) continue;
      last = kept;
      for (size_t i = 0; i < kPiecesPerTile && bits.active >> i; ++i) {
        if (!(bits.active >> i & 1)) continue;
        if (kept[i] != Kept::kNone) none &= ~(1u << i);
        if (kept[i] != Kept::kAll) some |= 1u << i;
      }
    }
    bits.active &= ~none;
    bits.mixed = (bits.mixed | some) & bits.active;
  }

  // Bias and masks of a tile's scores, which are those of the keys [key, key + count).
  void adjust(size_t batch, const Row* rows, size_t row_count, size_t key, size_t count, std::uint32_t mixed,
              float* scores) const {
    if (p_.soft_cap != 0) kernels_.soft_cap[order_](scores, row_count, count, p_.soft_cap);
    if (p_.bias) {
      const auto add = kernels_.add_bias[static_cast<int>(p_.bias_dtype)];
      for (size_t r = 0; r < row_count; ++r) {
        add(scores + r * kScoreStride, bias_at(batch, rows[r], key), p_.bias_strides.key, count);
      }
    }
    for (size_t i = 0; mixed >> i;) {
      if (!(mixed >> i & 1)) {
        ++i;
        continue;
      }
      const size_t first = i * kPiece;
      while (mixed >> i & 1) ++i;
      const size_t n = std::min(i * kPiece, count) - first;
      for (size_t r = 0; r < row_count; ++r) {
        mask_row(batch, rows[r], key + first, n, scores + r * kScoreStride + first);
      }
    }
  }

  const char* bias_at(size_t batch, const Row& row, size_t key) const {
    const AttentionProblem::Strides& s = p_.bias_strides;
    const std::ptrdiff_t at =
        offset(batch, s.batch) + offset(row.head, s.head) + offset(row.query, s.query) + offset(key, s.key);
    return advance(p_.bias, at, p_.bias_dtype);
  }

  const unsigned char* mask_at(size_t batch, const Row& row, size_t key) const {
    const AttentionProblem::Strides& s = p_.mask_strides;
    return p_.mask + offset(batch, s.batch) + offset(row.head, s.head) + offset(row.query, s.query) +
           offset(key, s.key);
  }

  // Fetches what adjust() will read, while the scores are computed.
  void prefetch_adjustments(size_t batch, const Row* rows, size_t row_count, size_t key, size_t count,
                            bool mixed) const {
    for (size_t r = 0; r < row_count; ++r) {
      if (mixed && p_.mask) fetch(mask_at(batch, rows[r], key), p_.mask_strides.key == 1 ? count : 1);
      if (p_.bias) {
        fetch(bias_at(batch, rows[r], key), p_.bias_strides.key == 1 ? count * element_size(p_.bias_dtype) : 1);
      }
    }
  }

  void mask_row(size_t batch, const Row& row, size_t key, size_t count, float* scores) const {
    if (p_.mask) {
      const unsigned char* bytes = mask_at(batch, row, key);
      unsigned char gathered[kKeyTile];
      if (p_.mask_strides.key != 1) {
        for (size_t i = 0; i < count; ++i) gathered[i] = bytes[offset(i, p_.mask_strides.key)];
        bytes = gathered;
      }
      kernels_.apply_mask(scores, bytes, count, kMaskedLogit);
    }
    const size_t begin = std::clamp(row.begin, key, key + count) - key;
    const size_t end = std::clamp(row.end, key, key + count) - key;
    std::fill(scores, scores + begin, kMaskedLogit);
    std::fill(scores + std::max(begin, end), scores + count, kMaskedLogit);
  }

  // Whether what was skipped as masked counts after all: no kept logit is above a masked one. A row without
  // any kept key is the mean of all values, and one whose kept logits are -inf that of the masked ones.
  static bool counts_masked(const Row& row, float maximum) { return row.valid && !(maximum > kMaskedLogit); }

  // ---- A block of rows ----

  void run_block(size_t task) {
    Scratch scratch;
    if (!take_scratch(scratch)) return;
    // Heads innermost among the blocks of equal rank, splits within.
    const size_t heads = p_.batch * p_.kv_heads;
    const size_t split = task % plan_.splits, head = task / plan_.splits % heads;
    const size_t first = task / plan_.splits / heads * plan_.block_rows;
    const size_t count = std::min(plan_.block_rows, plan_.rows - first);
    begin_rows(scratch, head, first, count);
    const size_t begin = split * plan_.split_keys, end = std::min(p_.key_length, begin + plan_.split_keys);
    attend(scratch, head, count, begin, end, true);
    if (plan_.splits > 1) {
      for (size_t r = 0; r < count; ++r) {
        float* part = partial(head, first + r, split);
        std::fill_n(part, 16, 0.0f);
        part[0] = scratch.state.maxima[r];
        store_sum(part, scratch.state.sums[r]);
        std::copy_n(accumulator(scratch, r), plan_.padded_value_size, part + 16);
      }
    } else {
      repair(scratch, head, count);
      for (size_t r = 0; r < count; ++r) {
        finish_row(head / p_.kv_heads, scratch.rows[r], scratch.state.maxima[r], scratch.state.sums[r],
                   accumulator(scratch, r));
      }
    }
  }

  size_t per_word() const { return kernels_.per_word[dtype_]; }

  // Packing writes up to a vector past a tile's end.
  size_t query_tile_stride() const { return round_up(kernels_.row_tile * plan_.depth + kernels_.lanes, 16); }
  float* packed_queries(const Scratch& scratch, size_t row) const {
    return scratch.queries + row / kernels_.row_tile * query_tile_stride();
  }

  float* accumulator(const Scratch& scratch, size_t row) const {
    return scratch.state.accumulators + row * plan_.padded_value_size;
  }

  // Describes the rows [first, first + count) of a key/value head, and empties their state.
  void begin_rows(Scratch& scratch, size_t head, size_t first, size_t count) const {
    const size_t tile = kernels_.row_tile;
    describe_rows(head / p_.kv_heads, head % p_.kv_heads, first, count, scratch.rows);
    reset(scratch, 0, round_up(count, tile));
    std::fill_n(scratch.skipped, ceil_div(count, tile), false);
    std::fill_n(scratch.packed, ceil_div(count, tile), false);
  }

  // Packs the queries of a row tile where they are first used.
  void pack_queries(Scratch& scratch, size_t batch, size_t row, size_t count) const {
    bool& packed = scratch.packed[row / kernels_.row_tile];
    if (packed) return;
    packed = true;
    // The next tile's queries are fetched while this one is worked on.
    for (size_t i = row + kernels_.row_tile; i < std::min(count, row + 2 * kernels_.row_tile); ++i) {
      fetch(query_row(batch, scratch.rows[i]), p_.head_size * element_size(p_.dtype));
    }
    const void* rows[kMaxRowTile];
    const size_t n = std::min(kMaxRowTile, count - row);
    for (size_t i = 0; i < n; ++i) rows[i] = query_row(batch, scratch.rows[row + i]);
    kernels_.pack_queries[dtype_](rows, n, p_.head_size, p_.scale, packed_queries(scratch, row));
  }

  void reset(Scratch& scratch, size_t first, size_t count) const {
    std::fill_n(scratch.state.maxima + first, count, -kInfinity);
    std::fill_n(scratch.state.sums + first, count, WeightSum{});
    std::fill_n(accumulator(scratch, first), count * plan_.padded_value_size, 0.0f);
  }

  // The keys and values that are packed next: the following tile's, or the first ones of the head that the same
  // thread most likely has next.
  struct Next {
    size_t batch = 0, kv_head = 0, key = 0, keys = 0;
  };
  Next next_tile(size_t head, size_t key, size_t end) const {
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
  void fetch_share(const Next& next, size_t row, size_t last, size_t count) const {
    const size_t size = element_size(p_.dtype);
    for (size_t i = next.keys * row / count; i < next.keys * last / count; ++i) {
      fetch(key_row(p_.key, next.batch, next.kv_head, next.key + i), p_.head_size * size);
      fetch(key_row(p_.value, next.batch, next.kv_head, next.key + i), p_.value_size * size);
    }
  }

  // Attends to the keys [begin, end). With `skip`, pieces without any kept key are left out, and that is
  // noted; without, only the row tiles that are noted are worked on.
  void attend(Scratch& scratch, size_t head, size_t count, size_t begin, size_t end, bool skip) const {
    const size_t batch = head / p_.kv_heads, kv_head = head % p_.kv_heads, tile = kernels_.row_tile;
    for (size_t key = begin; key < end; key += plan_.key_tile) {
      const size_t keys = std::min(plan_.key_tile, end - key);
      const std::uint32_t all = static_cast<std::uint32_t>((std::uint64_t{1} << ceil_div(keys, kPiece)) - 1);
      std::uint32_t any = 0;
      for (size_t r = 0; r < count; r += tile) {
        PieceBits& bits = scratch.bits[r / tile];
        bool& skipped = scratch.skipped[r / tile];
        if (skip) {
          bits = judge(batch, &scratch.rows[r], std::min(tile, count - r), key, keys);
          skipped = skipped || bits.active != all;
        } else {
          bits = skipped ? PieceBits{all, all} : PieceBits{};
        }
        any |= bits.active;
      }
      if (any == 0) continue;
      kernels_.pack_keys[dtype_](key_row(p_.key, batch, kv_head, key), p_.key.time, keys, p_.head_size,
                                 scratch.keys);
      kernels_.pack_values[dtype_](key_row(p_.value, batch, kv_head, key), p_.value.time, keys, p_.value_size,
                                   plan_.key_tile, scratch.values);
      const Next next = next_tile(head, key, end);
      for (size_t r = 0; r < count; r += tile) {
        fetch_share(next, r, std::min(r + tile, count), count);
        if (scratch.bits[r / tile].active == 0) continue;
        pack_queries(scratch, batch, r, count);
        attend_tile(scratch, batch, r, std::min(tile, count - r), key, keys);
      }
    }
  }

  // A row tile and a key tile: run by run of neighbouring active pieces.
  void attend_tile(Scratch& scratch, size_t batch, size_t row, size_t rows, size_t key, size_t keys) const {
    const PieceBits bits = scratch.bits[row / kernels_.row_tile];
    const float* queries = packed_queries(scratch, row);
    for (size_t i = 0; bits.active >> i;) {
      if (!(bits.active >> i & 1)) {
        ++i;
        continue;
      }
      size_t last = i;
      while (bits.active >> last & 1) ++last;
      const size_t first = i * kPiece, n = std::min(last * kPiece, keys) - first;
      const std::uint32_t mixed = bits.mixed >> i & ((std::uint32_t{1} << (last - i)) - 1);
      prefetch_adjustments(batch, &scratch.rows[row], rows, key + first, n, mixed != 0);
      kernels_.score[dtype_](queries, rows, scratch.keys + first * plan_.depth, n, p_.head_size, p_.scale,
                             scratch.scores);
      adjust(batch, &scratch.rows[row], rows, key + first, n, mixed, scratch.scores);
      kernels_.weigh[dtype_][order_](scratch.scores, rows, n, scratch.state.maxima + row,
                                     scratch.state.sums + row, accumulator(scratch, row),
                                     plan_.padded_value_size, p_.value_size);
      kernels_.accumulate[dtype_](scratch.scores, rows, scratch.values + first / per_word() * kernels_.panel, n,
                                  plan_.key_tile, p_.value_size, accumulator(scratch, row),
                                  plan_.padded_value_size);
      i = last;
    }
  }

  // Computes again, with every key, the row tiles in which what was skipped counts.
  void repair(Scratch& scratch, size_t head, size_t count) const {
    const size_t tile = kernels_.row_tile;
    bool any = false;
    for (size_t r = 0; r < count; r += tile) {
      bool& wanted = scratch.skipped[r / tile];
      bool counts = false;
      for (size_t i = r; i < std::min(count, r + tile); ++i) {
        counts = counts || counts_masked(scratch.rows[i], scratch.state.maxima[i]);
      }
      wanted = wanted && counts;
      if (wanted) reset(scratch, r, tile);
      any = any || wanted;
    }
    if (any) attend(scratch, head, count, 0, p_.key_length, false);
  }

  void finish_row(size_t batch, const Row& row, float maximum, const WeightSum& sum,
                  const float* accumulators) const {
    const size_t at = (batch * p_.query_length + row.query) * p_.query_heads + row.head;
    char* out = static_cast<char*>(p_.out) + at * p_.value_size * element_size(p_.dtype);
    if (row.valid) {
      kernels_.finish[dtype_](accumulators, p_.value_size, sum.used, out);
    } else {
      std::fill_n(out, p_.value_size * element_size(p_.dtype), char{0});
    }
    if (!p_.residual) return;
    if (!row.valid) {
      p_.residual[at] = kMaskedLogit;
    } else if (std::isinf(maximum)) {
      p_.residual[at] = maximum;
    } else {
      p_.residual[at] = maximum + (std::log(sum.exact) + kernels_.log_sum_correction[order_]);
    }
  }

  // ---- Few rows ----

  // Heads that are scored together, and their rows in all.
  static constexpr size_t kMostHeads = 32, kMostRows = 64;

  // One split of the keys for all heads of one batch element, in chunks whose keys and values stay in cache.
  void run_in_place(size_t task) {
    constexpr size_t kChunk = 2 * kPiece;
    const size_t batch = task / plan_.splits, split = task % plan_.splits, rows = plan_.rows;
    const size_t query_stride = round_up(std::max<size_t>(p_.head_size, 1), kernels_.lanes);
    const size_t query_count = p_.kv_heads * rows * query_stride;
    const size_t heads = std::min({p_.kv_heads, kMostRows / rows, kMostHeads});
    float* const queries =
        reinterpret_cast<float*>(workspace((query_count + heads * rows * kScoreStride) * sizeof(float)));
    if (!queries) {
      failed_ = true;
      return;
    }
    float* const scores = queries + query_count;
    std::fill_n(scores, heads * rows * kScoreStride, 0.0f);
    for (size_t kv_head = 0; kv_head < p_.kv_heads; ++kv_head) {
      Row described[kMaxRowTile];
      describe_rows(batch, kv_head, 0, rows, described);
      for (size_t r = 0; r < rows; ++r) {
        copy_query(batch, described[r], queries + (kv_head * rows + r) * query_stride);
        float* part = partial(batch * p_.kv_heads + kv_head, r, split);
        std::fill_n(part, partial_stride(), 0.0f);
        part[0] = -kInfinity;
      }
    }
    const size_t begin = split * plan_.split_keys, end = std::min(p_.key_length, begin + plan_.split_keys);
    for (size_t key = begin; key < end; key += kChunk) {
      for (size_t kv_head = 0; kv_head < p_.kv_heads; kv_head += heads) {
        attend_in_place(batch, kv_head, std::min(heads, p_.kv_heads - kv_head), split, key,
                        std::min(kChunk, end - key), queries + kv_head * rows * query_stride, query_stride,
                        scores);
      }
    }
  }

  // A scaled float32 copy of a query, padded with 0.
  void copy_query(size_t batch, const Row& row, float* out) const {
    // Packing one row gives its elements row_tile apart; a bias of stride 1 added to 0 is a conversion.
    const size_t padded = round_up(std::max<size_t>(p_.head_size, 1), kernels_.lanes);
    std::fill_n(out, padded, 0.0f);
    kernels_.add_bias[dtype_](out, query_row(batch, row), 1, p_.head_size);
    for (size_t j = 0; j < p_.head_size; ++j) out[j] *= p_.scale;
  }

  // A chunk of keys for the heads [kv_head, kv_head + heads).
  void attend_in_place(size_t batch, size_t kv_head, size_t heads, size_t split, size_t key, size_t keys,
                       const float* queries, size_t query_stride, float* scores) const {
    Row rows[kMaxRowTile];
    PieceBits bits[kMostHeads];
    for (size_t h = 0; h < heads; ++h) {
      if (masked_) describe_rows(batch, kv_head + h, 0, plan_.rows, rows);
      bits[h] = judge(batch, rows, plan_.rows, key, keys);
    }
    // Heads that have the same pieces to compute go together.
    for (size_t first = 0, last = 0; first < heads; first = last) {
      while (last < heads && bits[last].active == bits[first].active) ++last;
      if (bits[first].active == 0) continue;
      attend_pieces(batch, kv_head + first, last - first, split, key, keys, bits + first,
                    queries + first * plan_.rows * query_stride, query_stride, scores);
    }
  }

  void attend_pieces(size_t batch, size_t kv_head, size_t heads, size_t split, size_t key, size_t keys,
                     const PieceBits* bits, const float* queries, size_t query_stride, float* scores) const {
    const size_t count = plan_.rows, stride = plan_.splits * partial_stride();
    float* parts = partial(batch * p_.kv_heads + kv_head, 0, split);
    // Up to the last active piece; what is masked in between is replaced like the mixed pieces.
    const std::uint32_t active = bits->active;
    size_t first = 0, last = 0;
    while (!(active >> first & 1)) ++first;
    for (size_t i = first; active >> i; ++i) last = i + 1;
    const std::uint32_t all = (1u << (last - first)) - 1;
    const size_t begin = key + first * kPiece, n = std::min(key + keys, key + last * kPiece) - begin;
    kernels_.score_in_place[dtype_](queries, query_stride, count, key_row(p_.key, batch, kv_head, begin),
                                    {heads, n, p_.key.head, p_.key.time}, p_.head_size, scores);
    for (size_t h = 0; h < heads; ++h) {
      Row rows[kMaxRowTile];
      float maxima[kMaxRowTile];
      WeightSum sums[kMaxRowTile];
      float* const head_scores = scores + h * count * kScoreStride;
      float* const head_parts = parts + h * count * stride;
      describe_rows(batch, kv_head + h, 0, count, rows);
      adjust(batch, rows, count, begin, n, (bits[h].mixed >> first | ~(active >> first)) & all, head_scores);
      for (size_t r = 0; r < count; ++r) {
        maxima[r] = head_parts[r * stride];
        sums[r] = sum_of(head_parts + r * stride);
      }
      kernels_.weigh[kFloat][order_](head_scores, count, n, maxima, sums, head_parts + 16, stride,
                                     p_.value_size);
      for (size_t r = 0; r < count; ++r) {
        head_parts[r * stride] = maxima[r];
        store_sum(head_parts + r * stride, sums[r]);
      }
    }
    kernels_.accumulate_in_place[dtype_](scores, count, key_row(p_.value, batch, kv_head, begin),
                                         {heads, n, p_.value.head, p_.value.time}, p_.value_size, parts + 16,
                                         stride);
  }

  // Joins the splits of all rows of a key/value head.
  void combine(size_t head) {
    const size_t batch = head / p_.kv_heads, kv_head = head % p_.kv_heads;
    bool counts = false;
    for (size_t r = 0; r < plan_.rows; ++r) {
      Row row;
      describe_rows(batch, kv_head, r, 1, &row);
      float* total = join(head, r);
      counts = counts || (masked_ && counts_masked(row, total[0]));
      finish_row(batch, row, total[0], sum_of(total), total + 16);
    }
    if (counts) compute_again(head);
  }

  // The sum of a row's parts relative to their common maximum, in the place of the first.
  float* join(size_t head, size_t row) const {
    float* total = partial(head, row, 0);
    float maximum = -kInfinity;
    for (size_t s = 0; s < plan_.splits; ++s) maximum = std::fmax(maximum, partial(head, row, s)[0]);
    const float base = maximum == -kInfinity ? 0.0f : maximum;
    for (size_t s = 0; s < plan_.splits; ++s) {
      const float* part = partial(head, row, s);
      const float factor = part[1] == 0 ? 0.0f : std::exp(part[0] - base);
      const bool first = s == 0;
      for (size_t j = 1; j < partial_stride(); ++j) {
        total[j] = first ? part[j] * factor : total[j] + part[j] * factor;
      }
    }
    total[0] = maximum;
    return total;
  }

  // All rows of a key/value head, with every key.
  void compute_again(size_t head) {
    Scratch scratch;
    if (!take_scratch(scratch)) return;
    for (size_t first = 0; first < plan_.rows; first += plan_.block_rows) {
      const size_t count = std::min(plan_.block_rows, plan_.rows - first);
      begin_rows(scratch, head, first, count);
      std::fill_n(scratch.skipped, ceil_div(count, kernels_.row_tile), true);
      attend(scratch, head, count, 0, p_.key_length, false);
      for (size_t r = 0; r < count; ++r) {
        finish_row(head / p_.kv_heads, scratch.rows[r], scratch.state.maxima[r], scratch.state.sums[r],
                   accumulator(scratch, r));
      }
    }
  }

  const AttentionProblem& p_;
  const AttentionKernels& kernels_;
  const int order_;
  const Plan plan_;
  const int dtype_;
  const bool masked_;  // something may mask a key
  MaskSummary summary_;
  Bytes partials_;
  std::atomic<bool> failed_{false};
};

// Without any key there is nothing to average: 0, as from jax.nn.
void run_without_keys(const AttentionProblem& p) {
  const size_t rows = p.batch * p.query_length * p.query_heads;
  std::fill_n(static_cast<char*>(p.out), rows * p.value_size * element_size(p.dtype), char{0});
  if (p.residual) std::fill_n(p.residual, rows, -kInfinity);
}

}  // namespace

const char* run_attention(const AttentionProblem& p, const KernelTable& table, int order_index,
                          const ParallelFor& parallel) {
  if (order_index < 0 || order_index >= kMaxOrder) return "the order is outside 1 to 5";
  if (p.batch == 0 || p.query_length == 0 || p.query_heads == 0) return nullptr;
  if (p.kv_heads == 0 || p.query_heads % p.kv_heads != 0) {
    return "the number of query heads is not a multiple of the number of key/value heads";
  }
  if (p.key_length == 0) {
    run_without_keys(p);
    return nullptr;
  }
  Attention attention(p, table, order_index);
  return attention.run(parallel);
}

}  // namespace quake
