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

template <class Encoder>
void fill_dense_rows(DenseKernels& table, DenseFormat format) {
  const int f = static_cast<int>(format);
  table.row_word[f] = Encoder::kElements;
  table.encode[f][static_cast<int>(DType::kFloat32)] = encode_floats<Encoder, float>;
  table.encode[f][static_cast<int>(DType::kBFloat16)] = encode_floats<Encoder, bfloat16>;
  table.encode[f][static_cast<int>(DType::kFloat16)] = encode_floats<Encoder, float16>;
}
template <std::size_t kElements>
void fill_quantized_rows(DenseKernels& table, DenseFormat format) {
  const int f = static_cast<int>(format);
  table.row_word[f] = kElements;
  table.encode[f][static_cast<int>(DType::kFloat32)] = encode_quantized<kElements, float>;
  table.encode[f][static_cast<int>(DType::kBFloat16)] = encode_quantized<kElements, bfloat16>;
  table.encode[f][static_cast<int>(DType::kFloat16)] = encode_quantized<kElements, float16>;
}

// What an instruction set with products of its own fills again.
template <bool kInPairs>
void fill_dense_bfloats(DenseKernels& table) {
  fill_dense_products<DenseBFloats<kInPairs>, false>(table, DenseFormat::kBFloat16);
  fill_dense_rows<EncodeBFloats<kInPairs>>(table, DenseFormat::kBFloat16);
}
template <bool kByFours>
void fill_dense_quantized(DenseKernels& table) {
  fill_dense_products<QuantizedBytes<kByFours>, true>(table, DenseFormat::kInt8Quantized);
  fill_dense_products<QuantizedCodes<kByFours>, true>(table, DenseFormat::kInt4Quantized);
  fill_quantized_rows<kByFours ? 4 : 2>(table, DenseFormat::kInt8Quantized);
  fill_quantized_rows<kByFours ? 4 : 2>(table, DenseFormat::kInt4Quantized);
}

template <class = void>
void fill_dense(DenseKernels& table) {
  table.shape_count = kDenseShapes.count;
  for (int i = 0; i < kDenseShapes.count; ++i) table.shapes[i] = kDenseShapes.at[i];
  fill_dense_products<DenseFloats, false>(table, DenseFormat::kFloat32);
  fill_dense_products<DenseBytes, true>(table, DenseFormat::kInt8);
  fill_dense_products<DenseCodes, true>(table, DenseFormat::kInt4);
  fill_dense_rows<EncodeFloats>(table, DenseFormat::kFloat32);
  fill_dense_rows<EncodeFloats>(table, DenseFormat::kInt8);
  fill_dense_rows<EncodeFloats>(table, DenseFormat::kInt4);
  fill_dense_bfloats<false>(table);
  fill_dense_quantized<false>(table);
  table.normalize[static_cast<int>(DType::kFloat32)] = normalize_of<float>;
  table.normalize[static_cast<int>(DType::kBFloat16)] = normalize_of<bfloat16>;
  table.normalize[static_cast<int>(DType::kFloat16)] = normalize_of<float16>;
  table.scale = scale_tile<>;
  table.store[static_cast<int>(DType::kFloat32)] = store_tile<float>;
  table.store[static_cast<int>(DType::kBFloat16)] = store_tile<bfloat16>;
  table.store[static_cast<int>(DType::kFloat16)] = store_tile<float16>;
}
