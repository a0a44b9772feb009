// Kernels that prove the emulation itself: what it must compute and the errors it must find.
#include <cuda_runtime.h>
#include <string.h>

#include "cuda/launch.h"
#include "self_test.h"

namespace gankernels::cuda {

// out = in, reversed within each block, through static shared memory of exactly 64 floats.
__global__ void reverse_static(const float* in, float* out) {
  __shared__ float values[64];
  const int t = threadIdx.x, first = blockIdx.x * blockDim.x;
  values[t] = in[first + t];
  __syncthreads();
  out[first + t] = values[blockDim.x - 1 - t];
}

__global__ void reverse_dynamic(const float* in, float* out) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  float* const values = reinterpret_cast<float*>(dynamic_shared);
  const int t = threadIdx.x, first = blockIdx.x * blockDim.x;
  values[t] = in[first + t];
  __syncthreads();
  out[first + t] = values[blockDim.x - 1 - t];
}

__global__ void reverse_without_barrier(const float* in, float* out) {
  __shared__ float values[64];
  const int t = threadIdx.x, first = blockIdx.x * blockDim.x;
  values[t] = in[first + t];
  out[first + t] = values[blockDim.x - 1 - t];
}

// A value that a block left in shared memory must not be found by the next one.
__global__ void read_uninitialized(const float* in, float* out) {
  __shared__ float value;
  out[blockIdx.x] = value;
  __syncthreads();
  value = in[blockIdx.x];
}

__global__ void barrier_in_branch(const float*, float* out) {
  if (threadIdx.x < 5) __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void two_barriers(const float*, float* out) {
  if (threadIdx.x < 5) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

// One result per lane and function.
__global__ void warp_functions(const float* in, float* out) {
  const int lane = threadIdx.x % 32;
  const float v = in[threadIdx.x];
  float* const row = out + threadIdx.x * 8;
  row[0] = __shfl_sync(0xffffffffu, v, 3);
  row[1] = __shfl_sync(0xffffffffu, v, 9, 8);
  row[2] = __shfl_down_sync(0xffffffffu, v, 5);
  row[3] = __shfl_up_sync(0xffffffffu, v, 5, 16);
  row[4] = __shfl_xor_sync(0xffffffffu, v, 6);
  row[5] = static_cast<float>(__ballot_sync(0xffffffffu, lane < 7));
  row[6] = static_cast<float>(__any_sync(0xffffffffu, lane == 31));
  row[7] = static_cast<float>(__all_sync(0xffffffffu, lane != 31));
}

// Half a warp shuffles among itself, the other half sits it out.
__global__ void half_warp_shuffle(const float* in, float* out) {
  float v = in[threadIdx.x];
  if (threadIdx.x < 16) v = __shfl_xor_sync(0x0000ffffu, v, 1);
  out[threadIdx.x] = v;
}

__global__ void shuffle_with_absent_lanes(const float* in, float* out) {
  float v = in[threadIdx.x];
  if (threadIdx.x < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  out[threadIdx.x] = v;
}

__global__ void shuffle_from_outside_mask(const float* in, float* out) {
  float v = in[threadIdx.x];
  if (threadIdx.x < 16) v = __shfl_sync(0x0000ffffu, v, 20);
  out[threadIdx.x] = v;
}

__global__ void shuffle_outside_own_mask(const float* in, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, in[threadIdx.x], 1);
}

__global__ void write_after_end(const float*, float* out) {
  if (threadIdx.x == 0) out[blockDim.x] = 0;
}

__global__ void read_after_end(const float* in, float* out) {
  if (threadIdx.x == 0) out[0] = in[blockDim.x];
}

__global__ void static_shared_after_end(const float* in, float* out) {
  __shared__ float values[64];
  values[threadIdx.x + 1] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + 1];
}

__global__ void misaligned_load(const float* in, float* out) {
  out[0] = static_cast<float>(reinterpret_cast<const uint4*>(in + 1)->x);
}

__global__ void misaligned_store(const float*, float* out) {
  __stwb(reinterpret_cast<uint4*>(out + 1), uint4{0, 0, 0, 0});
}

__global__ void misaligned_load_of_global(const float* in, float* out) {
  out[0] = static_cast<float>(
      __ldg(reinterpret_cast<const uint32_t*>(reinterpret_cast<const unsigned char*>(in) + 2)));
}

__global__ void misaligned_vector_load(const float* in, float* out) {
  const float2 both = *reinterpret_cast<const float2*>(in + 1);
  out[0] = both.x + both.y;
}

__global__ void misaligned_vector_store(const float*, float* out) {
  *reinterpret_cast<double2*>(out + 2) = double2{0, 0};
}

// Every load and store of global memory, of the address of another space. A kernel's parameters
// stand for the host's memory.
#define OF_EVERY_SPACE(NAME, ACCESS)                             \
  __global__ void NAME##_of_shared(const float*, float* out) {   \
    __shared__ float value;                                      \
    float* const address = &value;                               \
    out[0] = (ACCESS);                                           \
  }                                                              \
  __global__ void NAME##_of_local(const float* in, float* out) { \
    float value = in[0];                                         \
    float* const address = &value;                               \
    out[0] = (ACCESS);                                           \
  }                                                              \
  __global__ void NAME##_of_the_host(const float*, float* out) { \
    static float value;                                          \
    float* const address = &value;                               \
    out[0] = (ACCESS);                                           \
  }                                                              \
  __global__ void NAME##_of_global(const float*, float* out) {   \
    float* const address = out;                                  \
    *address = 1;                                                \
    out[1] = (ACCESS);                                           \
  }

