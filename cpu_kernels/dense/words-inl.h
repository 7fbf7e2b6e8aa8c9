// The words of dense layers (kernels.h) that core/words-inl.h does not have: how a vector of them becomes the
// factors of the product. Included inside an instruction set's namespace, after core/product-inl.h.
//
// What an instruction set adds to its shim for them:
//   byte_products(a, b, c)          c + a0 b0 + a1 b1 + a2 b2 + a3 b3 of bytes a and signed bytes b, if
//                                   there is such an instruction
//   kByteOffset                     128 if that takes a as unsigned, 0 if as signed
//   pair_sums(a, b, c)              c + a0 b0 + a1 b1 of the int16 pairs in each lane
//   byte_pairs(a, b, c)             c + a0 b0 + a1 b1 of the pairs of unsigned bytes a and signed bytes b, as
//                                   int16 without overflow, if there is such an instruction
//   to_int(v)                       to the nearest even, for |v| < 2^31
//   store_bytes(int8_t* p, v)       the low bytes of the lanes
//   FloatTable, ByteTable           16 values: load_table(const float*), load_table(const int8_t*), and
//   look_up(table, v)               v's low 4 bits as index, in each lane or in each byte; the other bits are 0

// Not defined where there is none; see vector-inl.h.
template <class I>
vi byte_products(I a, I b, vi c);
template <class I>
I byte_pairs(I a, I b, I c);

typedef std::int16_t Halves __attribute__((vector_size(sizeof(vi))));
typedef std::int8_t Bytes __attribute__((vector_size(sizeof(vi))));

// Of the int16 pairs (b0 b1), (b2 b3) in each lane: the signed bytes b0 and b2, or b1 and b3, as int16.
QUAKE_INLINE vi even_bytes(vi v) { return (vi)(((Halves)v << 8) >> 8); }
QUAKE_INLINE vi odd_bytes(vi v) { return (vi)((Halves)v >> 8); }
// Of the codes of four bits in each byte.
QUAKE_INLINE vi low_codes(vi v) { return v & 0x0f0f0f0f; }
QUAKE_INLINE vi high_codes(vi v) { return (v >> 4) & 0x0f0f0f0f; }

// A word of the weight is multiplied with kFactors words of x; factor(p, i) is what the i-th multiplies.
struct DenseFloats;

template <int kCount>
struct FloatProduct {
  using Expanded = DenseFloats;
  using Sum = vf;
  using Vector = vf;
  static constexpr int kFactors = kCount;
  QUAKE_INLINE vf first_sum(const PackedWord*) { return vf{}; }
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
  static constexpr int kFactors = 1;
  explicit DenseBFloats(const void*) {}
  QUAKE_INLINE vf first_sum(const PackedWord*) { return vf{}; }
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

// The same of a table whose values are int8, where looking up bytes and converting them is cheaper.
struct DenseByteCodes : FloatProduct<8> {
  explicit DenseByteCodes(const void* values) : table(load_table(bytes_of(values).values)) {}
  QUAKE_INLINE_MEMBER vf factor(const PackedWord* p, int i) const {
    const vi bytes = look_up(table, i < 4 ? low_codes(load_bits(p)) : high_codes(load_bits(p)));
    return to_float((bytes << (24 - 8 * (i % 4))) >> 24);
  }
  struct Bytes {
    std::int8_t values[16];
    bool exact;
  };
  static inline Bytes bytes_of(const void* values) {
    Bytes bytes = {{}, true};
    for (int i = 0; i < 16; ++i) {
      const float value = static_cast<const float*>(values)[i];
      const bool in_range = value >= -128 && value <= 127;
      bytes.values[i] = static_cast<std::int8_t>(in_range ? value : 0);
      bytes.exact &= in_range && static_cast<float>(bytes.values[i]) == value;
    }
    return bytes;
  }
  ByteTable table;
};

// kAdded is added to the weights' values: sums begin with what that takes away.
template <int kCount, int kAdded>
struct IntegerProduct {
  using Sum = vi;
  using Vector = vi;
  static constexpr int kFactors = kCount;
  QUAKE_INLINE vi first_sum(const PackedWord* sum) {
    return kAdded == 0 ? vi{} : broadcast_bits(sum) * -kAdded;
  }
  QUAKE_INLINE vi broadcast(const PackedWord* p) { return broadcast_bits(p); }
};

struct DensePairs;

// By pairs of int16, which are exact, two words of x for a word of four bytes: its even bytes and its odd ones.
template <int kCount>
struct PairProduct : IntegerProduct<kCount, 0> {
  using Expanded = DensePairs;
  QUAKE_INLINE vi multiply_add(vi a, vi b, vi c) { return pair_sums(a, b, c); }
};

struct DensePairs : PairProduct<1> {
  explicit DensePairs(const void*) {}
  QUAKE_INLINE_MEMBER vi factor(const PackedWord* p, int) const { return load_bits(p); }
};

struct DenseFours;

// Or by fours of bytes, of which the weight's may have to be unsigned.
template <int kCount>
struct ByteProduct : IntegerProduct<kCount, kByteOffset> {
  using Expanded = DenseFours;
  QUAKE_INLINE vi multiply_add(vi a, vi b, vi c) { return byte_products(b, a, c); }
};

struct DenseFours : ByteProduct<1> {
  explicit DenseFours(const void*) {}
  QUAKE_INLINE_MEMBER vi factor(const PackedWord* p, int) const { return load_bits(p); }
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
    return load_bits(p) ^ static_cast<std::int32_t>(kByteOffset * 0x01010101u);
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

// Where bytes are multiplied in pairs: values as unsigned bytes, less the least of them. x is in [-127, 127],
// so 16 bits have the sums of kBlock words, 16 products of at most 15 * 127.
struct NarrowTable {
  explicit NarrowTable(const void* table) {
    const std::int8_t* const v = static_cast<const std::int8_t*>(table);
    least = v[0];
    for (int i = 1; i < 16; ++i) least = v[i] < least ? v[i] : least;
    for (int i = 0; i < 16; ++i) above[i] = static_cast<std::int8_t>(v[i] - least);
    for (int i = 0; i < 16; ++i) are_codes &= above[i] == i;
  }
  std::int8_t above[16];  // values less the least
  std::int32_t least;
  bool are_codes = true;
};

// kCodes: the values in the table are the codes.
template <bool kCodes>
struct NarrowCodes : IntegerProduct<2, 0> {
  static constexpr std::size_t kBlock = 4;
  explicit NarrowCodes(const NarrowTable& values) : table(load_table(values.above)), least(values.least) {}
  QUAKE_INLINE_MEMBER vi factor(const PackedWord* p, int i) const {
    const vi codes = i == 0 ? low_codes(load_bits(p)) : high_codes(load_bits(p));
    return kCodes ? codes : look_up(table, codes);
  }
  QUAKE_INLINE_MEMBER vi first_sum(const PackedWord* sum) const { return broadcast_bits(sum) * least; }
  ByteTable table;
  std::int32_t least;
};

template <>
struct QuantizedCodes<true> : ByteProduct<2> {
  explicit QuantizedCodes(const void* values) {
    std::int8_t with_offset[16];
    for (int i = 0; i < 16; ++i) {
      with_offset[i] = static_cast<std::int8_t>(static_cast<const std::int8_t*>(values)[i] ^ kByteOffset);
    }
    table = load_table(with_offset);
  }
  QUAKE_INLINE_MEMBER vi factor(const PackedWord* p, int i) const {
    return look_up(table, i == 0 ? low_codes(load_bits(p)) : high_codes(load_bits(p)));
  }
  ByteTable table;
};
