// The table of this instruction set's kernels. Included inside its namespace, last.

template <class Functor>
constexpr void fill(ElementwiseFn (&row)[static_cast<int>(DType::kCount)][kMaxOrder]) {
  const ElementwiseFn functions[][kMaxOrder] = {
      {map<Functor, float, 1>, map<Functor, float, 2>, map<Functor, float, 3>,
       map<Functor, float, 4>, map<Functor, float, 5>},
      {map<Functor, bfloat16, 1>, map<Functor, bfloat16, 2>, map<Functor, bfloat16, 3>,
       map<Functor, bfloat16, 4>, map<Functor, bfloat16, 5>},
      {map<Functor, float16, 1>, map<Functor, float16, 2>, map<Functor, float16, 3>,
       map<Functor, float16, 4>, map<Functor, float16, 5>}};
  for (int dtype = 0; dtype < static_cast<int>(DType::kCount); ++dtype) {
    for (int i = 0; i < kMaxOrder; ++i) row[dtype][i] = functions[dtype][i];
  }
}

constexpr KernelTable make_table(const char* isa) {
  KernelTable table = {
      isa,
      {},
      {{softmax<float, 1>, softmax<float, 2>, softmax<float, 3>, softmax<float, 4>,
        softmax<float, 5>},
       {softmax<bfloat16, 1>, softmax<bfloat16, 2>, softmax<bfloat16, 3>, softmax<bfloat16, 4>,
        softmax<bfloat16, 5>},
       {softmax<float16, 1>, softmax<float16, 2>, softmax<float16, 3>, softmax<float16, 4>,
        softmax<float16, 5>}}};
#define QUAKE_FILL(name, Functor) fill<Functor>(table.elementwise[static_cast<int>(Elementwise::k##Functor)]);
  QUAKE_ELEMENTWISE_KERNELS(QUAKE_FILL)
#undef QUAKE_FILL
  return table;
}
