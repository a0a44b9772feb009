"""The cases (an op, a pass and an input), and every way to compute them.

"Eager" is how GAN code writes an op in PyTorch. "Forward" records the graph for backward, as a
training step does. A "penalty step" is what a gradient penalty requires of a layer: forward,
backward, the penalty on the gradient, and its derivative with respect to the input and the weight,
which is the layer's double backward. Each op is described by its record in gankernels/ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gankernels as gk
from gankernels.bench.timing import Run
from gankernels.ops.record import BACKWARD, FORWARD, PENALTY, STEPS, Draw, Inputs, Op, records

PASSES = STEPS
OPS = records()

#: Eager is not measured if its largest tensor has more elements than this.
LARGEST_BROADCAST = 1 << 30


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Args:
        op: a key of `OPS`.
        what: one of `PASSES`, or a single pass of the kernels.
        shape: the shape of the op's input.
        dtype: the dtype of the input; parameters of half-precision cases are float32.
        layout: "contiguous", or "channels_last" for four dimensions.
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
        """Dtype, shape and, if it is not contiguous, layout."""
        layout = f" {self.layout}" if self.layout != "contiguous" else ""
        return f"{str(self.dtype)[6:]} {'x'.join(map(str, self.shape))}{layout}"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def input_bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def is_step(self) -> bool:
        return self.what in (BACKWARD, PENALTY)

    @property
    def bytes(self) -> int | None:
        """The fewest bytes that the pass or step can move; None if it is not memory-bound."""
        traffic = OPS[self.op].traffic
        if not traffic:
            return None
        if self.what == PENALTY:
            tensors = OPS[self.op].penalty_tensors
            return None if tensors is None else tensors * self.input_bytes
        passes = (FORWARD, "backward") if self.what == BACKWARD else (self.what,)
        return sum(traffic[name].least for name in passes) * self.input_bytes

    @property
    def moved_bytes(self) -> int | None:
        """The bytes that a pass of the kernels moves if nothing stays cached."""
        traffic = OPS[self.op].traffic.get(self.what)
        return None if traffic is None else traffic.moved * self.input_bytes

    @property
    def additions(self) -> int | None:
        """The additions of a pass of the kernels; None if they are not its limit."""
        count = OPS[self.op].additions
        return None if count is None or self.is_step else count(self.what, self.shape)

    @property
    def fewest_clones(self) -> float | None:
        """The number of clones of the input that move as many bytes as the pass must."""
        return None if self.bytes is None else self.bytes / (2 * self.input_bytes)

    @property
    def work(self) -> tuple[int, int] | None:
        """The number of operations of a forward pass, and the number of bytes that it must move."""
        count = OPS[self.op].work
        if self.what != FORWARD or count is None:
            return None
        operations, elements = count(self.shape)
        return operations, elements * self.dtype.itemsize


def cases(quick: bool = False) -> Iterator[Case]:
    """All cases, op by op; the quick ones take less than a minute in total."""
    for name, op in OPS.items():
        yield from expand(name, op.measured_quickly if quick else op.measured)


def expand(op: str, measured: Iterable[Inputs]) -> Iterator[Case]:
    """One case for each combination of an op's inputs."""
    for shape, dtypes, layouts, passes in measured:
        for dtype in dtypes:
            for layout in layouts:
                for what in passes:
                    yield Case(op, what, shape, dtype, layout)


# ---- the ways to compute an op -------------------------------------------------------------------


def eager_penalty(grad: Tensor) -> Tensor:
    return OPS["gradient_norm_penalty"].eager(grad)


def contenders(
    case: Case,
    device: torch.device | str = "cpu",
    *,
    compiled: bool = False,
    layers: bool = True,
    drawn_on: torch.device | str | None = None,
) -> dict[str, Run]:
    """Returns every way to compute a case, and the clone of its input, ready to be called.

    Args:
        case: the case to compute.
        device: the device to compute it on.
        compiled: whether to include torch.compile, which compiles on the first call.
        layers: whether to compare layers instead of functions, for ops that have a layer.
        drawn_on: the device on which the random numbers are drawn.

    Returns:
        "clone", "eager", further baselines ("cdist"), "compiled" and "ours".
    """
    torch.manual_seed(0)
    op = OPS[case.op]
    inputs = op.inputs(case.shape, Draw(case.dtype, device, case.layout, drawn_on))
    x, *parameters = (t.detach().requires_grad_() for t in inputs)
    with torch.no_grad():
        y = op.public(gk, x, *parameters)
    # For an op with a scalar result, itself a penalty, the gradient is multiplied by a tangent.
    scalar = y.dim() == 0
    grad_y = torch.ones_like(y) if scalar else torch.randn_like(y)
    tangent = torch.randn_like(x) if scalar else None

    def step(function: Callable[..., Tensor], penalty: Callable[[Tensor], Tensor]) -> Run:
        arguments: tuple[Tensor, ...] = (x, *parameters)
        leaves = arguments
        if isinstance(function, nn.Module):
            arguments, leaves = (x,), (x, *function.parameters())

        def penalized() -> tuple[Tensor, ...]:
            y = function(*arguments)
            (grad,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
            # The bias does not affect the second derivative.
            if tangent is not None:
                return torch.autograd.grad(grad, leaves[:2], tangent)
            return torch.autograd.grad(penalty(grad), leaves[:2])

        return {
            FORWARD: lambda: function(*arguments),
            BACKWARD: lambda: torch.autograd.grad(function(*arguments), leaves, grad_y),
            PENALTY: penalized,
        }[case.what]

    ours: Callable[..., Tensor] = lambda *inputs: op.public(gk, *inputs)  # noqa: E731
    eager = op.eager
    if layers and op.layer is not None and op.eager_layer is not None:
        ours = op.layer(gk, case.shape).to(device)
        eager = op.eager_layer(case.shape).to(device)
    runs: dict[str, Run] = {"clone": lambda: x.detach().clone()}
    if op.eager_elements is None or op.eager_elements(case.shape) <= LARGEST_BROADCAST:
        runs["eager"] = step(eager, eager_penalty)
    if case.what != PENALTY:
        runs |= {name: step(other, eager_penalty) for name, other in op.others.items()}
    if compiled and "eager" in runs:
        torch._dynamo.reset()
        if case.what == PENALTY:
            runs["compiled"] = _compiled_step(op, [x, *parameters], grad_y, tangent)
        else:
            runs["compiled"] = step(torch.compile(eager, dynamic=False), eager_penalty)
    runs["ours"] = step(ours, gk.functional.gradient_norm_penalty)
    return runs


def _compiled_step(op: Op, inputs: list[Tensor], grad_y: Tensor, tangent: Tensor | None) -> Run:
    """Compiles a whole step with torch.func, because a compiled module cannot be differentiated
    twice. This is PyTorch's fastest form."""

    def program(grad_y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        def penalized(x: Tensor, *parameters: Tensor) -> Tensor:
            grad = torch.func.grad(lambda x: (op.eager(x, *parameters) * grad_y).sum())(x)
            return eager_penalty(grad) if tangent is None else (grad * tangent).sum()

        return torch.func.grad(penalized, argnums=tuple(range(len(inputs[:2]))))(*inputs)

    compiled = torch.compile(program)
    leaves = [t.detach() for t in inputs]
    return lambda: compiled(grad_y, *leaves)
