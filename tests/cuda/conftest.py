"""What every test here works on: each op with inputs on the GPU, through its second derivative.

Nothing here sets a default device, as the copies of the CPU's tests do: code that forgets to say
where its tensors belong fails here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import gankernels as gk

functional = gk.functional


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "cuda":
            item.add_marker("cuda")


@dataclass(frozen=True)
class Op:
    """A function of tensors of the given shapes."""

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def draw(self, dtype: torch.dtype, device: str = "cuda", seed: int = 0) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        drawn = (torch.randn(s, generator=generator, device=device) for s in self.shapes)
        return [t.to(dtype).requires_grad_() for t in drawn]

    def solve(self, inputs: list[Tensor]) -> list[Tensor]:
        """The result, the first derivatives and the second."""
        y = self.function(*inputs)
        first = torch.autograd.grad(y.float().square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.float().square().sum() for g in first), inputs)
        return [t.detach() for t in (y, *first, *second)]


def _training(function):
    return lambda x, weight, bias: function(x, None, None, weight, bias, True)


OPS = {
    # Small and large: whole channels to a block, and channels divided among blocks with scratch.
    "batch_norm_leaky_relu, small": Op(
        _training(functional.batch_norm_leaky_relu), ((8, 5, 6, 6), (5,), (5,))
    ),
    "batch_norm_leaky_relu, large": Op(
        _training(functional.batch_norm_leaky_relu), ((4, 3, 256, 256), (3,), (3,))
    ),
    "batch_norm_leaky_relu, rows": Op(
        _training(functional.batch_norm_leaky_relu), ((9001, 40), (40,), (40,))
    ),
    "leaky_relu_batch_norm": Op(
        _training(functional.leaky_relu_batch_norm), ((8, 5, 6, 6), (5,), (5,))
    ),
    # C in registers, and C in chunks.
    "minibatch_discrimination, C=5": Op(functional.minibatch_discrimination, ((70, 9, 5),)),
    "minibatch_discrimination, C=40": Op(functional.minibatch_discrimination, ((70, 3, 40),)),
    "gradient_norm_penalty": Op(functional.gradient_norm_penalty, ((6, 3, 40, 41),)),
    "interpolate": Op(functional.interpolate, ((6, 3, 8, 8), (6, 3, 8, 8), (6,))),
    # A block to a group, and groups divided among blocks with scratch.
    "minibatch_stddev, small": Op(functional.minibatch_stddev, ((10, 4, 4, 4),)),
    "minibatch_stddev, large": Op(functional.minibatch_stddev, ((4, 3, 64, 64),)),
}


@pytest.fixture(params=OPS.values(), ids=OPS)
def op(request) -> Op:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request) -> torch.dtype:
    return request.param
