// Registers minibatch_stddev and its derivatives. Arguments arrive checked, x not empty: see
// gankernels/functional.py.
#include "../kernels/minibatch_stddev.h"

#include <tuple>

#include "tensor.h"

namespace gankernels::ops {
namespace {

// x is dense. Returns the number of groups: of group_size samples at most.
int64_t describe(MinibatchStddev& p, const Tensor& x, int64_t group_size, int64_t num_channels,
                 double eps) {
  const bool rows = num_channels > 1 && layout_of(x) == Layout::kChannelsLast;
  p.n = x.size(0);
  p.groups = (p.n + group_size - 1) / group_size;
  p.features = num_channels;
  p.rows = rows ? x.numel() / (p.n * x.size(1)) : 1;
  p.run = x.numel() / (p.n * p.rows * num_channels);
  p.dtype = dtype_of(x);
  p.eps = eps;
  p.x = data(x);
  return p.groups;
}

#ifdef GK_WITH_CUDA
#define GK_RUN(NAME, p, x)                                                             \
  if (x.is_cuda()) {                                                                   \
    const int device = x.get_device();                                                 \
    const Tensor scratch =                                                             \
        empty({cuda::minibatch_stddev_scratch_bytes(p, device)}, ScalarType::Byte, x); \
    check_cuda(cuda::NAME(p, mutable_data(scratch), device, cuda_stream(x)));          \
  } else {                                                                             \
    cpu::NAME(p, cpu_threads());                                                       \
  }
#else
#define GK_RUN(NAME, p, x) cpu::NAME(p, cpu_threads());
#endif

Tensor minibatch_stddev(Tensor x, int64_t group_size, int64_t num_channels, double eps) {
  x = dense(x);
  MinibatchStddevForward p;
  const int64_t groups = describe(p, x, group_size, num_channels, eps);
  const Tensor stddev = empty({groups, num_channels}, accumulation_type(x), x);
  p.stddev = mutable_data(stddev);
  GK_RUN(minibatch_stddev_forward, p, x);
  return stddev;
}

Tensor minibatch_stddev_backward(Tensor grad_stddev, Tensor x, int64_t group_size,
                                 int64_t num_channels, double eps) {
  x = dense(x);
  grad_stddev = packed(grad_stddev);
  const Tensor grad_x = empty_with_strides_of(x);
  MinibatchStddevBackward p;
  describe(p, x, group_size, num_channels, eps);
  p.grad_stddev = data(grad_stddev);
  p.grad_x = mutable_data(grad_x);
  GK_RUN(minibatch_stddev_backward, p, x);
  return grad_x;
}

std::tuple<Tensor, Tensor> minibatch_stddev_double_backward(Tensor tangent, Tensor grad_stddev,
                                                            Tensor x, int64_t group_size,
                                                            int64_t num_channels, double eps) {
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
  GK_RUN(minibatch_stddev_double_backward, p, x);
  return {grad_grad_stddev, grad_x};
}

}  // namespace

// stddev is (groups, num_channels), of the accumulation type.
STABLE_TORCH_LIBRARY_FRAGMENT(gankernels, m) {
  m.def("minibatch_stddev(Tensor x, int group_size, int num_channels, float eps) -> Tensor");
  m.def(
      "minibatch_stddev_backward(Tensor grad_stddev, Tensor x, int group_size, int num_channels, "
      "float eps) -> Tensor");
  m.def(
      "minibatch_stddev_double_backward(Tensor tangent, Tensor grad_stddev, Tensor x, "
      "int group_size, int num_channels, float eps) -> (Tensor grad_grad_stddev, Tensor grad_x)");
}

#define GK_REGISTER(m)                                                        \
  m.impl("minibatch_stddev", TORCH_BOX(&minibatch_stddev));                   \
  m.impl("minibatch_stddev_backward", TORCH_BOX(&minibatch_stddev_backward)); \
  m.impl("minibatch_stddev_double_backward", TORCH_BOX(&minibatch_stddev_double_backward));

STABLE_TORCH_LIBRARY_IMPL(gankernels, CPU, m){GK_REGISTER(m)}
#ifdef GK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(gankernels, CUDA, m) {
  GK_REGISTER(m)
}
#endif

}  // namespace gankernels::ops
