// The loops that map a functor of activations-inl.h over arrays. Included inside an instruction set's
// namespace.

// So many independent pairs of vectors at a time hide the latency of the polynomial; more would not fit into
// the registers.
constexpr int kPairsInFlight = kRegisters / 8;

template <class Functor, class T, int Order>
void map(const void* in, void* out, std::size_t count, Stores stores) {
  constexpr std::size_t kPair = 2 * kLanes, kStep = kPairsInFlight * kPair;
  const T* x = static_cast<const T*>(in);
  T* y = static_cast<T*>(out);
  const bool streamed = streamable(y, 0, stores);
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    Pair v[kPairsInFlight];
#pragma GCC unroll 4
    for (int k = 0; k < kPairsInFlight; ++k) v[k] = load_pair(x + i + k * kPair);
#pragma GCC unroll 4
    for (Pair& pair : v) {
      pair = {Functor::template apply<Order>(pair.first), Functor::template apply<Order>(pair.second)};
    }
#pragma GCC unroll 4
    for (int k = 0; k < kPairsInFlight; ++k) store_pair(y + i + k * kPair, v[k], streamed);
  }
  for (; i + kLanes <= count; i += kLanes) {
    store(y + i, Functor::template apply<Order>(load(x + i)));
  }
  if (i < count) {
    const std::size_t n = count - i;
    store_partial(y + i, Functor::template apply<Order>(load_partial(x + i, n)), n);
  }
  if (streamed) stream_fence();
}

template <class Functor, class T, int Order>
QUAKE_INLINE void map_row(const T* a, const T* b, T* y, std::size_t count, bool streamed) {
  constexpr int kPairs = kPairsInFlight / 2;  // of either operand
  constexpr std::size_t kPair = 2 * kLanes, kStep = kPairs * kPair;
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    Pair u[kPairs], v[kPairs];
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      u[k] = load_pair(a + i + k * kPair);
      v[k] = load_pair(b + i + k * kPair);
    }
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      u[k] = {Functor::template apply<Order>(u[k].first, v[k].first),
              Functor::template apply<Order>(u[k].second, v[k].second)};
    }
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) store_pair(y + i + k * kPair, u[k], streamed);
  }
  for (; i + kLanes <= count; i += kLanes) {
    store(y + i, Functor::template apply<Order>(load(a + i), load(b + i)));
  }
  if (i < count) {
    const std::size_t n = count - i;
    const vf u = load_partial(a + i, n), v = load_partial(b + i, n);
    store_partial(y + i, Functor::template apply<Order>(u, v), n);
  }
}

template <class Functor, class T, int Order>
void map_binary(const void* a, std::size_t a_stride, const void* b, std::size_t b_stride, void* out,
                std::size_t rows, std::size_t columns, Stores stores) {
  const T *u = static_cast<const T*>(a), *v = static_cast<const T*>(b);
  T* y = static_cast<T*>(out);
  const bool streamed = streamable(y, rows > 1 ? columns : 0, stores);
  for (std::size_t row = 0; row < rows; ++row, u += a_stride, v += b_stride, y += columns) {
    map_row<Functor, T, Order>(u, v, y, columns, streamed);
  }
  if (streamed) stream_fence();
}
