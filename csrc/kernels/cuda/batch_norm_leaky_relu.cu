// CUDA kernels of batch_norm_leaky_relu: forward, backward, double backward, running statistics.
//
// One kernel template serves all three passes and both memory layouts. A pass first reduces over
// each channel, then writes its elementwise results:
//
//   kReduceAndApply   one launch; a block owns whole channels. For channels of little data.
//   kReduce, kApply   two launches; a channel's data is divided among `parts` blocks. The first
//                     launch leaves each part's sums in `partials`; in the second every block
//                     merges those of its own channels, always in the same order.
//
// Bytes moved by two launches, in sizes of x, and the floor for tensors that do not fit on the chip
// (where one does, the second reading comes from a cache, or from L1 in kReduceAndApply):
//
//                     kReduce reads   kApply reads + writes    sum   floor if read once
//   forward           x               x + y                     3     2
//   backward          x, gy           x, gy + gx                5     3
//   double backward   x, gy, ggx      x, gy, ggx + ggy, gx      8     5
//
// Without a reduction (evaluation, or statistics and sums given) kApply alone runs: the floor.

#include <math.h>

#include <algorithm>

#include "../batch_norm_leaky_relu.h"
#include "../batch_norm_leaky_relu_math.h"
#include "launch.h"
#include "reduce.h"
#include "vector.h"

namespace gankernels::cuda {

// Names like these recur in other files, and a class has to be the same wherever it is linked.
namespace batch_norm_leaky_relu {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxSums = 5;

// Blocks that fill a multiprocessor a few times over, so that one late block costs little.
constexpr int64_t kBlocksPerMultiprocessor = 8;
// A block that owns whole channels reads at most this much of x; more is divided into parts of
// half.
constexpr int64_t kBytesPerBlock = 64 * 1024;
// In a part of a channel; 32 bits hold it with room to spare.
constexpr int64_t kMaxPositions = int64_t{1} << 29;

enum class Stage { kReduce, kApply, kReduceAndApply };

// How the elements are divided among blocks and threads. A channel is a sequence of positions, each
// a vector of V elements: along the channel's runs of s elements in (n, c, s) order, and one row of
// V neighbouring channels in channels-last order.
struct Tiling {
  int64_t positions;           // in a channel
  int64_t positions_per_part;  // part p has those from p * positions_per_part on
  int64_t run;                 // positions that follow each other in memory; channels-last: 1
  int64_t run_stride;          // elements from the start of one run to that of the next
  int parts;
  int tiles;            // of channels
  int channel_threads;  // threads side by side over the channels of a tile, a power of two <= 32
  int threads;
};

// One thread's way through a part: `count` positions, the first `begin`, every `stride`-th of which
// is visited, at offset() elements into the tensors. Divides at the start only, and counts in 32
// bits, since a part has at most kMaxPositions: of a longer run it never sees the end.
template <int V, bool kChannelsLast>
class Walk {
 public:
  __device__ Walk(const Tiling& t, int64_t first_element, int64_t begin, int count, int stride)
      : left_(count), stride_(stride) {
    if constexpr (kChannelsLast) {
      offset_ = first_element + begin * t.run_stride;
      stride_elements_ = stride * t.run_stride;
    } else {
      const int64_t column = begin % t.run;
      offset_ = first_element + begin / t.run * t.run_stride + column * V;
      run_ = static_cast<int>(min(t.run, kMaxPositions));
      left_in_run_ = static_cast<int>(min(t.run - column, kMaxPositions));
      stride_in_run_ = stride % run_;
      stride_elements_ = stride / run_ * t.run_stride + stride_in_run_ * V;
      next_run_ = t.run_stride - t.run * V;
    }
  }

  __device__ bool done() const { return left_ <= 0; }
  __device__ int64_t offset() const { return offset_; }

