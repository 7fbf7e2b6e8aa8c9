// Bytes and tables of 16 values for instruction sets of four lanes. Included inside an instruction set's
// namespace, before vector-inl.h.

QUAKE_INLINE void store_bytes(std::int8_t* p, vi v) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::int8_t>(v[i]);
}

struct FloatTable {
  const float* values;
};
QUAKE_INLINE FloatTable load_table(const float* values) { return {values}; }
QUAKE_INLINE vf look_up(const FloatTable& table, vi index) {
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = table.values[index[i]];
  return v;
}

struct ByteTable {
  std::int8_t values[16];
};
QUAKE_INLINE ByteTable load_table(const std::int8_t* values) {
  ByteTable table;
  std::memcpy(table.values, values, sizeof table.values);
  return table;
}
QUAKE_INLINE vi look_up(const ByteTable& table, vi index) {
  std::int8_t bytes[sizeof(vi)];
  std::memcpy(bytes, &index, sizeof bytes);
  for (std::int8_t& byte : bytes) byte = table.values[byte];
  std::memcpy(&index, bytes, sizeof bytes);
  return index;
}
