// Pairs of samples of one panel, in tiles whose distances stay in registers.
#pragma once

#include "../exp.h"

namespace gankernels {
namespace {

template <typename A, typename V = Vector<A>>
GK_INLINE V magnitude(V d) {
  return (V)((ExpBits<A>)d & ~(ExpBits<A>)-V{});
}

// A 1 that the compiler does not know to be 1, so that a * one - b becomes a fused multiply-add.
// AMD's CPUs execute these in parallel with additions; on others it costs no more than a
// subtraction.
template <typename A>
GK_INLINE Vector<A> opaque_one() {
  Vector<A> one = Vector<A>{} + A(1);
  asm("" : "+x"(one));
  return one;
}

// w where d > 0, -w where d < 0, 0 where d = 0.
template <typename A, typename V = Vector<A>>
GK_INLINE V with_sign_of(V d, V w) {
#if defined(__AVX512F__)
  constexpr int kXorAnd = 0x78;  // w ^ (d & minus)
  const ExpBits<A> minus = (ExpBits<A>)-V{};
  if (sizeof(A) == 4) {
    return (V)_mm512_maskz_ternarylogic_epi32(
        _mm512_cmp_ps_mask((__m512)d, (__m512)V{}, _CMP_NEQ_UQ), (__m512i)w, (__m512i)d,
        (__m512i)minus, kXorAnd);
  }
  return (V)_mm512_maskz_ternarylogic_epi64(
      _mm512_cmp_pd_mask((__m512d)d, (__m512d)V{}, _CMP_NEQ_UQ), (__m512i)w, (__m512i)d,
      (__m512i)minus, kXorAnd);
#else
  const V signed_w = (V)((ExpBits<A>)w ^ ((ExpBits<A>)d & (ExpBits<A>)-V{}));
  return d != 0 ? signed_w : V{};
#endif
}

// Consecutive rows of a panel, inputs and results. x, v and grads are [row][c][lane], g and sums
// [row][lane]. Pointers that a derivative does not use are null.
template <typename A>
struct Rows {
  const A *x, *v, *g;
  A* sums;   // forward: of e; double backward: of -e s
  A* grads;  // of the weighted signs
};

template <int kDerivative>
constexpr int tile_rows() {
#if defined(__AVX512F__)
  return kDerivative == 2 ? 2 : 4;
#else
  return 2;
#endif
}
template <int kDerivative>
constexpr int tile_columns() {
#if defined(__AVX512F__)
  return 4;
#else
  return kDerivative == 0 ? 4 : 2;
#endif
}

// Pairs of rows, which add to the results of both. D is the order of the derivative.
template <typename A>
struct Pairs {
  using V = Vector<A>;
  static constexpr int W = VectorOf<A>::width;

  int64_t c;
  bool want_grads;

  Rows<A> advance(const Rows<A>& rows, int64_t count) const {
    const int64_t matrix = count * c * W;
    return {rows.x + matrix, rows.v ? rows.v + matrix : nullptr,
            rows.g ? rows.g + count * W : nullptr, rows.sums + count * W,
            rows.grads ? rows.grads + matrix : nullptr};
  }

