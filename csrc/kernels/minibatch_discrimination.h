// Minibatch discrimination (Salimans et al., 2016), through the second derivative.
//
//   o[n,b] = sum over j != n of e_nj[b],   e_nj[b] = exp(-sum over c of |m[n,b,c] - m[j,b,c]|)
//
// With sign(0) = 0, and with everything per kernel b:
//
//   backward, by g = grad_o:
//     grad_m[n,c] = sum over j of -e_nj (g_n + g_j) sign(m[n,c] - m[j,c])
//   double backward, by the tangent v = grad_grad_m of grad_m: the sum over n and c of v * grad_m
//   is the sum over pairs i < j of -e_ij (g_i + g_j) s_ij, with s_ij = sum over c of sign(m[i,c] -
//   m[j,c]) (v[i,c] - v[j,c]). The sign has no derivative, so only e_ij depends on m, and
//     grad_grad_o[n] = sum over j of -e_nj s_nj
//     grad_m[n,c]    = sum over j of e_nj (g_n + g_j) s_nj sign(m[n,c] - m[j,c])
//
// The derivatives recompute e_ij, once for every pair i < j. All tensors have m's dtype. Inputs
// have any strides, outputs are contiguous.
#pragma once

#include "common.h"

namespace gankernels {

struct MinibatchDiscrimination {
  int64_t n = 0, b = 0, c = 0;    // samples, kernels, dimensions of a kernel
  DType dtype = DType::kFloat32;  // of all tensors
  const void* m = nullptr;        // (N, B, C)
  int64_t m_strides[3] = {};      // in elements, as all strides
  const int derivative;           // 0: forward, 1: backward, 2: double backward

 protected:
  explicit MinibatchDiscrimination(int order) : derivative(order) {}
};

struct MinibatchDiscriminationForward : MinibatchDiscrimination {
  void* o = nullptr;  // (N, B)
  MinibatchDiscriminationForward() : MinibatchDiscrimination(0) {}
};

struct MinibatchDiscriminationBackward : MinibatchDiscrimination {
  const void* grad_o = nullptr;  // (N, B)
  int64_t grad_o_strides[2] = {};
  void* grad_m = nullptr;  // (N, B, C)
  MinibatchDiscriminationBackward() : MinibatchDiscrimination(1) {}
};

struct MinibatchDiscriminationDoubleBackward : MinibatchDiscrimination {
  const void* grad_o = nullptr;  // (N, B)
  int64_t grad_o_strides[2] = {};
  const void* grad_grad_m = nullptr;  // (N, B, C): tangent of the backward's grad_m
  int64_t grad_grad_m_strides[3] = {};
  void* grad_grad_o = nullptr;  // (N, B)
  void* grad_m = nullptr;       // (N, B, C), or null: not wanted
  MinibatchDiscriminationDoubleBackward() : MinibatchDiscrimination(2) {}
};

namespace cpu {
int64_t scratch_bytes(const MinibatchDiscrimination&, const CpuThreads&);
void minibatch_discrimination_forward(const MinibatchDiscriminationForward&, void* scratch,
                                      const CpuThreads&);
void minibatch_discrimination_backward(const MinibatchDiscriminationBackward&, void* scratch,
                                       const CpuThreads&);
void minibatch_discrimination_double_backward(const MinibatchDiscriminationDoubleBackward&,
                                              void* scratch, const CpuThreads&);
}  // namespace cpu

namespace cuda {
int64_t scratch_bytes(const MinibatchDiscrimination&, int device);
const char* minibatch_discrimination_forward(const MinibatchDiscriminationForward&, void* scratch,
                                             int device, void* stream);
const char* minibatch_discrimination_backward(const MinibatchDiscriminationBackward&, void* scratch,
                                              int device, void* stream);
const char* minibatch_discrimination_double_backward(const MinibatchDiscriminationDoubleBackward&,
                                                     void* scratch, int device, void* stream);
}  // namespace cuda

}  // namespace gankernels
