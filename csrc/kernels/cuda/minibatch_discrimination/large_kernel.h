// Minibatch discrimination in any number of dimensions, which are processed in chunks.
#pragma once

#include <math.h>

#include "../../mutant.h"
#include "../reduce.h"
#include "../vector.h"
#include "pairs.h"

namespace gankernels::cuda::minibatch_discrimination {

constexpr int kLargeThreads = 256;
constexpr int kChunk = 16;  // dimensions; also neighboring threads over rows j, or dimensions

// Dimensions at a time. On Blackwell the double backward spills with four, but not with all.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <int D>
constexpr int kUnroll = D == 2 ? kChunk : 4;
#else
template <int D>
constexpr int kUnroll = 4;
#endif

// __launch_bounds__: without the 2, the derivatives spill at 48 registers.
template <typename A, int D>
__global__ void __launch_bounds__(kLargeThreads, 2) large_kernel(const Problem p) {
  constexpr int V = kVector<A>;  // rows per thread, on both sides
  constexpr int kRows = V * (kLargeThreads / kChunk);
  constexpr int kStride = kRows + V;  // spreads the rows of a dimension over the banks
  // Chunks are stored as [dimension][row], weights as [j][i].
  __shared__ __align__(16) A x_i[kChunk * kStride], x_j[kChunk * kStride];
  __shared__ __align__(16) A v_i[D == 2 ? kChunk * kStride : 1], v_j[D == 2 ? kChunk * kStride : 1];
  __shared__ __align__(16) A weights[D > 0 ? kRows * kStride : 1];
  const auto stage_chunk = [&](A* chunk, const void* tensor, const int64_t (&strides)[3], int row,
                               int64_t b, int c) {
    stage<kLargeThreads, kRows, kChunk, 1, kStride>(chunk, p, tensor, strides, row, b, c);
  };

  const unsigned int tiles = (p.n - 1) / kRows + 1;
  const int64_t b = blockIdx.x / tiles;
  const int first_i = static_cast<int>(blockIdx.x % tiles) * kRows;
  const int across = threadIdx.x % kChunk, i0 = threadIdx.x / kChunk * V, j0 = across * V;

  A g[V], sums[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    g[i] = D > 0 ? gradient_of_output<A>(p, static_cast<int64_t>(first_i) + i0 + i, b) : A(0);
  }
  for (int64_t first = 0; first < p.n; first += kRows) {
    const int first_j = static_cast<int>(first);
    A distance[V][V] = {}, s[V][V] = {};
    for (int c0 = 0; c0 < p.c; c0 += kChunk) {
      __syncthreads();  // the previous chunk and the weights have been read
      stage_chunk(x_i, p.m, p.m_strides, first_i, b, c0);
      stage_chunk(x_j, p.m, p.m_strides, first_j, b, c0);
      if (D == 2) {
        stage_chunk(v_i, p.v, p.v_strides, first_i, b, c0);
        stage_chunk(v_j, p.v, p.v_strides, first_j, b, c0);
      }
      __syncthreads();
#pragma unroll kUnroll < D>
      for (int c = 0; c < kChunk; ++c) {
        const auto a = load<V>(x_i + c * kStride + i0), o = load<V>(x_j + c * kStride + j0);
        Vector<A, V> of_a = {}, of_o = {};
        if (D == 2) {
          of_a = load<V>(v_i + c * kStride + i0);
          of_o = load<V>(v_j + c * kStride + j0);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const A difference = a.values[i] - o.values[j];
            distance[i][j] += fabs(difference);
            if (D == 2) add_with_sign_of(difference, of_a.values[i] - of_o.values[j], s[i][j]);
          }
        }
      }
    }

    A tile_sums[V] = {};
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int64_t row_j = first + j0 + j;
      const A g_j = D > 0 ? gradient_of_output<A>(p, row_j, b) : A(0);
      Vector<A, V> weight;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const bool visited =
            GK_MUTANT(discrimination_padding, row_j < p.n, true) && row_j != first_i + i0 + i;
        const A e = visited ? exp_of_minus(distance[i][j]) : A(0);
        weight.values[i] = weigh<D>(e, s[i][j], g[i] + g_j, tile_sums[i]);
      }
      if (D > 0)
        GK_MUTANT(discrimination_global_weights, (store_shared<V, A>), (store<V, A>))(
            weights + (D > 0 ? (j0 + j) * kStride + i0 : 0), weight);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] += tile_sums[i];
    const bool last = first + kRows >= p.n;
    for (int c0 = 0; D > 0 && p.grads != nullptr && c0 < p.c; c0 += kChunk) {
      // The weights are written, the previous chunk has been read.
      GK_MUTANT(discrimination_barrier_after_weights, __syncthreads(), void());
      stage_chunk(x_i, p.m, p.m_strides, first_i, b, c0);
      stage_chunk(x_j, p.m, p.m_strides, first_j, b, c0);
      __syncthreads();
      const auto a = load<V>(x_i + across * kStride + i0);
      A grads[V] = {};
      for (int j = 0; j < kRows; j += V) {
        const auto o = load<V>(x_j + across * kStride + j);
#pragma unroll
        for (int jj = 0; jj < V; ++jj) {
          const auto weight = load<V>(weights + (D > 0 ? (j + jj) * kStride + i0 : 0));
#pragma unroll
          for (int i = 0; i < V; ++i) {
            add_with_sign_of(a.values[i] - o.values[jj], weight.values[i], grads[i]);
          }
        }
      }
      const int c = c0 + across;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int64_t row = static_cast<int64_t>(first_i) + i0 + i;
        if (row >= p.n || c >= p.c) continue;
        const int64_t at = (row * p.b + b) * p.c + c;
        A* const so_far = static_cast<A*>(p.accumulated) + at;
        const A grad =
            GK_MUTANT(discrimination_last_tile, first == 0, true) ? grads[i] : *so_far + grads[i];
        if (last) {
          store_as(static_cast<double>(grad), p.grads, p.dtype, at);
        } else {
          *so_far = grad;
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; D != 1 && i < V; ++i) {
#pragma unroll
    for (int lanes = kChunk / 2; lanes > 0; lanes /= 2) {
      sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], lanes);
    }
    const int64_t row = static_cast<int64_t>(first_i) + i0 + i;
    if (across == 0 && row < p.n) {
      store_as(static_cast<double>(sums[i]), p.sums, p.dtype, row * p.b + b);
    }
  }
}

}  // namespace gankernels::cuda::minibatch_discrimination
