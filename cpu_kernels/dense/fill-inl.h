// The slice of dense layers. Included inside an instruction set's namespace, last of the family.

// A format's products, which know its Words, in all shapes.
template <class Words, bool kGrouped, int I = 0>
void fill_dense_products(DenseKernels& table, DenseFormat format) {
  if constexpr (I < kDenseShapes.count) {
    constexpr int kRows = static_cast<int>(kDenseShapes.at[I].rows);
    constexpr int kPanels = static_cast<int>(kDenseShapes.at[I].panels);
    DenseKernels::Format& f = table.of(format);
    constexpr bool kExpanded = Words::kFactors > 1 && kDenseShapes.at[I].expanded;
    f.shapes[I] = {kDenseShapes.at[I].rows, kDenseShapes.at[I].panels, kExpanded};
    f.shape_count = kDenseShapes.count;
    if constexpr (kExpanded) {
      using Expanded = typename Words::Expanded;
      f.expand = expand_panel<Words>;
      f.product[I] = dense_product<Expanded, kRows, kPanels>;
      if constexpr (kGrouped && std::is_same_v<typename Expanded::Sum, vi>) {
        f.grouped[I] = grouped_product<Expanded, kRows, kPanels>;
      }
    } else {
      f.product[I] = dense_product<Words, kRows, kPanels>;
      if constexpr (kGrouped) f.grouped[I] = grouped_product<Words, kRows, kPanels>;
    }
    fill_dense_products<Words, kGrouped, I + 1>(table, format);
  }
}

// Of few rows alone.
template <int I = 0>
void fill_narrow_products(DenseKernels& table) {
  if constexpr (!kDenseShapes.at[I].expanded) {
    DenseKernels::Format& f = table.of(DenseFormat::kInt4Narrow);
    f.shapes[I] = kDenseShapes.at[I];
    f.shape_count = I + 1;
    f.grouped[I] =
        narrow_product<static_cast<int>(kDenseShapes.at[I].rows), static_cast<int>(kDenseShapes.at[I].panels)>;
    fill_narrow_products<I + 1>(table);
  }
}

// Where looking up bytes is cheaper than floats.
template <int I = 0>
void fill_byte_codes(DenseKernels& table) {
  DenseKernels::Format& f = table.of(DenseFormat::kInt4);
  if constexpr (kDenseShapes.at[I].expanded) {
    f.expand = expand_codes<expand_panel<DenseByteCodes>, expand_panel<DenseCodes>>;
  } else {
    constexpr int kRows = static_cast<int>(kDenseShapes.at[I].rows);
    constexpr int kPanels = static_cast<int>(kDenseShapes.at[I].panels);
    f.grouped[I] = product_of_codes<grouped_product<DenseByteCodes, kRows, kPanels>,
                                    grouped_product<DenseCodes, kRows, kPanels>>;
    fill_byte_codes<I + 1>(table);
  }
}

// What encodes rows of the types T for them.
template <class Encoder, class... T>
void fill_dense_rows(DenseKernels& table, DenseFormat format) {
  DenseKernels::Format& f = table.of(format);
  f.row_elements = Encoder::kElements;
  f.encoded_words = Encoder::kWords;
  ((f.encode[static_cast<int>(kDTypeOf<T>)] = Encoder::template encode<T>), ...);
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
  fill_dense_rows<Encoder, T..., std::int8_t>(table, DenseFormat::kInt8Quantized);
  fill_dense_rows<Encoder, T...>(table, DenseFormat::kInt4Quantized);
}

template <class... T>
void fill_dense_narrow(DenseKernels& table) {
  fill_dense_rows<EncodeQuantized<4>, T...>(table, DenseFormat::kInt4Narrow);
  fill_narrow_products(table);
}

template <class... T>
void fill_dense(DenseKernels& table) {
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
  table.store[static_cast<int>(DType::kInt8)] = store_tile<std::int8_t>;
  table.scale = scale_tile<>;
}
