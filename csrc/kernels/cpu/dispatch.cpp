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

// cpu::NAME(parameters, threads) runs the best of baseline::, avx2:: and avx512::NAME.
#define GK_DISPATCH(NAME, PARAMETERS) GK_DISPATCH_RETURNING(void, NAME, PARAMETERS)
#define GK_DISPATCH_RETURNING(RESULT, NAME, PARAMETERS)                       \
  namespace gankernels {                                                      \
  namespace baseline {                                                        \
  RESULT NAME(const PARAMETERS&, const CpuThreads&);                          \
  }                                                                           \
  namespace avx2 {                                                            \
  RESULT NAME(const PARAMETERS&, const CpuThreads&);                          \
  }                                                                           \
  namespace avx512 {                                                          \
  RESULT NAME(const PARAMETERS&, const CpuThreads&);                          \
  }                                                                           \
  RESULT cpu::NAME(const PARAMETERS& parameters, const CpuThreads& threads) { \
    switch (capability()) {                                                   \
      case Capability::kAvx512:                                               \
        return avx512::NAME(parameters, threads);                             \
      case Capability::kAvx2:                                                 \
        return avx2::NAME(parameters, threads);                               \
      default:                                                                \
        return baseline::NAME(parameters, threads);                           \
    }                                                                         \
  }                                                                           \
  }

GK_DISPATCH(adam, Adam)
GK_DISPATCH(batch_norm_leaky_relu_forward, BatchNormLeakyReLUForward)
GK_DISPATCH(batch_norm_leaky_relu_backward, BatchNormLeakyReLUBackward)
GK_DISPATCH(batch_norm_leaky_relu_double_backward, BatchNormLeakyReLUDoubleBackward)
GK_DISPATCH(update_running_statistics, UpdateRunningStatistics)
GK_DISPATCH(gradient_norm_penalty_forward, GradientNormPenaltyForward)
GK_DISPATCH(gradient_norm_penalty_backward, GradientNormPenaltyBackward)
GK_DISPATCH(gradient_norm_penalty_double_backward, GradientNormPenaltyDoubleBackward)
GK_DISPATCH_RETURNING(int64_t, minibatch_discrimination_scratch_bytes, MinibatchDiscrimination)
GK_DISPATCH(minibatch_discrimination_forward, MinibatchDiscriminationForward)
GK_DISPATCH(minibatch_discrimination_backward, MinibatchDiscriminationBackward)
GK_DISPATCH(minibatch_discrimination_double_backward, MinibatchDiscriminationDoubleBackward)
GK_DISPATCH(minibatch_stddev_forward, MinibatchStddevForward)
GK_DISPATCH(minibatch_stddev_backward, MinibatchStddevBackward)
GK_DISPATCH(minibatch_stddev_double_backward, MinibatchStddevDoubleBackward)
