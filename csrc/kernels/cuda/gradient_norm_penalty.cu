// CUDA kernels of gradient_norm_penalty: forward, backward, double backward.
//
// A sample is divided into parts, and a warp takes one part after another. Only its 32 lanes must
// be merged, by shuffles and in a fixed order, without a barrier. There are three kernels, and a
// pass launches at most two of them:
//
//   dot_kernel      writes the sum of a * b over each part to `partials`
//   finish_kernel   one block merges these to squared norms and the penalty
//   apply_kernel    out = p a + q b, with p and q from the sample's partials and squared norm
//
//                     launches        reads + writes, in sizes of grad
//   forward           dot, finish     grad
//   backward          apply           grad + grad_grad
//   double backward   dot, apply      grad, tangent, again grad, tangent + grad_grad
//
// Elements are summed in the accumulation type. Everything per sample is computed in double: there
// is little of it, and in float the second derivative of a norm below 1e-13 would overflow.

#include <math.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "../gradient_norm_penalty.h"
#include "../mutant.h"
#include "launch.h"
#include "reduce.h"
#include "vector.h"

namespace gankernels::cuda {

// A separate namespace, since other files use the same names for other classes.
namespace gradient_norm_penalty {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFinishThreads = 1024;
constexpr int kUnroll = 4;  // accesses that a lane issues before it needs the first result

// A sample is divided until there are as many warps as a multiprocessor holds.
constexpr int64_t kWarpsPerMultiprocessor = 64;
// No part is smaller: two rounds of 16 bytes times kUnroll for every lane.
constexpr int64_t kBytesPerPart = 2 * 16 * kUnroll * kWarp;
// A warp takes further tasks by itself, so that more blocks would gain nothing.
constexpr int64_t kMaxBlocks = int64_t{1} << 20;

struct Tiling {
  int64_t parts;      // per sample
  int64_t part_size;  // elements, of all parts but the last
  int64_t tasks;      // parts of all samples
};

Tiling make_tiling(const GradientNormPenalty& p, int device) {
  const int64_t least = kBytesPerPart / size_of(p.dtype);  // whole vectors for every lane
  const int64_t wanted = multiprocessors(device) * kWarpsPerMultiprocessor;
  const int64_t parts = std::max<int64_t>(1, wanted / std::max<int64_t>(1, p.n));
  Tiling t;
  t.part_size = std::max<int64_t>(1, ceil_div(ceil_div(p.d, parts), least)) * least;
  t.parts = std::max<int64_t>(1, ceil_div(p.d, t.part_size));
  t.tasks = p.n * t.parts;
  return t;
}

// Merged over the warp; every lane gets the sum.
template <typename A>
__device__ inline A warp_sum(A value) {
#pragma unroll
  for (int lanes = GK_MUTANT(penalty_half_warp, kWarp / 2, kWarp / 4); lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, lanes);
  }
  return value;
}

// The derivatives' factor 2 grad_penalty / N.
template <typename A>
__device__ inline double outer_factor(const GradientNormPenalty& p, const void* grad_penalty) {
  return static_cast<double>(*static_cast<const A*>(grad_penalty)) * 2 / static_cast<double>(p.n);
}

template <typename A>
__device__ inline PenaltyValue<double> penalty(const GradientNormPenalty& p, int64_t n) {
  const double s = static_cast<double>(static_cast<const A*>(p.squared_norms)[n]);
  return penalty_of<double>(s, sqrt(s), p.center, p.kind);
}

// A task's elements. Those from `vectors` to `vectors_end` are whole vectors at aligned addresses.
struct Span {
  int64_t n, begin, vectors, vectors_end, end;
};

template <typename T, int V>
__device__ inline Span span_of(const GradientNormPenalty& p, const Tiling& tiling, int64_t task) {
  Span s;
  s.n = task / tiling.parts;
  const int64_t from = task % tiling.parts * tiling.part_size;
  s.begin = s.n * p.d + from;
  s.end = s.n * p.d + min(p.d, from + tiling.part_size);
  const auto address = reinterpret_cast<uintptr_t>(static_cast<const T*>(p.grad) + s.begin);
  const auto head = static_cast<int64_t>(
      GK_MUTANT(penalty_head_start, -(address / sizeof(T)), address / sizeof(T)) % V);
  s.vectors = min(s.end, s.begin + head);
  s.vectors_end = s.vectors + (s.end - s.vectors) / V * V;
  return s;
}

// A lane's share of the sum of a * b over [begin, end), a number of whole vectors of W elements.
template <int W, bool kSquare, typename T>
__device__ inline Accumulate<T> dot(const T* a, const T* b, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  A total = 0;
  for (int64_t i = begin + threadIdx.x % kWarp * W; i < end; i += kUnroll * kWarp * W) {
    Vector<T, W> x[kUnroll], y[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * kWarp * W;
      x[u] = y[u] = {};
      if (at < end) {
        x[u] = load<W>(a + at);
        if (!kSquare) y[u] = load<W>(b + at);
      }
    }
    A sums[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int j = 0; j < W; ++j) {
        sums[u] += accumulator(x[u].values[j]) * accumulator((kSquare ? x : y)[u].values[j]);
      }
    }
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return total;
}

template <typename T, int V, bool kSquare>
__global__ void __launch_bounds__(kThreads)
    dot_kernel(const GradientNormPenalty p, const Tiling tiling, const void* other,
               Accumulate<T>* partials) {
  using A = Accumulate<T>;
  const auto *a = static_cast<const T*>(p.grad), *b = static_cast<const T*>(other);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  for (int64_t task = first; task < tiling.tasks; task += warps) {
    const Span s = span_of<T, V>(p, tiling, task);
    A sum = dot<V, kSquare>(a, b, s.vectors, s.vectors_end);
    if (V > 1) {
      sum += GK_MUTANT(penalty_head, (dot<1, kSquare>(a, b, s.begin, s.vectors)), 0);
      sum += dot<1, kSquare>(a, b, s.vectors_end, s.end);
    }
    sum = GK_MUTANT(penalty_lanes, warp_sum(sum), sum);
    if (threadIdx.x % kWarp == 0) partials[task] = sum;
  }
}

// One block. `lanes`, a power of two, share a sample's partials.
template <typename A>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const GradientNormPenaltyForward p, const Tiling tiling, const int lanes,
                  const A* partials) {
  __shared__ Sums<double, 1> shared[kFinishThreads / kWarp];
  const int lane = threadIdx.x % lanes;
  const int64_t samples = blockDim.x / lanes;  // at a time
  Sums<double, 1> total[1] = {};
  for (int64_t first = 0; first < p.n; first += samples) {
    const int64_t n = first + threadIdx.x / lanes;
    double s = 0;
    if (n < p.n) {
      for (int64_t part = lane; part < tiling.parts; part += lanes) {
        s += static_cast<double>(partials[n * tiling.parts + part]);
      }
    }
    GK_MUTANT_ADDS(penalty_shuffle_in_a_branch, if (n >= p.n) continue);
    for (int l = lanes / 2; l > 0; l /= 2) s += __shfl_down_sync(kWholeWarp, s, l, lanes);
    if (n < p.n && lane == 0) {
      static_cast<A*>(p.squared_norms)[n] = static_cast<A>(s);
      total[0].value[0] += penalty<A>(p, n).value;
    }
  }
  block_reduce<Add>(total, 1, shared);
  if (threadIdx.x == 0) {
    *static_cast<A*>(p.penalty) = static_cast<A>(total[0].value[0] / static_cast<double>(p.n));
  }
}

