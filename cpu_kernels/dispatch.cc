#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace quake {

#if defined(QUAKE_HAVE_BASELINE)
extern const KernelTable kBaselineTable;
#endif
#if defined(QUAKE_HAVE_AVX2)
extern const KernelTable kAvx2Table;
#endif
#if defined(QUAKE_HAVE_AVX512)
extern const KernelTable kAvx512Table;
#endif
#if defined(QUAKE_HAVE_AVX512BF16)
extern const KernelTable kAvx512Bf16Table;
#endif
#if defined(QUAKE_HAVE_NEON)
extern const KernelTable kNeonTable;
#endif

namespace {

template <class Fn, std::size_t N>
void take_bfloat16(Fn (&to)[N][static_cast<int>(DType::kCount)][kMaxOrder],
                   const Fn (&from)[N][static_cast<int>(DType::kCount)][kMaxOrder]) {
  constexpr int kType = static_cast<int>(DType::kBFloat16);
  for (std::size_t i = 0; i < N; ++i) std::copy(from[i][kType], from[i][kType] + kMaxOrder, to[i][kType]);
}

void take_bfloat16(AttentionKernels& to, const AttentionKernels& from) {
  constexpr int kType = static_cast<int>(DType::kBFloat16);
  to.per_word[kType] = from.per_word[kType];
  to.pack_queries[kType] = from.pack_queries[kType];
  to.pack_keys[kType] = from.pack_keys[kType];
  to.pack_values[kType] = from.pack_values[kType];
  to.score[kType] = from.score[kType];
  std::copy(from.weigh[kType], from.weigh[kType] + kMaxOrder, to.weigh[kType]);
  to.accumulate[kType] = from.accumulate[kType];
  to.finish[kType] = from.finish[kType];
}

// `table` with the bfloat16 kernels of `own`, and its name.
[[maybe_unused]] KernelTable with_bfloat16(KernelTable table, const KernelTable& own) {
  table.isa = own.isa;
  take_bfloat16(table.elementwise, own.elementwise);
  take_bfloat16(table.binary, own.binary);
  take_bfloat16(table.rows, own.rows);
  take_bfloat16(table.columns, own.columns);
  take_bfloat16(table.masked_rows, own.masked_rows);
  take_bfloat16(table.attention, own.attention);
  return table;
}

}  // namespace

std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables;
#if defined(QUAKE_HAVE_BASELINE)
  tables.push_back(&kBaselineTable);
#endif
// The compiler's builtin asks cpuid and whether the operating system saves the wide registers.
#if defined(QUAKE_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    tables.push_back(&kAvx2Table);
  }
#endif
#if defined(QUAKE_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("f16c")) {
    tables.push_back(&kAvx512Table);
#if defined(QUAKE_HAVE_AVX512BF16)
    if (__builtin_cpu_supports("avx512bf16")) {
      static const KernelTable table = with_bfloat16(kAvx512Table, kAvx512Bf16Table);
      tables.push_back(&table);
    }
#endif
  }
#endif
// Every aarch64 processor has NEON with float16 conversions.
#if defined(QUAKE_HAVE_NEON)
  tables.push_back(&kNeonTable);
#endif
  return tables;
}

const KernelTable& active_table() {
  static const KernelTable& table = []() -> const KernelTable& {
    const std::vector<const KernelTable*> tables = supported_tables();
    const char* wanted = std::getenv("QUAKE_JAX_ISA");
    if (wanted == nullptr || *wanted == '\0') return *tables.back();
    std::string names;
    for (const KernelTable* candidate : tables) {
      if (std::string(wanted) == candidate->isa) return *candidate;
      names += names.empty() ? "" : ", ";
      names += candidate->isa;
    }
    throw std::runtime_error("QUAKE_JAX_ISA is '" + std::string(wanted) +
                             "', but this machine and build support: " + names +
                             ". Unset it to use the best one.");
  }();
  return table;
}

}  // namespace quake
