// Registers batch_norm_leaky_relu and its derivatives.
#include "../kernels/batch_norm_leaky_relu.h"

#include <tuple>

#include "check.h"
#include "register.h"
#include "run.h"

namespace gankernels::ops {
namespace {

// Weight and bias have the same dtype: that of x, or float32 if x is of half precision.
MainCheck checked(const char* op, const Tensor& x, const OptionalTensor& weight,
                  const OptionalTensor& bias) {
  MainCheck check(op, "x", x);
  check.dimensions(check.main, 2, 5);
  const int64_t c = check.main.sizes[1];
  ScalarType dtype = ScalarType(check.main.dtype);
  if (weight) {
    const TensorInfo info = check.inspect("weight", *weight);
    if (check.main.element_bytes == 2 && info.has(ScalarType::Float)) dtype = ScalarType::Float;
    check.shape(info, {c});
    check.dtype(info, dtype);
  }
  if (bias) {
    const TensorInfo info = check.inspect("bias", *bias);
    if (check.main.element_bytes == 2 && !weight && info.has(ScalarType::Float))
      dtype = ScalarType::Float;
    check.shape(info, {c});
    check.dtype(info, dtype);
  }
  return check;
}

// Sets the parameters that all derivatives share. `x` must be dense; weight and bias are packed
// here.
void describe(BatchNormLeakyReLU& p, const Tensor& x, OptionalTensor& weight, OptionalTensor& bias,
              double eps, double negative_slope, bool activation_first) {
  weight = packed(weight);
  bias = packed(bias);
  p.n = x.size(0);
  p.c = p.affine = x.size(1);
  p.s = 1;
  for (int64_t d = 2; d < x.dim(); ++d) p.s *= x.size(d);
  p.channels_last = layout_of(x) == Layout::kChannelsLast;
  p.dtype = dtype_of(x);
  p.parameter_dtype = weight ? dtype_of(*weight) : bias ? dtype_of(*bias) : p.dtype;
  p.activation_first = activation_first;
  p.eps = eps;
  p.negative_slope = negative_slope;
  p.count = double(p.n) * double(p.s);
  p.x = data(x);
  p.weight = data(weight);
  p.bias = data(bias);
}

std::tuple<Tensor, Tensor> batch_norm_leaky_relu(Tensor x, OptionalTensor weight,
                                                 OptionalTensor bias, OptionalTensor statistics,
                                                 double eps, double negative_slope,
                                                 bool activation_first) {
  MainCheck check = checked("batch_norm_leaky_relu", x, weight, bias);
  check.tensor("statistics", statistics, {2, x.size(1)}, accumulation_type(x));
  x = dense(x);
  BatchNormLeakyReLUForward p;
  describe(p, x, weight, bias, eps, negative_slope, activation_first);
  const Tensor y = empty_with_strides_of(x);
  p.compute_statistics = !statistics;
  const Tensor used = statistics ? packed(*statistics) : empty({2, p.c}, accumulation_type(x), x);
  p.y = mutable_data(y);
  p.statistics = mutable_data(used);
  run<cpu::batch_norm_leaky_relu_forward, cuda::batch_norm_leaky_relu_forward>(p, x);
  // An op must not return one of its inputs, so if statistics are given an empty tensor is
  // returned.
  return {y, statistics ? empty({0}, accumulation_type(x), x) : used};
}

Tensor batch_norm_leaky_relu_statistics(Tensor x, double negative_slope, bool activation_first) {
  checked("batch_norm_leaky_relu_statistics", x, {}, {});
  x = dense(x);
  BatchNormLeakyReLUForward p;
  OptionalTensor none;
  describe(p, x, none, none, 0, negative_slope, activation_first);
  const Tensor statistics = empty({2, p.c}, accumulation_type(x), x);
  p.compute_statistics = true;
  p.statistics = mutable_data(statistics);
  run<cpu::batch_norm_leaky_relu_forward, cuda::batch_norm_leaky_relu_forward>(p, x);
  return statistics;
}

std::tuple<Tensor, Tensor> backward(const char* op, const Tensor& grad_y, Tensor x,
                                    OptionalTensor weight, OptionalTensor bias, Tensor statistics,
                                    OptionalTensor sums, double count, bool training, double eps,
                                    double negative_slope, bool activation_first, bool want_sums,
                                    bool want_grad_x) {
  MainCheck check = checked(op, x, weight, bias);
  check.like("grad_y", grad_y, check.main);
  check.tensor("statistics", statistics, {2, x.size(1)}, accumulation_type(x));
  check.tensor("sums", sums, {2, x.size(1)}, accumulation_type(x));
  check.count("count", count);
  x = dense(x);
  statistics = packed(statistics);
  sums = packed(sums);
  BatchNormLeakyReLUBackward p;
  describe(p, x, weight, bias, eps, negative_slope, activation_first);
  const Tensor g = in_layout_of(grad_y, x);
  p.count = count;
  p.training = training;
  p.statistics = mutable_data(statistics);
  p.grad_y = data(g);
  p.compute_sums = !sums && (want_sums || training);
  const Tensor own_sums = empty({p.compute_sums ? 2 : 0, p.c}, accumulation_type(x), x);
  p.sums = sums ? mutable_data(*sums) : p.compute_sums ? mutable_data(own_sums) : nullptr;
  Tensor grad_x;
  if (want_grad_x) {
    grad_x = empty_with_strides_of(x);
    p.grad_x = mutable_data(grad_x);
  }
  run<cpu::batch_norm_leaky_relu_backward, cuda::batch_norm_leaky_relu_backward>(p, x);
  return {grad_x, own_sums};
}

std::tuple<Tensor, Tensor> batch_norm_leaky_relu_backward(
    Tensor grad_y, Tensor x, OptionalTensor weight, OptionalTensor bias, Tensor statistics,
    OptionalTensor sums, double count, bool training, double eps, double negative_slope,
    bool activation_first, bool want_sums) {
  return backward("batch_norm_leaky_relu_backward", grad_y, x, weight, bias, statistics, sums,
                  count, training, eps, negative_slope, activation_first, want_sums, true);
}

Tensor batch_norm_leaky_relu_backward_sums(Tensor grad_y, Tensor x, OptionalTensor weight,
                                           OptionalTensor bias, Tensor statistics, double eps,
                                           double negative_slope, bool activation_first) {
  return std::get<1>(backward("batch_norm_leaky_relu_backward_sums", grad_y, x, weight, bias,
                              statistics, {}, 0, true, eps, negative_slope, activation_first, true,
                              false));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> double_backward(
    const char* op, const Tensor& grad_grad_x, OptionalTensor grad_grad_weight,
    OptionalTensor grad_grad_bias, const Tensor& grad_y, Tensor x, OptionalTensor weight,
    OptionalTensor bias, Tensor statistics, OptionalTensor sums, double count, bool training,
    double eps, double negative_slope, bool activation_first, bool want_grad_grad_y,
    bool want_grad_x, bool want_grad_weight) {
  MainCheck check = checked(op, x, weight, bias);
  check.like("grad_grad_x", grad_grad_x, check.main);
  check.tensor("grad_grad_weight", grad_grad_weight, {x.size(1)}, accumulation_type(x));
  check.tensor("grad_grad_bias", grad_grad_bias, {x.size(1)}, accumulation_type(x));
  check.like("grad_y", grad_y, check.main);
  check.tensor("statistics", statistics, {2, x.size(1)}, accumulation_type(x));
  check.tensor("sums", sums, {5, x.size(1)}, accumulation_type(x));
  check.count("count", count);
  x = dense(x);
  grad_grad_weight = packed(grad_grad_weight);
  grad_grad_bias = packed(grad_grad_bias);
  statistics = packed(statistics);
  sums = packed(sums);
  BatchNormLeakyReLUDoubleBackward p;
  describe(p, x, weight, bias, eps, negative_slope, activation_first);
  const Tensor g = in_layout_of(grad_y, x);
  const Tensor v = in_layout_of(grad_grad_x, x);
  p.count = count;
  p.training = training;
  p.statistics = mutable_data(statistics);
  p.grad_y = data(g);
  p.grad_grad_x = data(v);
  p.grad_grad_weight = data(grad_grad_weight);
  p.grad_grad_bias = data(grad_grad_bias);
  p.compute_sums = !sums;
  const Tensor own_sums = empty({sums ? 0 : 5, p.c}, accumulation_type(x), x);
  p.sums = mutable_data(sums ? *sums : own_sums);
  const Tensor grad_grad_y =
      want_grad_grad_y ? empty_with_strides_of(x) : empty({0}, x.scalar_type(), x);
  const Tensor grad_x = want_grad_x ? empty_with_strides_of(x) : empty({0}, x.scalar_type(), x);
  const Tensor grad_weight = empty({want_grad_weight ? p.c : 0}, accumulation_type(x), x);
  if (want_grad_grad_y) p.grad_grad_y = mutable_data(grad_grad_y);
  if (want_grad_x) p.grad_x = mutable_data(grad_x);
  if (want_grad_weight) p.grad_weight = mutable_data(grad_weight);
  run<cpu::batch_norm_leaky_relu_double_backward, cuda::batch_norm_leaky_relu_double_backward>(p,
                                                                                               x);
  return {grad_grad_y, grad_x, grad_weight, own_sums};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_leaky_relu_double_backward(
    Tensor grad_grad_x, OptionalTensor grad_grad_weight, OptionalTensor grad_grad_bias,
    Tensor grad_y, Tensor x, OptionalTensor weight, OptionalTensor bias, Tensor statistics,
    OptionalTensor sums, double count, bool training, double eps, double negative_slope,
    bool activation_first, bool want_grad_grad_y, bool want_grad_x) {
  auto [grad_grad_y, grad_x, grad_weight, _] =
      double_backward("batch_norm_leaky_relu_double_backward", grad_grad_x, grad_grad_weight,
                      grad_grad_bias, grad_y, x, weight, bias, statistics, sums, count, training,
                      eps, negative_slope, activation_first, want_grad_grad_y, want_grad_x, true);
  return {grad_grad_y, grad_x, grad_weight};
}

Tensor batch_norm_leaky_relu_double_backward_sums(Tensor grad_grad_x, Tensor grad_y, Tensor x,
                                                  OptionalTensor weight, OptionalTensor bias,
                                                  Tensor statistics, double eps,
                                                  double negative_slope, bool activation_first) {
  return std::get<3>(double_backward("batch_norm_leaky_relu_double_backward_sums", grad_grad_x, {},
                                     {}, grad_y, x, weight, bias, statistics, {}, 0, true, eps,
                                     negative_slope, activation_first, false, false, false));
}

void update_running_statistics(Tensor running_mean, Tensor running_var,
                               OptionalTensor num_batches_tracked, Tensor statistics,
                               std::optional<double> momentum, double count) {
  MainCheck check("update_running_statistics", "running_mean", running_mean);
  check.dimensions(check.main, 1, 1);
  check.output(check.main, running_mean);
  check.output(check.like("running_var", running_var, check.main), running_var);
  if (num_batches_tracked) {
    const TensorInfo counter = check.inspect("num_batches_tracked", *num_batches_tracked);
    check.dtype(counter, ScalarType::Long);
    check.one_element(counter);
    check.output(counter, *num_batches_tracked);
  } else if (!momentum) {
    check.fail("momentum", "must be a number if num_batches_tracked is None, got None");
  }
  check.tensor("statistics", statistics, {2, check.main.elements}, accumulation_type(running_mean));
  check.count("count", count);
  check.no_overlap();
  // The kernel needs contiguous arrays, so running statistics that are not are updated in copies.
  const Tensor mean = packed(running_mean), var = packed(running_var);
  // PyTorch may refuse to write to them, for example to leaves that require gradients. Therefore
  // first their own values are written to them, so that a refusal changes nothing.
  if (!running_mean.is_contiguous()) torch::stable::copy_(running_mean, mean);
  if (!running_var.is_contiguous()) torch::stable::copy_(running_var, var);
  statistics = packed(statistics);
  UpdateRunningStatistics p;
  p.c = running_mean.numel();
  p.statistics = data(statistics);
  p.statistics_dtype = dtype_of(statistics);
  p.running_mean = mutable_data(mean);
  p.running_var = mutable_data(var);
  p.running_dtype = dtype_of(running_mean);
  if (num_batches_tracked) {
    p.num_batches_tracked = static_cast<int64_t*>(mutable_data(*num_batches_tracked));
  }
  p.cumulative = !momentum;
  p.momentum = momentum.value_or(0);
  p.count = count;
  run<cpu::update_running_statistics, cuda::update_running_statistics>(p, running_mean);
  if (!running_mean.is_contiguous()) torch::stable::copy_(running_mean, mean);
  if (!running_var.is_contiguous()) torch::stable::copy_(running_var, var);
}

// Statistics are (2, C): mean, biased variance. Sums are as in kernels/batch_norm_leaky_relu.h.
constexpr Op kOps[] = {
    {"batch_norm_leaky_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor? statistics, "
     "float eps, float negative_slope, bool activation_first) -> (Tensor y, Tensor statistics)",
     TORCH_BOX(&batch_norm_leaky_relu)},
    {"batch_norm_leaky_relu_statistics(Tensor x, float negative_slope, bool activation_first) "
     "-> Tensor",
     TORCH_BOX(&batch_norm_leaky_relu_statistics)},
    {"batch_norm_leaky_relu_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, "
     "Tensor statistics, Tensor? sums, float count, bool training, float eps, "
     "float negative_slope, bool activation_first, bool want_sums) "
     "-> (Tensor grad_x, Tensor sums)",
     TORCH_BOX(&batch_norm_leaky_relu_backward)},
    {"batch_norm_leaky_relu_backward_sums(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, "
     "Tensor statistics, float eps, float negative_slope, bool activation_first) -> Tensor",
     TORCH_BOX(&batch_norm_leaky_relu_backward_sums)},
    {"batch_norm_leaky_relu_double_backward(Tensor grad_grad_x, Tensor? grad_grad_weight, "
     "Tensor? grad_grad_bias, Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, "
     "Tensor statistics, Tensor? sums, float count, bool training, float eps, "
     "float negative_slope, bool activation_first, bool want_grad_grad_y, bool want_grad_x) "
     "-> (Tensor grad_grad_y, Tensor grad_x, Tensor grad_weight)",
     TORCH_BOX(&batch_norm_leaky_relu_double_backward)},
    {"batch_norm_leaky_relu_double_backward_sums(Tensor grad_grad_x, Tensor grad_y, Tensor x, "
     "Tensor? weight, Tensor? bias, Tensor statistics, float eps, float negative_slope, "
     "bool activation_first) -> Tensor",
     TORCH_BOX(&batch_norm_leaky_relu_double_backward_sums)},
    {"update_running_statistics(Tensor(a!) running_mean, Tensor(b!) running_var, "
     "Tensor(c!)? num_batches_tracked, Tensor statistics, float? momentum, float count) -> ()",
     TORCH_BOX(&update_running_statistics)},
};

}  // namespace

GK_REGISTER(kOps)

}  // namespace gankernels::ops
