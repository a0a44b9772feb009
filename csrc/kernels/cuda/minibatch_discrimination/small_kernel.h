// Minibatch discrimination in few dimensions: a thread holds whole rows in registers.
#pragma once

#include <math.h>

#include "../../mutant.h"
#include "../reduce.h"
#include "../vector.h"
#include "pairs.h"

namespace gankernels::cuda::minibatch_discrimination {

constexpr int kSmallThreads = 128, kSmallWarps = kSmallThreads / kWarp;
constexpr int kSmallTile = kSmallThreads;  // rows j; merge_warps() needs one for every thread

// Rows i per thread: two, so that a number read from shared memory is used in four additions.
template <int D>
constexpr int kRowsPerThread = D == 0 ? 2 : 1;

template <int kC, typename A>
__device__ inline void load_row(const A* row, A (&values)[kC]) {
  constexpr int V = kVector<A>;
#pragma unroll
  for (int c = 0; c < kC / V * V; c += V) {
    const auto vector = load<V>(row + c);
#pragma unroll
    for (int j = 0; j < V; ++j) values[c + j] = vector.values[j];
  }
#pragma unroll
  for (int c = kC / V * V; c < kC; ++c) values[c] = row[c];
}

// Adds up the sums of the warps of a block that visited different rows j; the warps that visited
// the first of these rows get the results. `shared` has room for kCount numbers of every thread.
template <int kCount, typename A>
__device__ inline void merge_warps(A (&values)[kCount], int row_warps, A* shared) {
  if (row_warps == kSmallWarps) return;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) shared[k * kSmallThreads + threadIdx.x] = values[k];
  __syncthreads();
  const int step = row_warps * kWarp;
  if (static_cast<int>(threadIdx.x) >= step) return;
  for (int from = threadIdx.x + step; from < GK_MUTANT(discrimination_last_warp, kSmallThreads, 96);
       from += step) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] += shared[k * kSmallThreads + from];
  }
}

// With 0, ptxas fits one more block on a multiprocessor and, in these kernels, spills a few
// registers for it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860 && __CUDA_ARCH__ < 900
constexpr bool kSpillsAt24 = true;
#else
constexpr bool kSpillsAt24 = false;
#endif
template <typename A, int D, int kC>
constexpr int kFewestBlocks =
    D == 0 && (sizeof(A) == 8 ? kC == 4 : kC == 24 && kSpillsAt24) ? 1 : 0;

// Warp w of a block owns the same rows i as warp w + row_warps.
template <typename A, int D, int kC>
__global__ void __launch_bounds__(kSmallThreads, (kFewestBlocks<A, D, kC>))
    small_kernel(const Problem p, const int row_warps) {
  constexpr int I = kRowsPerThread<D>, V = kVector<A>;
  constexpr int kStride = (kC + V - 1) / V * V;
  __shared__ __align__(16) A x_tile[kSmallTile * kStride];
  __shared__ __align__(16) A v_tile[D == 2 ? kSmallTile * kStride : 1];
  __shared__ A g_tile[kSmallTile];
  const auto stage_tile = [&](A* tile, const void* tensor, const int64_t (&strides)[3], int row,
                              int64_t b) {
    stage<kSmallThreads, kSmallTile, kC, kStride, 1>(tile, p, tensor, strides, row, b, 0);
  };

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int j_warp = warp / row_warps, j_warps = kSmallWarps / row_warps;
  const unsigned int tiles = (p.n - 1) / (kWarp * I * row_warps) + 1;
  const int64_t b = blockIdx.x / tiles;
  const int first_row =
      (static_cast<int>(blockIdx.x % tiles) * row_warps + warp % row_warps) * kWarp * I + lane;

  A x[I][kC], v[D == 2 ? kC : 1], g = 0;
  A sums[I] = {}, grads[D > 0 ? kC : 1] = {};
  const auto load_own = [&](A* values, const void* tensor, const int64_t (&strides)[3], int row) {
    with_type_in<A>(p.dtype, [&](auto type) {
      const auto* from = static_cast<const typename decltype(type)::type*>(tensor);
      from += row * strides[0] + b * strides[1];
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const bool inside = row < p.n && c < p.c;
        values[c] = inside ? static_cast<A>(accumulator(from[c * strides[2]])) : A(0);
      }
    });
  };
