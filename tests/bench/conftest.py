import pytest
import torch

import gankernels as gk
from gankernels.bench import Case, ops, timing


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_is(monkeypatch):
    monkeypatch.setattr(gk, "tune_allocator", lambda: None)


@pytest.fixture
def tiny(monkeypatch):
    """Two sizes of two ops in place of all cases, and no time spent on the roofs."""
    shapes = {
        "batch_norm_leaky_relu": [(6, 3), (8, 4, 3, 3)],
        "minibatch_discrimination": [(5, 3, 2)],
    }
    cases = [Case(op, what, s) for op in shapes for s in shapes[op] for what in ops.PASSES]
    cases.append(Case("interpolate", ops.FORWARD, (4, 3), torch.bfloat16))
    monkeypatch.setattr(ops, "cases", lambda quick: iter(cases))
    roofs = {"memory": 2e10, "cache": 1e11, "operations": 5e10}
    monkeypatch.setattr(timing, "ceilings", lambda device: dict(roofs))
    return cases
