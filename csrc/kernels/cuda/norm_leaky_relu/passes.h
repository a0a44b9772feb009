// The passes of batch_norm_leaky_relu. Each declares the tensors that it reads and writes, and
// defines the sums over a channel (reduce), the coefficients from these sums (finish) and the
// results of every element (apply).
//
// reduce() gets `valid` <= kUnroll positions of V elements. A thread has one set of sums, or in
// channels-last order (kLanes == V) one for each element of the vector.
#pragma once

#include <math.h>

#include "../../batch_norm_leaky_relu.h"
#include "../../batch_norm_leaky_relu_math.h"
#include "../../mutant.h"
#include "../reduce.h"
#include "../vector.h"
#include "walk.h"

namespace gankernels::cuda::batch_norm_leaky_relu {

// A channel's map from x to z, and the factors that it is made of.
template <typename A>
struct Normalization {
  A mean, invstd, weight, scale, shift;
};

// affine_index() in 32 bits, since a GPU divides by them much faster, and c is below 2^30.
__device__ inline int64_t parameter_index(const BatchNormLeakyReLU& p, int64_t c) {
  const auto i = static_cast<uint32_t>(c), size = static_cast<uint32_t>(p.affine);
  return GK_MUTANT(norm_affine_index, i % size, i);
}

template <typename A>
__device__ inline Normalization<A> normalization(const BatchNormLeakyReLU& p, int64_t c, A mean,
                                                 A var) {
  const int64_t i = parameter_index(p, c);
  const A weight = p.weight ? load_as<A>(p.weight, p.parameter_dtype, i) : A(1);
  const A bias = p.bias ? load_as<A>(p.bias, p.parameter_dtype, i) : A(0);
  const A invstd = A(1) / sqrt(var + static_cast<A>(p.eps));
  return {mean, invstd, weight, weight * invstd, bias};
}

template <bool kActivationFirst, typename T, typename A>
__device__ inline Chain<A, A> chain_of(const BatchNormLeakyReLU& p, T x,
                                       const Normalization<A>& k) {
  return chain(accumulator(x), k.mean, k.scale, k.shift, static_cast<A>(p.negative_slope),
               kActivationFirst);
}

// K rows of one number per channel: from memory, or zeros if there are none.
template <typename A, int K>
__device__ inline Sums<A, K> load_sums(const void* sums, int64_t channels, int64_t c) {
  Sums<A, K> saved = {};
  if (sums == nullptr) return saved;
#pragma unroll
  for (int k = 0; k < K; ++k) saved.value[k] = static_cast<const A*>(sums)[k * channels + c];
  return saved;
}

template <typename A, int K>
__device__ inline void store_sums(const Sums<A, K>& sums, void* to, int64_t channels, int64_t c) {
  if (to == nullptr) return;
#pragma unroll
  for (int k = 0; k < K; ++k) static_cast<A*>(to)[k * channels + c] = sums.value[k];
}

template <typename A>
struct Forward {
  using Accumulator = A;
  using Params = BatchNormLeakyReLUForward;
  using Coefficients = ForwardCoefficients<A>;
  static constexpr int kInputs = 1, kOutputs = 1, kBytesInFlight = 64;
  // Number of elements, their mean as a distance from the pivot, squared distances from the mean.
  enum Sum { kCount, kMean, kSquares, kSums };
  using S = Sums<A, kSums>;

  GK_HOST_DEVICE static bool reduces(const Params& p) { return p.compute_statistics; }
  GK_HOST_DEVICE static const void* input(const Params& p, int) { return p.x; }
  GK_HOST_DEVICE static void* output(const Params& p, int) { return p.y; }
  static bool has_result(const Params& p) { return p.y || p.compute_statistics; }

  // Chan, Golub & LeVeque 1983. Does not cancel, however far the mean is from zero.
  __device__ static S merge(const S& a, const S& b) {
    const A count = a.value[kCount] + b.value[kCount];
    const A share = b.value[kCount] > 0 ? b.value[kCount] / count : A(0);
    const A distance = b.value[kMean] - a.value[kMean];
    return {
        {count, a.value[kMean] + distance * share,
         a.value[kSquares] + b.value[kSquares] +
             GK_MUTANT(norm_mean_correction, distance * distance * a.value[kCount] * share, A(0))}};
  }

  // The pivot, as the mean: the channel's first element. Distances from it are exact if the
  // deviations are small compared with the mean, in which case the mean rounded to float32 would
  // not be precise enough. It is one of n values, so at most sqrt(n) standard deviations away from
  // their mean: the loss of accuracy is bounded.
  __device__ static Normalization<A> prepare(const Params& p, int64_t c) {
    if (!p.compute_statistics || p.n * p.s == 0) return {};
    const A first = load_as<A>(p.x, p.dtype, is_channels_last(p) ? c : c * p.s);
    const A slope = p.activation_first ? static_cast<A>(p.negative_slope) : A(1);
    return {leaky_relu(first, slope), A(0), A(0), A(0), A(0)};
  }