  __device__ void advance() {
    left_ -= stride_;
    offset_ += stride_elements_;
    if constexpr (!kChannelsLast) {
      left_in_run_ -= stride_in_run_;
      if (left_in_run_ <= 0) {
        left_in_run_ += run_;
        offset_ += next_run_;
      }
    }
  }

 private:
  int64_t offset_, stride_elements_;
  int left_, stride_;
  int64_t next_run_;  // from here on: not in channels-last order
  int run_, left_in_run_, stride_in_run_;
};

// In a row of (R, C), or with one channel only, both layouts are the same.
GK_HOST_DEVICE inline bool is_channels_last(const BatchNormLeakyReLU& p) {
  return p.c > 1 && (p.channels_last || p.s == 1);
}

// Per channel: what turns x into z, and the factors it is made of.
template <typename A>
struct Normalization {
  A mean, invstd, weight, scale, shift;
};

template <typename A>
__device__ inline Normalization<A> normalization(const BatchNormLeakyReLU& p, int64_t c, A mean,
                                                 A var) {
  const A weight = p.weight ? load_as<A>(p.weight, p.parameter_dtype, c) : A(1);
  const A bias = p.bias ? load_as<A>(p.bias, p.parameter_dtype, c) : A(0);
  const A invstd = A(1) / sqrt(var + static_cast<A>(p.eps));
  return {mean, invstd, weight, weight * invstd, bias};
}

template <typename A>
__device__ inline Normalization<A> saved_normalization(const BatchNormLeakyReLU& p, int64_t c) {
  const A* statistics = static_cast<const A*>(p.statistics);
  return normalization(p, c, statistics[c], statistics[p.c + c]);
}

template <typename A, int K>
__device__ inline Sums<A, K> saved_sums(const void* sums, int64_t channels, int64_t c) {
  Sums<A, K> saved = {};
  if (sums == nullptr) return saved;
#pragma unroll
  for (int k = 0; k < K; ++k) saved.value[k] = static_cast<const A*>(sums)[k * channels + c];
  return saved;
}

template <typename A, int K>
__device__ inline void save_sums(const Sums<A, K>& sums, void* to, int64_t channels, int64_t c) {
  if (to == nullptr) return;
#pragma unroll
  for (int k = 0; k < K; ++k) static_cast<A*>(to)[k * channels + c] = sums.value[k];
}

// The passes. Each names the tensors it reads and writes, says what is summed over a channel
// (reduce), what follows from the sums (finish) and what is computed from them (apply).
//
// reduce() gets `valid` <= kUnroll positions of V elements. Its accumulators are one per thread, or
// in channels-last order (kLanes == V) one per element of the vector.

template <typename A>
struct Forward {
  using Accumulator = A;
  using Params = BatchNormLeakyReLUForward;
  using Coefficients = ForwardCoefficients<A>;
  static constexpr int kInputs = 1, kOutputs = 1, kSums = 3, kBytesInFlight = 64;
  // Elements, their mean as a distance from the pivot, sum of squared distances from the mean.
  using S = Sums<A, kSums>;

  GK_HOST_DEVICE static bool reduces(const Params& p) { return p.compute_statistics; }
  GK_HOST_DEVICE static const void* input(const Params& p, int) { return p.x; }
  GK_HOST_DEVICE static void* output(const Params& p, int) { return p.y; }
  static bool has_result(const Params& p) { return p.y || p.compute_statistics; }

  // Chan, Golub & LeVeque 1983. Does not cancel, however far the mean is from zero.
  __device__ static S merge(const S& a, const S& b) {
    const A count = a.value[0] + b.value[0];
    const A share = b.value[0] > 0 ? b.value[0] / count : A(0);
    const A distance = b.value[1] - a.value[1];
    return {{count, a.value[1] + distance * share,
             a.value[2] + b.value[2] + distance * distance * a.value[0] * share}};
  }

