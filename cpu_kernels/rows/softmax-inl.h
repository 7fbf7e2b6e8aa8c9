// Softmax, log-softmax and log-sum-exp over the rows of a matrix. Included inside an instruction set's
// namespace.
//
// Per row: maximum; exponentials and their sum; the result. The maximum is taken of the given values, so
// logits of any size subtract to at most 0 and no finite row gives NaN. A NaN in a row, an infinite maximum
// and a row of -inf make the subtraction or the sum NaN, and with it the whole row, as in jax.nn.softmax.

// The rounding error of a sum stays below the exponential's own, whatever its length: a running sum is flushed
// into a second one after kSumBlock elements, and that into one in double precision after kTile.
constexpr std::size_t kSumBlock = 256 * kLanes;
// Where the exponentials of a batch of rows wait for their sum: float32 rows of whole vectors in the output
// itself; others in a tile in L1 whose rows are aligned and padded to whole vectors, since 16-bit types would
// be rounded twice in their output, and rows that straddle cache lines are slow to store and load again (-13 %
// at 197 columns).
constexpr std::size_t kTile = 4096;
constexpr std::size_t kBatch = 8;

// e^difference, for a difference of at most 0 (log-sum-exp: or inf). A constant factor does not cancel in a
// logarithm.
template <Reduction R, int Order>
QUAKE_INLINE vf weight(vf difference) {
  if constexpr (R == Reduction::kSoftmax) return softmax_weight<Order>(difference);
  constexpr Range kRange = R == Reduction::kLogSumExp ? Range::kAny : Range::kNoOverflow;
  return exp_product<Order, kRange>(difference, set1(kUnit<Order>));
}

// Calls pair(i, k) for each two vectors of a row, k being 0 and 1 in turn so that two sums can run side by
// side, and then single(i, n) for each vector that is left, with n elements.
template <class OfPair, class OfSingle>
QUAKE_INLINE void for_each_vector(std::size_t columns, const OfPair& pair, const OfSingle& single) {
  std::size_t i = 0;
  for (; i + 4 * kLanes <= columns; i += 4 * kLanes) {
    pair(i, 0);
    pair(i + 2 * kLanes, 1);
  }
  for (; i < columns; i += kLanes) single(i, columns - i < kLanes ? columns - i : kLanes);
}

// The maximum of a row, gathered in vectors.
struct Maximum {
  vf m[4] = {set1(-kInfinity), set1(-kInfinity), set1(-kInfinity), set1(-kInfinity)};

  QUAKE_INLINE_MEMBER void add(Pair x, int k) {
    m[2 * k] = max_skip_nan(m[2 * k], x.first);
    m[2 * k + 1] = max_skip_nan(m[2 * k + 1], x.second);
  }
  QUAKE_INLINE_MEMBER void add(vf x, std::size_t n) { m[0] = max_skip_nan(m[0], keep_up_to(x, n, -kInfinity)); }
  QUAKE_INLINE_MEMBER vf result() const {
    return set1(reduce_max(max_skip_nan(max_skip_nan(m[0], m[1]), max_skip_nan(m[2], m[3]))));
  }
};

template <class T>
QUAKE_INLINE vf row_maximum(const T* x, std::size_t columns) {
  Maximum maximum;
  for_each_vector(
      columns, [&](std::size_t i, int k) { maximum.add(load_pair(x + i), k); },
      [&](std::size_t i, std::size_t n) { maximum.add(load_up_to(x + i, n), n); });
  return maximum.result();
}

// v where it is finite, else 0.
QUAKE_INLINE vf finite_or_zero(vf v) { return as_float(as_int(v) & ((as_int(v) & 0x7f800000) != 0x7f800000)); }

// The sum of the exponentials of a row. They are kept in e unless that is null.
// Meanwhile the cache lines of the row at `soon` are fetched (a prefetch of an address past the input is
// harmless): the next steps are all loads and stores, this one leaves the memory idle.
template <Reduction R, int Order, class T>
QUAKE_INLINE float row_exp(const T* x, float* e, std::size_t columns, vf maximum, const T* soon) {
  vf total = vf{};
  for (std::size_t begin = 0; begin < columns; begin += kSumBlock) {
    const std::size_t length = columns - begin < kSumBlock ? columns - begin : kSumBlock;
    vf s[4] = {};
    for_each_vector(
        length,
        [&](std::size_t i, int k) {
          const Pair v = load_pair(x + begin + i);
          const vf first = weight<R, Order>(v.first - maximum);
          const vf second = weight<R, Order>(v.second - maximum);
          if (e) {
            store(e + begin + i, first);
            store(e + begin + i + kLanes, second);
          }
          __builtin_prefetch(soon + begin + i);
          if (sizeof(T) * 2 * kLanes > kCacheLine) __builtin_prefetch(soon + begin + i + kLanes);
          s[2 * k] += first;
          s[2 * k + 1] += second;
        },
        [&](std::size_t i, std::size_t n) {
          const vf v = weight<R, Order>(load_up_to(x + begin + i, n) - maximum);
          if (e) store_up_to(e + begin + i, v, n);
          __builtin_prefetch(soon + begin + i);
          s[0] += keep_up_to(v, n, 0.0f);
        });
    total += (s[0] + s[1]) + (s[2] + s[3]);
  }
  return reduce_add(total);
}

