// Runs a pass of a norm on all threads.
//
// A pass reduces every statistics group, then applies the resulting coefficients. Its speed depends
// on whether the tensors are still cached when they are read the second time:
//
//   reduce_and_apply_by_group    if the groups of a thread fit in its core's L2 cache, they are
//                                reduced and applied together, so memory is read once
//   reduce_then_apply_backwards  otherwise the threads share the positions of all groups, and each
//                                applies its share backwards, starting with the data that the
//                                reduction cached last
//
// A pass has the members
//
//   T, Element, Evaluation     the type of x; its elements, in training and with given statistics
//   Reduction                  see reduction.h
//   p, operands                parameters and tensors
//   reduces(), applies()       whether the two halves are wanted
//   prepare(group, k)          sets the coefficients that `Element::reduce` reads
//   finish(group, partial, k)  turns the merged partial result, zeros if nothing was reduced, into
//                              the group's results and the coefficients of `Element::apply`
#pragma once

#include "layout.h"

namespace gankernels {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kSerial = 16384;

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
