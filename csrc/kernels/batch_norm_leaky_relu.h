// Batch normalization fused with LeakyReLU, in either order, through the second derivative.
//
//   activation last  (batch_norm_leaky_relu):  y = lrelu(weight * xhat(x) + bias)
//   activation first (leaky_relu_batch_norm):  y = weight * xhat(lrelu(x)) + bias
//   xhat(u) = (u - mean) / sqrt(var + eps)
//
// Every tensor "of x's shape" is dense and has x's dtype and x's memory layout. Statistics and
// results per channel are of the accumulation type: float64 for float64, otherwise float32. The
// formulas are in batch_norm_leaky_relu_math.h, shared by CPU and CUDA.
#pragma once

#include "common.h"

namespace gankernels {

struct BatchNormLeakyReLU {
  // x is (N, C, S), S being the product of the spatial sizes.
  int64_t n = 0, c = 0, s = 0;
  // The size of weight, bias and their tangents: statistics group i takes element i % affine. For
  // batch norm it equals c. Instance norm of a contiguous (N, C, S) is this problem with n = 1,
  // c = N * C and affine = C, if the caller sums the gradients of weight and bias over N.
  int64_t affine = 0;
  bool channels_last = false;               // element order [n][s][c] instead of [n][c][s]
  DType dtype = DType::kFloat32;            // of x and everything of its shape
  DType parameter_dtype = DType::kFloat32;  // of weight and bias
  bool activation_first = false;
  bool training = false;  // whether mean and var depend on x, in the derivatives
  double eps = 0, negative_slope = 0;
  double count = 0;  // elements per channel behind mean and var; n * s unless synchronized

  const void* x = nullptr;
  const void* weight = nullptr;  // (C), or null: 1
  const void* bias = nullptr;    // (C), or null: 0
  void* statistics = nullptr;    // (2, C): mean, biased variance
};

// The element of weight, bias and their tangents that belongs to statistics group c.
GK_HOST_DEVICE static inline int64_t affine_index(const BatchNormLeakyReLU& p, int64_t c) {
  return c < p.affine ? c : c % p.affine;
}

struct BatchNormLeakyReLUForward : BatchNormLeakyReLU {
  bool compute_statistics = false;  // write `statistics` from x; otherwise read them
  void* y = nullptr;                // of x's shape, or null: statistics only
};

struct BatchNormLeakyReLUBackward : BatchNormLeakyReLU {
  const void* grad_y = nullptr;
  bool compute_sums = false;  // write `sums` from the tensors; otherwise read them
  // (2, C), sums over a channel of g and g * xhat, where g = grad_y * dy/dz: the gradients of bias
  // and weight. May be null if they are not needed: evaluation without parameter gradients.
  void* sums = nullptr;
  void* grad_x = nullptr;  // of x's shape, or null: sums only
};

struct BatchNormLeakyReLUDoubleBackward : BatchNormLeakyReLU {
  const void* grad_y = nullptr;            // of x's shape
  const void* grad_grad_x = nullptr;       // of x's shape: tangent of the backward's grad_x
  const void* grad_grad_weight = nullptr;  // (C), accumulation type, or null: 0
  const void* grad_grad_bias = nullptr;    // (C), accumulation type, or null: 0
  bool compute_sums = false;
  // (5, C), sums over a channel of g, g * xhat, v, v * xhat and v * g, where v = grad_grad_x *
  // du/dx.
  void* sums = nullptr;
  void* grad_grad_y = nullptr;  // of x's shape, or null: not wanted
  void* grad_x = nullptr;       // of x's shape, or null: not wanted
  void* grad_weight = nullptr;  // (C), accumulation type, or null: not wanted
};

// running = (1 - momentum) * running + momentum * statistics, the variance made unbiased.
struct UpdateRunningStatistics {
  int64_t c = 0;
  const void* statistics = nullptr;  // (2, C), accumulation type
  DType statistics_dtype = DType::kFloat32;
  void* running_mean = nullptr;  // (C)
  void* running_var = nullptr;   // (C)
  DType running_dtype = DType::kFloat32;
  int64_t* num_batches_tracked = nullptr;  // incremented first, or null
  bool cumulative = false;                 // momentum is 1 / num_batches_tracked
  double momentum = 0;
  double count = 0;
};

namespace cpu {
int64_t scratch_bytes(const BatchNormLeakyReLU&, const CpuThreads&);
void batch_norm_leaky_relu_forward(const BatchNormLeakyReLUForward&, void* scratch,
                                   const CpuThreads&);
void batch_norm_leaky_relu_backward(const BatchNormLeakyReLUBackward&, void* scratch,
                                    const CpuThreads&);
void batch_norm_leaky_relu_double_backward(const BatchNormLeakyReLUDoubleBackward&, void* scratch,
                                           const CpuThreads&);
void update_running_statistics(const UpdateRunningStatistics&, const CpuThreads&);
}  // namespace cpu

namespace cuda {
int64_t scratch_bytes(const BatchNormLeakyReLU&, int device);
const char* batch_norm_leaky_relu_forward(const BatchNormLeakyReLUForward&, void* scratch,
                                          int device, void* stream);
const char* batch_norm_leaky_relu_backward(const BatchNormLeakyReLUBackward&, void* scratch,
                                           int device, void* stream);
const char* batch_norm_leaky_relu_double_backward(const BatchNormLeakyReLUDoubleBackward&,
                                                  void* scratch, int device, void* stream);
const char* update_running_statistics(const UpdateRunningStatistics&, int device, void* stream);
}  // namespace cuda

}  // namespace gankernels
