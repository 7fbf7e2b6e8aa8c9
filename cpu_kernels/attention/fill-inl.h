// Attention's slice of the table. Included inside an instruction set's namespace, last of the family.

// What multiplies the words of type T, and what makes them.
template <class T>
void fill_attention_products(AttentionKernels& table) {
  using Packed = typename WordsOf<T>::Packed;
  using Product = typename WordsOf<T>::Product;
  constexpr int i = static_cast<int>(kDTypeOf<T>);
  table.layout[i] = {Packed::kPerWord, kPanel};
  table.pack_queries[i] = pack_rows<Packed, T>;
  table.pack_keys[i] = pack_transposed<Packed, T>;
  if constexpr (Packed::kPerWord == 2) {
    table.pack_values[i] = pack_pair_panels<T>;
  } else {
    table.pack_values[i] = pack_panels<T>;
  }
  table.score[i] = score<Product>;
  fill_orders(table.weigh[i], []<int Order>() { return weigh<Product, Order>; });
  table.accumulate[i] = accumulate<Product>;
  table.finish[i] = finish<T>;
}

// What converts type T as it reads.
template <class T>
void fill_attention_conversions(AttentionKernels& table) {
  constexpr int i = static_cast<int>(kDTypeOf<T>);
  table.add_bias[i] = add_bias<T>;
  table.convert_query[i] = convert_query<T>;
  table.score_in_place[i] = score_in_place<T>;
  table.accumulate_in_place[i] = accumulate_in_place<T>;
}

template <class... T>
void fill_attention(AttentionKernels& table) {
  (fill_attention_products<T>(table), ...);
  (fill_attention_conversions<T>(table), ...);
  fill_orders(table.soft_cap, []<int Order>() { return soft_cap<Order>; });
  table.row_tile = kRowTile;
  table.lanes = kLanes;
  table.apply_mask = apply_mask;
  table.log_sum_correction[0] = (constants::kSoftmaxShift - constants::kOrder1Shift) * 0.693147181f;
}
