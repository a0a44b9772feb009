"""The parts of every game: batches, players, options, and the base class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gankernels._options import option
from gankernels._registry import Registry
from gankernels._shard import per_sample
from gankernels.data import Spec, image_spec

#: The spec of square images in numbered classes: `DataSpec(channels, size, num_classes)`.
DataSpec = image_spec


class Batch(Mapping[str, Tensor]):
    """Rows of data as networks see them: a mapping of column names to tensors `(size, ...)`.

    A column is decoded when it is first asked for: most generators look at labels alone. Columns
    are attributes too: `batch.images` is `batch["images"]`.

    Args:
        columns: tensors, or functions that make them.
        size: the number of rows; needed where no column is a tensor.
    """

    def __init__(
        self, columns: Mapping[str, Tensor | Callable[[], Tensor]], size: int | None = None
    ) -> None:
        self._columns = dict(columns)
        if size is None:
            size = len(next(c for c in self._columns.values() if isinstance(c, Tensor)))
        self.size = size
        #: What a game last made for this batch, detached, for players that share it.
        self.made: Mapping[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        value = self._columns[name]
        if not isinstance(value, Tensor):
            with torch.inference_mode(False):  # others may train on it
                value = self._columns[name] = value()
        return value

    def __getattr__(self, name: str) -> Tensor:
        if name in self.__dict__.get("_columns", ()):
            return self[name]
        raise AttributeError(f"the batch must have a column {name!r}, got {', '.join(self)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__.get("_columns", ()))

    def __len__(self) -> int:
        return len(self._columns)


#: What a player minimizes: named scalar terms, from a batch and the only source of randomness.
Loss = Callable[[Batch, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Player:
    """One side of the game.

    Args:
        name: the player's name in logs and checkpoints.
        network: the module whose parameters this player moves, and only these. While it moves,
            every other parameter is frozen, so that fakes need not be detached and no unused
            gradients are computed.
        loss: `loss(batch, rng)` returns the named scalar terms whose sum the player minimizes.
            All randomness is drawn from the `torch.Generator` it is given.
        optimizer: makes an optimizer from parameters, such as `partial(torch.optim.Adam, lr=2e-4)`.
        steps: optimizer steps per iteration, each on a fresh batch.
        after_step: called without gradient after every optimizer step, such as weight clipping.
        lazy_loss: what the player minimizes instead of `loss` on the first of every `lazy_every`
            steps: the same terms and one too expensive for every step (lazy regularization, Karras
            et al. 2020, arXiv:1912.04958).
        lazy_every: see `lazy_loss`.
        schedule: makes a learning rate scheduler from the optimizer; the trainer steps it after
            every iteration in which the player plays.
        plays: `plays(step)` tells whether the player takes part in iteration `step`, counted from
            0: phases, such as pre-training, are a matter of who plays.
        shared: whether the player takes the batch of the step before, with what was made for it,
            instead of a fresh one: one set of fakes for several players. Not for the first player.
    """

    name: str
    network: nn.Module
    loss: Loss
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    steps: int = 1
    after_step: Callable[[], None] | None = None
    lazy_loss: Loss | None = None
    lazy_every: int = 1
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None
    plays: Callable[[int], bool] | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps of player {self.name!r} must be at least 1, got {self.steps}")
        if self.lazy_every < 1:
            raise ValueError(
                f"lazy_every of player {self.name!r} must be at least 1, got {self.lazy_every}"
            )

    def loss_of(self, step: int) -> Loss:
        """What the player minimizes in its own step number `step`, counted from 0."""
        if self.lazy_loss is not None and step % self.lazy_every == 0:
            return self.lazy_loss
        return self.loss


@dataclass(frozen=True)
class BareOptions:
    """Hyperparameters of a game that draws no noise; subclasses add fields and change defaults."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
            if isinstance(value, (int, float)) and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")


@dataclass(frozen=True)
class Options(BareOptions):
    """Hyperparameters of a game whose generator starts from noise."""

    latent_dim: int = option(100, "length of the noise vector")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")


