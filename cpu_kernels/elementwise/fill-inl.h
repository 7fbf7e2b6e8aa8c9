// The element-wise slice of the table, for the types T. Included inside an instruction set's namespace, last of
// the family.

template <class... T>
void fill_elementwise(ElementwiseKernels& table) {
#define QUAKE_FILL(name, Functor)                                                               \
  (fill_orders(table.unary[static_cast<int>(Unary::k##Functor)][static_cast<int>(kDTypeOf<T>)], \
               []<int Order>() { return map<Functor, T, Order>; }),                             \
   ...);
  QUAKE_UNARY_KERNELS(QUAKE_FILL)
#undef QUAKE_FILL
#define QUAKE_FILL(name, Functor)                                                                 \
  (fill_orders(table.binary[static_cast<int>(Binary::k##Functor)][static_cast<int>(kDTypeOf<T>)], \
               []<int Order>() { return map_binary<Functor, T, Order>; }),                        \
   ...);
  QUAKE_BINARY_KERNELS(QUAKE_FILL)
#undef QUAKE_FILL
}
