// Chooses, at run time, among the copies of a CPU kernel compiled for different instruction sets.
#pragma once

namespace gankernels::cpu {

enum class Capability { kBaseline, kAvx2, kAvx512 };

// The best that this CPU has, or less where ATEN_CPU_CAPABILITY (default, avx2, avx512) says so, as
// it does for PyTorch's own kernels. Read once.
Capability capability();
const char* capability_name();

}  // namespace gankernels::cpu