// The passes with an elementwise result: out = p grad + q tangent.

template <typename A>
struct Backward {
  using Params = GradientNormPenaltyBackward;
  static constexpr bool kWithTangent = false;
  static constexpr unsigned int kExtraBlocks = 0;

  // d penalty / d grad = phi'(s) * 2 grad / N.
  __device__ static void factors(const Params& p, const Tiling&, const A*, int64_t n, A& of_grad,
                                 A& of_tangent) {
    of_grad = static_cast<A>(outer_factor<A>(p, p.grad_penalty) * penalty<A>(p, n).first);
    of_tangent = 0;
  }

  GK_HOST_DEVICE static const void* tangent(const Params&) { return nullptr; }
  __device__ static void extra_block(const Params&, const Tiling&, const A*) {}
};

// With tangent t: L = outer * sum_n phi'(s_n) (t . grad)_n, outer = 2 grad_penalty / N, and so
// dL/dgrad = outer * (phi'(s) t + 2 phi''(s) (t . grad) grad).
template <typename A>
struct DoubleBackward {
  using Params = GradientNormPenaltyDoubleBackward;
  static constexpr bool kWithTangent = true;
  static constexpr unsigned int kExtraBlocks = 1;

  __device__ static void factors(const Params& p, const Tiling& tiling, const A* partials,
                                 int64_t n, A& of_grad, A& of_tangent) {
    double product = 0;
    for (int64_t part = threadIdx.x % kWarp; part < GK_MUTANT(penalty_last_part, tiling.parts, 2);
         part += kWarp) {
      product += static_cast<double>(partials[n * tiling.parts + part]);
    }
    product = warp_sum(product);
    const double outer = outer_factor<A>(p, p.grad_penalty);
    const PenaltyValue<double> phi = penalty<A>(p, n);
    of_grad = static_cast<A>(outer * 2 * phi.second * product);
    of_tangent = static_cast<A>(outer * phi.first);
  }

