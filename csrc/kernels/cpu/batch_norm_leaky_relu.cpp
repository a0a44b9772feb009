// batch_norm_leaky_relu on the CPU. Compiled once per instruction set, into the namespace GK_ISA.
//
// Each derivative is a pass of two halves: `reduce` sums over every channel, `apply` writes the
// elementwise results from per-channel coefficients. This file turns the sums into these
// coefficients. norm_leaky_relu/ has the rest, from the inside out: the arithmetic of one element
// (element.h), loops (walk.h), accurate reductions (reduction.h), memory layouts (layout.h),
// threads and caches (schedule.h).
#include "dispatch.h"
#include "norm_leaky_relu/schedule.h"

namespace gankernels::GK_ISA {
namespace {

GK_INLINE double load_parameter(const void* p, DType dtype, int64_t i, double missing) {
  if (!p) return missing;
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
  if (dtype == DType::kFloat64) return static_cast<const double*>(p)[i];
  HalfBits v{};
  v[0] = static_cast<const uint16_t*>(p)[i];
  return dtype == DType::kBFloat16 ? promote(v, (BFloat16*)nullptr)[0]
                                   : promote(v, (Float16*)nullptr)[0];
}

// The inputs of a channel's coefficients besides its sums.
struct Channel {
  double weight, bias, invstd;
};

// The common base of all passes. Dense layers have at least as many channels as rows, so a
// division, a square root or a call per channel matters: without GK_INLINE their backward passes
// were measured to take 6 % longer.
template <typename Element_, typename Evaluation_, typename Reduction_, typename Parameters,
          typename T_>
struct Pass {
  using T = T_;
  using A = Accumulate<T>;
  using Element = Element_;
  using Evaluation = Evaluation_;
  using Reduction = Reduction_;

  const Parameters& p;
  Operands<T, Element::kInputs, Element::kOutputs> operands;

  explicit Pass(const Parameters& parameters) : p(parameters) {
    operands.slope = A(p.negative_slope);
    operands.in[kX] = static_cast<const T*>(p.x);
  }

  GK_INLINE Channel channel(int64_t c) const {
    const double var = static_cast<const A*>(p.statistics)[p.c + c];
    const int64_t i = affine_index(p, c);
    return {load_parameter(p.weight, p.parameter_dtype, i, 1),
            load_parameter(p.bias, p.parameter_dtype, i, 0), 1 / __builtin_sqrt(var + p.eps)};
  }

  GK_INLINE void set_forward_coefficients(int64_t c, const Channel& channel,
                                          const GroupArrays<A>& k) const {
    k[kMean][c] = static_cast<const A*>(p.statistics)[c];
    k[kScale][c] = A(channel.weight * channel.invstd);
    k[kShift][c] = A(channel.bias);
  }
};

template <typename T, bool kActivationFirst>
struct ForwardPass : Pass<ForwardElement<kActivationFirst>, ForwardElement<kActivationFirst>,
                          Moments<kActivationFirst>, BatchNormLeakyReLUForward, T> {
  using typename ForwardPass::Pass::A;
  using typename ForwardPass::Pass::Element;
  using typename ForwardPass::Pass::Reduction;

  explicit ForwardPass(const BatchNormLeakyReLUForward& p) : ForwardPass::Pass(p) {
    this->operands.out[Element::kY] = static_cast<T*>(p.y);
  }

  bool reduces() const { return this->p.compute_statistics; }
  bool applies() const { return this->p.y; }

  GK_INLINE void prepare(int64_t, const GroupArrays<A>&) const {}

  GK_INLINE void finish(int64_t c, const double* partial, const GroupArrays<A>& k) const {
    if (reduces()) {
      A* const statistics = static_cast<A*>(this->p.statistics);
      statistics[c] = A(partial[Reduction::kMean]);
      statistics[this->p.c + c] = A(partial[Reduction::kSquares] / partial[Reduction::kCount]);
    }
    this->set_forward_coefficients(c, this->channel(c), k);
  }
};

// The common base of backward and double backward: sums of an element over every channel.
template <typename Element, typename Evaluation, typename Parameters, typename T>
struct SumPass : Pass<Element, Evaluation, Sums<Element>, Parameters, T> {
  using typename SumPass::Pass::A;

  explicit SumPass(const Parameters& p) : SumPass::Pass(p) {
    this->operands.in[kGradY] = static_cast<const T*>(p.grad_y);
  }

  bool reduces() const { return this->p.sums && this->p.compute_sums; }

  GK_INLINE void prepare(int64_t c, const GroupArrays<A>& k) const {
    this->set_forward_coefficients(c, this->channel(c), k);
  }

