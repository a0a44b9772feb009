// Threads and scratch memory for the CPU kernels, in an anonymous namespace like simd.h.
#pragma once

#include <cstdlib>

#include "../common.h"

namespace {

// Memory that is freed at the end of its scope. Not std::vector: see the note on symbols in
// batch_norm_leaky_relu_math.h.
template <typename E>
struct Buffer {
  E* data;
  explicit Buffer(int64_t size)
      : data(static_cast<E*>(aligned_alloc(64, (size * sizeof(E) + 64) & ~int64_t(63)))) {}
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
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
