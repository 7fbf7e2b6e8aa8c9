// What is done with a tile of the product before and after its activation. Included inside an instruction set's
// namespace, after words-inl.h.

template <class = void>
void scale_tile(float* tile, const DenseScale& s) {
  for (std::size_t r = 0; r < s.rows; ++r, tile += s.columns) {
    const vf row_scale = set1(s.row_scales ? s.row_scales[r] : 1.0f);
    const vi zero = (s.integers ? s.row_zeros[r] : 0) - vi{};
    for (std::size_t j = 0; j < s.valid; j += kLanes) {
      const std::size_t n = s.valid - j < kLanes ? s.valid - j : kLanes;
      vf v = load(tile + j);
      if (s.integers) {
        vi sums;
        std::memcpy(&sums, s.column_sums + j, sizeof sums);
        v = to_float(as_int(v) - zero * sums) * (row_scale * load(s.column_scales + j));
      } else {
        if (s.column_scales) v *= load(s.column_scales + j);
        if (s.row_scales) v *= row_scale;
      }
      if (s.bias) v += load_up_to(s.bias + j, n);
      store(tile + j, v);
    }
  }
}

template <class T>
void store_tile(const float* tile, const float* gate, std::size_t tile_stride, std::size_t rows,
                std::size_t columns, const void* residual, void* out, std::size_t out_stride) {
  const T* added = static_cast<const T*>(residual);
  T* to = static_cast<T*>(out);
  for (std::size_t r = 0; r < rows; ++r, tile += tile_stride, to += out_stride) {
    for (std::size_t j = 0; j < columns; j += kLanes) {
      const std::size_t n = columns - j < kLanes ? columns - j : kLanes;
      vf v = load(tile + j);
      if (gate) v *= load(gate + r * tile_stride + j);
      if (added) v += load_up_to(added + r * out_stride + j, n);
      store_up_to(to + j, sizeof(T) < sizeof(float) ? plain_nans(v) : v, n);
    }
  }
}
