#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#include "../adam.h"
#include "../batch_norm_leaky_relu.h"
#include "../gradient_norm_penalty.h"
#include "../minibatch_discrimination.h"
#include "../minibatch_stddev.h"

namespace gankernels::cpu {

static Capability detect() {
  Capability best = Capability::kBaseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    best = Capability::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      best = Capability::kAvx512;
    }
  }
  Capability wanted = best;
  if (const char* name = getenv("ATEN_CPU_CAPABILITY")) {
    if (!strcmp(name, "default")) wanted = Capability::kBaseline;
    if (!strcmp(name, "avx2")) wanted = Capability::kAvx2;
  }
  return wanted < best ? wanted : best;
}

Capability capability() {
  static const Capability chosen = detect();
  return chosen;
}

const char* capability_name() {
  switch (capability()) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

}  // namespace gankernels::cpu

// cpu::NAME calls the best of baseline::NAME, avx2::NAME and avx512::NAME.
#define GK_DISPATCH(RESULT, NAME, PARAMETERS, ARGUMENTS) \
  namespace gankernels {                                 \
  namespace baseline {                                   \
  RESULT NAME PARAMETERS;                                \
  }                                                      \
  namespace avx2 {                                       \
  RESULT NAME PARAMETERS;                                \
  }                                                      \
  namespace avx512 {                                     \
  RESULT NAME PARAMETERS;                                \
  }                                                      \
  RESULT cpu::NAME PARAMETERS {                          \
    switch (capability()) {                              \
      case Capability::kAvx512:                          \
        return avx512::NAME ARGUMENTS;                   \
      case Capability::kAvx2:                            \
        return avx2::NAME ARGUMENTS;                     \
      default:                                           \
        return baseline::NAME ARGUMENTS;                 \
    }                                                    \
  }                                                      \
  }
#define GK_DISPATCH_PLAIN(RESULT, NAME, P) \
  GK_DISPATCH(RESULT, NAME, (const P& p, const CpuThreads& threads), (p, threads))
#define GK_DISPATCH_PASS(NAME, P)                                                 \
  GK_DISPATCH(void, NAME, (const P& p, void* scratch, const CpuThreads& threads), \
              (p, scratch, threads))

GK_DISPATCH_PLAIN(void, adam, Adam)
GK_DISPATCH_PLAIN(int64_t, scratch_bytes, BatchNormLeakyReLU)
GK_DISPATCH_PASS(batch_norm_leaky_relu_forward, BatchNormLeakyReLUForward)
GK_DISPATCH_PASS(batch_norm_leaky_relu_backward, BatchNormLeakyReLUBackward)
GK_DISPATCH_PASS(batch_norm_leaky_relu_double_backward, BatchNormLeakyReLUDoubleBackward)
GK_DISPATCH_PLAIN(void, update_running_statistics, UpdateRunningStatistics)
GK_DISPATCH_PLAIN(int64_t, scratch_bytes, GradientNormPenalty)
GK_DISPATCH_PASS(gradient_norm_penalty_forward, GradientNormPenaltyForward)
GK_DISPATCH_PASS(gradient_norm_penalty_backward, GradientNormPenaltyBackward)
GK_DISPATCH_PASS(gradient_norm_penalty_double_backward, GradientNormPenaltyDoubleBackward)
GK_DISPATCH_PLAIN(int64_t, scratch_bytes, MinibatchDiscrimination)
GK_DISPATCH_PASS(minibatch_discrimination_forward, MinibatchDiscriminationForward)
GK_DISPATCH_PASS(minibatch_discrimination_backward, MinibatchDiscriminationBackward)
GK_DISPATCH_PASS(minibatch_discrimination_double_backward, MinibatchDiscriminationDoubleBackward)
GK_DISPATCH_PLAIN(int64_t, scratch_bytes, MinibatchStddev)
GK_DISPATCH_PASS(minibatch_stddev_forward, MinibatchStddevForward)
GK_DISPATCH_PASS(minibatch_stddev_backward, MinibatchStddevBackward)
GK_DISPATCH_PASS(minibatch_stddev_double_backward, MinibatchStddevDoubleBackward)
