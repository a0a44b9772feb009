"""Calls the functions of an iteration directly or as CUDA graphs.

Replaying a graph is one launch instead of thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gankernels.train.config import Config
from gankernels.train.ranks import Ranks

#: Eager calls before the capture: PyTorch requires them, since in the first ones libraries are
#: initialized and optimizers allocate their state.
WARM_UP = 3


class Call(Protocol):
    """Calls a function of device tensors; functions of equal keys compute the same."""

    def __call__(
        self,
        key: Hashable,
        function: Callable[[Sequence[Tensor]], tuple[Any, Tensor]],
        inputs: Sequence[Tensor],
    ) -> tuple[Any, Tensor]:
        """`function(inputs)`: anything that is the same for every call, and a tensor."""


class Graphs:
    """Calls functions of device tensors; from the fourth call on it replays a graph instead.

    There is a graph for every key, since a graph always computes the same: an iteration with a
    regularizer that is not applied every time has two. Random numbers are the same as without
    graphs.

    Args:
        generators: what the functions draw from, PyTorch's default generator apart.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators
        self.stream = torch.cuda.Stream(generators[0].device)
        # The graphs can share their memory, since they never run at the same time and none reads
        # intermediate results of another.
        self.pool = torch.cuda.graph_pool_handle()
        self.calls: dict[Hashable, int] = {}
        self.captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Any, Tensor]] = {}

    def __call__(
        self,
        key: Hashable,
        function: Callable[[Sequence[Tensor]], tuple[Any, Tensor]],
        inputs: Sequence[Tensor],
    ) -> tuple[Any, Tensor]:
        """`function(inputs)`: anything that is the same for every call, and a tensor."""
        calls = self.calls[key] = self.calls.get(key, 0) + 1
        if calls <= WARM_UP:
            return self._run(function, inputs)
        if key not in self.captured:
            self.captured[key] = self._capture(function, inputs)
        graph, places, constant, result = self.captured[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        graph.replay()
        return constant, result.clone()

    def _run(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        # On the capturing stream: PyTorch keeps accumulating gradients on the first one it used.
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            outputs = function(inputs)
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        return outputs

    def _capture(
        self, function: Callable[..., Any], inputs: Sequence[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any, Tensor]:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        places = [value.clone() for value in inputs]
        try:
            # Other threads may pin memory for coming batches meanwhile. The capture synchronizes
            # with the current device first, which therefore must be the capturing one.
            with (
                torch.cuda.device(self.stream.device),
                torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
            ):
                constant, result = function(places)
        except RuntimeError as error:
            first_line = str(error).strip().split("\n")[0]
            raise RuntimeError(
                f"this game's iteration cannot be captured in a CUDA graph ({first_line}); "
                "train it with graph=False (--no-graph)"
            ) from error
        return graph, places, constant, result


def run_eagerly(
    key: Hashable,
    function: Callable[[Sequence[Tensor]], tuple[Any, Tensor]],
    inputs: Sequence[Tensor],
) -> tuple[Any, Tensor]:
    """Call the function directly; used when CUDA graphs are off."""
    return function(inputs)


def choose_call(
    config: Config,
    device: torch.device,
    ranks: Ranks,
    optimizers: Mapping[str, torch.optim.Optimizer],
    rng: torch.Generator,
) -> Call:
    """CUDA graphs where the settings, the device and the optimizers allow them."""
    if not config.graph or device.type != "cuda" or ranks.size > 1:
        return run_eagerly
    # If an optimizer cannot skip a step on the device, its scaler synchronizes with the host.
    if config.precision == "fp16" and not all(
        getattr(o, "_step_supports_amp_scaling", False) for o in optimizers.values()
    ):
        return run_eagerly
    return Graphs([rng])
