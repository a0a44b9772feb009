// Runs a kernel on the device of its tensors. Included after the header of the op's kernels, which
// declares the scratch_bytes() that is called here.
#pragma once

#include <type_traits>

#include "tensor.h"

namespace gankernels::ops {

// The kernel with the entry points cpu::NAME and cuda::NAME, on the device of x. Scratch memory is
// allocated here, by PyTorch, since a kernel could not report that memory is exhausted.
template <auto kCpuKernel, auto kCudaKernel, typename Parameters>
void run(const Parameters& p, const Tensor& x) {
  constexpr bool kScratch =
      !std::is_invocable_v<decltype(kCpuKernel), const Parameters&, const CpuThreads&>;
#ifdef GK_WITH_CUDA
  if (x.is_cuda()) {
    const int device = x.get_device();
    if constexpr (kScratch) {
      const Tensor scratch = empty({cuda::scratch_bytes(p, device)}, ScalarType::Byte, x);
      check_cuda(kCudaKernel(p, mutable_data(scratch), device, CudaStream(device)));
    } else {
      check_cuda(kCudaKernel(p, device, CudaStream(device)));
    }
    return;
  }
#endif
  const CpuThreads threads = cpu_threads();
  if constexpr (kScratch) {
    const Tensor scratch = empty({cpu::scratch_bytes(p, threads)}, ScalarType::Byte, x);
    kCpuKernel(p, mutable_data(scratch), threads);
  } else {
    kCpuKernel(p, threads);
  }
}

}  // namespace gankernels::ops
