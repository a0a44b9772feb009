// Runs a pass of a norm on all threads.
//
// A pass reduces every statistics group, then applies the coefficients that follow. What makes it
// fast is where the tensors are when they are read the second time:
//
//   reduce_and_apply_by_group    where the groups of a thread fit in its core's L2 cache, they are
//                                reduced and applied in one go, so memory is read once
//   reduce_then_apply_backwards  otherwise the threads share the positions of all groups, and each
//                                applies its share backwards, starting with the data that the
//                                reduction cached last
//
// A pass has the members
//
//   T, Element, Evaluation   its elements; Evaluation is that of given statistics
//   Reduction                see reduction.h
//   p, operands              parameters and tensors
//   reduces(), applies()     whether the two halves are wanted
//   prepare(group, k)        sets the coefficients that `Element::reduce` reads
//   finish(group, partial, k)  turns the merged partial result, zeros where nothing was reduced,
//                            into the group's results and the coefficients of `Element::apply`
#pragma once

#include "../parallel.h"
#include "reduction.h"

namespace gankernels {
namespace {

// What a thread applies in memory order before it steps back to an earlier block.
constexpr int64_t kBlockBytes = 256 << 10;
// A thread's share of a cache: what it may touch between the first and the second read.
constexpr int64_t kCacheBytes = 768 << 10;
// Below this many elements a second thread costs more than it saves.
constexpr int64_t kSerial = 16384;
// Passes that read and write more than this use non-temporal stores: the results would not stay
// cached, and lines that are written completely need not be read first.
constexpr int64_t kStreamBytes = 24 << 20;

template <typename Pass>
bool is_streamed(const BatchNormLeakyReLU& p) {
  constexpr int kTensors = Pass::Element::kInputs + Pass::Element::kOutputs;
  return p.n * p.c * p.s * size_of(p.dtype) * kTensors > kStreamBytes;
}

// Columns are given out in whole lines, so that no two threads share one.
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

// ---- layouts -----------------------------------------------------------------------------------

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
    // A line of which one part is stored past the caches and another is not costs several times as
    // much as either, so vectors shorter than a line need runs of whole lines.
    const bool whole_lines =
        VectorOf<A>::width * sizeof(T) == 64 || s_ * int64_t(sizeof(T)) % 64 == 0;
    apply_run_ = is_streamed<Pass>(pass.p) && whole_lines ? choose<true>() : choose<false>();
    pieces_ = n_ * c_ >= 8 * threads ? 1 : threads;
    chunk_ = s_ < kChunk ? kChunk / maximum<int64_t>(1, s_) * s_ : kChunk;  // of whole short runs
  }

  int64_t positions() const { return n_ * s_; }             // of a group
  // Threads share whole runs where there are enough of them.
  int64_t grain() const { return n_ < threads_ ? 1 : maximum<int64_t>(1, s_); }
  int64_t steps() const { return n_ * c_ * pieces_; }       // of applying: runs, or pieces of them
  int64_t steps_of_block() const {
    return ceil_div(kBlockBytes, maximum<int64_t>(1, s_) * int64_t(sizeof(T)));
  }
  int64_t unit() const { return 1; }           // groups that one thread takes
  int64_t unit_of_cache() const { return 1; }  // groups that one thread takes at a time

