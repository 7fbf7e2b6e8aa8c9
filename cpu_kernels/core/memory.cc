#include "core/memory.h"

namespace quake {

Bytes allocate(std::size_t count) {
  return Bytes(static_cast<char*>(::operator new[](count, std::align_val_t{kCacheLine}, std::nothrow)));
}

char* workspace(std::size_t count) {
  thread_local Bytes memory;
  thread_local std::size_t capacity = 0;
  if (count > capacity) {
    memory.reset();
    capacity = 0;
    memory = allocate(count);
    if (memory) capacity = count;
  }
  return memory.get();
}

}  // namespace quake
