"""The loop."""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import gankernels
from gankernels.data import ImageData, to_float
from gankernels.games import Batch, Game, Player
from gankernels.train import checkpoint
from gankernels.train.config import Config, to_dict
from gankernels.train.files import write_json
from gankernels.train.images import arrange, save_grid
from gankernels.train.progress import Metrics, Progress
from gankernels.train.signals import StopRequest

#: Images in the grids that a run saves.
GRID = 80


class DivergenceError(RuntimeError):
    """A loss or a weight is NaN or infinite; the message says when and whose."""


class Trainer:
    """Trains a game on images and leaves a run folder behind.

    The folder `config.out` gets config.json (reruns the run), metrics.jsonl, samples/step_*.png,
    samples.png and checkpoints/step_*.pt. Images stay on the device as uint8; batches, noise and
    labels are drawn there from one `torch.Generator`, and nothing waits for the device between
    two reports. Dropout draws from PyTorch's default generator: seed it for a repeatable run.

    Args:
        game: the networks and what they minimise; moved to the device of `config`.
        data: the real images, of the channels, size and classes that the game was built for.
        config: everything else.

    Raises:
        ValueError: data that do not fit the game, or a device that does not exist.
    """

    def __init__(self, game: Game, data: ImageData, config: Config) -> None:
        _check_fit(game, data)
        self.config = replace(config, size=data.size, channels=data.channels)
        self.run = Path(config.out)
        self.device = choose_device(config.device)
        self.classes = data.classes
        self.images = data.images.to(self.device)
        self.labels = data.labels.to(self.device)
        self.layout = torch.channels_last if game.channels_last else torch.contiguous_format
        self.game = game.to(self.device, memory_format=self.layout).train()
        self.rng = torch.Generator(self.device).manual_seed(config.seed)
        self.players = game.players()
        self.parameters = {
            player.name: [p for p in player.network.parameters() if p.requires_grad]
            for player in self.players
        }
        self.optimizers = {
            player.name: make_optimizer(player, self.parameters[player.name])
            for player in self.players
        }
        self.average = None
        if config.ema:
            self.average = copy.deepcopy(game.generator).requires_grad_(False).eval()
            self.followed = _floating(self.average), _floating(game.generator)
        self.step = 0
        self.losses = Losses()

    def fit(self) -> None:
        """Train until `config.steps`, or until SIGINT or SIGTERM asks to stop; save either way.

        Raises DivergenceError where a loss or a weight is no longer finite; the checkpoints are
        then from before. Raises ValueError where the folder holds a run that went further.
        """
        saved = checkpoint.checkpoints(self.run)
        if saved and saved[-1] > checkpoint.path_of(self.run, self.step):
            raise ValueError(
                f"{self.run} already holds a run beyond step {self.step}: "
                "load its latest checkpoint or choose another folder"
            )
        gankernels.tune_allocator()
        config = self.config
        write_json(self.run / "config.json", to_dict(self.game.name, config, self.game.options))
        metrics = Metrics(self.run / "metrics.jsonl", self.step)
        progress = Progress(self.step, config.steps)
        began, reported = time.perf_counter(), self.step
        try:
            with StopRequest() as stop:
                while self.step < config.steps and not stop.requested:
                    self.iterate()
                    progress.advance()
                    last = self.step == config.steps or stop.requested
                    if self.step % config.log_every == 0 or last:
                        values = self.losses.take()
                        speed = (self.step - reported) / (time.perf_counter() - began)
                        metrics.write(step=self.step, it_per_s=round(speed, 2), **values)
                        progress.report(self.step, values, speed)
                        began, reported = time.perf_counter(), self.step
                    if _due(self.step, config.sample_every):
                        self.save_samples(self.run / "samples" / f"step_{self.step:08d}.png")
                    if _due(self.step, config.checkpoint_every) and not last:
                        self.save()
                self.save()
                self.save_samples(self.run / "samples.png")
        finally:
            progress.close()
            metrics.close()

    def iterate(self) -> None:
        """One iteration: every player makes its steps, then the average follows."""
        for player in self.players:
            for i in range(player.steps):
                self.move(player, self.step * player.steps + i)
        if self.average is not None:
            self.follow()
        self.step += 1

    def move(self, player: Player, step: int) -> None:
        """Optimiser step number `step` of one player, on a fresh batch, all others frozen."""
        self.game.requires_grad_(False)
        for parameter in self.parameters[player.name]:
            parameter.requires_grad_(True)
        batch = self.draw()
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        ):
            terms = player.loss_of(step)(batch, self.rng)
        optimizer = self.optimizers[player.name]
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if player.after_step is not None:
            with torch.no_grad():
                player.after_step()
        self.losses.add(self.step + 1, player.name, terms)

    def draw(self) -> Batch:
        """A batch of real images, drawn with replacement."""
        n = self.config.batch_size
        rows = torch.randint(len(self.images), (n,), generator=self.rng, device=self.device)
        images = to_float(self.images[rows]).contiguous(memory_format=self.layout)
        return Batch(images, self.labels[rows])

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average of weights and floating-point buffers towards the generator."""
        average, current = self.followed
        torch._foreach_lerp_(average, current, 1 - self.config.ema)

    @contextmanager
    def sampling(self) -> Iterator[Game]:
        """The game in evaluation mode with the averaged generator, for the `with` block."""
        generator = self.game.generator
        self.game.eval()
        if self.average is not None:
            self.game.generator = self.average
        try:
            yield self.game
        finally:
            self.game.generator = generator
            self.game.train()

    def save_samples(self, path: Path) -> None:
        """A grid from the same noise every time; columns are classes in a conditional game."""
        classes = list(range(self.game.num_classes)) if self.game.conditional else None
        labels, columns = arrange(GRID, classes)
        fixed = torch.Generator().manual_seed(self.config.seed)
        with self.sampling() as game:
            save_grid(game.sample(GRID, labels, fixed), path, columns)

    def save(self) -> Path:
        """Write a checkpoint; DivergenceError where a loss or a weight is no longer finite."""
        self.losses.check()
        for player in self.players:
            finite = [p.isfinite().all() for p in self.parameters[player.name]]
            if not torch.stack(finite).all():
                raise DivergenceError(
                    f"step {self.step}: a weight of player {player.name!r} is not finite"
                )
        content = {
            "config": to_dict(self.game.name, self.config, self.game.options),
            "spec": asdict(self.game.spec),
            "classes": list(self.classes),
            "count": len(self.images),
            "device": self.device.type,
            "game": self.game.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "ema": None if self.average is None else self.average.state_dict(),
            "rng": self._rng_state(),
        }
        return checkpoint.save(self.run, self.step, content, self.config.keep)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of this game, bit for bit. Raises CheckpointError."""
        content = checkpoint.read(path, self.device)
        if content["spec"] != asdict(self.game.spec) or content["count"] != len(self.images):
            raise checkpoint.CheckpointError(
                f"{path} was trained on {content['count']} images of {content['spec']}, "
                f"the data are {len(self.images)} of {asdict(self.game.spec)}"
            )
        if content["device"] != self.device.type:
            raise checkpoint.CheckpointError(
                f"{path} was written on {content['device']}, whose random numbers cannot go on "
                f"on {self.device.type}: resume there with --device {content['device']}"
            )
        if content["optimizers"].keys() != self.optimizers.keys():
            raise checkpoint.CheckpointError(f"{path} is of another game than {self.game.name}")
        checkpoint.load_state(self.game, content["game"], path)
        if self.average is not None:
            checkpoint.load_state(self.average, content["ema"], path)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])
        self.rng.set_state(content["rng"]["trainer"].cpu())
        torch.set_rng_state(content["rng"]["cpu"].cpu())
        if self.device.type == "cuda" and content["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(content["rng"]["cuda"].cpu(), self.device)
        self.step = content["step"]

    def _rng_state(self) -> dict[str, Tensor | None]:
        on_cuda = self.device.type == "cuda"
        return {
            "trainer": self.rng.get_state(),
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if on_cuda else None,
        }


class Losses:
    """Loss terms since the last report; they stay on the device until somebody asks."""

    def __init__(self) -> None:
        self.history: list[tuple[int, str, str, Tensor]] = []

    def add(self, step: int, player: str, terms: dict[str, Tensor]) -> None:
        self.history += [(step, player, term, value.detach()) for term, value in terms.items()]

    def check(self) -> list[float]:
        """All values since the last `take`. DivergenceError names the first that is not finite."""
        values = torch.stack([value for *_, value in self.history]).tolist() if self.history else []
        for (step, player, term, _), value in zip(self.history, values, strict=True):
            if not math.isfinite(value):
                raise DivergenceError(
                    f"step {step}: the loss term {term!r} of player {player!r} is {value}"
                )
        return values

    def take(self) -> dict[str, float]:
        """Means since the last call as `{"player/term": mean}`; raises as `check` does."""
        collected: dict[str, list[float]] = {}
        for (_, player, term, _), value in zip(self.history, self.check(), strict=True):
            collected.setdefault(f"{player}/{term}", []).append(value)
        self.history.clear()
        return {name: sum(values) / len(values) for name, values in collected.items()}


def make_optimizer(player: Player, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The player's optimiser, fused where PyTorch has it fused."""
    factory = player.optimizer
    kind = getattr(factory, "func", factory)
    if "fused" in inspect.signature(kind).parameters:
        return factory(parameters, fused=True)
    return factory(parameters)


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).split("\n")[0]
        raise ValueError(f"device {name!r} cannot be used: {first_line}") from error
    return device


def _check_fit(game: Game, data: ImageData) -> None:
    if tuple(data.images.shape[1:]) != game.spec.image_shape:
        raise ValueError(
            f"the game is built for images of {game.spec.image_shape}, "
            f"the data have {tuple(data.images.shape[1:])}"
        )
    if data.num_classes > game.num_classes:
        raise ValueError(
            f"the game is built for {game.num_classes} classes, the data have {data.num_classes}"
        )


def _floating(module: nn.Module) -> list[Tensor]:
    """Weights and statistics, without the counters of batches."""
    return [t for t in module.state_dict().values() if t.is_floating_point()]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
