// Softmax over the rows of a matrix. Included inside an instruction set's namespace.
//
// Per row: maximum; exponentials, kept, and their sum; scaling. The maximum is taken of the given values, so
// logits of any size subtract to at most 0 and no finite row gives NaN. A NaN in a row, an infinite maximum
// and a row of -inf make the subtraction or the sum NaN, and with it the whole row, as in jax.nn.softmax.

constexpr float kInfinity = __builtin_inff();
constexpr std::size_t kGroup = 4 * kLanes;  // independent vectors per iteration hide latency
// A running sum is flushed into a second one after this many elements, so that the rounding error of a row
// of a million elements stays below the exponential's own.
constexpr std::size_t kSumBlock = 64 * kGroup;
// Where the exponentials of a batch of rows wait for their sum: float32 rows of whole vectors in the output
// itself; others in a tile in L1 whose rows are aligned and padded to whole vectors, since 16-bit types would be
// rounded twice in their output, and rows that straddle cache lines are slow to store and load again (-13 % at
// 197 columns).
constexpr std::size_t kTile = 4096;
constexpr std::size_t kBatch = 8;

template <int Order>
QUAKE_INLINE vf softmax_exp(vf x, vf maximum) {
  return exp_product<Order>(x - maximum, set1(kUnit<Order>), NoCorrection{},
                            constants::kSoftmaxShift);
}

// Calls body(i, vector_index) for each full vector and tail(i, n) for the rest of a row.
template <class Body, class Tail>
QUAKE_INLINE void for_each_vector(std::size_t columns, const Body& body, const Tail& tail) {
  std::size_t i = 0;
  for (; i + kGroup <= columns; i += kGroup) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) body(i + k * kLanes, k);
  }
  for (; i + kLanes <= columns; i += kLanes) body(i, 0);
  if (i < columns) tail(i, columns - i);
}

template <class T>
QUAKE_INLINE vf row_maximum(const T* x, std::size_t columns) {
  vf m[4] = {set1(-kInfinity), set1(-kInfinity), set1(-kInfinity), set1(-kInfinity)};
  for_each_vector(
      columns, [&](std::size_t i, int k) { m[k] = max_skip_nan(m[k], load(x + i)); },
      [&](std::size_t i, std::size_t n) {
        m[1] = max_skip_nan(m[1], keep_first(load_partial(x + i, n), n, -kInfinity));
      });
  return set1(reduce_max(max_skip_nan(max_skip_nan(m[0], m[1]), max_skip_nan(m[2], m[3]))));
}

// The sum of the exponentials of a row. They are kept in e, whole vectors of them, unless e is null. The
// output's cache lines are fetched meanwhile: the stores of the last step come too fast to wait for them.
template <int Order, class T>
QUAKE_INLINE float row_exp(const T* x, float* e, T* y, std::size_t columns, vf maximum) {
  vf total = vf{};
  for (std::size_t begin = 0; begin < columns; begin += kSumBlock) {
    const std::size_t length = columns - begin < kSumBlock ? columns - begin : kSumBlock;
    vf s[4] = {};
    for_each_vector(
        length,
        [&](std::size_t i, int k) {
          const vf v = softmax_exp<Order>(load(x + begin + i), maximum);
          if (e) store(e + begin + i, v);
          if ((void*)e != (void*)y) __builtin_prefetch(y + begin + i, 1);
          s[k] += v;
        },
        [&](std::size_t i, std::size_t n) {
          const vf v = softmax_exp<Order>(load_partial(x + begin + i, n), maximum);
          if (e) store(e + begin + i, v);
          s[1] += keep_first(v, n, 0.0f);
        });
    total += (s[0] + s[1]) + (s[2] + s[3]);
  }
  return reduce_add(total);
}

template <class T>
QUAKE_INLINE void scale_row(const float* e, T* y, std::size_t columns, vf factor) {
  for_each_vector(
      columns, [&](std::size_t i, int) { store(y + i, load(e + i) * factor); },
      [&](std::size_t i, std::size_t n) { store_partial(y + i, load(e + i) * factor, n); });
}

// The last step of a row too long for the tile: the exponentials are computed again.
template <int Order, class T>
QUAKE_INLINE void exp_and_scale_row(const T* x, T* y, std::size_t columns, vf maximum, vf factor) {
  for_each_vector(
      columns,
      [&](std::size_t i, int) {
        store(y + i, softmax_exp<Order>(load(x + i), maximum) * factor);
      },
      [&](std::size_t i, std::size_t n) {
        store_partial(y + i, softmax_exp<Order>(load_partial(x + i, n), maximum) * factor, n);
      });
}

// Each step is done for a batch of rows before the next step begins: the reductions at the end of a step are
// long chains of dependent instructions, and those of different rows overlap.
template <class T, int Order>
void softmax(const void* in, void* out, std::size_t rows, std::size_t columns) {
  const T* x = static_cast<const T*>(in);
  T* y = static_cast<T*>(out);
  if (columns > kTile) {
    for (std::size_t row = 0; row < rows; ++row, x += columns, y += columns) {
      const vf maximum = row_maximum(x, columns);
      const float sum = row_exp<Order>(x, nullptr, y, columns, maximum);
      exp_and_scale_row<Order>(x, y, columns, maximum, set1(1.0f / sum));
    }
    return;
  }
  alignas(64) float tile[kTile];
  vf maximum[kBatch];
  float sum[kBatch];
  const std::size_t stride = (columns + kLanes - 1) / kLanes * kLanes;
  const bool in_place = sizeof(T) == sizeof(float) && stride == columns;
  const std::size_t fitting = kTile / stride, batch = fitting < kBatch ? fitting : kBatch;
  for (std::size_t row = 0; row < rows; row += batch, x += batch * columns, y += batch * columns) {
    float* e = in_place ? reinterpret_cast<float*>(y) : tile;
    const std::size_t n = rows - row < batch ? rows - row : batch;
    for (std::size_t r = 0; r < n; ++r) maximum[r] = row_maximum(x + r * columns, columns);
    for (std::size_t r = 0; r < n; ++r) {
      sum[r] = row_exp<Order>(x + r * columns, e + r * stride, y + r * columns, columns, maximum[r]);
    }
    for (std::size_t r = 0; r < n; ++r) {
      scale_row(e + r * stride, y + r * columns, columns, set1(1.0f / sum[r]));
    }
  }
}