OF_EVERY_SPACE(ldg, __ldg(address))
OF_EVERY_SPACE(ldca, __ldca(address))
OF_EVERY_SPACE(ldcg, __ldcg(address))
OF_EVERY_SPACE(ldcs, __ldcs(address))
OF_EVERY_SPACE(ldlu, __ldlu(address))
OF_EVERY_SPACE(ldcv, __ldcv(address))
OF_EVERY_SPACE(stwb, (__stwb(address, 2.0f), 2))
OF_EVERY_SPACE(stcg, (__stcg(address, 2.0f), 2))
OF_EVERY_SPACE(stcs, (__stcs(address, 2.0f), 2))
OF_EVERY_SPACE(stwt, (__stwt(address, 2.0f), 2))

// Halves of a warp in different functions, all with the mask of the whole warp.
__global__ void two_shuffles(const float* in, float* out) {
  float v = in[threadIdx.x];
  v = threadIdx.x < 16 ? __shfl_xor_sync(0xffffffffu, v, 1) : __shfl_down_sync(0xffffffffu, v, 1);
  out[threadIdx.x] = v;
}

__global__ void two_votes(const float*, float* out) {
  const int odd = threadIdx.x % 2;
  out[threadIdx.x] = threadIdx.x < 16 ? __any_sync(0xffffffffu, odd) : __all_sync(0xffffffffu, odd);
}

__global__ void shuffle_of_odd_width(const float* in, float* out) {
  out[threadIdx.x] = __shfl_down_sync(0xffffffffu, in[threadIdx.x], 1, 12);
}

__global__ void vote_outside_own_mask(const float*, float* out) {
  out[threadIdx.x] = static_cast<float>(__ballot_sync(0x0000ffffu, 1));
}

__global__ void warp_barrier_with_absent_lanes(const float*, float* out) {
  if (threadIdx.x != 3) __syncwarp();
  out[threadIdx.x] = 0;
}

}  // namespace gankernels::cuda

const char* run_self_test(const char* name, const float* in, float* out, unsigned int blocks,
                          unsigned int threads, std::size_t shared_bytes) {
  using namespace gankernels::cuda;
  struct {
    const char* name;
    void (*kernel)(const float*, float*);
  } const kernels[] = {
      {"reverse_static", reverse_static},
      {"reverse_dynamic", reverse_dynamic},
      {"reverse_without_barrier", reverse_without_barrier},
      {"read_uninitialized", read_uninitialized},
      {"barrier_in_branch", barrier_in_branch},
      {"two_barriers", two_barriers},
      {"warp_functions", warp_functions},
      {"half_warp_shuffle", half_warp_shuffle},
      {"shuffle_with_absent_lanes", shuffle_with_absent_lanes},
      {"shuffle_from_outside_mask", shuffle_from_outside_mask},
      {"shuffle_outside_own_mask", shuffle_outside_own_mask},
      {"write_after_end", write_after_end},
      {"read_after_end", read_after_end},
      {"static_shared_after_end", static_shared_after_end},
      {"misaligned_load", misaligned_load},
      {"misaligned_store", misaligned_store},
      {"misaligned_load_of_global", misaligned_load_of_global},
      {"misaligned_vector_load", misaligned_vector_load},
      {"misaligned_vector_store", misaligned_vector_store},
      {"two_shuffles", two_shuffles},
      {"two_votes", two_votes},
      {"shuffle_of_odd_width", shuffle_of_odd_width},
      {"vote_outside_own_mask", vote_outside_own_mask},
      {"warp_barrier_with_absent_lanes", warp_barrier_with_absent_lanes},
#define NAMED(NAME) {#NAME, NAME}
#define NAMED_OF_EVERY_SPACE(NAME)                                            \
  NAMED(NAME##_of_shared), NAMED(NAME##_of_local), NAMED(NAME##_of_the_host), \
      NAMED(NAME##_of_global)
      NAMED_OF_EVERY_SPACE(ldg),
      NAMED_OF_EVERY_SPACE(ldca),
      NAMED_OF_EVERY_SPACE(ldcg),
      NAMED_OF_EVERY_SPACE(ldcs),
      NAMED_OF_EVERY_SPACE(ldlu),
      NAMED_OF_EVERY_SPACE(ldcv),
      NAMED_OF_EVERY_SPACE(stwb),
      NAMED_OF_EVERY_SPACE(stcg),
      NAMED_OF_EVERY_SPACE(stcs),
      NAMED_OF_EVERY_SPACE(stwt),
  };
  for (const auto& k : kernels) {
    if (strcmp(k.name, name) == 0) {
      return launch(k.kernel, dim3(blocks), dim3(threads), shared_bytes, nullptr, in, out);
    }
  }
  return "no such self-test";
}
