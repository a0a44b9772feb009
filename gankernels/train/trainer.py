"""The loop."""

from __future__ import annotations

import copy
import inspect
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gankernels
from gankernels._console import describe, warn
from gankernels._devices import choose_device
from gankernels._files import delete_leftovers, make_way, temporary_file, write_json
from gankernels._memory import require
from gankernels._modes import evaluating
from gankernels._paths import expand
from gankernels._shard import shard
from gankernels._threads import bound_threads, threads
from gankernels.data import BatchLoader, Data, Image, Table
from gankernels.data.pictures import arrange
from gankernels.games import Batch, Game, Loss, Player
from gankernels.train import archive, checkpoint
from gankernels.train.callbacks import Board, Callback, Metrics, Progress, Report, Score
from gankernels.train.config import Config, to_dict
from gankernels.train.graph import Graphs, run_eagerly
from gankernels.train.half import HalfWeights
from gankernels.train.lock import RunLock
from gankernels.train.losses import GRADIENT_NORM, DivergenceError, Losses, Name
from gankernels.train.ranks import Ranks, synchronise
from gankernels.train.signals import StopRequest

#: Images in the grids that a run saves.
GRID = 80
#: Several processes agree on stopping every so many iterations.
AGREE_EVERY = 10
#: Below this the gradients have been infinite or NaN some thirty times in a row.
LEAST_SCALE = 1e-4
#: Bytes that a step leaves behind until its iteration ends, and that a process takes, at least.
LEAST_STEP, LEAST_WORKER = 1024, 16 * 1024**2


