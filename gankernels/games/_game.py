"""What a GAN tells a trainer: the parts every game is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gankernels._shard import per_sample


@dataclass(frozen=True)
class DataSpec:
    """What a game has to know about the images it plays with."""

    channels: int = 1
    size: int = 28
    num_classes: int = 10

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.channels, self.size, self.size)


class Batch:
    """Real images and their labels.

    Args:
        images: `(N, C, H, W)` in [-1, 1], or a function that makes them when they are first asked
            for: most generators look at labels alone.
        labels: `(N,)`, int64.
    """

    def __init__(self, images: Tensor | Callable[[], Tensor], labels: Tensor) -> None:
        self._images, self.labels = images, labels

    @property
    def images(self) -> Tensor:
        if callable(self._images):
            with torch.inference_mode(False):  # others may train on them
                self._images = self._images()
        return self._images

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.images, self.labels))


@dataclass(frozen=True)
class Player:
    """One side of the game.

    Args:
        name: as it appears in logs and checkpoints.
        network: the module whose parameters this player moves, and only these. While it moves,
            every other parameter is frozen: fakes are detached and nobody's gradients are
            computed in vain without the game having to say so.
        loss: `loss(batch, rng)` returns the named scalar terms whose sum the player minimises.
            All randomness is drawn from the `torch.Generator` it is given.
        optimizer: makes an optimiser from parameters, such as `partial(torch.optim.Adam, lr=2e-4)`.
        steps: optimiser steps per iteration, each on a fresh batch.
        after_step: called without gradient after every optimiser step, such as weight clipping.
        lazy_loss: what it minimises instead of `loss` on the first of every `lazy_every` steps:
            the same terms and one too dear for every step (lazy regularisation, Karras et al.
            2020, arXiv:1912.04958).
        lazy_every: see `lazy_loss`.
    """

    name: str
    network: nn.Module
    loss: Callable[[Batch, torch.Generator], dict[str, Tensor]]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    steps: int = 1
    after_step: Callable[[], None] | None = None
    lazy_loss: Callable[[Batch, torch.Generator], dict[str, Tensor]] | None = None
    lazy_every: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"player {self.name!r} must make at least 1 step, got {self.steps}")
        if self.lazy_every < 1:
            raise ValueError(f"lazy_every of player {self.name!r} must be at least 1")

    def loss_of(self, step: int) -> Callable[[Batch, torch.Generator], dict[str, Tensor]]:
        """What the player minimises in its own step number `step`, counted from 0."""
        lazy = self.lazy_loss is not None and step % self.lazy_every == 0
        return self.lazy_loss if lazy else self.loss


def option(default: Any, help: str) -> Any:
    """A field of an options class, with the line that `train --help` prints for it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """Hyperparameters of a game; subclasses add fields and change defaults."""

    latent_dim: int = option(100, "length of the noise vector")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
            if isinstance(value, (int, float)) and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")


class Game(nn.Module):
    """Networks, who moves them and what each of them minimises.

    A subclass defines `players()` and `self.generator`, the network that `sample` uses and that
    a trainer averages: it maps noise `(n, latent_dim)` and labels `(n,)` or None to images.
    """

    Options: ClassVar[type[Options]] = Options
    #: Whether samples are drawn for a given label.
    conditional: ClassVar[bool] = False
    #: Whether the networks are convolutional, which run faster on channels_last images.
    channels_last: ClassVar[bool] = False
    #: Training settings that suit this game better than the general ones.
    defaults: ClassVar[dict[str, Any]] = {}

    generator: nn.Module

    def __init__(self, spec: DataSpec, options: Options | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.options = self.Options() if options is None else options
        #: What classes are called, by their labels: numbers where nobody has said.
        self.classes: tuple[str, ...] = tuple(map(str, range(spec.num_classes)))

    def players(self) -> list[Player]:
        """The players in the order in which they move."""
        raise TypeError(f"{type(self).__name__} does not say who plays: define players()")

    @property
    def name(self) -> str:
        """What the command line calls the game: the name of the module that defines it."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def noise(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """Standard normal `(n, latent_dim)`, drawn where `rng` lives, on the game's device."""
        where = self.device if rng is None else rng.device
        d = self.options.latent_dim
        z = per_sample(lambda n: torch.randn(n, d, generator=rng, device=where), n)
        return z.to(self.device)

    def random_labels(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """Uniform labels `(n,)`, drawn where `rng` lives, on the game's device."""
        where = self.device if rng is None else rng.device
        k = self.num_classes
        labels = per_sample(lambda n: torch.randint(k, (n,), generator=rng, device=where), n)
        return labels.to(self.device)

    def fake(self, labels: Tensor, rng: torch.Generator) -> Tensor:
        """Generated images `(N, C, H, W)`, one per label; an unconditional game ignores which."""
        return self.generator(self.noise(len(labels), rng), self.condition(labels))

    def condition(self, labels: Tensor | None) -> Tensor | None:
        """The labels where the networks want them, None where they do not."""
        return labels if self.conditional else None

    @torch.no_grad()
    def sample(
        self,
        n: int,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 256,
        noise: Tensor | None = None,
    ) -> Tensor:
        """`n` images as float32 `(n, C, H, W)` in [-1, 1], with the networks in their own mode.

        Args:
            labels: int64 `(n,)` for a conditional game; drawn uniformly when missing.
            generator: where noise and missing labels come from; the default one when missing.
            batch_size: images computed at a time.
            noise: `(n, latent_dim)`; drawn when missing.

        Raises:
            ValueError: labels for an unconditional game, of another length or out of range, or
                noise of another shape.
        """
        if labels is not None:
            self._check_labels(labels, n)
        elif self.conditional:
            labels = self.random_labels(n, generator)
        if noise is None:
            noise = self.noise(n, generator)
        elif noise.shape != (n, self.options.latent_dim):
            raise ValueError(
                f"noise must have shape ({n}, {self.options.latent_dim}), got {tuple(noise.shape)}"
            )
        parts = []
        for rows in torch.arange(n, device=self.device).split(batch_size):
            chosen = None if labels is None else labels.to(self.device)[rows]
            parts.append(self.generator(noise[rows], chosen))
        return torch.cat(parts).float()

    def _check_labels(self, labels: Tensor, n: int) -> None:
        if not self.conditional:
            raise ValueError("labels were given, but this game is not conditional")
        if labels.shape != (n,):
            raise ValueError(f"labels must have shape ({n},), got {tuple(labels.shape)}")
        if n and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels must lie in 0..{self.num_classes - 1}, "
                f"got {int(labels.min())}..{int(labels.max())}"
            )
