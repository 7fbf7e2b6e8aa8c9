// The register tile of the matrix product of packed words. Included inside an instruction set's namespace,
// after words-inl.h.

// kRowTile rows by 2 vectors, 3/4 of the registers. A row's element is broadcast from memory and used twice;
// tall tiles want least of the packed operand's bandwidth, which comes from L2: 10 bytes a cycle with AVX-512
// against 21 for 6 rows by 4 vectors.
constexpr int kRowTile = kRegisters >= 32 ? 12 : 6;
constexpr int kPanel = 2 * kLanes;

// c[r][v] += sum over k of a[r, k] b[k, v]; b has rows of kPanel.
template <class Words, int R, int V, int kRowStep, int kDepthStep, class Sum>
QUAKE_INLINE void multiply_add(const PackedWord* a, const PackedWord* b, std::size_t depth, Sum (&c)[R][V]) {
  for (std::size_t k = 0; k < depth; ++k, a += kDepthStep, b += kPanel) {
    typename Words::Vector column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = Words::load_words(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Words::Vector factor = Words::broadcast(a + r * kRowStep);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] = Words::multiply_add(factor, column[v], c[r][v]);
    }
  }
}

// Calls body<R>() for the smallest register tile that has `rows` rows.
template <class Body>
QUAKE_INLINE void with_row_tile(std::size_t rows, const Body& body) {
  if (rows <= 1) return body.template run<1>();
  if (rows <= 2) return body.template run<2>();
  if (rows <= 4) return body.template run<4>();
  if constexpr (kRowTile > 6) {
    if (rows <= 6) return body.template run<6>();
    if (rows <= 8) return body.template run<8>();
  }
  return body.template run<kRowTile>();
}
