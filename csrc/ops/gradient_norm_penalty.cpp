// Registers gradient_norm_penalty and its derivatives.
#include "../kernels/gradient_norm_penalty.h"

#include <tuple>

#include "check.h"
#include "register.h"
#include "run.h"

namespace gankernels::ops {
namespace {

// The tensor itself if every sample (along the first dimension) is a dense block, in any order of
// the other dimensions, and the samples are adjacent; otherwise a contiguous copy.
Tensor with_dense_samples(const Tensor& tensor) {
  const int64_t samples = tensor.size(0);
  const int64_t block =
      dense_block(tensor.sizes().data() + 1, tensor.strides().data() + 1, tensor.dim() - 1);
  const bool dense =
      block * samples == tensor.numel() && (samples <= 1 || tensor.stride(0) == block);
  return dense ? tensor : contiguous_copy(tensor);
}

MainCheck checked(const char* op, const Tensor& grad, int64_t kind) {
  MainCheck check(op, "grad", grad);
  check.dimensions(check.main, 1, INT64_MAX);
  check.range("kind", kind, 0, int64_t(Penalty::kSquared));
  return check;
}

void describe(GradientNormPenalty& p, const Tensor& grad, int64_t kind, double center,
              const Tensor& squared_norms) {
  p.n = grad.size(0);
  p.d = p.n ? grad.numel() / p.n : 0;
  p.dtype = dtype_of(grad);
  p.kind = Penalty(kind);
  p.center = center;
  p.grad = data(grad);
  p.squared_norms = mutable_data(squared_norms);
}

std::tuple<Tensor, Tensor> gradient_norm_penalty(Tensor grad, int64_t kind, double center) {
  checked("gradient_norm_penalty", grad, kind);
  grad = with_dense_samples(grad);
  const Tensor penalty = empty({}, accumulation_type(grad), grad);
  const Tensor squared_norms = empty({grad.size(0)}, accumulation_type(grad), grad);
  GradientNormPenaltyForward p;
  describe(p, grad, kind, center, squared_norms);
  p.penalty = mutable_data(penalty);
  run<cpu::gradient_norm_penalty_forward, cuda::gradient_norm_penalty_forward>(p, grad);
  return {penalty, squared_norms};
}

Tensor gradient_norm_penalty_backward(Tensor grad_penalty, Tensor grad, Tensor squared_norms,
                                      int64_t kind, double center) {
  MainCheck check = checked("gradient_norm_penalty_backward", grad, kind);
  const ScalarType accumulation = accumulation_type(grad);
  check.tensor("grad_penalty", grad_penalty, {}, accumulation);
  check.tensor("squared_norms", squared_norms, {grad.size(0)}, accumulation);
  squared_norms = packed(squared_norms);
  grad = with_dense_samples(grad);
  const Tensor grad_grad = empty_with_strides_of(grad);
  GradientNormPenaltyBackward p;
  describe(p, grad, kind, center, squared_norms);
  p.grad_penalty = data(grad_penalty);
  p.grad_grad = mutable_data(grad_grad);
  run<cpu::gradient_norm_penalty_backward, cuda::gradient_norm_penalty_backward>(p, grad);
  return grad_grad;
}

std::tuple<Tensor, Tensor> gradient_norm_penalty_double_backward(Tensor tangent,
                                                                 Tensor grad_penalty, Tensor grad,
                                                                 Tensor squared_norms, int64_t kind,
                                                                 double center) {
  MainCheck check = checked("gradient_norm_penalty_double_backward", grad, kind);
  const ScalarType accumulation = accumulation_type(grad);
  check.like("tangent", tangent, check.main);
  check.tensor("grad_penalty", grad_penalty, {}, accumulation);
  check.tensor("squared_norms", squared_norms, {grad.size(0)}, accumulation);
  squared_norms = packed(squared_norms);
  grad = with_dense_samples(grad);
  tangent = in_layout_of(tangent, grad);
  const Tensor grad_grad_penalty = empty({}, accumulation_type(grad), grad);
  const Tensor grad_grad = empty_with_strides_of(grad);
  GradientNormPenaltyDoubleBackward p;
  describe(p, grad, kind, center, squared_norms);
  p.grad_penalty = data(grad_penalty);
  p.tangent = data(tangent);
  p.grad_grad_penalty = mutable_data(grad_grad_penalty);
  p.grad_grad = mutable_data(grad_grad);
  run<cpu::gradient_norm_penalty_double_backward, cuda::gradient_norm_penalty_double_backward>(
      p, grad);
  return {grad_grad_penalty, grad_grad};
}

// kind: 0 two-sided, 1 one-sided, 2 squared; see kernels/gradient_norm_penalty.h.
constexpr Op kOps[] = {
    {"gradient_norm_penalty(Tensor grad, int kind, float center) "
     "-> (Tensor penalty, Tensor squared_norms)",
     TORCH_BOX(&gradient_norm_penalty)},
    {"gradient_norm_penalty_backward(Tensor grad_penalty, Tensor grad, Tensor squared_norms, "
     "int kind, float center) -> Tensor",
     TORCH_BOX(&gradient_norm_penalty_backward)},
    {"gradient_norm_penalty_double_backward(Tensor tangent, Tensor grad_penalty, Tensor grad, "
     "Tensor squared_norms, int kind, float center) "
     "-> (Tensor grad_grad_penalty, Tensor grad_grad)",
     TORCH_BOX(&gradient_norm_penalty_double_backward)},
};

}  // namespace

GK_REGISTER(kOps)

}  // namespace gankernels::ops
