"""One record per op, with everything that tests, benchmarks and the fuzzer need.

The module of an op has a dict `OPS` of records, one for each public form; `records` finds them all.
PyTorch's OpInfo is the model. Nothing is computed when a record is made.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gankernels.ops.autograd import DifferentiableOp

Shape: TypeAlias = tuple[int, ...]
Function: TypeAlias = Callable[..., Tensor]

#: The passes that kernels compute, and the steps that are made of them.
KERNEL_PASSES = ("forward", "backward", "double backward")
FORWARD, BACKWARD, PENALTY = STEPS = ("forward", "forward + backward", "penalty step")
LAYOUTS = ("contiguous", "channels_last")


class Draw:
    """Draws random tensors of one dtype and layout."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layout: str = "contiguous",
        drawn_on: torch.device | str | None = None,
    ) -> None:
        self.dtype, self.device, self.layout = dtype, device, layout
        self.drawn_on = device if drawn_on is None else drawn_on

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = (torch.randn(shape, device=self.drawn_on) * scale).to(self.dtype)
        if self.layout == "channels_last" and len(shape) > 2:
            drawn = drawn.movedim(1, -1).contiguous().movedim(-1, 1)
        return drawn.to(self.device)

    def constant(self, value: float, *shape: int) -> Tensor:
        """A parameter. It is in float32 for inputs of half precision, as under autocast."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.full(shape, value, dtype=dtype, device=self.device)


class Traffic(NamedTuple):
    """The tensors of the input's size that a pass reads and writes; smaller ones do not count."""

    least: int  # if each is accessed once
    moved: int  # by the kernels, if nothing fits in a cache


class Inputs(NamedTuple):
    """One shape to measure, with all of these dtypes, layouts and passes."""

    shape: Shape
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    layouts: tuple[str, ...] = LAYOUTS[:1]
    passes: tuple[str, ...] = STEPS


@dataclass(frozen=True)
class Op:
    """One public form of an op. Its functions take what `inputs` draws: x, then parameters.

    Attributes:
        inputs: ``(shape, draw)`` -> x and other differentiable inputs.
        public: ``(gankernels, *inputs)`` -> the result of the public function.
        eager: ``(*inputs)`` -> the same, as GAN code writes it in PyTorch.
        fused: the kernels' passes; None for an op that is PyTorch's own.
        options: ``(shape)`` -> the options of the passes.
        last_inputs: further inputs of the forward pass, after `inputs`.
        kernel_reference: ``(*arguments)`` of the forward kernel -> its results by PyTorch's ops.
        samples: shapes that together cover every way in which the kernels divide their work.
        channels_last_samples: the same for the channels_last layout.
        representative: a few shapes, one for each kind of launch on a GPU.

        baselines: a sentence that explains the columns of tables to compare with.
        layer: ``(gankernels, shape)`` -> our layer, if there is one.
        eager_layer: ``(shape)`` -> the same by PyTorch's layers.
        eager_elements: ``(shape)`` -> elements of eager's largest tensor, if it may be too large.
        others: further baselines, differentiable once.
        traffic: by kernel pass; empty if the op is not bound by memory.
        penalty_tensors: like `Traffic.least`, for a whole penalty step.
        work: ``(shape)`` -> additions and multiplications of the forward pass, and elements that it
            must read or write.
        additions: ``(kernel pass, shape)`` -> additions on a GPU, if the op is bound by them.
        measured: the inputs of `gankernels bench`.
        measured_quickly: the inputs of `gankernels bench --quick`.
        measured_on_gpu: the inputs of benchmarks/gpu_ops.py.
    """

    name: str
    inputs: Callable[[Shape, Draw], tuple[Tensor, ...]]
    public: Function
    eager: Function
    fused: DifferentiableOp | None = None
    options: Callable[[Shape], Any] = lambda shape: None
    last_inputs: tuple[None, ...] = ()
    kernel_reference: Callable[..., Sequence[Tensor | None]] | None = None
    samples: tuple[Shape, ...] = ()
    channels_last_samples: tuple[Shape, ...] = ()
    representative: tuple[Shape, ...] = ()

    baselines: str = ""
    layer: Callable[[ModuleType, Shape], nn.Module] | None = None
    eager_layer: Callable[[Shape], nn.Module] | None = None
    eager_elements: Callable[[Shape], int] | None = None
    others: Mapping[str, Function] = field(default_factory=dict)
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    penalty_tensors: int | None = None
    work: Callable[[Shape], tuple[int, int]] | None = None
    additions: Callable[[str, Shape], int] | None = None
    measured: tuple[Inputs, ...] = ()
    measured_quickly: tuple[Inputs, ...] = ()
    measured_on_gpu: tuple[Inputs, ...] = ()

    def kernel_passes(
        self, shape: Shape, draw: Draw, inputs: Sequence[Tensor] | None = None
    ) -> dict[str, Callable[[], object]]:
        """The passes by kernels, on these inputs or on random ones, ready to be called."""
        fused, options = self.fused, self.options(shape)
        assert fused is not None
        given = self.inputs(shape, draw) if inputs is None else inputs
        arguments = (*given, *self.last_inputs)
        wanted = [t is not None for t in arguments]
        outputs = fused.forward(*arguments, options)
        saved = arguments if fused.saves is None else fused.saves(arguments, outputs)
        output = outputs if isinstance(outputs, Tensor) else outputs[0]
        assert output is not None
        grad = draw(*output.shape).to(output.dtype)
        gradients = fused.backward(grad, *saved, options, wanted)
        others = () if isinstance(gradients, Tensor) else gradients[1:]
        tangents = (draw(*given[0].shape), *(None for _ in others))
        second = (*tangents, grad, *saved, options, [t is not None for t in (grad, *saved)])
        return {
            "forward": lambda: fused.forward(*arguments, options),
            "backward": lambda: fused.backward(grad, *saved, options, wanted),
            "double backward": lambda: fused.double_backward(*second),
        }


def records() -> dict[str, Op]:
    """The records of all ops, by name."""
    found: dict[str, Op] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        found |= getattr(importlib.import_module(f"gankernels.ops.{module.name}"), "OPS", {})
    return found
