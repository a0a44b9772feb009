// Panels: one vector's width of the kernels b, packed so that the lanes of a vector are
// neighboring b and no sum goes across lanes. The order is [row][c][lane].
//
// If fewer b are left than a vector has lanes, a row holds several samples side by side, in
// `slots` of the vector. With 8 lanes and 3 kernels b there are two slots:
//
//   lane            0    1    2    3    4    5    6    7
//   row r      b =  b0  b0+1 b0+2  b0  b0+1 b0+2  -    -
//        sample =  2r   2r   2r  2r+1 2r+1 2r+1   -    -
#pragma once

#include "../exp.h"

namespace gankernels {
namespace {

// A tensor of `samples` times B times `width` elements. Of a tensor (N, B) the width is 1.
template <typename T>
struct Strided {
  T* data;
  int64_t samples, width;
  int64_t n, b, c;  // strides
};

// `slots` samples side by side, `lanes` kernels b of each from b0 on. Row r, slot s is the sample
// r * slots + s.
struct Panel {
  int64_t b0, lanes, slots, rows;
  int64_t block_rows;
};

// Transposes a square of W vectors: exchanges its off-diagonal quarters, then those of its
// quarters.
template <typename A, int kHalf = VectorOf<A>::width / 2>
GK_INLINE void transpose(Vector<A>* rows) {
  constexpr int W = VectorOf<A>::width;
  ExpBits<A> upper, lower;
  for (int l = 0; l < W; ++l) {
    upper[l] = l & kHalf ? W + l - kHalf : l;
    lower[l] = l & kHalf ? W + l : l + kHalf;
  }
  for (int i = 0; i < W; ++i) {
    if (i & kHalf) continue;
    const Vector<A> a = rows[i], b = rows[i + kHalf];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + kHalf] = __builtin_shuffle(a, b, lower);
  }
  if constexpr (kHalf > 1) transpose<A, kHalf / 2>(rows);
}

// Loads or stores min(count, W) elements. The other lanes are set to zero.
template <typename T>
GK_INLINE Vector<Accumulate<T>> load_strided(const T* p, int64_t stride, int64_t count) {
  constexpr int64_t W = VectorOf<Accumulate<T>>::width;
  if (stride == 1) return count < W ? load(p, int(count)) : load(p);
  Vector<Accumulate<T>> v{};
  for (int64_t i = 0; i < minimum(count, W); ++i) v[i] = load(p + i * stride, 1)[0];
  return v;
}
template <typename T>
GK_INLINE void store_up_to(T* p, Vector<Accumulate<T>> v, int64_t count) {
  constexpr int64_t W = VectorOf<Accumulate<T>>::width;
  count < W ? store(p, v, int(count)) : store(p, v);
}

// Packs one row of a panel: the elements (b0 ... b0 + lanes, 0 ... c) of its samples. If c is 1,
// the lanes are one strided vector of the tensor; otherwise each lane is loaded as vectors along c,
// which are transposed.
template <typename T>
void pack(const Strided<const T>& from, const Panel& panel, int64_t row, Accumulate<T> padding,
          Accumulate<T>* to) {
  using A = Accumulate<T>;
  using V = Vector<A>;
  constexpr int W = VectorOf<A>::width;
  const int64_t samples = minimum(panel.slots, from.samples - row * panel.slots);
  const T* in = from.data + row * panel.slots * from.n + panel.b0 * from.b;
  if (from.width == 1) {
    V v = load_strided(in, from.b, panel.lanes);
    if (panel.slots > 1) {
      v = V{} + padding;
      for (int64_t l = 0; l < samples * panel.lanes; ++l) {
        v[l] = load(in + l / panel.lanes * from.n + l % panel.lanes * from.b, 1)[0];
      }
    }
    return store(to, v);
  }
  for (int64_t k0 = 0; k0 < from.width; k0 += W) {
    const int64_t count = minimum<int64_t>(W, from.width - k0);
    V rows[W];
    for (int l = 0; l < W; ++l) rows[l] = V{} + padding;
    for (int64_t slot = 0, l = 0; slot < samples; ++slot) {
      for (int64_t lane = 0; lane < panel.lanes; ++lane, ++l) {
        rows[l] = load_strided(in + slot * from.n + lane * from.b + k0 * from.c, from.c, count);
      }
    }
    transpose<A>(rows);
    for (int64_t k = 0; k < count; ++k) store(to + (k0 + k) * W, rows[k]);
  }
}

// Unpacks one row of a panel to a contiguous tensor.
template <typename T>
void unpack(const Accumulate<T>* from, const Panel& panel, int64_t row, const Strided<T>& to) {
  using A = Accumulate<T>;
  using V = Vector<A>;
  constexpr int W = VectorOf<A>::width;
  const int64_t samples = minimum(panel.slots, to.samples - row * panel.slots);
  T* out = to.data + row * panel.slots * to.n + panel.b0 * to.b;
  if (to.width == 1) {
    const V v = load(from);
    if (panel.slots == 1) return store_up_to(out, v, panel.lanes);
    for (int64_t l = 0; l < samples * panel.lanes; ++l) {
      store(out + l / panel.lanes * to.n + l % panel.lanes, V{} + v[l], 1);
    }
    return;
  }
  for (int64_t k0 = 0; k0 < to.width; k0 += W) {
    const int64_t count = minimum<int64_t>(W, to.width - k0);
    V rows[W];
    for (int k = 0; k < W; ++k) rows[k] = k < count ? load(from + (k0 + k) * W) : V{};
    transpose<A>(rows);
    for (int64_t slot = 0, l = 0; slot < samples; ++slot) {
      for (int64_t lane = 0; lane < panel.lanes; ++lane, ++l) {
        store_up_to(out + slot * to.n + lane * to.b + k0, rows[l], count);
      }
    }
  }
}

}  // namespace
}  // namespace gankernels
