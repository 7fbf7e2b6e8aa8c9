// How the families fill their slices of the table. Included inside an instruction set's namespace.

template <class T>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
constexpr DType kDTypeOf<bfloat16> = DType::kBFloat16;
template <>
constexpr DType kDTypeOf<float16> = DType::kFloat16;
template <>
constexpr DType kDTypeOf<std::int8_t> = DType::kInt8;

// A slot for every order: kernel<Order>() returns a kernel. With QUAKE_TWO_ORDERS those between have that of
// order 5, which keeps their bounds: what an order changes is arithmetic, and compilers that watch memory take
// minutes for each.
template <class Fn, class Kernel>
void fill_orders(Fn (&slots)[kMaxOrder], const Kernel& kernel) {
#ifdef QUAKE_TWO_ORDERS
  slots[1] = slots[2] = slots[3] = kernel.template operator()<5>();
#else
  slots[1] = kernel.template operator()<2>();
  slots[2] = kernel.template operator()<3>();
  slots[3] = kernel.template operator()<4>();
#endif
  slots[0] = kernel.template operator()<1>();
  slots[4] = kernel.template operator()<5>();
}