// log(sum) of a positive, normal, finite sum; NaN of NaN. A call of logf would spill all vector registers.
QUAKE_INLINE vf log_of_sum(vf sum) {
  constexpr float kLn2 = 0.693147181f;
  const vi bits = as_int(sum);
  const vf exponent = as_float((bits >> 23) + 0x4b000000) - (0x1p23f + 127);
  const vf m = as_float((bits & 0x7fffff) | 0x3f800000) - 1.0f;
  return fma(exponent, set1(kLn2), m * log1p_over_e<5>(m)) + sum * 0.0f;
}

// The last step: y = e * factor for softmax, with factor = 1/sum, and y = (x - maximum) - log_sum for
// log-softmax.
template <Reduction R>
QUAKE_INLINE vf last_step(vf value, vf maximum, vf factor_or_log_sum) {
  return R == Reduction::kSoftmax ? value * factor_or_log_sum : (value - maximum) - factor_or_log_sum;
}
template <Reduction R>
QUAKE_INLINE vf factor_or_log_sum(float sum) {
  if constexpr (R == Reduction::kSoftmax) return set1(1.0f / sum);
  return log_of_sum(set1(sum));
}

// The last step of a row, from values that are the kept exponentials or the row itself, and the maximum of a
// row to come in the same loop: one waits for stores, the other for loads.
template <Reduction R, class Value, class T>
QUAKE_INLINE vf finish_row(const Value* values, T* y, const T* next, std::size_t columns, vf maximum, vf last,
                           bool streamed) {
  Maximum next_maximum;
  for_each_vector(
      columns,
      [&](std::size_t i, int k) {
        const Pair v = load_pair(values + i);
        store_pair(y + i, {last_step<R>(v.first, maximum, last), last_step<R>(v.second, maximum, last)},
                   streamed);
        next_maximum.add(load_pair(next + i), k);
      },
      [&](std::size_t i, std::size_t n) {
        store_up_to(y + i, last_step<R>(load_up_to(values + i, n), maximum, last), n);
        next_maximum.add(load_up_to(next + i, n), n);
      });
  return next_maximum.result();
}

// Rows longer than the tile are read in pieces of its length, the maximum and the exponentials of a piece from
// L1. The sums of the pieces, each relative to its own maximum, are combined.
struct LongSum {
  double maximum = -0x1.fffffep127;  // not -inf, from which nothing can be subtracted
  double sum = 0;

  QUAKE_INLINE_MEMBER void add(float piece_maximum, float piece_sum) {
    if (piece_maximum > maximum) {
      sum *= __builtin_exp(maximum - piece_maximum);
      maximum = piece_maximum;
      sum += piece_sum;
    } else {
      sum += piece_sum * __builtin_exp(piece_maximum - maximum);
    }
  }
};

// The exponentials of rows of up to so many pieces are kept in the output, if that is float32, until the sum is
// known: such rows stay in L2. Those of others are computed again.
constexpr std::size_t kKeptPieces = 32;

// y = step(value) for the values of a piece.
template <class T, class Value, class Step>
QUAKE_INLINE void long_piece(const Value* values, T* y, std::size_t length, bool streamed, const Step& step) {
  for_each_vector(
      length,
      [&](std::size_t i, int) {
        const Pair v = load_pair(values + i);
        store_pair(y + i, {step(v.first), step(v.second)}, streamed);
      },
      [&](std::size_t i, std::size_t n) { store_up_to(y + i, step(load_up_to(values + i, n)), n); });
}

