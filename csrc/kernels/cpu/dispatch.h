// Selects, at run time, among the copies of a CPU kernel for different instruction sets.
#pragma once

namespace gankernels::cpu {

enum class Capability { kBaseline, kAvx2, kAvx512 };

// The best that this CPU has, unless ATEN_CPU_CAPABILITY (default, avx2, avx512) asks for less, as
// for PyTorch's own kernels. It is read once.
Capability capability();
const char* capability_name();

}  // namespace gankernels::cpu