  // Only tensors that fit in the cores' caches as a whole gain from going by group: in a larger one
  // a group would fit too, but its runs are short and far apart, which costs the memory more than
  // reading them a second time does.
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
        A k[kForwardCoefficients];  // a reduction reads no others
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
    // Vectors that are streamed must be whole and aligned in every row.
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
  // What fits in a cache, but narrow blocks of columns would defeat the prefetchers.
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
  // Of one column of all inputs.
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

// ---- schedules ---------------------------------------------------------------------------------

template <typename Pass, typename Layout>
void reduce_and_apply_by_group(const Pass& pass, const Layout& layout,
                               const Workspace<typename Pass::T>& workspace,
                               const CpuThreads& threads) {
  const auto coefficients = workspace.coefficients();
  const auto partials = workspace.partials(0);
  auto take = [&](Range groups) {
    if (pass.reduces()) {
      for (int64_t c = groups.begin; c < groups.end; ++c) pass.prepare(c, coefficients);
      layout.reduce({0, layout.positions()}, groups, coefficients, workspace.sums(0), partials);
    }
    for (int64_t c = groups.begin; c < groups.end; ++c) {
      double partial[Pass::Reduction::kPartials] = {};
      if (pass.reduces()) partials.template load_group<Pass::Reduction::kPartials>(c, partial);
      pass.finish(c, partial, coefficients);
    }
    if (pass.applies()) layout.apply_groups(groups, coefficients);
  };
  const int64_t unit = layout.unit(), at_a_time = layout.unit_of_cache();
  parallel(threads, ceil_div(pass.p.c, unit), [&](int64_t begin, int64_t end) {
    const int64_t last = minimum(end * unit, pass.p.c);
    for (int64_t c = begin * unit; c < last; c += at_a_time) {
      take({c, minimum(c + at_a_time, last)});
    }
  });
}

template <typename Pass, typename Layout>
void reduce_then_apply_backwards(const Pass& pass, const Layout& layout,
                                 const Workspace<typename Pass::T>& workspace,
                                 const CpuThreads& threads) {
  using Reduction = typename Pass::Reduction;
  const auto coefficients = workspace.coefficients();
  const int64_t parts = threads.count, groups = pass.p.c;
  // Calls body(part, its share of a range of `size`, in multiples of `grain`) in parallel.
  auto for_each_part = [&](int64_t size, int64_t grain, auto body) {
    parallel(threads, parts, [&](int64_t begin, int64_t end) {
      const int64_t grains = size / grain;
      for (int64_t part = begin; part < end; ++part) {
        body(part, Range{grains * part / parts * grain, grains * (part + 1) / parts * grain});
      }
    });
  };

  if (pass.reduces()) {
    for (int64_t c = 0; c < groups; ++c) pass.prepare(c, coefficients);
    for_each_part(layout.positions(), layout.grain(), [&](int64_t part, Range positions) {
      layout.reduce(positions, {0, groups}, coefficients, workspace.sums(part),
                    workspace.partials(part));
    });
  }
  for (int64_t c = 0; c < groups; ++c) {
    double total[Reduction::kPartials] = {}, partial[Reduction::kPartials];
    for (int64_t part = 0; part < parts && pass.reduces(); ++part) {
      workspace.partials(part).template load_group<Reduction::kPartials>(c, partial);
      Reduction::merge(total, partial);
    }
    pass.finish(c, total, coefficients);
  }
  if (!pass.applies()) return;
  const int64_t block = layout.steps_of_block();
  for_each_part(layout.steps(), 1, [&](int64_t, Range steps) {
    for (int64_t last = steps.end; last > steps.begin; last -= block) {
      layout.apply_steps({maximum(last - block, steps.begin), last}, coefficients);
    }
  });
}

template <typename Pass, typename Layout>
void run_in(const Pass& pass, const Layout& layout, Scratch scratch, const CpuThreads& threads) {
  const Workspace<typename Pass::T> workspace(scratch, pass.p.c, threads.count);
  layout.by_group() ? reduce_and_apply_by_group(pass, layout, workspace, threads)
                    : reduce_then_apply_backwards(pass, layout, workspace, threads);
}

GK_INLINE int64_t threads_for(const BatchNormLeakyReLU& p, const CpuThreads& threads) {
  return p.n * p.c * p.s < kSerial ? 1 : threads.count;
}

template <typename Pass>
void run_pass(const Pass& pass, Scratch scratch, CpuThreads threads) {
  threads.count = threads_for(pass.p, threads);
  if (pass.p.channels_last) {
    run_in(pass, GroupsInColumns<Pass>(pass, threads.count), scratch, threads);
  } else {
    run_in(pass, GroupsInRuns<Pass>(pass, threads.count), scratch, threads);
  }
}

}  // namespace
}  // namespace gankernels