  GK_HOST_DEVICE static const void* tangent(const Params& p) { return p.tangent; }

  // dL/dgrad_penalty = 2 / N * sum_n phi'(s_n) (t . grad)_n, part by part: by one block, the first
  // to start, while others write grad_grad.
  __device__ static void extra_block(const Params& p, const Tiling& tiling, const A* partials) {
    __shared__ Sums<double, 1> shared[kWarps];
    Sums<double, 1> total[1] = {};
    for (int64_t task = threadIdx.x; task < tiling.tasks; task += kThreads) {
      const double part = static_cast<double>(partials[task]);
      total[0].value[0] += penalty<A>(p, task / tiling.parts).first * part;
    }
    block_reduce<Add>(total, 1, shared);
    if (threadIdx.x == 0) {
      const double n = static_cast<double>(p.n);
      *static_cast<A*>(p.grad_grad_penalty) = static_cast<A>(total[0].value[0] * 2 / n);
    }
  }
};

template <int W, bool kWithTangent, typename T, typename A>
__device__ inline void apply(const T* grad, A of_grad, const T* tangent, A of_tangent, T* out,
                             int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x % kWarp * W; i < end; i += kUnroll * kWarp * W) {
    Vector<T, W> x[kUnroll], y[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * kWarp * W;
      if (at < end) {
        x[u] = load<W>(grad + at);
        if (kWithTangent) y[u] = load<W>(tangent + at);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * kWarp * W;
      if (at >= end) break;
#pragma unroll
      for (int j = 0; j < W; ++j) {
        A value = of_grad * accumulator(x[u].values[j]);
        if (kWithTangent) value += of_tangent * accumulator(y[u].values[j]);
        x[u].values[j] = element<T>(value);
      }
      store<W>(out + at, x[u]);
    }
  }
}

template <template <typename> class Pass, typename T, int V>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const typename Pass<Accumulate<T>>::Params p, const Tiling tiling,
                 const Accumulate<T>* partials) {
  using A = Accumulate<T>;
  using P = Pass<A>;
  constexpr bool kWithTangent = P::kWithTangent;
  if (P::kExtraBlocks > 0 && blockIdx.x == 0) {
    P::extra_block(p, tiling, partials);
    return;
  }
  const auto *grad = static_cast<const T*>(p.grad), *tangent = static_cast<const T*>(P::tangent(p));
  auto* const out = static_cast<T*>(p.grad_grad);
  const int64_t block = blockIdx.x - P::kExtraBlocks, blocks = gridDim.x - P::kExtraBlocks;
  for (int64_t task = block * kWarps + threadIdx.x / kWarp; task < tiling.tasks;
       task += blocks * kWarps) {
    const Span s = span_of<T, V>(p, tiling, task);
    A f, g;
    P::factors(p, tiling, partials, s.n, f, g);
    apply<V, kWithTangent>(grad, f, tangent, g, out, s.vectors, s.vectors_end);
    if (V > 1) {
      apply<1, kWithTangent>(grad, f, tangent, g, out, s.begin, s.vectors);
      apply<1, kWithTangent>(grad, f, tangent, g, out, s.vectors_end,
                             GK_MUTANT(penalty_tail, s.end, 0));
    }
  }
}

