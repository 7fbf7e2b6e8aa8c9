// What the kernel tests share: checks that count, tolerances, guarded buffers, random inputs.

#ifndef QUAKE_TESTS_HARNESS_H_
#define QUAKE_TESTS_HARNESS_H_

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/denormals.h"
#include "core/work.h"
#include "isa/dispatch.h"
#include "accuracy/storage.h"

namespace quake::tests {

inline constexpr double kSmallestNormal = 0x1p-126;
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline int failures = 0, checks = 0;

// Fewer sizes and one order: for valgrind and the thread sanitizer (--thin on the command line).
inline bool thin = false;
inline bool skips(int order) { return thin && order != 3; }

// The lengths that are tried at every misalignment: all up to a vector of 16 elements and one more, and those
// around its multiples.
inline bool is_around_vectors(std::size_t length) { return length <= 17 || (length + 1) % 16 <= 2; }

[[gnu::format(printf, 2, 3)]] inline void check(bool ok, const char* format, ...) {
  ++checks;
  if (ok) return;
  if (++failures > 40) return;
  std::va_list arguments;
  va_start(arguments, format);
  std::fputs("FAILED: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
}

// Whether `actual` is the exact value within the relative bound and the rounding of the storage type.
// `more` is further absolute error.
inline bool within(double actual, double exact, double bound, const Storage& storage, double more = 0) {
  if (std::isnan(exact)) return std::isnan(actual);
  if (std::isinf(exact)) return actual == exact;
  const double relative = bound + storage.half_ulp * (1 + bound);
  if (std::isinf(actual)) return std::fabs(exact) * (1 + relative) >= storage.largest && actual * exact > 0;
  return std::fabs(actual - exact) <= relative * std::fabs(exact) + storage.absolute + more;
}

// A float32 that the kernels take as 0.
inline float flushed(float x) { return std::fabs(x) < kSmallestNormal ? std::copysign(0.0f, x) : x; }

// A buffer whose accessible bytes end (or begin) at an inaccessible page, so that a kernel that touches one
// byte too many dies here.
class GuardedBuffer {
 public:
  explicit GuardedBuffer(std::size_t bytes) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    size_ = (bytes + page - 1) / page * page;
    base_ = static_cast<char*>(mmap(nullptr, size_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page, size_, PROT_READ | PROT_WRITE) != 0) {
      std::perror("guard pages");
      std::exit(2);
    }
    data_ = base_ + page;
    total_ = size_ + 2 * page;
  }
  ~GuardedBuffer() { munmap(base_, total_); }
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;
  char* at_start() { return data_; }
  char* at_end(std::size_t bytes) { return data_ + size_ - bytes; }

 private:
  char *base_, *data_;
  std::size_t size_, total_;
};

// Runs `call(in, out)` on `input` placed at both ends of guarded buffers, with `out_bytes` of output; where
// `may_alias`, in place too. Checks that all give the same bytes, and returns those.
template <class Call>
std::vector<char> check_placements(const std::vector<char>& input, std::size_t out_bytes, bool may_alias,
                                   const Call& call, const std::string& what) {
  static GuardedBuffer in(1 << 18), out(1 << 18);
  const std::size_t bytes = input.size();
  std::vector<char> first(out_bytes);
  bool begun = false;
  for (const bool at_end : {false, true}) {
    for (const bool in_place : {false, true}) {
      if (in_place && !may_alias) continue;
      char* x = at_end ? in.at_end(bytes) : in.at_start();
      char* y = in_place ? x : at_end ? out.at_end(out_bytes) : out.at_start();
      std::copy(input.begin(), input.end(), x);
      call(x, y);
      if (!begun) std::copy_n(y, out_bytes, first.data());
      begun = true;
      check(std::equal(first.begin(), first.end(), y), "%s: at_end %d, in_place %d differs", what.c_str(),
            at_end, in_place);
    }
  }
  return first;
}

// The same call at every misalignment that XLA's buffers and their slices can have: whole elements. (Only masks
// have odd addresses: their rows begin at any byte.) Nothing beside the output is written.
template <class Call>
void check_misalignments(const std::vector<char>& input, const std::vector<char>& expected, std::size_t element,
                         const Call& call, const std::string& what) {
  constexpr std::size_t kMargin = 64;
  std::vector<char> in(input.size() + 64), out(expected.size() + 64 + 2 * kMargin), untouched(out.size(), 0x5a);
  for (std::size_t shift = 0; shift < 64; shift += element) {
    char* x = in.data() + shift;
    const std::size_t at = kMargin + (shift * 5 + element) % 64;  // another misalignment than the input's
    std::copy(input.begin(), input.end(), x);
    out = untouched;
    call(x, out.data() + at);
    const auto y = out.begin() + static_cast<std::ptrdiff_t>(at);
    const auto y_end = y + static_cast<std::ptrdiff_t>(expected.size());
    check(std::equal(expected.begin(), expected.end(), y), "%s: shifted by %zu bytes differs", what.c_str(),
          shift);
    check(std::equal(out.begin(), y, untouched.begin()) && std::equal(y_end, out.end(), untouched.begin()),
          "%s: shifted by %zu bytes writes beside its output", what.c_str(), shift);
    check(std::equal(input.begin(), input.end(), x), "%s: shifted by %zu bytes writes its input", what.c_str(),
          shift);
  }
}

inline std::vector<char> random_input(const Storage& storage, std::size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal(0, 3);
  std::vector<char> bytes(count * storage.size);
  for (std::size_t i = 0; i < count; ++i) storage.put(bytes.data(), i, normal(random));
  return bytes;
}

// The bits of a float, or those that mean the same.
inline void put_special(const Storage& storage, char* data, std::size_t i, std::uint32_t wide,
                        std::uint16_t of_float16) {
  const std::uint16_t narrow =
      storage.dtype == DType::kFloat16 ? of_float16 : static_cast<std::uint16_t>(wide >> 16);
  if (storage.dtype == DType::kFloat32) {
    std::memcpy(data + 4 * i, &wide, 4);
  } else {
    std::memcpy(data + 2 * i, &narrow, 2);
  }
}
inline void put_nan(const Storage& storage, char* data, std::size_t i) {
  put_special(storage, data, i, 0x7fc00000, 0x7e00);
}
inline void put_infinity(const Storage& storage, char* data, std::size_t i, bool negative) {
  put_special(storage, data, i, negative ? 0xff800000 : 0x7f800000, negative ? 0xfc00 : 0x7c00);
}

inline std::string describe(const KernelTable& table, const char* name, const Storage& storage, int order,
                            std::size_t rows, std::size_t columns) {
  return std::string(table.isa) + " " + name + " " + storage.name + " order " + std::to_string(order) + " " +
         std::to_string(rows) + " x " + std::to_string(columns);
}

// ---- Other ways than core/work.h's in_order to run tasks ----

inline void reversed(std::size_t tasks, Task body) {
  ScopedFlushDenormals flush;
  for (std::size_t i = tasks; i-- > 0;) body(i);
}

inline void on_threads(std::size_t tasks, Task body) {
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    ScopedFlushDenormals flush;
    for (std::size_t i; (i = next++) < tasks;) body(i);
  };
  std::thread a(work), b(work);
  work();
  a.join();
  b.join();
}

inline bool has_option(int argc, char** argv, const char* option) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], option) == 0) return true;
  }
  return false;
}

// The exit code of a test that was skipped (SKIP_RETURN_CODE in CMakeLists.txt).
inline constexpr int kSkipped = 77;

// Whether QUAKE_JAX_ISA names an instruction set that this machine does not have; says so.
inline bool lacks_wanted_isa() {
  const char* wanted = std::getenv("QUAKE_JAX_ISA");
  if (wanted == nullptr) return false;
  for (const KernelTable* table : supported_tables()) {
    if (std::strcmp(wanted, table->isa) == 0) return false;
  }
  std::printf("%s: not on this machine\n", wanted);
  return true;
}

// Runs `test` for every instruction set that the machine supports, or for the one in QUAKE_JAX_ISA; returns
// the exit code.
template <class Test>
int run_all(const Test& test) {
  ScopedFlushDenormals flush;
  std::vector<const KernelTable*> tables = supported_tables();
  if (std::getenv("QUAKE_JAX_ISA") != nullptr) tables = {&active_table()};
  for (const KernelTable* table : tables) {
    std::printf("%s\n", table->isa);
    test(*table);
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}

}  // namespace quake::tests

#endif  // QUAKE_TESTS_HARNESS_H_