  // Two passes over the values, which are in registers, then Chan's formula.
  template <bool kActivationFirst, typename T, int V, int kUnroll, int kLanes>
  __device__ static void reduce(S (&sums)[kLanes], const Vector<T, V> (&in)[kUnroll][kInputs],
                                int valid, const Normalization<A> (&pivot)[kLanes],
                                const Params& p) {
    const A slope = kActivationFirst ? static_cast<A>(p.negative_slope) : A(1);
    const auto from_pivot = [&](int u, int j) {
      return leaky_relu(accumulator(in[u][0].values[j]), slope) - pivot[j % kLanes].mean;
    };
    const A count = static_cast<A>(valid * (V / kLanes));
    S batch[kLanes] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A distance = from_pivot(u, j);
        batch[j % kLanes].value[kMean] += u < valid ? distance : A(0);
      }
    }
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
      batch[l].value[kCount] = count;
      batch[l].value[kMean] /= count;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        S& lane = batch[j % kLanes];
        const A value = from_pivot(u, j);
        const A distance = u < valid ? value - lane.value[kMean] : A(0);
        lane.value[kSquares] += distance * distance;
      }
    }
#pragma unroll
    for (int l = 0; l < kLanes; ++l) sums[l] = merge(sums[l], batch[l]);
  }

  __device__ static Coefficients finish(const Params& p, int64_t c, const S& sums,
                                        const Normalization<A>& pivot, bool write) {
    Sums<A, 2> statistics;
    if (p.compute_statistics) {
      const A var = sums.value[kSquares] / static_cast<A>(p.n * p.s);
      const A center = GK_MUTANT(norm_pivot, pivot.mean, A(0));
      // For an empty channel both are 0 / 0, NaN, as in PyTorch.
      const A mean = sums.value[kCount] > 0 ? center + sums.value[kMean] : var;
      statistics = {{mean, var}};
      if (write) store_sums(statistics, p.statistics, p.c, c);
    } else {
      statistics = load_sums<A, 2>(p.statistics, p.c, c);
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

// The derivatives' sums over a channel, with g = grad_y * dy/dz and v = grad_grad_x * du/dx. The
// backward pass has the first two.
enum Sum { kG, kGXhat, kV, kVXhat, kVG };

// The common base of both derivatives. A pass has kSums of these sums; its add() adds the terms of
// one element.
template <typename Pass, typename P, typename A, int kPassInputs, int kPassSums>
struct Derivative {
  using Accumulator = A;
  using Params = P;
  static constexpr int kInputs = kPassInputs, kSums = kPassSums, kBytesInFlight = 32;
  using S = Sums<A, kSums>;  // until finish(), those of xhat lack its factor invstd

  GK_HOST_DEVICE static bool reduces(const P& p) { return p.compute_sums; }
  GK_HOST_DEVICE static bool wants_sums(const P& p) { return p.compute_sums && p.sums; }

  __device__ static S merge(const S& a, const S& b) { return Add::merge(a, b); }

  __device__ static Normalization<A> prepare(const P& p, int64_t c) {
    const A* const statistics = static_cast<const A*>(p.statistics);
    return normalization(p, c, statistics[c], statistics[p.c + c]);
  }

  template <bool kActivationFirst, typename T, int V, int kUnroll, int kLanes>
  __device__ static void reduce(S (&sums)[kLanes], const Vector<T, V> (&in)[kUnroll][kInputs],
                                int valid, const Normalization<A> (&channel)[kLanes], const P& p) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= valid) break;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        T from[kInputs];
#pragma unroll
        for (int i = 0; i < kInputs; ++i) from[i] = in[u][i].values[j];
        Pass::add(sums[j % kLanes], chain_of<kActivationFirst>(p, from[0], channel[j % kLanes]),
                  from);
      }
    }
  }

  // A channel's sums in full: computed, and then written by one thread, or given.
  __device__ static S finish_sums(const P& p, int64_t c, S sums, const Normalization<A>& channel,
                                  bool write) {
    if (!p.compute_sums) return load_sums<A, kSums>(p.sums, p.c, c);
    sums.value[kGXhat] *= channel.invstd;
    if constexpr (kSums > kVXhat) sums.value[kVXhat] *= channel.invstd;
    if (write) store_sums(sums, p.sums, p.c, c);
    return sums;
  }
};

template <typename A>
struct Backward : Derivative<Backward<A>, BatchNormLeakyReLUBackward, A, 2, kGXhat + 1> {
  using Params = BatchNormLeakyReLUBackward;
  struct Coefficients {
    Normalization<A> channel;
    BackwardCoefficients<A> backward;
  };
  static constexpr int kInputs = 2, kOutputs = 1, kSums = kGXhat + 1;

