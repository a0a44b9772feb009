// Registers adam_, which steps many tensors at once.
#include "../kernels/adam.h"

#include "check.h"
#include "register.h"
#include "tensor.h"

namespace gankernels::ops {
namespace {

using Tensors = std::vector<Tensor>;

void adam(Tensors parameters, Tensors gradients, Tensors exp_avgs, Tensors exp_avg_sqs,
          Tensors steps, Tensors casts, double lr, double beta1, double beta2, double eps,
          double weight_decay) {
  Check check("adam_");
  const size_t count = parameters.size();
  auto check_length = [&](const char* name, const Tensors& list) {
    if (list.size() != count) {
      check.fail(name, "must have as many tensors as parameters, ", count, ", got ", list.size());
    }
  };
  check_length("gradients", gradients);
  check_length("exp_avgs", exp_avgs);
  check_length("exp_avg_sqs", exp_avg_sqs);
  check_length("steps", steps);
  check_length("casts", casts);
  // All checks and copies come before the first change.
  for (size_t i = 0; i < count; ++i) {
    const TensorInfo parameter = check.inspect({"parameters", i}, parameters[i]);
    check.dtype(parameter, ScalarType::Float);
    if (!is_dense(parameter)) {
      check.fail(parameter.name, "must have no gaps between its elements");
    }
    check.output(parameter, parameters[i]);

    auto check_companion = [&](const TensorInfo& info, const Tensor& tensor, ScalarType dtype) {
      check.dtype(info, dtype);
      check.shape_of(info, parameter, "its parameter");
      if (!same_strides(info, parameter)) {
        check.fail(info.name, "must have the strides of its parameter, got others");
      }
      check.output(info, tensor);
    };
    check_companion(check.inspect({"exp_avgs", i}, exp_avgs[i]), exp_avgs[i], ScalarType::Float);
    check_companion(check.inspect({"exp_avg_sqs", i}, exp_avg_sqs[i]), exp_avg_sqs[i],
                    ScalarType::Float);
    const TensorInfo cast = check.inspect({"casts", i}, casts[i]);
    if (cast.elements) check_companion(cast, casts[i], ScalarType::BFloat16);

    const TensorInfo step_info = check.inspect({"steps", i}, steps[i]);
    check.dtype(step_info, ScalarType::Float);
    check.one_element(step_info);
    check.output(step_info, steps[i]);
    const float step = *static_cast<const float*>(data(steps[i]));
    if (!(step >= 0 && step < 0x1p62f)) {  // as an integer it fits, with one more
      check.fail(step_info.name, "must be a number of steps, got ", step);
    }

    const TensorInfo gradient = check.inspect({"gradients", i}, gradients[i]);
    check.floating(gradient);
    check.shape_of(gradient, parameter, "its parameter");
    const bool known = gradient.has(ScalarType::Float) || gradient.has(ScalarType::BFloat16);
    if (!known || !same_strides(gradient, parameter)) {
      gradients[i] = in_layout_of(gradients[i], parameters[i]);
    }
  }
  check.no_overlap();
  std::vector<AdamTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    float& step = *static_cast<float*>(mutable_data(steps[i]));
    AdamTensor& t = tensors[i];
    t.size = parameters[i].numel();
    t.step = int64_t(++step);
    t.gradient_dtype = dtype_of(gradients[i]);
    t.parameter = static_cast<float*>(mutable_data(parameters[i]));
    t.gradient = data(gradients[i]);
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

// Parameters, moments and steps are float32. Gradients have any floating-point dtype; those that
// are neither float32 nor bfloat16 are converted. Casts are bfloat16, or empty if not wanted. All
// lists have the same length, and moments and casts have the strides of their parameters.
constexpr Op kOps[] = {
    {"adam_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, "
     "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] casts, float lr, float beta1, "
     "float beta2, float eps, float weight_decay) -> ()",
     TORCH_BOX(&adam)},
};

}  // namespace

GK_REGISTER_ON_CPU(kOps)

}  // namespace gankernels::ops
