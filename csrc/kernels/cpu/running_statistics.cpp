// update_running_statistics on the CPU. Compiled once per instruction set, into the namespace
// GK_ISA.
#include "../batch_norm_leaky_relu.h"
#include "dispatch.h"
#include "simd.h"

namespace gankernels::GK_ISA {

void update_running_statistics(const UpdateRunningStatistics& p, const CpuThreads&) {
  double momentum = p.momentum;
  if (p.num_batches_tracked) {
    ++*p.num_batches_tracked;
    if (p.cumulative) momentum = 1 / double(*p.num_batches_tracked);
  }
  const double unbiased = p.count / (p.count - 1);
  with_type(p.running_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    constexpr int W = VectorOf<A>::width;
    const A* statistics = static_cast<const A*>(p.statistics);
    auto blend = [&](void* running, const A* values, double factor) {
      T* const to = static_cast<T*>(running);
      auto blended = [&](Vector<A> old, Vector<A> value) {
        return old + A(momentum) * (value * A(factor) - old);
      };
      int64_t c = 0;
      for (; c + W <= p.c; c += W) store(to + c, blended(load(to + c), load(values + c)));
      const int rest = int(p.c - c);
      if (rest) store(to + c, blended(load(to + c, rest), load(values + c, rest)), rest);
    };
    blend(p.running_mean, statistics, 1);
    blend(p.running_var, statistics + p.c, unbiased);
  });
}

}  // namespace gankernels::GK_ISA

GK_DISPATCH_PLAIN(void, update_running_statistics, UpdateRunningStatistics)
