// The standard deviation within groups of samples, through the second derivative.
//
// Sample n of N is a member of group n % G, so a group has ceil(N / G) members or one less. The
// elements of a sample are divided into F features of P positions each. With k members and
// distances from their mean at a position i,
//
//   d_m = x_m - mean over m of x_m,   sigma_i = sqrt(mean over m of d_m^2 + eps)
//   stddev[g][f] = 1 / P * sum over i of sigma_i
//
// First derivative. d sigma / d x_m = d_m / (k sigma), since the d_m add up to zero; with
// u = grad_stddev[g][f] / (P k) therefore
//
//   grad_x_m = u d_m / sigma
//
// Second derivative. With the tangent t of grad_x, its distances c_m = t_m - mean over m of t_m and
// their product q = sum over m of c_m d_m (equal to that of t_m and d_m, by the same sum),
//
//   L = sum over g, f of u sum over i of q / sigma
//   dL/d grad_stddev[g][f] = 1 / (P k) * sum over i of q / sigma
//   dL/d x_m               = u / sigma * (c_m - q / (k sigma^2) d_m)
//
// where the first term is the derivative of q (c_m) and the second that of 1 / sigma
// (-d_m / (k sigma^3)). Every formula concerns one position of one group, so every pass reads and
// writes each tensor once. If the members are equal, sigma is sqrt(eps) and all derivatives finite.
//
// x is (N, R, F, L): within a sample R rows of F runs of L elements, P = R L. That is any dense
// layout for F = 1, contiguous (R = 1, L = C / F * S) and channels last (R = S, L = C / F). Sums
// and stddev are of the accumulation type: float64 for float64, otherwise float32.
#pragma once

#include "common.h"
#include "mutant.h"

namespace gankernels {

struct MinibatchStddev {
  int64_t n = 0, groups = 0, rows = 0, features = 0, run = 0;  // N, G, R, F, L
  DType dtype = DType::kFloat32;
  double eps = 0;
  const void* x = nullptr;
};

struct MinibatchStddevForward : MinibatchStddev {
  void* stddev = nullptr;  // (G, F)
};

struct MinibatchStddevBackward : MinibatchStddev {
  const void* grad_stddev = nullptr;  // (G, F)
  void* grad_x = nullptr;             // laid out as x
};

struct MinibatchStddevDoubleBackward : MinibatchStddev {
  const void* grad_stddev = nullptr;  // (G, F)
  const void* tangent = nullptr;      // of the backward's grad_x, laid out as x
  void* grad_grad_stddev = nullptr;   // (G, F)
  void* grad_x = nullptr;             // laid out as x
};

// A group has at least one member: G <= N.
GK_HOST_DEVICE static inline int64_t members_of(const MinibatchStddev& p, int64_t group) {
  return p.n / p.groups +
         (GK_MUTANT(stddev_one_group_size, group < p.n % p.groups, group >= 0) ? 1 : 0);
}

namespace cpu {
int64_t scratch_bytes(const MinibatchStddev&, const CpuThreads&);
void minibatch_stddev_forward(const MinibatchStddevForward&, void* scratch, const CpuThreads&);
void minibatch_stddev_backward(const MinibatchStddevBackward&, void* scratch, const CpuThreads&);
void minibatch_stddev_double_backward(const MinibatchStddevDoubleBackward&, void* scratch,
                                      const CpuThreads&);
}  // namespace cpu

namespace cuda {
int64_t scratch_bytes(const MinibatchStddev&, int device);
const char* minibatch_stddev_forward(const MinibatchStddevForward&, void* scratch, int device,
                                     void* stream);
const char* minibatch_stddev_backward(const MinibatchStddevBackward&, void* scratch, int device,
                                      void* stream);
const char* minibatch_stddev_double_backward(const MinibatchStddevDoubleBackward&, void* scratch,
                                             int device, void* stream);
}  // namespace cuda

}  // namespace gankernels
