// What is done to scores before softmax: the scales of keys, the soft cap, bias, mask; and to weights: those of
// values. Included inside an instruction set's namespace, after core/tanh-inl.h.

template <int Order>
void soft_cap(float* scores, std::size_t rows, std::size_t count, float cap) {
  const float inverse = 1.0f / cap;
  for (std::size_t r = 0; r < rows; ++r, scores += kScoreStride) {
    for (std::size_t i = 0; i < count; i += kLanes) {
      store(scores + i, Tanh::apply<Order>(load(scores + i) * inverse) * cap);
    }
  }
}

template <class T>
void add_bias(float* scores, const void* bias, std::ptrdiff_t stride, std::size_t count) {
  const T* b = static_cast<const T*>(bias);
  for (std::size_t i = 0; i < count; i += kLanes) {
    const std::size_t n = count - i < kLanes ? count - i : kLanes;
    vf v;
    if (stride == 1) {
      v = load_up_to(b + i, n);
    } else {
      T gathered[kLanes] = {};
      for (std::size_t j = 0; j < n; ++j) gathered[j] = b[static_cast<std::ptrdiff_t>(i + j) * stride];
      v = load(gathered);
    }
    store(scores + i, load(scores + i) + v);
  }
}

inline void multiply(float* scores, const float* factors, std::size_t count) {
  for (std::size_t i = 0; i < count; i += kLanes) {
    const std::size_t n = count - i < kLanes ? count - i : kLanes;
    store(scores + i, load(scores + i) * load_up_to(factors + i, n));
  }
}

inline void apply_mask(float* scores, const unsigned char* mask, std::size_t count, float fill) {
  for (std::size_t i = 0; i < count; i += kLanes) {
    const std::size_t n = count - i < kLanes ? count - i : kLanes;
    store(scores + i, keep_where(load(scores + i), mask + i, n, fill));
  }
}
