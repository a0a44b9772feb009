"""Estimates the memory that a game needs, before it is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gankernels._memory import too_large
from gankernels.data import Spec
from gankernels.games import Adversarial, BareOptions, Batch, Game


class _Unfilled(TorchFunctionMode):
    """Skips initialization: on meta tensors PyTorch imports SymPy for it, which takes seconds."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return args[0] if function is Tensor.normal_ else function(*args, **(kwargs or {}))


def blueprint(game: type[Game], spec: Spec, options: BareOptions) -> Game | None:
    """The game on the meta device, or None where its code does not allow that.

    Raises ValueError where its weights are too many to be counted.
    """
    try:
        with torch.device("meta"), _Unfilled():
            return game(spec, options)
    except (RuntimeError, TypeError) as error:
        if reason := too_large(error):
            raise ValueError(f"the networks of these settings are too large: {reason}") from error
        return None


def weight_bytes(game: Game) -> int:
    return sum(parameter.nbytes for parameter in game.parameters())


def activation_bytes(game: Game) -> int:
    """The bytes of all outputs of a blueprint's layers for a sample; 0 where that is unknown.

    A step of the generator keeps that many bytes until its backward pass.
    """
    outputs: dict[int, Any] = {}

    def note(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            storage = output.untyped_storage()
            outputs[storage._cdata] = storage  # kept alive, so that its address is not reused

    for module in game.modules():
        module.register_forward_hook(note)
    n = 2  # the least that batch norm accepts
    try:
        with torch.no_grad(), torch.device("meta"):
            raw = {c: torch.zeros(n, *f.shape, dtype=f.dtype) for c, f in game.spec.items()}
            batch = Batch({name: game.spec[name].decode(column) for name, column in raw.items()})
            made = game.make(batch, None)
            if isinstance(game, Adversarial):
                game.judge(made, batch)
    except (RuntimeError, TypeError, ValueError):  # the game cannot run on the meta device
        return 0
    return sum(storage.nbytes() for storage in outputs.values()) // n
