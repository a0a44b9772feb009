// CUDA kernels of batch_norm_leaky_relu: forward, backward, double backward, running statistics.
//
// One kernel template serves all three passes and both memory layouts. A pass first reduces over
// each channel, then writes its elementwise results:
//
//   kReduceAndApply   one launch; a block owns whole channels. For channels of little data.
//   kReduce, kApply   two launches; a channel's data is divided among `parts` blocks. The first
//                     launch writes each part's sums to `partials`; in the second every block
//                     merges those of its own channels, always in the same order.
//
// Bytes moved by two launches, in sizes of x, and the floor for tensors that do not fit on the chip
// (if one does, the second read comes from a cache, or from L1 in kReduceAndApply):
//
//                     kReduce reads   kApply reads + writes    sum   floor if read once
//   forward           x               x + y                     3     2
//   backward          x, gy           x, gy + gx                5     3
//   double backward   x, gy, ggx      x, gy, ggx + ggy, gx      8     5
//
// Without a reduction (evaluation, or statistics and sums given) kApply alone runs: the floor.

//
// norm_leaky_relu/walk.h determines the elements that a thread visits, passes.h the arithmetic.
// kernel.h combines the two to a kernel, and schedule.h chooses the number of blocks.

#include <algorithm>

#include "../batch_norm_leaky_relu.h"
#include "../mutant.h"
#include "launch.h"
#include "norm_leaky_relu/kernel.h"
#include "norm_leaky_relu/passes.h"
#include "norm_leaky_relu/schedule.h"
#include "reduce.h"
#include "vector.h"

namespace gankernels::cuda {

// A separate namespace, since other files use the same names for other classes.
namespace batch_norm_leaky_relu {

template <template <typename> class Pass>
const char* run_pass(const typename Pass<float>::Params& p, void* scratch, int device,
                     void* stream_pointer) {
  if (p.c == 0 || !Pass<float>::has_result(p)) return nullptr;
  if (p.c > (int64_t{1} << 30)) return "batch_norm_leaky_relu: more than 2^30 channels";
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  return with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return run_widest<Pass<Accumulate<T>>, T>(p, scratch, device, stream);
  });
}

__global__ void update_running_statistics_kernel(const UpdateRunningStatistics p) {
  const int64_t tracked = p.num_batches_tracked ? *p.num_batches_tracked + 1 : 0;
  const double momentum =
      p.cumulative && tracked > 0 ? 1.0 / static_cast<double>(tracked) : p.momentum;
  const double unbias = p.count / (p.count - 1);
  for (int64_t c = threadIdx.x; c < p.c; c += blockDim.x) {
    const auto update = [&](void* running, double value) {
      const double before = load_as<double>(running, p.running_dtype, c);
      store_as((1 - momentum) * before + momentum * value, running, p.running_dtype, c);
    };
    update(p.running_mean, load_as<double>(p.statistics, p.statistics_dtype, c));
    update(p.running_var, unbias * load_as<double>(p.statistics, p.statistics_dtype, p.c + c));
  }
  // Every thread has read the number of batches.
  GK_MUTANT(norm_batches_barrier, __syncthreads(), void());
  if (threadIdx.x == 0 && p.num_batches_tracked) *p.num_batches_tracked = tracked;
}

}  // namespace batch_norm_leaky_relu

using namespace batch_norm_leaky_relu;

int64_t scratch_bytes(const BatchNormLeakyReLU& p, int device) {
  if (p.c == 0) return 0;
  // Without the tensors the width of the accesses is unknown: the most that any width needs.
  int64_t parts = 1;
  for (int64_t vector = 16 / size_of(p.dtype); vector > 0; vector /= 2) {
    const int v = static_cast<int>(vector);
    parts = std::max<int64_t>(parts, make_tiling(p, v, multiprocessors(device)).parts);
  }
  const int64_t accumulator_size = p.dtype == DType::kFloat64 ? 8 : 4;
  return parts == 1 ? 0 : parts * p.c * kMaxSums * accumulator_size;
}

const char* batch_norm_leaky_relu_forward(const BatchNormLeakyReLUForward& p, void* scratch,
                                          int device, void* stream) {
  return run_pass<Forward>(p, scratch, device, stream);
}

const char* batch_norm_leaky_relu_backward(const BatchNormLeakyReLUBackward& p, void* scratch,
                                           int device, void* stream) {
  return run_pass<Backward>(p, scratch, device, stream);
}

const char* batch_norm_leaky_relu_double_backward(const BatchNormLeakyReLUDoubleBackward& p,
                                                  void* scratch, int device, void* stream) {
  return run_pass<DoubleBackward>(p, scratch, device, stream);
}

const char* update_running_statistics(const UpdateRunningStatistics& p, int, void* stream) {
  // One block: the number of batches is read by all and then written by one.
  return launch(update_running_statistics_kernel, dim3(1),
                dim3(std::max(kWarp, round_up_to_power_of_two(p.c, 1024))), 0,
                static_cast<cudaStream_t>(stream), p);
}

}  // namespace gankernels::cuda
