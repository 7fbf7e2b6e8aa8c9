#include "core/work.h"

#include <unistd.h>

#include <algorithm>

#include "core/denormals.h"

namespace quake {

void in_order(std::size_t tasks, Task task) {
  ScopedFlushDenormals flush;
  for (std::size_t i = 0; i < tasks; ++i) task(i);
}

Stores stores_for(std::size_t output_bytes) {
  static const std::size_t cache = [] {
    std::size_t bytes = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const long reported = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (reported > 0) bytes = static_cast<std::size_t>(reported);
#endif
    return std::max(bytes, std::size_t{32} << 20);
  }();
  return output_bytes > cache ? Stores::kStreamed : Stores::kCached;
}

}  // namespace quake