class Trainer:
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
        self,
        game: Game,
        data: Data,
        config: Config,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        _check_fit(game, data)
        if config.score:
            Score.check(data)
        self.config = replace(config, **_size_of(data))
        self.run = expand(config.out)
        self.device = choose_device(config.device)
        self.ranks = Ranks(self.device)
        self.share = self.ranks.share(config.batch_size)
        self.data = data
        self.identity = data.identity()
        self.draws = 0  # batches drawn so far
        self._place(_fits(data, self.device))
        self._loader = None
        self.layout = torch.channels_last if game.channels_last else torch.contiguous_format
        self.game = game.to(self.device, memory_format=self.layout)
        if not game.training:
            warnings.warn(
                "the game is in evaluation mode and stays so: without dropout, and with the "
                "statistics that its norms have; game.train() puts it into training mode",
                stacklevel=2,
            )
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
        if self.ranks.size > 1:
            self.ranks.broadcast(self.game)
            synchronise(self.game)
            torch.manual_seed((config.seed + self.ranks.rank) % 2**64)  # each drops out on its own
        self.rng = torch.Generator(self.device).manual_seed(config.seed)
        self.players = game.players()
        steps = sum(player.steps for player in self.players)
        require(steps * LEAST_STEP, f"an iteration of {steps} steps")
        if not self.resident:
            require(config.workers * LEAST_WORKER, f"workers={config.workers}")
        self.parameters = {
            player.name: [p for p in player.network.parameters() if p.requires_grad]
            for player in self.players
        }
        self.everyones = list(self.game.parameters())
        self.others = {
            name: [p for p in self.everyones if p not in own]
            for name, own in ((name, set(own)) for name, own in self.parameters.items())
        }
        self.optimizers = {
            player.name: make_optimizer(player, self.parameters[player.name])
            for player in self.players
        }
        self.half_weights = HalfWeights(self.game, self.half)
        for optimizer in self.optimizers.values():
            self.half_weights.serve(optimizer)
        # Where a graph reads the learning rates: on the CPU nowhere.
        self.rates = {
            (name, i): group["lr"]
            for name, optimizer in self.optimizers.items()
            for i, group in enumerate(optimizer.param_groups)
            if isinstance(group["lr"], Tensor)
        }
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
        #: Moving averages of the networks that make samples, by name.
        self.ema: dict[str, nn.Module] = {}
        if config.ema:
            networks = {name: getattr(game, name) for name in game.averaged}
            self.ema = {
                name: copy.deepcopy(network).requires_grad_(False).eval()
                for name, network in networks.items()
            }
            self._averaged = (
                [t for network in self.ema.values() for t in _floating(network)],
                [t for network in networks.values() for t in _floating(network)],
            )
        self.step = 0
        self.losses = Losses(self.ranks.average)
        self.call = self._graphs() or run_eagerly
        own = [Progress(), Metrics(), Board(), Report()]
        if config.score:
            own.append(Score())
        self.callbacks = [*own, *callbacks] if self.ranks.first else []
        self.foreign = len(callbacks) > 0
        self.lock = RunLock(self.run)
        self._off: set[str | int] = set()
        self._failure: BaseException | None = None
        self._stop = StopRequest()

    def _place(self, resident: bool) -> None:
        """Keep the columns on the device or not; batches are then drawn in another way."""
        self.resident = resident
        self.columns = [_on(self.device, table) for table in self.data.tables] if resident else []

    @bound_threads()
    def fit(self) -> None:
        """Train until `config.steps`, or until SIGINT, SIGTERM or SIGHUP asks to stop; save then.

        Raises DivergenceError where a loss, a gradient or a weight is no longer finite; the
        checkpoints are then from before. Raises ValueError where another process trains in the
        folder, or where it holds a run that went further, and OSError where it cannot be written
        to. What a callback raises is raised after a last checkpoint.
        """
        gankernels.tune_allocator()
        self._stop, self._off, self._failure = StopRequest(), set(), None
        try:
            self._take_folder()
            try:
                self.tell("on_start")
                with self._stop:
                    if not self.ranks.any(self._failure is not None):
                        self._train()
            finally:
                self._close_loader()
                self.tell("on_end")
        finally:
            self.lock.release()
        if self._failure is not None:
            raise self._failure

    def _take_folder(self) -> None:
        """Take the folder, and find out whether it can be written to before there is work to lose.

        All processes raise what the one that writes raises.
        """
        error = None
        if self.ranks.first:
            try:
                self.lock.acquire()
                self._check_folder()
            except (ValueError, OSError) as raised:
                error = raised
        if (error := self.ranks.gather(error)[0]) is not None:
            raise error

    def _check_folder(self) -> None:
        saved = checkpoint.checkpoints(self.run)
        if saved and checkpoint.step_of(saved[-1]) > self.step:
            raise ValueError(
                f"{self.run} already holds a run beyond step {self.step}: "
                "load its latest checkpoint or choose another folder"
            )
        path = checkpoint.path_of(self.run, self.step)
        make_way(path)
        path.parent.mkdir(exist_ok=True)
        delete_leftovers(self.run, path.parent, self.run / "samples")
        with temporary_file(path.parent):
            pass
        self._write_settings()

    def _write_settings(self) -> None:
        path = self.run / "config.json"
        make_way(path)
        write_json(path, to_dict(self.game.name, self.config, self.game.options))

    def _train(self) -> None:
        config = self.config
        began, reported = time.perf_counter(), self.step
        last = False
        self.half_weights.refresh()
        if self.step >= config.steps:  # nothing is left to do, but the files may be gone
            self.save()
        while self.step < config.steps and not last:
            self._advance()
            self.tell("on_step")
            if self.foreign:
                self.half_weights.refresh()
            last = self._stopping() or self.step == config.steps
            values = None
            if self.step % config.log_every == 0 or last:
                values = self.losses.take()
                self._check_scales()
                speed = (self.step - reported) / (time.perf_counter() - began)
                values = {"it_per_s": float(f"{speed:.4g}"), **values}
            # First save, then tell: nobody's ability to read decides what there is to go on from.
            path = self._save() if _due(self.step, config.checkpoint_every) or last else None
            if values is not None:
                self.tell("on_report", values)
                began, reported = time.perf_counter(), self.step
            if _due(self.step, config.sample_every):
                self._show_samples(self.run / "samples" / f"step_{self.step:08d}")
            if path is not None:
                self.tell("on_checkpoint", path)
            if self._failure is not None and not last and self.ranks.size == 1:
                last = True
                if path is None:
                    self._save()
        self._show_samples(self.run / "samples")

    def stop(self) -> None:
        """End `fit` after this iteration, as if a signal had asked for it."""
        self._stop.requested = True

    def tell(self, event: str, *details: Any) -> None:
        """Call the method of that name of every callback.

        One of the trainer's own that fails is not called again. Where another one fails, the run
        ends after a checkpoint, and all that this one still hears of is the end.
        """
        for callback in list(self.callbacks):
            method = getattr(callback, event)
            if callback.shows is not None:
                self._attempt(callback.shows, method, self, *details)
            elif id(callback) not in self._off or event == "on_end":
                try:
                    method(self, *details)
                except (Exception, SystemExit) as error:
                    self._off.add(id(callback))
                    self._failure = self._failure or error
                    self.stop()

    def _attempt(self, what: str, action: Callable[..., None], *arguments: Any) -> None:
        """Do what only shows the run: where it fails it is not done again, and training goes on."""
        if what in self._off:
            return
        try:
            action(*arguments)
        except Exception as error:
            self._off.add(what)
            warn(f"{self.run}: there is no {what} from step {self.step} on: {describe(error)}")

    def iterate(self) -> None:
        """One iteration: every player that plays makes its steps, then the averages follow."""
        self.half_weights.refresh()  # the weights may have changed since the last one
        self._advance()

    def _advance(self) -> None:
        players = [p for p in self.players if p.plays is None or p.plays(self.step)]
        moves = [
            (player, player.loss_of(self.step * player.steps + i))
            for player in players
            for i in range(player.steps)
        ]
        if not moves:
            raise ValueError(f"step {self.step}: a player must play, got none")
        measured = (self.step + 1) % self.config.log_every == 0
        key = (measured, self._settings(), *(loss for _, loss in moves))
        fresh = sum(not player.shared for player, _ in moves[1:]) + 1
        streamed = [] if self.resident else [t for _ in range(fresh) for t in self._next_batch()]
        names, values = self.call(
            key, lambda inputs: self._iterate(moves, measured, inputs), streamed
        )
        for player in players:
            if player.name in self.schedulers:
                self.schedulers[player.name].step()
        self.step += 1
        self.draws += fresh
        self.losses.add(self.step, names, values)

    def _settings(self) -> Hashable:
        """What the optimisers are set to, which a graph has taken for constant.

        The learning rates that it reads from a tensor are written there instead: callbacks, LR
        schedulers and checkpoints put new ones in their place.
        """
        settings = []
        for name, optimizer in self.optimizers.items():
            for i, group in enumerate(optimizer.param_groups):
                rate = self.rates.get((name, i))
                if rate is not None and group["lr"] is not rate:
                    rate.fill_(group["lr"])
                    group["lr"] = rate
                options = (value for option, value in group.items() if option != "params")
                settings += [v if isinstance(v, Hashable) else repr(v) for v in options]
        return tuple(settings)

    def _iterate(
        self, moves: Sequence[tuple[Player, Loss]], measured: bool, streamed: Sequence[Tensor]
    ) -> tuple[list[Name], Tensor]:
        names, values = [], []
        streamed, batch = list(streamed), None
        for player, loss in moves:
            if batch is None or not player.shared:
                batch = self.draw() if self.resident else self._take(streamed)
            terms = self.move(player, loss, batch, measured)
            names += [(player.name, term) for term in terms]
            values += [value.detach().float() for value in terms.values()]
        if self.ema:
            self.update_ema()
        return names, torch.stack(values)

    def move(
        self, player: Player, loss: Loss, batch: Batch, measured: bool = False
    ) -> dict[str, Tensor]:
        """One optimiser step of one player on a batch, all others frozen; the loss terms.

        Where `measured`, the norm of the gradient is one of them.
        """
        with self._alone(player):
            terms = self._step(player, loss, batch, measured)
        self.half_weights.refresh_after(self.optimizers[player.name])
        if player.after_step is not None:
            with torch.no_grad():
                player.after_step()
            self.half_weights.refresh()
        return terms

    @contextmanager
    def _alone(self, player: Player) -> Iterator[None]:
        """Everybody else's parameters frozen, and no gradients on its own, before or after.

        Whether a parameter can be trained is the caller's to say, also while the run goes on: what
        is frozen stays so, and what is not is so again afterwards.
        """
        own = self.parameters[player.name]
        frozen = [p for p in self.others[player.name] if p.requires_grad]
        for parameter in own:
            parameter.grad = None
        for parameter in frozen:
            parameter.requires_grad = False
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad = True
            for parameter in own:
                parameter.grad = None

    def _step(self, player: Player, loss: Loss, batch: Batch, measured: bool) -> dict[str, Tensor]:
        parameters = self.parameters[player.name]
        with (
            torch.autocast(self.device.type, self.half, enabled=self.half is not None),
            shard(self.ranks.rank, self.ranks.size),
            self.half_weights,
        ):
            terms = loss(batch, self.rng)
        optimizer, scaler = self.optimizers[player.name], self.scalers[player.name]
        # Else somebody besides the optimizer reads the gradients.
        alone = not (measured or scaler.is_enabled() or self.ranks.size > 1)
        with self.half_weights.gradients(optimizer) if alone else nullcontext():
            scaler.scale(sum(terms.values())).backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.ranks.average(gradients)
        # Scaled gradients may be infinite and are no harm: the scaler then skips the step.
        if measured and not scaler.is_enabled():
            terms = {**terms, GRADIENT_NORM: nn.utils.get_total_norm(gradients)}
        scaler.step(optimizer)
        scaler.update()
        return terms

    def draw(self) -> Batch:
        """A batch of the data, drawn with replacement."""
        raw = {}
        for columns in self.columns:
            length = len(next(iter(columns.values())))
            n = self.config.batch_size
            rows = torch.randint(length, (n,), generator=self.rng, device=self.device)
            rows = self.ranks.own(rows)
            raw |= {name: partial(column.index_select, 0, rows) for name, column in columns.items()}
        return self._batch(raw)

    def _take(self, streamed: list[Tensor]) -> Batch:
        """The next batch of those that were streamed."""
        return self._batch({name: streamed.pop(0) for name in self.data.spec})

    def _batch(self, raw: Mapping[str, Tensor | Callable[[], Tensor]]) -> Batch:
        return Batch({name: partial(self._decode, name, raw[name]) for name in raw}, self.share)

    def _decode(self, name: str, raw: Tensor | Callable[[], Tensor]) -> Tensor:
        values = self.data.spec[name].decode(raw if isinstance(raw, Tensor) else raw())
        return values.contiguous(memory_format=self.layout) if values.dim() == 4 else values

    def _next_batch(self) -> Sequence[Tensor]:
        if self._loader is None:
            self._loader = BatchLoader(
                self.data,
                self.config.batch_size,
                seed=self.config.seed,
                first=self.draws,
                part=(self.ranks.rank, self.ranks.size),
                workers=self.config.workers,
                device=self.device,
            )
        columns = next(self._loader)
        return [columns[name] for name in self.data.spec]

    def _close_loader(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the averages of weights and floating-point buffers towards the networks."""
        averages, current = self._averaged
        torch._foreach_lerp_(averages, current, 1 - self.config.ema)

    @contextmanager
    def sampling(self) -> Iterator[Game]:
        """The game in evaluation mode with its averaged networks, for the `with` block.

        Then every module is in its own mode again, and PyTorch's default generators are where they
        were: a run computes the same however often somebody looks at samples.
        """
        networks = {name: getattr(self.game, name) for name in self.ema}
        states = [(rng, rng.get_state()) for rng in self._default_rngs()]
        with evaluating(self.game):
            for name, average in self.ema.items():
                setattr(self.game, name, average)
            try:
                yield self.game
            finally:
                for name, network in networks.items():
                    setattr(self.game, name, network)
                for rng, state in states:
                    rng.set_state(state)

    def save_samples(self, path: Path) -> Path:
        """Save samples of the same noise every time, and return the path with its right ending.

        In a class-conditional game columns are classes; other columns that samples are made from
        are the first of the data.
        """
        field = self.game.spec[self.game.makes]
        path = path.with_suffix(field.suffix)
        if not self.ranks.first:
            return path
        given, columns = self._given_samples()
        fixed = torch.Generator().manual_seed(self.config.seed)
        with self.sampling() as game:
            make_way(path)
            for rng in self._default_rngs():  # of a generator that draws more noise by itself
                rng.manual_seed(self.config.seed)
            field.save(field.encode(game.sample(GRID, rng=fixed, **given)), path, columns)
        self.tell("on_samples", path)
        return path

    def _given_samples(self) -> tuple[dict[str, Tensor], int]:
        """What the samples are made from, and how many stand side by side."""
        classes = list(range(self.game.num_classes)) if self.game.conditional else None
        labels, columns = arrange(GRID, classes)
        given = {} if labels is None else {"labels": labels}
        for table in self.data.tables:
            if wanted := table.spec.keys() & set(self.game.given) - given.keys():
                raw = table.read(torch.arange(GRID) % len(table))
                given |= {name: self._decode(name, raw[name]) for name in wanted}
        return given, columns

    def _show_samples(self, path: Path) -> None:
        self._attempt("samples", self.save_samples, path)

    def save(self) -> Path:
        """Write a checkpoint; DivergenceError where a loss or a weight is no longer finite."""
        path = self._save()
        self.tell("on_checkpoint", path)
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
            self.lock.check()
            make_way(path)
            checkpoint.save(self.run, self.step, content, self.config.keep)
            if not (self.run / "config.json").exists():  # somebody has tidied up
                self._attempt("config.json", self._write_settings)
        return path

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on bit for bit: what a checkpoint holds."""
        return {
            "config": to_dict(self.game.name, self.config, self.game.options),
            "spec": self.game.spec.to_dict(),
            "rows": [len(table) for table in self.data.tables],
            "identity": self.identity,
            "device": self.device.type,
            "threads": threads(),
            "resident": self.resident,
            "game": self.game.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "schedulers": {name: s.state_dict() for name, s in self.schedulers.items()},
            "scalers": {name: s.state_dict() for name, s in self.scalers.items()},
            "ema": {name: average.state_dict() for name, average in self.ema.items()},
            "draws": self.draws,
            "rng": self.rng.get_state(),
            "default_rng": self.ranks.gather(self._default_rng().get_state()),
        }

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of this game, bit for bit.

        With another number of processes dropout goes on with other random numbers; with another
        number of threads results differ by rounding, of which a warning tells.

        Raises:
            CheckpointError: the file cannot be used, or it is of other data: of another number,
                size or other classes, or of other content. Where they lie does not matter.
        """
        path = expand(path)
        content = checkpoint.read(path, self.device)
        checkpoint.check_data(content, self.data, self.identity, path)
        if content["device"] != self.device.type:
            raise checkpoint.CheckpointError(
                f"{path} was written on {content['device']}, whose random numbers cannot go on "
                f"on {self.device.type}: resume there with --device {content['device']}"
            )
        if content["optimizers"].keys() != self.optimizers.keys():
            raise checkpoint.CheckpointError(f"{path} is of another game than {self.game.name}")
        self._check(content, path)
        checkpoint.load_state(self.game, content["game"], path)
        for name, average in self.ema.items():
            checkpoint.load_state(average, content["ema"][name], path)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])
            self.scalers[name].load_state_dict(content["scalers"][name])
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(content["schedulers"][name])
        self.rng.set_state(content["rng"].cpu())
        states = content["default_rng"]
        if len(states) == self.ranks.size:
            self._default_rng().set_state(states[self.ranks.rank].cpu())
        else:
            torch.manual_seed(hash((self.config.seed, content["step"], self.ranks.rank)))
        self.step, self.draws = content["step"], content["draws"]
        if content["resident"] != self.resident:
            self._place(content["resident"])
        if content["threads"] != threads() and self.device.type == "cpu":
            warnings.warn(
                f"{path} was written with {content['threads']} threads, now there are {threads()}: "
                "results will differ from those of a run in one piece by rounding",
                stacklevel=2,
            )
        self._close_loader()
        self.call = self._graphs() or run_eagerly  # what was captured holds older tensors

    def _check(self, content: dict[str, Any], path: Path) -> None:
        """Raises CheckpointError unless all states can be used, and changes nothing."""
        checkpoint.compare(self.game, content["game"], path)
        if content["ema"].keys() != self.ema.keys():
            raise checkpoint.CheckpointError(
                f"{path}: ema must be of {list(self.ema)}, got {list(content['ema'])}"
            )
        for name, average in self.ema.items():
            checkpoint.compare(average, content["ema"][name], path)
        rngs, rng = (content["rng"], *content["default_rng"]), self.rng.get_state()
        scalers = {name: scaler.state_dict() for name, scaler in self.scalers.items()}
        with checkpoint.checking(path):
            archive.conform(rngs, [rng] * len(rngs), "rng")
            archive.conform(content["scalers"], scalers, "scalers")
        for state in rngs:
            with checkpoint.rehearsing(path, "rng"):
                torch.Generator(self.device).set_state(state.cpu())
        for player in self.players:
            name = player.name
            parameters = [torch.zeros_like(p) for p in self.parameters[name]]
            for parameter in parameters:
                parameter.requires_grad_().grad = torch.zeros_like(parameter)
            optimizer, state = make_optimizer(player, parameters), content["optimizers"][name]
            optimizer.step()
            with checkpoint.checking(path):
                archive.conform_optimizer(
                    state, optimizer.state_dict(), f"optimizers.{name}", content["step"] > 0
                )
            scaler = torch.amp.GradScaler(self.device.type, enabled=self.scalers[name].is_enabled())
            with checkpoint.rehearsing(path, f"the state of player {name!r}"):
                scaler.load_state_dict(content["scalers"][name])
                scaler.scale(torch.zeros((), device=self.device))
                optimizer.load_state_dict(copy.deepcopy(state))  # which it would write to
                optimizer.step()
                if player.schedule is not None:
                    scheduler = player.schedule(optimizer)
                    scheduler.load_state_dict(copy.deepcopy(content["schedulers"][name]))
                    scheduler.step()

    def _graphs(self) -> Graphs | None:
        if not self.config.graph or self.device.type != "cuda" or self.ranks.size > 1:
            return None
        # Where an optimiser cannot skip a step on the device, its scaler asks the host.
        if self.config.precision == "fp16" and not all(
            getattr(o, "_step_supports_amp_scaling", False) for o in self.optimizers.values()
        ):
            return None
        return Graphs([self.rng])

    def _default_rngs(self) -> list[torch.Generator]:
        own = self._default_rng()
        return [own] if self.device.type == "cpu" else [torch.default_generator, own]

    def _default_rng(self) -> torch.Generator:
        if self.device.type != "cuda":
            return torch.default_generator
        torch.cuda.init()
        return torch.cuda.default_generators[self.device.index]

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
    """The player's optimiser, fused where PyTorch has it fused, fit for CUDA graphs on CUDA."""
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


def _check_fit(game: Game, data: Data) -> None:
    for name in game.reads:
        if name not in data.spec:
            raise ValueError(
                f"the data must have a column {name!r} for {game.name}, got {', '.join(data.spec)}"
            )
        if data.spec[name] != game.spec.get(name):
            raise ValueError(
                f"{name} of the data must be {game.spec.get(name)}, for which the game is built, "
                f"got {data.spec[name]}; build the game with data.spec"
            )


def _size_of(data: Data) -> dict[str, int]:
    """The sizes of images that config.json tells, so that it reruns the run."""
    field = data.spec.get("images")
    square = isinstance(field, Image) and field.height == field.width
    return {"size": field.height, "channels": field.channels} if square else {}


def _fits(data: Data, device: torch.device) -> bool:
    """Whether the columns can stay on the device and leave half of what is free to training."""
    columns = [table.columns for table in data.tables]
    if None in columns:
        return False
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return sum(t.nbytes for part in columns for t in part.values()) <= free // 2


def _on(device: torch.device, table: Table) -> dict[str, Tensor]:
    return {name: column.to(device) for name, column in table.columns.items()}


def _floating(module: nn.Module) -> list[Tensor]:
    """Weights and statistics, without the counters of batches."""
    return [t for t in module.state_dict().values() if t.is_floating_point()]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
