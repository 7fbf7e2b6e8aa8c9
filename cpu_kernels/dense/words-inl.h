// The words of dense layers (kernels.h) that core/words-inl.h does not have: how a vector of them becomes the
// factors of the product. Included inside an instruction set's namespace, after core/product-inl.h.
//
// What an instruction set adds to its shim for them:
//   byte_products(a, b, c)          c + a0 b0 + a1 b1 + a2 b2 + a3 b3 of unsigned bytes a and signed bytes b,
//                                   if there is such an instruction
//   pair_sums(a, b, c)              c + a0 b0 + a1 b1 of the int16 pairs in each lane
//   to_int(v)                       to the nearest even, for |v| < 2^31
//   store_bytes(int8_t* p, v)       the low bytes of the lanes
//   FloatTable, ByteTable           16 values: load_table(const float*), load_table(const int8_t*), and
//   look_up(table, v)               v's low 4 bits as index, in each lane or in each byte; the other bits are 0

// Not defined where there is none; see vector-inl.h.
template <class I>
vi byte_products(I a, I b, vi c);

typedef std::int16_t Halves __attribute__((vector_size(sizeof(vi))));

QUAKE_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
QUAKE_INLINE vf to_float(vf v) { return v; }
QUAKE_INLINE vi load_bits(const PackedWord* p) { return as_int(load(as_floats(p))); }
QUAKE_INLINE vi broadcast_bits(const PackedWord* p) {
  std::int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word - vi{};
}
// Of the int16 pairs (b0 b1), (b2 b3) in each lane: the signed bytes b0 and b2, or b1 and b3, as int16.
QUAKE_INLINE vi even_bytes(vi v) { return (vi)(((Halves)v << 8) >> 8); }
QUAKE_INLINE vi odd_bytes(vi v) { return (vi)((Halves)v >> 8); }
// Of the codes of four bits in each byte.
QUAKE_INLINE vi low_codes(vi v) { return v & 0x0f0f0f0f; }
QUAKE_INLINE vi high_codes(vi v) { return (v >> 4) & 0x0f0f0f0f; }

// A word of the weight is multiplied with kFactors words of x; factor(p, i) is what the i-th multiplies.
template <int kCount>
struct FloatProduct {
  using Sum = vf;
  using Vector = vf;
  static constexpr int kFactors = kCount;
  static constexpr int kOffset = 0;
  QUAKE_INLINE vf broadcast(const PackedWord* p) { return set1(*as_floats(p)); }
  QUAKE_INLINE vf multiply_add(vf a, vf b, vf c) { return fma(a, b, c); }
};

struct DenseFloats : FloatProduct<1> {
  explicit DenseFloats(const void*) {}
  QUAKE_INLINE_MEMBER vf factor(const PackedWord* p, int) const { return load(as_floats(p)); }
};

// Where nothing multiplies pairs of bfloat16.
template <bool kInPairs>
struct DenseBFloats : FloatProduct<2> {
  explicit DenseBFloats(const void*) {}
  QUAKE_INLINE_MEMBER vf factor(const PackedWord* p, int i) const {
    return as_float(i == 0 ? load_bits(p) << 16 : load_bits(p) & ~0xffff);
  }
};
template <>
struct DenseBFloats<true> {
  using Sum = vf;
  using Vector = vi;
  static constexpr int kFactors = 1, kOffset = 0;
  explicit DenseBFloats(const void*) {}
  QUAKE_INLINE vi broadcast(const PackedWord* p) { return broadcast_bits(p); }
  QUAKE_INLINE vf multiply_add(vi a, vi b, vf c) { return pair_products(a, b, c); }
  QUAKE_INLINE_MEMBER vi factor(const PackedWord* p, int) const { return load_bits(p); }
};

struct DenseBytes : FloatProduct<4> {
  explicit DenseBytes(const void*) {}
  QUAKE_INLINE_MEMBER vf factor(const PackedWord* p, int i) const {
    return to_float((load_bits(p) << (24 - 8 * i)) >> 24);
  }
};

struct DenseCodes : FloatProduct<8> {
  explicit DenseCodes(const void* values) : table(load_table(static_cast<const float*>(values))) {}
  QUAKE_INLINE_MEMBER vf factor(const PackedWord* p, int i) const {
    return look_up(table, (load_bits(p) >> (i < 4 ? 8 * i : 8 * i - 28)) & 15);
  }
  FloatTable table;
};

template <int kCount, int kAdded>
struct IntegerProduct {
  using Sum = vi;
  using Vector = vi;
  static constexpr int kFactors = kCount;
  static constexpr int kOffset = kAdded;
  QUAKE_INLINE vi broadcast(const PackedWord* p) { return broadcast_bits(p); }
};

// By pairs of int16, which are exact, two words of x for a word of four bytes: its even bytes and its odd ones.
template <int kCount>
struct PairProduct : IntegerProduct<kCount, 0> {
  QUAKE_INLINE vi multiply_add(vi a, vi b, vi c) { return pair_sums(a, b, c); }
};

// Or by fours of bytes, of which the weight's are unsigned: kOffset is added to them. Sums begin with what that
// takes away.
template <int kCount>
struct ByteProduct : IntegerProduct<kCount, 128> {
  QUAKE_INLINE vi multiply_add(vi a, vi b, vi c) { return byte_products(b, a, c); }
};

template <bool kByFours>
struct QuantizedBytes : PairProduct<2> {
  explicit QuantizedBytes(const void*) {}
  QUAKE_INLINE_MEMBER vi factor(const PackedWord* p, int i) const {
    return i == 0 ? even_bytes(load_bits(p)) : odd_bytes(load_bits(p));
  }
};
template <>
struct QuantizedBytes<true> : ByteProduct<1> {
  explicit QuantizedBytes(const void*) {}
  QUAKE_INLINE_MEMBER vi factor(const PackedWord* p, int) const {
    return load_bits(p) ^ static_cast<std::int32_t>(0x80808080);
  }
};

template <bool kByFours>
struct QuantizedCodes : PairProduct<4> {
  explicit QuantizedCodes(const void* values) : table(load_table(static_cast<const std::int8_t*>(values))) {}
  QUAKE_INLINE_MEMBER vi factor(const PackedWord* p, int i) const {
    const vi bytes = look_up(table, i < 2 ? low_codes(load_bits(p)) : high_codes(load_bits(p)));
    return i % 2 == 0 ? even_bytes(bytes) : odd_bytes(bytes);
  }
  ByteTable table;
};
template <>
struct QuantizedCodes<true> : ByteProduct<2> {
  explicit QuantizedCodes(const void* values) {
    std::int8_t unsigned_values[16];
    for (int i = 0; i < 16; ++i) {
      unsigned_values[i] = static_cast<std::int8_t>(static_cast<const std::int8_t*>(values)[i] ^ 0x80);
    }
    table = load_table(unsigned_values);
  }
  QUAKE_INLINE_MEMBER vi factor(const PackedWord* p, int i) const {
    return look_up(table, i == 0 ? low_codes(load_bits(p)) : high_codes(load_bits(p)));
  }
  ByteTable table;
};
