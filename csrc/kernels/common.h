// Shared by all kernel headers: element types, threads, entry points. Nothing here includes torch.
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

// The type in which arithmetic is done on elements of type T: half precision is computed in float.
template <typename T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateIn<T>::type;

GK_HOST_DEVICE static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// CPU kernels run on the caller's thread pool, so that they use PyTorch's without depending on it.
// `run` calls body(begin, end, context) on disjoint ranges that cover [0, tasks).
struct CpuThreads {
  int64_t count;
  void (*run)(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context);
};

// The entry points of every op. cpu::NAME(parameters, scratch, threads) selects the copy that was
// compiled for this CPU. cuda::NAME(parameters, scratch, device, stream) launches on `stream` (a
// cudaStream_t) of `device` and returns an error message, or null. Kernels allocate nothing: the
// caller provides `scratch`, aligned to 64 bytes, of scratch_bytes(parameters) bytes.

}  // namespace gankernels
