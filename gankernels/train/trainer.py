"""The training loop."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gankernels
from gankernels import metrics
from gankernels._devices import choose_device
from gankernels._memory import require
from gankernels._modes import evaluating, training_only
from gankernels._paths import expand
from gankernels._random import kept_random_state
from gankernels._shard import shard
from gankernels._threads import bound_threads
from gankernels.data import Data
from gankernels.games import Batch, Game, Loss, Player
from gankernels.train import checkpoint
from gankernels.train.averages import MovingAverages
from gankernels.train.batches import Batches
from gankernels.train.callbacks import Board, Callback, Metrics, Progress, Report, Score
from gankernels.train.config import Config, settle
from gankernels.train.graph import Call, choose_call
from gankernels.train.half import HalfWeights
from gankernels.train.learning_rates import LearningRates
from gankernels.train.losses import GRADIENT_NORM, DivergenceError, Losses, Name
from gankernels.train.notifier import Notifier
from gankernels.train.preview import save_preview
from gankernels.train.ranks import Ranks, synchronize
from gankernels.train.run_folder import RunFolder
from gankernels.train.signals import StopRequest
from gankernels.train.state import State

#: Several processes agree on stopping every so many iterations.
AGREE_EVERY = 10
#: Below this the gradients have been infinite or NaN some thirty times in a row.
LEAST_SCALE = 1e-4
#: Bytes that a step takes until its iteration ends, and bytes that a process takes, at least.
LEAST_STEP, LEAST_WORKER = 1024, 16 * 1024**2


class Trainer(State):
    """Trains a game on a data set and writes a run folder.

    The folder `config.out` gets config.json (reruns the run), metrics.jsonl, samples/step_*,
    samples.png (or what shows the field that the game makes), checkpoints/step_*.pt, report.html
    and tensorboard/. Raw columns stay on the device where they fit, else other processes read them
    ahead of time. Batches, noise and labels are drawn on the device from one `torch.Generator`, and
    nothing waits for the device between two reports. On CUDA whole iterations are replayed as
    graphs unless `config.graph` is false. Dropout draws from PyTorch's default generator: seed it
    for a repeatable run.

    Args:
        game: the networks and what they minimize; moved to the device of `config`.
        data: the columns that the game reads, of the fields that it was built for.
        config: everything else.
        callbacks: extra callbacks, notified after the built-in ones.

    Raises:
        ValueError: data that do not fit the game, or a device that does not exist.
    """

    def __init__(
        self, game: Game, data: Data, config: Config, callbacks: Sequence[Callback] = ()
    ) -> None:
        game.check(data.spec)
        scores = metrics.parse(config.score) if config.score else []
        metrics.check(scores, data, game.makes, game.given)
        self.config = settle(config, data.spec)
        self.run = expand(config.out)
        self.device = choose_device(config.device)
        self.ranks = Ranks(self.device)
        self.data = data
        self.identity = data.identity()
        self.rng = torch.Generator(self.device).manual_seed(config.seed)
        layout = torch.channels_last if game.channels_last else torch.contiguous_format
        self.batches = Batches(data, config, self.ranks, self.rng, layout)
        self.game = game.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        if not game.training:
            warnings.warn(
                "the game is in evaluation mode and stays so: without dropout, and with the "
                "statistics that its norms have; game.train() puts it into training mode",
                stacklevel=2,
            )
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
        if self.ranks.size > 1:
            self.ranks.broadcast(self.game)
            synchronize(self.game)
            torch.manual_seed((config.seed + self.ranks.rank) % 2**64)  # each drops out on its own
        self.players = game.players()
        steps = sum(player.steps for player in self.players)
        require(steps * LEAST_STEP, f"an iteration of {steps} steps")
        if not self.batches.resident:
            require(config.workers * LEAST_WORKER, f"workers={config.workers}")
        self.parameters = {
            player.name: [p for p in player.network.parameters() if p.requires_grad]
            for player in self.players
        }
        self.all_parameters = list(self.game.parameters())
        self.others = {
            name: [p for p in self.all_parameters if p not in own]
            for name, own in ((name, set(own)) for name, own in self.parameters.items())
        }
        self.optimizers = {
            player.name: make_optimizer(player, self.parameters[player.name])
            for player in self.players
        }
        self.half_weights = HalfWeights(self.game, self.half)
        for optimizer in self.optimizers.values():
            self.half_weights.serve(optimizer)
        self.rates = LearningRates(self.optimizers)
        # One for every player: a step that one of them skips is no reason for another to skip.
        self.scalers = {
            player.name: torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
            for player in self.players
        }
        self.schedulers = {
            player.name: player.schedule(self.optimizers[player.name])
            for player in self.players
            if player.schedule is not None
        }
        self.ema = MovingAverages(game, game.averaged, config.ema)
        self.step = 0
        self.losses = Losses(self.ranks.average)
        self.call = self._choose_call()
        builtin: list[Callback] = [Progress(), Metrics(), Board(), Report()]
        if scores:
            builtin.append(Score(scores))
        self.callbacks = [*builtin, *callbacks] if self.ranks.first else []
        self.has_user_callbacks = len(callbacks) > 0
        self.notifier = Notifier(self)
        self.folder = RunFolder(self.run, self.settings)
        self._stop = StopRequest()

    def optimizer_of(self, player: Player, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return make_optimizer(player, parameters)

    @bound_threads()
    def fit(self) -> None:
        """Train until `config.steps`, or until SIGINT, SIGTERM or SIGHUP asks to stop; save then.

        Raises DivergenceError where a loss, a gradient or a weight is no longer finite; the
        checkpoints are then from before. Raises ValueError where another process trains in the
        folder, or where it holds a run that went further, and OSError where it cannot be written
        to. What a callback raises is raised after a last checkpoint.
        """
        gankernels.tune_allocator()
        self._stop = StopRequest()
        self.notifier.reset()
        try:
            self._take_folder()
            try:
                self.notify("on_start")
                with self._stop:
                    if not self.ranks.any(self.notifier.failure is not None):
                        self._train()
            finally:
                self.batches.close()
                self.notify("on_end")
        finally:
            self.folder.release()
        if self.notifier.failure is not None:
            raise self.notifier.failure

    def _take_folder(self) -> None:
        """All processes raise what the one that writes raises."""
        error = None
        if self.ranks.first:
            try:
                self.folder.take(self.step)
            except (ValueError, OSError) as raised:
                error = raised
        if (error := self.ranks.gather(error)[0]) is not None:
            raise error

    def _train(self) -> None:
        config = self.config
        began, reported = time.perf_counter(), self.step
        last = False
        self.half_weights.refresh()
        if self.step >= config.steps:  # nothing is left to do, but the files may be gone
            self.save()
        while self.step < config.steps and not last:
            self.advance()
            self.notify("on_step")
            if self.has_user_callbacks:
                self.half_weights.refresh()
            last = self._stopping() or self.step == config.steps
            values = None
            if self.step % config.log_every == 0 or last:
                values = self.losses.take()
                self._check_scales()
                speed = (self.step - reported) / (time.perf_counter() - began)
                values = {"it_per_s": float(f"{speed:.4g}"), **values}
            # Saved before anybody is notified: no callback decides what there is to resume from.
            path = self._save() if _due(self.step, config.checkpoint_every) or last else None
            if values is not None:
                self.notify("on_report", values)
                began, reported = time.perf_counter(), self.step
            if _due(self.step, config.sample_every):
                self._show_samples(self.run / "samples" / f"step_{self.step:08d}")
            if path is not None:
                self.notify("on_checkpoint", path)
            if self.notifier.failure is not None and not last and self.ranks.size == 1:
                last = True
                if path is None:
                    self._save()
        self._show_samples(self.run / "samples")

    def stop(self) -> None:
        """End `fit` after this iteration, as if a signal had asked for it."""
        self._stop.requested = True

    def notify(self, event: str, *details: Any) -> None:
        """Call the method of that name of every callback."""
        self.notifier.notify(event, *details)

    def iterate(self) -> None:
        """One iteration: every player that plays makes its steps, then the averages follow."""
        self.half_weights.refresh()  # the weights may have changed since the last one
        self.advance()

    def advance(self) -> None:
        """`iterate` where nobody but this trainer has changed weights since the last iteration."""
        players = [p for p in self.players if p.plays is None or p.plays(self.step)]
        moves = [
            (player, player.loss_of(self.step * player.steps + i))
            for player in players
            for i in range(player.steps)
        ]
        if not moves:
            raise ValueError(f"step {self.step}: a player must play, got none")
        measured = (self.step + 1) % self.config.log_every == 0
        key = (measured, self.rates.settings(), *(loss for _, loss in moves))
        fresh = sum(not player.shared for player, _ in moves[1:]) + 1
        fetched = self.batches.fetch(fresh)
        names, values = self.call(
            key, lambda inputs: self._iterate(moves, measured, inputs), fetched
        )
        for player in players:
            if player.name in self.schedulers:
                self.schedulers[player.name].step()
        self.step += 1
        self.batches.drawn += fresh
        self.losses.add(self.step, names, values)

    def _iterate(
        self, moves: Sequence[tuple[Player, Loss]], measured: bool, fetched: Sequence[Tensor]
    ) -> tuple[list[Name], Tensor]:
        names: list[Name] = []
        values: list[Tensor] = []
        remaining, batch = list(fetched), None
        for player, loss in moves:
            if batch is None or not player.shared:
                batch = self.batches.take(remaining)
            terms = self.move(player, loss, batch, measured)
            names += [(player.name, term) for term in terms]
            values += [value.detach().float() for value in terms.values()]
        self.ema.follow()
        return names, torch.stack(values)

    def move(
        self, player: Player, loss: Loss, batch: Batch, measured: bool = False
    ) -> dict[str, Tensor]:
        """One optimizer step of one player on a batch, all others frozen; the loss terms.

        Where `measured`, the norm of the gradient is one of them.
        """
        with training_only(self.parameters[player.name], self.others[player.name]):
            terms = self._step(player, loss, batch, measured)
        self.half_weights.refresh_after(self.optimizers[player.name])
        if player.after_step is not None:
            with torch.no_grad():
                player.after_step()
            self.half_weights.refresh()
        return terms

    def _step(self, player: Player, loss: Loss, batch: Batch, measured: bool) -> dict[str, Tensor]:
        parameters = self.parameters[player.name]
        with (
            torch.autocast(self.device.type, self.half, enabled=self.half is not None),
            shard(self.ranks.rank, self.ranks.size),
            self.half_weights,
        ):
            terms = loss(batch, self.rng)
        optimizer, scaler = self.optimizers[player.name], self.scalers[player.name]
        # True if only the optimizer reads the gradients.
        alone = not (measured or scaler.is_enabled() or self.ranks.size > 1)
        with self.half_weights.gradients(optimizer) if alone else nullcontext():
            scaler.scale(reduce(torch.add, terms.values())).backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.ranks.average(gradients)
        # Scaled gradients may be infinite and are no harm: the scaler then skips the step.
        if measured and not scaler.is_enabled():
            terms = {**terms, GRADIENT_NORM: nn.utils.get_total_norm(gradients)}
        scaler.step(optimizer)
        scaler.update()
        return terms

    @contextmanager
    def sampling(self) -> Iterator[Game]:
        """The game in evaluation mode with its averaged networks, for the `with` block.

        Then every module is in its own mode again, and PyTorch's default generators are where they
        were: a run computes the same however often somebody looks at samples.
        """
        with kept_random_state(self.device), evaluating(self.game), self.ema.in_place():
            yield self.game

    def save_samples(self, path: Path) -> Path:
        """Save samples of the same noise every time, and return the path with its right ending."""
        path = path.with_suffix(self.game.spec[self.game.makes].suffix)
        if self.ranks.first:
            with self.sampling() as game:
                save_preview(game, self.batches, self.config.seed, path)
            self.notify("on_samples", path)
        return path

    def _show_samples(self, path: Path) -> None:
        self.notifier.attempt("samples", self.save_samples, path)

    def save(self) -> Path:
        """Write a checkpoint; DivergenceError where a loss or a weight is no longer finite."""
        path = self._save()
        self.notify("on_checkpoint", path)
        return path

    def _save(self) -> Path:
        self.losses.check()
        for player in self.players:
            finite = [p.isfinite().all() for p in self.parameters[player.name]]
            if not torch.stack(finite).all():
                raise DivergenceError(
                    f"step {self.step}: a weight of player {player.name!r} is not finite"
                )
        path = checkpoint.path_of(self.run, self.step)
        content = self.state_dict()
        if self.ranks.first:
            self.folder.save(self.step, content, self.config.keep)
            if not (self.run / "config.json").exists():  # somebody has tidied up
                self.notifier.attempt("config.json", self.folder.write_settings)
        return path

    def load(self, path: str | Path) -> None:
        super().load(path)
        self.call = self._choose_call()  # what was captured holds older tensors

    def _choose_call(self) -> Call:
        return choose_call(self.config, self.device, self.ranks, self.optimizers, self.rng)

    def _stopping(self) -> bool:
        if self.ranks.size == 1:
            return self._stop.requested
        return self.step % AGREE_EVERY == 0 and self.ranks.any(self._stop.requested)

    def _check_scales(self) -> None:
        for name, scaler in self.scalers.items():
            if scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
                raise DivergenceError(
                    f"step {self.step}: the gradient of player {name!r} is not finite at any scale"
                )


def make_optimizer(player: Player, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The player's optimizer, fused where PyTorch has it fused, fit for CUDA graphs on CUDA."""
    factory = player.optimizer
    accepted = inspect.signature(getattr(factory, "func", factory)).parameters
    options = {}
    if "fused" in accepted:
        options["fused"] = True
    if "capturable" in accepted and parameters and parameters[0].is_cuda:
        options["capturable"] = True
    optimizer = factory(parameters, **options)
    if options.keys() >= {"fused", "capturable"}:  # a graph then reads the rate where it lies
        for group in optimizer.param_groups:
            rate = torch.as_tensor(group["lr"], dtype=torch.float32)
            group["lr"] = rate.to(parameters[0].device, copy=True)
    return optimizer


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
