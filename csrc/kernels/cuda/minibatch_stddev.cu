// CUDA kernels of minibatch_stddev: forward, backward, double backward.
//
// A thread takes V neighboring positions of all members of their group, from the first sum to the
// results, so that only the sums over positions must be merged. A block takes a part of the
// positions of one group and feature, which are called a cell:
//
//   cell_kernel     computes the pass; it also finishes the sum of a cell of one part
//   finish_kernel   merges the sums of a cell's parts
//
//                     launches, with parts   reads + writes, in sizes of x
//   forward           cell (finish)          x
//   backward          cell                   x + grad_x
//   double backward   cell (finish)          x, tangent + grad_x
//
// No fewer bytes are possible: the elements of up to kHeld members are held in registers. Larger
// groups are read again for each of the sums, from a cache: one vector of each of some hundred
// members fits L1 for a few warps, and L2 for all.

#include <math.h>

#include <algorithm>

#include "../minibatch_stddev.h"
#include "../mutant.h"
#include "launch.h"
#include "reduce.h"
#include "vector.h"

namespace gankernels::cuda {

// A separate namespace, since other files use the same names for other classes.
namespace minibatch_stddev {

constexpr int kThreads = 512;
constexpr int kFinishThreads = 128;
constexpr int kHeld = 4;  // members of a group; the usual group size of the published networks
// Positions per thread. With more, or two in float64, the second derivative spills registers.
template <typename T>
constexpr int kVector = sizeof(T) > 4 ? 1 : 4;

// A cell is divided until there are as many blocks as a multiprocessor holds.
constexpr int64_t kBlocksPerMultiprocessor = 2048 / kThreads;
// No part is smaller: four rounds of most types' vectors for every thread.
constexpr int64_t kLeast = kThreads * 4 * kVector<float>;
// A block takes further tasks by itself, so that more blocks would gain nothing.
constexpr int64_t kMaxBlocks = int64_t{1} << 20;

// With 0, ptxas fits one more block on a multiprocessor. On Blackwell it spills a few registers for
// that in the kernels below, which few tensors use.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <int V>
constexpr int kFewestBlocks = V == 1 ? 1 : 0;
#else
template <int V>
constexpr int kFewestBlocks = 0;
#endif

enum class Pass { kForward, kBackward, kDoubleBackward };

// The tensors of all passes. Tensors that a pass does not have are null.
struct Tensors {
  const void *grad_stddev, *tangent;
  void *grad_x, *result;  // result has one element per cell
};

struct Tiling {
  int64_t positions;  // per cell
  int64_t parts;      // per cell
  int64_t part_size;  // positions, of all parts but the last: a multiple of kLeast
  int64_t tasks;      // parts of all cells
};

Tiling make_tiling(const MinibatchStddev& p, int device) {
  const int64_t cells = p.groups * p.features;
  const int64_t wanted = multiprocessors(device) * kBlocksPerMultiprocessor / cells;
  Tiling t;
  t.positions = p.rows * p.run;
  t.part_size = ceil_div(ceil_div(t.positions, std::max<int64_t>(1, wanted)), kLeast) * kLeast;
  t.parts = ceil_div(t.positions, t.part_size);
  t.tasks = cells * t.parts;
  return t;
}

// V neighboring elements of every member: of at most kMembers members, which are read once, or, if
// kMembers is 0, of any number of members.
template <typename T, int V, int kMembers>
class Members {
 public:
  __device__ Members(const T* first, int64_t stride, int64_t count)
      : first_(first), stride_(stride), count_(count) {
    if constexpr (kMembers > 0) {
      for_each([&](int64_t m) { held_[m] = load<V>(first + m * stride); });
    }
  }

