// XLA's intra-op thread pool, as drivers want it.

#ifndef QUAKE_XLA_POOL_H_
#define QUAKE_XLA_POOL_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/denormals.h"
#include "core/work.h"
#include "xla/ffi/api/ffi.h"

namespace quake {

// Calls body(chunk) once for every chunk in [0, chunks), on this thread and on pool threads, and returns
// when all have finished. `body` must not throw.
//
// A handler may not block on tasks that it has queued: when every pool thread runs a handler that waits, no
// thread is left to run the tasks. Here the caller takes chunks like any helper until none is left, and then
// waits only for chunks that a helper has already begun. A helper that starts late finds no chunk and leaves;
// it may outlive the call, so it shares ownership of the state and touches `body` only while it holds a chunk.
template <class Body>
void parallel_for(xla::ffi::ThreadPool& pool, std::size_t chunks, const Body& body) {
  struct State {
    State(std::size_t count, const Body* function) : chunks(count), body(function) {}
    const std::size_t chunks;
    const Body* const body;
    std::atomic<std::size_t> next{0};
    std::atomic<std::size_t> finished{0};

    void work() {
      ScopedFlushDenormals flush;
      for (std::size_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
        (*body)(chunk);
        if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks) finished.notify_one();
      }
    }
  };

  const std::int64_t threads = pool.num_threads();
  if (chunks <= 1 || threads <= 1) {
    ScopedFlushDenormals flush;
    for (std::size_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
    return;
  }
  auto state = std::make_shared<State>(chunks, &body);
  const std::size_t helpers = std::min<std::size_t>(static_cast<std::size_t>(threads), chunks) - 1;
  for (std::size_t i = 0; i < helpers; ++i) {
    pool.Schedule([state] { state->work(); });
  }
  state->work();
  for (std::size_t done; (done = state->finished.load(std::memory_order_acquire)) != chunks;) {
    state->finished.wait(done, std::memory_order_acquire);
  }
}

// A ParallelFor, for as long as the pool lives.
inline auto on_pool(xla::ffi::ThreadPool& pool) {
  return [&pool](std::size_t tasks, Task task) { parallel_for(pool, tasks, task); };
}

}  // namespace quake

#endif  // QUAKE_XLA_POOL_H_
