// Loops over the elements of statistics groups. `reduce_*` adds up the terms of an element in
// element.h, `apply_*` writes its outputs.
//
// In memory a group is either runs of neighboring elements, so that the lanes are neighbors in one
// group (batch norm, channels first), or a column of a matrix, so that the lanes are neighboring
// groups (channels last).
#pragma once

#include "element.h"

namespace gankernels {
namespace {

struct Range {
  int64_t begin, end;
};

// The tensors of a pass, all of one layout. Outputs that are not wanted are null.
template <typename T, int kInputs, int kOutputs>
struct Operands {
  const T* in[kInputs];
  T* out[kOutputs];
  Accumulate<T> slope;
};

// One array per coefficient or sum, with an element for every group.
template <typename A>
struct GroupArrays {
  A* data;
  int64_t pitch;  // elements from one array to the next

  GK_INLINE A* operator[](int i) const { return data + i * pitch; }

  template <int kCount>
  GK_INLINE void load_group(int64_t group, A* values) const {
    for (int i = 0; i < kCount; ++i) values[i] = (*this)[i][group];
  }
  template <int kCount>
  GK_INLINE void store_group(int64_t group, const A* values) const {
    for (int i = 0; i < kCount; ++i) (*this)[i][group] = values[i];
  }
};

// ---- groups in runs ----------------------------------------------------------------------------

// A group: runs of `length` elements, the first at offset `first`, `pitch` elements apart.
struct Runs {
  int64_t first, length, pitch;

