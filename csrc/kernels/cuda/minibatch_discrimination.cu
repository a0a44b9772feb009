// CUDA kernels of minibatch_discrimination: forward, backward, double backward.
//
// Every pass is one launch. The kernels b are independent problems of N rows of C numbers each. A
// block owns some rows i of one of them and visits all rows j, a tile in shared memory at a time.
// Nothing of N x N elements exists, and no two threads ever add to the same sum. That is also why
// every pair is computed twice, as (i, j) and as (j, i): using the symmetry would save arithmetic,
// but need sums for j, and without atomics, whose order is not fixed, a buffer of N sums for every
// block.
//
//   small_kernel   C <= 32 (float64: 16): a thread holds whole rows i in registers, and the lanes
//                  of a warp read the same row j, a broadcast. C is padded to one of a few sizes.
//   large_kernel   any C: a thread holds the distances of 4 x 4 pairs (float64: 2 x 2), and C is
//                  processed in chunks. The derivatives write a tile's weights to shared memory and
//                  process the chunks a second time, to sign and sum the weights.
//
// The inner loop is two additions per pair and dimension, d = x_i - x_j and sum += |d|, where |.|
// is a modifier of the addition. The derivatives also sign and add a weight.

#include <math.h>

#include <algorithm>
#include <type_traits>

#include "../minibatch_discrimination.h"
#include "../mutant.h"
#include "launch.h"
#include "reduce.h"
#include "vector.h"

