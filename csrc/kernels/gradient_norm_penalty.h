// The penalty on the norms of a batch of gradients, through the second derivative.
//
//   penalty = mean over n of phi(s_n),   s_n = sum over i of grad[n][i]^2
//   kTwoSided:  phi = (sqrt(s) - center)^2          wgan-gp, dragan
//   kOneSided:  phi = max(0, sqrt(s) - center)^2    wgan-lp
//   kSquared:   phi = s                             r1, r2
//
// grad is (N, D). Each sample is dense, with its elements in any order. Sums and values per sample
// are of the accumulation type: float64 for float64, otherwise float32.
#pragma once

#include "common.h"

namespace gankernels {

enum class Penalty : int32_t { kTwoSided, kOneSided, kSquared };

struct GradientNormPenalty {
  int64_t n = 0, d = 0;
  DType dtype = DType::kFloat32;
  Penalty kind = Penalty::kTwoSided;
  double center = 1;
  const void* grad = nullptr;     // (N, D)
  void* squared_norms = nullptr;  // (N): written by forward, read by the others
};

struct GradientNormPenaltyForward : GradientNormPenalty {
  void* penalty = nullptr;  // (1)
};

struct GradientNormPenaltyBackward : GradientNormPenalty {
  const void* grad_penalty = nullptr;  // (1)
  void* grad_grad = nullptr;           // (N, D), laid out as grad
};

struct GradientNormPenaltyDoubleBackward : GradientNormPenalty {
  const void* grad_penalty = nullptr;  // (1)
  const void* tangent = nullptr;       // (N, D), of the backward's grad_grad
  void* grad_grad_penalty = nullptr;   // (1)
  void* grad_grad = nullptr;           // (N, D): with respect to the backward's grad
};

// phi and its first two derivatives with respect to s.
template <typename A>
struct PenaltyValue {
  A value, first, second;
};

// A norm of zero has no direction. Its derivatives are defined as zero, so that a critic that is
// flat somewhere does not get NaN in all its parameters.
template <typename A>
GK_HOST_DEVICE static inline PenaltyValue<A> penalty_of(A s, A norm, A center, Penalty kind) {
  if (kind == Penalty::kSquared) return {s, A(1), A(0)};
  const A excess = norm - center;
  if (kind == Penalty::kOneSided && excess <= 0) return {A(0), A(0), A(0)};
  if (norm == 0) return {excess * excess, A(0), A(0)};
  return {excess * excess, excess / norm, center / (2 * norm * s)};
}

namespace cpu {
int64_t scratch_bytes(const GradientNormPenalty&, const CpuThreads&);
void gradient_norm_penalty_forward(const GradientNormPenaltyForward&, void* scratch,
                                   const CpuThreads&);
void gradient_norm_penalty_backward(const GradientNormPenaltyBackward&, void* scratch,
                                    const CpuThreads&);
void gradient_norm_penalty_double_backward(const GradientNormPenaltyDoubleBackward&, void* scratch,
                                           const CpuThreads&);
}  // namespace cpu

namespace cuda {
int64_t scratch_bytes(const GradientNormPenalty&, int device);
const char* gradient_norm_penalty_forward(const GradientNormPenaltyForward&, void* scratch,
                                          int device, void* stream);
const char* gradient_norm_penalty_backward(const GradientNormPenaltyBackward&, void* scratch,
                                           int device, void* stream);
const char* gradient_norm_penalty_double_backward(const GradientNormPenaltyDoubleBackward&,
                                                  void* scratch, int device, void* stream);
}  // namespace cuda

}  // namespace gankernels
