// The instruction sets, the weakest first: QUAKE_ISA(processor, name, the set that it extends, features).
//
// isa/NAME.cc has a set's kernels. `features` are all that they take of the CPU, for each of which
// CMakeLists.txt, which reads these rows too, gives the compiler an option, and of which dispatch.cc asks the
// CPU whether it has them. A set that extends another has its features and options too, and its kernels but for
// those that it names. Without an include guard: each who includes this file defines QUAKE_ISA first.

// clang-format off
QUAKE_ISA(x86, baseline, none, )
QUAKE_ISA(x86, avx2, none, HAS(avx2) HAS(fma) HAS(f16c))
QUAKE_ISA(x86, avx2vnni, avx2, HAS(avxvnni))
QUAKE_ISA(x86, avx512, none, HAS(avx512f) HAS(avx512dq) HAS(avx512bw) HAS(avx512vl) HAS(fma) HAS(f16c) HAS(bmi2))
QUAKE_ISA(x86, avx512vnni, avx512, HAS(avx512vnni))
QUAKE_ISA(x86, avx512bf16, avx512vnni, HAS(avx512bf16))
QUAKE_ISA(x86, avx512bf16amx, avx512bf16, HAS(amx-tile) HAS(amx-int8) HAS(amx-bf16))
QUAKE_ISA(arm, neon, none, )
QUAKE_ISA(arm, neondot, neon, HAS(dotprod))
QUAKE_ISA(arm, neonbf16, neondot, HAS(bf16))
// clang-format on
