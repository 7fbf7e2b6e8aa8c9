#include "isa/dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <list>
#include <stdexcept>

#include "isa/sets.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#else
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quake {
namespace {

struct InstructionSet {
  const char* name;
  const char* extended;  // the set that it adds to, or "none"
  bool (*runs_here)();   // but for what the extended one takes
  void (*fill)(KernelTable&);
};

// The set that the environment names, or nothing.
std::string_view forced_set() {
  const char* const name = std::getenv("QUAKE_JAX_ISA");
  return name == nullptr ? "" : name;
}

bool is_set(std::string_view name) {
  constexpr std::string_view kNames[] = {
#define QUAKE_ISA(processor, name, extended, features) #name,
#include "isa/list.h"
#undef QUAKE_ISA
  };
  return std::find(std::begin(kNames), std::end(kNames), name) != std::end(kNames);
}

// Whether the CPU has what list.h calls `name`, and the operating system lets a process use it.
#if defined(__aarch64__)
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
  throw std::logic_error(std::string("no row for the feature ") + name);
}
#else
// Linux gives a process the registers of AMX when it asks: from then on alternate stacks for signals must have
// room for them (11 KB), and where a thread has a smaller one, it says no. Not if another set is forced.
bool may_use_matrices() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h
  static const bool granted = [] {
    const std::string_view wanted = forced_set();
    return (!is_set(wanted) || wanted.ends_with("amx")) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

bool has_feature(const char* name) {
  enum Register { kEax, kEbx, kEcx, kEdx };
  // What the operating system saves of a thread, as bits of XCR0.
  constexpr std::uint32_t kNone = 0, kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  struct Feature {
    const char* name;
    unsigned leaf, subleaf;  // of cpuid
    Register where;
    unsigned bit;
    std::uint32_t saved;
  };
  constexpr Feature kFeatures[] = {
      {"fma", 1, 0, kEcx, 12, kYmm},        {"f16c", 1, 0, kEcx, 29, kYmm},
      {"avx2", 7, 0, kEbx, 5, kYmm},        {"bmi2", 7, 0, kEbx, 8, kNone},
      {"avxvnni", 7, 1, kEax, 4, kYmm},     {"avx512f", 7, 0, kEbx, 16, kZmm},
      {"avx512dq", 7, 0, kEbx, 17, kZmm},   {"avx512bw", 7, 0, kEbx, 30, kZmm},
      {"avx512vl", 7, 0, kEbx, 31, kZmm},   {"avx512vnni", 7, 0, kEcx, 11, kZmm},
      {"avx512bf16", 7, 1, kEax, 5, kZmm},  {"amx-bf16", 7, 0, kEdx, 22, kTiles},
      {"amx-tile", 7, 0, kEdx, 24, kTiles}, {"amx-int8", 7, 0, kEdx, 25, kTiles},
  };
  for (const Feature& feature : kFeatures) {
    if (std::strcmp(feature.name, name) != 0) continue;
    unsigned registers[4];
    const auto ask = [&](unsigned leaf, unsigned subleaf) {
      return __get_cpuid_count(leaf, subleaf, registers, registers + 1, registers + 2, registers + 3) != 0;
    };
    if (feature.saved != kNone) {
      if (!ask(1, 0) || !(registers[kEcx] >> 27 & 1)) return false;  // OSXSAVE: xgetbv exists
      std::uint32_t saved, high;
      asm("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
#if defined(__APPLE__)
      if ((saved & kYmm) == kYmm) saved |= kZmm;  // macOS turns these on when a thread first uses them
#endif
      if ((saved & feature.saved) != feature.saved) return false;
    }
    if (!ask(feature.leaf, feature.subleaf) || !(registers[feature.where] >> feature.bit & 1)) return false;
    return feature.saved != kTiles || may_use_matrices();
  }
  throw std::logic_error(std::string("no row for the feature ") + name);
}
#endif

// The rows of the sets that were compiled (CMakeLists.txt defines QUAKE_HAVE_name as 1 or 0).
constexpr InstructionSet kSets[] = {
#define QUAKE_ROW_1(...) {__VA_ARGS__},
#define QUAKE_ROW_0(...)
#define QUAKE_ROW_IF(built, ...) QUAKE_ROW_##built(__VA_ARGS__)
#define QUAKE_ROW(built, ...) QUAKE_ROW_IF(built, __VA_ARGS__)
#define HAS(feature) &&has_feature(#feature)
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
    const std::string_view wanted = forced_set();
    if (wanted.empty()) return *tables.back();
    std::string names;
    for (const KernelTable* candidate : tables) {
      if (wanted == candidate->isa) return *candidate;
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
