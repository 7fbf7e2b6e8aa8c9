#include "isa/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <list>
#include <stdexcept>

#include "isa/sets.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace quake {
namespace {

struct InstructionSet {
  const char* name;
  const char* extended;  // the set that it adds to, or "none"
  bool (*runs_here)();   // but for what the extended one takes
  void (*fill)(KernelTable&);
};

#if defined(__aarch64__)
// What list.h calls features, as the kernel of the operating system names them.
bool has_feature(const char* name) {
  struct Feature {
    const char* name;
    const char* of_apple;
    unsigned long auxiliary;  // of Linux: which vector of bits, and the bit
    unsigned bit;
  };
  constexpr unsigned long kHwcap = 16, kHwcap2 = 26;
  constexpr Feature kFeatures[] = {
      {"dotprod", "hw.optional.arm.FEAT_DotProd", kHwcap, 20},
      {"bf16", "hw.optional.arm.FEAT_BF16", kHwcap2, 14},
  };
  for (const Feature& feature : kFeatures) {
    if (std::strcmp(feature.name, name) != 0) continue;
#if defined(__APPLE__)
    int value = 0;
    std::size_t size = sizeof value;
    return sysctlbyname(feature.of_apple, &value, &size, nullptr, 0) == 0 && value != 0;
#else
    return (getauxval(feature.auxiliary) >> feature.bit & 1) != 0;
#endif
  }
  return false;
}
#define QUAKE_HAS_FEATURE(feature) has_feature(#feature)
#else
// The compiler's builtin asks cpuid, and whether the operating system saves the wide registers.
#define QUAKE_HAS_FEATURE(feature) __builtin_cpu_supports(#feature)
#endif

// The rows of the sets that were compiled (CMakeLists.txt defines QUAKE_HAVE_name as 1 or 0).
constexpr InstructionSet kSets[] = {
#define QUAKE_ROW_1(...) {__VA_ARGS__},
#define QUAKE_ROW_0(...)
#define QUAKE_ROW_IF(built, ...) QUAKE_ROW_##built(__VA_ARGS__)
#define QUAKE_ROW(built, ...) QUAKE_ROW_IF(built, __VA_ARGS__)
#define HAS(feature) &&QUAKE_HAS_FEATURE(feature)
#define QUAKE_ISA(processor, name, extended, features) \
  QUAKE_ROW(                                           \
      QUAKE_HAVE_##name, #name, #extended, []() -> bool { return true features; }, isa::fill_##name)
#include "isa/list.h"
#undef QUAKE_ISA
#undef HAS
};

const KernelTable* find(const std::list<KernelTable>& tables, const char* name) {
  for (const KernelTable& table : tables) {
    if (std::strcmp(table.isa, name) == 0) return &table;
  }
  return nullptr;
}

std::list<KernelTable> make_tables() {
  std::list<KernelTable> tables;
  for (const InstructionSet& set : kSets) {
    const bool extends = std::strcmp(set.extended, "none") != 0;
    const KernelTable* const extended = extends ? find(tables, set.extended) : nullptr;
    if ((extends && !extended) || !set.runs_here()) continue;
    KernelTable& table = tables.emplace_back(extended ? *extended : KernelTable{});
    table.isa = set.name;
    set.fill(table);
  }
  return tables;
}

}  // namespace

const std::vector<const KernelTable*>& supported_tables() {
  static const std::list<KernelTable> tables = make_tables();
  static const std::vector<const KernelTable*> pointers = [] {
    std::vector<const KernelTable*> all;
    for (const KernelTable& table : tables) all.push_back(&table);
    return all;
  }();
  return pointers;
}

const KernelTable& active_table() {
  static const KernelTable& table = []() -> const KernelTable& {
    const std::vector<const KernelTable*>& tables = supported_tables();
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

ElementwiseKernels::UnaryFn find_unary(const KernelTable& table, std::string_view name, DType dtype,
                                       int order_index) {
  constexpr std::string_view kNames[] = {
#define QUAKE_NAME(name, Functor) #name,
      QUAKE_UNARY_KERNELS(QUAKE_NAME)
#undef QUAKE_NAME
  };
  for (std::size_t i = 0; i < std::size(kNames); ++i) {
    if (kNames[i] == name) return table.elementwise.unary[i][static_cast<int>(dtype)][order_index];
  }
  return nullptr;
}

}  // namespace quake
