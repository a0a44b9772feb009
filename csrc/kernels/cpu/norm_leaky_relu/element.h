// The arithmetic of a fused norm on one vector of elements: the terms of its reductions, and its
// outputs.
//
// Statistics belong to a group of elements, in batch norm to a channel, and an element uses them
// through its group's coefficients. V is a vector of elements. P is a coefficient: a scalar if all
// lanes belong to one group, a vector if every lane belongs to another group.
#pragma once

#include "../../batch_norm_leaky_relu_math.h"
#include "../simd.h"

namespace gankernels {
namespace {

enum Input { kX, kGradY, kGradGradX };

// The coefficients that every element starts from, those of ForwardCoefficients.
enum Coefficient { kMean, kScale, kShift, kForwardCoefficients };

template <bool kActivationFirst, typename V, typename P, typename A>
GK_INLINE auto chain_of(V x, const P* k, A slope) {
  return chain(x, k[kMean], k[kScale], k[kShift], slope, kActivationFirst);
}

// Sums for the statistics: of deviations from a pivot, any value near the mean.
template <bool kActivationFirst>
struct DeviationElement {
  static constexpr int kInputs = 1, kReduceCoefficients = 1;
  enum Coefficient { kPivot };
  enum Sum { kDeviation, kSquare, kSums };

  template <typename V, typename P, typename A>
  GK_INLINE static void reduce(const V* in, const P* k, A slope, V* sums) {
    const V u = kActivationFirst ? leaky_relu(in[kX], slope) : in[kX];
    const V deviation = u - k[kPivot];
    sums[kDeviation] += deviation;
    sums[kSquare] += deviation * deviation;
  }
};

template <bool kActivationFirst>
struct ForwardElement {
  static constexpr int kInputs = 1, kCoefficients = kForwardCoefficients;
  enum Output { kY, kOutputs };

  template <typename V, typename P, typename A>
  GK_INLINE static void apply(const V* in, const P* k, A slope, V* out) {
    out[kY] = chain_of<kActivationFirst>(in[kX], k, slope).y();
  }
};

// The sums with Xhat in their names use `centered` instead.
template <bool kActivationFirst>
struct BackwardElement {
  static constexpr int kInputs = 2, kReduceCoefficients = kForwardCoefficients;
  enum Coefficient { kG = kForwardCoefficients, kCentered, kConstant, kCoefficients };
  enum Sum { kSumG, kSumGXhat, kSums };
  enum Output { kGradX, kOutputs };

  static constexpr bool of_xhat(int sum) { return sum == kSumGXhat; }

  template <typename V, typename P, typename A>
  GK_INLINE static void reduce(const V* in, const P* k, A slope, V* sums) {
    const auto e = chain_of<kActivationFirst>(in[kX], k, slope);
    const V g = e.times_dy_dz(in[kGradY]);
    sums[kSumG] += g;
    sums[kSumGXhat] += g * e.centered;
  }

  template <typename V, typename P, typename A>
  GK_INLINE static void apply(const V* in, const P* k, A slope, V* out) {
    const auto e = chain_of<kActivationFirst>(in[kX], k, slope);
    const V g = e.times_dy_dz(in[kGradY]);
    out[kGradX] = e.times_du_dx(g * k[kG] + (e.centered * k[kCentered] + k[kConstant]));
  }
};

// In evaluation the statistics do not depend on x. See term().
template <bool kActivationFirst>
struct EvaluationBackwardElement : BackwardElement<kActivationFirst> {
  using Base = BackwardElement<kActivationFirst>;

  template <typename V, typename P, typename A>
  GK_INLINE static void apply(const V* in, const P* k, A slope, V* out) {
    const auto e = chain_of<kActivationFirst>(in[kX], k, slope);
    out[Base::kGradX] = e.times_du_dx(e.times_dy_dz(in[kGradY]) * k[Base::kG]);
  }
};

template <bool kActivationFirst>
struct DoubleBackwardElement {
  static constexpr int kInputs = 3, kReduceCoefficients = kForwardCoefficients;
  // Named as in DoubleBackwardCoefficients.
  enum Coefficient {
    kYV = kForwardCoefficients,
    kYCentered,
    kYConstant,
    kXG,
    kXV,
    kXCentered,
    kXConstant,
    kCoefficients
  };
  enum Sum { kSumG, kSumGXhat, kSumV, kSumVXhat, kSumVG, kSums };
  enum Output { kGradGradY, kGradX, kOutputs };

  static constexpr bool of_xhat(int sum) { return sum == kSumGXhat || sum == kSumVXhat; }

  template <typename V, typename P, typename A>
  GK_INLINE static void reduce(const V* in, const P* k, A slope, V* sums) {
    const auto e = chain_of<kActivationFirst>(in[kX], k, slope);
    const V g = e.times_dy_dz(in[kGradY]), v = e.times_du_dx(in[kGradGradX]);
    sums[kSumG] += g;
    sums[kSumGXhat] += g * e.centered;
    sums[kSumV] += v;
    sums[kSumVXhat] += v * e.centered;
    sums[kSumVG] += v * g;
  }

  template <typename V, typename P, typename A>
  GK_INLINE static void apply(const V* in, const P* k, A slope, V* out) {
    const auto e = chain_of<kActivationFirst>(in[kX], k, slope);
    const V g = e.times_dy_dz(in[kGradY]), v = e.times_du_dx(in[kGradGradX]);
    out[kGradGradY] = e.times_dy_dz(v * k[kYV] + (e.centered * k[kYCentered] + k[kYConstant]));
    out[kGradX] =
        e.times_du_dx(g * k[kXG] + (v * k[kXV] + (e.centered * k[kXCentered] + k[kXConstant])));
  }
};

template <bool kActivationFirst>
struct EvaluationDoubleBackwardElement : DoubleBackwardElement<kActivationFirst> {
  using Base = DoubleBackwardElement<kActivationFirst>;

  template <typename V, typename P, typename A>
  GK_INLINE static void apply(const V* in, const P* k, A slope, V* out) {
    const auto e = chain_of<kActivationFirst>(in[kX], k, slope);
    const V g = e.times_dy_dz(in[kGradY]), v = e.times_du_dx(in[kGradGradX]);
    out[Base::kGradGradY] = e.times_dy_dz(
        v * k[Base::kYV] + (term(e.centered, k[Base::kYCentered]) + k[Base::kYConstant]));
    out[Base::kGradX] = e.times_du_dx(term(g, k[Base::kXG]));
  }
};

constexpr int kMaxCoefficients = DoubleBackwardElement<false>::kCoefficients;
constexpr int kMaxSums = DoubleBackwardElement<false>::kSums;

}  // namespace
}  // namespace gankernels
