// What the packed words of the matrix product hold (PackedWord): how they are made, loaded and multiplied.
// Included inside an instruction set's namespace, after vector-inl.h.

// The words of float32 vectors.
QUAKE_INLINE const float* as_floats(const PackedWord* p) { return reinterpret_cast<const float*>(p); }
QUAKE_INLINE float* as_floats(PackedWord* p) { return reinterpret_cast<float*>(p); }

// Words as they are: of neighbours, and one in all lanes.
QUAKE_INLINE vi load_bits(const PackedWord* p) { return as_int(load(as_floats(p))); }
QUAKE_INLINE vi broadcast_bits(const PackedWord* p) {
  std::int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word - vi{};
}
QUAKE_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
QUAKE_INLINE vf to_float(vf v) { return v; }

// One element, as a float32.
template <class T>
struct FloatWords {
  static constexpr std::size_t kPerWord = 1;
  static constexpr bool kFromMemory = sizeof(T) == sizeof(float);  // packing does not convert
  static constexpr bool kTakesScale = true;
  using Vector = vf;

  QUAKE_INLINE vf load_words(const PackedWord* p) { return load(as_floats(p)); }
  QUAKE_INLINE vf broadcast(const PackedWord* p) { return set1(*as_floats(p)); }
  QUAKE_INLINE vf multiply_add(vf a, vf b, vf c) { return fma(a, b, c); }
  // The words of a row, up to a whole vector, of which `left` elements are left; the others are 0.
  QUAKE_INLINE vf convert(const T* row, std::size_t left) {
    return load_up_to(row, left < kLanes ? left : kLanes);
  }
};

// Two neighbours, as bfloat16, of any T. Only instruction sets that multiply them instantiate it.
template <class T>
struct BFloatPairs {
  static constexpr std::size_t kPerWord = 2;
  static constexpr bool kFromMemory = std::is_same_v<T, bfloat16>;
  static constexpr bool kTakesScale = false;
  using Vector = vi;

  QUAKE_INLINE vi load_words(const PackedWord* p) { return load_bits(p); }
  QUAKE_INLINE vi broadcast(const PackedWord* p) { return broadcast_bits(p); }
  QUAKE_INLINE vf multiply_add(vi a, vi b, vf c) { return pair_products(a, b, c); }
  QUAKE_INLINE vf convert(const T* row, std::size_t left) {
    if constexpr (kFromMemory) {
      return as_float(load_bfloats(&row->bits, left < 2 * kLanes ? left : 2 * kLanes));
    } else {
      const vf first = load_up_to(row, left < kLanes ? left : kLanes);
      const std::size_t rest = left < kLanes ? 0 : left - kLanes;
      const vf second = rest == 0 ? vf{} : load_up_to(row + kLanes, rest < kLanes ? rest : kLanes);
      return as_float(append_bfloats(first, second));
    }
  }
};

template <class Words>
constexpr std::size_t words(std::size_t elements) {
  return ceil_div(elements, Words::kPerWord);
}
