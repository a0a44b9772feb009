// Checks the arguments of ops before anything is read or written. torch.ops.gankernels.* may be
// called with any arguments, and like PyTorch's own ops they must never crash the process. The
// Python layer checks as well, for Python's exception types. The errors here are RuntimeErrors of
// the form `op: argument must be ..., got ...`.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensor.h"

namespace gankernels::ops {

// An argument, or an element of one that is a list.
struct Name {
  const char* name;
  int64_t index = -1;
  Name(const char* of) : name(of) {}
  Name(const char* list, size_t element) : name(list), index(int64_t(element)) {}
};

// The properties of a tensor, read once, since every query is a call into PyTorch.
struct TensorInfo {
  Name name;
  int32_t dtype;
  int64_t dims;
  const int64_t *sizes, *strides;
  int64_t elements, element_bytes;

  bool has(ScalarType type) const { return dtype == int32_t(type); }
};

// The checks of one call of an op. All tensors must be on the device of the first one.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // The tensor must be defined, strided, on the device of the others, and within its storage, which
  // may have been resized.
  TensorInfo inspect(Name, const Tensor&);

  void floating(const TensorInfo&) const;  // float32, float64, bfloat16 or float16
  void dtype(const TensorInfo&, ScalarType) const;
  void dimensions(const TensorInfo&, int64_t least, int64_t most) const;
  void shape(const TensorInfo&, std::initializer_list<int64_t>) const;
  void shape_of(const TensorInfo&, const TensorInfo& model, const char* model_name) const;
  void one_element(const TensorInfo&) const;

  // Inspects a tensor and checks its shape and dtype. An optional one may be missing.
  void tensor(Name, const Tensor&, std::initializer_list<int64_t> sizes, ScalarType);
  void tensor(Name, const OptionalTensor&, std::initializer_list<int64_t> sizes, ScalarType);
  // Inspects a tensor that must have the shape and dtype of `model`.
  TensorInfo like(Name, const Tensor&, const TensorInfo& model);

  void range(Name, int64_t value, int64_t least, int64_t most) const;
  void count(Name, double value) const;  // finite and not negative

  // An output must not overlap itself or another output. Like PyTorch, no_overlap() compares dense
  // tensors only.
  void output(const TensorInfo&, const Tensor&);
  void no_overlap();

  template <typename... Words>
  [[noreturn]] void fail(Name argument, const Words&... words) const {
    std::ostringstream message;
    message << op_ << ": " << argument.name;
    if (argument.index >= 0) message << '[' << argument.index << ']';
    message << ' ';
    (message << ... << words);
    throw std::runtime_error(message.str());
  }

 private:
  struct Span {
    const char *begin, *end;
    Name name;
  };

  const char* op_;
  int32_t device_type_ = -1, device_index_ = -1;
  std::vector<Span> outputs_;
};

// The checks of an op whose first tensor, `main`, has a floating-point dtype.
struct MainCheck : Check {
  TensorInfo main;
  MainCheck(const char* op, Name name, const Tensor& tensor)
      : Check(op), main(inspect(name, tensor)) {
    floating(main);
  }
};

std::string shape_text(const TensorInfo&);

bool is_dense(const TensorInfo&);
bool same_strides(const TensorInfo&, const TensorInfo& model);  // of the same sizes

}  // namespace gankernels::ops
