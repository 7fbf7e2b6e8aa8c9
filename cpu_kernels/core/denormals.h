// The floating-point mode that the kernels require: denormals flushed on input and output.

#ifndef QUAKE_CORE_DENORMALS_H_
#define QUAKE_CORE_DENORMALS_H_

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quake {

// Flushes denormals in this thread while it lives. XLA sets the same mode around its CPU code, so this
// is a guarantee to the kernels, not a change of what XLA's users see.
class ScopedFlushDenormals {
 public:
  ScopedFlushDenormals() : saved_(read()) { write(saved_ | kFlushBits); }
  ~ScopedFlushDenormals() { write(saved_); }
  ScopedFlushDenormals(const ScopedFlushDenormals&) = delete;
  ScopedFlushDenormals& operator=(const ScopedFlushDenormals&) = delete;

 private:
#if defined(__x86_64__)
  using Word = unsigned int;
  static constexpr Word kFlushBits = 0x8040;  // MXCSR: FTZ and DAZ
  static Word read() { return _mm_getcsr(); }
  static void write(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
  using Word = std::uint64_t;
  static constexpr Word kFlushBits = Word{1} << 24;  // FPCR.FZ: float32 and float64, not float16
  static Word read() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void write(Word word) { asm volatile("msr fpcr, %0" : : "r"(word)); }
#else
#error "quake_jax supports x86-64 and aarch64"
#endif
  Word saved_;
};

}  // namespace quake

#endif  // QUAKE_CORE_DENORMALS_H_