#pragma unroll
  for (int i = 0; i < I; ++i) load_own(x[i], p.m, p.m_strides, first_row + i * kWarp);
  if (D == 2) load_own(v, p.v, p.v_strides, first_row);
  if (D > 0) g = gradient_of_output<A>(p, first_row, b);

  for (int first = 0; first < p.n; first += kSmallTile) {
    // The previous tile has been read.
    GK_MUTANT(discrimination_barrier_before_staging, __syncthreads(), void());
    stage_tile(x_tile, p.m, p.m_strides, first, b);
    if (D == 2) stage_tile(v_tile, p.v, p.v_strides, first, b);
    if (D > 0) {
      g_tile[threadIdx.x] = gradient_of_output<A>(p, first + static_cast<int>(threadIdx.x), b);
    }
    GK_MUTANT(discrimination_barrier_after_staging, __syncthreads(), void());
    const int count = min(kSmallTile, p.n - first), own = first_row - first;
    A tile_sums[I] = {};  // separate, which keeps the rounding errors of long sums small
#pragma unroll D == 0 && sizeof(A) == 4 ? 2 : 1
    for (int j = j_warp; j < count; j += j_warps) {
      A other[kC];
      load_row(x_tile + j * kStride, other);
      A distance[I] = {}, difference[kC];
#pragma unroll
      for (int c = 0; c < kC; ++c) {
#pragma unroll
        for (int i = 0; i < I; ++i) {
          difference[c] = x[i][c] - other[c];
          const A absolute = fabs(difference[c]);
          distance[i] = c == 0 ? absolute : distance[i] + absolute;
        }
      }
      A s = 0;
      if (D == 2) {
        load_row(v_tile + j * kStride, other);
#pragma unroll
        for (int c = 0; c < kC; ++c) {
          // The sign is used twice, and there are too few predicates to keep.
          difference[c] = difference[c] != 0 ? copysign(A(1), difference[c]) : A(0);
          s += difference[c] * (v[D == 2 ? c : 0] - other[c]);
        }
      }
      A weight = 0;
#pragma unroll
      for (int i = 0; i < I; ++i) {
        A e = exp_of_minus(distance[i]);
        const bool itself = j == GK_MUTANT(discrimination_itself, own, -1 - own) + i * kWarp;
        if (itself) e = 0;
        weight = weigh<D>(e, s, D > 0 ? g + g_tile[j] : A(0), tile_sums[i]);
      }
      if (D == 1) {
#pragma unroll
        for (int c = 0; c < kC; ++c) add_with_sign_of(difference[c], weight, grads[D > 0 ? c : 0]);
      }
      if (D == 2 && p.grads != nullptr) {
#pragma unroll
        for (int c = 0; c < kC; ++c) grads[D > 0 ? c : 0] += difference[c] * weight;
      }
    }
#pragma unroll
    for (int i = 0; i < I; ++i) sums[i] += tile_sums[i];
  }

  if (D != 1) merge_warps(sums, row_warps, I == 1 ? g_tile : x_tile);
  if (D > 0) merge_warps(grads, row_warps, x_tile);
  if (j_warp != 0) return;
#pragma unroll
  for (int i = 0; i < I; ++i) {
    const int64_t row = first_row + i * kWarp;
    if (row >= p.n) return;
    if (D != 1) store_as(static_cast<double>(sums[i]), p.sums, p.dtype, row * p.b + b);
    if (D > 0 && p.grads != nullptr) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const double grad = static_cast<double>(grads[D > 0 ? c : 0]);
        if (c < p.c) store_as(grad, p.grads, p.dtype, (row * p.b + b) * p.c + c);
      }
    }
  }
}

}  // namespace gankernels::cuda::minibatch_discrimination
