// Layer norm and RMS norm over the rows of a matrix, or of the sum of two. Included inside an instruction set's
// namespace, after core/norm-inl.h.

// The sum of two rows as float32, not rounded to their type.
template <class T>
struct SummedValues {
  const T *x, *residual;

  QUAKE_INLINE_MEMBER Pair pair(std::size_t i) const {
    const Pair a = load_pair(x + i), b = load_pair(residual + i);
    return {a.first + b.first, a.second + b.second};
  }
  QUAKE_INLINE_MEMBER vf up_to(std::size_t i, std::size_t n) const {
    return load_up_to(x + i, n) + load_up_to(residual + i, n);
  }
};

// v as store() takes it. Rounding to bfloat16 by integers expects NaNs whose lower half is clear, and those of
// a float32 scale or offset may be any.
template <class T>
QUAKE_INLINE vf storable(vf v) {
  if constexpr (kDTypeOf<T> == DType::kBFloat16) return as_float(as_int(v) & ~((vi)(v != v) & 0xffff));
  return v;
}

template <class T>
QUAKE_INLINE void put(T* p, vf v, std::size_t n, bool streamed) {
  streamed ? stream(p, storable<T>(v)) : store_up_to(p, storable<T>(v), n);
}

template <class T>
void norm_rows(const void* in, const void* residual, const Norm& norm, void* out, void* sum, std::size_t rows,
               std::size_t columns, Stores stores) {
  const T *x = static_cast<const T*>(in), *r = static_cast<const T*>(residual);
  T *y = static_cast<T*>(out), *s = static_cast<T*>(sum);
  const bool streamed = streamable(y, columns, stores) && (!s || streamable(s, columns, stores));
  // As many rows as stay in L1 between the steps.
  const std::size_t fitting = columns == 0 ? 1 : kNormPiece / columns;
  const std::size_t batch = fitting < 1 ? 1 : fitting < kNormRows ? fitting : kNormRows;
  for (std::size_t row = 0; row < rows; row += batch) {
    const std::size_t n = rows - row < batch ? rows - row : batch, at = row * columns;
    if (r) {
      normalize_rows(
          n, columns, norm,
          [&](std::size_t k) {
            return SummedValues<T>{x + at + k * columns, r + at + k * columns};
          },
          [&](std::size_t k) {
            return [&, begin = at + k * columns](std::size_t i, std::size_t count, vf v, vf normed) {
              put(s + begin + i, v, count, streamed);
              put(y + begin + i, normed, count, streamed);
            };
          });
    } else {
      normalize_rows(
          n, columns, norm, [&](std::size_t k) { return RowValues<T>{x + at + k * columns}; },
          [&](std::size_t k) {
            return [&, begin = at + k * columns](std::size_t i, std::size_t count, vf, vf normed) {
              put(y + begin + i, normed, count, streamed);
            };
          });
    }
  }
  if (streamed) stream_fence();
}
