#include "check.h"

#include <algorithm>
#include <cmath>

namespace gankernels::ops {
namespace {

// Of every tensor, along each dimension and in all: far more than any machine holds, and little
// enough that no size computed from it overflows.
constexpr int64_t kMostElements = int64_t(1) << 40;

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

std::string shape_text(const int64_t* sizes, int64_t dims) {
  std::string result = "(";
  for (int64_t d = 0; d < dims; ++d) result += (d ? ", " : "") + std::to_string(sizes[d]);
  return result + (dims == 1 ? ",)" : ")");
}

bool has_sizes(const Seen& seen, const int64_t* sizes, int64_t dims) {
  return std::equal(seen.sizes, seen.sizes + seen.dims, sizes, sizes + dims);
}

}  // namespace

std::string shape_text(const Seen& seen) { return shape_text(seen.sizes, seen.dims); }

bool is_dense(const Seen& seen) {
  int64_t block = 1;  // the elements that are known to be dense so far
  for (bool found = true; found && block < seen.elements;) {
    found = false;
    for (int64_t d = 0; d < seen.dims; ++d) {
      if (seen.sizes[d] != 1 && seen.strides[d] == block) {
        block *= seen.sizes[d];
        found = true;
      }
    }
  }
  return block >= seen.elements;
}

bool same_strides(const Seen& seen, const Seen& model) {
  bool same = true;
  for (int64_t d = 0; d < seen.dims; ++d) {
    same &= seen.sizes[d] <= 1 || seen.strides[d] == model.strides[d];
  }
  return same;
}

Seen Check::memory(Name name, const Tensor& tensor) {
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
  int64_t *sizes, *strides, offset, storage;
  Seen seen = {name, 0, 0, nullptr, nullptr, 1, 0};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &seen.dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &seen.dims));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  seen.sizes = sizes;
  seen.strides = strides;
  seen.bytes = int64_t(aoti_torch_dtype_element_size(seen.dtype));
  int64_t product = 1;  // without sizes of zero
  __int128 last = 0;
  for (int64_t d = 0; d < seen.dims; ++d) {
    if (sizes[d] >= kMostElements || (product *= sizes[d] ? sizes[d] : 1) >= kMostElements) {
      refuse(name, "must have fewer than 2^40 elements, got shape ", shape_text(seen));
    }
    seen.elements *= sizes[d];
    last += __int128(sizes[d] - 1) * strides[d];
  }
  if (seen.elements == 0) return seen;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &storage));
  if ((last + offset + 1) * seen.bytes > storage) {
    refuse(name, "must lie within its storage, got shape ", shape_text(seen), " in ", storage,
           " bytes");
  }
  return seen;
}

void Check::floating(const Seen& seen) const {
  for (ScalarType type :
       {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    if (seen.has(type)) return;
  }
  refuse(seen.name, "must have dtype float32, float64, bfloat16 or float16, got ",
         text(seen.dtype));
}

void Check::dtype(const Seen& seen, ScalarType wanted) const {
  if (seen.has(wanted)) return;
  refuse(seen.name, "must have dtype ", text(int32_t(wanted)), ", got ", text(seen.dtype));
}

void Check::dimensions(const Seen& seen, int64_t least, int64_t most) const {
  if (seen.dims >= least && seen.dims <= most) return;
  refuse(seen.name, "must have ", range_text(least, most), most == 1 ? " dimension" : " dimensions",
         ", got shape ", shape_text(seen));
}

void Check::shape(const Seen& seen, std::initializer_list<int64_t> wanted) const {
  const int64_t dims = int64_t(wanted.size());
  if (has_sizes(seen, wanted.begin(), dims)) return;
  refuse(seen.name, "must have shape ", shape_text(wanted.begin(), dims), ", got ",
         shape_text(seen));
}

void Check::shape_of(const Seen& seen, const Seen& model, const char* model_name) const {
  if (has_sizes(seen, model.sizes, model.dims)) return;
  refuse(seen.name, "must have shape ", shape_text(model), " as ", model_name, ", got ",
         shape_text(seen));
}

void Check::one_element(const Seen& seen) const {
  if (seen.elements == 1) return;
  refuse(seen.name, "must have one element, got shape ", shape_text(seen));
}

void Check::tensor(Name name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                   ScalarType wanted) {
  const Seen seen = memory(name, tensor);
  shape(seen, sizes);
  dtype(seen, wanted);
}

void Check::tensor(Name name, const OptionalTensor& tensor, std::initializer_list<int64_t> sizes,
                   ScalarType wanted) {
  if (tensor) this->tensor(name, *tensor, sizes, wanted);
}

Seen Check::like(Name name, const Tensor& tensor, const Seen& model) {
  const Seen seen = memory(name, tensor);
  shape_of(seen, model, model.name.name);
  dtype(seen, ScalarType(model.dtype));
  return seen;
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

void Check::written(const Seen& seen, const Tensor& tensor) {
  for (int64_t d = 0; d < seen.dims; ++d) {
    if (seen.sizes[d] > 1 && seen.strides[d] == 0) {
      refuse(seen.name, "must have an element of its own at every index, got an expanded tensor");
    }
  }
  if (seen.elements == 0 || !is_dense(seen)) return;
  const char* const begin = static_cast<const char*>(tensor.data_ptr());
  written_.push_back({begin, begin + seen.elements * seen.bytes, seen.name});
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
