// Registers minibatch_stddev and its derivatives.
#include "../kernels/minibatch_stddev.h"

#include <tuple>

#include "check.h"
#include "register.h"
#include "run.h"

namespace gankernels::ops {
namespace {

MainCheck checked(const char* op, const Tensor& x, int64_t group_size, int64_t num_channels) {
  MainCheck check(op, "x", x);
  check.dimensions(check.main, 2, INT64_MAX);
  if (check.main.elements == 0) {
    check.fail("x", "must not be empty, got shape ", shape_text(check.main));
  }
  check.range("group_size", group_size, 1, INT64_MAX);
  check.range("num_channels", num_channels, 1, INT64_MAX);
  if (x.size(1) % num_channels) {
    check.fail("num_channels", "must divide the ", x.size(1), " channels of x, got ", num_channels);
  }
  return check;
}

// Groups have at most group_size samples. It may exceed the number of samples, up to INT64_MAX.
int64_t groups_of(const Tensor& x, int64_t group_size) { return (x.size(0) - 1) / group_size + 1; }

// x is dense. Returns the number of groups.
int64_t describe(MinibatchStddev& p, const Tensor& x, int64_t group_size, int64_t num_channels,
                 double eps) {
  const bool rows = num_channels > 1 && layout_of(x) == Layout::kChannelsLast;
  p.n = x.size(0);
  p.groups = groups_of(x, group_size);
  p.features = num_channels;
  p.rows = rows ? x.numel() / (p.n * x.size(1)) : 1;
  p.run = x.numel() / (p.n * p.rows * num_channels);
  p.dtype = dtype_of(x);
  p.eps = eps;
  p.x = data(x);
  return p.groups;
}

Tensor minibatch_stddev(Tensor x, int64_t group_size, int64_t num_channels, double eps) {
  checked("minibatch_stddev", x, group_size, num_channels);
  x = dense(x);
  MinibatchStddevForward p;
  const int64_t groups = describe(p, x, group_size, num_channels, eps);
  const Tensor stddev = empty({groups, num_channels}, accumulation_type(x), x);
  p.stddev = mutable_data(stddev);
  run<cpu::minibatch_stddev_forward, cuda::minibatch_stddev_forward>(p, x);
  return stddev;
}

Tensor minibatch_stddev_backward(Tensor grad_stddev, Tensor x, int64_t group_size,
                                 int64_t num_channels, double eps) {
  MainCheck check = checked("minibatch_stddev_backward", x, group_size, num_channels);
  check.tensor("grad_stddev", grad_stddev, {groups_of(x, group_size), num_channels},
               accumulation_type(x));
  x = dense(x);
  grad_stddev = packed(grad_stddev);
  const Tensor grad_x = empty_with_strides_of(x);
  MinibatchStddevBackward p;
  describe(p, x, group_size, num_channels, eps);
  p.grad_stddev = data(grad_stddev);
  p.grad_x = mutable_data(grad_x);
  run<cpu::minibatch_stddev_backward, cuda::minibatch_stddev_backward>(p, x);
  return grad_x;
}

std::tuple<Tensor, Tensor> minibatch_stddev_double_backward(Tensor tangent, Tensor grad_stddev,
                                                            Tensor x, int64_t group_size,
                                                            int64_t num_channels, double eps) {
  MainCheck check = checked("minibatch_stddev_double_backward", x, group_size, num_channels);
  check.like("tangent", tangent, check.main);
  check.tensor("grad_stddev", grad_stddev, {groups_of(x, group_size), num_channels},
               accumulation_type(x));
  x = dense(x);
  tangent = in_layout_of(tangent, x);
  grad_stddev = packed(grad_stddev);
  const Tensor grad_x = empty_with_strides_of(x);
  MinibatchStddevDoubleBackward p;
  const int64_t groups = describe(p, x, group_size, num_channels, eps);
  const Tensor grad_grad_stddev = empty({groups, num_channels}, accumulation_type(x), x);
  p.grad_stddev = data(grad_stddev);
  p.tangent = data(tangent);
  p.grad_grad_stddev = mutable_data(grad_grad_stddev);
  p.grad_x = mutable_data(grad_x);
  run<cpu::minibatch_stddev_double_backward, cuda::minibatch_stddev_double_backward>(p, x);
  return {grad_grad_stddev, grad_x};
}

// stddev is (groups, num_channels), of the accumulation type.
constexpr Op kOps[] = {
    {"minibatch_stddev(Tensor x, int group_size, int num_channels, float eps) -> Tensor",
     TORCH_BOX(&minibatch_stddev)},
    {"minibatch_stddev_backward(Tensor grad_stddev, Tensor x, int group_size, int num_channels, "
     "float eps) -> Tensor",
     TORCH_BOX(&minibatch_stddev_backward)},
    {"minibatch_stddev_double_backward(Tensor tangent, Tensor grad_stddev, Tensor x, "
     "int group_size, int num_channels, float eps) -> (Tensor grad_grad_stddev, Tensor grad_x)",
     TORCH_BOX(&minibatch_stddev_double_backward)},
};

}  // namespace

GK_REGISTER(kOps)

}  // namespace gankernels::ops
