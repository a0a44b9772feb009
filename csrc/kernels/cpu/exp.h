// exp(-d) of a vector, for distances d >= 0.
//
// The error is at most 2 units in the last place, in float and in double, which
// tests/ops/test_minibatch_discrimination.py checks. If the result would be subnormal (d > 87.33 in
// float, d > 708.39 in double), it is zero. NaN gives NaN.
#pragma once

#include "simd.h"

namespace gankernels {
namespace {

template <typename A>
struct ExpConstants;

template <typename A>
using ExpBits = typename ExpConstants<A>::Bits;

// exp(-d) = 2^n exp(r), with n = -d / ln 2 rounded and r = -d - n ln 2. `ln2_high` has so few bits
// that n * ln2_high is exact. The polynomial is exp(r) = 1 + r + r^2 q(r), and q interpolates at
// the Chebyshev points of |r| <= ln 2 / 2.
template <>
struct ExpConstants<float> {
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int mantissa = 23;
  static constexpr float rounder = 0x1.8p23f, log2e = 0x1.715476p0f;
  static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -2.12194440e-4f;
  static constexpr float largest = 87.33654f;  // -ln(2^-126), rounded down
  static constexpr int terms = 5;
  static constexpr float q[terms] = {0.5f, 1.666657627e-1f, 4.166655242e-2f, 8.363232948e-3f,
                                     1.392625039e-3f};
};
template <>
struct ExpConstants<double> {
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int mantissa = 52;
  static constexpr double rounder = 0x1.8p52, log2e = 0x1.71547652b82fep0;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 1.90821492927058770002e-10;
  static constexpr double largest = 708.3964185322641;  // -ln(2^-1022), rounded down
  static constexpr int terms = 10;
  static constexpr double q[terms] = {0.5,
                                      1.66666666666665769e-1,
                                      4.16666666666213187e-2,
                                      8.33333333338513553e-3,
                                      1.38888889196193640e-3,
                                      1.98412697552128713e-4,
                                      2.48015169102677210e-5,
                                      2.75573591189466550e-6,
                                      2.76222987013646657e-7,
                                      2.50715558052916515e-8};
};

template <typename A, typename V = Vector<A>>
GK_INLINE V exp_of_minus(V d) {
  using K = ExpConstants<A>;
  // Adding `rounder` leaves n as the low bits of the sum, in two's complement.
  const V shifted = d * -K::log2e + K::rounder;
  const V n = shifted - K::rounder;
  const V r = (-d - n * K::ln2_high) - n * K::ln2_low;
  V p = V{} + K::q[K::terms - 1];
  for (int i = K::terms - 2; i >= 0; --i) p = p * r + K::q[i];
  p = (p * r + A(1)) * r + A(1);
  const V scaled = (V)((ExpBits<A>)p + ((ExpBits<A>)shifted << K::mantissa));
  return d > K::largest ? V{} : scaled;
}

}  // namespace
}  // namespace gankernels
