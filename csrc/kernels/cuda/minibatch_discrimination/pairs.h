// The parameters of minibatch_discrimination's kernels, the terms of a pair of rows, and the copy
// of rows to shared memory.
#pragma once

#include <math.h>

#include <cstring>
#include <type_traits>

#include "../../minibatch_discrimination.h"
#include "../../mutant.h"
#include "../vector.h"

namespace gankernels::cuda::minibatch_discrimination {

// The parameters of all passes in one type. Pointers that a pass does not need are null.
struct Problem {
  int n, c;
  int64_t b;
  DType dtype;
  const void *m, *v, *g;  // (N, B, C), its tangent, (N, B)
  int64_t m_strides[3], v_strides[3], g_strides[2];
  void* sums;         // (N, B): o, or grad_grad_o
  void* grads;        // (N, B, C): grad_m
  void* accumulated;  // the same in the accumulation type, from tile to tile, in large_kernel
};

template <typename A>
constexpr int kVector = 16 / sizeof(A);

// exp(-d). If the result would be subnormal it is zero, as on the CPU.
__device__ inline float exp_of_minus(float d) {
  // The error of this rounding is no larger than that of one of the additions that made d.
  const float exponent = d * -1.44269504f;
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(exponent));
  return e;
#else
  return exponent < -126 ? 0.0f : exp2f(exponent);
#endif
}
__device__ inline double exp_of_minus(double d) { return exp(-d); }

// Adds w if d > 0, -w if d < 0 and nothing if d = 0, by flipping w's sign bit.
template <typename A>
__device__ inline void add_with_sign_of(A d, A w, A& sum) {
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  constexpr Bits kSign = Bits{1} << (8 * sizeof(A) - 1);
  Bits of_d, of_w;
  memcpy(&of_d, &d, sizeof(A));
  memcpy(&of_w, &w, sizeof(A));
  of_w ^= of_d & kSign;
  memcpy(&w, &of_w, sizeof(A));
  if (GK_MUTANT(discrimination_ties, d != 0, true)) sum += w;
}

// Returns the weight of a pair's signs in grad_m, and adds the pair to the sum of row i.
template <int D, typename A>
__device__ inline A weigh(A e, A s, A g, A& sum) {
  if (D == 0) sum += e;
  if (D == 2) sum -= e * s;
  return D == 1 ? -e * g : e * g * s;
}

template <typename A>
__device__ inline A gradient_of_output(const Problem& p, int64_t row, int64_t b) {
  return row < p.n ? load_as<A>(p.g, p.dtype, row * p.g_strides[0] + b * p.g_strides[1]) : A(0);
}

// Copies `rows` x `columns` numbers from global to shared memory, and zeros up to kRows x kColumns.
// A thread keeps to one column, so that it divides once and then only steps from row to row.
template <int kThreads, int kRows, int kColumns, int kRowStride, int kColumnStride, typename A,
          typename T>
__device__ inline void stage_as(A* tile, const T* from, int64_t row_stride, int64_t column_stride,
                                int rows, int columns) {
  constexpr int kStep = kThreads / kColumns;  // rows at a time; threads beyond them are idle
  constexpr int kEach = (kRows + kStep - 1) / kStep;
  constexpr int kBatch = kEach < 4 ? kEach : 4;  // loads issued before the first result is needed
  const int first = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  if (first >= kStep) return;
  const int valid = column < columns ? rows : 0;
  from += first * row_stride + column * column_stride;
  tile += column * kColumnStride;
  const int64_t step = kStep * row_stride;
  for (int row = first; row < kRows; row += kBatch * kStep) {
    A values[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const bool inside = row + u * kStep < valid;
      values[u] = inside ? static_cast<A>(accumulator(*from)) : A(0);
      from += step;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (row + u * kStep < kRows) tile[(row + u * kStep) * kRowStride] = values[u];
    }
  }
}

// Copies from kernel b of an (N, B, C) tensor: rows from `row` and dimensions from `c` on.
template <int kThreads, int kRows, int kColumns, int kRowStride, int kColumnStride, typename A>
__device__ inline void stage(A* tile, const Problem& p, const void* tensor,
                             const int64_t (&strides)[3], int row, int64_t b, int c) {
  const int64_t offset = row * strides[0] + b * strides[1] + c * strides[2];
  with_type_in<A>(p.dtype, [&](auto type) {
    const auto* const from = static_cast<const typename decltype(type)::type*>(tensor);
    stage_as<kThreads, kRows, kColumns, kRowStride, kColumnStride>(tile, from + offset, strides[0],
                                                                   strides[2], p.n - row, p.c - c);
  });
}

}  // namespace gankernels::cuda::minibatch_discrimination