  // The pivot, in place of the mean: the channel's first element. Distances from it are exact where
  // the deviations are small beside the mean, when a float32 could not hold the mean itself well
  // enough. As one of n values it is at most sqrt(n) deviations away, so it never does much harm.
  __device__ static Normalization<A> prepare(const Params& p, int64_t c) {
    if (!p.compute_statistics || p.n * p.s == 0) return {};
    const A first = load_as<A>(p.x, p.dtype, is_channels_last(p) ? c : c * p.s);
    const A slope = p.activation_first ? static_cast<A>(p.negative_slope) : A(1);
    return {leaky_relu(first, slope), A(0), A(0), A(0), A(0)};
  }

  // Two passes over the values at hand, which are in registers, then Chan's formula.
  template <bool kActivationFirst, typename T, int V, int kUnroll, int kLanes>
  __device__ static void reduce(S (&sums)[kLanes], const Vector<T, V> (&in)[kUnroll][kInputs],
                                int valid, const Normalization<A> (&pivot)[kLanes],
                                const Params& p) {
    const A slope = kActivationFirst ? static_cast<A>(p.negative_slope) : A(1);
    const A count = static_cast<A>(valid * (V / kLanes));
    S batch[kLanes] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A value = leaky_relu(accumulator(in[u][0].values[j]), slope) - pivot[j % kLanes].mean;
        batch[j % kLanes].value[1] += u < valid ? value : A(0);
      }
    }
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
      batch[l].value[0] = count;
      batch[l].value[1] /= count;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A value = leaky_relu(accumulator(in[u][0].values[j]), slope) - pivot[j % kLanes].mean;
        const A distance = u < valid ? value - batch[j % kLanes].value[1] : A(0);
        batch[j % kLanes].value[2] += distance * distance;
      }
    }
#pragma unroll
    for (int l = 0; l < kLanes; ++l) sums[l] = merge(sums[l], batch[l]);
  }

  __device__ static Coefficients finish(const Params& p, int64_t c, const S& sums,
                                        const Normalization<A>& pivot, bool write) {
    Sums<A, 2> statistics;
    if (p.compute_statistics) {
      const A var = sums.value[2] / static_cast<A>(p.n * p.s);
      const A mean = sums.value[0] > 0 ? pivot.mean + sums.value[1] : var;  // of nothing: 0 / 0
      statistics = {{mean, var}};
      if (write) save_sums(statistics, p.statistics, p.c, c);
    } else {
      statistics = saved_sums<A, 2>(p.statistics, p.c, c);
    }
    const auto channel = normalization(p, c, statistics.value[0], statistics.value[1]);
    return {channel.mean, channel.scale, channel.shift};
  }

  template <bool kActivationFirst, typename T>
  __device__ static void apply(const Coefficients& k, const T (&in)[kInputs], T (&out)[kOutputs],
                               const Params& p) {
    out[0] = element<T>(chain(accumulator(in[0]), k.mean, k.scale, k.shift,
                              static_cast<A>(p.negative_slope), kActivationFirst)
                            .y());
  }
};

template <typename A>
struct Backward {
  using Accumulator = A;
  using Params = BatchNormLeakyReLUBackward;
  struct Coefficients {
    Normalization<A> channel;
    BackwardCoefficients<A> backward;
  };
  static constexpr int kInputs = 2, kOutputs = 1, kSums = 2, kBytesInFlight = 32;
  using S = Sums<A, kSums>;  // g, g * xhat; until finish() without xhat's factor invstd

  GK_HOST_DEVICE static bool reduces(const Params& p) { return p.compute_sums; }
  GK_HOST_DEVICE static const void* input(const Params& p, int i) {
    return i == 0 ? p.x : p.grad_y;
  }
  GK_HOST_DEVICE static void* output(const Params& p, int) { return p.grad_x; }
  static bool has_result(const Params& p) { return p.grad_x || (p.compute_sums && p.sums); }

