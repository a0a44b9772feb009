// Everything that an op needs around its kernel: memory layouts, element types, allocation,
// threads, streams.
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

// The memory layout of a dense tensor (N, C, spatial...). A tensor with a single element in space,
// such as (N, C), counts as channels last, since in that order its vectors are long.
enum class Layout { kChannelsFirst, kChannelsLast, kOther };
Layout layout_of(const Tensor& tensor);

// The tensor itself if it is dense in one of the two layouts, otherwise a contiguous copy.
Tensor dense(const Tensor& tensor);
Tensor contiguous_copy(const Tensor& tensor);

// The number of elements that are contiguous, in any order of the dimensions.
int64_t dense_block(const int64_t* sizes, const int64_t* strides, int64_t dims);

// Whether two tensors of these sizes have the same elements at the same offsets.
bool same_strides(const int64_t* sizes, const int64_t* strides, const int64_t* others,
                  int64_t dims);

// The tensor itself if it has the layout and dtype of `model`, of the same sizes, otherwise a copy
// that does.
Tensor in_layout_of(const Tensor& tensor, const Tensor& model);

// The tensor itself if it is contiguous, otherwise a contiguous copy.
Tensor packed(const Tensor& tensor);
OptionalTensor packed(const OptionalTensor& tensor);

// An uninitialized tensor on the device of `model`. If there is not enough memory, the exception
// names the size.
Tensor empty(std::vector<int64_t> sizes, ScalarType dtype, const Tensor& model);
Tensor empty_with_strides_of(const Tensor& model);

const void* data(const Tensor& tensor);
const void* data(const OptionalTensor& tensor);  // null if there is none
void* mutable_data(const Tensor& tensor);

CpuThreads cpu_threads();

// The current CUDA stream of a device, a cudaStream_t. While this object exists, its device is the
// current one: as an argument of a call it lives until the call returns, so the call launches on
// it.
class CudaStream {
 public:
  explicit CudaStream(int device);
  operator void*() const { return stream_; }

 private:
  // PyTorch's guard, since our own would create a context on the device that it returns to.
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Throws the error message that a CUDA kernel returned, if it is not null.
void check_cuda(const char* error);

}  // namespace gankernels::ops
