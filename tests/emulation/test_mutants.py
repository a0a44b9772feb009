"""Mutation tests: the checks of the emulated kernels must catch every mutant in their sources.

Mutants are marked in the sources; csrc/kernels/mutant.h explains how. The first word of a mutant's
name says which problems must show it.
"""

import re
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest

from . import (
    build,
    harness,
    norm_problem,
    test_gradient_norm_penalty,
    test_minibatch_discrimination,
    test_minibatch_stddev,
)

Norm = norm_problem.Problem
Penalty = test_gradient_norm_penalty.Problem
Discrimination = test_minibatch_discrimination.Problem
Stddev = test_minibatch_stddev.Problem
SOLUTIONS = {
    Norm: norm_problem.Solution,
    Penalty: test_gradient_norm_penalty.Solution,
    Discrimination: test_minibatch_discrimination.Solution,
    Stddev: test_minibatch_stddev.Solution,
}
PROBLEMS = {
    "norm": [
        Norm(3, 3, 16),
        Norm(9, 6, 3, True),
        Norm(3, 3, 16, dtype="bfloat16", misalignment=1),
        Norm(1, 6, 16, affine=3),
        Norm(150, 2, 128, device=0),
        Norm(600, 40, 1, device=0),
    ],
    "penalty": [
        Penalty(3, 43),
        Penalty(3, 43, output_misalignment=1, misalignment=1),
        Penalty(40, 40, "bfloat16", output_misalignment=1),
        Penalty(2, 5001, device=0),
    ],
    "discrimination": [
        Discrimination(11, 2, 5),
        Discrimination(11, 2, 7, ties=True),
        Discrimination(150, 1, 2),
        Discrimination(70, 1, 36),
        Discrimination(70, 1, 36, "bfloat16", "transposed"),
    ],
    "stddev": [
        Stddev(7, 2, rows=3, features=2, run=8),
        Stddev(7, 2, rows=3, features=2, run=7, misalignment=1),
        Stddev(4, 1, run=40, mean=1e4, std=1e-2),
        Stddev(11, 2, run=16),
        Stddev(7, 2, run=16, output_misalignment=1),
        Stddev(2, 1, run=17_000, device=2),
        Stddev(20, 10, run=8200, device=0),
    ],
}
CHECKED_WITH = {"reduce": "norm"}  # reduce.h is checked by the ops that use it
LIMITS = {"stddev": ["stddev_blocks"]}  # so few blocks that each has several tasks

# Wrong values, NaNs and results that differ between seeds.
WRONG = r"elements, first|depends on the order"
NEVER_COME = r"waits for lanes of mask 0xffffffff that never come"
DIVERGENCE = (
    r"barrier divergence: .* in block \(\d+, 0, 0\) of void .*batch_norm_leaky_relu::kernel<"
)
# How a mutant is caught where WRONG does not say enough.
CAUGHT_AS = {
    "discrimination_global_weights": (
        r"__stwb, which is of global memory, of shared memory by thread \d+ in block .*"
        r"large_kernel<float, 1>.*, at line \d+ of vector.h$"
    ),
    "discrimination_itself": rf"forward\.o of .*({WRONG})",
    "discrimination_last_tile": rf"grad_m of .*({WRONG})",
    "discrimination_ties": r"grad_m of .*ties=True",
    "norm_affine_index": rf"affine=3.*({WRONG})",
    "norm_alignment": r"misaligned load by thread \d+ in block",
    "norm_idle_threads_leave": NEVER_COME,
    "norm_last_part": rf"statistics of .*({WRONG})",
    "norm_mean_correction": rf"statistics of .*({WRONG})",
    "norm_batches_barrier": r"running_mean depends on the order",
    "norm_one_position_more": rf"{WRONG}|write outside buffer",
    "norm_pivot": rf"statistics of .*({WRONG})",
    "norm_scratch_overrun": r"write outside buffer 'scratch'",
    "norm_unwritten_vector": r"y of .*: 4 of 144 elements, first \(0, 0, 4\): nan instead of",
    "penalty_alignment": r"misaligned store by thread \d+ .*, at line \d+ of vector.h$",
    "penalty_head_start": rf"misaligned load|{WRONG}",
    "penalty_last_part": rf"grad_grad of .*({WRONG})",
    "penalty_shuffle_in_a_branch": rf"{NEVER_COME}|barrier divergence",
    "penalty_tail": rf"grad_grad of .*({WRONG})",
    "reduce_barrier_in_a_branch": DIVERGENCE,
    "reduce_shuffle_in_a_branch": NEVER_COME,
    "reduce_shuffle_mask": r"called by a lane outside its mask, by thread \d+ in block",
    "stddev_alignment": r"misaligned store",
    "stddev_idle_threads_leave": r"barrier divergence|that never come",
    "stddev_last_part": rf"forward.stddev of .*({WRONG})",
    "stddev_one_group_size": rf"forward.stddev of .*({WRONG})",
    "stddev_pivot": rf"forward.stddev of .*mean=10000.0.*({WRONG})",
    "stddev_single_row": rf"rows=3.*({WRONG})",
}
MUTANTS = [name for name, macro in build.marks().items() if macro != "GK_LIMIT"]