  __device__ static S merge(const S& a, const S& b) { return Add::merge(a, b); }

  __device__ static Normalization<A> prepare(const Params& p, int64_t c) {
    return saved_normalization<A>(p, c);
  }

  template <bool kActivationFirst, typename T, int V, int kUnroll, int kLanes>
  __device__ static void reduce(S (&sums)[kLanes], const Vector<T, V> (&in)[kUnroll][kInputs],
                                int valid, const Normalization<A> (&channel)[kLanes],
                                const Params& p) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= valid) break;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const Normalization<A>& k = channel[j % kLanes];
        const auto e = chain(accumulator(in[u][0].values[j]), k.mean, k.scale, k.shift,
                             static_cast<A>(p.negative_slope), kActivationFirst);
        const A g = e.times_dy_dz(accumulator(in[u][1].values[j]));
        S& sum = sums[j % kLanes];
        sum.value[0] += g;
        sum.value[1] += g * e.centred;
      }
    }
  }

  __device__ static Coefficients finish(const Params& p, int64_t c, S sums,
                                        const Normalization<A>& channel, bool write) {
    if (p.compute_sums) {
      sums.value[1] *= channel.invstd;
      if (write) save_sums(sums, p.sums, p.c, c);
    } else {
      sums = saved_sums<A, kSums>(p.sums, p.c, c);
    }
    return {channel, backward_coefficients(channel.weight, channel.invstd, sums.value[0],
                                           sums.value[1], static_cast<A>(p.count), p.training)};
  }

  template <bool kActivationFirst, typename T>
  __device__ static void apply(const Coefficients& k, const T (&in)[kInputs], T (&out)[kOutputs],
                               const Params& p) {
    const auto e = chain(accumulator(in[0]), k.channel.mean, k.channel.scale, k.channel.shift,
                         static_cast<A>(p.negative_slope), kActivationFirst);
    const A g = e.times_dy_dz(accumulator(in[1]));
    const BackwardCoefficients<A>& b = k.backward;
    out[0] = element<T>(e.times_du_dx(g * b.g + e.centred * b.centred + b.constant));
  }
};

template <typename A>
struct DoubleBackward {
  using Accumulator = A;
  using Params = BatchNormLeakyReLUDoubleBackward;
  struct Coefficients {
    Normalization<A> channel;
    DoubleBackwardCoefficients<A> backward;
  };
  static constexpr int kInputs = 3, kOutputs = 2, kSums = kMaxSums, kBytesInFlight = 32;
  // g, g * xhat, v, v * xhat, v * g; until finish() without xhat's factor invstd
  using S = Sums<A, kSums>;

  GK_HOST_DEVICE static bool reduces(const Params& p) { return p.compute_sums; }
  GK_HOST_DEVICE static const void* input(const Params& p, int i) {
    return i == 0 ? p.x : i == 1 ? p.grad_y : p.grad_grad_x;
  }
  GK_HOST_DEVICE static void* output(const Params& p, int i) {
    return i == 0 ? p.grad_grad_y : p.grad_x;
  }
  static bool has_result(const Params& p) {
    return p.grad_grad_y || p.grad_x || p.grad_weight || (p.compute_sums && p.sums);
  }

  __device__ static S merge(const S& a, const S& b) { return Add::merge(a, b); }

  __device__ static Normalization<A> prepare(const Params& p, int64_t c) {
    return saved_normalization<A>(p, c);
  }

