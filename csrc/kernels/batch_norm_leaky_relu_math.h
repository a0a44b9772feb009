// The arithmetic of batch_norm_leaky_relu, once for CPU and CUDA: per element on a scalar or a GCC
// vector V, per channel on scalars of the accumulation type A.
//
// Functions are `static`, and classes with member functions in an unnamed namespace, so that every
// translation unit has its own copy: the CPU file is compiled once per instruction set, and a
// shared symbol could bring AVX-512 code to a machine without it.
#pragma once

#include "batch_norm_leaky_relu.h"

namespace gankernels {

template <typename V, typename A>
GK_HOST_DEVICE static inline V leaky_relu(V v, A slope) {
  return v > 0 ? v : v * slope;
}

// A gradient times lrelu'(v), by a selection instead of a product, which saves an instruction. As
// in PyTorch, the derivative at zero is the negative slope.
template <typename V, typename A>
GK_HOST_DEVICE static inline V times_derivative(V gradient, V v, A slope) {
  return v > 0 ? gradient : gradient * slope;
}

// The values of one element, x -> u -> z -> y: u is normalized, z is the output of the affine map.
namespace {
template <typename V, typename A>
struct Chain {
  V x, centered, z;  // centered is u - mean
  A slope;
  bool activation_first;

  GK_HOST_DEVICE V y() const { return activation_first ? z : leaky_relu(z, slope); }
  GK_HOST_DEVICE V times_dy_dz(V gradient) const {
    return activation_first ? gradient : times_derivative(gradient, z, slope);
  }
  GK_HOST_DEVICE V times_du_dx(V gradient) const {
    return activation_first ? times_derivative(gradient, x, slope) : gradient;
  }
};
}  // namespace

// The per-channel mean, scale and shift are P: V with one channel per lane, or A for all lanes.
template <typename V, typename A, typename P>
GK_HOST_DEVICE static inline Chain<V, A> chain(V x, P mean, P scale, P shift, A slope,
                                               bool activation_first) {
  const V u = activation_first ? leaky_relu(x, slope) : x;
  const V centered = u - mean;
  // The backward passes recompute z to know the mask, so this is the only place that computes it:
  // any other rounding could put an element on the other side of zero.
  return {x, centered, centered * scale + shift, slope, activation_first};
}

// Per channel: y from x.
template <typename A>
struct ForwardCoefficients {
  A mean, scale, shift;
};

// A coefficient times a value. If the coefficient is zero, so is the term, even if the value is
// infinite or NaN: in evaluation mean and variance do not depend on x, so one such element must not
// make a gradient NaN.
template <typename V, typename P>
GK_HOST_DEVICE static inline V term(V value, P coefficient) {
  return coefficient == 0 ? V{} : value * coefficient;
}

// Per channel: grad_x = du/dx * (g * g_ + centered * centered_ + constant).
template <typename A>
struct BackwardCoefficients {
  A g, centered, constant;
};

// Per channel: grad_grad_y = dy/dz * (v * y_v + centered * y_centered + y_constant) and
//              grad_x = du/dx * (g * x_g + v * x_v + centered * x_centered + x_constant).
template <typename A>
struct DoubleBackwardCoefficients {
  A y_v, y_centered, y_constant;
  A x_g, x_v, x_centered, x_constant;
};

template <typename A>
GK_HOST_DEVICE static inline BackwardCoefficients<A> backward_coefficients(A weight, A invstd,
                                                                           A sum_g, A sum_g_xhat,
                                                                           A count, bool training) {
  const A scale = weight * invstd;
  if (!training) return {scale, A(0), A(0)};
  return {scale, -scale * invstd * (sum_g_xhat / count), -scale * (sum_g / count)};
}

// Derivation: with means over the channel written as m(.), the backward pass computes
//   du = scale * (g - m(g) - xhat * m(g xhat)),  grad_weight = sum(g xhat),  grad_bias = sum(g).
// Contract them with the tangents v, ggw and ggb into one scalar L per channel,
//   L = scale * Q + ggw * sum(g xhat) + ggb * sum(g),
//   Q = sum(v g) - m(g) sum(v) - m(g xhat) sum(v xhat),
// and differentiate L with respect to g, weight and, through xhat and invstd, to u. LeakyReLU
// contributes its mask only, since its second derivative is zero almost everywhere.
template <typename A>
GK_HOST_DEVICE static inline DoubleBackwardCoefficients<A> double_backward_coefficients(
    A weight, A invstd, A sum_g, A sum_g_xhat, A sum_v, A sum_v_xhat, A sum_v_g, A ggw, A ggb,
    A count, bool training, A* grad_weight) {
  const A scale = weight * invstd;
  if (!training) {
    *grad_weight = invstd * sum_v_g;
    return {scale, ggw * invstd, ggb, ggw * invstd, A(0), A(0), A(0)};
  }
  const A m_g = sum_g / count, m_g_xhat = sum_g_xhat / count;
  const A m_v = sum_v / count, m_v_xhat = sum_v_xhat / count;
  const A q = sum_v_g - m_g * sum_v - m_g_xhat * sum_v_xhat;
  *grad_weight = invstd * q;
  // dL/dxhat = g * h_g + v * h_v, with these means over the channel of itself and times xhat:
  const A h_g = ggw - scale * m_v_xhat, h_v = -scale * m_g_xhat;
  const A m_h = m_g * h_g + m_v * h_v;
  const A m_h_xhat = m_g_xhat * h_g + m_v_xhat * h_v;
  return {scale,        h_g * invstd, ggb - scale * m_v,
          invstd * h_g, invstd * h_v, -invstd * invstd * (m_h_xhat + scale * (q / count)),
          -invstd * m_h};
}

}  // namespace gankernels
