// Reductions of whole statistics groups, as partial results in double that can be merged.
//
// A reduction has `add_runs` for groups in runs, which adds a chunk of one group to its partial
// result, `reduce_rows` for groups in columns, which sets the partial results of all groups of a
// tile, and `merge`. Only sums within a chunk have the type Accumulate<T>.
#pragma once

#include "walk.h"

namespace gankernels {
namespace {

// Elements of a group (in runs) or of all of them (in columns) that make up a chunk.
constexpr int64_t kChunk = 2048;
constexpr int64_t kChunkOfColumns = 16384;
// A column is summed one row after another, so a chunk of few columns must not have many rows.
constexpr int64_t kChunkRows = 512;

GK_INLINE int64_t rows_of_chunk(Range columns) {
  const int64_t rows = kChunkOfColumns / (columns.end - columns.begin);
  return minimum(kChunkRows, maximum<int64_t>(4, rows));
}

// Mean and variance, by one pass over most chunks: the corrected two-pass algorithm of Chan, Golub
// & LeVeque 1979, with the mean so far instead of the first pass's result. A chunk whose mean turns
// out to be far from it is read again.
template <bool kActivationFirst>
struct Moments {
  using Element = DeviationElement<kActivationFirst>;
  enum Partial { kCount, kMean, kSquares, kPartials };  // kSquares: of deviations from the mean

  // Merges two samples, by the formula of the same authors.
  static void merge(double* into, const double* from) {
    if (from[kCount] == 0) return;
    const double count = into[kCount] + from[kCount], delta = from[kMean] - into[kMean];
    into[kMean] += delta * (from[kCount] / count);
    into[kSquares] += from[kSquares] + delta * delta * (into[kCount] * (from[kCount] / count));
    into[kCount] = count;
  }

  template <typename T, int kInputs, int kOutputs>
  static void add_runs(const Operands<T, kInputs, kOutputs>& operands, const Runs& runs,
                       Range range, const Accumulate<T>*, double* partial) {
    using A = Accumulate<T>;
    const double count = double(range.end - range.begin);
    double sums[Element::kSums], chunk[kPartials];
    A pivot = partial[kCount] ? A(partial[kMean]) : first(operands, runs.offset(range.begin));
    reduce_runs<Element>(operands, runs, range, &pivot, sums);
    if (is_far(count, sums[Element::kDeviation], sums[Element::kSquare])) {
      pivot += A(sums[Element::kDeviation] / count);
      reduce_runs<Element>(operands, runs, range, &pivot, sums);
    }
    correct(count, pivot, sums[Element::kDeviation], sums[Element::kSquare], chunk);
    merge(partial, chunk);
  }

  template <typename T, int kInputs, int kOutputs>
  static void reduce_rows(const Operands<T, kInputs, kOutputs>& operands, const Tile& tile,
                          const GroupArrays<Accumulate<T>>&,
                          const GroupArrays<Accumulate<T>>& workspace,
                          const GroupArrays<double>& partials) {
    using A = Accumulate<T>;
    const auto [c0, c1] = tile.columns;
    double *counts = partials[kCount], *means = partials[kMean], *squares = partials[kSquares];
    for (int64_t c = c0; c < c1; ++c) counts[c] = means[c] = squares[c] = 0;
    const A* deviation_sums = workspace[Element::kDeviation];
    const A* square_sums = workspace[Element::kSquare];
    const GroupArrays<A> pivots = {workspace[Element::kSums], workspace.pitch};
    A* const pivot = pivots[Element::kPivot];
    const auto [r0, r1] = tile.rows;
    for (int64_t c = c0; c < c1 && r0 < r1; ++c) pivot[c] = first(operands, r0 * tile.pitch + c);
    const int64_t step = rows_of_chunk(tile.columns);
    double seen = 0;
    for (int64_t row = r0; row < r1; row += step) {
      const Tile part = {{row, minimum(row + step, r1)}, tile.columns, tile.pitch};
      const double rows = double(part.rows.end - row), total = seen + rows;
      reduce_columns<Element>(operands, part, pivots, workspace);
      bool far = false;
      for (int64_t c = c0; c < c1; ++c) far |= is_far(rows, deviation_sums[c], square_sums[c]);
      if (far) {
        for (int64_t c = c0; c < c1; ++c) pivot[c] += A(deviation_sums[c] / rows);
        reduce_columns<Element>(operands, part, pivots, workspace);
      }
      const double share = rows / total, weight = seen * share;
      for (int64_t c = c0; c < c1; ++c) {
        double chunk[kPartials];
        correct(rows, pivot[c], deviation_sums[c], square_sums[c], chunk);
        const double delta = chunk[kMean] - means[c];
        means[c] += delta * share;
        squares[c] += chunk[kSquares] + delta * delta * weight;
        pivot[c] = A(means[c]);
      }
      seen = total;
    }
    for (int64_t c = c0; c < c1; ++c) counts[c] = seen;
  }

 private:
  // The moments of `count` elements. `sum` is the sum of their deviations from `pivot`, `squares`
  // that of the squared deviations.
  static void correct(double count, double pivot, double sum, double squares, double* exact) {
    exact[kCount] = count;
    exact[kMean] = pivot + sum / count;
    exact[kSquares] = maximum(0.0, squares - sum * (sum / count));
  }

  // Whether that subtraction would lose more than a bit: the pivot is more than a standard
  // deviation away from the mean.
  static bool is_far(double count, double sum, double squares) {
    return sum * sum > 0.5 * count * squares;
  }

  // The value to normalize of the element at an offset.
  template <typename T, int kInputs, int kOutputs>
  static Accumulate<T> first(const Operands<T, kInputs, kOutputs>& operands, int64_t offset) {
    const Accumulate<T> value = load(operands.in[kX] + offset, 1)[0];
    return kActivationFirst ? leaky_relu(value, operands.slope) : value;
  }
};

// The sums of an element.
template <typename Element>
struct Sums {
  static constexpr int kPartials = Element::kSums;

  static void merge(double* into, const double* from) {
    for (int k = 0; k < kPartials; ++k) into[k] += from[k];
  }

  template <typename T, int kInputs, int kOutputs>
  static void add_runs(const Operands<T, kInputs, kOutputs>& operands, const Runs& runs,
                       Range range, const Accumulate<T>* coefficients, double* partial) {
    double sums[kPartials];
    reduce_runs<Element>(operands, runs, range, coefficients, sums);
    merge(partial, sums);
  }

  template <typename T, int kInputs, int kOutputs>
  static void reduce_rows(const Operands<T, kInputs, kOutputs>& operands, const Tile& tile,
                          const GroupArrays<Accumulate<T>>& coefficients,
                          const GroupArrays<Accumulate<T>>& workspace,
                          const GroupArrays<double>& partials) {
    const auto [c0, c1] = tile.columns;
    for (int k = 0; k < kPartials; ++k) {
      for (int64_t c = c0; c < c1; ++c) partials[k][c] = 0;
    }
    const int64_t step = rows_of_chunk(tile.columns);
    for (int64_t row = tile.rows.begin; row < tile.rows.end; row += step) {
      const Range rows = {row, minimum(row + step, tile.rows.end)};
      reduce_columns<Element>(operands, {rows, tile.columns, tile.pitch}, coefficients, workspace);
      for (int k = 0; k < kPartials; ++k) {
        for (int64_t c = c0; c < c1; ++c) partials[k][c] += workspace[k][c];
      }
    }
  }
};

}  // namespace
}  // namespace gankernels
