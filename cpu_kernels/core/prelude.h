// What every instruction set's file includes before it opens its own namespace.
//
// Layout of a file in isa/: this header; then, inside `namespace quake { namespace { … } }`, the vector
// shim of that instruction set followed by isa/kernels-inl.h, that is by the kernels of all families, which are
// written against the shim (*-inl.h). Everything there has internal linkage: one kernel compiled for two
// instruction sets must never be merged by the linker. For the same reason no header with inline or template
// functions of the standard library is used below this line.

#ifndef QUAKE_CORE_PRELUDE_H_
#define QUAKE_CORE_PRELUDE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/constants.h"
#include "core/norm.h"
#include "core/packed.h"
#include "core/segments.h"
#include "core/sizes.h"
#include "core/types.h"

#define QUAKE_INLINE [[gnu::always_inline]] static inline
#define QUAKE_INLINE_MEMBER [[gnu::always_inline]] inline
#define QUAKE_INLINE_LAMBDA __attribute__((always_inline))  // behind a lambda's parameters

namespace quake {

// Storage types: a float16 or bfloat16 in memory is its 16 bits. (Internal linkage does not matter here:
// they have no functions.)
struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

}  // namespace quake

#endif  // QUAKE_CORE_PRELUDE_H_
