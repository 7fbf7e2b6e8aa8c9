// Attention's slice of the table. Included inside an instruction set's namespace, last of the family.

// What packs words that have no scales, as the table's functions.
template <auto kPack>
bool pack_queries_as_they_are(const void* const* rows, std::size_t count, std::size_t size, float scale,
                              const float*, PackedWord* out) {
  return kPack(rows, count, size, scale, out);
}
template <auto kPack>
bool pack_as_they_are(const void* in, std::ptrdiff_t stride, std::size_t keys, std::size_t size,
                      std::size_t capacity, const float*, float*, PackedWord* out) {
  return kPack(in, stride, keys, size, capacity, out);
}

// What makes the words of a format of type T.
template <template <class> class Words, class T>
void fill_attention_packing(AttentionKernels::Format& format) {
  constexpr int i = static_cast<int>(kDTypeOf<T>);
  format.pack_queries[i] = pack_queries_as_they_are<pack_rows<Words<T>, T>>;
  format.pack_keys[i] = pack_as_they_are<pack_transposed<Words<T>, T>>;
  if constexpr (Words<T>::kPerWord == 2) {
    format.pack_values[i] = pack_as_they_are<pack_pair_panels<T>>;
  } else {
    format.pack_values[i] = pack_as_they_are<pack_panels<T>>;
  }
}

template <template <class> class Words, class... T>
void fill_attention_format(AttentionKernels::Format& format) {
  format.row_tile = kRowTile;
  format.weight_stride = kWeightStride<Words<float>>;
  format.layout = {Words<float>::kPerWord, 1, kPanel};
  format.query_scale =
      Words<float>::kTakesScale ? AttentionKernels::QueryScale::kAny : AttentionKernels::QueryScale::kNone;
  (fill_attention_packing<Words, T>(format), ...);
  format.score = score<Words<float>>;
  fill_orders(format.weigh, []<int Order>() { return weigh<Words<float>, Order>; });
  format.accumulate = accumulate<Words<float>>;
}

// What converts type T as it reads.
template <class T>
void fill_attention_conversions(AttentionKernels& table) {
  constexpr int i = static_cast<int>(kDTypeOf<T>);
  table.add_bias[i] = add_bias<T>;
  table.convert_query[i] = convert_query<T>;
  table.finish[i] = finish<T>;
  table.score_in_place[i] = score_in_place<T>;
  table.accumulate_in_place[i] = accumulate_in_place<T>;
}

template <class... T>
void fill_attention(AttentionKernels& table) {
  fill_attention_format<FloatWords, T...>(table.of(AttentionFormat::kFloat32));
  (fill_attention_conversions<T>(table), ...);
  constexpr int codes = static_cast<int>(DType::kInt8);
  table.score_in_place[codes] = score_in_place<std::int8_t>;
  table.accumulate_in_place[codes] = accumulate_in_place<std::int8_t>;
  fill_orders(table.soft_cap, []<int Order>() { return soft_cap<Order>; });
  table.lanes = kLanes;
  table.apply_mask = apply_mask;
  table.multiply = multiply;
  table.log_sum_correction[0] = (constants::kSoftmaxShift - constants::kOrder1Shift) * 0.693147181f;
}