@contextmanager
def selected(emulated, *names: str):
    emulated.select(names)
    try:
        yield
    finally:
        emulated.select([])


@cache
def solve(problem: harness.Problem) -> harness.Solution:
    return SOLUTIONS[type(problem)](problem)


def check_running_statistics(emulated) -> None:
    """All channels take the same number of batches, which one thread increments."""
    c, before = 100, 1
    options = {"c": c, "statistics_dtype": "float32", "running_dtype": "float32", "device": 0}
    options |= {"cumulative": True, "momentum": 0.0, "count": 2.0}
    statistics = {"statistics": np.ones((2, c), dtype=np.float32)}
    for seed in range(4):
        emulated.set_seed(seed)
        mean, var = np.zeros((2, c), dtype=np.float32)
        outputs = {"running_mean": mean, "running_var": var}
        outputs["num_batches_tracked"] = np.array([before])
        emulated.update_running_statistics(statistics, outputs, options)
        assert (mean == 1 / (before + 1)).all(), "running_mean depends on the order"


def checks(name: str) -> list[Callable]:
    family = name.split("_")[0]
    problems = PROBLEMS[CHECKED_WITH.get(family, family)]
    found = [lambda e, p=p: harness.check_all(e, solve(p)) for p in problems]
    return [check_running_statistics, *found] if family == "norm" else found


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(emulated, mutant):
    with selected(emulated, mutant, *LIMITS.get(mutant.split("_")[0], [])):
        caught = None
        for check in checks(mutant):
            try:
                check(emulated)
            except (AssertionError, RuntimeError) as error:
                caught = str(error)
                break
    assert caught is not None
    assert re.search(CAUGHT_AS.get(mutant, WRONG), caught), caught


def test_nothing_is_caught_without_a_mutant(emulated):
    assert set(CAUGHT_AS) <= set(MUTANTS)
    for family in PROBLEMS:
        for check in checks(family):
            check(emulated)


def test_runs_beyond_the_largest_part(emulated):
    """As if there were 2^29 positions and more: runs and channels longer than a part may be."""
    with selected(emulated, "norm_positions"):
        for n, c, s, last in (
            *[(1, 1, 2000, False), (3, 2, 301, False), (2, 2, 1213, False), (3, 2, 300, False)],
            *[(100, 2, 7, False), (700, 3, 1, False), (90, 9, 7, True)],
        ):
            emulated.take_launches()
            harness.check_all(emulated, solve(Norm(n, c, s, last, misalignment=1)))
            assert len(emulated.take_launches()) > 3 * len(harness.SEEDS), "divided"


def test_blocks_with_several_tasks(emulated):
    with selected(emulated, "stddev_blocks"):
        emulated.take_launches()
        for check in checks("stddev"):
            check(emulated)
        assert max(blocks for _, _, blocks, _ in emulated.take_launches()) == 3


def test_every_limit_is_tested():
    limits = {name for name, macro in build.marks().items() if macro == "GK_LIMIT"}
    assert limits == {"norm_positions", "stddev_blocks"}


def test_only_marks_can_be_selected(emulated):
    with pytest.raises(ValueError, match="no mark named 'no_such_mark'"):
        emulated.select(["no_such_mark"])
