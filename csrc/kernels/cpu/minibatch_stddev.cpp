// minibatch_stddev on the CPU. Compiled once per instruction set, into the namespace GK_ISA.
//
// Bytes: every pass reads and writes each tensor once. It handles one vector of positions at a
// time, for all members of a group. Their elements stay in registers, or in L1 if there are many,
// from the first sum to the results.
#include "../minibatch_stddev.h"

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"

namespace gankernels::GK_ISA {
namespace {

constexpr int64_t kPart = 1024;     // positions per task, summed in A before continuing in double
constexpr int64_t kSerial = 16384;  // below this many elements a second thread costs too much

enum class Pass { kForward, kBackward, kDoubleBackward };

// Some positions of the members of a group: their elements are `stride` apart.
template <typename T>
struct Members {
  const T *x, *tangent;
  T* grad_x;
  int64_t stride, count;
};

// The members' distances from their mean, computed from their distances from the first member.
// The latter are exact if they are small compared with the mean, in which case the rounded mean
// would not be precise enough.
template <typename T, typename V = Vector<Accumulate<T>>>
GK_INLINE void center(const T* from, int64_t stride, int64_t count, int lanes, V* distances) {
  constexpr int W = VectorOf<Accumulate<T>>::width;
  auto element = [&](int64_t m) {
    prefetch(from + m * stride + kAheadBytes / int64_t(sizeof(T)));
    return lanes == W ? load(from + m * stride) : load(from + m * stride, lanes);
  };
  const V pivot = element(0);
  V sum = distances[0] = pivot - pivot;  // NaN if the pivot is infinite
  for (int64_t m = 1; m < count; ++m) {
    distances[m] = element(m) - pivot;
    sum += distances[m];
  }
  const V mean = sum / Accumulate<T>(count);
  for (int64_t m = 0; m < count; ++m) distances[m] -= mean;
}

// Handles one vector of positions, or its first `lanes`, and adds the pass's sum over positions to
// `total`. kCount is the number of members if it is known at compile time. Otherwise it is 0, and
// `scratch` has room for two vectors per member.
template <Pass kPass, int kCount, typename T, typename A, typename V = Vector<A>>
GK_INLINE void visit(const Members<T>& members, int64_t i, int lanes, A eps, A u, V* scratch,
                     V& total) {
  constexpr int W = VectorOf<A>::width;
  const int64_t count = kCount ? kCount : members.count, stride = members.stride;
  V held[kCount ? 2 * kCount : 1];
  V* const d = kCount ? held : scratch;
  V* const c = d + count;
  auto add = [&](V v) { total += lanes == W ? v : keep_first<A>(v, lanes); };
  auto put = [&](int64_t m, V v) {
    T* const to = members.grad_x + m * stride + i;
    lanes == W ? store(to, v) : store(to, v, lanes);
  };

  center(members.x + i, stride, count, lanes, d);
  V squares = {};
  for (int64_t m = 0; m < count; ++m) squares += d[m] * d[m];
  const V sigma = square_root(squares / A(count) + eps);
  if (kPass == Pass::kForward) {
    add(sigma);
  } else if (kPass == Pass::kBackward) {
    const V scale = u / sigma;
    for (int64_t m = 0; m < count; ++m) put(m, d[m] * scale);
  } else {
    center(members.tangent + i, stride, count, lanes, c);
    V q = {};
    for (int64_t m = 0; m < count; ++m) q += c[m] * d[m];
    const V inverse = 1 / sigma, scale = u * inverse;
    q *= inverse;
    add(q);
    q *= inverse / A(count);
    for (int64_t m = 0; m < count; ++m) put(m, (c[m] - q * d[m]) * scale);
  }
}

template <typename T>
struct Kernel {
  using A = Accumulate<T>;
  using V = Vector<A>;
  const MinibatchStddev& p;
  CpuThreads threads;
  int64_t positions, size, parts;  // of a feature; of a sample; of a feature's positions

  Kernel(const MinibatchStddev& parameters, const CpuThreads& available)
      : p(parameters),
        threads(available),
        positions(p.rows * p.run),
        size(positions * p.features),
        parts(ceil_div(positions, kPart)) {
    if (p.n * size < kSerial) threads.count = 1;
  }

  // A task's part of the sum over a feature's positions.
  template <Pass kPass, int kCount>
  double sum(Members<T> members, int64_t begin, int64_t end, int64_t feature, A u,
             V* scratch) const {
    constexpr int W = VectorOf<A>::width;
    V total = {};
    for (int64_t position = begin; position < end;) {
      const int64_t row = position / p.run, in_run = position % p.run;
      const int64_t first = (row * p.features + feature) * p.run + in_run;
      const int64_t last = first + minimum(end - position, p.run - in_run);
      int64_t i = first;
      for (; i + W <= last; i += W) {
        visit<kPass, kCount>(members, i, W, A(p.eps), u, scratch, total);
      }
      if (i < last) {
        visit<kPass, kCount>(members, i, int(last - i), A(p.eps), u, scratch, total);
      }
      position += last - first;
    }
    return sum_lanes<A>(total);
  }

