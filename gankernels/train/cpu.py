"""Layers of PyTorch that are slow on CPU, by layers that compute the same faster."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def accelerate(network: nn.Module) -> None:
    """Let PyTorch's own layers in `network` do what they do faster, in training on a CPU.

    In place: they get another class, of the same name. Parameters, state_dict and what is printed
    stay, results differ by rounding. Layers of subclasses are left alone.
    """
    for module in network.modules():
        if faster := FASTER.get(type(module)):
            module.__class__ = faster


class Dropout(nn.Dropout):
    """Compares 16 random bits per element with `p`, which they round to a multiple of 2^-16.

    PyTorch draws a mask element by element from a Bernoulli distribution, which takes ten times as
    long: a tenth of a step of a small dense network.
    """

    def forward(self, input: Tensor) -> Tensor:
        dropped = round(self.p * 2**16)
        if not self.training or not _on_cpu(input) or not 0 < dropped < 2**16:
            return super().forward(input)
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: input.numel()].view(input.shape)
        kept = torch.ge(bits, dropped - 2**15, out=bits)
        scale = 2**16 / (2**16 - dropped)
        if input.element_size() == 2:  # in place: ones become the bits of the scale
            return input * kept.mul_(_bits(scale, input.dtype)).view(input.dtype)
        return input * kept.to(input.dtype).mul_(scale)


class Linear(nn.Linear):
    """In float32 by oneDNN where that is faster; under autocast with weights that are cast once.

    Autocast casts weights anew whenever they are used frozen, as everybody's are while another
    player moves, and PyTorch hands every cast and its derivative on as operations of their own.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _on_cpu(input) or self.weight.dtype != torch.float32:
            return super().forward(input)
        if torch.is_autocast_enabled("cpu"):
            # What is cast in inference mode is of no use to training.
            if not _casts_in_use or torch.is_inference_mode_enabled() or self.weight.is_inference():
                return super().forward(input)
            dtype = torch.get_autocast_dtype("cpu")
            weight, bias = (_cast_once(self, name, dtype) for name in ("weight", "bias"))
            return F.linear(input, weight, bias)
        if input.dim() != 2 or input.dtype != torch.float32 or not onednn_is_faster():
            return super().forward(input)
        product = _Product.apply(input, self.weight)
        return product if self.bias is None else product + self.bias

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the casts."""
        return {name: value for name, value in self.__dict__.items() if name != "_casts"}


class Sequential(nn.Sequential):
    """Runs a nearest upsampling by 2 and the 3x3 convolution after it as one.

    Of the convolution's nine pixels only four differ, so it is a transposed convolution with a 4x4
    kernel and stride 2, whose weights are sums of the nine: 2.25 times fewer operations, and no
    upsampled image in memory.
    """

    def forward(self, input: Tensor) -> Tensor:
        modules = list(self)
        faster = _on_cpu(input) and _onednn_computes(input.dtype)
        i = 0
        while i < len(modules):
            if i + 1 < len(modules) and faster and _upsampled(*modules[i : i + 2]):
                input = _upsampled_conv(input, modules[i + 1])
                i += 2
            else:
                input = modules[i](input)
                i += 1
        return input


class Conv2d(nn.Conv2d):
    """To one channel from many: a product with every tap of the kernel, summed where taps meet.

    oneDNN computes channels by the dozen, whether they are needed or not. Not in half precision,
    which would round every product before it is summed.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _on_cpu(input) or not _to_one_channel(self, input):
            return super().forward(input)
        n, channels, height, width = input.shape
        taps = self.weight[0].flatten(1).t()
        rows = input.permute(0, 2, 3, 1).reshape(-1, channels)
        products = _product(rows, taps).view(n, height, width, len(taps)).permute(0, 3, 1, 2)
        meeting = torch.eye(len(taps), dtype=products.dtype).view(1, -1, *self.kernel_size)
        return _convolve(F.conv2d, products, meeting, self.bias, padding=self.padding)


FASTER = {
    nn.Conv2d: Conv2d,
    nn.Dropout: Dropout,
    nn.Linear: Linear,
    nn.Sequential: Sequential,
}


def _on_cpu(x: Tensor) -> bool:
    """And run as it is: torch.func, torch.compile and torch.jit get PyTorch's own layers."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return x.device.type == "cpu" and not torch._C._are_functorch_transforms_active()


def _onednn_computes(dtype: torch.dtype) -> bool:
    """Whether convolutions are oneDNN's. PyTorch's own transposed ones add up in half precision."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


@cache
def _bits(value: float, dtype: torch.dtype) -> int:
    return torch.tensor(value, dtype=dtype).view(torch.int16).item()


# ---- products ------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """a (m,k), b (n,k) -> a @ b.T (m,n), differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        return (
            _Product.apply(grad, b.t()) if ctx.needs_input_grad[0] else None,
            _Product.apply(grad.t(), a.t()) if ctx.needs_input_grad[1] else None,
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (m,k), b (n,k) -> a @ b.T (m,n) the fastest way."""
    if a.dtype == torch.float32 and onednn_is_faster():
        return _Product.apply(a, b)
    return F.linear(a, b)


@cache
def onednn_is_faster() -> bool:
    """MKL, PyTorch's usual choice for float32, keeps its AVX-512 kernels for Intel's processors."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# ---- casts ---------------------------------------------------------------------------------------