  // The channel's sums, with x in units of xhat: written if this pass computes them, else read.
  GK_INLINE void take_sums(int64_t c, double invstd, const double* partial, double* sums) const {
    A* const stored = static_cast<A*>(this->p.sums);
    for (int k = 0; k < Element::kSums; ++k) {
      if (reduces()) {
        sums[k] = Element::of_xhat(k) ? partial[k] * invstd : partial[k];
        stored[k * this->p.c + c] = A(sums[k]);
      } else {
        sums[k] = stored ? double(stored[k * this->p.c + c]) : 0;
      }
    }
  }
};

template <typename T, bool kActivationFirst>
struct BackwardPass
    : SumPass<BackwardElement<kActivationFirst>, EvaluationBackwardElement<kActivationFirst>,
              BatchNormLeakyReLUBackward, T> {
  using typename BackwardPass::SumPass::A;
  using E = BackwardElement<kActivationFirst>;

  explicit BackwardPass(const BatchNormLeakyReLUBackward& p) : BackwardPass::SumPass(p) {
    this->operands.out[E::kGradX] = static_cast<T*>(p.grad_x);
  }

  bool applies() const { return this->p.grad_x; }

  GK_INLINE void finish(int64_t c, const double* partial, const GroupArrays<A>& k) const {
    const auto& p = this->p;
    double sums[E::kSums];
    const Channel channel = this->channel(c);
    this->take_sums(c, channel.invstd, partial, sums);
    this->set_forward_coefficients(c, channel, k);
    const auto of_grad_x = backward_coefficients<double>(
        channel.weight, channel.invstd, sums[E::kSumG], sums[E::kSumGXhat], p.count, p.training);
    k[E::kG][c] = A(of_grad_x.g);
    k[E::kCentered][c] = A(of_grad_x.centered);
    k[E::kConstant][c] = A(of_grad_x.constant);
  }
};

template <typename T, bool kActivationFirst>
struct DoubleBackwardPass : SumPass<DoubleBackwardElement<kActivationFirst>,
                                    EvaluationDoubleBackwardElement<kActivationFirst>,
                                    BatchNormLeakyReLUDoubleBackward, T> {
  using typename DoubleBackwardPass::SumPass::A;
  using E = DoubleBackwardElement<kActivationFirst>;

  explicit DoubleBackwardPass(const BatchNormLeakyReLUDoubleBackward& p)
      : DoubleBackwardPass::SumPass(p) {
    this->operands.in[kGradGradX] = static_cast<const T*>(p.grad_grad_x);
    this->operands.out[E::kGradGradY] = static_cast<T*>(p.grad_grad_y);
    this->operands.out[E::kGradX] = static_cast<T*>(p.grad_x);
  }

  bool applies() const { return this->p.grad_grad_y || this->p.grad_x; }

  GK_INLINE void finish(int64_t c, const double* partial, const GroupArrays<A>& k) const {
    const auto& p = this->p;
    double sums[E::kSums], grad_weight;
    const Channel channel = this->channel(c);
    this->take_sums(c, channel.invstd, partial, sums);
    this->set_forward_coefficients(c, channel, k);
    const DType dtype = sizeof(A) == 8 ? DType::kFloat64 : DType::kFloat32;
    const int64_t i = affine_index(p, c);
    const auto of = double_backward_coefficients<double>(
        channel.weight, channel.invstd, sums[E::kSumG], sums[E::kSumGXhat], sums[E::kSumV],
        sums[E::kSumVXhat], sums[E::kSumVG], load_parameter(p.grad_grad_weight, dtype, i, 0),
        load_parameter(p.grad_grad_bias, dtype, i, 0), p.count, p.training, &grad_weight);
    k[E::kYV][c] = A(of.y_v);
    k[E::kYCentered][c] = A(of.y_centered);
    k[E::kYConstant][c] = A(of.y_constant);
    k[E::kXG][c] = A(of.x_g);
    k[E::kXV][c] = A(of.x_v);
    k[E::kXCentered][c] = A(of.x_centered);
    k[E::kXConstant][c] = A(of.x_constant);
    if (p.grad_weight) static_cast<A*>(p.grad_weight)[c] = A(grad_weight);
  }
};

template <template <typename, bool> class PassOf, typename Parameters>
void run(const Parameters& p, void* scratch, const CpuThreads& threads) {
  if (p.c == 0) return;
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    p.activation_first ? run_pass(PassOf<T, true>(p), Scratch(scratch), threads)
                       : run_pass(PassOf<T, false>(p), Scratch(scratch), threads);
  });
}

}  // namespace

int64_t scratch_bytes(const BatchNormLeakyReLU& p, const CpuThreads& threads) {
  Scratch counted(nullptr);
  with_type(p.dtype, [&](auto type) {
    Workspace<typename decltype(type)::type>(counted, p.c, threads_for(p, threads));
  });
  return counted.taken();
}

void batch_norm_leaky_relu_forward(const BatchNormLeakyReLUForward& p, void* scratch,
                                   const CpuThreads& threads) {
  run<ForwardPass>(p, scratch, threads);
}

void batch_norm_leaky_relu_backward(const BatchNormLeakyReLUBackward& p, void* scratch,
                                    const CpuThreads& threads) {
  run<BackwardPass>(p, scratch, threads);
}

void batch_norm_leaky_relu_double_backward(const BatchNormLeakyReLUDoubleBackward& p, void* scratch,
                                           const CpuThreads& threads) {
  run<DoubleBackwardPass>(p, scratch, threads);
}

}  // namespace gankernels::GK_ISA

GK_DISPATCH_PLAIN(int64_t, scratch_bytes, BatchNormLeakyReLU)
GK_DISPATCH_PASS(batch_norm_leaky_relu_forward, BatchNormLeakyReLUForward)
GK_DISPATCH_PASS(batch_norm_leaky_relu_backward, BatchNormLeakyReLUBackward)
GK_DISPATCH_PASS(batch_norm_leaky_relu_double_backward, BatchNormLeakyReLUDoubleBackward)
