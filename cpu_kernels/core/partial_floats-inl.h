// Partial loads and stores of floats for instruction sets of four lanes without masked moves.
// Included inside an instruction set's namespace, before vector-inl.h.

QUAKE_INLINE vf load_partial(const float* p, std::size_t n) {
  float values[kLanes] = {};
  for (std::size_t i = 0; i < n; ++i) values[i] = p[i];
  return load(values);
}

QUAKE_INLINE void store_partial(float* p, vf v, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) p[i] = v[i];
}
