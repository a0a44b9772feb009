// Memory layouts of statistics groups, and how much of them a thread takes at a time.
//
// A layout has the members
//
//   by_group()                 whether groups should be reduced and applied together
//   unit(), unit_of_cache()    the least number of groups that a thread takes, and at a time
//   reduce(positions, groups)  sets the groups' partial results over a range of positions
//   positions(), grain()       positions of a group, and the multiples in which they are shared
//   apply_groups(groups)       writes the outputs of whole groups
//   apply_steps(steps)         writes the outputs of a range of steps, which are in memory order
//   steps(), steps_of_block()  how many steps there are, and how many stay in a cache
#pragma once

#include "../parallel.h"
#include "reduction.h"

namespace gankernels {
namespace {

// Bytes that a thread applies in memory order before it steps back to an earlier block.
constexpr int64_t kBlockBytes = 256 << 10;
// A thread's share of a cache: the bytes that it may access between the first and second read.
constexpr int64_t kCacheBytes = 768 << 10;
// Passes that read and write more than this use non-temporal stores: the results would not stay
// cached, and lines that are written completely need not be read first.
constexpr int64_t kStreamBytes = 24 << 20;

template <typename Pass>
bool is_streamed(const BatchNormLeakyReLU& p) {
  constexpr int kTensors = Pass::Element::kInputs + Pass::Element::kOutputs;
  return p.n * p.c * p.s * int64_t(sizeof(typename Pass::T)) * kTensors > kStreamBytes;
}

// Columns are distributed in whole cache lines, so that no two threads share one.
template <typename T>
constexpr int64_t kLine = 64 / int64_t(sizeof(T)) > 16 ? 64 / int64_t(sizeof(T)) : 16;

// Arrays over all groups: coefficients once; sums of a chunk and partial results for every part of
// the reduction.
template <typename T>
class Workspace {
  using A = Accumulate<T>;

 public:
  Workspace(Scratch& scratch, int64_t groups, int64_t parts)
      : pitch_(padded(groups)),
        coefficients_(scratch.take<A>(kMaxCoefficients * pitch_)),
        sums_(scratch.take<A>(parts * kMaxSums * pitch_)),
        partials_(scratch.take<double>(parts * kMaxSums * pitch_)) {}

  GroupArrays<A> coefficients() const { return {coefficients_, pitch_}; }
  GroupArrays<A> sums(int64_t part) const { return {sums_ + part * kMaxSums * pitch_, pitch_}; }
  GroupArrays<double> partials(int64_t part) const {
    return {partials_ + part * kMaxSums * pitch_, pitch_};
  }

 private:
  // Whole vectors may be loaded at the end of an array.
  static int64_t padded(int64_t groups) { return ceil_div(groups, kLine<T>) * kLine<T>; }

  int64_t pitch_;
  A *coefficients_, *sums_;
  double* partials_;
};

// Channels first: group c consists of the runs (n, c) of s elements each.
template <typename Pass>
class GroupsInRuns {
  using T = typename Pass::T;
  using A = Accumulate<T>;
  using Element = typename Pass::Element;
  using Reduction = typename Pass::Reduction;

 public:
  GroupsInRuns(const Pass& pass, int64_t threads)
      : pass_(pass), n_(pass.p.n), c_(pass.p.c), s_(pass.p.s), threads_(threads) {
    // A line that is written partly by non-temporal and partly by ordinary stores costs several
    // times as much as with either kind alone, so vectors shorter than a line need runs of whole
    // lines.
    const bool whole_lines =
        VectorOf<A>::width * sizeof(T) == 64 || s_ * int64_t(sizeof(T)) % 64 == 0;
    apply_run_ = is_streamed<Pass>(pass.p) && whole_lines ? choose<true>() : choose<false>();
    pieces_ = n_ * c_ >= 8 * threads ? 1 : threads;
    chunk_ = s_ < kChunk ? kChunk / maximum<int64_t>(1, s_) * s_ : kChunk;  // of whole short runs
  }

  int64_t positions() const { return n_ * s_; }
  // Threads share whole runs if there are enough of them.
  int64_t grain() const { return n_ < threads_ ? 1 : maximum<int64_t>(1, s_); }
  int64_t steps() const { return n_ * c_ * pieces_; }  // runs, or pieces of them
  int64_t steps_of_block() const {
    return ceil_div(kBlockBytes, maximum<int64_t>(1, s_) * int64_t(sizeof(T)));
  }
  int64_t unit() const { return 1; }
  int64_t unit_of_cache() const { return 1; }

  // Only tensors that fit in the cores' caches as a whole gain from going by group. In a larger
  // tensor a group would fit too, but its runs are short and far apart, which costs more than
  // reading them from memory a second time.
  bool by_group() const {
    const int64_t bytes = positions() * c_ * int64_t(sizeof(T)) * Element::kInputs;
    const bool balanced = c_ % threads_ == 0 || c_ >= 8 * threads_;
    return pass_.reduces() && pass_.applies() && bytes <= kCacheBytes * threads_ && balanced;
  }

