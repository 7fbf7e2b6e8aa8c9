// What is done with a tile of the product before and after its activation. Included inside an instruction set's
// namespace, after rows-inl.h.

// The vector at column j of a row of a tile, scaled and with its bias.
struct RowScale {
  vf scale;
  vi zero;
};
QUAKE_INLINE RowScale scale_of_row(const DenseScale& s, std::size_t r) {
  return {set1(s.row_scales ? s.row_scales[r] : 1.0f), (s.integers ? s.row_zeros[r] : 0) - vi{}};
}
QUAKE_INLINE vf scaled(const DenseScale& s, const RowScale& row, vf v, std::size_t j, std::size_t n) {
  if (s.integers) {
    const vi sums = load_bits(reinterpret_cast<const PackedWord*>(s.column_sums + j));
    v = to_float(as_int(v) - row.zero * sums) * (row.scale * load(s.column_scales + j));
  } else {
    if (s.column_scales) v *= load(s.column_scales + j);
    if (s.row_scales) v *= row.scale;
  }
  return s.bias ? v + load_up_to(s.bias + j, n) : v;
}

template <class = void>
void scale_tile(float* tile, const DenseScale& s) {
  for (std::size_t r = 0; r < s.rows; ++r, tile += s.columns) {
    const RowScale row = scale_of_row(s, r);
    for (std::size_t j = 0; j < s.valid; j += kLanes) {
      const std::size_t n = s.valid - j < kLanes ? s.valid - j : kLanes;
      store(tile + j, scaled(s, row, load(tile + j), j, n));
    }
  }
}

QUAKE_INLINE void store_codes(std::int8_t* p, const Quantize& quantize, vf v, std::size_t n) {
  const vf poison = fma(v, vf{}, quantize.inverse);  // NaN of what is not finite, and of a range that is not
  const vi codes = poison == poison ? quantize(v) : vi{} + kNoCode;
  if (n == kLanes) return store_bytes(p, codes);
  std::int8_t bytes[kLanes];
  store_bytes(bytes, codes);
  for (std::size_t i = 0; i < n; ++i) p[i] = bytes[i];
}

template <class T>
void store_tile(const float* tile, const DenseScale* how, const DenseStore& s) {
  constexpr bool kCodes = std::is_same_v<T, std::int8_t>;
  const Quantize quantize(kCodes ? *s.range : DenseQuantizer{});
  const T* added = static_cast<const T*>(s.residual);
  const float* gate = s.gate;
  T* to = static_cast<T*>(s.out);
  for (std::size_t r = 0; r < s.rows; ++r, tile += s.tile_stride, to += s.out_stride) {
    const RowScale row = how ? scale_of_row(*how, r) : RowScale{};
    for (std::size_t j = 0; j < s.columns; j += kLanes) {
      const std::size_t n = s.columns - j < kLanes ? s.columns - j : kLanes;
      vf v = load(tile + j);
      if (how) v = scaled(*how, row, v, j, n);
      if (gate) v *= load(gate + r * s.tile_stride + j);
      if constexpr (kCodes) {
        store_codes(to + j, quantize, v, n);
      } else {
        if (added) v += load_up_to(added + r * s.out_stride + j, n);
        store_up_to(to + j, sizeof(T) < sizeof(float) ? plain_nans(v) : v, n);
      }
    }
  }
}
