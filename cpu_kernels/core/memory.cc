#include "core/memory.h"

namespace quake {

Bytes allocate(std::size_t count) {
  return Bytes(static_cast<char*>(::operator new[](count, std::align_val_t{kCacheLine}, std::nothrow)));
}

char* workspace(std::size_t count, WorkspaceOf user) {
  thread_local Bytes memories[2];
  thread_local std::size_t capacities[2] = {};
  Bytes& memory = memories[static_cast<int>(user)];
  std::size_t& capacity = capacities[static_cast<int>(user)];
  if (count > capacity) {
    memory.reset();
    capacity = 0;
    memory = allocate(count);
    if (memory) capacity = count;
  }
  return memory.get();
}

}  // namespace quake
