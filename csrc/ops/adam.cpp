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
      check.refuse(name, "must be as many as the ", count, " parameters, got ", list.size());
    }
  };
  check_length("gradients", gradients);
  check_length("exp_avgs", exp_avgs);
  check_length("exp_avg_sqs", exp_avg_sqs);
  check_length("steps", steps);
  check_length("casts", casts);
  // Everything is checked, and what must be copied is, before anything is changed.
  for (size_t i = 0; i < count; ++i) {
    const Seen parameter = check.memory({"parameters", i}, parameters[i]);
    check.dtype(parameter, ScalarType::Float);
    if (!is_dense(parameter)) {
      check.refuse(parameter.name, "must have no gaps between its elements");
    }
    check.written(parameter, parameters[i]);

    auto check_companion = [&](const Seen& seen, const Tensor& tensor, ScalarType dtype) {
      check.dtype(seen, dtype);
      check.shape_of(seen, parameter, "its parameter");
      if (!same_strides(seen, parameter)) {
        check.refuse(seen.name, "must lie in memory as its parameter does, got other strides");
      }
      check.written(seen, tensor);
    };
    check_companion(check.memory({"exp_avgs", i}, exp_avgs[i]), exp_avgs[i], ScalarType::Float);
    check_companion(check.memory({"exp_avg_sqs", i}, exp_avg_sqs[i]), exp_avg_sqs[i],
                    ScalarType::Float);
    const Seen cast = check.memory({"casts", i}, casts[i]);
    if (cast.elements) check_companion(cast, casts[i], ScalarType::BFloat16);

    const Seen steps_seen = check.memory({"steps", i}, steps[i]);
    check.dtype(steps_seen, ScalarType::Float);
    check.one_element(steps_seen);
    check.written(steps_seen, steps[i]);
    const float step = *static_cast<const float*>(data(steps[i]));
    if (!(step >= 0 && step < 0x1p62f)) {  // as an integer it fits, with one more
      check.refuse(steps_seen.name, "must be a number of steps, got ", step);
    }

    const Seen gradient = check.memory({"gradients", i}, gradients[i]);
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

// Parameters, moments and steps are float32; gradients float32 or bfloat16; casts bfloat16, or
// empty where none is wanted. Lists of one length; moments and casts lie in memory as parameters.
constexpr Op kOps[] = {
    {"adam_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, "
     "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] casts, float lr, float beta1, "
     "float beta2, float eps, float weight_decay) -> ()",
     TORCH_BOX(&adam)},
};

}  // namespace

GK_REGISTER_ON_CPU(kOps)

}  // namespace gankernels::ops
