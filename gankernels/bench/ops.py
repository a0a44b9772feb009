"""The cases: which op, at which size, and every way to compute it.

"Eager" is what GAN code writes in PyTorch. "Forward" records the graph for backward, as a training
step does. A "penalty step" is what a gradient penalty asks of a layer: forward, backward, the
penalty on the gradient, and its derivative with respect to the input and the weight, which is the
layer's double backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankernels as gk
from gankernels.bench.timing import Run
from gankernels.ops import minibatch_stddev as _stddev

SLOPE = 0.2
GROUP_SIZE = 4

FORWARD, BACKWARD, PENALTY = PASSES = ("forward", "forward + backward", "penalty step")
LAYOUTS = ("contiguous", "channels_last")

#: Elements of broadcasting's tensors of N x N x B x C from which on they are not tried.
LARGEST_BROADCAST = 1 << 30


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Args:
        op: a key of `OPS`.
        what: one of `PASSES`.
        shape: of the op's input.
        dtype: of the input; parameters of half-precision cases are float32.
        layout: one of `LAYOUTS`; channels_last takes four dimensions.
    """

    op: str
    what: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"{self.op} {self.input} {self.what}"

    @property
    def input(self) -> str:
        """Dtype, shape and, where it is not contiguous, layout."""
        layout = f" {self.layout}" if self.layout != "contiguous" else ""
        return f"{str(self.dtype)[6:]} {'x'.join(map(str, self.shape))}{layout}"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def fewest_clones(self) -> float | None:
        """The clones of the input that move as many bytes as the pass has to; None where additions,
        not bytes, are the limit."""
        tensors = OPS[self.op].tensors.get(self.what)
        return None if tensors is None else tensors / 2

    @property
    def work(self) -> tuple[int, int] | None:
        """Additions and the like that a forward pass has to do, and the bytes it has to move."""
        if self.what != FORWARD:
            return None
        nbytes = self.elements * self.dtype.itemsize
        if self.op == "minibatch_discrimination":
            n, b, c = self.shape
            return n * (n - 1) * b * c, nbytes + n * b * self.dtype.itemsize
        op = OPS[self.op]
        return op.operations * self.elements, op.tensors[FORWARD] * nbytes


# ---- the ways to compute an op -------------------------------------------------------------------


class Ways(NamedTuple):
    """Functions or modules of `x`, and what else their derivatives take."""

    x: Tensor
    ours: Callable[[Tensor], Tensor]
    eager: Callable[[Tensor], Tensor]
    #: Eager's as a function of `x` and of the tensors `weights` that changes nothing else, which is
    #: the form that torch.func can differentiate.
    pure: Callable[..., Tensor]
    weights: tuple[Tensor, ...] = ()
    #: More baselines, differentiable once.
    others: Mapping[str, Callable[[Tensor], Tensor]] = {}
    #: What a penalty step makes of the gradient, where that is not the penalty.
    tangent: Tensor | None = None


Draw = Callable[..., Tensor]


def eager_penalty(grad: Tensor) -> Tensor:
    return (grad.flatten(1).float().norm(2, 1) - 1).square().mean()


def broadcasting(m: Tensor) -> Tensor:
    return torch.exp(-(m.unsqueeze(0) - m.unsqueeze(1)).abs().sum(3)).sum(0) - 1


def cdist(m: Tensor) -> Tensor:
    kernels = m.transpose(0, 1)
    return (torch.exp(-torch.cdist(kernels, kernels, p=1)).sum(1) - 1).t()


def _norm_activation(case: Case, draw: Draw, activation_first: bool) -> Ways:
    channels, flat = case.shape[1], len(case.shape) == 2
    x = draw(*case.shape)
    norm = (nn.BatchNorm1d if flat else nn.BatchNorm2d)(channels)
    activation = nn.LeakyReLU(SLOPE)
    order = (activation, norm) if activation_first else (norm, activation)
    name = "LeakyReLUBatchNorm" if activation_first else "BatchNormLeakyReLU"
    ours = getattr(gk.nn, name + ("1d" if flat else "2d"))(channels, negative_slope=SLOPE)
    bias = torch.zeros(channels, device=x.device)

    def pure(x: Tensor, weight: Tensor) -> Tensor:
        if activation_first:
            return F.batch_norm(F.leaky_relu(x, SLOPE), None, None, weight, bias, True)
        return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, True), SLOPE)

    modules = ours.to(x.device), nn.Sequential(*order).to(x.device)
    return Ways(x, *modules, pure, (torch.ones_like(bias),))


def _batch_norm_leaky_relu(case: Case, draw: Draw) -> Ways:
    return _norm_activation(case, draw, activation_first=False)


def _leaky_relu_batch_norm(case: Case, draw: Draw) -> Ways:
    return _norm_activation(case, draw, activation_first=True)


