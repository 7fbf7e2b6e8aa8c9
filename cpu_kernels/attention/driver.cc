#include "attention/driver.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/blocks.h"
#include "attention/call.h"
#include "attention/few_rows.h"

namespace quake {
namespace {

using std::size_t;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Whether a call takes less time than a few hops through the pool.
bool is_small(const AttentionProblem& p) {
  const size_t sizes = p.head_size + p.value_size;
  const size_t read = p.batch * p.key_length * p.kv_heads * sizes;
  return read < (size_t{1} << 17) &&
         p.batch * p.query_heads * p.query_length * p.key_length * sizes < (size_t{1} << 20);
}

// Without any key there is nothing to average: 0, as from jax.nn.
void run_without_keys(const AttentionProblem& p) {
  const size_t rows = p.batch * p.query_length * p.query_heads;
  std::fill_n(static_cast<char*>(p.out), rows * p.value_size * element_size(p.dtype), char{0});
  if (p.residual) std::fill_n(p.residual, rows, -kInfinity);
}

// The sum of a row's parts relative to their common maximum, in the place of the first.
Partial join(const AttentionCall& call, size_t head, size_t row) {
  const auto part = [&](size_t split) { return call.partials.at(head, row, split); };
  float maximum = -kInfinity;
  for (size_t s = 0; s < call.plan.splits; ++s) maximum = std::fmax(maximum, part(s).header().maximum);
  const float base = maximum == -kInfinity ? 0.0f : maximum;
  Partial::Header total = {maximum, WeightSum{}};
  float* const accumulators = part(0).accumulators();
  for (size_t s = 0; s < call.plan.splits; ++s) {
    const Partial::Header header = part(s).header();
    const float factor = header.sum.used == 0 ? 0.0f : std::exp(header.maximum - base);
    const float* const added = part(s).accumulators();
    total.sum.used += header.sum.used * factor;
    total.sum.exact += header.sum.exact * factor;
    for (size_t j = 0; j < call.plan.padded_value_size; ++j) {
      accumulators[j] = s == 0 ? added[j] * factor : accumulators[j] + added[j] * factor;
    }
  }
  part(0).header() = total;
  return part(0);
}

// Joins the splits of all rows of a key/value head.
void combine(const AttentionCall& call, const AttentionBlocks& blocks, size_t head) {
  const size_t batch = head / call.p.kv_heads, kv_head = head % call.p.kv_heads;
  bool counts = false;
  for (size_t r = 0; r < call.plan.rows; ++r) {
    Row row;
    call.masks.describe_rows(batch, kv_head, r, 1, &row);
    const Partial total = join(call, head, r);
    counts = counts || (call.masks.any() && Masks::counts_masked(row, total.header().maximum));
    call.finish_row(batch, row, total.header().maximum, total.header().sum, total.accumulators());
  }
  if (counts) blocks.compute_again(head);
}

const char* run(AttentionCall& call, ParallelFor parallel) {
  constexpr const char* kRefused = "not enough memory";
  const Plan& plan = call.plan;
  if (!call.masks.build(call.format.row_tile, parallel)) return kRefused;
  if ((plan.in_place || plan.splits > 1) && !call.partials.build(plan)) return kRefused;
  const AttentionBlocks blocks(call);
  if (plan.in_place) {
    const AttentionOfFewRows few(call);
    parallel(few.tasks(), [&](size_t task) { few.run(task); });
  } else {
    parallel(blocks.tasks(), [&](size_t task) { blocks.run(task); });
  }
  if (call.partials.any() && !call.failed && !call.lacks_values) {
    parallel(plan.heads, [&](size_t head) { combine(call, blocks, head); });
  }
  return call.failed ? kRefused : nullptr;
}

// Whether the table has what any problem of this type and order needs.
bool has_kernels(const AttentionKernels& kernels, const AttentionProblem& p, int order) {
  const int i = static_cast<int>(p.dtype), of_bias = static_cast<int>(p.bias_dtype);
  const int in_place = static_cast<int>(p.kv_dtype), packed = static_cast<int>(packed_dtype(p.kv_dtype));
  const AttentionKernels::Format& format = kernels.of(format_of(p, kernels));
  return format.pack_queries[i] && format.pack_keys[packed] && format.pack_values[packed] && format.score &&
         format.weigh[order] && kernels.of(AttentionFormat::kFloat32).weigh[order] && format.accumulate &&
         kernels.finish[i] && kernels.convert_query[i] && kernels.score_in_place[in_place] &&
         kernels.accumulate_in_place[in_place] && kernels.multiply && kernels.soft_cap[order] &&
         kernels.add_bias[of_bias] && kernels.apply_mask;
}

}  // namespace

const char* run_attention_in_parallel(const AttentionProblem& p, const AttentionKernels& kernels,
                                      int order_index, ParallelFor parallel) {
  if (order_index < 0 || order_index >= kMaxOrder) return "the order is outside 1 to 5";
  if (p.batch == 0 || p.query_length == 0 || p.query_heads == 0) return nullptr;
  if (p.kv_heads == 0 || p.query_heads % p.kv_heads != 0) {
    return "the number of query heads is not a multiple of the number of key/value heads";
  }
  if (!has_kernels(kernels, p, order_index)) return kNoKernel;
  if (p.key_length == 0) {
    run_without_keys(p);
    return nullptr;
  }
  AttentionCall call(p, kernels, format_of(p, kernels), order_index);
  const char* const error = run(call, parallel);
  if (error || !call.lacks_values) return error;
  AttentionCall again(p, kernels, AttentionFormat::kFloat32, order_index);
  return run(again, parallel);
}

const char* run_attention(const AttentionProblem& p, const AttentionKernels& kernels, int order_index,
                          ParallelFor parallel) {
  if (is_small(p)) return run_attention_in_parallel(p, kernels, order_index, in_order);
  return run_attention_in_parallel(p, kernels, order_index, parallel);
}

}  // namespace quake
