// The kernel of all passes of batch_norm_leaky_relu, in both memory layouts.
#pragma once

#include "../../batch_norm_leaky_relu.h"
#include "../../mutant.h"
#include "../reduce.h"
#include "../vector.h"
#include "passes.h"
#include "walk.h"

namespace gankernels::cuda::batch_norm_leaky_relu {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

enum class Stage { kReduce, kApply, kReduceAndApply };

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// Calls f with `value` as a constant.
template <typename F>
__device__ inline void dispatch_bool(bool value, const F& f) {
  if (value) {
    f(Constant<true>{});
  } else {
    f(Constant<false>{});
  }
}

template <typename Op>
GK_HOST_DEVICE inline bool writes_elements(const typename Op::Params& p) {
  for (int o = 0; o < Op::kOutputs; ++o) {
    if (Op::output(p, o) != nullptr) return true;
  }
  return false;
}

template <typename Op, typename T, bool kActivationFirst, int V, bool kChannelsLast, int kLanes>
__device__ inline void apply(const typename Op::Params& p, Walk<V, kChannelsLast> walk,
                             const typename Op::Coefficients (&coefficients)[kLanes]) {
  while (!walk.done()) {
    const Batch<Op, T, V> batch(walk, p);
#pragma unroll
    for (int u = 0; u < batch.kUnroll; ++u) {
      if (u >= batch.valid) break;
      Vector<T, V> out[Op::kOutputs];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        T from[Op::kInputs], to[Op::kOutputs];
#pragma unroll
        for (int i = 0; i < Op::kInputs; ++i) from[i] = batch.in[u][i].values[j];
        Op::template apply<kActivationFirst>(coefficients[j % kLanes], from, to, p);
#pragma unroll
        for (int o = 0; o < Op::kOutputs; ++o) out[o].values[j] = to[o];
      }
#pragma unroll
      for (int o = 0; o < Op::kOutputs; ++o) {
        T* const tensor = static_cast<T*>(Op::output(p, o));
        const bool wanted = GK_MUTANT(norm_unwritten_vector, tensor != nullptr,
                                      tensor != nullptr && batch.offset[u] != V);
        if (wanted) store<V>(tensor + batch.offset[u], out[o]);
      }
    }
  }
}

// __launch_bounds__: two blocks to a multiprocessor leave a thread 128 registers, enough for all.
template <typename Op, typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 2)
    kernel(const typename Op::Params p, const Tiling tiling, typename Op::Accumulator* partials,
           const Stage stage) {
  using A = typename Op::Accumulator;
  constexpr int kLanes = kChannelsLast ? V : 1;
  constexpr int kMaxColumns = kChannelsLast ? kWarp : 1;
  __shared__ Sums<A, Op::kSums> shared[kWarps * kMaxColumns * kLanes];

  const int columns = tiling.channel_threads, rows = blockDim.x / columns;
  const int column = threadIdx.x % columns, row = threadIdx.x / columns;
  const int part = blockIdx.x / tiling.tiles;
  const int64_t c = static_cast<int64_t>(blockIdx.x % tiling.tiles * columns + column) * kLanes;
  // A thread beyond the last channel only takes part in the barriers.
  const bool inside = c < p.c;
  GK_MUTANT_ADDS(norm_idle_threads_leave, if (!inside) return);

  Normalization<A> channel[kLanes] = {};
#pragma unroll
  for (int l = 0; l < kLanes; ++l) {
    if (inside) channel[l] = Op::prepare(p, c + l);
  }

  const int64_t begin = part * tiling.positions_per_part + row;
  const int64_t end = min(tiling.positions, (part + 1) * tiling.positions_per_part);
  const int64_t length = GK_MUTANT(norm_one_position_more, end - begin, end - begin + 1);
  const int count = inside ? static_cast<int>(length) : 0;  // not positive: nothing to do
  const Walk<V, kChannelsLast> walk(tiling, kChannelsLast ? c : c * p.s, begin, count, rows);
  // The k-th sum of a part of channel c + l, laid out so that neighboring threads access neighbors.
  const auto partial = [&](int l, int k, int64_t of_part) -> A& {
    const int64_t at = GK_MUTANT(norm_scratch_overrun, of_part, of_part + 4);
    return partials[kChannelsLast ? (at * Op::kSums + k) * p.c + c + l
                                  : ((c + l) * Op::kSums + k) * tiling.parts + of_part];
  };

  Sums<A, Op::kSums> sums[kLanes] = {};
  if (Op::reduces(p)) {
    if (stage == Stage::kApply) {
      const int parts = GK_MUTANT(norm_last_part, tiling.parts, tiling.parts - 1);
      for (int from = row; inside && from < parts; from += rows) {
#pragma unroll
        for (int l = 0; l < kLanes; ++l) {
          Sums<A, Op::kSums> other;
#pragma unroll
          for (int k = 0; k < Op::kSums; ++k) other.value[k] = partial(l, k, from);
          sums[l] = Op::merge(sums[l], other);
        }
      }
    } else {
      dispatch_bool(p.activation_first, [&](auto first) {
        for (auto w = walk; !w.done();) {
          const Batch<Op, T, V> batch(w, p);
          Op::template reduce<decltype(first)::value>(sums, batch.in, batch.valid, channel, p);
        }
      });
    }
    block_reduce<Op>(sums, columns, shared);
  }
  if (!inside) return;

  if (stage == Stage::kReduce) {
    if (row != 0) return;
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
#pragma unroll
      for (int k = 0; k < Op::kSums; ++k) partial(l, k, part) = sums[l].value[k];
    }
    return;
  }

  typename Op::Coefficients coefficients[kLanes];
#pragma unroll
  for (int l = 0; l < kLanes; ++l) {
    coefficients[l] = Op::finish(p, c + l, sums[l], channel[l], part == 0 && row == 0);
  }
  if (!writes_elements<Op>(p)) return;
  dispatch_bool(p.activation_first,
                [&](auto first) { apply<Op, T, decltype(first)::value>(p, walk, coefficients); });
}

}  // namespace gankernels::cuda::batch_norm_leaky_relu
