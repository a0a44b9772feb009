#include "check.h"

#include <algorithm>
#include <cmath>

namespace gankernels::ops {
namespace {

// Of every tensor, along each dimension and in all: far more than any machine holds, and little
// enough that no size computed from it overflows.
constexpr int64_t kMostElements = int64_t(1) << 40;

int32_t raw_dtype(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// What Python calls it.
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

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string result = "(";
  int64_t dims = 0;
  for (const int64_t size : sizes) result += (dims++ ? ", " : "") + std::to_string(size);
  return result + (dims == 1 ? ",)" : ")");
}

}  // namespace

bool has_dtype(const Tensor& tensor, ScalarType dtype) {
  return raw_dtype(tensor) == int32_t(dtype);
}

std::string shape_text(const Tensor& tensor) { return shape_text(tensor.sizes()); }
std::string dtype_text(const Tensor& tensor) { return text(raw_dtype(tensor)); }

void Check::memory(Name name, const Tensor& tensor) {
  const AtenTensorHandle handle = tensor.get();
  if (!tensor.defined()) refuse(name, "must be a tensor, got None");
  int32_t layout, type, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
  if (layout != aoti_torch_layout_strided()) refuse(name, "must be strided, got another layout");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &index));
  if (device_type_ < 0) {
    device_type_ = type;
    device_index_ = index;
  }
  if (type != device_type_ || index != device_index_) {
    refuse(name, "must be on ", text(device_type_, device_index_), ", got ", text(type, index));
  }
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t elements = 1;
  bool empty = false;
  __int128 last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    const int64_t size = sizes[d];
    if (size >= kMostElements || (size > 0 && (elements *= size) >= kMostElements)) {
      refuse(name, "must have fewer than 2^40 elements, got shape ", ops::shape_text(tensor));
    }
    empty |= size == 0;
    last += __int128(size - 1) * strides[d];
  }
  if (empty) return;
  int64_t offset, bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
  if ((last + offset + 1) * int64_t(tensor.element_size()) > bytes) {
    refuse(name, "must lie within its storage, got shape ", ops::shape_text(tensor), " in ", bytes,
           " bytes");
  }
}

void Check::floating(Name name, const Tensor& tensor) const {
  switch (ScalarType(raw_dtype(tensor))) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return;
    default:
      refuse(name, "must have dtype float32, float64, bfloat16 or float16, got ",
             dtype_text(tensor));
  }
}

void Check::dtype(Name name, const Tensor& tensor, ScalarType wanted) const {
  if (has_dtype(tensor, wanted)) return;
  refuse(name, "must have dtype ", text(int32_t(wanted)), ", got ", dtype_text(tensor));
}

void Check::dimensions(Name name, const Tensor& tensor, int64_t least, int64_t most) const {
  const int64_t dims = tensor.dim();
  if (dims >= least && dims <= most) return;
  refuse(name, "must have ", range_text(least, most), most == 1 ? " dimension" : " dimensions",
         ", got shape ", ops::shape_text(tensor));
}

void Check::shape(Name name, const Tensor& tensor, std::initializer_list<int64_t> wanted) const {
  const auto sizes = tensor.sizes();
  if (std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end())) return;
  refuse(name, "must have shape ", shape_text(wanted), ", got ", ops::shape_text(tensor));
}

void Check::shape_of(Name name, const Tensor& tensor, Name model_name, const Tensor& model) const {
  const auto sizes = tensor.sizes(), wanted = model.sizes();
  if (std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end())) return;
  refuse(name, "must have shape ", ops::shape_text(model), " as ", model_name.name, ", got ",
         ops::shape_text(tensor));
}

void Check::one_element(Name name, const Tensor& tensor) const {
  if (tensor.numel() == 1) return;
  refuse(name, "must have one element, got shape ", ops::shape_text(tensor));
}

void Check::tensor(Name name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                   ScalarType wanted) {
  memory(name, tensor);
  shape(name, tensor, sizes);
  dtype(name, tensor, wanted);
}

void Check::tensor(Name name, const OptionalTensor& tensor, std::initializer_list<int64_t> sizes,
                   ScalarType wanted) {
  if (tensor) this->tensor(name, *tensor, sizes, wanted);
}

void Check::like(Name name, const Tensor& tensor, Name model_name, const Tensor& model) {
  memory(name, tensor);
  shape_of(name, tensor, model_name, model);
  dtype(name, tensor, ScalarType(raw_dtype(model)));
}

void Check::range(Name name, int64_t value, int64_t least, int64_t most) const {
  if (value < least || value > most) {
    refuse(name, "must be ", range_text(least, most), ", got ", value);
  }
}

void Check::count(Name name, double value) const {
  if (!std::isfinite(value) || value < 0) {
    refuse(name, "must be a finite number of at least 0, got ", value);
  }
}

void Check::written(Name name, const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && strides[d] == 0) {
      refuse(name, "must have an element of its own at every index, got an expanded tensor");
    }
  }
  const int64_t elements = tensor.numel();
  if (elements == 0 || dense_block(tensor, 0) != elements) return;
  const char* const begin = static_cast<const char*>(tensor.data_ptr());
  written_.push_back({begin, begin + elements * int64_t(tensor.element_size()), name});
}

void Check::no_overlap() {
  std::sort(written_.begin(), written_.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < written_.size(); ++i) {
    const Span &before = written_[i - 1], &span = written_[i];
    if (span.begin >= before.end) continue;
    std::string other = before.name.name;
    if (before.name.index >= 0) other += "[" + std::to_string(before.name.index) + "]";
    refuse(span.name, "must have memory of its own, got some that ", other, " has too");
  }
}

}  // namespace gankernels::ops
