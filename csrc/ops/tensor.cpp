#include "tensor.h"

#include <stdexcept>
#include <string>

// Weak, because a CPU-only torch lacks it: the same library then loads without it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace gankernels::ops {

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      throw std::logic_error("the checks let a dtype pass that no kernel supports");
  }
}

ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Layout layout_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t dims = int64_t(sizes.size());
  int64_t space = 1;
  bool channels_last = sizes[1] == 1 || strides[1] == 1;
  bool channels_first = true;
  for (int64_t d = dims - 1; d >= 2; --d) {
    if (sizes[d] != 1) {
      channels_first &= strides[d] == space;
      channels_last &= strides[d] == space * sizes[1];
    }
    space *= sizes[d];
  }
  channels_first &= sizes[1] == 1 || strides[1] == space;
  const bool batch = sizes[0] == 1 || strides[0] == space * sizes[1];
  if (!batch) return Layout::kOther;
  if (channels_first && space == 1) return Layout::kChannelsLast;
  if (channels_first) return Layout::kChannelsFirst;
  return channels_last ? Layout::kChannelsLast : Layout::kOther;
}

Tensor dense(const Tensor& tensor) {
  return layout_of(tensor) == Layout::kOther ? contiguous_copy(tensor) : tensor;
}

Tensor contiguous_copy(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  Tensor copy = empty({sizes.begin(), sizes.end()}, tensor.scalar_type(), tensor);
  torch::stable::copy_(copy, tensor);
  return copy;
}

int64_t dense_block(const int64_t* sizes, const int64_t* strides, int64_t dims) {
  int64_t block = 1;  // elements known to be dense so far
  for (bool found = true; found && block;) {
    found = false;
    for (int64_t d = 0; d < dims; ++d) {
      if (sizes[d] != 1 && strides[d] == block) {
        block *= sizes[d];
        found = true;
      }
    }
  }
  return block;
}

bool same_strides(const int64_t* sizes, const int64_t* strides, const int64_t* others,
                  int64_t dims) {
  bool same = true;
  for (int64_t d = 0; d < dims; ++d) same &= sizes[d] <= 1 || strides[d] == others[d];
  return same;
}

Tensor in_layout_of(const Tensor& tensor, const Tensor& model) {
  const bool same = same_strides(model.sizes().data(), tensor.strides().data(),
                                 model.strides().data(), model.dim());
  if (same && tensor.scalar_type() == model.scalar_type()) return tensor;
  Tensor copy = empty_with_strides_of(model);
  torch::stable::copy_(copy, tensor);
  return copy;
}

Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : contiguous_copy(tensor);
}

OptionalTensor packed(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(packed(*tensor)) : tensor;
}

static Tensor allocate(int64_t dims, const int64_t* sizes, const int64_t* strides, ScalarType dtype,
                       const Tensor& model) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(model.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(model.get(), &device_index));
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(dims, sizes, strides, int32_t(dtype), device_type, device_index,
                               &handle)) {
    double bytes = double(aoti_torch_dtype_element_size(int32_t(dtype)));
    for (int64_t d = 0; d < dims; ++d) bytes *= double(sizes[d]);
    std::string number = std::to_string(bytes);
    number.resize(number.find('.'));
    // The wording of PyTorch's own errors, which callers search for.
    throw std::runtime_error((model.is_cuda() ? "CUDA out of memory: tried to allocate "
                                              : "can't allocate memory: you tried to allocate ") +
                             number + " bytes");
  }
  return Tensor(handle);
}

Tensor empty(std::vector<int64_t> sizes, ScalarType dtype, const Tensor& model) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return allocate(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, model);
}

Tensor empty_with_strides_of(const Tensor& model) {
  return allocate(model.dim(), model.sizes().data(), model.strides().data(), model.scalar_type(),
                  model);
}

const void* data(const Tensor& tensor) { return tensor.data_ptr(); }

const void* data(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

void* mutable_data(const Tensor& tensor) { return tensor.data_ptr(); }

CpuThreads cpu_threads() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return {int64_t(count), [](int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
            TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, tasks, 1, body, context));
          }};
}

CudaStream::CudaStream(int device) : guard_(device) {
  if (!aoti_torch_get_current_cuda_stream) {
    throw std::runtime_error("got a CUDA tensor, but this torch has no CUDA support");
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
}

void check_cuda(const char* error) {
  if (error) throw std::runtime_error(error);
}

}  // namespace gankernels::ops