  GK_INLINE int64_t offset(int64_t i) const { return first + i / length * pitch + i % length; }
};

// Sums over a range of the group's elements. Everything is unrolled and in one function, because
// only then do the sums stay in registers from run to run. A few sums are computed in two chains,
// to hide the latency of additions.
template <typename Element, typename T, int kInputs, int kOutputs>
void reduce_runs(const Operands<T, kInputs, kOutputs>& operands, const Runs& runs, Range range,
                 const Accumulate<T>* coefficients, double* results) {
  using A = Accumulate<T>;
  using V = Vector<A>;
  constexpr int W = VectorOf<A>::width, kSums = Element::kSums;
  constexpr int kChains = kSums > 2 ? 1 : 2;
  const A slope = operands.slope;
  V sums[kChains][kSums];
  GK_UNROLL for (int x = 0; x < kChains; ++x) {
    GK_UNROLL for (int k = 0; k < kSums; ++k) sums[x][k] = V{};
  }
  int64_t begin = range.begin;
  const int64_t end = range.end;
  int64_t start = runs.first + begin / runs.length * runs.pitch, skip = begin % runs.length;
  // The runs of the neighboring groups come next: as many streams as there are runs here.
  const int64_t ahead = kAheadBytes / int64_t(sizeof(T)) / ceil_div(end - begin, runs.length);
  for (; begin < end; start += runs.pitch, skip = 0) {
    const int64_t length = minimum(runs.length - skip, end - begin);
    const T* in[kInputs];
    GK_UNROLL for (int j = 0; j < kInputs; ++j) in[j] = operands.in[j] + start + skip;
    V a[kInputs];
    int64_t i = 0;
    for (; i + 2 * W <= length; i += 2 * W) {
      GK_UNROLL for (int j = 0; j < kInputs; ++j) {
        prefetch(in[j] + i + ahead);
        if (sizeof(T) * W >= 64) prefetch(in[j] + i + W + ahead);
      }
      GK_UNROLL for (int half = 0; half < 2; ++half) {
        GK_UNROLL for (int j = 0; j < kInputs; ++j) a[j] = load(in[j] + i + half * W);
        Element::reduce(a, coefficients, slope, sums[half % kChains]);
      }
    }
    if (i + W <= length) {
      GK_UNROLL for (int j = 0; j < kInputs; ++j) a[j] = load(in[j] + i);
      Element::reduce(a, coefficients, slope, sums[0]);
      i += W;
    }
    if (i < length) {
      const int lanes = int(length - i);
      V tail[kSums];
      GK_UNROLL for (int k = 0; k < kSums; ++k) tail[k] = V{};
      GK_UNROLL for (int j = 0; j < kInputs; ++j) a[j] = load(in[j] + i, lanes);
      Element::reduce(a, coefficients, slope, tail);
      GK_UNROLL for (int k = 0; k < kSums; ++k) sums[0][k] += keep_first<A>(tail[k], lanes);
    }
    begin += length;
  }
  GK_UNROLL for (int k = 0; k < kSums; ++k) {
    results[k] = sum_lanes<A>(kChains == 1 ? sums[0][k] : sums[0][k] + sums[kChains - 1][k]);
  }
}

// Writes one vector, or its first `lanes`, of every wanted output.
template <bool kStream, int kOutputs, typename T, typename V>
GK_INLINE void write(T* const* out, int64_t offset, const V* values) {
  for (int j = 0; j < kOutputs; ++j) {
    if (!out[j]) continue;
    kStream ? stream(out[j] + offset, values[j]) : store(out[j] + offset, values[j]);
  }
}
template <int kOutputs, typename T, typename V>
GK_INLINE void write(T* const* out, int64_t offset, const V* values, int lanes) {
  for (int j = 0; j < kOutputs; ++j) {
    if (out[j]) store(out[j] + offset, values[j], lanes);
  }
}

// The number of elements before the address of the first whole vector. The outputs are aligned
// alike, since they are fresh tensors of one shape.
template <int kOutputs, typename T>
int64_t misalignment(T* const* out, int64_t offset) {
  constexpr int64_t W = VectorOf<Accumulate<T>>::width;
  const T* first = (out[0] ? out[0] : out[kOutputs - 1]) + offset;
  return -int64_t(reinterpret_cast<uintptr_t>(first) / sizeof(T)) & (W - 1);
}

// Writes the outputs of neighboring elements of one group, those at the offsets in `range`.
template <typename Element, bool kStream, typename T, int kInputs, int kOutputs>
void apply_run(const Operands<T, kInputs, kOutputs>& operands, Range range,
               const Accumulate<T>* coefficients) {
  using V = Vector<Accumulate<T>>;
  constexpr int W = VectorOf<Accumulate<T>>::width;
  const Accumulate<T> slope = operands.slope;
  const int64_t offset = range.begin, length = range.end - range.begin;
  const T* in[kInputs];
  T* out[kOutputs];
  for (int j = 0; j < kInputs; ++j) in[j] = operands.in[j] + offset;
  for (int j = 0; j < kOutputs; ++j) out[j] = operands.out[j] ? operands.out[j] + offset : nullptr;
  auto part = [&](int64_t i, int lanes) {
    V a[kInputs], results[kOutputs];
    for (int j = 0; j < kInputs; ++j) a[j] = load(in[j] + i, lanes);
    Element::apply(a, coefficients, slope, results);
    write<kOutputs>(out, i, results, lanes);
  };
  int64_t i = 0;
  if (kStream) {
    i = minimum(misalignment<kOutputs>(operands.out, offset), length);
    if (i) part(0, int(i));
  }
  for (; i + W <= length; i += W) {
    V a[kInputs], results[kOutputs];
    for (int j = 0; j < kInputs; ++j) a[j] = load(in[j] + i);
    Element::apply(a, coefficients, slope, results);
    write<kStream, kOutputs>(out, i, results);
  }
  if (i < length) part(i, int(length - i));
}

// ---- groups in columns -------------------------------------------------------------------------

// A part of a matrix, whose rows are `pitch` elements apart.
struct Tile {
  Range rows, columns;
  int64_t pitch;
};

// Sums over the rows of a tile, for every column of it.
template <typename Element, typename T, int kInputs, int kOutputs>
void reduce_columns(const Operands<T, kInputs, kOutputs>& operands, const Tile& tile,
                    const GroupArrays<Accumulate<T>>& coefficient_arrays,
                    const GroupArrays<Accumulate<T>>& sum_arrays) {
  using A = Accumulate<T>;
  using V = Vector<A>;
  constexpr int W = VectorOf<A>::width, kSums = Element::kSums;
  constexpr int kRows = 4;  // rows that share a load of the coefficients and a store of the sums
  const GroupArrays<A> coefficients = coefficient_arrays, sums = sum_arrays;
  const A slope = operands.slope;
  const int64_t first = tile.columns.begin, last = tile.columns.end, pitch = tile.pitch;
  for (int k = 0; k < kSums; ++k) {
    for (int64_t c = first; c < last; c += W) store(sums[k] + c, V{});
  }
  const int64_t full = first + (last - first) / W * W;
  const int64_t ahead = maximum<int64_t>(kRows, 2 * kAheadBytes / (pitch * int64_t(sizeof(T))));
  const T* in[kInputs];
  for (int j = 0; j < kInputs; ++j) in[j] = operands.in[j] + tile.rows.begin * pitch;
  auto one_vector = [&](auto count, int64_t c, auto load_elements) {
    V k[Element::kReduceCoefficients], s[kSums] = {};
    for (int j = 0; j < Element::kReduceCoefficients; ++j) k[j] = load(coefficients[j] + c);
    for (int row = 0; row < count(); ++row) {
      V a[kInputs];
      for (int j = 0; j < kInputs; ++j) {
        prefetch(in[j] + (row + ahead) * pitch + c);
        a[j] = load_elements(in[j] + row * pitch + c);
      }
      Element::reduce(a, k, slope, s);
    }
    // Rows are summed among themselves first, which keeps chains of additions, and their rounding
    // errors, short.
    for (int j = 0; j < kSums; ++j) store(sums[j] + c, load(sums[j] + c) + s[j]);
  };
  auto all_columns = [&](auto count) {
    for (int64_t c = first; c < full; c += W)
      one_vector(count, c, [](const T* x) { return load(x); });
    const int lanes = int(last - full);
    if (lanes) one_vector(count, full, [&](const T* x) { return load(x, lanes); });
    for (int j = 0; j < kInputs; ++j) in[j] += count() * pitch;
  };
  int64_t row = tile.rows.begin;
  for (; row + kRows <= tile.rows.end; row += kRows) all_columns([] { return kRows; });
  for (; row < tile.rows.end; ++row) all_columns([] { return 1; });
}

// Writes the outputs of a tile.
template <typename Element, bool kStream, typename T, int kInputs, int kOutputs>
void apply_columns(const Operands<T, kInputs, kOutputs>& operands, const Tile& tile,
                   const GroupArrays<Accumulate<T>>& coefficient_arrays) {
  using V = Vector<Accumulate<T>>;
  constexpr int W = VectorOf<Accumulate<T>>::width, kCoefficients = Element::kCoefficients;
  const GroupArrays<Accumulate<T>> coefficients = coefficient_arrays;
  const Accumulate<T> slope = operands.slope;
  const int64_t first = tile.columns.begin, last = tile.columns.end, pitch = tile.pitch;
  const int64_t full = first + (last - first) / W * W, rows_end = tile.rows.end;
  const T* in[kInputs];
  T* out[kOutputs];
  const int64_t start = tile.rows.begin * pitch;
  for (int j = 0; j < kInputs; ++j) in[j] = operands.in[j] + start;
  for (int j = 0; j < kOutputs; ++j) out[j] = operands.out[j] ? operands.out[j] + start : nullptr;
  // Row by row: several rows at once would save loads of coefficients, but take twice the time,
  // because that breaks the streams that the prefetchers follow.
  for (int64_t row = tile.rows.begin; row < rows_end; ++row) {
    V a[kInputs], k[kCoefficients], results[kOutputs];
    for (int64_t c = first; c < full; c += W) {
      for (int j = 0; j < kCoefficients; ++j) k[j] = load(coefficients[j] + c);
      for (int j = 0; j < kInputs; ++j) {
        prefetch(in[j] + c + kAheadBytes / int64_t(sizeof(T)));
        a[j] = load(in[j] + c);
      }
      Element::apply(a, k, slope, results);
      write<kStream, kOutputs>(out, c, results);
    }
    if (full < last) {
      for (int j = 0; j < kCoefficients; ++j) k[j] = load(coefficients[j] + full);
      for (int j = 0; j < kInputs; ++j) a[j] = load(in[j] + full, int(last - full));
      Element::apply(a, k, slope, results);
      write<kOutputs>(out, full, results, int(last - full));
    }
    for (int j = 0; j < kInputs; ++j) in[j] += pitch;
    for (int j = 0; j < kOutputs; ++j) out[j] = out[j] ? out[j] + pitch : nullptr;
  }
}

}  // namespace
}  // namespace gankernels