template <Reduction R, int Order, class T>
[[gnu::noinline]] void long_row(const T* x, T* y, std::size_t columns, bool streamed) {
  float maxima[kKeptPieces];
  const bool keep =
      R == Reduction::kSoftmax && sizeof(T) == sizeof(float) && columns <= kKeptPieces * kTile && !streamed;
  LongSum total;
  for (std::size_t begin = 0, piece = 0; begin < columns; begin += kTile, ++piece) {
    const std::size_t length = columns - begin < kTile ? columns - begin : kTile;
    // A piece of -inf alone has the exponentials 0.
    const vf maximum = clamp_below(row_maximum(x + begin, length), -0x1.fffffep127f);
    float* e = keep ? reinterpret_cast<float*>(y) + begin : nullptr;
    // Where nothing is stored yet, the output's lines are fetched meanwhile: exponentials leave time for it.
    const T* soon = keep || streamed ? x + begin + length : y + begin;
    const float sum = row_exp<R, Order>(x + begin, e, length, maximum, soon);
    if (keep) maxima[piece] = maximum[0];
    total.add(maximum[0], sum);
  }
  const float largest = static_cast<float>(total.maximum);
  const vf last = factor_or_log_sum<R>(static_cast<float>(total.sum));
  for (std::size_t begin = 0, piece = 0; begin < columns; begin += kTile, ++piece) {
    const std::size_t length = columns - begin < kTile ? columns - begin : kTile;
    if (keep) {
      const vf factor = last * __builtin_expf(maxima[piece] - largest);
      long_piece<T>(reinterpret_cast<float*>(y) + begin, y + begin, length, streamed,
                    [&](vf e) { return e * factor; });
    } else {
      const vf maximum = set1(largest);
      long_piece<T>(x + begin, y + begin, length, streamed, [&](vf v) {
        if constexpr (R == Reduction::kSoftmax) return weight<R, Order>(v - maximum) * last;
        return last_step<R>(v, maximum, last);
      });
    }
  }
}

// Rows of at most kShort vectors: the values stay in registers. The maximum is taken one row ahead, because
// instructions that wait for it would fill the processor's queues. V is the number of vectors of a row, the
// last of which may be partial.
template <class T>
constexpr int kShort = kRegisters / 2 - 2;
// Taking the maximum apart means converting twice, which costs bfloat16 more than it gains (measured).
template <>
constexpr int kShort<bfloat16> = 2;

template <int V, class T>
QUAKE_INLINE void load_short(const T* x, vf (&v)[V], std::size_t last) {
  constexpr int kPaired = (V - 1) / 2 * 2;
#pragma GCC unroll 16
  for (int i = 0; i < kPaired; i += 2) {
    const Pair p = load_pair(x + i * kLanes);
    v[i] = p.first;
    v[i + 1] = p.second;
  }
  if constexpr (V - 1 > kPaired) v[V - 2] = load(x + (V - 2) * kLanes);
  v[V - 1] = keep_up_to(load_up_to(x + (V - 1) * kLanes, last), last, -kInfinity);
}

template <int V, class T>
QUAKE_INLINE vf short_maximum(const T* x, std::size_t last) {
  vf v[V];
  load_short(x, v, last);
#pragma GCC unroll 16
  for (int step = 1; step < V; step *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i + step < V; i += 2 * step) v[i] = max_skip_nan(v[i], v[i + step]);
  }
  return set1(reduce_max(v[0]));
}

template <Reduction R, int V, int Order, class T>
QUAKE_INLINE void short_row(const T* x, T* y, std::size_t last, vf maximum, bool streamed) {
  constexpr int kPaired = (V - 1) / 2 * 2;
  vf v[V], s[4] = {};
  load_short(x, v, last);
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) {
    const vf e = weight<R, Order>(v[i] - maximum);
    if constexpr (R == Reduction::kSoftmax) v[i] = e;
    s[i % 4] += e;
  }
  const vf end = factor_or_log_sum<R>(reduce_add((s[0] + s[1]) + (s[2] + s[3])));
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) v[i] = last_step<R>(v[i], maximum, end);
#pragma GCC unroll 16
  for (int i = 0; i < kPaired; i += 2) store_pair(y + i * kLanes, {v[i], v[i + 1]}, streamed);
  if constexpr (V - 1 > kPaired) store(y + (V - 2) * kLanes, v[V - 2]);
  store_up_to(y + (V - 1) * kLanes, v[V - 1], last);
}

template <Reduction R, int V, int Order, class T>
[[gnu::noinline]] void short_rows(const T* x, T* y, std::size_t rows, std::size_t columns, bool streamed) {
  const std::size_t last = columns - (V - 1) * kLanes;
  vf maximum = short_maximum<V>(x, last);
  for (std::size_t row = 0; row < rows; ++row, x += columns, y += columns) {
    const vf next = short_maximum<V>(row + 1 < rows ? x + columns : x, last);
    short_row<R, V, Order>(x, y, last, maximum, streamed);
    maximum = next;
  }
}

