// Registers minibatch_discrimination and its derivatives.
#include "../kernels/minibatch_discrimination.h"

#include <tuple>

#include "check.h"
#include "tensor.h"

namespace gankernels::ops {
namespace {

void set_strides(const Tensor& tensor, int64_t* strides) {
  for (int64_t d = 0; d < tensor.dim(); ++d) strides[d] = tensor.stride(d);
}

CheckOf checked(const char* op, const Tensor& m) {
  CheckOf check(op, "m", m);
  check.dimensions(check.main, 3, 3);
  return check;
}

void describe(MinibatchDiscrimination& p, const Tensor& m) {
  p.n = m.size(0);
  p.b = m.size(1);
  p.c = m.size(2);
  p.dtype = dtype_of(m);
  p.m = data(m);
  set_strides(m, p.m_strides);
}

#ifdef GK_WITH_CUDA
#define GK_RUN_HERE(NAME, p, x)                                                                \
  if (x.is_cuda()) {                                                                           \
    const int device = x.get_device();                                                         \
    const Tensor scratch =                                                                     \
        empty({cuda::minibatch_discrimination_scratch_bytes(p, device)}, ScalarType::Byte, x); \
    p.scratch = mutable_data(scratch);                                                         \
    check_cuda(cuda::NAME(p, device, cuda_stream(x)));                                         \
  } else {                                                                                     \
    run_on_cpu(cpu::NAME, p, x);                                                               \
  }
#else
#define GK_RUN_HERE(NAME, p, x) run_on_cpu(cpu::NAME, p, x);
#endif

template <typename Parameters>
void run_on_cpu(void (*kernel)(const Parameters&, const CpuThreads&), Parameters& p,
                const Tensor& m) {
  const CpuThreads threads = cpu_threads();
  const Tensor scratch =
      empty({cpu::minibatch_discrimination_scratch_bytes(p, threads)}, ScalarType::Byte, m);
  p.scratch = mutable_data(scratch);
  kernel(p, threads);
}

Tensor minibatch_discrimination(Tensor m) {
  checked("minibatch_discrimination", m);
  MinibatchDiscriminationForward p;
  describe(p, m);
  const Tensor o = empty({p.n, p.b}, m.scalar_type(), m);
  p.o = mutable_data(o);
  GK_RUN_HERE(minibatch_discrimination_forward, p, m);
  return o;
}

Tensor minibatch_discrimination_backward(Tensor grad_o, Tensor m) {
  CheckOf check = checked("minibatch_discrimination_backward", m);
  check.tensor("grad_o", grad_o, {m.size(0), m.size(1)}, m.scalar_type());
  MinibatchDiscriminationBackward p;
  describe(p, m);
  p.grad_o = data(grad_o);
  set_strides(grad_o, p.grad_o_strides);
  const Tensor grad_m = empty({p.n, p.b, p.c}, m.scalar_type(), m);
  p.grad_m = mutable_data(grad_m);
  GK_RUN_HERE(minibatch_discrimination_backward, p, m);
  return grad_m;
}

std::tuple<Tensor, Tensor> minibatch_discrimination_double_backward(Tensor grad_grad_m,
                                                                    Tensor grad_o, Tensor m,
                                                                    bool want_grad_m) {
  CheckOf check = checked("minibatch_discrimination_double_backward", m);
  check.like("grad_grad_m", grad_grad_m, check.main);
  check.tensor("grad_o", grad_o, {m.size(0), m.size(1)}, m.scalar_type());
  MinibatchDiscriminationDoubleBackward p;
  describe(p, m);
  p.grad_o = data(grad_o);
  set_strides(grad_o, p.grad_o_strides);
  p.grad_grad_m = data(grad_grad_m);
  set_strides(grad_grad_m, p.grad_grad_m_strides);
  const Tensor grad_grad_o = empty({p.n, p.b}, m.scalar_type(), m);
  const Tensor grad_m =
      want_grad_m ? empty({p.n, p.b, p.c}, m.scalar_type(), m) : empty({0}, m.scalar_type(), m);
  p.grad_grad_o = mutable_data(grad_grad_o);
  if (want_grad_m) p.grad_m = mutable_data(grad_m);
  GK_RUN_HERE(minibatch_discrimination_double_backward, p, m);
  return {grad_grad_o, grad_m};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gankernels, m) {
  m.def("minibatch_discrimination(Tensor m) -> Tensor");
  m.def("minibatch_discrimination_backward(Tensor grad_o, Tensor m) -> Tensor");
  m.def(
      "minibatch_discrimination_double_backward(Tensor grad_grad_m, Tensor grad_o, Tensor m, "
      "bool want_grad_m) -> (Tensor grad_grad_o, Tensor grad_m)");
}

#define GK_REGISTER(m)                                                                        \
  m.impl("minibatch_discrimination", TORCH_BOX(&minibatch_discrimination));                   \
  m.impl("minibatch_discrimination_backward", TORCH_BOX(&minibatch_discrimination_backward)); \
  m.impl("minibatch_discrimination_double_backward",                                          \
         TORCH_BOX(&minibatch_discrimination_double_backward));

STABLE_TORCH_LIBRARY_IMPL(gankernels, CPU, m){GK_REGISTER(m)}
#ifdef GK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(gankernels, CUDA, m) {
  GK_REGISTER(m)
}
#endif

}  // namespace gankernels::ops
