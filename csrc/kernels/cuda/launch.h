// The host's side of every kernel: launches, and device attributes. Kernels start on the current
// device: the caller makes it current, and afterwards restores the previous one.
//
// No call here waits for the device or allocates, so all of it is safe while a CUDA graph is being
// captured. Functions return an error message, or null.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../common.h"

namespace gankernels::cuda {

inline const char* error_message(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // a failed launch is reported here once, not again by a later call
  return cudaGetErrorString(error);
}

// Streaming multiprocessors of `device`, queried once; 0 if the query fails.
inline int multiprocessors(int device) {
  constexpr int kCached = 64;
  static std::atomic<int> cache[kCached];
  const bool cached = device >= 0 && device < kCached;
  int count = cached ? cache[device].load(std::memory_order_relaxed) : 0;
  if (count != 0) return count;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error_message(error) != nullptr) return 0;
  if (cached) cache[device].store(count, std::memory_order_relaxed);
  return count;
}

// All kernels are launched here.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return error_message(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace gankernels::cuda
