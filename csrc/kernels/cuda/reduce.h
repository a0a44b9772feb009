// Reductions with a fixed order, so that results are the same bit for bit in every run.
#pragma once

#include <cuda_runtime.h>

#include "../mutant.h"

namespace gankernels::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// K numbers that are reduced together.
template <typename A, int K>
struct Sums {
  A value[K];
};

struct Add {
  template <typename A, int K>
  __device__ static Sums<A, K> merge(const Sums<A, K>& a, const Sums<A, K>& b) {
    Sums<A, K> sum;
#pragma unroll
    for (int k = 0; k < K; ++k) sum.value[k] = a.value[k] + b.value[k];
    return sum;
  }
};

template <typename A, int K>
__device__ inline Sums<A, K> shuffle_down(const Sums<A, K>& sums, int lanes) {
  Sums<A, K> other;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    other.value[k] = __shfl_down_sync(GK_MUTANT(reduce_shuffle_mask, kWholeWarp, 0x7fffffffu),
                                      sums.value[k], lanes);
  }
  return other;
}

// Merges over all threads of a block whose index is the same modulo `columns`, a power of two up to
// the warp's size; each of them gets the result. The block is whole warps, all of which take part.
// Every thread has kLanes independent sums, and `shared` has room for columns * kLanes of them per
// warp. It must not be reused until the block has passed one more barrier.
template <typename Op, typename A, int K, int kLanes, int kShared>
__device__ inline void block_reduce(Sums<A, K> (&sums)[kLanes], int columns,
                                    Sums<A, K> (&shared)[kShared]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  for (int lanes = GK_MUTANT(reduce_half_warp, kWarp / 2, kWarp / 4); lanes >= columns;
       lanes /= 2) {
    GK_MUTANT_ADDS(reduce_shuffle_in_a_branch, if (lane >= lanes) continue);
#pragma unroll
    for (int l = 0; l < kLanes; ++l) sums[l] = Op::merge(sums[l], shuffle_down(sums[l], lanes));
  }
  const int width = columns * kLanes;
  if (lane < columns) {
#pragma unroll
    for (int l = 0; l < kLanes; ++l) shared[warp * width + lane * kLanes + l] = sums[l];
    GK_MUTANT_ADDS(reduce_barrier_in_a_branch, __syncthreads());
  }
  GK_MUTANT(reduce_barrier_before_merge, __syncthreads(), void());
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    Sums<A, K> total = shared[i];
    for (int w = 1; w < warps; ++w) total = Op::merge(total, shared[w * width + i]);
    shared[i] = total;
  }
  GK_MUTANT(reduce_barrier_before_result, __syncthreads(), void());
#pragma unroll
  for (int l = 0; l < kLanes; ++l) sums[l] = shared[lane % columns * kLanes + l];
}

}  // namespace gankernels::cuda
