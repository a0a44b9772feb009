"""The fixtures of all tests here: each op with inputs on the GPU, through its second derivative.

Nothing here sets a default device, as the copies of the CPU's tests do: code that creates a tensor
without naming its device fails here.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import gankernels as gk
from gankernels.ops.record import Draw, Op, records


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "cuda":
            item.add_marker("cuda")


@dataclass(frozen=True)
class Sample:
    """An op with inputs of one shape."""

    op: Op
    shape: tuple[int, ...]

    def draw(self, dtype: torch.dtype, device: str = "cuda", seed: int = 0) -> list[Tensor]:
        torch.manual_seed(seed)
        drawn = self.op.inputs(self.shape, Draw(dtype, device))
        return [t.to(dtype).requires_grad_() for t in drawn]

    def solve(self, inputs: list[Tensor]) -> list[Tensor]:
        """The result, the first derivatives and the second."""
        y = self.op.public(gk, *inputs)
        first = torch.autograd.grad(y.float().square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.float().square().sum() for g in first), inputs)
        return [t.detach() for t in (y, *first, *second)]


SAMPLES = {
    f"{name}, {'x'.join(map(str, shape))}": Sample(op, shape)
    for name, op in records().items()
    for shape in op.representative
}


@pytest.fixture(params=SAMPLES.values(), ids=SAMPLES)
def op(request) -> Sample:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request) -> torch.dtype:
    return request.param
