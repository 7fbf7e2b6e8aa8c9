#include "attention/masks.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "core/memory.h"

namespace quake {

using std::size_t;

namespace {

constexpr size_t kPiecesPerTile = AttentionKernels::kKeyTile / kPiece;

Kept judge_words(const unsigned char* bytes) {
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

Kept judge(const unsigned char* bytes, std::ptrdiff_t stride, size_t count) {
  if (stride == 0) return *bytes ? Kept::kAll : Kept::kNone;
  if (stride == 1 && count == kPiece) return judge_words(bytes);
  size_t kept = 0;
  for (size_t i = 0; i < count; ++i) kept += bytes[offset(i, stride)] != 0;
  return kept == 0 ? Kept::kNone : kept == count ? Kept::kAll : Kept::kSome;
}

// What the rows of a tile keep of its pieces, added row by row.
class KeptByRows {
 public:
  explicit KeptByRows(std::uint32_t active) : active_(active), none_(active) {}

  // kept(i): what a row keeps of piece i.
  template <class KeptOf>
  void add(const KeptOf& kept) {
    for (size_t i = 0; i < kPiecesPerTile && active_ >> i; ++i) {
      if (!(active_ >> i & 1)) continue;
      const Kept now = kept(i);
      if (now != Kept::kNone) none_ &= ~(1u << i);
      if (now != Kept::kAll) some_ |= 1u << i;
    }
  }
  void apply(PieceBits& bits) const {
    bits.active &= ~none_;
    bits.mixed = (bits.mixed | some_) & bits.active;
  }

 private:
  const std::uint32_t active_;
  std::uint32_t none_, some_ = 0;
};

}  // namespace

// ---- Mask arrays ----

bool MaskSummary::build(const AttentionProblem& p, size_t rows, ParallelFor parallel) {
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

const Kept* MaskSummary::row(size_t batch, size_t head, size_t query) const {
  const size_t slice = (batches_ == 1 ? 0 : batch) * heads_ + (heads_ == 1 ? 0 : head);
  return kept_.get() + (slice * groups_ + (queries_ == 1 ? 0 : query / rows_)) * pieces_;
}

void MaskSummary::summarize(size_t batch, size_t head, size_t group) {
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

// ---- Segments ----

bool SegmentSummary::build(const AttentionProblem& p, ParallelFor parallel) {
  pieces_ = ceil_div(p.key_length, kPiece);
  ranges_.reset(new (std::nothrow) Range[p.batch * pieces_]);
  if (!ranges_) return false;
  parallel(p.batch, [&](size_t batch) {
    const std::int32_t* const segments = p.key_segments + batch * p.key_length;
    for (size_t piece = 0; piece < pieces_; ++piece) {
      const size_t begin = piece * kPiece, end = std::min(begin + kPiece, p.key_length);
      std::int32_t least = segments[begin], largest = least;
      for (size_t key = begin; key < end; ++key) {
        least = std::min(least, segments[key]);
        largest = std::max(largest, segments[key]);
      }
      ranges_[batch * pieces_ + piece] = {least, largest};
    }
  });
  return true;
}

// ---- All masks ----

Masks::Masks(const AttentionProblem& p, const Plan& plan)
    : p_(p),
      groups_(plan.groups),
      any_(p.mask || p.is_causal || p.window_left >= 0 || p.window_right >= 0 || p.query_lengths ||
           p.key_lengths || p.query_segments) {}

bool Masks::build(size_t row_tile, ParallelFor parallel) {
  return (!p_.mask || summary_.build(p_, row_tile, parallel)) &&
         (!p_.query_segments || segments_.build(p_, parallel));
}

void Masks::describe_rows(size_t batch, size_t kv_head, size_t first, size_t count, Row* rows) const {
  size_t query = first % p_.query_length, head = kv_head * groups_ + first / p_.query_length;
  for (size_t i = 0; i < count; ++i) {
    rows[i] = describe_row(batch, head, query);
    if (++query == p_.query_length) {
      query = 0;
      ++head;
    }
  }
}

Row Masks::describe_row(size_t batch, size_t head, size_t query) const {
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

PieceBits Masks::judge(size_t batch, const Row* rows, size_t row_count, size_t key, size_t count) const {
  const std::uint32_t all = first_pieces(ceil_div(count, kPiece));
  if (!any_) return {all, 0};
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
  if (p_.query_segments && bits.active) add_segments(batch, rows, row_count, key / kPiece, bits);
  if (p_.mask && bits.active) add_summary(batch, rows, row_count, key / kPiece, bits);
  return bits;
}

void Masks::add_summary(size_t batch, const Row* rows, size_t row_count, size_t piece, PieceBits& bits) const {
  KeptByRows by_rows(bits.active);
  const Kept* last = nullptr;
  for (size_t r = 0; r < row_count; ++r) {
    if (!rows[r].valid) continue;
    const Kept* kept = summary_.row(batch, rows[r].head, rows[r].query) + piece;
    if (kept == last) continue;
    last = kept;
    by_rows.add([&](size_t i) { return kept[i]; });
  }
  by_rows.apply(bits);
}

void Masks::add_segments(size_t batch, const Row* rows, size_t row_count, size_t piece, PieceBits& bits) const {
  KeptByRows by_rows(bits.active);
  const Row* last = nullptr;
  for (size_t r = 0; r < row_count; ++r) {
    if (!rows[r].valid) continue;
    const std::int32_t segment = segment_of(batch, rows[r]);
    if (last && segment == segment_of(batch, *last)) continue;
    last = &rows[r];
    by_rows.add([&](size_t i) { return segments_.judge(batch, piece + i, segment); });
  }
  by_rows.apply(bits);
}

void Masks::apply(const AttentionKernels& kernels, size_t batch, const Row& row, size_t key, size_t count,
                  float* scores) const {
  if (p_.mask) {
    const unsigned char* bytes = mask_at(batch, row, key);
    unsigned char gathered[AttentionKernels::kKeyTile];
    if (p_.mask_strides.key != 1) {
      for (size_t i = 0; i < count; ++i) gathered[i] = bytes[offset(i, p_.mask_strides.key)];
      bytes = gathered;
    }
    kernels.apply_mask(scores, bytes, count, kMaskedLogit);
  }
  if (p_.query_segments) {
    const std::int32_t* const segments = p_.key_segments + batch * p_.key_length + key;
    const std::int32_t segment = segment_of(batch, row);
    for (size_t i = 0; i < count; ++i) scores[i] = segments[i] == segment ? scores[i] : kMaskedLogit;
  }
  const size_t begin = std::clamp(row.begin, key, key + count) - key;
  const size_t end = std::clamp(row.end, key, key + count) - key;
  std::fill(scores, scores + begin, kMaskedLogit);
  std::fill(scores + std::max(begin, end), scores + count, kMaskedLogit);
}

const unsigned char* Masks::mask_at(size_t batch, const Row& row, size_t key) const {
  const AttentionProblem::Strides& s = p_.mask_strides;
  return p_.mask + offset(batch, s.batch) + offset(row.head, s.head) + offset(row.query, s.query) +
         offset(key, s.key);
}

void Masks::prefetch(size_t batch, const Row& row, size_t key, size_t count) const {
  if (p_.mask) fetch(mask_at(batch, row, key), p_.mask_strides.key == 1 ? count : 1);
}

}  // namespace quake
