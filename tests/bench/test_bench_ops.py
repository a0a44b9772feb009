"""The cases: all implementations compute the same."""

import functools
import itertools

import pytest
import torch

from gankernels import bench
from gankernels.bench import OPS, PASSES, Case, ops

SHAPES = {
    "batch_norm_leaky_relu": [(12, 5), (6, 3, 4, 4)],
    "leaky_relu_batch_norm": [(12, 5), (6, 3, 4, 4)],
    "minibatch_discrimination": [(7, 5, 3)],
    "minibatch_stddev": [(8, 6, 3, 3)],
    "gradient_norm_penalty": [(7, 5, 3)],
    "interpolate": [(7, 5, 3)],
}
SHAPES |= {name: [op.samples[0]] for name, op in OPS.items() if name not in SHAPES}
#: To interpolate is linear: it has no second derivative.
PAIRS = [(op, what) for op in SHAPES for what in PASSES if (op, what) != ("interpolate", PASSES[2])]
SMALL = [Case(op, what, shape) for op, what in PAIRS for shape in SHAPES[op]]
SMALL += [
    Case(op, what, shape, dtype, layout)
    for op, shape in (("batch_norm_leaky_relu", (6, 3, 4, 4)), ("minibatch_stddev", (8, 6, 3, 3)))
    for what in PASSES
    for dtype, layout in ((torch.bfloat16, "contiguous"), (torch.float32, "channels_last"))
]


def results_of(run):
    found = run()
    return [t.detach().float() for t in (found if isinstance(found, tuple) else (found,))]


def assert_alike(runs, case):
    tolerance = 3e-2 if case.dtype is torch.bfloat16 else 1e-4
    ours = results_of(runs.pop("ours"))
    assert any(t.abs().max() > 0 for t in ours)
    clone = results_of(runs.pop("clone"))
    assert clone[0].shape == case.shape
    assert runs
    for name, run in runs.items():
        found = results_of(run)
        assert len(found) >= 1, name
        torch.testing.assert_close(found, ours[: len(found)], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_contenders_compute_the_same(case):
    runs = bench.contenders(case)
    assert next(iter(runs)) == "clone"
    assert "eager" in runs
    assert_alike(runs, case)


@pytest.mark.parametrize(("op", "what"), PAIRS)
def test_so_do_the_compiled_ones(op, what, monkeypatch):
    """Traced, not compiled: C++ takes too long."""
    traced = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", traced)
    case = Case(op, what, SHAPES[op][-1])
    runs = bench.contenders(case, compiled=True)
    assert_alike({name: runs[name] for name in ("clone", "compiled", "ours")}, case)


def test_cdist_and_broadcasting_take_part_where_they_can(monkeypatch):
    def names(what):
        return list(bench.contenders(Case("minibatch_discrimination", what, (5, 3, 2))))

    assert names("forward") == ["clone", "eager", "cdist", "ours"]
    assert names("penalty step") == ["clone", "eager", "ours"]  # cdist is differentiable once
    monkeypatch.setattr(ops, "LARGEST_BROADCAST", 5 * 5 * 3 * 2 - 1)
    assert names("forward + backward") == ["clone", "cdist", "ours"]


@pytest.mark.parametrize("quick", [False, True])
def test_the_cases_hold_every_op_and_pass(quick):
    found = list(bench.cases(quick))
    assert len(set(found)) == len(found)
    assert list(dict.fromkeys(case.op for case in found)) == list(OPS)
    for op in OPS:
        passes = {case.what for case in found if case.op == op}
        assert passes == set(PASSES if op != "interpolate" else PASSES[:1])
    layouts = {(case.dtype, case.layout) for case in found}
    assert (torch.bfloat16, "contiguous") in layouts
    assert (torch.float32, "channels_last") in layouts
    # For a plot over sizes.
    for op in set(OPS) - {"leaky_relu_batch_norm"}:
        assert len({case.shape for case in found if case.op == op}) >= 2


def test_names():
    case = Case("minibatch_stddev", "forward", (4, 3, 2, 2), torch.bfloat16, "channels_last")
    assert str(case) == "minibatch_stddev bfloat16 4x3x2x2 channels_last forward"
    assert Case("interpolate", "forward", (4, 3)).input == "float32 4x3"


def test_work_and_bytes():
    batch_norm = Case("batch_norm_leaky_relu", "forward", (10, 20), torch.bfloat16)
    assert batch_norm.work == (7 * 200, 2 * 400)
    assert batch_norm.fewest_clones == 1
    assert Case("batch_norm_leaky_relu", "penalty step", (10, 20)).work is None
    assert Case("minibatch_stddev", "forward + backward", (4, 4)).fewest_clones == 1.5
    n, b, c = 5, 3, 2
    pairs = sum(1 for _ in itertools.combinations(range(n), 2))
    case = Case("minibatch_discrimination", "forward", (n, b, c))
    assert case.work == (2 * pairs * b * c, 4 * (n * b * c + n * b))
    assert case.fewest_clones is None
