// The table of this instruction set's kernels. Included inside its namespace, last.

// A row of the table: a kernel for every order. Kernels are function templates, which cannot be passed on as
// such, so each family has a struct that names its member for an order.
template <class Fn, class Family>
constexpr void fill_orders(Fn (&row)[kMaxOrder]) {
  row[0] = Family::template kernel<1>();
  row[1] = Family::template kernel<2>();
  row[2] = Family::template kernel<3>();
  row[3] = Family::template kernel<4>();
  row[4] = Family::template kernel<5>();
}

template <template <class> class Family, class Fn>
constexpr void fill(Fn (&rows)[static_cast<int>(DType::kCount)][kMaxOrder]) {
  fill_orders<Fn, Family<bfloat16>>(rows[static_cast<int>(DType::kBFloat16)]);
  if constexpr (!kOnlyBFloat16) {
    fill_orders<Fn, Family<float>>(rows[static_cast<int>(DType::kFloat32)]);
    fill_orders<Fn, Family<float16>>(rows[static_cast<int>(DType::kFloat16)]);
  }
}

template <class Functor>
struct MapOf {
  template <class T>
  struct With {
    template <int Order>
    static constexpr ElementwiseFn kernel() {
      return map<Functor, T, Order>;
    }
  };
};

template <class Functor>
struct MapBinaryOf {
  template <class T>
  struct With {
    template <int Order>
    static constexpr BinaryFn kernel() {
      return map_binary<Functor, T, Order>;
    }
  };
};

template <Reduction R>
struct RowsOf {
  template <class T>
  struct With {
    template <int Order>
    static constexpr RowsFn kernel() {
      if constexpr (R == Reduction::kLogSumExp) {
        return log_sum_exp_rows<T, Order>;
      } else {
        return reduce_rows<R, T, Order>;
      }
    }
  };
};

template <Reduction R>
struct ColumnsOf {
  template <class T>
  struct With {
    template <int Order>
    static constexpr ColumnsFn kernel() {
      return reduce_columns<R, T, Order>;
    }
  };
};

template <Reduction R>
struct MaskedRowsOf {
  template <class T>
  struct With {
    template <int Order>
    static constexpr MaskedRowsFn kernel() {
      return reduce_masked_rows<R, T, Order>;
    }
  };
};

template <Reduction R>
constexpr void fill_reduction(KernelTable& table) {
  fill<RowsOf<R>::template With>(table.rows[static_cast<int>(R)]);
  fill<ColumnsOf<R>::template With>(table.columns[static_cast<int>(R)]);
  if constexpr (R != Reduction::kLogSumExp) {
    fill<MaskedRowsOf<R>::template With>(table.masked_rows[static_cast<int>(R)]);
  }
}

constexpr KernelTable make_table(const char* isa) {
  KernelTable table = {isa, {}, {}, {}, {}, {}, {}};
  table.attention = attention_kernels();
#define QUAKE_FILL(name, Functor) \
  fill<MapOf<Functor>::template With>(table.elementwise[static_cast<int>(Elementwise::k##Functor)]);
  QUAKE_ELEMENTWISE_KERNELS(QUAKE_FILL)
#undef QUAKE_FILL
#define QUAKE_FILL(name, Functor) \
  fill<MapBinaryOf<Functor>::template With>(table.binary[static_cast<int>(Binary::k##Functor)]);
  QUAKE_BINARY_KERNELS(QUAKE_FILL)
#undef QUAKE_FILL
  fill_reduction<Reduction::kSoftmax>(table);
  fill_reduction<Reduction::kLogSoftmax>(table);
  fill_reduction<Reduction::kLogSumExp>(table);
  return table;
}