  // Elements in registers need indices that are known at compile time.
  template <typename Body>
  __device__ void for_each(const Body& body) const {
    if constexpr (kMembers > 0) {
#pragma unroll
      for (int64_t m = 0; m < kMembers; ++m) {
        if (m < count_) body(m);
      }
    } else {
#pragma unroll 4
      for (int64_t m = 0; m < GK_MUTANT(stddev_last_member, count_, count_ - 1); ++m) body(m);
    }
  }

  __device__ Vector<T, V> operator[](int64_t m) const {
    if constexpr (kMembers > 0) {
      return held_[m];
    } else {
      return load<V>(first_ + m * stride_);
    }
  }

 private:
  const T* first_;
  int64_t stride_, count_;
  Vector<T, V> held_[kMembers > 0 ? kMembers : 1];
};

// Turns elements into distances from the mean of the members, by way of distances from the first
// member: these are exact even if the mean is so large that its rounding error would matter.
template <typename T, int V>
struct Center {
  using A = Accumulate<T>;
  A pivot[V], mean[V];

  template <int kMembers>
  __device__ Center(const Members<T, V, kMembers>& members, int64_t count) : mean{} {
    const Vector<T, V> first = members[0];
#pragma unroll
    for (int v = 0; v < V; ++v)
      pivot[v] = GK_MUTANT(stddev_pivot, accumulator(first.values[v]), A(0));
    members.for_each([&](int64_t m) {
      const Vector<T, V> row = members[m];
#pragma unroll
      for (int v = 0; v < V; ++v) mean[v] += accumulator(row.values[v]) - pivot[v];
    });
#pragma unroll
    for (int v = 0; v < V; ++v) mean[v] /= static_cast<A>(count);
  }

  __device__ A distance(const Vector<T, V>& row, int v) const {
    return (accumulator(row.values[v]) - pivot[v]) - mean[v];
  }
};

// Computes V positions of a group, the first at from_x in its first member. Returns their share of
// the pass's sum over positions. u is grad_stddev / (P k).
template <Pass kPass, typename T, int V, int kMembers, typename A>
__device__ inline A visit(const T* from_x, const T* from_tangent, T* grad_x, int64_t stride,
                          int64_t count, A eps, A u) {
  constexpr bool kSecond = kPass == Pass::kDoubleBackward;
  using Group = Members<T, V, kMembers>;
  const Group x(from_x, stride, count);
  // Loaded here, so that its elements and those of x arrive together.
  const Group tangent(from_tangent, stride, kSecond ? count : 0);
  const Center<T, V> of_x(x, count);
  A sum = 0, inverse[V], squares[V] = {};
  x.for_each([&](int64_t m) {
    const Vector<T, V> row = x[m];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A d = of_x.distance(row, v);
      squares[v] += d * d;
    }
  });
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const A sigma = sqrt(squares[v] / static_cast<A>(count) + eps);
    if (kPass == Pass::kForward) sum += sigma;
    inverse[v] = A(1) / sigma;
  }
  if constexpr (kPass == Pass::kBackward) {
    x.for_each([&](int64_t m) {
      Vector<T, V> row = x[m];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        row.values[v] = element<T>(of_x.distance(row, v) * (u * inverse[v]));
      }
      store<V>(grad_x + m * stride, row);
    });
  }
  if constexpr (kSecond) {
    const Center<T, V> of_tangent(tangent, count);
    A q[V] = {};
    x.for_each([&](int64_t m) {
      const Vector<T, V> row = x[m], t = tangent[m];
#pragma unroll
      for (int v = 0; v < V; ++v) q[v] += of_tangent.distance(t, v) * of_x.distance(row, v);
    });
#pragma unroll
    for (int v = 0; v < V; ++v) {
      q[v] *= inverse[v];
      sum += q[v];
      q[v] *= inverse[v] / static_cast<A>(count);
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    // Makes the compiler recompute addresses, since it spilled those that it kept.
    asm volatile("" : "+l"(stride));
#endif
    x.for_each([&](int64_t m) {
      Vector<T, V> row = x[m];
      const Vector<T, V> t = tangent[m];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A c = of_tangent.distance(t, v), d = of_x.distance(row, v);
        row.values[v] = element<T>((c - q[v] * d) * (u * inverse[v]));
      }
      store<V>(grad_x + m * stride, row);
    });
  }
  return sum;
}

