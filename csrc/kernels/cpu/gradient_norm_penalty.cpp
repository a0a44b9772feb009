// gradient_norm_penalty on the CPU. Compiled once per instruction set, into the namespace GK_ISA.
//
// Bytes: forward reads the gradient once. Backward reads it once and writes as much. Double
// backward reads gradient and tangent once from memory and writes once: it goes sample by sample,
// so that the second read of a sample comes from a cache.
#include "../gradient_norm_penalty.h"

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"

namespace gankernels::GK_ISA {
namespace {

constexpr int64_t kChunk = 4096;            // elements summed in A before continuing in double
constexpr int64_t kSerial = 16384;          // below this many elements one thread is faster
constexpr int64_t kStreamBytes = 16 << 20;  // larger results use non-temporal stores

// The sum over [0, length) of a[i] * b[i].
template <typename T>
double dot(const T* a, const T* b, int64_t length) {
  using V = Vector<Accumulate<T>>;
  constexpr int W = VectorOf<Accumulate<T>>::width;
  constexpr int64_t ahead = kAheadBytes / int64_t(sizeof(T));
  double total = 0;
  for (int64_t begin = 0; begin < length; begin += kChunk) {
    const int64_t end = minimum(begin + kChunk, length);
    V sums[4] = {};
    int64_t i = begin;
    for (; i + 4 * W <= end; i += 4 * W) {
      for (int k = 0; k < 4; ++k) {
        prefetch(a + i + k * W + ahead);
        if (a != b) prefetch(b + i + k * W + ahead);
        sums[k] += load(a + i + k * W) * load(b + i + k * W);
      }
    }
    for (; i + W <= end; i += W) sums[0] += load(a + i) * load(b + i);
    if (i < end) sums[1] += load(a + i, int(end - i)) * load(b + i, int(end - i));
    total += sum_lanes<Accumulate<T>>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return total;
}

// out = p * a + q * b over [0, length). The second term is missing if b is null.
template <bool kStream, typename T, typename A>
void combine(const T* a, A p, const T* b, A q, T* out, int64_t length) {
  constexpr int W = VectorOf<A>::width;
  constexpr int64_t ahead = kAheadBytes / int64_t(sizeof(T));
  auto value = [&](int64_t i) { return b ? load(a + i) * p + load(b + i) * q : load(a + i) * p; };
  auto tail = [&](int64_t i, int lanes) {
    const Vector<A> scaled = load(a + i, lanes) * p;
    store(out + i, b ? scaled + load(b + i, lanes) * q : scaled, lanes);
  };
  int64_t i = 0;
  if (kStream) {  // starts at the address of the first whole vector
    i = minimum(-int64_t(reinterpret_cast<uintptr_t>(out) / sizeof(T)) & int64_t(W - 1), length);
    if (i) tail(0, int(i));
  }
  for (; i + W <= length; i += W) {
    prefetch(a + i + ahead);
    if (b) prefetch(b + i + ahead);
    kStream ? stream(out + i, value(i)) : store(out + i, value(i));
  }
  if (i < length) tail(i, int(length - i));
}

template <typename T>
struct Kernel {
  using A = Accumulate<T>;
  const GradientNormPenalty& p;
  CpuThreads threads;
  int64_t parts;  // per sample, so that few samples keep all threads busy

  Kernel(const GradientNormPenalty& parameters, const CpuThreads& available)
      : p(parameters), threads(available) {
    if (p.n * p.d < kSerial) threads.count = 1;
    parts = p.n % threads.count == 0 || p.n >= 8 * threads.count ? 1 : threads.count;
  }

  // Calls body(n, begin, end, task) for every part of every sample.
  template <typename Body>
  void for_each_part(const Body& body) const {
    parallel(threads, p.n * parts, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t n = task / parts, part = task % parts;
        const int64_t begin = p.d * part / parts, end = p.d * (part + 1) / parts;
        body(n, n * p.d + begin, end - begin, task);
      }
    });
  }

  PenaltyValue<double> penalty(int64_t n) const {
    const double s = static_cast<const A*>(p.squared_norms)[n];
    return penalty_of<double>(s, __builtin_sqrt(s), p.center, p.kind);
  }

  void forward(const GradientNormPenaltyForward& q, Scratch scratch) const {
    const T* grad = static_cast<const T*>(q.grad);
    double* const partial = scratch.take<double>(p.n * parts);
    for_each_part([&](int64_t, int64_t offset, int64_t length, int64_t task) {
      partial[task] = dot(grad + offset, grad + offset, length);
    });
    double total = 0;
    for (int64_t n = 0; n < p.n; ++n) {
      double s = 0;
      for (int64_t part = 0; part < parts; ++part) s += partial[n * parts + part];
      static_cast<A*>(q.squared_norms)[n] = A(s);
      total += penalty(n).value;
    }
    *static_cast<A*>(q.penalty) = A(total / double(p.n));
  }

