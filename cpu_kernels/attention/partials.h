// What is left of a row and a split of its keys, until the splits are joined.

#ifndef QUAKE_ATTENTION_PARTIALS_H_
#define QUAKE_ATTENTION_PARTIALS_H_

#include <cstddef>

#include "attention/kernels.h"
#include "attention/plan.h"
#include "core/memory.h"

namespace quake {

// Relative to its own maximum.
class Partial {
 public:
  struct Header {
    float maximum;
    WeightSum sum;
  };
  // The header is padded to a cache line, so that accumulators are aligned.
  static constexpr std::size_t kHeaderFloats = kCacheLine / sizeof(float);
  static_assert(sizeof(Header) <= kCacheLine);

  explicit Partial(float* memory) : memory_(memory) {}
  Header& header() const { return *reinterpret_cast<Header*>(memory_); }
  float* accumulators() const { return memory_ + kHeaderFloats; }

 private:
  float* memory_;
};

// Of all rows and splits of a call.
class Partials {
 public:
  // Returns false if memory is refused.
  bool build(const Plan& plan) {
    rows_ = plan.rows;
    splits_ = plan.splits;
    stride_ = Partial::kHeaderFloats + plan.padded_value_size;
    memory_ = allocate(plan.heads * rows_ * splits_ * stride_ * sizeof(float));
    return memory_ != nullptr;
  }
  bool any() const { return memory_ != nullptr; }

  // `head` counts the key/value heads of all batch elements.
  Partial at(std::size_t head, std::size_t row, std::size_t split) const {
    return Partial(reinterpret_cast<float*>(memory_.get()) +
                   ((head * rows_ + row) * splits_ + split) * stride_);
  }
  // In floats, from a row to the next one's of the same split.
  std::size_t row_stride() const { return splits_ * stride_; }
  std::size_t size() const { return stride_; }

 private:
  std::size_t rows_ = 0, splits_ = 0, stride_ = 0;
  Bytes memory_;
};

}  // namespace quake

#endif  // QUAKE_ATTENTION_PARTIALS_H_
