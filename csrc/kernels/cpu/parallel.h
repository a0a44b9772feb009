// Threads and scratch memory of the CPU kernels, in an unnamed namespace like simd.h.
#pragma once

#include "../common.h"

namespace gankernels {
namespace {

// Divides the scratch memory that the caller of a kernel allocated into pieces, each of which is
// aligned to a cache line.
class Scratch {
 public:
  // With a null pointer it only counts the bytes.
  explicit Scratch(void* memory) : memory_(reinterpret_cast<uintptr_t>(memory)) {}

  template <typename E>
  E* take(int64_t size) {
    E* const piece = reinterpret_cast<E*>(memory_ + taken_);
    taken_ += bytes<E>(size);
    return piece;
  }

  int64_t taken() const { return taken_; }

  template <typename E>
  static constexpr int64_t bytes(int64_t size) {
    return ceil_div(size * int64_t(sizeof(E)), 64) * 64;
  }

 private:
  uintptr_t memory_;
  int64_t taken_ = 0;
};

// Calls body(begin, end) on at most `threads.count` disjoint ranges that cover [0, tasks).
template <typename Body>
void parallel(const CpuThreads& threads, int64_t tasks, const Body& body) {
  if (threads.count <= 1 || tasks <= 1) return body(int64_t(0), tasks);
  auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  threads.run(tasks, call, const_cast<Body*>(&body));
}

}  // namespace
}  // namespace gankernels