  template <bool kActivationFirst, typename T, int V, int kUnroll, int kLanes>
  __device__ static void reduce(S (&sums)[kLanes], const Vector<T, V> (&in)[kUnroll][kInputs],
                                int valid, const Normalization<A> (&channel)[kLanes],
                                const Params& p) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= valid) break;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const Normalization<A>& k = channel[j % kLanes];
        const auto e = chain(accumulator(in[u][0].values[j]), k.mean, k.scale, k.shift,
                             static_cast<A>(p.negative_slope), kActivationFirst);
        const A g = e.times_dy_dz(accumulator(in[u][1].values[j]));
        const A v = e.times_du_dx(accumulator(in[u][2].values[j]));
        S& sum = sums[j % kLanes];
        sum.value[0] += g;
        sum.value[1] += g * e.centred;
        sum.value[2] += v;
        sum.value[3] += v * e.centred;
        sum.value[4] += v * g;
      }
    }
  }

  __device__ static Coefficients finish(const Params& p, int64_t c, S sums,
                                        const Normalization<A>& channel, bool write) {
    if (p.compute_sums) {
      sums.value[1] *= channel.invstd;
      sums.value[3] *= channel.invstd;
      if (write) save_sums(sums, p.sums, p.c, c);
    } else {
      sums = saved_sums<A, kSums>(p.sums, p.c, c);
    }
    const A ggw = p.grad_grad_weight ? static_cast<const A*>(p.grad_grad_weight)[c] : A(0);
    const A ggb = p.grad_grad_bias ? static_cast<const A*>(p.grad_grad_bias)[c] : A(0);
    A grad_weight;
    const auto coefficients = double_backward_coefficients(
        channel.weight, channel.invstd, sums.value[0], sums.value[1], sums.value[2], sums.value[3],
        sums.value[4], ggw, ggb, static_cast<A>(p.count), p.training, &grad_weight);
    if (write) save_sums(Sums<A, 1>{{grad_weight}}, p.grad_weight, p.c, c);
    return {channel, coefficients};
  }

  template <bool kActivationFirst, typename T>
  __device__ static void apply(const Coefficients& k, const T (&in)[kInputs], T (&out)[kOutputs],
                               const Params& p) {
    const auto e = chain(accumulator(in[0]), k.channel.mean, k.channel.scale, k.channel.shift,
                         static_cast<A>(p.negative_slope), kActivationFirst);
    const A g = e.times_dy_dz(accumulator(in[1]));
    const A v = e.times_du_dx(accumulator(in[2]));
    const DoubleBackwardCoefficients<A>& b = k.backward;
    out[0] = element<T>(e.times_dy_dz(v * b.y_v + e.centred * b.y_centred + b.y_constant));
    out[1] =
        element<T>(e.times_du_dx(g * b.x_g + v * b.x_v + e.centred * b.x_centred + b.x_constant));
  }
};

template <typename Op, typename T, int V>
struct Batch {
  static constexpr int kVectors = Op::kBytesInFlight / (V * sizeof(T));
  static constexpr int kUnroll = kVectors < 8 ? kVectors : 8;

  Vector<T, V> in[kUnroll][Op::kInputs];
  int64_t offset[kUnroll];
  int valid;  // positions that exist; the others are zeros

  // Loads the next positions of every input, all of them on their way at once.
  template <bool kChannelsLast>
  __device__ Batch(Walk<V, kChannelsLast>& walk, const typename Op::Params& p) : valid(0) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool inside = !walk.done();
      valid += inside;
      offset[u] = walk.offset();
#pragma unroll
      for (int i = 0; i < Op::kInputs; ++i) {
        in[u][i] = {};
        if (inside) in[u][i] = load<V>(static_cast<const T*>(Op::input(p, i)) + offset[u]);
      }
      walk.advance();
    }
  }
};

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
        if (tensor != nullptr) store<V>(tensor + batch.offset[u], out[o]);
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
  const bool inside = c < p.c;  // or a thread beyond the last channel, for the barriers only

  Normalization<A> channel[kLanes] = {};
