// A step of Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980) on many tensors at once.
//
//   m = beta1 m + (1 - beta1) g
//   v = beta2 v + (1 - beta2) g^2
//   parameter -= lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
//
// with g the gradient plus weight_decay times the parameter. Compared with PyTorch's: gradients may
// be of half precision while parameters and moments are float32, and the same pass writes a copy of
// the parameters in half precision, so that neither needs a separate conversion.
#pragma once

#include "common.h"

namespace gankernels {

// All tensors are dense and in the same order as the parameter.
struct AdamTensor {
  int64_t size = 0;
  int64_t step = 0;  // the number of this step, from 1
  DType gradient_dtype = DType::kFloat32;
  float* parameter = nullptr;
  const void* gradient = nullptr;
  float* exp_avg = nullptr;     // m
  float* exp_avg_sq = nullptr;  // v
  void* cast = nullptr;         // bfloat16, or null
};

struct Adam {
  int64_t count = 0;
  const AdamTensor* tensors = nullptr;
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
};

namespace cpu {
void adam(const Adam&, const CpuThreads&);
}  // namespace cpu

}  // namespace gankernels
