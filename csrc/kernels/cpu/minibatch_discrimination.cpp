// minibatch_discrimination on the CPU. Compiled once per instruction set, into the namespace
// GK_ISA.
//
// The kernels b are independent problems, so the lanes of a vector are neighboring b: distances
// need no horizontal sum, and per vector and pair i < j there are two additions and an absolute
// value for every c. m is packed into panels of one vector's width of b (panel.h). A tile of few
// samples by few samples keeps its distances in registers (tile.h). Blocks of samples keep a pair
// of them in a core's L2 cache, and a schedule lets every pair of blocks meet once (tournament.h).
#include "../minibatch_discrimination.h"

#include "dispatch.h"
#include "minibatch_discrimination/tournament.h"

namespace gankernels::GK_ISA {
namespace {

template <typename T>
Strided<const T> input(const void* data, const MinibatchDiscrimination& p, int64_t width,
                       const int64_t* strides) {
  return {static_cast<const T*>(data), p.n, width, strides[0], strides[1],
          width == 1 ? 0 : strides[2]};
}
template <typename T>
Strided<T> output(void* data, const MinibatchDiscrimination& p, int64_t width) {
  return {static_cast<T*>(data), p.n, width, p.b * width, width, 1};
}

// Calls body(Type<T>(), plan) for a problem that is not empty.
template <int D, typename Body>
void with_plan(const MinibatchDiscrimination& p, const CpuThreads& threads, const Body& body) {
  if (p.n == 0 || p.b == 0) return;
  with_type(p.dtype, [&](auto type) {
    body(type, Plan<typename decltype(type)::type, D>(p.n, p.b, p.c, threads.count));
  });
}

// Runs a derivative whose tensors are those that `tensors_of` returns for Type<T>.
template <int D, typename TensorsOf>
void run(const MinibatchDiscrimination& p, void* memory, const CpuThreads& threads,
         const TensorsOf& tensors_of) {
  with_plan<D>(p, threads, [&](auto type, const auto& plan) {
    using T = typename decltype(type)::type;
    Scratch scratch(memory);
    const Workspace<T, D> workspace(plan, scratch);
    const Tensors<T> tensors = tensors_of(type);
    Tournament<T, D>(plan, workspace, tensors).run(threads);
  });
}

template <int D>
int64_t workspace_bytes(const MinibatchDiscrimination& p, const CpuThreads& threads) {
  Scratch counted(nullptr);
  with_plan<D>(p, threads, [&](auto type, const auto& plan) {
    Workspace<typename decltype(type)::type, D>(plan, counted);
  });
  return counted.taken();
}

}  // namespace

int64_t scratch_bytes(const MinibatchDiscrimination& p, const CpuThreads& threads) {
  switch (p.derivative) {
    case 0:
      return workspace_bytes<0>(p, threads);
    case 1:
      return workspace_bytes<1>(p, threads);
    default:
      return workspace_bytes<2>(p, threads);
  }
}

void minibatch_discrimination_forward(const MinibatchDiscriminationForward& p, void* scratch,
                                      const CpuThreads& threads) {
  run<0>(p, scratch, threads, [&](auto type) {
    using T = typename decltype(type)::type;
    return Tensors<T>{input<T>(p.m, p, p.c, p.m_strides), {}, {}, output<T>(p.o, p, 1), {}};
  });
}

void minibatch_discrimination_backward(const MinibatchDiscriminationBackward& p, void* scratch,
                                       const CpuThreads& threads) {
  run<1>(p, scratch, threads, [&](auto type) {
    using T = typename decltype(type)::type;
    return Tensors<T>{input<T>(p.m, p, p.c, p.m_strides),
                      {},
                      input<T>(p.grad_o, p, 1, p.grad_o_strides),
                      {},
                      output<T>(p.grad_m, p, p.c)};
  });
}

void minibatch_discrimination_double_backward(const MinibatchDiscriminationDoubleBackward& p,
                                              void* scratch, const CpuThreads& threads) {
  run<2>(p, scratch, threads, [&](auto type) {
    using T = typename decltype(type)::type;
    return Tensors<T>{input<T>(p.m, p, p.c, p.m_strides),
                      input<T>(p.grad_grad_m, p, p.c, p.grad_grad_m_strides),
                      input<T>(p.grad_o, p, 1, p.grad_o_strides), output<T>(p.grad_grad_o, p, 1),
                      output<T>(p.grad_m, p, p.c)};
  });
}

}  // namespace gankernels::GK_ISA

GK_DISPATCH_PLAIN(int64_t, scratch_bytes, MinibatchDiscrimination)
GK_DISPATCH_PASS(minibatch_discrimination_forward, MinibatchDiscriminationForward)
GK_DISPATCH_PASS(minibatch_discrimination_backward, MinibatchDiscriminationBackward)
GK_DISPATCH_PASS(minibatch_discrimination_double_backward, MinibatchDiscriminationDoubleBackward)
