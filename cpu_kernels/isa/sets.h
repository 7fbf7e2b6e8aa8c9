// What the instruction sets' files export: one function each, which fills their slots of a table.

#ifndef QUAKE_ISA_SETS_H_
#define QUAKE_ISA_SETS_H_

#include "table.h"

namespace quake::isa {

#define QUAKE_ISA(processor, name, extended, features) void fill_##name(KernelTable& table);
#include "isa/list.h"
#undef QUAKE_ISA

}  // namespace quake::isa

#endif  // QUAKE_ISA_SETS_H_
