// CUDA's execution model on the CPU: enough of it that g++ compiles this project's .cu files
// unchanged and their results can be checked without a GPU. emulation.cpp explains how it runs.
//
// It is stricter than the hardware, on purpose:
//   - between two synchronizations threads run one after the other, in an order drawn from a seed;
//   - a barrier must be reached by every thread of the block, at the same line of the source;
//   - a warp function must be called by exactly the lanes its mask names, all with the same mask;
//   - shared memory holds NaNs when a block starts.
//
// Every intrinsic that is defined here checks its conditions. Others do not compile; among them are
// atomics, which no kernel of this project may use:
//   - loads and stores with a cache operation (__ldg, __ldcs, __stwb, ...): the address must be in
//     global memory, as declared by add_device_memory(), and a multiple of the access's size;
//   - vectors (uint2, uint4, float2, float4, double2): every address that one is copied from or to,
//     as by a plain load or store, must be a multiple of its size;
//   - __shfl_*, __ballot_sync, __any_sync, __all_sync, __syncwarp: the mask, as above, and that its
//     lanes meet in the same function; of a shuffle also the width and the lane that is read;
//   - __syncthreads: as above.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <cstddef>
#include <functional>
#include <string>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// Like __shared__, thread_local makes a variable of a function static, without another keyword, and
// can follow `extern`. The emulation is one operating system thread, so that a variable exists
// once, in this library's thread-local storage, where the emulation finds and poisons it.
#define __shared__ thread_local

// Dynamic shared memory: kernels declare `extern __shared__ unsigned char dynamic_shared[];`.
namespace gankernels::cuda {
extern __shared__ __align__(16) unsigned char dynamic_shared[];
}

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

struct uint3 {
  unsigned int x, y, z;
};

namespace emulation {

void misaligned(const char* what);

// An empty member of every vector, which checks each address that one is copied from or to.
template <size_t kBytes>
struct alignas(kBytes) Aligned {
  Aligned() = default;
  Aligned(const Aligned& from) { check("misaligned load", &from); }
  Aligned& operator=(const Aligned& from) {
    check("misaligned load", &from);
    check("misaligned store", this);
    return *this;
  }
  static void check(const char* what, const void* address) {
    uintptr_t bits = reinterpret_cast<uintptr_t>(address);
    asm("" : "+r"(bits));  // otherwise the compiler assumes the alignment
    if (bits % kBytes != 0) misaligned(what);
  }
};

}  // namespace emulation

struct uint2 {
  unsigned int x, y;
  [[no_unique_address]] emulation::Aligned<8> aligned = {};
};
struct uint4 {
  unsigned int x, y, z, w;
  [[no_unique_address]] emulation::Aligned<16> aligned = {};
};
struct float2 {
  float x, y;
  [[no_unique_address]] emulation::Aligned<8> aligned = {};
};
struct float4 {
  float x, y, z, w;
  [[no_unique_address]] emulation::Aligned<16> aligned = {};
};
struct double2 {
  double x, y;
  [[no_unique_address]] emulation::Aligned<16> aligned = {};
};
static_assert(sizeof(uint2) == 8 && sizeof(uint4) == 16 && sizeof(double2) == 16);

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

