"""No results are lost: runs are stopped, killed and run out of disk space, and their files are
damaged. All tests use the command line."""

import json
import os
import pickle
import random
import time
from pathlib import Path

import children
import numpy as np
import pytest
import torch

from gankernels import _files as files
from gankernels.cli import main
from gankernels.train import CheckpointError, load_game
from gankernels.train import checkpoint as checkpoint_module

#: A model of 200 kB, which makes a hundred steps a second.
SMALL = "cdcgan", "--set", "width=4"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A file of 64 pictures in three classes."""
    path = tmp_path_factory.mktemp("data") / "set.npz"
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 8, 8), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(64) % 3)
    return path


@pytest.fixture
def command(images, tmp_path):
    """`command(steps, model, ...)`: arguments of `gankernels` that train into `tmp_path/run`."""

    def make(steps, model, *more, out="run"):
        arguments = ["train", model, "--data", images, "--steps", steps, "--out", tmp_path / out]
        arguments += ["--batch-size", 8, "--device", "cpu", "--resume", "--set", "sample_every=0"]
        return [str(argument) for argument in [*arguments, *more]]

    return make


@pytest.fixture
def train(command, capsys):
    """`train(steps, model, ...)` runs the command here; the status and what it printed."""

    def run(*args, **settings):
        status = main(command(*args, **settings))
        return status, capsys.readouterr().err

    return run


def checkpoint(run, step):
    return Path(run) / "checkpoints" / f"step_{step:08d}.pt"


def saved(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def values(content, path=""):
    """Every tensor and plain value of a nested state, by path."""
    if isinstance(content, (list, tuple)):
        content = dict(enumerate(content))
    if isinstance(content, dict):
        return {k: v for key in content for k, v in values(content[key], f"{path}/{key}").items()}
    return {path: content}


def assert_same(a, b):
    """Two checkpoints hold the same: weights, averages, optimizers, random states, all."""
    a, b = (values(torch.load(path, weights_only=True)) for path in (a, b))
    assert a.keys() == b.keys()
    assert sum(isinstance(value, torch.Tensor) for value in a.values()) > 20
    for path, value in a.items():
        same = torch.equal(value, b[path]) if isinstance(value, torch.Tensor) else value == b[path]
        assert same, path


# ---- a run in parts is a run in one --------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("gan",),
        ("cgan",),  # with dropout, which draws from PyTorch's default generator
        ("wgan-gp", "--set", "n_critic=2"),
        ("cdcgan", "--set", "width=4", "--penalty", "r1", "--penalty-every", "4"),
        ("cgan", "--precision", "bf16"),
        ("gan", "--set", "ema=0"),
    ],
    ids=" ".join,
)
def test_sixty_steps_are_thirty_and_thirty(train, tmp_path, arguments):
    assert train(60, *arguments, out="whole")[0] == 0
    following = torch.rand(3)
    assert train(30, *arguments)[0] == 0
    torch.manual_seed(12345)
    assert train(60, *arguments)[0] == 0
    assert torch.rand(3).equal(following)
    assert_same(checkpoint(tmp_path / "whole", 60), checkpoint(tmp_path / "run", 60))


# ---- SIGKILL -------------------------------------------------------------------------------------

KILLS = 20
STEPS = 160  # more than the processes that are killed can make


@pytest.mark.slow
def test_twenty_kills_change_nothing(command, tmp_path):
    model = "cgan", "--set", "checkpoint_every=3", "--set", "log_every=1"
    undisturbed = children.start(command(STEPS, *model, out="whole"), tmp_path / "whole.log")
    arguments, run = command(STEPS, *model), tmp_path / "run"
    chance = random.Random(0)
    steps, torn = [], 0
    for i in range(KILLS):
        began, step = time.time_ns(), last_saved(run)
        process = children.start(arguments, tmp_path / "log")
        if i % 5 == 0:  # while it starts
            time.sleep(chance.uniform(0, 0.2))
        else:  # so many steps later, every other time as soon as it is seen to write
            target = step + chance.randint(1, 6)
            wait_for(process, lambda since, step: reached(run, since) >= step, began, target)
            if i % 2:
                wait_for(process, unfinished, run)
            time.sleep(chance.uniform(0, 0.01))
        process.kill()
        process.join()
        assert process.exitcode == -9, (tmp_path / "log").read_text()
        steps.append(reached(run, 0))
        torn += bool(unfinished(run))
    final = children.start(arguments, tmp_path / "log")
    for process in (final, undisturbed):
        process.join()
        assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert_same(checkpoint(tmp_path / "whole", STEPS), checkpoint(run, STEPS))
    assert unfinished(run) == []
    assert torn >= 3
    shown = ", ".join(map(str, steps))
    print(
        f"\nkilled {KILLS} times, {torn} of them while a checkpoint was written, at steps {shown}; "
        f"at step {STEPS} all is equal to an undisturbed run"
    )


def wait_for(process, condition, *arguments):
    while not condition(*arguments):
        assert process.is_alive()
        time.sleep(0.0005)


def last_saved(run):
    found = sorted((run / "checkpoints").glob("step_*.pt"))
    return int(found[-1].stem.removeprefix("step_")) if found else 0


def unfinished(run):
    """Files among the checkpoints that are none yet."""
    folder = run / "checkpoints"
    return [p.name for p in folder.iterdir() if p.suffix != ".pt"] if folder.exists() else []


def reached(run, since):
    """The last step in the log, if that was written to after the time `since`."""
    path = run / "metrics.jsonl"
    if not path.exists() or path.stat().st_mtime_ns < since:
        return 0
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


# ---- a full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "limit"), [(SMALL, 50_000), (("gan",), 5_000_000)])
def test_file_that_may_not_grow(command, tmp_path, model, limit):
    """The kernel itself refuses to let the second checkpoint grow."""

    def child(steps, **settings):
        process = children.start(command(steps, *model), tmp_path / "log", **settings)
        process.join()
        return process.exitcode, (tmp_path / "log").read_text()

    assert child(10)[0] == 0
    assert checkpoint(tmp_path / "run", 10).stat().st_size > 2 * limit
    status, text = child(20, largest_file=limit)
    check_failed_write(status, text, tmp_path / "run", "File too large")
    assert child(20)[0] == 0
    assert checkpoint(tmp_path / "run", 20).exists()


def test_full_disk(train, tmp_path, monkeypatch):
    """The device that is always full, in the place of the temporary file."""
    assert train(20, *SMALL, out="whole")[0] == 0
    assert train(10, *SMALL)[0] == 0
    write = checkpoint_module.write_atomically

    def full(path, fill):
        with monkeypatch.context() as patch:
            temporary = path.parent / "temporary"
            temporary.touch()
            device = temporary, os.open("/dev/full", os.O_WRONLY)
            patch.setattr(files, "create_temporary", lambda folder: device)
            write(path, fill)

    monkeypatch.setattr(checkpoint_module, "write_atomically", full)
    status, text = train(20, *SMALL)
    check_failed_write(status, text, tmp_path / "run", "No space left on device")
    monkeypatch.undo()
    assert train(20, *SMALL)[0] == 0
    assert_same(checkpoint(tmp_path / "whole", 20), checkpoint(tmp_path / "run", 20))


def check_failed_write(status, text, run, reason):
    assert status == 2
    last = text.splitlines()[-1]
    assert last == (
        f"gankernels: error: could not write {checkpoint(run, 20)}: {reason}; "
        "earlier checkpoints are intact"
    )
    assert "Traceback" not in text
    assert saved(run) == [checkpoint(run, 10).name]


# ---- damaged and foreign files -------------------------------------------------------------------


@pytest.fixture
def two_checkpoints(train, tmp_path):
    """The path of the newer one."""
    assert train(20, *SMALL, "--set", "checkpoint_every=10")[0] == 0
    assert len(saved(tmp_path / "run")) == 2
    return checkpoint(tmp_path / "run", 20)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1000, -1])
def test_truncated_checkpoint(train, two_checkpoints, kept):
    content = two_checkpoints.read_bytes()
    length = int(kept * len(content)) if isinstance(kept, float) else kept
    two_checkpoints.write_bytes(content[:length])
    status, text = train(30, *SMALL)
    assert status == 2
    assert text.count("\n") == 1
    assert text.startswith(f"gankernels: error: {two_checkpoints} is damaged")


def test_flipped_bits_are_noticed_wherever_they_matter(two_checkpoints, tmp_path):
    intact = two_checkpoints.read_bytes()
    copy = tmp_path / "copy.pt"
    copy.write_bytes(intact)
    content = torch.load(copy, weights_only=True)
    weights = next(iter(content["game"].values()))
    chance = random.Random(0)
    ends = [*range(0, 100, 7), *range(-100, 0, 7)]
    places = ends + [chance.randrange(len(intact)) for _ in range(60)]
    places.append(intact.index(weights.numpy().tobytes()))  # that one matters
    for place in places:
        content = bytearray(intact)
        content[place] ^= 1 << chance.randrange(8)
        two_checkpoints.write_bytes(content)
        refusal = refused(two_checkpoints)
        if refusal is None:
            assert place != places[-1]
            assert_same(two_checkpoints, copy)
        else:
            assert refusal.startswith(f"{two_checkpoints} is damaged")
            assert "\n" not in refusal


def refused(path):
    """What is said against a checkpoint, None if it is taken."""
    try:
        load_game(path)
    except CheckpointError as error:
        return str(error)
    return None


def test_the_error_says_which_checkpoint_is_intact(train, tmp_path):
    settings = *SMALL, "--set", "keep=3", "--set", "checkpoint_every=10"
    assert train(30, *settings, out="whole")[0] == 0
    assert train(30, *settings)[0] == 0
    newest, middle, oldest = (checkpoint(tmp_path / "run", step) for step in (30, 20, 10))
    for path in (newest, middle):
        path.write_bytes(path.read_bytes()[:-7])
    status, text = train(30, *settings)
    assert status == 2
    advice = f"; {oldest.name} is intact: delete the damaged file to continue from it\n"
    assert text.endswith(advice)
    assert main(["sample", str(tmp_path / "run"), "--out", str(tmp_path / "grid.png")]) == 2
    # Nothing is skipped on its own account: both damaged files have to be dealt with.
    newest.unlink()
    status, text = train(30, *settings)
    assert status == 2
    assert str(middle) in text
    assert text.endswith(advice)
    middle.unlink()
    assert train(30, *settings)[0] == 0
    assert_same(checkpoint(tmp_path / "whole", 30), newest)


def test_no_advice_where_nothing_is_intact(train, two_checkpoints):
    for path in two_checkpoints.parent.iterdir():
        path.write_bytes(b"")
    status, text = train(30, *SMALL)
    assert status == 2
    assert text.endswith("is damaged or no checkpoint: File is not a zip file\n")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["archive", "pickle"])
def test_pickled_code_is_not_run(train, two_checkpoints, tmp_path, kind):
    victim = tmp_path / "victim"
    if kind == "archive":
        torch.save({"magic": Bomb(victim)}, two_checkpoints)
        torch.load(two_checkpoints, weights_only=False)["magic"].close()
        assert victim.exists()  # the attack works where pickle is trusted
        victim.unlink()
    else:
        two_checkpoints.write_bytes(pickle.dumps({"magic": Bomb(victim)}))
    status, text = train(30, *SMALL)
    assert status == 2
    assert text.startswith(f"gankernels: error: {two_checkpoints} is damaged or no checkpoint")
    assert text.count("\n") == 1
    assert not victim.exists()


def test_checkpoint_of_another_model(train, two_checkpoints, tmp_path):
    assert train(20, "gan", out="other")[0] == 0
    two_checkpoints.write_bytes(checkpoint(tmp_path / "other", 20).read_bytes())
    status, text = train(30, *SMALL)
    assert status == 2
    assert text.startswith(f"gankernels: error: {two_checkpoints} ")
    assert text.count("\n") == 1
    assert len(text) < 500


def test_checkpoint_of_a_newer_version(train, two_checkpoints):
    content = torch.load(two_checkpoints, weights_only=True)
    torch.save({**content, "version": content["version"] + 1}, two_checkpoints)
    status, text = train(30, *SMALL)
    assert status == 2
    newer = f"{two_checkpoints} has version {content['version'] + 1}, this gankernels reads"
    assert text.startswith(f"gankernels: error: {newer} {content['version']}")
    assert text.count("\n") == 1
