// What drivers share: how they are given threads, and how they cut work.

#ifndef QUAKE_CORE_WORK_H_
#define QUAKE_CORE_WORK_H_

#include <cstddef>
#include <memory>
#include <type_traits>

#include "core/sizes.h"
#include "core/types.h"

namespace quake {

// A reference to something callable, which must outlive it. (std::function would allocate in every call.)
template <class Signature>
class FunctionRef;
template <class Result, class... Arguments>
class FunctionRef<Result(Arguments...)> {
 public:
  template <class F>
  requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef>) FunctionRef(F&& function)
      : object_((void*)std::addressof(function)), call_([](void* object, Arguments... arguments) -> Result {
          return (*reinterpret_cast<std::remove_reference_t<F>*>(object))(arguments...);
        }) {}
  Result operator()(Arguments... arguments) const { return call_(object_, arguments...); }

 private:
  void* object_;
  Result (*call_)(void*, Arguments...);
};

// Calls the task once for every index in [0, tasks), in any order and on any threads, with denormals flushed
// (denormals.h), and returns when all have finished.
using Task = FunctionRef<void(std::size_t index)>;
using ParallelFor = FunctionRef<void(std::size_t tasks, Task task)>;

// The ParallelFor of work that is too small for a hop: on this thread.
void in_order(std::size_t tasks, Task task);

// Work is cut into chunks of about this many elements, by shape alone, so that a result never depends on the
// number of threads. A hop through the pool costs 10 to 30 µs, a chunk about as much: smaller calls stay on
// the calling thread.
inline constexpr std::size_t kChunkElements = std::size_t{1} << 16;

// Outputs larger than the last-level cache are written past it: reading a line before overwriting it would be
// a third of the traffic.
Stores stores_for(std::size_t output_bytes);

inline std::size_t element_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kInt8 ? 1 : 2;
}

// What a driver returns where an instruction set's table has no kernel.
inline constexpr const char* kNoKernel = "the instruction set in use has no kernel for this type and order";

}  // namespace quake

#endif  // QUAKE_CORE_WORK_H_