  // Pairs I rows of `a` with J rows of `b`. Distances, then weights, stay in registers.
  template <int D, int I, int J>
  GK_INLINE void tile(const Rows<A>& a, const Rows<A>& b) const {
    const int64_t row = c * W;
    const V one = opaque_one<A>();
    V w[I][J], s[I][J];  // distances, then weights; sums of signs times v
    GK_UNROLL for (int i = 0; i < I; ++i) {
      GK_UNROLL for (int j = 0; j < J; ++j) w[i][j] = s[i][j] = V{};
    }
    for (int64_t k = 0; k < row; k += W) {
      V xb[J], vb[J];
      GK_UNROLL for (int j = 0; j < J; ++j) {
        xb[j] = load(b.x + j * row + k);
        if (D == 2) vb[j] = load(b.v + j * row + k);
      }
      GK_UNROLL for (int i = 0; i < I; ++i) {
        const V xa = load(a.x + i * row + k);
        const V va = D == 2 ? load(a.v + i * row + k) : V{};
        GK_UNROLL for (int j = 0; j < J; ++j) {
          const V d = xa * one - xb[j];
          w[i][j] += magnitude<A>(d);
          if (D == 2) s[i][j] += with_sign_of<A>(d, va - vb[j]);
        }
      }
    }
    GK_UNROLL for (int i = 0; i < I; ++i) {
      GK_UNROLL for (int j = 0; j < J; ++j) {
        w[i][j] = exp_of_minus<A>(w[i][j]);
        if (D == 2) w[i][j] = -w[i][j] * s[i][j];
      }
    }
    if (D != 1) {
      GK_UNROLL for (int i = 0; i < I; ++i) {
        V sum = load(a.sums + i * W);
        GK_UNROLL for (int j = 0; j < J; ++j) sum += w[i][j];
        store(a.sums + i * W, sum);
      }
      GK_UNROLL for (int j = 0; j < J; ++j) {
        V sum = load(b.sums + j * W);
        GK_UNROLL for (int i = 0; i < I; ++i) sum += w[i][j];
        store(b.sums + j * W, sum);
      }
    }
    if (D == 0 || (D == 2 && !want_grads)) return;
    GK_UNROLL for (int i = 0; i < I; ++i) {
      GK_UNROLL for (int j = 0; j < J; ++j) w[i][j] *= load(a.g + i * W) + load(b.g + j * W);
    }
    for (int64_t k = 0; k < row; k += W) {
      V xb[J], gb[J];
      GK_UNROLL for (int j = 0; j < J; ++j) {
        xb[j] = load(b.x + j * row + k);
        gb[j] = load(b.grads + j * row + k);
      }
      GK_UNROLL for (int i = 0; i < I; ++i) {
        const V xa = load(a.x + i * row + k);
        V ga = load(a.grads + i * row + k);
        GK_UNROLL for (int j = 0; j < J; ++j) {
          const V t = with_sign_of<A>(xa - xb[j], w[i][j]);
          ga -= t;
          gb[j] = t * one + gb[j];
        }
        store(a.grads + i * row + k, ga);
      }
      GK_UNROLL for (int j = 0; j < J; ++j) store(b.grads + j * row + k, gb[j]);
    }
  }

  // Pairs each of `a_count` rows with each of `b_count` others.
  template <int D>
  void rectangle(Rows<A> a, int64_t a_count, const Rows<A>& b, int64_t b_count) const {
    constexpr int I = tile_rows<D>(), J = tile_columns<D>();
    const int64_t full = b_count / J * J;
    for (; a_count >= I; a_count -= I, a = advance(a, I)) {
      for (int64_t j = 0; j < full; j += J) tile<D, I, J>(a, advance(b, j));
      for (int64_t j = full; j < b_count; ++j) tile<D, I, 1>(a, advance(b, j));
    }
    for (; a_count > 0; --a_count, a = advance(a, 1)) {
      for (int64_t j = 0; j < full; j += J) tile<D, 1, J>(a, advance(b, j));
      for (int64_t j = full; j < b_count; ++j) tile<D, 1, 1>(a, advance(b, j));
    }
  }

  // Pairs row i of `a` with row j of `b` for all i < j < count.
  template <int D>
  void triangle(const Rows<A>& a, const Rows<A>& b, int64_t count) const {
    constexpr int I = tile_rows<D>();
    for (int64_t i = 0; i < count; i += I) {
      const int64_t next = minimum(i + I, count);
      for (int64_t p = i; p < next; ++p) {
        for (int64_t q = p + 1; q < next; ++q) tile<D, 1, 1>(advance(a, p), advance(b, q));
      }
      rectangle<D>(advance(a, i), next - i, advance(b, next), count - next);
    }
  }
};

}  // namespace
}  // namespace gankernels
