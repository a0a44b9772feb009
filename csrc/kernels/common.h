// What every kernel header needs: element types and where threads come from. No torch here.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GK_HOST_DEVICE __host__ __device__
#else
#define GK_HOST_DEVICE
#endif

namespace gankernels {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// CPU kernels run on the caller's thread pool, so that they share PyTorch's without knowing it.
// `run` calls body(begin, end, context) on disjoint ranges that cover [0, tasks).
struct CpuThreads {
  int64_t count;
  void (*run)(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context);
};

}  // namespace gankernels
