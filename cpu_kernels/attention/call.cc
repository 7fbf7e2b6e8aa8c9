#include "attention/call.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "core/memory.h"

namespace quake {

using std::size_t;

namespace {

bool scales_queries(const AttentionKernels::Format& format, float scale) {
  int exponent;
  const bool is_power_of_two = std::fabs(std::frexp(scale, &exponent)) == 0.5f && std::abs(exponent) < 64;
  switch (format.query_scale) {
    case AttentionKernels::QueryScale::kAny:
      return true;
    case AttentionKernels::QueryScale::kPowersOfTwo:
      return is_power_of_two;
    default:
      return false;
  }
}

}  // namespace

AttentionFormat format_of(const AttentionProblem& p, const AttentionKernels& kernels) {
  if (has_few_rows(p)) return AttentionFormat::kFloat32;
  if (p.format == AttentionFormat::kFloat32 && kernels.of(AttentionFormat::kFloat32Split).score) {
    return AttentionFormat::kFloat32Split;
  }
  return kernels.of(p.format).score ? p.format : AttentionFormat::kFloat32;
}

AttentionCall::AttentionCall(const AttentionProblem& problem, const AttentionKernels& table,
                             AttentionFormat format_of_products, int order_index)
    : p(problem),
      kernels(table),
      format(table.of(format_of_products)),
      order(order_index),
      dtype(static_cast<int>(problem.dtype)),
      kv_dtype(static_cast<int>(problem.kv_dtype)),
      query_scale(scales_queries(format, problem.scale) ? problem.scale : 1),
      score_scale(scales_queries(format, problem.scale) ? 1 : problem.scale),
      plan(make_plan(problem, table, format.row_tile)),
      masks(problem, plan) {}

const char* AttentionCall::bias_at(size_t batch, const Row& row, size_t key) const {
  const AttentionProblem::Strides& s = p.bias_strides;
  const std::ptrdiff_t at =
      offset(batch, s.batch) + offset(row.head, s.head) + offset(row.query, s.query) + offset(key, s.key);
  return advance(p.bias, at, p.bias_dtype);
}

void AttentionCall::adjust(size_t batch, const Row* rows, size_t row_count, size_t key, size_t count,
                           std::uint32_t mixed, float* scores) const {
  constexpr size_t kScoreStride = AttentionKernels::kScoreStride;
  if (p.soft_cap != 0) kernels.soft_cap[order](scores, row_count, count, p.soft_cap);
  if (p.bias) {
    const auto add = kernels.add_bias[static_cast<int>(p.bias_dtype)];
    for (size_t r = 0; r < row_count; ++r) {
      add(scores + r * kScoreStride, bias_at(batch, rows[r], key), p.bias_strides.key, count);
    }
  }
  for_each_run(mixed, [&](size_t first_piece, size_t last_piece) {
    const size_t first = first_piece * kPiece, n = std::min(last_piece * kPiece, count) - first;
    for (size_t r = 0; r < row_count; ++r) {
      masks.apply(kernels, batch, rows[r], key + first, n, scores + r * kScoreStride + first);
    }
  });
}

void AttentionCall::prefetch_adjustments(size_t batch, const Row* rows, size_t row_count, size_t key,
                                         size_t count, bool mixed) const {
  for (size_t r = 0; r < row_count; ++r) {
    if (mixed) masks.prefetch(batch, rows[r], key, count);
    if (p.bias) {
      fetch(bias_at(batch, rows[r], key), p.bias_strides.key == 1 ? count * element_size(p.bias_dtype) : 1);
    }
  }
}

void AttentionCall::finish_row(size_t batch, const Row& row, float maximum, const WeightSum& sum,
                               const float* accumulators) const {
  const size_t at = (batch * p.query_length + row.query) * p.query_heads + row.head;
  char* out = static_cast<char*>(p.out) + at * p.value_size * element_size(p.dtype);
  if (row.valid) {
    kernels.finish[dtype](accumulators, p.value_size, sum.used, out);
  } else {
    std::fill_n(out, p.value_size * element_size(p.dtype), char{0});
  }
  if (!p.residual) return;
  if (!row.valid) {
    p.residual[at] = kMaskedLogit;
  } else if (std::isinf(maximum)) {
    p.residual[at] = maximum;
  } else {
    p.residual[at] = maximum + (std::log(sum.exact) + kernels.log_sum_correction[order]);
  }
}

}  // namespace quake
