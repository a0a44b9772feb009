// Measures how many float32 additions a GPU issues per second, the ceiling of minibatch
// discrimination, and the clock it runs at meanwhile. Prints both as JSON.
//
// The datasheet's figure is multiprocessors x 128 lanes x clock; one addition per lane and cycle.

#include <cuda_runtime.h>

#include <cstdio>

constexpr int kThreads = 512, kBlocksPerMultiprocessor = 4;
constexpr int kChains = 8;  // independent of each other, so that latency is hidden
constexpr int kRounds = 4096, kUnroll = 16;

__global__ void __launch_bounds__(kThreads) add(float step, float* out, long long* cycles) {
  float sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = static_cast<float>(threadIdx.x + i);
  const long long begin = clock64();
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < kChains; ++i) sums[i] += step;
    }
  }
  const long long end = clock64();
  float total = 0;
  for (int i = 0; i < kChains; ++i) total += sums[i];
  out[blockIdx.x * kThreads + threadIdx.x] = total;
  if (blockIdx.x == 0 && threadIdx.x == 0) *cycles = end - begin;
}

#define CHECK(call)                                                     \
  if (const cudaError_t error = (call); error != cudaSuccess) {         \
    std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)); \
    return 1;                                                           \
  }

int main() {
  int multiprocessors = 0;
  CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  const int blocks = multiprocessors * kBlocksPerMultiprocessor;
  float* out;
  long long* cycles;
  CHECK(cudaMalloc(&out, sizeof(float) * blocks * kThreads));
  CHECK(cudaMalloc(&cycles, sizeof(long long)));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  float best = 0;
  for (int run = 0; run < 50; ++run) {  // the first ones warm up
    CHECK(cudaEventRecord(begin));
    add<<<blocks, kThreads>>>(1.5f, out, cycles);
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (run == 0 || milliseconds < best) best = milliseconds;
  }
  long long spent = 0;
  CHECK(cudaMemcpy(&spent, cycles, sizeof(spent), cudaMemcpyDeviceToHost));
  const double adds = 1.0 * blocks * kThreads * kRounds * kUnroll * kChains;
  const double seconds = best * 1e-3;
  // All blocks of a multiprocessor run side by side, so one block lasts as long as the kernel.
  std::printf("{\"adds_per_second\": %.6g, \"clock_hz\": %.6g, \"multiprocessors\": %d}\n",
              adds / seconds, static_cast<double>(spent) / seconds, multiprocessors);
  return 0;
}
