// Partial loads and stores of 16-bit words for instruction sets without masked moves, through a small buffer.
// Included inside an instruction set's namespace, before vector-inl.h.

// Copies n < 8 words in pieces of powers of two: a tail costs a few moves, not a call of memcpy.
QUAKE_INLINE void copy_words(std::uint16_t* to, const std::uint16_t* from, std::size_t n) {
  if (n & 4) {
    std::memcpy(to, from, 8);
    to += 4;
    from += 4;
  }
  if (n & 2) {
    std::memcpy(to, from, 4);
    to += 2;
    from += 2;
  }
  if (n & 1) *to = *from;
}

QUAKE_INLINE vh load_words_partial(const std::uint16_t* p, std::size_t n) {
  std::uint16_t words[kLanes] = {};
  copy_words(words, p, n);
  return load_words(words);
}

QUAKE_INLINE void store_words_partial(std::uint16_t* p, vh v, std::size_t n) {
  std::uint16_t words[kLanes];
  store_words(words, v);
  copy_words(p, words, n);
}
