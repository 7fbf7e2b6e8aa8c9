// The problem that fused attention solves, in plain types. The semantics are those of
// jax.nn.dot_product_attention.

#ifndef QUAKE_ATTENTION_PROBLEM_H_
#define QUAKE_ATTENTION_PROBLEM_H_

#include <cstddef>
#include <cstdint>

#include "attention/kernels.h"
#include "core/work.h"

namespace quake {

// What a masked logit is replaced with, as in jax.nn: finite, so that a row without any kept key is the mean
// of all values.
inline constexpr float kMaskedLogit = static_cast<float>(-0.7 * 3.40282346638528859812e38);

// logits[b, n, t, s] = soft_cap(scale * q[b, t, n] · k[b, s, kv(n)]) + bias[b, n, t, s], or kMaskedLogit
// where a mask drops it; out[b, t, n] = softmax(logits[b, n, t]) · v[b, :, kv(n)].
struct AttentionProblem {
  // The last axis is contiguous, the distances of the others are given in elements: a slice of a packed
  // projection (qkv) needs no copy.
  struct Operand {
    const void* data = nullptr;
    std::ptrdiff_t batch = 0, time = 0, head = 0;
  };
  // Distances over (batch, query head, query, key), in elements; 0 where it broadcasts.
  struct Strides {
    std::ptrdiff_t batch = 0, head = 0, query = 0, key = 0;
  };

  DType dtype = DType::kFloat32;     // of q and out
  DType kv_dtype = DType::kFloat32;  // of k and v
  // What may be multiplied; where the instruction set does not, it is kFloat32.
  AttentionFormat format = AttentionFormat::kFloat32;
  std::size_t batch = 0, query_length = 0, key_length = 0;
  std::size_t query_heads = 0, kv_heads = 0;  // query head n reads key/value head n / (query_heads / kv_heads)
  std::size_t head_size = 0, value_size = 0;
  Operand query, key, value;
  // (batch, kv_heads, key_length) if k and v are int8, whose codes they multiply; else null.
  const float *key_scales = nullptr, *value_scales = nullptr;
  void* out = nullptr;        // (batch, query_length, query_heads, value_size), contiguous
  float* residual = nullptr;  // or null: (batch, query_length, query_heads), log-sum-exp of the logits
  float scale = 1;
  float soft_cap = 0;  // cap * tanh(logit / cap) before the bias; 0: none
  const void* bias = nullptr;
  DType bias_dtype = DType::kFloat32;
  Strides bias_strides;
  const unsigned char* mask = nullptr;  // a key takes part where its byte is not 0
  Strides mask_strides;
  bool is_causal = false;
  std::ptrdiff_t window_left = -1, window_right = -1;  // query t sees keys t - left … t + right; -1: no limit
  const std::int32_t* query_lengths = nullptr;         // (batch) or null: rows from there on give 0
  const std::int32_t* key_lengths = nullptr;           // (batch) or null: keys from there on are masked
  // (batch, query_length) and (batch, key_length), or both null: a query sees keys of its own segment only.
  const std::int32_t *query_segments = nullptr, *key_segments = nullptr;
};

// The distance of an element from the first.
inline std::ptrdiff_t offset(std::size_t index, std::ptrdiff_t stride) {
  return static_cast<std::ptrdiff_t>(index) * stride;
}

inline const char* advance(const void* data, std::ptrdiff_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * static_cast<std::ptrdiff_t>(element_size(dtype));
}

}  // namespace quake

#endif  // QUAKE_ATTENTION_PROBLEM_H_
