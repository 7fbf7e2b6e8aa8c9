// The slice of the table that reduces rows, for the types T. Included inside an instruction set's namespace,
// last of the family.

template <Reduction R, class... T>
void fill_reduction(RowKernels& table) {
  constexpr int r = static_cast<int>(R);
  (fill_orders(table.rows[r][static_cast<int>(kDTypeOf<T>)],
               []<int Order>() {
                 if constexpr (R == Reduction::kLogSumExp) {
                   return log_sum_exp_rows<T, Order>;
                 } else {
                   return reduce_rows<R, T, Order>;
                 }
               }),
   ...);
  (fill_orders(table.columns[r][static_cast<int>(kDTypeOf<T>)],
               []<int Order>() { return reduce_columns<R, T, Order>; }),
   ...);
  if constexpr (R != Reduction::kLogSumExp) {
    (fill_orders(table.masked[r][static_cast<int>(kDTypeOf<T>)],
                 []<int Order>() { return reduce_masked_rows<R, T, Order>; }),
     ...);
  }
}

template <class... T>
void fill_rows(RowKernels& table) {
  fill_reduction<Reduction::kSoftmax, T...>(table);
  fill_reduction<Reduction::kLogSoftmax, T...>(table);
  fill_reduction<Reduction::kLogSumExp, T...>(table);
  ((table.norm[static_cast<int>(kDTypeOf<T>)] = norm_rows<T>), ...);
}