  GK_HOST_DEVICE static const void* input(const Params& p, int i) {
    return i == 0 ? p.x : p.grad_y;
  }
  GK_HOST_DEVICE static void* output(const Params& p, int) { return p.grad_x; }
  static bool has_result(const Params& p) { return p.grad_x || Backward::wants_sums(p); }

  template <int kMore, typename T, int kMoreInputs>
  __device__ static A add(Sums<A, kMore>& sums, const Chain<A, A>& e, const T (&in)[kMoreInputs]) {
    const A g = e.times_dy_dz(accumulator(in[1]));
    sums.value[kG] += g;
    sums.value[kGXhat] += g * e.centered;
    return g;
  }

  __device__ static Coefficients finish(const Params& p, int64_t c, const Sums<A, kSums>& reduced,
                                        const Normalization<A>& channel, bool write) {
    const Sums<A, kSums> sums = Backward::finish_sums(p, c, reduced, channel, write);
    return {channel,
            backward_coefficients(channel.weight, channel.invstd, sums.value[kG],
                                  sums.value[kGXhat], static_cast<A>(p.count), p.training)};
  }

  template <bool kActivationFirst, typename T>
  __device__ static void apply(const Coefficients& k, const T (&in)[kInputs], T (&out)[kOutputs],
                               const Params& p) {
    const auto e = chain_of<kActivationFirst>(p, in[0], k.channel);
    const A g = e.times_dy_dz(accumulator(in[1]));
    const BackwardCoefficients<A>& b = k.backward;
    out[0] = element<T>(e.times_du_dx(g * b.g + e.centered * b.centered + b.constant));
  }
};

template <typename A>
struct DoubleBackward
    : Derivative<DoubleBackward<A>, BatchNormLeakyReLUDoubleBackward, A, 3, kVG + 1> {
  using Params = BatchNormLeakyReLUDoubleBackward;
  struct Coefficients {
    Normalization<A> channel;
    DoubleBackwardCoefficients<A> backward;
  };
  static constexpr int kInputs = 3, kOutputs = 2, kSums = kVG + 1;

  GK_HOST_DEVICE static const void* input(const Params& p, int i) {
    return i == 0 ? p.x : i == 1 ? p.grad_y : p.grad_grad_x;
  }
  GK_HOST_DEVICE static void* output(const Params& p, int i) {
    return i == 0 ? p.grad_grad_y : p.grad_x;
  }
  static bool has_result(const Params& p) {
    return p.grad_grad_y || p.grad_x || p.grad_weight || DoubleBackward::wants_sums(p);
  }

  template <typename T>
  __device__ static void add(Sums<A, kSums>& sums, const Chain<A, A>& e, const T (&in)[kInputs]) {
    const A g = Backward<A>::add(sums, e, in), v = e.times_du_dx(accumulator(in[2]));
    sums.value[kV] += v;
    sums.value[kVXhat] += v * e.centered;
    sums.value[kVG] += v * g;
  }

  __device__ static Coefficients finish(const Params& p, int64_t c, const Sums<A, kSums>& reduced,
                                        const Normalization<A>& channel, bool write) {
    const Sums<A, kSums> sums = DoubleBackward::finish_sums(p, c, reduced, channel, write);
    const int64_t i = parameter_index(p, c);
    const A ggw = p.grad_grad_weight ? static_cast<const A*>(p.grad_grad_weight)[i] : A(0);
    const A ggb = p.grad_grad_bias ? static_cast<const A*>(p.grad_grad_bias)[i] : A(0);
    A grad_weight;
    const auto coefficients = double_backward_coefficients(
        channel.weight, channel.invstd, sums.value[kG], sums.value[kGXhat], sums.value[kV],
        sums.value[kVXhat], sums.value[kVG], ggw, ggb, static_cast<A>(p.count), p.training,
        &grad_weight);
    if (write) store_sums(Sums<A, 1>{{grad_weight}}, p.grad_weight, p.c, c);
    return {channel, coefficients};
  }

  template <bool kActivationFirst, typename T>
  __device__ static void apply(const Coefficients& k, const T (&in)[kInputs], T (&out)[kOutputs],
                               const Params& p) {
    const auto e = chain_of<kActivationFirst>(p, in[0], k.channel);
    const A g = e.times_dy_dz(accumulator(in[1])), v = e.times_du_dx(accumulator(in[2]));
    const DoubleBackwardCoefficients<A>& b = k.backward;
    out[0] = element<T>(e.times_dy_dz(v * b.y_v + e.centered * b.y_centered + b.y_constant));
    out[1] =
        element<T>(e.times_du_dx(g * b.x_g + v * b.x_v + e.centered * b.x_centered + b.x_constant));
  }
};

constexpr int kMaxSums = kVG + 1;  // of all passes

}  // namespace gankernels::cuda::batch_norm_leaky_relu
