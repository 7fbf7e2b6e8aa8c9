// The loops that map a functor of activations.h over arrays. Included inside an instruction set's namespace.

// Four independent vectors at a time hide the latency of the polynomial.
template <class Functor, class T, int Order>
void map(const void* in, void* out, std::size_t count, Stores stores) {
  const T* x = static_cast<const T*>(in);
  T* y = static_cast<T*>(out);
  const bool streamed = streamable(y, 0, stores);
  std::size_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    Pair v[2] = {load_pair(x + i), load_pair(x + i + 2 * kLanes)};
#pragma GCC unroll 2
    for (Pair& pair : v) {
      pair = {Functor::template apply<Order>(pair.first), Functor::template apply<Order>(pair.second)};
    }
    store_pair(y + i, v[0], streamed);
    store_pair(y + i + 2 * kLanes, v[1], streamed);
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
  std::size_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Pair u = load_pair(a + i), v = load_pair(b + i);
    store_pair(
        y + i,
        {Functor::template apply<Order>(u.first, v.first), Functor::template apply<Order>(u.second, v.second)},
        streamed);
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