namespace gankernels::cuda {

// A namespace of its own, since other files use the same names for other classes.
namespace minibatch_discrimination {

constexpr int kSmallThreads = 128, kSmallWarps = kSmallThreads / kWarp;
constexpr int kSmallTile = kSmallThreads;  // rows j; merge_warps() needs one for every thread
constexpr int kLargeThreads = 256;
constexpr int kChunk = 16;  // dimensions; also neighboring threads over rows j, or dimensions
// With fewer, the warps of a block divide the rows j among themselves instead of owning more rows
// i.
constexpr int64_t kBlocksPerMultiprocessor = 4;

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

// exp(-d). Where the result would be subnormal it is zero, as it is on the CPU.
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

// Of kernel b of an (N, B, C) tensor: rows from `row` and dimensions from `c` on.
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

// ---- small C ---------------------------------------------------------------------------------

// Rows i of a thread: two, so that a number read from shared memory is used in four additions.
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

// Adds up the sums of the warps of a block that visited different rows j, in the warps that visited
// the first of them. `shared` has room for kCount numbers of every thread.
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

// With 0, ptxas makes room for one more block on a multiprocessor and, in these kernels, spills a
// few registers for it.
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

// ---- large C ---------------------------------------------------------------------------------

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
  constexpr int V = kVector<A>;  // rows of a thread, on both sides
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

// ---- launches --------------------------------------------------------------------------------

template <typename A>
constexpr int kLargestSmallC = sizeof(A) == 4 ? 32 : 16;

int64_t largest_small_c(DType dtype) {
  return dtype == DType::kFloat64 ? kLargestSmallC<double> : kLargestSmallC<float>;
}

// The number of blocks that own `rows` rows of one of the kernels b each; 0 if there are too many.
unsigned int blocks_of(const Problem& p, int64_t rows) {
  const int64_t tiles = (p.n - 1) / rows + 1;
  const int64_t most = 0x7fffffff;
  return p.b > most / tiles ? 0 : static_cast<unsigned int>(p.b * tiles);
}

template <typename Kernel, typename... Arguments>
const char* launch_blocks(Kernel kernel, unsigned int blocks, int threads, cudaStream_t stream,
                          const Arguments&... arguments) {
  if (blocks == 0) return "minibatch_discrimination: more than 2^31 blocks";
  return launch(kernel, dim3(blocks), dim3(threads), 0, stream, arguments...);
}

template <typename A, int D, int kC>
const char* run_small(const Problem& p, int device, cudaStream_t stream) {
  constexpr int64_t kRows = kWarp * kRowsPerThread<D>;  // of a warp
  const int64_t enough = multiprocessors(device) * kBlocksPerMultiprocessor;
  int row_warps = kSmallWarps;
  while (row_warps > 1 &&
         (kRows * row_warps / 2 >= p.n || (p.n - 1) / (kRows * row_warps) + 1 < enough / p.b)) {
    row_warps /= 2;
  }
  return launch_blocks(small_kernel<A, D, kC>, blocks_of(p, kRows * row_warps), kSmallThreads,
                       stream, p, row_warps);
}

// Runs the smallest of the sizes that C fits into.
template <typename A, int D, int kC, int... kLarger>
const char* run_smallest(const Problem& p, int device, cudaStream_t stream) {
  if (p.c <= kC) return run_small<A, D, kC>(p, device, stream);
  if constexpr (sizeof...(kLarger) > 0) {
    return run_smallest<A, D, kLarger...>(p, device, stream);
  } else {
    constexpr int kRows = kVector<A> * (kLargeThreads / kChunk);
    return launch_blocks(large_kernel<A, D>, blocks_of(p, kRows), kLargeThreads, stream, p);
  }
}

template <int D>
const char* run(const MinibatchDiscrimination& parameters, Problem p, void* scratch, int device,
                void* stream_pointer) {
  if (parameters.n == 0 || parameters.b == 0) return nullptr;
  if (parameters.n > (1 << 30) || parameters.c > (1 << 30)) {
    return "minibatch_discrimination: more than 2^30 samples or dimensions of a kernel";
  }
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  p.n = static_cast<int>(parameters.n);
  p.b = parameters.b;
  p.c = static_cast<int>(parameters.c);
  p.dtype = parameters.dtype;
  p.m = parameters.m;
  std::copy_n(parameters.m_strides, 3, p.m_strides);
  const bool half = size_of(p.dtype) == 2;
  p.accumulated = half ? scratch : p.grads;
  if (p.dtype == DType::kFloat64) {
    return run_smallest<double, D, 4, 8, kLargestSmallC<double>>(p, device, stream);
  }
  return run_smallest<float, D, 2, 4, 5, 8, 12, 16, 24, kLargestSmallC<float>>(p, device, stream);
}

}  // namespace minibatch_discrimination

using namespace minibatch_discrimination;

// large_kernel adds to grad_m tile by tile; for half precision, to a float32 copy of it.
int64_t scratch_bytes(const MinibatchDiscrimination& p, int) {
  const bool needed = p.derivative > 0 && size_of(p.dtype) == 2 && p.c > largest_small_c(p.dtype);
  return needed ? p.n * p.b * p.c * static_cast<int64_t>(sizeof(float)) : 0;
}

const char* minibatch_discrimination_forward(const MinibatchDiscriminationForward& parameters,
                                             void* scratch, int device, void* stream) {
  Problem p = {};
  p.sums = parameters.o;
  return run<0>(parameters, p, scratch, device, stream);
}

const char* minibatch_discrimination_backward(const MinibatchDiscriminationBackward& parameters,
                                              void* scratch, int device, void* stream) {
  Problem p = {};
  p.g = parameters.grad_o;
  std::copy_n(parameters.grad_o_strides, 2, p.g_strides);
  p.grads = parameters.grad_m;
  return run<1>(parameters, p, scratch, device, stream);
}

const char* minibatch_discrimination_double_backward(
    const MinibatchDiscriminationDoubleBackward& parameters, void* scratch, int device,
    void* stream) {
  Problem p = {};
  p.g = parameters.grad_o;
  std::copy_n(parameters.grad_o_strides, 2, p.g_strides);
  p.v = parameters.grad_grad_m;
  std::copy_n(parameters.grad_grad_m_strides, 3, p.v_strides);
  p.sums = parameters.grad_grad_o;
  p.grads = parameters.grad_m;
  return run<2>(parameters, p, scratch, device, stream);
}

}  // namespace gankernels::cuda