def _minibatch_discrimination(case: Case, draw: Draw) -> Ways:
    m = draw(*case.shape) * 0.3
    ours = gk.functional.minibatch_discrimination
    return Ways(m, ours, broadcasting, broadcasting, others={"cdist": cdist})


def _minibatch_stddev(case: Case, draw: Draw) -> Ways:
    def ours(x: Tensor) -> Tensor:
        return gk.functional.minibatch_stddev(x, GROUP_SIZE)

    def eager(x: Tensor) -> Tensor:
        return _stddev.reference(x, GROUP_SIZE, 1)

    return Ways(draw(*case.shape), ours, eager, eager)


def _gradient_norm_penalty(case: Case, draw: Draw) -> Ways:
    grad = draw(*case.shape) * (2 / math.prod(case.shape[1:]) ** 0.5)
    ours = gk.functional.gradient_norm_penalty
    return Ways(grad, ours, eager_penalty, eager_penalty, tangent=draw(*case.shape))


def _interpolate(case: Case, draw: Draw) -> Ways:
    fake = draw(*case.shape)
    alpha = torch.rand(case.shape[0]).to(fake)
    factor = alpha.view(-1, *(1,) * (fake.dim() - 1))

    def ours(real: Tensor) -> Tensor:
        return gk.functional.interpolate(real, fake, alpha)

    def eager(real: Tensor) -> Tensor:
        return factor * real + (1 - factor) * fake

    return Ways(draw(*case.shape), ours, eager, eager)


@dataclass(frozen=True)
class Op:
    """What there is to know of an op in order to measure it."""

    make: Callable[[Case, Draw], Ways]
    baselines: str  # what it is compared with, for the reader
    #: Tensors of the input's size that each pass has to read and write, were each read once.
    tensors: Mapping[str, int] = field(default_factory=dict)
    #: Additions and multiplications to an element of the input, in the forward pass.
    operations: int = 0


# Batch norm reads x and writes y; reads x and dy and writes dx; the penalty reads dx, and dx again
# to write its gradient v; double backward reads x, dy and v and writes the gradient of x. Others
# likewise.
_NORM = {FORWARD: 2, BACKWARD: 2 + 3, PENALTY: 2 + 3 + 1 + 2 + 4}

OPS = {
    "batch_norm_leaky_relu": Op(
        _batch_norm_leaky_relu, "Eager: nn.BatchNorm, then nn.LeakyReLU.", _NORM, 7
    ),
    "leaky_relu_batch_norm": Op(
        _leaky_relu_batch_norm, "Eager: nn.LeakyReLU, then nn.BatchNorm.", _NORM, 7
    ),
    "minibatch_discrimination": Op(
        _minibatch_discrimination,
        "Eager: broadcasting to N x N x B x C. Cdist: torch.cdist(p=1), differentiable once.",
    ),
    "minibatch_stddev": Op(
        _minibatch_stddev,
        "Eager: the same in PyTorch's ops.",
        {FORWARD: 1, BACKWARD: 1 + 2, PENALTY: 1 + 2 + 1 + 2 + 3},
        4,
    ),
    "gradient_norm_penalty": Op(
        _gradient_norm_penalty,
        "Eager: flatten, norm, square, mean. The penalty step ends with its second derivative.",
        {FORWARD: 1, BACKWARD: 1 + 2, PENALTY: 1 + 2 + 3},
        2,
    ),
    "interpolate": Op(_interpolate, "Eager: a * real + (1 - a) * fake.", {FORWARD: 3}, 3),
}


def contenders(
    case: Case, device: torch.device | str = "cpu", *, compiled: bool = False
) -> dict[str, Run]:
    """Every way to compute a case, the clone of its input among them, ready to be called.

    Args:
        case: what to compute.
        device: where.
        compiled: whether torch.compile takes part, which compiles on the first call.

    Returns:
        "clone", "eager", further baselines ("cdist"), "compiled" and "ours".
    """
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, device=device).to(case.dtype)
        if case.layout == "channels_last":
            drawn = drawn.contiguous(memory_format=torch.channels_last)
        return drawn

    ways = OPS[case.op].make(case, draw)
    x = ways.x.detach().requires_grad_()
    with torch.no_grad():
        y = ways.ours(x)
    grad_y = torch.randn_like(y) if y.dim() else torch.ones_like(y)

    def step(function: Callable[[Tensor], Tensor], penalty: Callable[[Tensor], Tensor]) -> Run:
        weights = tuple(function.parameters()) if isinstance(function, nn.Module) else ()
        leaves = (x, *weights)

        def penalised() -> tuple[Tensor, ...]:
            (dx,) = torch.autograd.grad(function(x), x, grad_y, create_graph=True)
            # The bias has no part in the second derivative.
            if ways.tangent is not None:
                return torch.autograd.grad(dx, leaves[:2], ways.tangent)
            return torch.autograd.grad(penalty(dx), leaves[:2])

        return {
            FORWARD: lambda: function(x),
            BACKWARD: lambda: torch.autograd.grad(function(x), leaves, grad_y),
            PENALTY: penalised,
        }[case.what]

    runs: dict[str, Run] = {"clone": lambda: x.detach().clone()}
    broadcast = case.op == "minibatch_discrimination"
    if not broadcast or case.shape[0] * case.elements <= LARGEST_BROADCAST:
        runs["eager"] = step(ways.eager, eager_penalty)
    if case.what != PENALTY:
        runs |= {name: step(other, eager_penalty) for name, other in ways.others.items()}
    if compiled and "eager" in runs:
        torch._dynamo.reset()
        if case.what == PENALTY:
            runs["compiled"] = _compiled_step(ways, x.detach(), grad_y)
        else:
            runs["compiled"] = step(torch.compile(ways.eager, dynamic=False), eager_penalty)
    runs["ours"] = step(ways.ours, gk.functional.gradient_norm_penalty)
    return runs


