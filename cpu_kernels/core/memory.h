// The memory that drivers work in.

#ifndef QUAKE_CORE_MEMORY_H_
#define QUAKE_CORE_MEMORY_H_

#include <cstddef>
#include <memory>
#include <new>

#include "core/sizes.h"

namespace quake {

struct FreeBytes {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t{kCacheLine}); }
};
using Bytes = std::unique_ptr<char[], FreeBytes>;

// Bytes aligned to a cache line, or null if memory is refused.
Bytes allocate(std::size_t count);

// This thread's work memory, aligned to a cache line, or null if it is refused. A thread keeps it from call to
// call, since fresh memory would cost a tenth of its time; it is some MiB, of long rows of dense layers
// more, whatever the length of the sequences. What was in it is lost with the next call for the same user: a
// driver's call, or a task, which may run on the thread of the call.
enum class WorkspaceOf { kCall, kTask };
char* workspace(std::size_t count, WorkspaceOf user = WorkspaceOf::kCall);

// Hands out parts of a block of memory, each from a cache line on. With a null block it counts what they need.
class Carver {
 public:
  explicit Carver(char* block) : block_(block) {}

  template <class T>
  T* take(std::size_t count) {
    T* const part = block_ ? reinterpret_cast<T*>(block_ + used_) : nullptr;
    used_ += round_up(count * sizeof(T), kCacheLine);
    return part;
  }
  std::size_t used() const { return used_; }

 private:
  char* block_;
  std::size_t used_ = 0;
};

// Fetches bytes into the cache: the hardware does not expect short pieces of rows that are far apart.
inline void fetch(const void* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(static_cast<const char*>(from) + i);
}

}  // namespace quake

#endif  // QUAKE_CORE_MEMORY_H_