unsigned int blocks_for(const Tiling& t) {
  return static_cast<unsigned int>(std::min(ceil_div(t.tasks, kWarps), kMaxBlocks));
}

// The passes of one storage type, in accesses of V elements.
template <typename T, int V>
struct Run {
  using A = Accumulate<T>;
  const Tiling& tiling;
  A* partials;
  cudaStream_t stream;

  template <bool kSquare>
  const char* dot(const GradientNormPenalty& p, const void* other) const {
    if (tiling.tasks == 0) return nullptr;
    return launch(dot_kernel<T, V, kSquare>, dim3(blocks_for(tiling)), dim3(kThreads), 0, stream, p,
                  tiling, other, partials);
  }

  template <template <typename> class Pass>
  const char* apply(const typename Pass<A>::Params& p) const {
    const unsigned int blocks = Pass<A>::kExtraBlocks + blocks_for(tiling);
    if (blocks == 0) return nullptr;
    return launch(apply_kernel<Pass, T, V>, dim3(blocks), dim3(kThreads), 0, stream, p, tiling,
                  partials);
  }

  const char* pass(const GradientNormPenaltyForward& p) const {
    if (const char* error = dot<true>(p, nullptr)) return error;
    int lanes = 1;
    while (lanes < kWarp && lanes < tiling.parts) lanes *= 2;
    const int64_t threads = ceil_div(p.n * lanes, kWarp) * kWarp;
    const auto block = std::min<int64_t>(std::max<int64_t>(kWarp, threads), kFinishThreads);
    return launch(finish_kernel<A>, dim3(1), dim3(static_cast<unsigned int>(block)), 0, stream, p,
                  tiling, lanes, partials);
  }

  const char* pass(const GradientNormPenaltyBackward& p) const { return apply<Backward>(p); }

  const char* pass(const GradientNormPenaltyDoubleBackward& p) const {
    if (const char* error = dot<false>(p, p.tangent)) return error;
    return apply<DoubleBackward>(p);
  }
};

template <typename T, typename Params>
const char* run(const Params& p, const Tiling& tiling, bool aligned, void* scratch,
                cudaStream_t stream) {
  auto* const partials = static_cast<Accumulate<T>*>(scratch);
  // A single tensor is always aligned with itself.
  if constexpr (!std::is_same_v<Params, GradientNormPenaltyForward>) {
    if (!aligned) return Run<T, 1>{tiling, partials, stream}.pass(p);
  }
  return Run<T, 16 / sizeof(T)>{tiling, partials, stream}.pass(p);
}

// `others`: the tensors other than grad. If all of them have the same offset from a multiple of 16
// bytes, only the ends of a part are accessed one by one, whatever the alignment of its sample.
template <typename Params>
const char* run_pass(const Params& p, std::initializer_list<const void*> others, void* scratch,
                     int device, void* stream_pointer) {
  const Tiling tiling = make_tiling(p, device);
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  bool aligned = true;
  for (const void* other : others) {
    const auto distance = reinterpret_cast<uintptr_t>(other) - reinterpret_cast<uintptr_t>(p.grad);
    aligned = aligned && distance % GK_MUTANT(penalty_alignment, 16, 2) == 0;
  }
  return with_type(p.dtype, [&](auto type) {
    return run<typename decltype(type)::type>(p, tiling, aligned, scratch, stream);
  });
}

}  // namespace gradient_norm_penalty

using namespace gradient_norm_penalty;

int64_t scratch_bytes(const GradientNormPenalty& p, int device) {
  return make_tiling(p, device).tasks * (p.dtype == DType::kFloat64 ? 8 : 4);
}

const char* gradient_norm_penalty_forward(const GradientNormPenaltyForward& p, void* scratch,
                                          int device, void* stream) {
  return run_pass(p, {}, scratch, device, stream);
}

const char* gradient_norm_penalty_backward(const GradientNormPenaltyBackward& p, void* scratch,
                                           int device, void* stream) {
  return run_pass(p, {p.grad_grad}, scratch, device, stream);
}

const char* gradient_norm_penalty_double_backward(const GradientNormPenaltyDoubleBackward& p,
                                                  void* scratch, int device, void* stream) {
  return run_pass(p, {p.tangent, p.grad_grad}, scratch, device, stream);
}

}  // namespace gankernels::cuda
