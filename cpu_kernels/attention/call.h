// One call of attention: what its two ways of running (blocks.h, few_rows.h) have in common.

#ifndef QUAKE_ATTENTION_CALL_H_
#define QUAKE_ATTENTION_CALL_H_

#include <atomic>
#include <cstddef>

#include "attention/kernels.h"
#include "attention/masks.h"
#include "attention/partials.h"
#include "attention/plan.h"
#include "attention/problem.h"

namespace quake {

// The format of a problem's products. Few rows are multiplied with keys and values as they lie, by FMA.
AttentionFormat format_of(const AttentionProblem& problem, const AttentionKernels& kernels);

class AttentionCall {
 public:
  AttentionCall(const AttentionProblem& problem, const AttentionKernels& kernels, AttentionFormat format,
                int order_index);

  // Inline: they are called for every row that is fetched ahead.
  const char* query_row(std::size_t batch, const Row& row) const {
    const std::ptrdiff_t at =
        offset(batch, p.query.batch) + offset(row.query, p.query.time) + offset(row.head, p.query.head);
    return advance(p.query.data, at, p.dtype);
  }
  const char* key_row(const AttentionProblem::Operand& operand, std::size_t batch, std::size_t kv_head,
                      std::size_t key) const {
    const std::ptrdiff_t at =
        offset(batch, operand.batch) + offset(key, operand.time) + offset(kv_head, operand.head);
    return advance(operand.data, at, p.kv_dtype);
  }

  // From one of the problem's scales, or null, to that of a key.
  const float* scales_at(const float* scales, std::size_t batch, std::size_t kv_head, std::size_t key) const {
    return scales ? scales + (batch * p.kv_heads + kv_head) * p.key_length + key : nullptr;
  }

  // Soft cap, bias and masks of a tile's scores, which are those of the keys [key, key + count). Masks change
  // the pieces in `mixed` alone.
  void adjust(std::size_t batch, const Row* rows, std::size_t row_count, std::size_t key, std::size_t count,
              std::uint32_t mixed, float* scores) const;
  // Whether it changes anything.
  bool adjusts(std::uint32_t mixed) const { return p.soft_cap != 0 || p.bias || mixed != 0; }
  // Fetches what adjust() will read, while the scores are computed.
  void prefetch_adjustments(std::size_t batch, const Row* rows, std::size_t row_count, std::size_t key,
                            std::size_t count, bool mixed) const;
  // Writes a row of the output, and its residual.
  void finish_row(std::size_t batch, const Row& row, float maximum, const WeightSum& sum,
                  const float* accumulators) const;

  const AttentionProblem& p;
  const AttentionKernels& kernels;
  const AttentionKernels::Format& format;
  const int order, dtype, kv_dtype;      // as the table is indexed
  const float query_scale, score_scale;  // their product is the problem's
  const Plan plan;
  Masks masks;
  Partials partials;                      // of splits
  std::atomic<bool> failed{false};        // memory was refused
  std::atomic<bool> lacks_values{false};  // the format has not all of the operands' values

 private:
  const char* bias_at(std::size_t batch, const Row& row, std::size_t key) const;
};

}  // namespace quake

#endif  // QUAKE_ATTENTION_CALL_H_