class Cast:
    """A parameter in half precision, cast again only where it has changed in the meantime.

    It is then written in place: a graph from before cannot be differentiated any more. Used by
    `Linear` inside `use_casts` only, where it is known who changes weights.
    """

    def __init__(self, parameter: Tensor, dtype: torch.dtype) -> None:
        self.parameter = parameter
        self.value = parameter.detach().to(dtype)
        self.version = parameter._version
        # One node of the graph for all uses: their gradients are added up before they are cast
        # back, as under autocast.
        self.tracked: Tensor | None = None
        #: Whether `gradient` gets what the parameter's `grad` would get otherwise, in float32.
        self.keeps_gradient = False
        self.gradient: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.version != self.parameter._version:
            self.refresh()
        if not (self.parameter.requires_grad and torch.is_grad_enabled()):
            return self.value
        if self.tracked is None:
            self.tracked = _As.apply(self.parameter, weakref.ref(self))
        return self.tracked

    def refresh(self) -> None:
        self.value.copy_(self.parameter.detach())
        self.version = self.parameter._version

    def take_gradient(self) -> Tensor | None:
        gradient, self.gradient = self.gradient, None
        return gradient


class _As(torch.autograd.Function):
    """The cast of a parameter, computed before."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, cast: weakref.ref[Cast]) -> Tensor:
        ctx.cast, ctx.dtype = cast, parameter.dtype
        return cast().value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        cast = ctx.cast()
        if cast is not None and cast.keeps_gradient:
            cast.gradient = grad if cast.gradient is None else cast.gradient + grad
            return None, None
        return grad.to(ctx.dtype), None


class _Flag(threading.local):
    """Of this thread, since a process may hold several trainers, each in a thread of its own."""

    raised = False

    def __bool__(self) -> bool:
        return self.raised

    def __repr__(self) -> str:
        return str(self.raised)


_casts_in_use = _Flag()


@contextmanager
def use_casts() -> Iterator[None]:
    """Inside, in this thread, weights are cast once per version of theirs. Whoever changes one in a
    way that PyTorch does not count (through `data`, or by a fused optimiser) has to count it
    himself, by `torch.autograd.graph.increment_version`."""
    before, _casts_in_use.raised = _casts_in_use.raised, True
    try:
        yield
    finally:
        _casts_in_use.raised = before


def _cast_once(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor | None:
    # Past nn.Module's __getattr__, which is slow, unless a parametrisation made it a property.
    parameter = module._parameters[name] if name in module._parameters else getattr(module, name)
    if parameter is None:
        return None
    casts = module.__dict__.setdefault("_casts", {})
    cast = casts.get(name)
    if cast is None or cast.parameter is not parameter or cast.value.dtype != dtype:
        casts[name] = cast = Cast(parameter, dtype)
    return cast()


def prepare_casts(network: nn.Module, dtype: torch.dtype) -> dict[Tensor, Cast]:
    """The casts that the layers of an accelerated `network` will use, for an optimiser to write."""
    casts: dict[Tensor, Cast] = {}
    for module in network.modules():
        if type(module) is Linear and module.weight.dtype == torch.float32:
            for name, parameter in module.named_parameters(recurse=False):
                cast = casts.setdefault(parameter, Cast(parameter, dtype))
                module.__dict__.setdefault("_casts", {})[name] = cast
    return casts


# ---- convolutions --------------------------------------------------------------------------------


def _to_one_channel(conv: nn.Conv2d, x: Tensor) -> bool:
    return (
        x.dtype == conv.weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and conv.out_channels == 1
        and 1 < conv.kernel_size[0] * conv.kernel_size[1] <= conv.in_channels // 4
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and x.dim() == 4
        and x.shape[1] == conv.in_channels
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _convolve(
    convolution: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, **kw: Any
) -> Tensor:
    """The convolution, with the bias's derivative apart.

    oneDNN takes half as long again for that of the weight where it is asked for both.
    """
    if bias is None:
        return convolution(x, weight, **kw)
    return _BiasGradient.apply(convolution(x, weight, bias.detach(), **kw), bias)


class _BiasGradient(torch.autograd.Function):
    """y (N,C,H,W), to which the bias (C) was added without its being recorded."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.mark_dirty(y)  # what is neither new nor changed could not be changed in place later
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        if not ctx.needs_input_grad[1]:
            return grad, None
        # In half precision PyTorch adds up what it has rounded, on some processors.
        wide = torch.promote_types(grad.dtype, torch.float32)
        return grad, grad.sum((0, 2, 3), dtype=wide)


# ---- upsampling ----------------------------------------------------------------------------------


def _upsampled(before: nn.Module, conv: nn.Module) -> bool:
    return (
        type(before) is nn.Upsample
        and type(conv) in (nn.Conv2d, Conv2d)
        and before.mode == "nearest"
        and before.size is None
        and before.scale_factor in (2, (2, 2))
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not any(module._forward_hooks or module._forward_pre_hooks for module in (before, conv))
        and not any(
            module._backward_hooks or module._backward_pre_hooks for module in (before, conv)
        )
    )


def _upsampled_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    # A tap of the transposed convolution collects those of the convolution that meet its pixel:
    # a small product, and one of float32 so that the sums are what is rounded under autocast.
    taps = conv.weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    with torch.autocast("cpu", enabled=False):
        weight = torch.kron(taps, taps) @ conv.weight.permute(2, 3, 1, 0).reshape(9, -1)
    weight = weight.view(4, 4, conv.in_channels, conv.out_channels).permute(2, 3, 0, 1)
    if conv.weight.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    return _convolve(F.conv_transpose2d, x, weight, conv.bias, stride=2, padding=1)
