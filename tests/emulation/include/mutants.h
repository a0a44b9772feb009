// The marks of csrc/kernels/mutant.h, as choices that a test makes while the kernels run. Included
// before every kernel's source, except under the sanitizers.
#pragma once

#include "marks.h"  // EMULATED_MARKS(X), X(name) for every mark in the sources: written by build.py

namespace emulation::mark {
#define NAME(name) name,
enum Mark { EMULATED_MARKS(NAME) kMarks };
#undef NAME
}  // namespace emulation::mark

namespace emulation {
extern bool selected[mark::kMarks];
}

#define GK_SELECTED(name) (::emulation::selected[::emulation::mark::name])
#define GK_MUTANT(name, right, wrong) (GK_SELECTED(name) ? wrong : (right))
#define GK_MUTANT_ADDS(name, statement) \
  if (GK_SELECTED(name)) {              \
    statement;                          \
  }
#define GK_LIMIT GK_MUTANT
