// Selects, at run time, among the copies of a CPU kernel for different instruction sets.
#pragma once

#include "../common.h"

namespace gankernels::cpu {

enum class Capability { kBaseline, kAvx2, kAvx512 };

// The best that this CPU has, unless ATEN_CPU_CAPABILITY (default, avx2, avx512) asks for less, as
// for PyTorch's own kernels. It is read once.
Capability capability();
const char* capability_name();

}  // namespace gankernels::cpu

// At the end of a kernel's file: cpu::NAME calls the best of baseline::NAME, avx2::NAME and
// avx512::NAME. The file is compiled once for each of them, and only the first defines it.
#ifdef GK_BASELINE
#define GK_DISPATCH(RESULT, NAME, PARAMETERS, ARGUMENTS) \
  namespace gankernels {                                 \
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
#else
#define GK_DISPATCH(RESULT, NAME, PARAMETERS, ARGUMENTS)
#endif
#define GK_DISPATCH_PLAIN(RESULT, NAME, P) \
  GK_DISPATCH(RESULT, NAME, (const P& p, const CpuThreads& threads), (p, threads))
#define GK_DISPATCH_PASS(NAME, P)                                                 \
  GK_DISPATCH(void, NAME, (const P& p, void* scratch, const CpuThreads& threads), \
              (p, scratch, threads))
