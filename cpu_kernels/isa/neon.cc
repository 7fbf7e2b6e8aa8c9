// aarch64 NEON: the vector shim, then the kernels.

#include <arm_neon.h>

#include "core/prelude.h"
#include "isa/sets.h"

namespace quake {
namespace {

#include "isa/neon-inl.h"
#include "isa/kernels-inl.h"

}  // namespace

void isa::fill_neon(KernelTable& table) { fill_all<bfloat16, float, float16>(table); }

}  // namespace quake
