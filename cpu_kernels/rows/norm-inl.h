// Layer norm and RMS norm over the rows of a matrix, or of the sum of two. Included inside an instruction set's
// namespace, after core/norm-inl.h.

// The sum of two rows as float32, not rounded to their type.
template <class T>
struct SummedValues {
  static constexpr bool kSummed = true;
  const T *x, *residual;

  QUAKE_INLINE_MEMBER Pair pair(std::size_t i) const {
    const Pair a = load_pair(x + i), b = load_pair(residual + i);
    return {a.first + b.first, a.second + b.second};
  }
  QUAKE_INLINE_MEMBER vf up_to(std::size_t i, std::size_t n) const {
    return load_up_to(x + i, n) + load_up_to(residual + i, n);
  }
};

// A scale or an offset as the arithmetic with T takes it: rounding to bfloat16 by integers expects NaNs whose
// lower half is clear, and these may be any.
template <class T>
QUAKE_INLINE vf parameter(vf v) {
  return kDTypeOf<T> == DType::kBFloat16 ? plain_nans(v) : v;
}

// Scales or offsets in the order in which a Pair of T has its elements, for all whole Pairs of them: for
// bfloat16 in the tile.
template <class T>
QUAKE_INLINE const float* in_pair_order(const float* p, std::size_t size, float* tile) {
  if constexpr (kDTypeOf<T> != DType::kBFloat16) return p;
  for (std::size_t i = 0; i + 2 * kLanes <= size; i += 2 * kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      tile[i + lane] = p[i + 2 * lane];
      tile[i + kLanes + lane] = p[i + 2 * lane + 1];
    }
    const Pair v = load_pair(tile + i);
    store_pair(tile + i, {parameter<T>(v.first), parameter<T>(v.second)}, false);
  }
  return tile;
}

// Where rows go, and the sums that they are made of, if there are any.
template <class T>
struct Outputs {
  T *y, *sum;
  bool streamed;
};

// The results of a row from `begin` to `end`, a whole number of Pairs further on or the end of the row. Of
// `scales` and `offsets`, in the order of Pairs, that piece is given.
template <bool kCentered, class T, class Values>
QUAKE_INLINE void finish_piece(const Values& values, std::size_t begin, std::size_t end, const Norm& norm,
                               const float* scales, const float* offsets, vf mean, vf factor,
                               const Outputs<T>& out) {
  T *const y = out.y, *const sum = out.sum;
  const bool streamed = out.streamed;
  std::size_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    const Pair v = values.pair(i), scale = load_pair(scales + (i - begin));
    const Pair offset = kCentered ? load_pair(offsets + (i - begin)) : Pair{};
    if constexpr (Values::kSummed) store_pair(sum + i, v, streamed);
    store_pair(y + i,
               {normalized<kCentered, kCentered>(v.first, mean, factor, scale.first, offset.first),
                normalized<kCentered, kCentered>(v.second, mean, factor, scale.second, offset.second)},
               streamed);
  }
  for (; i < end; i += kLanes) {
    const std::size_t n = end - i < kLanes ? end - i : kLanes;
    const vf v = values.up_to(i, n), scale = parameter<T>(load_up_to(norm.scale + i, n));
    const vf offset = kCentered ? parameter<T>(load_up_to(norm.offset + i, n)) : vf{};
    if constexpr (Values::kSummed) store_up_to(sum + i, v, n);
    store_up_to(y + i, normalized<kCentered, kCentered>(v, mean, factor, scale, offset), n);
  }
}

// As many rows at a time as stay in L1 between the steps.
template <bool kCentered, class T, class ValuesOf>
QUAKE_INLINE void normalize_rows(const ValuesOf& values, const Norm& norm, const Outputs<T>& out,
                                 std::size_t rows, std::size_t columns) {
  constexpr bool kOrdered = kDTypeOf<T> == DType::kBFloat16;
  alignas(kCacheLine) float tiles[2][kOrdered ? kNormPiece : 1];
  const std::size_t piece = kOrdered ? kNormPiece : columns, fitting = kNormPiece / columns;
  const std::size_t batch = fitting < 1 ? 1 : fitting < kNormRows ? fitting : kNormRows;
  const float *scales = nullptr, *offsets = nullptr;
  for (std::size_t row = 0; row < rows; row += batch) {
    const std::size_t n = rows - row < batch ? rows - row : batch;
    const Moments moments = moments_of_rows<kCentered>(
        n, columns, norm.epsilon,
        [&](std::size_t r) QUAKE_INLINE_LAMBDA { return values((row + r) * columns); });
    for (std::size_t begin = 0; begin < columns; begin += piece) {
      const std::size_t end = columns - begin < piece ? columns : begin + piece;
      if (row == 0 || columns > piece) {
        scales = in_pair_order<T>(norm.scale + begin, end - begin, tiles[0]);
        if constexpr (kCentered) offsets = in_pair_order<T>(norm.offset + begin, end - begin, tiles[1]);
      }
      for (std::size_t r = 0; r < n; ++r) {
        const std::size_t at = (row + r) * columns;
        const Outputs<T> to = {out.y + at, out.sum ? out.sum + at : nullptr, out.streamed};
        finish_piece<kCentered, T>(values(at), begin, end, norm, scales, offsets, set1(moments.mean[r]),
                                   set1(moments.factor[r]), to);
      }
    }
  }
}

template <bool kCentered, class T>
QUAKE_INLINE void norm_rows_as(const T* x, const T* residual, const Norm& norm, const Outputs<T>& out,
                               std::size_t rows, std::size_t columns) {
  if (residual) {
    const auto values = [=](std::size_t at) QUAKE_INLINE_LAMBDA {
      return SummedValues<T>{x + at, residual + at};
    };
    normalize_rows<kCentered>(values, norm, out, rows, columns);
  } else {
    const auto values = [=](std::size_t at) QUAKE_INLINE_LAMBDA { return RowValues<T>{x + at}; };
    normalize_rows<kCentered>(values, norm, out, rows, columns);
  }
}

template <class T>
void norm_rows(const void* in, const void* residual, const Norm& norm, void* out, void* sum, std::size_t rows,
               std::size_t columns, Stores stores) {
  if (columns == 0) return;
  const T *x = static_cast<const T*>(in), *r = static_cast<const T*>(residual);
  T *y = static_cast<T*>(out), *s = static_cast<T*>(sum);
  const bool streamed = streamable(y, columns, stores) && (!s || streamable(s, columns, stores));
  if (norm.centered) {
    norm_rows_as<true, T>(x, r, norm, {y, s, streamed}, rows, columns);
  } else {
    norm_rows_as<false, T>(x, r, norm, {y, s, streamed}, rows, columns);
  }
  if (streamed) stream_fence();
}
