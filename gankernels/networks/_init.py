"""Weight initializers that several networks share."""

from __future__ import annotations

from torch import nn


def init_glorot(module: nn.Module) -> None:
    """Glorot-uniform weights and zero biases, Keras's default, for the networks from Keras."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
