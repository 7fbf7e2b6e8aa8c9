// Matrix instructions, which multiply 16 lines of rows with 16 columns: 16 words of each at a time. Included
// inside an instruction set's namespace, after isa/kernels-inl.h.
//
// What an instruction set adds to its shim for them, of registers of 16 x 16 words (0 to 3 are sums, 4 and 5
// rows, 6 and 7 columns):
//   clear_matrix<T>()                        register T is 0
//   load_matrix<T>(p, stride)                its lines are `stride` words apart
//   store_matrix<T>(p, stride)
//   begin_matrices(words), end_matrices()    between them, of 4 to 7 only that many words deep: 8 or 16
//   MatrixBytes, MatrixBFloats               multiply_add<C, A, B>(): C += A · B
//   append_halves(a, b)                      the upper halves of the lanes of a, then of b

constexpr std::size_t kMatrixLines = 16;

// Registers I to the last one of the sums: action.run<I>(row, panel).
template <int R, int V, int I = 0, class Action>
QUAKE_INLINE void for_sums(const Action& action) {
  if constexpr (I < R / 16 * V) {
    action.template run<I>(std::size_t{I / V * 16}, std::size_t{I % V});
    for_sums<R, V, I + 1>(action);
  }
}
struct KeepSums {
  template <int I>
  QUAKE_INLINE_MEMBER void run(std::size_t, std::size_t) const {}
};
struct ClearSums {
  template <int I>
  QUAKE_INLINE_MEMBER void run(std::size_t, std::size_t) const {
    clear_matrix<I>();
  }
};
// To and from rows of floats, `stride` apart.
struct LoadSums {
  template <int I>
  QUAKE_INLINE_MEMBER void run(std::size_t row, std::size_t panel) const {
    load_matrix<I>(from + row * stride + panel * kMatrixLines, stride);
  }
  const float* from;
  std::size_t stride;
};
struct StoreSums {
  template <int I>
  QUAKE_INLINE_MEMBER void run(std::size_t row, std::size_t panel) const {
    store_matrix<I>(to + row * stride + panel * kMatrixLines, stride);
  }
  float* to;
  std::size_t stride;
};

// R rows, `stride` words apart, times V panels of 16 columns, from the word `at` of each on. What is done with
// a sum before: an action of for_sums, beside the product of the sum before it.
template <class Matrix, int R, int V, class Before = KeepSums>
QUAKE_INLINE void multiply_lines(const PackedWord* rows, std::size_t stride,
                                 const PackedWord* const (&panels)[V], std::size_t at, std::size_t panel_stride,
                                 const Before& before = {}) {
  static_assert((R == 32 && V <= 2) || (R == 16 && (V <= 2 || V == 4)));
  constexpr std::size_t kLower = kMatrixLines;
  load_matrix<4>(rows, stride);
  load_matrix<6>(panels[0] + at, panel_stride);
  if constexpr (V > 1) load_matrix<7>(panels[1] + at, panel_stride);
  before.template run<0>(0, 0);
  Matrix::template multiply_add<0, 4, 6>();
  if constexpr (V == 4) load_matrix<6>(panels[2] + at, panel_stride);
  if constexpr (R == 32) load_matrix<5>(rows + kLower * stride, stride);
  if constexpr (V > 1) {
    before.template run<1>(0, 1);
    Matrix::template multiply_add<1, 4, 7>();
  }
  if constexpr (V == 4) load_matrix<7>(panels[3] + at, panel_stride);
  if constexpr (R == 32 && V == 1) {
    before.template run<1>(kLower, 0);
    Matrix::template multiply_add<1, 5, 6>();
  }
  if constexpr (R == 32 && V == 2) {
    before.template run<2>(kLower, 0);
    Matrix::template multiply_add<2, 5, 6>();
    before.template run<3>(kLower, 1);
    Matrix::template multiply_add<3, 5, 7>();
  }
  if constexpr (V == 4) {
    before.template run<2>(0, 2);
    Matrix::template multiply_add<2, 4, 6>();
    before.template run<3>(0, 3);
    Matrix::template multiply_add<3, 4, 7>();
  }
}

// Floats as sums of three bfloat16, the low, middle and high ones of so many elements one after the other.
constexpr std::size_t kSplitElements = 2 * kMatrixLines, kSplitWords = 3 * kMatrixLines;

// Rows of words in three parts: `stride` words between rows, `part` between the parts of one.
struct SplitRows {
  const PackedWord* low;
  std::size_t stride, part;
};

// One part of rows times one of the panels, which are in the registers unless they are loaded.
template <int R, int V, int Part, bool kLoadRows, bool kLoadPanels>
QUAKE_INLINE void multiply_parts(const SplitRows& rows, const PackedWord* const (&panels)[V], std::size_t at,
                                 std::size_t panel_stride) {
  if constexpr (kLoadRows) {
    const PackedWord* const from = rows.low + Part * rows.part;
    load_matrix<4>(from, rows.stride);
    if constexpr (R == 32) load_matrix<5>(from + kMatrixLines * rows.stride, rows.stride);
  }
  if constexpr (kLoadPanels) {
    load_matrix<6>(panels[0] + at, panel_stride);
    if constexpr (V == 2) load_matrix<7>(panels[1] + at, panel_stride);
  }
  MatrixBFloats::multiply_add<0, 4, 6>();
  if constexpr (V == 2) MatrixBFloats::multiply_add<1, 4, 7>();
  if constexpr (R == 32) MatrixBFloats::multiply_add<V, 5, 6>();
  if constexpr (R == 32 && V == 2) MatrixBFloats::multiply_add<3, 5, 7>();
}

// Six of the nine products: the others are at most 3 * 2^-24 of that of the floats.
template <int R, int V>
QUAKE_INLINE void multiply_split(const SplitRows& rows, const PackedWord* const (&panels)[V], std::size_t at,
                                 std::size_t panel_stride) {
  const std::size_t middle = at + kMatrixLines * panel_stride, high = middle + kMatrixLines * panel_stride;
  multiply_parts<R, V, 0, true, true>(rows, panels, high, panel_stride);
  multiply_parts<R, V, 1, true, false>(rows, panels, high, panel_stride);
  multiply_parts<R, V, 1, false, true>(rows, panels, middle, panel_stride);
  multiply_parts<R, V, 2, true, false>(rows, panels, middle, panel_stride);
  multiply_parts<R, V, 2, false, true>(rows, panels, at, panel_stride);
  multiply_parts<R, V, 2, false, true>(rows, panels, high, panel_stride);
}

typedef std::uint32_t Unsigned __attribute__((vector_size(sizeof(vi))));

// Cut off after a bfloat16's bits, and rounded to nearest.
QUAKE_INLINE vf cut_bfloat(vf v) { return as_float(as_int(v) & ~0xffff); }
QUAKE_INLINE vf nearest_bfloat(vf v) { return as_float((as_int(v) + 0x8000) & ~0xffff); }

// Takes the largest part that is left off two vectors: words of their elements in turn.
QUAKE_INLINE vf take_parts(vf& even, vf& odd) {
  const vf high_even = cut_bfloat(even), high_odd = cut_bfloat(odd);
  even -= high_even;
  odd -= high_odd;
  return as_float((vi)((Unsigned)as_int(high_even) >> 16) | as_int(high_odd));
}
// The same to nearest: words of the first vector, then of the second.
QUAKE_INLINE vf take_nearest_parts(vf& a, vf& b) {
  const vf high_a = nearest_bfloat(a), high_b = nearest_bfloat(b);
  a -= high_a;
  b -= high_b;
  return as_float(append_halves(high_a, high_b));
}