// The divisor of a cell's sum.
template <Pass kPass>
__device__ inline double divisor(const MinibatchStddev& p, const Tiling& tiling, int64_t cell) {
  const int64_t count = kPass == Pass::kForward ? 1 : members_of(p, cell / p.features);
  return static_cast<double>(tiling.positions) * static_cast<double>(count);
}

template <Pass kPass, typename T, int V, int kMembers>
__global__ void __launch_bounds__(kThreads, kFewestBlocks<V>)
    cell_kernel(const MinibatchStddev p, const Tensors tensors, const Tiling tiling,
                double* partials) {
  using A = Accumulate<T>;
  __shared__ Sums<double, 1> shared[kThreads / kWarp];
  const int64_t size = tiling.positions * p.features, stride = size * p.groups;
  for (int64_t task = blockIdx.x; task < tiling.tasks; task += gridDim.x) {
    const int64_t cell = task / tiling.parts, part = task % tiling.parts;
    const int64_t group = cell / p.features, feature = cell % p.features;
    const int64_t count = members_of(p, group);
    A u = 0;
    if (kPass != Pass::kForward) {
      const auto outer = static_cast<double>(static_cast<const A*>(tensors.grad_stddev)[cell]);
      u = static_cast<A>(outer / divisor<kPass>(p, tiling, cell));
    }
    const int64_t begin = part * tiling.part_size;
    const int64_t end = min(tiling.positions, begin + tiling.part_size);
    GK_MUTANT_ADDS(stddev_idle_threads_leave, if (begin + threadIdx.x * V >= end) return);
    A sum = 0;
    for (int64_t i = begin + threadIdx.x * V; i < GK_MUTANT(stddev_last_positions, end, end - 4);
         i += kThreads * V) {
      // Most tensors have one row, which saves the division.
      const bool single = GK_MUTANT(stddev_single_row, p.rows == 1, p.rows >= 1);
      const int64_t row = single ? 0 : i / p.run;
      const int64_t at = group * size + (row * (p.features - 1) + feature) * p.run + i;
      const T* const x = static_cast<const T*>(p.x) + at;
      const T* tangent = nullptr;
      T* grad_x = nullptr;
      if (kPass == Pass::kDoubleBackward) tangent = static_cast<const T*>(tensors.tangent) + at;
      if (kPass != Pass::kForward) grad_x = static_cast<T*>(tensors.grad_x) + at;
      sum +=
          visit<kPass, T, V, kMembers>(x, tangent, grad_x, stride, count, static_cast<A>(p.eps), u);
    }
    if (kPass == Pass::kBackward) continue;
    Sums<double, 1> total[1] = {{{static_cast<double>(sum)}}};
    block_reduce<Add>(total, 1, shared);
    if (threadIdx.x == 0) {
      if (tiling.parts == 1) {
        const double value = total[0].value[0] / divisor<kPass>(p, tiling, cell);
        static_cast<A*>(tensors.result)[cell] = static_cast<A>(value);
      } else {
        partials[task] = total[0].value[0];
      }
    }
    __syncthreads();  // shared memory is free for the next task
  }
}

// A block takes one cell after another.
template <Pass kPass, typename A>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const MinibatchStddev p, const Tiling tiling, const double* partials, A* result) {
  __shared__ Sums<double, 1> shared[kFinishThreads / kWarp];
  for (int64_t cell = blockIdx.x; cell < p.groups * p.features; cell += gridDim.x) {
    Sums<double, 1> total[1] = {};
    for (int64_t part = threadIdx.x;
         part < GK_MUTANT(stddev_last_part, tiling.parts, tiling.parts - 1);
         part += kFinishThreads) {
      total[0].value[0] += partials[cell * tiling.parts + part];
    }
    block_reduce<Add>(total, 1, shared);
    if (threadIdx.x == 0) {
      result[cell] = static_cast<A>(total[0].value[0] / divisor<kPass>(p, tiling, cell));
    }
    __syncthreads();  // shared memory is free for the next cell
  }
}

