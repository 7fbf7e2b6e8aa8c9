// The slice of dense layers. Included inside an instruction set's namespace, last of the family.

// A format's products, which know its Words, in all shapes.
template <class Words, bool kGrouped, int I = 0>
void fill_dense_products(DenseKernels& table, DenseFormat format) {
  if constexpr (I < kDenseShapes.count) {
    constexpr int kRows = static_cast<int>(kDenseShapes.at[I].rows);
    constexpr int kPanels = static_cast<int>(kDenseShapes.at[I].panels);
    const int f = static_cast<int>(format);
    table.product[f][I] = dense_product<Words, kRows, kPanels>;
    if constexpr (kGrouped) table.grouped[f][I] = grouped_product<Words, kRows, kPanels>;
    fill_dense_products<Words, kGrouped, I + 1>(table, format);
  }
}

// What encodes rows of the types T for them.
template <class Encoder, class... T>
void fill_dense_rows(DenseKernels& table, DenseFormat format) {
  const int f = static_cast<int>(format);
  table.row_word[f] = Encoder::kElements;
  ((table.encode[f][static_cast<int>(kDTypeOf<T>)] = Encoder::template encode<T>), ...);
}

// What an instruction set with products of its own fills again.
template <bool kInPairs, class... T>
void fill_dense_bfloats(DenseKernels& table) {
  fill_dense_products<DenseBFloats<kInPairs>, false>(table, DenseFormat::kBFloat16);
  fill_dense_rows<EncodeConverted<BFloatRow<kInPairs>>, T...>(table, DenseFormat::kBFloat16);
}
template <bool kByFours, class... T>
void fill_dense_quantized(DenseKernels& table) {
  using Encoder = EncodeQuantized<kByFours ? 4 : 2>;
  fill_dense_products<QuantizedBytes<kByFours>, true>(table, DenseFormat::kInt8Quantized);
  fill_dense_products<QuantizedCodes<kByFours>, true>(table, DenseFormat::kInt4Quantized);
  fill_dense_rows<Encoder, T...>(table, DenseFormat::kInt8Quantized);
  fill_dense_rows<Encoder, T...>(table, DenseFormat::kInt4Quantized);
}

template <class... T>
void fill_dense(DenseKernels& table) {
  table.shape_count = kDenseShapes.count;
  for (int i = 0; i < kDenseShapes.count; ++i) table.shapes[i] = kDenseShapes.at[i];
  fill_dense_products<DenseFloats, false>(table, DenseFormat::kFloat32);
  fill_dense_products<DenseBytes, true>(table, DenseFormat::kInt8);
  fill_dense_products<DenseCodes, true>(table, DenseFormat::kInt4);
  fill_dense_rows<EncodeConverted<FloatRow>, T...>(table, DenseFormat::kFloat32);
  fill_dense_rows<EncodeConverted<FloatRow>, T...>(table, DenseFormat::kInt8);
  fill_dense_rows<EncodeConverted<FloatRow>, T...>(table, DenseFormat::kInt4);
  fill_dense_bfloats<false, T...>(table);
  fill_dense_quantized<false, T...>(table);
  ((table.normalize[static_cast<int>(kDTypeOf<T>)] = normalize_of<T>), ...);
  ((table.store[static_cast<int>(kDTypeOf<T>)] = store_tile<T>), ...);
  table.scale = scale_tile<>;
}