def _compiled_step(ways: Ways, x: Tensor, grad_y: Tensor) -> Run:
    """A whole step, compiled with torch.func inside: a compiled module cannot be differentiated
    twice, and this is the strongest form that PyTorch has."""

    def program(x: Tensor, grad_y: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        def penalised(x: Tensor, *weights: Tensor) -> Tensor:
            dx = torch.func.grad(lambda x: (ways.pure(x, *weights) * grad_y).sum())(x)
            return eager_penalty(dx) if ways.tangent is None else (dx * ways.tangent).sum()

        inputs = tuple(range(1 + len(weights)))
        return torch.func.grad(penalised, argnums=inputs)(x, *weights)

    compiled = torch.compile(program)
    return lambda: compiled(x, grad_y, *ways.weights)


# ---- the cases -----------------------------------------------------------------------------------

_F32, _BF16 = torch.float32, torch.bfloat16


def cases(quick: bool = False) -> Iterator[Case]:
    """All cases, op by op; the quick ones are small and few enough for a minute in all."""
    for op, shape, dtype, layout in _quick_inputs() if quick else _inputs():
        for what in PASSES if op != "interpolate" else (FORWARD,):
            yield Case(op, what, shape, dtype, layout)


Input = tuple[str, tuple[int, ...], torch.dtype, str]


def _inputs() -> Iterator[Input]:
    contiguous, channels_last = LAYOUTS
    for dtype in (_F32, _BF16):
        for shape in ((64, 256), (64, 1024)):
            yield "batch_norm_leaky_relu", shape, dtype, contiguous
        for layout in LAYOUTS:
            for shape in ((64, 64, 8, 8), (128, 128, 14, 14), (64, 128, 32, 32)):
                yield "batch_norm_leaky_relu", shape, dtype, layout
    for shape in ((64, 256), (64, 64, 8, 8), (128, 128, 14, 14)):
        yield "leaky_relu_batch_norm", shape, _F32, contiguous
    yield "leaky_relu_batch_norm", (128, 128, 14, 14), _F32, channels_last
    for shape in ((32, 100, 5), (64, 100, 5), (128, 100, 5), (256, 32, 16), (512, 100, 16)):
        yield "minibatch_discrimination", shape, _F32, contiguous
    for dtype in (_F32, _BF16):
        for shape in ((64, 512, 4, 4), (16, 512, 8, 8), (64, 256, 16, 16)):
            yield "minibatch_stddev", shape, dtype, contiguous
        for shape in ((64, 784), (64, 3, 64, 64), (256, 3, 128, 128)):
            yield "gradient_norm_penalty", shape, dtype, contiguous
    for shape in ((64, 784), (64, 3, 64, 64), (256, 3, 128, 128)):
        yield "interpolate", shape, _F32, contiguous


def _quick_inputs() -> Iterator[Input]:
    contiguous, channels_last = LAYOUTS
    for shape in ((64, 256), (64, 64, 8, 8), (64, 128, 14, 14)):
        yield "batch_norm_leaky_relu", shape, _F32, contiguous
    yield "batch_norm_leaky_relu", (64, 128, 14, 14), _F32, channels_last
    yield "batch_norm_leaky_relu", (64, 128, 14, 14), _BF16, contiguous
    yield "leaky_relu_batch_norm", (64, 128, 14, 14), _F32, contiguous
    for shape in ((32, 100, 5), (64, 100, 5), (128, 100, 5)):
        yield "minibatch_discrimination", shape, _F32, contiguous
    for shape in ((64, 512, 4, 4), (32, 256, 16, 16)):
        yield "minibatch_stddev", shape, _F32, contiguous
    for shape in ((64, 784), (64, 3, 64, 64)):
        yield "gradient_norm_penalty", shape, _F32, contiguous
    for shape in ((64, 784), (64, 3, 64, 64)):
        yield "interpolate", shape, _F32, contiguous
