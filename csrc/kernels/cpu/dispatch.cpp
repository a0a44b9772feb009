#include "dispatch.h"

#include <cstdlib>
#include <cstring>

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