unsigned int blocks_for(int64_t tasks) {
  return static_cast<unsigned int>(
      std::min(tasks, GK_LIMIT(stddev_blocks, kMaxBlocks, int64_t{3})));
}

template <Pass kPass, typename T, int V, int kMembers>
const char* run(const MinibatchStddev& p, const Tensors& tensors, const Tiling& tiling,
                double* partials, cudaStream_t stream) {
  using A = Accumulate<T>;
  const char* error = launch(cell_kernel<kPass, T, V, kMembers>, dim3(blocks_for(tiling.tasks)),
                             dim3(kThreads), 0, stream, p, tensors, tiling, partials);
  if constexpr (kPass != Pass::kBackward) {
    if (error == nullptr && tiling.parts > 1) {
      error = launch(finish_kernel<kPass, A>, dim3(blocks_for(p.groups * p.features)),
                     dim3(kFinishThreads), 0, stream, p, tiling, partials,
                     static_cast<A*>(tensors.result));
    }
  }
  return error;
}

template <Pass kPass, typename T>
const char* run(const MinibatchStddev& p, const Tensors& tensors, const Tiling& tiling,
                double* partials, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  const auto addresses = reinterpret_cast<uintptr_t>(p.x) |
                         reinterpret_cast<uintptr_t>(tensors.tangent) |
                         reinterpret_cast<uintptr_t>(tensors.grad_x);
  const bool aligned =
      GK_MUTANT(stddev_alignment, addresses % (V * sizeof(T)) == 0, addresses > 0) &&
      p.run % V == 0;
  const bool held = members_of(p, 0) <= kHeld;
  const auto chosen = aligned ? (held ? run<kPass, T, V, kHeld> : run<kPass, T, V, 0>)
                              : (held ? run<kPass, T, 1, kHeld> : run<kPass, T, 1, 0>);
  return chosen(p, tensors, tiling, partials, stream);
}

template <Pass kPass>
const char* run_pass(const MinibatchStddev& p, const Tensors& tensors, void* scratch, int device,
                     void* stream_pointer) {
  const Tiling tiling = make_tiling(p, device);
  auto* const partials = static_cast<double*>(scratch);
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  return with_type(p.dtype, [&](auto type) {
    return run<kPass, typename decltype(type)::type>(p, tensors, tiling, partials, stream);
  });
}

}  // namespace minibatch_stddev

using namespace minibatch_stddev;

int64_t scratch_bytes(const MinibatchStddev& p, int device) {
  const Tiling tiling = make_tiling(p, device);
  return tiling.parts == 1 ? 0 : tiling.tasks * static_cast<int64_t>(sizeof(double));
}

const char* minibatch_stddev_forward(const MinibatchStddevForward& p, void* scratch, int device,
                                     void* stream) {
  return run_pass<Pass::kForward>(p, {nullptr, nullptr, nullptr, p.stddev}, scratch, device,
                                  stream);
}

const char* minibatch_stddev_backward(const MinibatchStddevBackward& p, void* scratch, int device,
                                      void* stream) {
  return run_pass<Pass::kBackward>(p, {p.grad_stddev, nullptr, p.grad_x, nullptr}, scratch, device,
                                   stream);
}

const char* minibatch_stddev_double_backward(const MinibatchStddevDoubleBackward& p, void* scratch,
                                             int device, void* stream) {
  return run_pass<Pass::kDoubleBackward>(
      p, {p.grad_stddev, p.tangent, p.grad_x, p.grad_grad_stddev}, scratch, device, stream);
}

}  // namespace gankernels::cuda
