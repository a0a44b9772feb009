"""Kernels with seeded defects: the emulation's tests must catch every one of them."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest

from . import (
    build,
    test_gradient_norm_penalty,
    test_minibatch_discrimination,
    test_minibatch_stddev,
)
from .build import Substitution
from .problem import Problem
from .test_batch_norm_leaky_relu import SEEDS, check_all

KERNEL, REDUCE = "cuda/batch_norm_leaky_relu.cu", "cuda/reduce.h"
PENALTY = "cuda/gradient_norm_penalty.cu"
DISCRIMINATION = "cuda/minibatch_discrimination.cu"
STDDEV = "cuda/minibatch_stddev.cu"
PROBLEMS = [
    Problem(3, 3, 16),
    Problem(9, 6, 3, True),
    Problem(3, 3, 16, dtype="bfloat16", misalignment=1),
    Problem(150, 2, 128, device=0),
    Problem(600, 40, 1, device=0),
]
PENALTY_PROBLEMS = [
    test_gradient_norm_penalty.Problem(3, 43),
    test_gradient_norm_penalty.Problem(3, 43, output_misalignment=1, misalignment=1),
    test_gradient_norm_penalty.Problem(40, 40, "bfloat16", output_misalignment=1),
    test_gradient_norm_penalty.Problem(2, 5001, device=0),
]
DISCRIMINATION_PROBLEMS = [
    test_minibatch_discrimination.Problem(11, 2, 5),
    test_minibatch_discrimination.Problem(11, 2, 7, ties=True),
    test_minibatch_discrimination.Problem(150, 1, 2),
    test_minibatch_discrimination.Problem(70, 1, 36),
    test_minibatch_discrimination.Problem(70, 1, 36, "bfloat16", "transposed"),
]
STDDEV_PROBLEMS = [
    test_minibatch_stddev.Problem(7, 2, rows=3, features=2, run=8),
    test_minibatch_stddev.Problem(7, 2, rows=3, features=2, run=7, misalignment=1),
    test_minibatch_stddev.Problem(4, 1, run=40, mean=1e4, std=1e-2),
    test_minibatch_stddev.Problem(11, 2, run=16),
    test_minibatch_stddev.Problem(7, 2, run=16, output_misalignment=1),
    test_minibatch_stddev.Problem(2, 1, run=17_000, device=2),
    test_minibatch_stddev.Problem(20, 10, run=8200, device=0),
]
# Fewer sizes of C, which these problems do without: quicker to compile.
FEWER_SIZES = Substitution(DISCRIMINATION, "float, D, 2, 4, 5, 8, 12, 16, 24, k", "float, D, 8, k")
# So few blocks that each has several tasks.
FEWER_BLOCKS = Substitution(STDDEV, "kMaxBlocks = int64_t{1} << 20", "kMaxBlocks = 3")
# Beside the defect: none of these is one.
ALSO_CHANGED = {DISCRIMINATION: (FEWER_SIZES,), STDDEV: (FEWER_BLOCKS,)}
# By the .cu file: the problems that must show its defects, and what runs one.
SHOWN_BY = {
    KERNEL: (PROBLEMS, check_all),
    PENALTY: (PENALTY_PROBLEMS, test_gradient_norm_penalty.check_all),
    DISCRIMINATION: (DISCRIMINATION_PROBLEMS, test_minibatch_discrimination.check_all),
    STDDEV: (STDDEV_PROBLEMS, test_minibatch_stddev.check_all),
}
# Wrong values, NaNs and results that differ between seeds alike.
WRONG = r"elements, first|depends on the order"
DIVERGENCE = (
    r"barrier divergence: .* in block \(\d+, 0, 0\) of void .*batch_norm_leaky_relu::kernel<"
)


@dataclass(frozen=True)
class Defect:
    name: str
    caught_as: str
    substitution: Substitution

    @property
    def unit(self) -> str:
        return self.substitution.unit or self.substitution.file

    @property
    def substitutions(self) -> tuple[Substitution, ...]:
        return (self.substitution, *ALSO_CHANGED.get(self.unit, ()))


DEFECTS = [
    Defect(
        "barrier_before_warps_are_merged_removed",
        WRONG,
        Substitution(REDUCE, "  __syncthreads();\n  for (", "  for (", KERNEL),
    ),
    Defect(
        "barrier_before_total_is_read_removed",
        WRONG,
        Substitution(REDUCE, "  __syncthreads();\n#pragma unroll\n", "#pragma unroll\n", KERNEL),
    ),
    Defect(
        "barrier_in_a_branch",
        DIVERGENCE,
        Substitution(
            REDUCE,
            "  __syncthreads();\n  for (",
            "  if (lane < columns) __syncthreads();\n  for (",
            KERNEL,
        ),
    ),
    Defect(
        "idle_threads_leave_before_the_barrier",
        r"lanes of mask 0xffffffff that never come with that mask in block",
        Substitution(
            KERNEL,
            "  Normalization<A> channel[kLanes] = {};\n",
            "  if (!inside) return;\n  Normalization<A> channel[kLanes] = {};\n",
        ),
    ),
    Defect(
        "last_position_left_out",
        WRONG,
        Substitution(KERNEL, "return left_ <= 0;", "return left_ <= 1;"),
    ),
    Defect(
        "one_position_too_many",
        WRONG + "|write outside buffer",
        Substitution(KERNEL, "return left_ <= 0;", "return left_ < 0;"),
    ),
    Defect(
        "output_vector_not_written",
        r"y of .*: 4 of 144 elements, first \(0, 0, 4\): nan instead of",
        Substitution(
            KERNEL, "if (tensor != nullptr) store", "if (tensor && batch.offset[u] != V) store"
        ),
    ),
    Defect(
        "shuffle_mask_without_one_lane",
        r"warp function called by a lane outside its mask, by thread \d+ in block",
        Substitution(REDUCE, "kWholeWarp = 0xffffffffu", "kWholeWarp = 0x7fffffffu", KERNEL),
    ),
    Defect(
        "shuffle_in_a_branch",
        r"waits for lanes of mask 0xffffffff that never come",
        Substitution(
            REDUCE,
            "for (int l = 0; l < kLanes; ++l) sums[l] = Op::merge(sums[l], shuffle_down",
            "for (int l = 0; l < kLanes && lane < lanes; ++l)\n"
            "      sums[l] = Op::merge(sums[l], shuffle_down",
            KERNEL,
        ),
    ),
    Defect(
        "half_of_the_warp_not_merged",
        WRONG,
        Substitution(REDUCE, "int lanes = kWarp / 2;", "int lanes = kWarp / 4;", KERNEL),
    ),
    Defect(
        "last_part_not_merged",
        r"statistics of .*" + WRONG,
        Substitution(KERNEL, "from < tiling.parts;", "from < tiling.parts - 1;"),
    ),
    Defect(
        "partials_beyond_the_scratch",
        r"write outside buffer 'scratch'",
        Substitution(KERNEL, "(of_part * Op::kSums + k) * p.c", "((of_part + 4) * 5 + k) * p.c"),
    ),
    Defect(
        "alignment_ignored",
        r"misaligned load by thread \d+ in block",
        Substitution(KERNEL, " && addresses % (vector * sizeof(T)) == 0", " && addresses > 0"),
    ),
    Defect(
        "no_correction_between_means",
        r"statistics of .*" + WRONG,
        Substitution(KERNEL, "distance * distance * a.value[0] * share", "A(0)"),
    ),
    Defect(
        "pivot_not_added_back",
        r"statistics of .*" + WRONG,
        Substitution(KERNEL, "? pivot.mean + sums", "? A(0) * pivot.mean + sums"),
    ),
    Defect(
        "penalty_head_left_out",
        WRONG,
        Substitution(PENALTY, "sum += dot<1, kSquare>(a, b, s.begin, s.vectors);", ""),
    ),
    Defect(
        "penalty_tail_not_written",
        r"grad_grad of .*" + WRONG,
        Substitution(PENALTY, "tangent, g, out, s.vectors_end, s.end)", "tangent, g, out, 0, 0)"),
    ),
    Defect(
        "penalty_head_before_the_boundary",
        r"misaligned load|" + WRONG,
        Substitution(PENALTY, "(-(address / sizeof(T)) % V)", "(address / sizeof(T) % V)"),
    ),
    Defect(
        "penalty_lanes_not_merged",
        WRONG,
        Substitution(PENALTY, "    sum = warp_sum(sum);\n", ""),
    ),
    Defect(
        "penalty_half_of_the_warp_not_merged",
        WRONG,
        Substitution(PENALTY, "int lanes = kWarp / 2;", "int lanes = kWarp / 4;"),
    ),
    Defect(
        "penalty_last_part_not_merged",
        r"grad_grad of .*" + WRONG,
        Substitution(PENALTY, "part < tiling.parts; part += kWarp", "part < 2; part += kWarp"),
    ),
    Defect(
        "penalty_alignment_ignored",
        r"misaligned store by thread \d+ .*, at line \d+ of vector.h$",
        Substitution(PENALTY, "distance % 16 == 0", "distance % 2 == 0"),
    ),
    Defect(
        "penalty_shuffle_in_a_branch",
        r"waits for lanes of mask 0xffffffff that never come|barrier divergence",
        Substitution(
            PENALTY,
            "for (int l = lanes / 2; l > 0;",
            "if (n < p.n) for (int l = lanes / 2; l > 0;",
        ),
    ),
    Defect(
        "discrimination_barrier_after_staging_removed",
        WRONG,
        Substitution(
            DISCRIMINATION,
            "    __syncthreads();\n    const int count",
            "    const int count",
        ),
    ),
    Defect(
        "discrimination_barrier_before_staging_removed",
        WRONG,
        Substitution(
            DISCRIMINATION, "    __syncthreads();  // the tile before has been read\n", ""
        ),
    ),
    Defect(
        "discrimination_barrier_after_weights_removed",
        WRONG,
        Substitution(DISCRIMINATION, "      __syncthreads();  // the weights are written,", "//"),
    ),
    Defect(
        "discrimination_sample_meets_itself",
        r"o of .*" + WRONG,
        Substitution(DISCRIMINATION, "itself = j == own", "itself = j == -1 - own"),
    ),
    Defect(
        "discrimination_ties_have_a_sign",
        r"grad_m of .*ties=True",
        Substitution(DISCRIMINATION, "if (d != 0) sum += w;", "sum += w;"),
    ),
    Defect(
        "discrimination_one_warp_not_merged",
        WRONG,
        Substitution(DISCRIMINATION, "from < kSmallThreads; from", "from < 96; from"),
    ),
    Defect(
        "discrimination_last_tile_alone",
        r"grad_m of .*" + WRONG,
        Substitution(DISCRIMINATION, "first == 0 ? grads[i] : *so_far + grads[i]", "grads[i]"),
    ),
    Defect(
        "discrimination_weights_stored_to_global_memory",
        r"__stwb, which is of global memory, of shared memory by thread \d+ in block .*"
        r"large_kernel<float, 1>.*, at line \d+ of vector.h$",
        Substitution(DISCRIMINATION, "store_shared<V>(weights", "store<V>(weights"),
    ),
    Defect(
        "discrimination_padding_taken_for_samples",
        WRONG,
        Substitution(DISCRIMINATION, "visited = row_j < p.n && row_j", "visited = row_j"),
    ),
    Defect(
        "stddev_last_member_left_out",
        WRONG,
        Substitution(STDDEV, "m < count_; ++m) body", "m + 1 < count_; ++m) body"),
    ),
    Defect(
        "stddev_groups_taken_for_one_size",
        r"forward.stddev of .*" + WRONG,
        Substitution("minibatch_stddev.h", "group < p.n % p.groups ?", "group >= 0 ?", STDDEV),
    ),
    Defect(
        "stddev_without_a_pivot",
        r"forward.stddev of .*mean=10000.0.*" + WRONG,
        Substitution(
            STDDEV,
            "pivot[v] = accumulator(first.values[v]);",
            "pivot[v] = 0 * accumulator(first.values[v]);",
        ),
    ),
    Defect(
        "stddev_rows_taken_for_one",
        r"rows=3.*" + WRONG,
        Substitution(STDDEV, "p.rows == 1 ? 0", "p.rows >= 1 ? 0"),
    ),
    Defect(
        "stddev_last_positions_left_out",
        WRONG,
        Substitution(STDDEV, "i < end; i += kThreads", "i + 4 < end; i += kThreads"),
    ),
    Defect(
        "stddev_alignment_ignored",
        r"misaligned store",
        Substitution(STDDEV, "addresses % (V * sizeof(T)) == 0 && p.run", "addresses > 0 && p.run"),
    ),
    Defect(
        "stddev_last_part_not_merged",
        r"forward.stddev of .*" + WRONG,
        Substitution(STDDEV, "part < tiling.parts; part", "part < tiling.parts - 1; part"),
    ),
    Defect(
        "stddev_idle_threads_leave_before_the_barrier",
        r"barrier divergence|that never come",
        Substitution(
            STDDEV,
            "    A sum = 0;\n",
            "    if (begin + threadIdx.x * V >= end) return;\n    A sum = 0;\n",
        ),
    ),
]
# No defect: a limit so small that what it is for is seen.
SMALL_LIMITS = Substitution(KERNEL, "kMaxPositions = int64_t{1} << 29", "kMaxPositions = 300")
RACE = Substitution(
    KERNEL, "  __syncthreads();  // every thread has read the number of batches\n", ""
)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    build.build("plain")
    todo = [(d.name, d.substitutions) for d in DEFECTS] + [
        ("number_of_batches_race", (RACE,)),
        ("small_limits", (SMALL_LIMITS,)),
        ("fewer_blocks", (FEWER_BLOCKS,)),
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda d: build.build(d[0], substitutions=d[1]), todo))


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_defect_is_caught(defect):
    emulated = build.load(build.build(defect.name, substitutions=defect.substitutions))
    caught = None
    problems, check = SHOWN_BY[defect.unit]
    for problem in problems:
        try:
            check(emulated, problem)
        except (AssertionError, RuntimeError) as error:
            caught = str(error)
            break
    assert caught is not None
    assert re.search(defect.caught_as, caught), caught


def test_race_for_the_number_of_batches_is_caught():
    folder = build.build("number_of_batches_race", substitutions=(RACE,))
    emulated = build.load(folder)
    c, before = 100, 1
    options = {"c": c, "statistics_dtype": "float32", "running_dtype": "float32", "device": 0}
    options |= {"cumulative": True, "momentum": 0.0, "count": 2.0}
    wrong = 0
    for seed in range(4):
        emulated.set_seed(seed)
        running = np.zeros((2, c), dtype=np.float32)
        outputs = {"running_mean": running[0], "running_var": running[1]}
        outputs["num_batches_tracked"] = np.array([before])
        statistics = np.ones((2, c), dtype=np.float32)
        emulated.update_running_statistics({"statistics": statistics}, outputs, options)
        wrong += (running[0] != 1 / (before + 1)).sum()
    assert wrong > 0


def test_without_a_defect_nothing_is_caught(emulated):
    for problems, check in SHOWN_BY.values():
        for problem in problems:
            check(emulated, problem)


def test_runs_beyond_the_largest_part():
    """As if there were 2^29 positions and more: runs and channels longer than a part may be."""
    emulated = build.load(build.build("small_limits", substitutions=(SMALL_LIMITS,)))
    for n, c, s, last in (
        *[(1, 1, 2000, False), (3, 2, 301, False), (2, 2, 1213, False), (3, 2, 300, False)],
        *[(100, 2, 7, False), (700, 3, 1, False), (90, 9, 7, True)],
    ):
        emulated.take_launches()
        check_all(emulated, Problem(n, c, s, last, misalignment=1))
        assert len(emulated.take_launches()) > 3 * len(SEEDS), "divided"


def test_blocks_with_several_tasks():
    emulated = build.load(build.build("fewer_blocks", substitutions=(FEWER_BLOCKS,)))
    emulated.take_launches()
    for problem in STDDEV_PROBLEMS:
        test_minibatch_stddev.check_all(emulated, problem)
    assert max(blocks for _, _, blocks, _ in emulated.take_launches()) == 3


def test_a_substitution_must_hit():
    with pytest.raises(ValueError, match="has 0 times, not once, the text 'no such text'"):
        build.build("missed", substitutions=(Substitution(KERNEL, "no such text", ""),))
