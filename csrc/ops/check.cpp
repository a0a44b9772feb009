#include "check.h"

#include <algorithm>
#include <cmath>

namespace gankernels::ops {
namespace {

// The limit of a tensor's elements, and of its size in every dimension: far more than fits in any
// machine, and so small that no size computed from it overflows.
constexpr int64_t kMostElements = int64_t(1) << 40;

// The name of a dtype in Python.
std::string text(int32_t dtype) {
  switch (ScalarType(dtype)) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return std::string("torch's ") + torch::headeronly::toString(ScalarType(dtype));
  }
}

std::string text(Name name) {
  const std::string index = "[" + std::to_string(name.index) + "]";
  return name.index < 0 ? name.name : name.name + index;
}

std::string text(int32_t device_type, int32_t device_index) {
  if (device_type == aoti_torch_device_type_cpu()) return "cpu";
  const std::string type = device_type == aoti_torch_device_type_cuda()   ? "cuda"
                           : device_type == aoti_torch_device_type_meta() ? "meta"
                                                                          : "another device";
  return device_index < 0 ? type : type + ":" + std::to_string(device_index);
}

std::string range_text(int64_t least, int64_t most) {
  if (least == most) return std::to_string(least);
  if (most == INT64_MAX) return "at least " + std::to_string(least);
  return std::to_string(least) + " to " + std::to_string(most);
}

std::string shape_text(const int64_t* sizes, int64_t dims) {
  std::string result = "(";
  for (int64_t d = 0; d < dims; ++d) result += (d ? ", " : "") + std::to_string(sizes[d]);
  return result + (dims == 1 ? ",)" : ")");
}

bool has_sizes(const TensorInfo& info, const int64_t* sizes, int64_t dims) {
  return std::equal(info.sizes, info.sizes + info.dims, sizes, sizes + dims);
}

}  // namespace

std::string shape_text(const TensorInfo& info) { return shape_text(info.sizes, info.dims); }

bool is_dense(const TensorInfo& info) {
  return info.elements == 0 || dense_block(info.sizes, info.strides, info.dims) == info.elements;
}

bool same_strides(const TensorInfo& info, const TensorInfo& model) {
  return same_strides(info.sizes, info.strides, model.strides, info.dims);
}

TensorInfo Check::inspect(Name name, const Tensor& tensor) {
  const AtenTensorHandle handle = tensor.get();
  if (!tensor.defined()) fail(name, "must be a tensor, got None");
  int32_t layout, type, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
  if (layout != aoti_torch_layout_strided()) fail(name, "must be strided, got another layout");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &index));
  if (device_type_ < 0) {
    device_type_ = type;
    device_index_ = index;
  }
  if (type != device_type_ || index != device_index_) {
    fail(name, "must be on ", text(device_type_, device_index_), ", got ", text(type, index));
  }
  int64_t *sizes, *strides, offset, storage;
  TensorInfo info = {name, 0, 0, nullptr, nullptr, 1, 0};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &info.dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &info.dims));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  info.sizes = sizes;
  info.strides = strides;
  info.element_bytes = int64_t(aoti_torch_dtype_element_size(info.dtype));
  int64_t product = 1;  // without sizes of zero
  __int128 last = 0;
  for (int64_t d = 0; d < info.dims; ++d) {
    if (sizes[d] >= kMostElements || (product *= sizes[d] ? sizes[d] : 1) >= kMostElements) {
      fail(name, "must have fewer than 2^40 elements, got shape ", shape_text(info));
    }
    info.elements *= sizes[d];
    last += __int128(sizes[d] - 1) * strides[d];
  }
  if (info.elements == 0) return info;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &storage));
  if ((last + offset + 1) * info.element_bytes > storage) {
    fail(name, "must lie within its storage, got shape ", shape_text(info), " in ", storage,
         " bytes");
  }
  return info;
}

void Check::floating(const TensorInfo& info) const {
  for (ScalarType type :
       {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    if (info.has(type)) return;
  }
  fail(info.name, "must have dtype float32, float64, bfloat16 or float16, got ", text(info.dtype));
}

void Check::dtype(const TensorInfo& info, ScalarType wanted) const {
  if (info.has(wanted)) return;
  fail(info.name, "must have dtype ", text(int32_t(wanted)), ", got ", text(info.dtype));
}

void Check::dimensions(const TensorInfo& info, int64_t least, int64_t most) const {
  if (info.dims >= least && info.dims <= most) return;
  fail(info.name, "must have ", range_text(least, most), most == 1 ? " dimension" : " dimensions",
       ", got shape ", shape_text(info));
}

void Check::shape(const TensorInfo& info, std::initializer_list<int64_t> wanted) const {
  const int64_t dims = int64_t(wanted.size());
  if (has_sizes(info, wanted.begin(), dims)) return;
  fail(info.name, "must have shape ", shape_text(wanted.begin(), dims), ", got ", shape_text(info));
}

void Check::shape_of(const TensorInfo& info, const TensorInfo& model,
                     const char* model_name) const {
  if (has_sizes(info, model.sizes, model.dims)) return;
  fail(info.name, "must have shape ", shape_text(model), " as ", model_name, ", got ",
       shape_text(info));
}

void Check::one_element(const TensorInfo& info) const {
  if (info.elements == 1) return;
  fail(info.name, "must have one element, got shape ", shape_text(info));
}

void Check::tensor(Name name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                   ScalarType wanted) {
  const TensorInfo info = inspect(name, tensor);
  shape(info, sizes);
  dtype(info, wanted);
}

void Check::tensor(Name name, const OptionalTensor& tensor, std::initializer_list<int64_t> sizes,
                   ScalarType wanted) {
  if (tensor) this->tensor(name, *tensor, sizes, wanted);
}

TensorInfo Check::like(Name name, const Tensor& tensor, const TensorInfo& model) {
  const TensorInfo info = inspect(name, tensor);
  shape_of(info, model, model.name.name);
  dtype(info, ScalarType(model.dtype));
  return info;
}

void Check::range(Name name, int64_t value, int64_t least, int64_t most) const {
  if (value < least || value > most) {
    fail(name, "must be ", range_text(least, most), ", got ", value);
  }
}

void Check::count(Name name, double value) const {
  if (!std::isfinite(value) || value < 0) {
    fail(name, "must be a finite number of at least 0, got ", value);
  }
}

void Check::output(const TensorInfo& info, const Tensor& tensor) {
  for (int64_t d = 0; d < info.dims; ++d) {
    if (info.sizes[d] > 1 && info.strides[d] == 0) {
      fail(info.name, "must have a separate element at every index, got an expanded tensor");
    }
  }
  if (info.elements == 0 || !is_dense(info)) return;
  const char* const begin = static_cast<const char*>(tensor.data_ptr());
  outputs_.push_back({begin, begin + info.elements * info.element_bytes, info.name});
}

void Check::no_overlap() {
  std::sort(outputs_.begin(), outputs_.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < outputs_.size(); ++i) {
    const Span &before = outputs_[i - 1], &span = outputs_[i];
    if (span.begin >= before.end) continue;
    fail(span.name, "must not share memory with ", text(before.name));
  }
}

}  // namespace gankernels::ops
