// Registers minibatch_discrimination and its derivatives.
#include "../kernels/minibatch_discrimination.h"

#include <tuple>

#include "check.h"
#include "register.h"
#include "run.h"

namespace gankernels::ops {
namespace {

void set_strides(const Tensor& tensor, int64_t* strides) {
  for (int64_t d = 0; d < tensor.dim(); ++d) strides[d] = tensor.stride(d);
}

MainCheck checked(const char* op, const Tensor& m) {
  MainCheck check(op, "m", m);
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

Tensor minibatch_discrimination(Tensor m) {
  checked("minibatch_discrimination", m);
  MinibatchDiscriminationForward p;
  describe(p, m);
  const Tensor o = empty({p.n, p.b}, m.scalar_type(), m);
  p.o = mutable_data(o);
  run<cpu::minibatch_discrimination_forward, cuda::minibatch_discrimination_forward>(p, m);
  return o;
}

Tensor minibatch_discrimination_backward(Tensor grad_o, Tensor m) {
  MainCheck check = checked("minibatch_discrimination_backward", m);
  check.tensor("grad_o", grad_o, {m.size(0), m.size(1)}, m.scalar_type());
  MinibatchDiscriminationBackward p;
  describe(p, m);
  p.grad_o = data(grad_o);
  set_strides(grad_o, p.grad_o_strides);
  const Tensor grad_m = empty({p.n, p.b, p.c}, m.scalar_type(), m);
  p.grad_m = mutable_data(grad_m);
  run<cpu::minibatch_discrimination_backward, cuda::minibatch_discrimination_backward>(p, m);
  return grad_m;
}

std::tuple<Tensor, Tensor> minibatch_discrimination_double_backward(Tensor grad_grad_m,
                                                                    Tensor grad_o, Tensor m,
                                                                    bool want_grad_m) {
  MainCheck check = checked("minibatch_discrimination_double_backward", m);
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
  run<cpu::minibatch_discrimination_double_backward,
      cuda::minibatch_discrimination_double_backward>(p, m);
  return {grad_grad_o, grad_m};
}

constexpr Op kOps[] = {
    {"minibatch_discrimination(Tensor m) -> Tensor", TORCH_BOX(&minibatch_discrimination)},
    {"minibatch_discrimination_backward(Tensor grad_o, Tensor m) -> Tensor",
     TORCH_BOX(&minibatch_discrimination_backward)},
    {"minibatch_discrimination_double_backward(Tensor grad_grad_m, Tensor grad_o, Tensor m, "
     "bool want_grad_m) -> (Tensor grad_grad_o, Tensor grad_m)",
     TORCH_BOX(&minibatch_discrimination_double_backward)},
};

}  // namespace

GK_REGISTER(kOps)

}  // namespace gankernels::ops
