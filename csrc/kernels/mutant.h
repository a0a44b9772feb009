// Marks in the kernels, for the mutation tests in tests/emulation/test_mutants.py:
//
//   GK_MUTANT(name, right, wrong)     an expression: `right`, but `wrong` in the mutant `name`
//   GK_MUTANT_ADDS(name, statement)   no statement at all, but `statement` in the mutant `name`
//   GK_LIMIT(name, limit, small)      an expression: `limit`, or `small` if a test selects it,
//                                     since no test has enough elements to reach the limit itself
//
// All other builds contain only the right code. The emulation defines these macros itself and
// selects the mutant at run time.
#pragma once

#if !defined(GK_MUTANT)
#define GK_MUTANT(name, right, wrong) (right)
#define GK_MUTANT_ADDS(name, statement)
#define GK_LIMIT(name, limit, small) (limit)
#endif