// Calls short_rows() for the number of vectors that the columns need, which is at least V.
template <Reduction R, int V, int Order, class T>
QUAKE_INLINE void dispatch_short_rows(const T* x, T* y, std::size_t rows, std::size_t columns, bool streamed) {
  if constexpr (V <= kShort<T>) {
    if (columns <= V * kLanes) {
      short_rows<R, V, Order>(x, y, rows, columns, streamed);
    } else {
      dispatch_short_rows<R, V + 1, Order>(x, y, rows, columns, streamed);
    }
  }
}

// Each step is done for a batch of rows before the next step begins: the reductions at the end of a step are
// long chains of dependent instructions, and those of different rows overlap.
template <Reduction R, int Order, class T>
QUAKE_INLINE void batched_rows(const T* x, T* y, std::size_t rows, std::size_t columns, bool streamed) {
  alignas(kCacheLine) float tile[kTile];
  vf maximum[kBatch];
  float sum[kBatch];
  const std::size_t stride = round_up(columns, kLanes), fitting = kTile / stride;
  const std::size_t batch = fitting < 1 ? 1 : fitting < kBatch ? fitting : kBatch;
  // bfloat16 keeps its own order of elements in a Pair, so the tile is written and read in that order.
  const bool in_place = sizeof(T) == sizeof(float) && stride == columns && !streamed;
  for (std::size_t r = 0; r < batch && r < rows; ++r) {
    maximum[r] = row_maximum(x + r * columns, columns);
  }
  for (std::size_t row = 0; row < rows; row += batch, x += batch * columns, y += batch * columns) {
    float* e = R != Reduction::kSoftmax ? nullptr : in_place ? reinterpret_cast<float*>(y) : tile;
    const std::size_t n = rows - row < batch ? rows - row : batch;
    for (std::size_t r = 0; r < n; ++r) {
      sum[r] = row_exp<R, Order>(x + r * columns, e ? e + r * stride : e, columns, maximum[r],
                                 x + (r + batch) * columns);
    }
    for (std::size_t r = 0; r < n; ++r) {
      // The row that takes this one's place in the next batch; at the end, any row that exists.
      const T* next = x + (row + r + batch < rows ? r + batch : r) * columns;
      const vf last = factor_or_log_sum<R>(sum[r]);
      if constexpr (R == Reduction::kSoftmax) {
        maximum[r] = finish_row<R>(e + r * stride, y + r * columns, next, columns, maximum[r], last, streamed);
      } else {
        maximum[r] = finish_row<R>(x + r * columns, y + r * columns, next, columns, maximum[r], last, streamed);
      }
    }
  }
}

template <Reduction R, class T, int Order>
void reduce_rows(const void* in, void* out, std::size_t rows, std::size_t columns, Stores stores) {
  const T* x = static_cast<const T*>(in);
  T* y = static_cast<T*>(out);
  if (rows == 0) return;  // short rows are read one ahead
  const bool streamed = streamable(y, columns, stores);
  if (columns <= kShort<T> * kLanes) {
    dispatch_short_rows<R, 1, Order>(x, y, rows, columns, streamed);
  } else if (columns <= kTile) {
    batched_rows<R, Order>(x, y, rows, columns, streamed);
  } else {
    for (std::size_t row = 0; row < rows; ++row, x += columns, y += columns) {
      long_row<R, Order>(x, y, columns, streamed);
    }
  }
  if (streamed) stream_fence();
}

// The sum of the exponentials of a row of any length.
template <int Order, class T>
QUAKE_INLINE float log_sum_exp_sum(const T* x, std::size_t columns, vf maximum) {
  double sum = 0;
  for (std::size_t begin = 0; begin < columns; begin += kTile) {
    const std::size_t length = columns - begin < kTile ? columns - begin : kTile;
    sum += row_exp<Reduction::kLogSumExp, Order>(x + begin, nullptr, length, maximum, x + begin);
  }
  return static_cast<float>(sum);
}

// maximum + log(sum). An infinite maximum is not subtracted: the exponentials are then 0 or inf, and the
// logarithm gives what it should.
template <class T, int Order>
void log_sum_exp_rows(const void* in, void* out, std::size_t rows, std::size_t columns, Stores) {
  const T* x = static_cast<const T*>(in);
  T* y = static_cast<T*>(out);
  vf maximum[kBatch];
  for (std::size_t row = 0; row < rows; row += kBatch, x += kBatch * columns) {
    const std::size_t n = rows - row < kBatch ? rows - row : kBatch;
    vf result = vf{};
    for (std::size_t r = 0; r < n; ++r) {
      maximum[r] = finite_or_zero(row_maximum(x + r * columns, columns));
    }
    for (std::size_t r = 0; r < n; ++r) {
      const float sum = log_sum_exp_sum<Order>(x + r * columns, columns, maximum[r]);
      result = maximum[r] + set1(__builtin_logf(sum));
      store_partial(y + row + r, result, 1);
    }
  }
}