class Game(nn.Module):
    """Networks, the players that move them, and what each player minimizes.

    A subclass defines `players()` and, where the usual one is not its own, `make()`. The usual game
    has a network `self.generator` that maps noise `(n, latent_dim)` and the columns `given` to
    values of the column `makes`.

    Args:
        spec: the fields of the data.
        options: an instance of the class's `Options`; the defaults where it is None.
    """

    Options: ClassVar[type[BareOptions]] = Options
    #: The column that samples are of.
    makes: ClassVar[str] = "images"
    #: The columns that samples are made from: `("labels",)` in a class-conditional game.
    given: ClassVar[tuple[str, ...]] = ()
    #: The networks that samples are made by; a trainer follows them with a moving average.
    averaged: ClassVar[tuple[str, ...]] = ("generator",)
    #: Training settings that suit this game better than the general ones.
    defaults: ClassVar[dict[str, Any]] = {}

    generator: nn.Module
    options: BareOptions

    def __init__(self, spec: Spec, options: BareOptions | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.options = self.Options() if options is None else options

    def players(self) -> list[Player]:
        """The players in the order in which they move."""
        raise NotImplementedError(f"{type(self).__name__} must define players()")

    @property
    def channels_last(self) -> bool:
        """Whether the networks are convolutional, which run faster on channels_last images."""
        return False

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns that the data must have."""
        return self.makes, *self.given

    @property
    def name(self) -> str:
        """The game's name on the command line, by default that of the module that defines it."""
        return registry.name_of(type(self))

    @property
    def conditional(self) -> bool:
        """Whether samples are made for a given label."""
        return "labels" in self.given

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes

    @property
    def latent_dim(self) -> int:
        """The length of the noise vector, 0 in a game whose generator draws none by `noise`."""
        return self.options.latent_dim if isinstance(self.options, Options) else 0

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def check(self, spec: Spec) -> None:
        """Raises ValueError where data of these fields do not fit the game."""
        for name in self.reads:
            if name not in spec:
                raise ValueError(
                    f"the data must have a column {name!r} for {self.name}, got {', '.join(spec)}"
                )
            if spec[name] != self.spec.get(name):
                raise ValueError(
                    f"{name} of the data must be {self.spec.get(name)}, for which the game is "
                    f"built, got {spec[name]}; build the game with data.spec"
                )

    def noise(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """Standard normal `(n, latent_dim)`, drawn where `rng` lives, on the game's device."""
        d = self.latent_dim
        z = per_sample(lambda n: torch.randn(n, d, generator=rng, device=self._where(rng)), n)
        return z.to(self.device)

    def random(self, column: str, n: int, rng: torch.Generator | None = None) -> Tensor:
        """`n` random values of a column, drawn where `rng` lives, on the game's device.

        Raises ValueError for a column that only data can have.
        """
        field = self.spec[column]

        def draw(n: int) -> Tensor:
            values = field.random(n, rng, self._where(rng))
            if values is None:
                kind = type(field).__name__
                raise ValueError(f"{column} must be given: a {kind} cannot be drawn")
            return values

        return per_sample(draw, n).to(self.device)

    def random_labels(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """Uniform labels `(n,)`: `random("labels", n, rng)`."""
        return self.random("labels", n, rng)

    def _where(self, rng: torch.Generator | None) -> torch.device:
        return self.device if rng is None else rng.device

    def conditions(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The columns `given`, as further arguments of a network."""
        return tuple(batch[name] for name in self.given)

    def make(self, batch: Batch, rng: torch.Generator | None) -> Mapping[str, Tensor]:
        """What the game makes for a batch: values `(batch.size, ...)`, by column.

        Noise is drawn from `rng`, unless the batch has a column `noise`.
        """
        noise = batch["noise"] if "noise" in batch else self.noise(batch.size, rng)
        return {self.makes: self.generator(noise, *self.conditions(batch))}

    def fake(self, labels: Tensor, rng: torch.Generator) -> Tensor:
        """Generated values, one per label; an unconditional game ignores which."""
        return self.make(Batch({"labels": labels}), rng)[self.makes]

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        rng: torch.Generator | None = None,
        batch_size: int = 256,
        **given: Any,
    ) -> Tensor:
        """`n` samples, with the networks in their own mode: images as float32 in [-1, 1].

        Args:
            rng: the source of noise and of missing columns; by default PyTorch's own.
            batch_size: samples computed at a time.
            given: columns `(n, ...)` to make samples from, such as `labels=` of a conditional game;
                drawn at random when missing or None. `noise=` takes the place of random noise.

        Raises:
            ValueError: columns that the game is not given, of another length or out of range, or
                one that is missing and cannot be drawn.
        """
        columns = {
            name: self._checked(name, column, n)
            for name, column in given.items()
            if column is not None
        }
        for name in self.given:
            if name not in columns:
                columns[name] = self.random(name, n, rng)
        if "noise" not in columns and self.latent_dim:
            columns["noise"] = self.noise(n, rng)
        parts = []
        for rows in torch.arange(n, device=self.device).split(batch_size):
            batch = Batch({name: column[rows] for name, column in columns.items()}, len(rows))
            made = self.make(batch, rng)[self.makes]
            parts.append(made.float() if made.is_floating_point() else made)
        return torch.cat(parts)

    def _checked(self, name: str, column: Tensor, n: int) -> Tensor:
        """A given column on the game's device."""
        if name == "noise" and self.latent_dim:
            expected: tuple[int, ...] = (n, self.latent_dim)
        elif name in self.given:
            expected = (n, *self.spec[name].shape)
        else:
            takes = ", ".join(self.given) or "no columns"
            raise ValueError(f"{self.name} takes {takes}, got {name}")
        if tuple(column.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(column.shape)}")
        if column.dtype == torch.int64:
            self.spec[name].check(name, column)
        return column.to(self.device)


registry = Registry("gankernels.games", "game", Game)
