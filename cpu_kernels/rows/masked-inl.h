// Softmax and log-softmax over those elements of each row that a mask keeps. Included inside an instruction
// set's namespace, after softmax-inl.h.
//
// A masked element counts as -inf, whatever it is, and its result is 0 (log-softmax: -inf). The result of a
// row without any element is that in all places.

// The first n elements at p where the mask's bytes are not 0, and `fill` in the other lanes.
template <class T>
QUAKE_INLINE vf load_kept(const T* p, const unsigned char* mask, std::size_t n, float fill) {
  return keep_where(load_up_to(p, n), mask, n, fill);
}

template <Reduction R, class T, int Order>
void reduce_masked_rows(const void* in, const unsigned char* masks, const std::size_t* mask_offsets, void* out,
                        std::size_t rows, std::size_t columns) {
  const T* x = static_cast<const T*>(in);
  T* y = static_cast<T*>(out);
  constexpr float kMasked = R == Reduction::kSoftmax ? 0.0f : -kInfinity;
  const auto up_to = [&](std::size_t i) -> std::size_t { return columns - i < kLanes ? columns - i : kLanes; };
  for (std::size_t row = 0; row < rows; ++row, x += columns, y += columns) {
    const unsigned char* mask = masks + mask_offsets[row];
    vf m = set1(-kInfinity);
    for (std::size_t i = 0; i < columns; i += kLanes) {
      m = max_skip_nan(m, load_kept(x + i, mask + i, up_to(i), -kInfinity));
    }
    const vf maximum = set1(reduce_max(m));
    double total = 0;
    constexpr std::size_t kBlock = kSumBlock / 4;  // there is one sum here, not four
    for (std::size_t piece = 0; piece < columns; piece += kTile) {
      const std::size_t piece_end = columns - piece < kTile ? columns : piece + kTile;
      vf piece_sum = vf{};
      for (std::size_t begin = piece; begin < piece_end; begin += kBlock) {
        const std::size_t end = piece_end - begin < kBlock ? piece_end : begin + kBlock;
        vf sum = vf{};
        for (std::size_t i = begin; i < end; i += kLanes) {
          const vf kept = load_kept(x + i, mask + i, up_to(i), -kInfinity);
          sum += keep_where(weight<R, Order>(kept - maximum), mask + i, up_to(i), 0.0f);
        }
        piece_sum += sum;
      }
      total += reduce_add(piece_sum);
    }
    const vf last = factor_or_log_sum<R>(static_cast<float>(total));
    for (std::size_t i = 0; i < columns; i += kLanes) {
      vf v = load_kept(x + i, mask + i, up_to(i), -kInfinity);
      if constexpr (R == Reduction::kSoftmax) v = weight<R, Order>(v - maximum);
      v = keep_where(last_step<R>(v, maximum, last), mask + i, up_to(i), kMasked);
      store_up_to(y + i, v, up_to(i));
    }
  }
}
