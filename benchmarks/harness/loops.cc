// The loops that `hardware` times: what the hardware does at most. Compiled at run time with VECTOR, the bytes of a
// vector, and for each instruction that the CPU has its macro: VDPBF16PS, VPDPBUSD, TDPBSSD.

extern "C" {

// --- The clock: a chain of dependent multiplications takes a known number of cycles, whatever else the core does.

void clock_chain(long calls) {
  unsigned long x = 3;
#pragma GCC unroll 20
  for (long i = 0; i < calls * 10000; ++i) __asm__ volatile("imul %0, %0" : "+r"(x));
}

#ifdef VECTOR

// --- Instructions between registers

typedef float vector __attribute__((vector_size(VECTOR)));

// Twelve chains: enough to hide a latency of 4 cycles in 2 pipes, few enough for the 16 registers of AVX2.
#define CHAIN(instruction, a) __asm__ volatile(instruction " %1, %1, %0" : "+v"(a) : "v"(x))
#define FOUR_CHAINS(instruction, a, b, c, d) \
  CHAIN(instruction, a);                     \
  CHAIN(instruction, b);                     \
  CHAIN(instruction, c);                     \
  CHAIN(instruction, d)
#define CHAINS(name, instruction)                                               \
  void name(long calls) {                                                       \
    vector x, a = {1}, b = {2}, c = {3}, d = {4}, e = {5}, f = {6};             \
    vector g = {7}, h = {8}, i = {9}, j = {10}, k = {11}, l = {12};             \
    for (int lane = 0; lane < VECTOR / 4; ++lane) x[lane] = 1e-6f * (lane + 1); \
    for (long call = 0; call < calls * 1000; ++call) {                          \
      FOUR_CHAINS(instruction, a, b, c, d);                                     \
      FOUR_CHAINS(instruction, e, f, g, h);                                     \
      FOUR_CHAINS(instruction, i, j, k, l);                                     \
    }                                                                           \
  }

CHAINS(vfmadd231ps, "vfmadd231ps")
#ifdef VDPBF16PS
CHAINS(vdpbf16ps, "vdpbf16ps")
#endif
#ifdef VPDPBUSD
CHAINS(vpdpbusd, "vpdpbusd")
#endif

#ifdef TDPBSSD
// Registers of 16 lines of 64 bytes; four of them are added to in turn.
void configure_tiles() {
  struct {
    unsigned char palette, start_row, reserved[14];
    unsigned short bytes_of_row[16];
    unsigned char rows[16];
  } configuration = {1};
  for (int i = 0; i < 8; ++i) configuration.bytes_of_row[i] = 64, configuration.rows[i] = 16;
  __asm__ volatile("ldtilecfg %0" : : "m"(configuration));  // and all tiles are zero
}

#define STEP(instruction, tile) __asm__ volatile(instruction " %%tmm7, %%tmm6, %%tmm" #tile : :)
#define MATRICES(name, instruction)           \
  void name(long calls) {                     \
    configure_tiles();                        \
    for (long i = 0; i < calls * 1000; ++i) { \
      STEP(instruction, 0);                   \
      STEP(instruction, 1);                   \
      STEP(instruction, 2);                   \
      STEP(instruction, 3);                   \
    }                                         \
    __asm__ volatile("tilerelease");          \
  }

MATRICES(tdpbf16ps, "tdpbf16ps")
MATRICES(tdpbssd, "tdpbssd")
#endif

}  // extern "C"

// --- Reading

typedef long long words __attribute__((vector_size(VECTOR)));

// Reads an array in streams, each a part of it, prefetching so many bytes ahead. Eight loads are under way at a time;
// the result is stored so that nothing is left out.
template <int streams, int ahead>
void read_loop(const char* from, long bytes, long calls) {
  static volatile long long sink;
  constexpr int lines = 8 / streams;
  for (long call = 0; call < calls; ++call) {
    words a[8] = {{0}};
    const long part = bytes / streams / 512 * 512;
    for (long at = 0; at < part; at += lines * sizeof(words)) {
      __asm__ volatile("" : : : "memory");
#pragma GCC unroll 8
      for (int stream = 0; stream < streams; ++stream) {
        const char* p = from + stream * part + at;
#pragma GCC unroll 8
        for (int i = 0; i < lines; ++i) {
          if (ahead) __builtin_prefetch(p + ahead + i * sizeof(words));
          a[stream * lines + i] ^= ((const words*)p)[i];
        }
      }
    }
    a[0] ^= a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
    sink = a[0][0] ^ a[0][1];
  }
}

extern "C" {

#define READ(streams, ahead)                                                \
  void read_##streams##_##ahead(const char* from, long bytes, long calls) { \
    read_loop<streams, ahead>(from, bytes, calls);                          \
  }
#define READS(streams) READ(streams, 0) READ(streams, 1024) READ(streams, 4096)

READS(1)
READS(2)
READS(4)
READS(8)
#endif  // VECTOR
}