namespace emulation {

enum class WarpFunction {
  kSync,
  kShuffle,
  kShuffleDown,
  kShuffleUp,
  kShuffleXor,
  kBallot,
  kAny,
  kAll
};

void barrier(int line);
[[noreturn]] void fail(const std::string& what, const std::string& where = {});

// Fails where `address` is not of global memory, or no multiple of the size of the access.
void check_global(const char* function, const void* address, size_t bytes, const char* file,
                  int line);

// Waits for the lanes in `mask` and returns their values, that of lane i as the i-th.
const uint64_t* exchange(WarpFunction function, unsigned int mask, uint64_t value, int line);

// `source` is a lane of the warp, which must be in the mask: otherwise CUDA's result is undefined.
uint64_t shuffle(WarpFunction function, unsigned int mask, uint64_t value, int source, int line);
unsigned int lane();

template <typename T>
T shuffle_value(WarpFunction function, unsigned int mask, T value, int source, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(function, mask, bits, source, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

void check_width(int width);

}  // namespace emulation

inline void __syncthreads(int line = __builtin_LINE()) { emulation::barrier(line); }

inline void __syncwarp(unsigned int mask = 0xffffffffu, int line = __builtin_LINE()) {
  emulation::exchange(emulation::WarpFunction::kSync, mask, 0, line);
}

template <typename T>
T __shfl_sync(unsigned int mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  emulation::check_width(width);
  const int first = static_cast<int>(emulation::lane()) / width * width;
  return emulation::shuffle_value(emulation::WarpFunction::kShuffle, mask, value,
                                  first + (source & (width - 1)), line);
}

template <typename T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, int width = 32,
                   int line = __builtin_LINE()) {
  emulation::check_width(width);
  const int lane = static_cast<int>(emulation::lane());
  const int source = lane + static_cast<int>(delta);
  return emulation::shuffle_value(emulation::WarpFunction::kShuffleDown, mask, value,
                                  source / width == lane / width ? source : lane, line);
}

template <typename T>
T __shfl_up_sync(unsigned int mask, T value, unsigned int delta, int width = 32,
                 int line = __builtin_LINE()) {
  emulation::check_width(width);
  const int lane = static_cast<int>(emulation::lane());
  const int source = lane - static_cast<int>(delta);
  return emulation::shuffle_value(emulation::WarpFunction::kShuffleUp, mask, value,
                                  source >= lane / width * width ? source : lane, line);
}

template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int lanes, int width = 32,
                  int line = __builtin_LINE()) {
  emulation::check_width(width);
  const int lane = static_cast<int>(emulation::lane());
  const int source = lane ^ lanes;
  return emulation::shuffle_value(emulation::WarpFunction::kShuffleXor, mask, value,
                                  source / width <= lane / width ? source : lane, line);
}

namespace emulation {

inline unsigned int vote(WarpFunction function, unsigned int mask, int predicate, int line) {
  const uint64_t* votes = exchange(function, mask, predicate != 0, line);
  unsigned int ballot = 0;
  for (unsigned int i = 0; i < 32; ++i) {
    if (mask >> i & 1u) ballot |= static_cast<unsigned int>(votes[i]) << i;
  }
  return ballot;
}

}  // namespace emulation

inline unsigned int __ballot_sync(unsigned int mask, int predicate, int line = __builtin_LINE()) {
  return emulation::vote(emulation::WarpFunction::kBallot, mask, predicate, line);
}

inline int __any_sync(unsigned int mask, int predicate, int line = __builtin_LINE()) {
  return emulation::vote(emulation::WarpFunction::kAny, mask, predicate, line) != 0;
}

inline int __all_sync(unsigned int mask, int predicate, int line = __builtin_LINE()) {
  return emulation::vote(emulation::WarpFunction::kAll, mask, predicate, line) == mask;
}

// Loads and stores with a cache operation: one access to global memory each.
#define EMULATE_LOAD(NAME)                                                                  \
  template <typename T>                                                                     \
  T NAME(const T* from, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { \
    emulation::check_global(#NAME, from, sizeof(T), file, line);                            \
    return *from;                                                                           \
  }
#define EMULATE_STORE(NAME)                                                                     \
  template <typename T>                                                                         \
  void NAME(T* to, T value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { \
    emulation::check_global(#NAME, to, sizeof(T), file, line);                                  \
    *to = value;                                                                                \
  }
EMULATE_LOAD(__ldg)
EMULATE_LOAD(__ldca)
EMULATE_LOAD(__ldcg)
EMULATE_LOAD(__ldcs)
EMULATE_LOAD(__ldlu)
EMULATE_LOAD(__ldcv)
EMULATE_STORE(__stwb)
EMULATE_STORE(__stcg)
EMULATE_STORE(__stcs)
EMULATE_STORE(__stwt)
#undef EMULATE_LOAD
#undef EMULATE_STORE

// The host's side.

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// For cudaErrorLaunchFailure: the error that the emulation found, its kernel, block and line.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace emulation {
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& thread);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> copies(arguments...);
  return emulation::launch(*config, reinterpret_cast<const void*>(kernel),
                           [&] { std::apply(kernel, copies); });
}
