"""Checkpoints: one file holds all that a run needs to continue bit for bit.

A file is a mapping of tensors and plain values, read with `weights_only=True`, so that a foreign
file cannot run code. It is written under a temporary name and renamed, so that a file with the name
of a checkpoint is complete. It is a zip archive, whose checksums detect damage by a disk.
"""

from __future__ import annotations

import contextlib
import math
import re
import reprlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from gankernels import _archive as archive
from gankernels import games
from gankernels._files import copy_atomically, read_json, write_atomically, write_json
from gankernels._memory import exhausted
from gankernels._paths import expand
from gankernels.data import Data, Label, Spec
from gankernels.games import Game
from gankernels.train.blueprint import blueprint
from gankernels.train.config import configure, from_dict, to_dict

MAGIC = "gankernels checkpoint"
VERSION = 4
FOLDER = "checkpoints"
#: The entries of every checkpoint, whatever the game, and their types.
FIELDS = {
    "step": (int,),
    "config": (dict,),
    "spec": (dict,),
    "rows": (list,),
    "identity": (str,),
    "device": (str,),
    "threads": (int,),
    "resident": (bool,),
    "game": (dict, OrderedDict),
    "optimizers": (dict,),
    "schedulers": (dict,),
    "scalers": (dict,),
    "ema": (dict,),
    "draws": (int,),
    "rng": (torch.Tensor,),
    "default_rng": (list,),
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message names the file."""


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return _checkpoints_in(run / FOLDER)


def _checkpoints_in(folder: Path) -> list[Path]:
    # By number: as text, step 100,000,000 comes before step 20,000,000.
    steps = {path: step_of(path) for path in folder.glob("step_*.pt")}
    found = [(step, path) for path, step in steps.items() if step is not None]
    return [path for _, path in sorted(found)]


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None if it is not the name of a checkpoint."""
    found = re.fullmatch(r"step_([0-9]+)\.pt", path.name)
    return int(found[1]) if found else None


def path_of(run: Path, step: int) -> Path:
    """The path of the checkpoint of a step."""
    return run / FOLDER / f"step_{step:08d}.pt"


def latest_checkpoint(path: str | Path) -> Path:
    """`path` where it is a file, else the newest checkpoint of that run folder.

    Raises FileNotFoundError if there is none.
    """
    path = expand(path)
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a run folder or a checkpoint")
    if not path.is_dir():
        raise CheckpointError(f"{path} must be a run folder or the file of a checkpoint")
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(f"{path} holds no checkpoint ({FOLDER}/step_*.pt)")
    return found[-1]


def save(run: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Write `content` as the checkpoint of `step`; then delete all but the newest `keep`."""
    path = path_of(run, step)
    content = {"magic": MAGIC, "version": VERSION, "step": step, **content}
    try:
        write_atomically(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:
        # On a full disk torch.save may raise only "unexpected pos"; its context has the cause.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        text = getattr(reason, "strerror", None) or _first_line(reason)
        raise CheckpointError(
            f"could not write {path}: {text}; earlier checkpoints are intact"
        ) from error
    for old in checkpoints(run)[:-keep]:
        with contextlib.suppress(OSError):  # a checkpoint too many is no reason to stop
            old.unlink()
    return path


def keep_best(run: Path, path: Path, metric: str, score: float) -> None:
    """Copy the checkpoint `path` to best.pt, with its score by a metric."""
    best = run / FOLDER / "best.pt"
    copy_atomically(path, best)
    write_json(
        best.with_suffix(".json"), {"checkpoint": path.name, "metric": metric, "score": score}
    )


def best_score(run: Path) -> tuple[str, float] | None:
    """The metric by which best.pt is the best, and its score, if there is one."""
    best = run / FOLDER / "best.json"
    if not best.exists():
        return None
    content = read_json(best)
    metric, score = str(content["metric"]), float(content["score"])
    if not math.isfinite(score):
        raise ValueError(f"{best} holds a score of {score}")
    return metric, score


def read(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The content of a checkpoint. Raises CheckpointError for a torn, foreign or newer file."""
    try:
        content = archive.load(path, device)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a broken zip or a refused pickle can raise anything
        if exhausted(error):
            raise
        raise CheckpointError(
            f"{path} is damaged or no checkpoint: {_first_line(error)}{_way_out(path)}"
        ) from error
    if type(content) is not dict or not _is(content.get("magic"), MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint of gankernels")
    if not _is(version := content.get("version"), VERSION):
        raise CheckpointError(
            f"{path} has version {reprlib.repr(version)}, this gankernels reads {VERSION}: "
            "use the one that wrote it"
        )
    for name, kinds in FIELDS.items():
        if name not in content or type(content[name]) not in kinds:
            found = reprlib.repr(content[name]) if name in content else "nothing"
            raise CheckpointError(f"{path}: {name} must be a {kinds[0].__name__}, got {found}")
    with checking(path):
        for name in ("step", "draws"):
            archive.conform(content[name], 0, name)
            if content[name] < 0:
                raise ValueError(f"{name} must not be negative, got {content[name]}")
        Spec.from_dict(content["spec"])
    return content


def _is(value: Any, like: Any) -> bool:
    """Whether they are equal; does not raise where comparing would, as with a tensor."""
    return type(value) is type(like) and value == like


@contextmanager
def checking(path: Path) -> Iterator[None]:
    """Inside, a ValueError about a part of a checkpoint becomes a CheckpointError that names it."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


@contextmanager
def rehearsing(path: Path, what: str) -> Iterator[None]:
    """Inside, a part of a checkpoint is tried on a copy; raises CheckpointError if that fails."""
    try:
        yield
    except Exception as error:  # an optimizer can raise anything for a foreign state
        if exhausted(error):
            raise
        raise CheckpointError(f"{path}: {what} cannot be used: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _way_out(path: Path) -> str:
    """Advice for a damaged file of a run: the newest intact checkpoint before it, if any."""
    step = step_of(path) or 0
    earlier = [beside for beside in _checkpoints_in(path.parent) if (step_of(beside) or 0) < step]
    for candidate in reversed(earlier):
        try:
            archive.load(candidate)
        except Exception:  # damaged as well
            continue
        return f"; {candidate.name} is intact: delete the damaged file to continue from it"
    return ""


def load_game(
    run_or_checkpoint: str | Path,
    device: str | torch.device = "cpu",
    game: type[Game] | None = None,
) -> tuple[Game, dict[str, Any]]:
    """A trained game in evaluation mode, with averaged generator weights if there are any.

    Args:
        run_or_checkpoint: a run folder, whose newest checkpoint is loaded, or a file.
        device: where the game is put.
        game: its class, if it is not one of `gankernels.games`.

    Returns:
        The game, and the settings it was trained with (the content of config.json).

    Raises:
        FileNotFoundError: no such file or no checkpoint in the folder.
        CheckpointError: the file is damaged, foreign or of another version.
        ValueError: the file is of a game that is not one of `gankernels.games`.
    """
    path = latest_checkpoint(run_or_checkpoint)
    content = read(path, device)
    settings = from_dict(content["config"], path)
    name = settings.pop("game")
    if game is None and name not in games.names():
        raise ValueError(
            f"{path} is of the game {name!r}, which is not one of gankernels': give its class to "
            "gankernels.train.load_game(path, game=...)"
        )
    game_class = game or games.get(name)
    with checking(path):
        config, options = configure(game_class, settings)
        spec = Spec.from_dict(content["spec"])
        if (plan := blueprint(game_class, spec, options)) is not None:
            compare(plan, content["game"], path)
    trained = game_class(spec, options)
    load_state(trained, content["game"], path)
    for network, state in content["ema"].items():
        load_state(getattr(trained, network), state, path)
    return trained.to(device).eval(), to_dict(name, config, options)


def check_data(content: dict[str, Any], data: Data, identity: str, path: Path) -> None:
    """Raises CheckpointError, with the difference, if the checkpoint is of other data.

    The content and the names of the classes are compared, since labels are indices of names.
    """
    then, now = Spec.from_dict(content["spec"]), data.spec
    if then.classes != now.classes:
        raise CheckpointError(
            f"{path} was trained on other classes: {list_classes(then.classes, now.classes)} "
            f"there, {list_classes(now.classes, then.classes)} in the data ({data.name})"
        )
    rows = [len(table) for table in data.tables]
    if (content["rows"], then) != (rows, now):
        raise CheckpointError(
            f"{path} was trained on {_describe(content['rows'], then)}, "
            f"the data ({data.name}) are {_describe(rows, now)}"
        )
    if content["identity"] != identity:
        raise CheckpointError(
            f"{path} was trained on other data: as many rows of the same fields, but the digest of "
            f"their content is {content['identity'][:12]} there, {identity[:12]} in the data "
            f"({data.name})"
        )


def _describe(rows: Sequence[int], spec: Spec) -> str:
    fields = (f"{n} {field}" for n, field in spec.items() if not isinstance(field, Label))
    return f"{' and '.join(map(str, rows))} rows of {', '.join(fields)}"


def list_classes(classes: Sequence[str], others: Sequence[str] = (), most: int = 12) -> str:
    """Up to `most` of the names, from the first that differs from the others'."""
    if len(classes) <= most:
        return ", ".join(classes)
    pairs = zip(classes, others, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    start = min(same, len(classes) - most)
    shown = ", ".join(classes[start : start + most])
    before, after = "... " if start else "", " ..." if start + most < len(classes) else ""
    return f"{before}{shown}{after} ({len(classes)} in all)"


def load_state(module: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Call `module.load_state_dict` after checking the state; see `compare`."""
    own = compare(module, state, path)
    own.update((name, state[name]) for name in own)
    module.load_state_dict(own)


def compare(module: torch.nn.Module, state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The module's own state. Raises CheckpointError if the other does not fit or is not finite."""
    own = module.state_dict()
    try:
        archive.conform(state, own, "state")
    except ValueError as error:
        raise CheckpointError(f"{path} holds other networks than these: {error}") from error
    for name, _ in module.named_parameters():
        if name in own and not state[name].isfinite().all():
            raise CheckpointError(f"{path} holds weights that are not finite: {name}")
    return own
