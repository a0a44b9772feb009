// What every op does around its kernel: memory layouts, element types, allocation, threads,
// streams.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../kernels/common.h"

namespace gankernels::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& tensor);

// float64 for float64, otherwise float32.
ScalarType accumulation_type(const Tensor& tensor);

// How a dense tensor (N, C, spatial...) lies in memory. One with a single element in space, such as
// (N, C), counts as channels last, which is where its vectors are long.
enum class Layout { kChannelsFirst, kChannelsLast, kOther };
Layout layout_of(const Tensor& tensor);

// The tensor itself where it is dense in one of the two layouts, otherwise a contiguous copy.
Tensor dense(const Tensor& tensor);
Tensor contiguous_copy(const Tensor& tensor);

// How many elements lie side by side, in whatever order, in the dimensions from `first` on.
int64_t dense_block(const Tensor& tensor, size_t first);

// Whether a tensor lies in memory as `model`, of the same sizes, does.
bool same_strides(const Tensor& tensor, const Tensor& model);

// The tensor itself where it has the layout and type of `model`, of the same sizes, otherwise a
// copy that has.
Tensor in_layout_of(const Tensor& tensor, const Tensor& model);

// The per-channel tensor itself where its elements are neighbours, otherwise a copy where they are.
Tensor packed(const Tensor& tensor);
OptionalTensor packed(const OptionalTensor& tensor);

// Uninitialised, on the device of `model`. Where memory is short, the exception says of how much.
Tensor empty(std::vector<int64_t> sizes, ScalarType dtype, const Tensor& model);
Tensor empty_with_strides_of(const Tensor& model);

const void* data(const Tensor& tensor);
const void* data(const OptionalTensor& tensor);  // null where there is none
void* mutable_data(const Tensor& tensor);

CpuThreads cpu_threads();

// The current CUDA stream of a device, a cudaStream_t, and that device the current one. As an
// argument of a call it lives until the call returns, so what the call launches is launched there.
class CudaStream {
 public:
  explicit CudaStream(int device);
  operator void*() const { return stream_; }

 private:
  // torch's own: a guard of ours would leave a context behind on the device that it returns to.
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Throws what a CUDA kernel returned, if anything.
void check_cuda(const char* error);

}  // namespace gankernels::ops
