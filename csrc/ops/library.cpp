// Library metadata, read by gankernels/_library.py.
#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/dispatch.h"

namespace gankernels::ops {

static int64_t cpu_capability() { return int64_t(cpu::capability()); }

STABLE_TORCH_LIBRARY_FRAGMENT(gankernels, m) { m.def("cpu_capability() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(gankernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace gankernels::ops