  // Writes the pass's result per group and feature, if it has one, to `result`.
  template <Pass kPass>
  void run(const void* tangent, const void* grad_stddev, void* grad_x, void* result,
           Scratch scratch) const {
    const int64_t cells = p.groups * p.features, tasks = cells * parts;
    double* const partials = scratch.take<double>(tasks);
    V* const of_members = scratch.take<V>(threads.count * 2 * members_of(p, 0));
    auto share = [&](int64_t thread) {
      V* const own = of_members + thread * 2 * members_of(p, 0);
      const int64_t first = tasks * thread / threads.count;
      const int64_t last = tasks * (thread + 1) / threads.count;
      // Features in turn, since in channels-last order they are neighbors.
      for (int64_t task = first; task < last; ++task) {
        const int64_t feature = task % p.features, part = task / p.features % parts;
        const int64_t group = task / p.features / parts, cell = group * p.features + feature;
        const int64_t count = members_of(p, group), from = group * size;
        const Members<T> members = {
            static_cast<const T*>(p.x) + from,
            kPass == Pass::kDoubleBackward ? static_cast<const T*>(tangent) + from : nullptr,
            kPass == Pass::kForward ? nullptr : static_cast<T*>(grad_x) + from, p.groups * size,
            count};
        const double outer =
            kPass == Pass::kForward ? 0 : double(static_cast<const A*>(grad_stddev)[cell]);
        const A u = A(outer / (double(positions) * double(count)));
        const int64_t begin = part * kPart, end = minimum(begin + kPart, positions);
        // Groups of four, the usual size, keep their members in registers.
        const auto of_part = count == 4 ? &Kernel::sum<kPass, 4> : &Kernel::sum<kPass, 0>;
        partials[cell * parts + part] = (this->*of_part)(members, begin, end, feature, u, own);
      }
    };
    parallel(threads, threads.count, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) share(thread);
    });
    if (!result) return;
    for (int64_t cell = 0; cell < cells; ++cell) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += partials[cell * parts + part];
      const int64_t count = kPass == Pass::kForward ? 1 : members_of(p, cell / p.features);
      static_cast<A*>(result)[cell] = A(total / (double(positions) * double(count)));
    }
  }
};

template <Pass kPass>
void run(const MinibatchStddev& p, void* scratch, const CpuThreads& threads, const void* tangent,
         const void* grad_stddev, void* grad_x, void* result) {
  with_type(p.dtype, [&](auto type) {
    const Kernel<typename decltype(type)::type> kernel(p, threads);
    kernel.template run<kPass>(tangent, grad_stddev, grad_x, result, Scratch(scratch));
  });
}

}  // namespace

int64_t scratch_bytes(const MinibatchStddev& p, const CpuThreads& threads) {
  const Kernel<float> kernel(p, threads);  // its sizes do not depend on the type
  return Scratch::bytes<double>(p.groups * p.features * kernel.parts) +
         Scratch::bytes<Vector<float>>(kernel.threads.count * 2 * members_of(p, 0));
}

void minibatch_stddev_forward(const MinibatchStddevForward& p, void* scratch,
                              const CpuThreads& threads) {
  run<Pass::kForward>(p, scratch, threads, nullptr, nullptr, nullptr, p.stddev);
}

void minibatch_stddev_backward(const MinibatchStddevBackward& p, void* scratch,
                               const CpuThreads& threads) {
  run<Pass::kBackward>(p, scratch, threads, nullptr, p.grad_stddev, p.grad_x, nullptr);
}

void minibatch_stddev_double_backward(const MinibatchStddevDoubleBackward& p, void* scratch,
                                      const CpuThreads& threads) {
  run<Pass::kDoubleBackward>(p, scratch, threads, p.tangent, p.grad_stddev, p.grad_x,
                             p.grad_grad_stddev);
}

}  // namespace gankernels::GK_ISA

GK_DISPATCH_PLAIN(int64_t, scratch_bytes, MinibatchStddev)
GK_DISPATCH_PASS(minibatch_stddev_forward, MinibatchStddevForward)
GK_DISPATCH_PASS(minibatch_stddev_backward, MinibatchStddevBackward)
GK_DISPATCH_PASS(minibatch_stddev_double_backward, MinibatchStddevDoubleBackward)