#pragma unroll
  for (int l = 0; l < kLanes; ++l) {
    if (inside) channel[l] = Op::prepare(p, c + l);
  }

  const int64_t begin = part * tiling.positions_per_part + row;
  const int64_t end = min(tiling.positions, (part + 1) * tiling.positions_per_part);
  const int count = inside ? static_cast<int>(end - begin) : 0;  // not positive: nothing to do
  const Walk<V, kChannelsLast> walk(tiling, kChannelsLast ? c : c * p.s, begin, count, rows);

  // The k-th sum of a part of channel c + l, laid out so that neighbouring threads find neighbours.
  const auto partial = [&](int l, int k, int64_t of_part) -> A& {
    return partials[kChannelsLast ? (of_part * Op::kSums + k) * p.c + c + l
                                  : ((c + l) * Op::kSums + k) * tiling.parts + of_part];
  };

  Sums<A, Op::kSums> sums[kLanes] = {};
  if (Op::reduces(p)) {
    if (stage == Stage::kApply) {
      for (int from = row; inside && from < tiling.parts; from += rows) {
#pragma unroll
        for (int l = 0; l < kLanes; ++l) {
          Sums<A, Op::kSums> other;
#pragma unroll
          for (int k = 0; k < Op::kSums; ++k) other.value[k] = partial(l, k, from);
          sums[l] = Op::merge(sums[l], other);
        }
      }
    } else if (p.activation_first) {
      for (auto w = walk; !w.done();) {
        const Batch<Op, T, V> batch(w, p);
        Op::template reduce<true>(sums, batch.in, batch.valid, channel, p);
      }
    } else {
      for (auto w = walk; !w.done();) {
        const Batch<Op, T, V> batch(w, p);
        Op::template reduce<false>(sums, batch.in, batch.valid, channel, p);
      }
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
  if (p.activation_first) {
    apply<Op, T, true>(p, walk, coefficients);
  } else {
    apply<Op, T, false>(p, walk, coefficients);
  }
}

inline int round_up_to_power_of_two(int64_t value, int limit) {
  int power = 1;
  while (power < value && power < limit) power *= 2;
  return power;
}

// `vector` elements to an access. parts == 1 means kReduceAndApply.
Tiling make_tiling(const BatchNormLeakyReLU& p, int vector, int64_t multiprocessors) {
  const bool channels_last = is_channels_last(p);
  const int64_t size = size_of(p.dtype);
  Tiling t = {};
  int64_t tile_channels = 1;
  t.channel_threads = 1;
  if (channels_last) {
    t.positions = p.n * p.s;
    t.run = 1;
    t.run_stride = p.c;
    // The threads that share a row read 128 neighbouring bytes of it, as far as it goes.
    const int limit = static_cast<int>(std::min<int64_t>(kWarp, 128 / (size * vector)));
    t.channel_threads = round_up_to_power_of_two(ceil_div(p.c, vector), limit);
    tile_channels = static_cast<int64_t>(t.channel_threads) * vector;
  } else {
    const bool one_run = p.c == 1;
    t.run = (one_run ? p.n * p.s : p.s) / vector;
    t.positions = one_run ? t.run : p.n * t.run;
    t.run = std::max<int64_t>(1, t.run);  // is divided by
    t.run_stride = p.c * p.s;
  }
  t.tiles = static_cast<int>(ceil_div(p.c, tile_channels));
  const int64_t bytes = p.n * p.s * std::min(p.c, tile_channels) * size;
  int64_t parts = 1;
  if (bytes > kBytesPerBlock) {
    parts = std::min(multiprocessors * kBlocksPerMultiprocessor / t.tiles,
                     ceil_div(bytes, kBytesPerBlock / 2));
  }
  parts =
      std::max({int64_t{1}, std::min(parts, t.positions), ceil_div(t.positions, kMaxPositions)});
  t.positions_per_part = std::max<int64_t>(1, ceil_div(t.positions, parts));
  t.parts = static_cast<int>(std::max<int64_t>(1, ceil_div(t.positions, t.positions_per_part)));
  const int rows = round_up_to_power_of_two(t.positions_per_part, kThreads / t.channel_threads);
  t.threads = std::max(kWarp, t.channel_threads * rows);
  return t;
}

template <typename Op, typename T, int V, bool kChannelsLast>
const char* run(const typename Op::Params& p, void* scratch, int device, cudaStream_t stream) {
  const Tiling tiling = make_tiling(p, V, multiprocessors(device));
  auto* const partials = static_cast<typename Op::Accumulator*>(scratch);
  const auto start = [&](Stage stage, int parts) {
    return launch(kernel<Op, T, V, kChannelsLast>, dim3(tiling.tiles * parts), dim3(tiling.threads),
                  0, stream, p, tiling, partials, stage);
  };

  if (Op::reduces(p) && tiling.parts == 1) return start(Stage::kReduceAndApply, 1);
  if (Op::reduces(p)) {
    if (const char* error = start(Stage::kReduce, tiling.parts)) return error;
  }
  // Without elementwise results one block per tile is enough for the channels' own.
  return start(Stage::kApply, writes_elements<Op>(p) ? tiling.parts : 1);
}

// The widest access that every tensor's address and the length of its runs allow.
template <typename Op, typename T>
const char* run_widest(const typename Op::Params& p, void* scratch, int device,
                       cudaStream_t stream) {
  uintptr_t addresses = 0;
  for (int i = 0; i < Op::kInputs; ++i) addresses |= reinterpret_cast<uintptr_t>(Op::input(p, i));
  for (int o = 0; o < Op::kOutputs; ++o) addresses |= reinterpret_cast<uintptr_t>(Op::output(p, o));
  const bool channels_last = is_channels_last(p);
  const int64_t run_length = channels_last ? p.c : p.c == 1 ? p.n * p.s : p.s;
  const auto fits = [&](int vector) {
    return run_length % vector == 0 && addresses % (vector * sizeof(T)) == 0;
  };
  constexpr int kWidest = 16 / sizeof(T);
  // Channels-last needs coefficients for each element of the vector: 8 of them fill the registers.
  constexpr int kMedium = std::min(kWidest, 4);
  if (channels_last) {
    if (fits(kMedium)) return run<Op, T, kMedium, true>(p, scratch, device, stream);
    return run<Op, T, 1, true>(p, scratch, device, stream);
  }
  if (fits(kWidest)) return run<Op, T, kWidest, false>(p, scratch, device, stream);
  if (kMedium != kWidest && fits(kMedium)) {
    return run<Op, T, kMedium, false>(p, scratch, device, stream);
  }
  return run<Op, T, 1, false>(p, scratch, device, stream);
}

template <template <typename> class Pass>
const char* run_pass(const typename Pass<float>::Params& p, void* scratch, int device,
                     void* stream_pointer) {
  if (p.c == 0 || !Pass<float>::has_result(p)) return nullptr;
  if (p.c > (int64_t{1} << 30)) return "batch_norm_leaky_relu: more than 2^30 channels";
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  switch (p.dtype) {
    case DType::kFloat32:
      return run_widest<Pass<float>, float>(p, scratch, device, stream);
    case DType::kFloat64:
      return run_widest<Pass<double>, double>(p, scratch, device, stream);
    case DType::kBFloat16:
      return run_widest<Pass<float>, __nv_bfloat16>(p, scratch, device, stream);
    case DType::kFloat16:
      return run_widest<Pass<float>, __half>(p, scratch, device, stream);
  }
  return "batch_norm_leaky_relu: unknown dtype";
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
  __syncthreads();  // every thread has read the number of batches
  if (threadIdx.x == 0 && p.num_batches_tracked) *p.num_batches_tracked = tracked;
}

}  // namespace batch_norm_leaky_relu

using namespace batch_norm_leaky_relu;

int64_t scratch_bytes(const BatchNormLeakyReLU& p, int device) {
  if (p.c == 0) return 0;
  // Before the tensors are known, so is the width of the accesses: the largest need of any.
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
