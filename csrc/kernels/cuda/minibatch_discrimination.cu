// CUDA kernels of minibatch_discrimination: forward, backward, double backward.
//
// Every pass is one launch. The kernels b are independent problems of N rows of C numbers each. A
// block owns some rows i of one of them and visits all rows j, a tile in shared memory at a time.
// Nothing of N x N elements is stored, and no two threads ever add to the same sum. Therefore every
// pair is computed twice, as (i, j) and as (j, i): using the symmetry would save arithmetic, but
// need sums for j, and without atomics, whose order is not fixed, a buffer of N sums for every
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

#include <algorithm>

#include "../minibatch_discrimination.h"
#include "launch.h"
#include "minibatch_discrimination/large_kernel.h"
#include "minibatch_discrimination/small_kernel.h"
#include "reduce.h"

namespace gankernels::cuda {

// A separate namespace, since other files use the same names for other classes.
namespace minibatch_discrimination {

// With fewer blocks, the warps of a block divide the rows j among themselves.
constexpr int64_t kBlocksPerMultiprocessor = 4;

template <typename A>
constexpr int kLargestSmallC = sizeof(A) == 4 ? 32 : 16;

int64_t largest_small_c(DType dtype) {
  return dtype == DType::kFloat64 ? kLargestSmallC<double> : kLargestSmallC<float>;
}

// The number of blocks that each own `rows` rows of one of the kernels b; 0 if there are too many.
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
