// Registers adam_, which steps many tensors at once. Unlike other ops it checks what it is given,
// since an optimiser's state may come from anywhere.
#include "../kernels/adam.h"

#include "tensor.h"

namespace gankernels::ops {
namespace {

using Tensors = std::vector<Tensor>;

void check_like(const Tensor& tensor, const Tensor& parameter, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.numel() == parameter.numel() &&
                      tensor.dim() == parameter.dim() && same_strides(tensor, parameter),
                  "adam_: ", name, " must have its parameter's sizes and strides, and dtype ",
                  dtype == ScalarType::Float ? "float32" : "bfloat16");
}

void adam(Tensors parameters, Tensors gradients, Tensors exp_avgs, Tensors exp_avg_sqs,
          Tensors steps, Tensors casts, double lr, double beta1, double beta2, double eps,
          double weight_decay) {
  const size_t count = parameters.size();
  for (const Tensors* list : {&gradients, &exp_avgs, &exp_avg_sqs, &steps, &casts}) {
    STD_TORCH_CHECK(list->size() == count, "adam_: the lists are not of one length");
  }
  std::vector<AdamTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& parameter = parameters[i];
    check_like(parameter, parameter, ScalarType::Float, "parameter");
    STD_TORCH_CHECK(dense_block(parameter, 0) == parameter.numel(),
                    "adam_: a parameter has gaps between its elements");
    check_like(exp_avgs[i], parameter, ScalarType::Float, "exp_avg");
    check_like(exp_avg_sqs[i], parameter, ScalarType::Float, "exp_avg_sq");
    check_like(steps[i], steps[i], ScalarType::Float, "step");
    if (casts[i].numel()) check_like(casts[i], parameter, ScalarType::BFloat16, "cast");
    Tensor& gradient = gradients[i];
    STD_TORCH_CHECK(gradient.numel() == parameter.numel() && gradient.dim() == parameter.dim(),
                    "adam_: a gradient is not of its parameter's sizes");
    const ScalarType dtype = gradient.scalar_type();
    const bool known = dtype == ScalarType::Float || dtype == ScalarType::BFloat16;
    if (!known || !same_strides(gradient, parameter)) gradient = in_layout_of(gradient, parameter);
    float& step = *static_cast<float*>(mutable_data(steps[i]));
    AdamTensor& t = tensors[i];
    t.size = parameter.numel();
    t.step = int64_t(++step);
    t.gradient_dtype = dtype_of(gradient);
    t.parameter = static_cast<float*>(mutable_data(parameter));
    t.gradient = data(gradient);
    t.exp_avg = static_cast<float*>(mutable_data(exp_avgs[i]));
    t.exp_avg_sq = static_cast<float*>(mutable_data(exp_avg_sqs[i]));
    t.cast = casts[i].numel() ? mutable_data(casts[i]) : nullptr;
  }
  Adam p;
  p.count = int64_t(count);
  p.tensors = tensors.data();
  p.lr = lr;
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.eps = eps;
  p.weight_decay = weight_decay;
  cpu::adam(p, cpu_threads());
}

}  // namespace

// Parameters, moments and steps are float32; gradients float32 or bfloat16; casts bfloat16, or
// empty where none is wanted. Lists of one length; moments and casts lie in memory as parameters.
STABLE_TORCH_LIBRARY_FRAGMENT(gankernels, m) {
  m.def(
      "adam_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] casts, float lr, float beta1, "
      "float beta2, float eps, float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gankernels, CPU, m) { m.impl("adam_", TORCH_BOX(&adam)); }

}  // namespace gankernels::ops
