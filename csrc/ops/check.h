// What stands between Python and a pointer. Every op checks here all that it is given before it
// reads or writes anything: torch.ops.gankernels.* may be called by anyone with anything, and
// PyTorch's own ops never end a process. The Python layer checks too, for Python's own exception
// types; these errors are RuntimeErrors that name op and argument, what must be and what came.
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

// What is known of a tensor, asked for once: every question costs a call of PyTorch.
struct Seen {
  Name name;
  int32_t dtype;
  int64_t dims;
  const int64_t *sizes, *strides;
  int64_t elements, bytes;  // in all; of one

  bool has(ScalarType type) const { return dtype == int32_t(type); }
};

// The checks of one call. The first tensor says where all others must be.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // Defined, strided, on the device of all, and within its storage (which may have been resized).
  Seen memory(Name, const Tensor&);

  void floating(const Seen&) const;  // float32, float64, bfloat16 or float16
  void dtype(const Seen&, ScalarType) const;
  void dimensions(const Seen&, int64_t least, int64_t most) const;
  void shape(const Seen&, std::initializer_list<int64_t>) const;
  void shape_of(const Seen&, const Seen& model, const char* model_name) const;
  void one_element(const Seen&) const;

  // Memory, shape and dtype at once; of no tensor, nothing.
  void tensor(Name, const Tensor&, std::initializer_list<int64_t> sizes, ScalarType);
  void tensor(Name, const OptionalTensor&, std::initializer_list<int64_t> sizes, ScalarType);
  // Memory, and the shape and dtype of a model.
  Seen like(Name, const Tensor&, const Seen& model);

  void range(Name, int64_t value, int64_t least, int64_t most) const;
  void count(Name, double value) const;  // finite and not negative

  // What is written must not overlap itself, nor anything else that is written: between dense
  // tensors, since of others PyTorch does not know either.
  void written(const Seen&, const Tensor&);
  void no_overlap();

  template <typename... Words>
  [[noreturn]] void refuse(Name argument, const Words&... words) const {
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
  std::vector<Span> written_;
};

// With what was seen of an op's main tensor.
struct CheckOf : Check {
  Seen main;
  CheckOf(const char* op, Name name, const Tensor& tensor) : Check(op), main(memory(name, tensor)) {
    floating(main);
  }
};

std::string shape_text(const Seen&);

bool is_dense(const Seen&);
bool same_strides(const Seen&, const Seen& model);  // of the same sizes

}  // namespace gankernels::ops