  void reduce(Range positions, Range groups, const GroupArrays<A>& coefficients,
              const GroupArrays<A>&, const GroupArrays<double>& partials) const {
    double partial[Reduction::kPartials] = {};
    for (int64_t c = groups.begin; c < groups.end; ++c) {
      partials.template store_group<Reduction::kPartials>(c, partial);
    }
    for (int64_t i = positions.begin; i < positions.end; i += chunk_) {
      const Range chunk = {i, minimum(i + chunk_, positions.end)};
      for (int64_t c = groups.begin; c < groups.end; ++c) {
        A k[kForwardCoefficients];  // the only ones that a reduction reads
        coefficients.template load_group<kForwardCoefficients>(c, k);
        partials.template load_group<Reduction::kPartials>(c, partial);
        Reduction::add_runs(pass_.operands, {c * s_, s_, c_ * s_}, chunk, k, partial);
        partials.template store_group<Reduction::kPartials>(c, partial);
      }
    }
  }

  void apply_groups(Range groups, const GroupArrays<A>& coefficients) const {
    for (int64_t c = groups.begin; c < groups.end; ++c) {
      for (int64_t n = 0; n < n_; ++n) apply(n * c_ + c, 0, s_, coefficients);
    }
  }

  void apply_steps(Range steps, const GroupArrays<A>& coefficients) const {
    for (int64_t step = steps.begin; step < steps.end; ++step) {
      const int64_t piece = step % pieces_;
      apply(step / pieces_, s_ * piece / pieces_, s_ * (piece + 1) / pieces_, coefficients);
    }
  }

 private:
  void apply(int64_t run, int64_t begin, int64_t end, const GroupArrays<A>& coefficients) const {
    A k[Element::kCoefficients];
    coefficients.template load_group<Element::kCoefficients>(run % c_, k);
    apply_run_(pass_.operands, {run * s_ + begin, run * s_ + end}, k);
  }

  template <bool kStream>
  auto choose() const {
    return pass_.p.training ? apply_run<Element, kStream, T, Element::kInputs, Element::kOutputs>
                            : apply_run<typename Pass::Evaluation, kStream, T, Element::kInputs,
                                        Element::kOutputs>;
  }

  const Pass& pass_;
  int64_t n_, c_, s_, threads_, pieces_, chunk_;
  void (*apply_run_)(const Operands<T, Element::kInputs, Element::kOutputs>&, Range, const A*);
};

// Channels last: group c is column c of a matrix of n * s rows.
template <typename Pass>
class GroupsInColumns {
  using T = typename Pass::T;
  using A = Accumulate<T>;
  using Element = typename Pass::Element;

 public:
  GroupsInColumns(const Pass& pass, int64_t threads)
      : pass_(pass), rows_(pass.p.n * pass.p.s), c_(pass.p.c), threads_(threads) {
    // Non-temporal stores need whole, aligned vectors in every row.
    const bool aligned =
        c_ % VectorOf<A>::width == 0 && misalignment<Element::kOutputs>(pass.operands.out, 0) == 0;
    apply_columns_ = is_streamed<Pass>(pass.p) && aligned ? choose<true>() : choose<false>();
  }

  int64_t positions() const { return rows_; }
  int64_t grain() const { return 1; }
  int64_t steps() const { return rows_; }
  int64_t steps_of_block() const {
    return maximum<int64_t>(1, kBlockBytes / (c_ * int64_t(sizeof(T))));
  }
  int64_t unit() const { return kLine<T>; }
  // Columns that fit in a cache, but not too few, which would defeat the prefetchers.
  int64_t unit_of_cache() const {
    const int64_t fit = kCacheBytes / maximum<int64_t>(1, row_bytes(rows_)) / kLine<T> * kLine<T>;
    return fit >= 16 * kLine<T> ? fit : ceil_div(c_, kLine<T>) * kLine<T>;
  }

  bool by_group() const {
    const int64_t lines = ceil_div(c_, kLine<T>);
    const int64_t share = ceil_div(lines, threads_) * kLine<T>;
    return threads_ == 1 || (row_bytes(rows_) * share <= kCacheBytes && lines >= threads_);
  }

  void reduce(Range positions, Range groups, const GroupArrays<A>& coefficients,
              const GroupArrays<A>& sums, const GroupArrays<double>& partials) const {
    Pass::Reduction::reduce_rows(pass_.operands, {positions, groups, c_}, coefficients, sums,
                                 partials);
  }

  void apply_groups(Range groups, const GroupArrays<A>& coefficients) const {
    apply_columns_(pass_.operands, {{0, rows_}, groups, c_}, coefficients);
  }

  void apply_steps(Range steps, const GroupArrays<A>& coefficients) const {
    apply_columns_(pass_.operands, {steps, {0, c_}, c_}, coefficients);
  }

 private:
  // The bytes of one column of all inputs.
  static int64_t row_bytes(int64_t rows) { return rows * int64_t(sizeof(T)) * Element::kInputs; }

  template <bool kStream>
  auto choose() const {
    return pass_.p.training
               ? apply_columns<Element, kStream, T, Element::kInputs, Element::kOutputs>
               : apply_columns<typename Pass::Evaluation, kStream, T, Element::kInputs,
                               Element::kOutputs>;
  }

  const Pass& pass_;
  int64_t rows_, c_, threads_;
  void (*apply_columns_)(const Operands<T, Element::kInputs, Element::kOutputs>&, const Tile&,
                         const GroupArrays<A>&);
};

}  // namespace
}  // namespace gankernels
