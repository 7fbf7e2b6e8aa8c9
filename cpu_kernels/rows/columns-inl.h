// Softmax, log-softmax and log-sum-exp over the columns of a matrix: an axis that is not the last.
// Neighbouring columns are processed side by side, one in each lane, so nothing is transposed and no lane is
// reduced. Included inside an instruction set's namespace, after softmax-inl.h.

// The sum of step(p) over at most kTile rows p, in blocks as in kSumBlock.
template <class T, class Step>
QUAKE_INLINE vf piece_down(const T* p, std::size_t length, std::size_t stride, const Step& step) {
  vf total = vf{};
  for (std::size_t begin = 0; begin < length;) {
    const std::size_t end = length - begin < 64 ? length : begin + 64;
    vf sum = vf{};
    for (; begin < end; ++begin, p += stride) sum += step(p);
    total += sum;
  }
  return total;
}

// The same of any number of rows: the sums of pieces are added in double precision.
template <class T, class Step>
QUAKE_INLINE vf sum_down(const T* p, std::size_t length, std::size_t stride, const Step& step) {
  double totals[kLanes] = {};
  for (std::size_t begin = 0; begin < length; begin += kTile) {
    const std::size_t piece = length - begin < kTile ? length - begin : kTile;
    const vf sum = piece_down(p + begin * stride, piece, stride, step);
    if (piece == length) return sum;
    for (int lane = 0; lane < kLanes; ++lane) totals[lane] += sum[lane];
  }
  vf total = vf{};
  for (int lane = 0; lane < kLanes; ++lane) total[lane] = static_cast<float>(totals[lane]);
  return total;
}

template <Reduction R, int Order, class T>
QUAKE_INLINE void reduce_column_vector(const T* x, T* y, std::size_t length, std::size_t stride,
                                       std::size_t n) {
  vf maximum = set1(-kInfinity);
  for (std::size_t i = 0; i < length; ++i) {
    maximum = max_skip_nan(maximum, load_up_to(x + i * stride, n));
  }
  if constexpr (R == Reduction::kLogSumExp) maximum = finite_or_zero(maximum);
  const vf sum =
      sum_down(x, length, stride, [&](const T* p) { return weight<R, Order>(load_up_to(p, n) - maximum); });
  vf last;
  if constexpr (R == Reduction::kSoftmax) {
    last = 1.0f / sum;
  } else {
    for (int lane = 0; lane < kLanes; ++lane) last[lane] = __builtin_logf(sum[lane]);
  }
  if constexpr (R == Reduction::kLogSumExp) {
    store_up_to(y, maximum + last, n);
    return;
  }
  for (std::size_t i = 0; i < length; ++i) {
    vf v = load_up_to(x + i * stride, n);
    if constexpr (R == Reduction::kSoftmax) v = weight<R, Order>(v - maximum);
    store_up_to(y + i * stride, last_step<R>(v, maximum, last), n);
  }
}

template <Reduction R, class T, int Order>
void reduce_columns(const void* in, void* out, std::size_t length, std::size_t stride, std::size_t columns) {
  const T* x = static_cast<const T*>(in);
  T* y = static_cast<T*>(out);
  std::size_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    reduce_column_vector<R, Order>(x + c, y + c, length, stride, kLanes);
  }
  if (c < columns) reduce_column_vector<R, Order>(x + c, y + c, length, stride, columns - c);
}
