// A stand-in for XLA's runtime: builds call frames by hand from the public C interface and runs tasks on
// threads of its own, so that the handlers can be called with any buffers, types, shapes and attributes.

#ifndef QUAKE_TESTS_XLA_FAKE_XLA_H_
#define QUAKE_TESTS_XLA_FAKE_XLA_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace quake::tests {

// The intra-op pool.
class Pool {
 public:
  enum class Tasks {
    kRun,     // as soon as a thread is free
    kHeld,    // only once the pool is destroyed: all threads are busy with something else
    kRefused  // there is no pool: the handler gets an error
  };

  explicit Pool(int threads, Tasks tasks = Tasks::kRun) : size_(threads), tasks_(tasks) {
    for (int i = 0; tasks == Tasks::kRun && i < threads; ++i) threads_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
    }
    ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    serve();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  std::int64_t size() const { return size_; }
  bool schedule(XLA_FFI_Task* task, void* data) {
    if (tasks_ == Tasks::kRefused) return false;
    {
      const std::lock_guard lock(mutex_);
      queue_.emplace_back(task, data);
    }
    ready_.notify_one();
    return true;
  }

 private:
  // Runs tasks until the pool is closed and none is left.
  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      ready_.wait(lock, [this] { return closed_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const auto [task, data] = queue_.front();
      queue_.pop_front();
      lock.unlock();
      task(data);
      lock.lock();
    }
  }

  const int size_;
  const Tasks tasks_;
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::pair<XLA_FFI_Task*, void*>> queue_;
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace quake::tests

// XLA's opaque types.
struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};
struct XLA_FFI_ExecutionContext {
  quake::tests::Pool* pool;
};

namespace quake::tests {

// Errors that were made and not destroyed: every path must hand them on exactly once.
inline std::atomic<int> live_errors{0};

inline XLA_FFI_Error* make_error(XLA_FFI_Error_Code code, const char* message) {
  ++live_errors;
  return new XLA_FFI_Error{code, message};
}

inline void destroy_error(XLA_FFI_Error* error) {
  --live_errors;
  delete error;
}

// What a handler may ask of XLA. The rest is null: a handler that used it would have to be provided for here.
inline const XLA_FFI_Api* fake_api() {
  static const XLA_FFI_Api api = [] {
    XLA_FFI_Api a = {};
    a.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    a.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    a.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
      return make_error(args->errc, args->message);
    };
    a.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
      args->message = args->error->message.c_str();
    };
    a.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { destroy_error(args->error); };
    a.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
      *args->num_threads = args->ctx->pool->size();
      return nullptr;
    };
    a.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
      if (args->ctx->pool->schedule(args->task, args->data)) return nullptr;
      return make_error(XLA_FFI_Error_Code_UNAVAILABLE, "no thread pool");
    };
    return a;
  }();
  return &api;
}

struct Buffer {
  XLA_FFI_DataType dtype;
  std::vector<std::int64_t> dims;
  void* data;
};

struct Attribute {
  std::string name;
  std::variant<std::int32_t, std::int64_t, float, std::string> value;
};

// Of an attribute that is a number.
inline XLA_FFI_DataType type_of(const Attribute& attribute) {
  constexpr XLA_FFI_DataType kTypes[] = {XLA_FFI_DataType_S32, XLA_FFI_DataType_S64, XLA_FFI_DataType_F32};
  return kTypes[attribute.value.index()];
}

// Calls a handler as XLA does. Returns its error's message, or an empty string.
inline std::string call_handler(XLA_FFI_Handler* handler, Pool& pool, std::vector<Attribute> attributes,
                                std::vector<Buffer> arguments, std::vector<Buffer> results,
                                XLA_FFI_ExecutionStage stage = XLA_FFI_ExecutionStage_EXECUTE) {
  const auto describe = [](std::vector<Buffer>& buffers, std::vector<XLA_FFI_Buffer>& described,
                           std::vector<void*>& pointers) {
    for (Buffer& b : buffers) {
      described.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, b.dtype, b.data,
                           static_cast<std::int64_t>(b.dims.size()), b.dims.data()});
    }
    for (XLA_FFI_Buffer& b : described) pointers.push_back(&b);
  };
  std::vector<XLA_FFI_Buffer> described_arguments, described_results;
  std::vector<void*> argument_pointers, result_pointers;
  describe(arguments, described_arguments, argument_pointers);
  describe(results, described_results, result_pointers);
  std::vector<XLA_FFI_ArgType> argument_types(arguments.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> result_types(results.size(), XLA_FFI_RetType_BUFFER);

  // Sorted by name, on which the handlers rely.
  std::sort(attributes.begin(), attributes.end(),
            [](const Attribute& a, const Attribute& b) { return a.name < b.name; });
  std::vector<XLA_FFI_AttrType> attribute_types;
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  std::vector<void*> value_pointers;
  std::deque<XLA_FFI_ByteSpan> spans;
  std::deque<XLA_FFI_Scalar> scalars;
  for (Attribute& a : attributes) {
    name_pointers.push_back(&spans.emplace_back(XLA_FFI_ByteSpan{a.name.data(), a.name.size()}));
    if (const std::string* text = std::get_if<std::string>(&a.value)) {
      attribute_types.push_back(XLA_FFI_AttrType_STRING);
      value_pointers.push_back(&spans.emplace_back(XLA_FFI_ByteSpan{text->data(), text->size()}));
      continue;
    }
    attribute_types.push_back(XLA_FFI_AttrType_SCALAR);
    void* const value = std::visit([](auto& v) -> void* { return &v; }, a.value);
    value_pointers.push_back(&scalars.emplace_back(XLA_FFI_Scalar{type_of(a), value}));
  }

  XLA_FFI_ExecutionContext context = {&pool};
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = fake_api();
  frame.ctx = &context;
  frame.stage = stage;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<std::int64_t>(arguments.size()),
                argument_types.data(), argument_pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<std::int64_t>(results.size()),
                result_types.data(), result_pointers.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE,
                 nullptr,
                 static_cast<std::int64_t>(attributes.size()),
                 attribute_types.data(),
                 name_pointers.data(),
                 value_pointers.data()};
  XLA_FFI_Error* error = handler(&frame);
  if (error == nullptr) return "";
  const std::string message = error->message.empty() ? "an error without a message" : error->message;
  destroy_error(error);
  return message;
}

}  // namespace quake::tests

#endif  // QUAKE_TESTS_XLA_FAKE_XLA_H_