  // out = p * a + q * b, elements [offset, offset + length) of all.
  void combine_part(const T* a, double p_a, const T* b, double p_b, T* out, int64_t offset,
                    int64_t length) const {
    const bool large = p.n * p.d * int64_t(sizeof(T)) > kStreamBytes;
    const auto run = large ? combine<true, T, A> : combine<false, T, A>;
    run(a + offset, A(p_a), b ? b + offset : nullptr, A(p_b), out + offset, length);
  }

  // d penalty / d grad = phi'(s) * 2 grad / N.
  void backward(const GradientNormPenaltyBackward& q) const {
    const double outer = *static_cast<const A*>(q.grad_penalty) * 2 / double(p.n);
    for_each_part([&](int64_t n, int64_t offset, int64_t length, int64_t) {
      combine_part(static_cast<const T*>(q.grad), outer * penalty(n).first, nullptr, 0,
                   static_cast<T*>(q.grad_grad), offset, length);
    });
  }

  // With tangent t: L = outer * sum_n phi'(s_n) (t . grad)_n, outer = 2 grad_penalty / N, and so
  // dL/dgrad = outer * (phi'(s) t + 2 phi''(s) (t . grad) grad).
  void double_backward(const GradientNormPenaltyDoubleBackward& q, Scratch scratch) const {
    const T *grad = static_cast<const T*>(q.grad), *t = static_cast<const T*>(q.tangent);
    const double outer = *static_cast<const A*>(q.grad_penalty) * 2 / double(p.n);
    double* const products = scratch.take<double>(p.n * parts);
    auto product = [&](int64_t n) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += products[n * parts + part];
      return sum;
    };
    auto reduce = [&](int64_t, int64_t offset, int64_t length, int64_t task) {
      products[task] = dot(grad + offset, t + offset, length);
    };
    auto apply = [&](int64_t n, int64_t offset, int64_t length, int64_t) {
      const PenaltyValue<double> phi = penalty(n);
      // If the second derivative is zero there is no second term, even if grad is not finite.
      combine_part(t, outer * phi.first, phi.second == 0 ? nullptr : grad,
                   outer * 2 * phi.second * product(n), static_cast<T*>(q.grad_grad), offset,
                   length);
    };
    if (parts == 1) {
      for_each_part([&](auto... part) {
        reduce(part...);
        apply(part...);
      });
    } else {
      for_each_part(reduce);
      for_each_part(apply);
    }
    double total = 0;
    for (int64_t n = 0; n < p.n; ++n) total += penalty(n).first * product(n);
    *static_cast<A*>(q.grad_grad_penalty) = A(total * 2 / double(p.n));
  }
};

template <typename Parameters, typename Body>
void with_kernel(const Parameters& p, const CpuThreads& threads, const Body& body) {
  with_type(p.dtype, [&](auto type) { body(Kernel<typename decltype(type)::type>(p, threads)); });
}

}  // namespace

int64_t scratch_bytes(const GradientNormPenalty& p, const CpuThreads& threads) {
  return Scratch::bytes<double>(p.n * Kernel<float>(p, threads).parts);
}

void gradient_norm_penalty_forward(const GradientNormPenaltyForward& p, void* scratch,
                                   const CpuThreads& threads) {
  with_kernel(p, threads, [&](const auto& kernel) { kernel.forward(p, Scratch(scratch)); });
}

void gradient_norm_penalty_backward(const GradientNormPenaltyBackward& p, void*,
                                    const CpuThreads& threads) {
  with_kernel(p, threads, [&](const auto& kernel) { kernel.backward(p); });
}

void gradient_norm_penalty_double_backward(const GradientNormPenaltyDoubleBackward& p,
                                           void* scratch, const CpuThreads& threads) {
  with_kernel(p, threads, [&](const auto& kernel) { kernel.double_backward(p, Scratch(scratch)); });
}

}  // namespace gankernels::GK_ISA

GK_DISPATCH_PLAIN(int64_t, scratch_bytes, GradientNormPenalty)
GK_DISPATCH_PASS(gradient_norm_penalty_forward, GradientNormPenaltyForward)
GK_DISPATCH_PASS(gradient_norm_penalty_backward, GradientNormPenaltyBackward)
GK_DISPATCH_PASS(gradient_norm_penalty_double_backward, GradientNormPenaltyDoubleBackward)
