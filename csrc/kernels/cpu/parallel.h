// Threads and scratch memory of the CPU kernels, in an anonymous namespace like simd.h.
#pragma once

#include "../common.h"

namespace {

// Kernels allocate nothing, since they could not say that there is no memory: their callers do, as
// many bytes as *_scratch_bytes() asks for. What is taken of it, in turn, is aligned to a line.
class Scratch {
 public:
  explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}

  template <typename E>
  E* take(int64_t size) {
    E* const taken = reinterpret_cast<E*>(next_);
    next_ += bytes<E>(size);
    return taken;
  }

  template <typename E>
  static constexpr int64_t bytes(int64_t size) {
    return (size * int64_t(sizeof(E)) + 63) / 64 * 64;
  }

 private:
  char* next_;
};

// Calls body(begin, end) on `threads.count` disjoint ranges that cover [0, tasks).
template <typename Body>
void parallel(const gankernels::CpuThreads& threads, int64_t tasks, const Body& body) {
  if (threads.count <= 1 || tasks <= 1) return body(int64_t(0), tasks);
  auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  threads.run(tasks, call, const_cast<Body*>(&body));
}

}  // namespace
