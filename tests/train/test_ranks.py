"""Processes that train together, as started by torchrun: two compute the same as one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gankernels.train import ranks

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")

#: With batch norm in every place it can be, and what looks at a batch in other ways.
CASES = {
    "cgan": {"size": 8, "minibatch_discrimination": "6,5", "penalty": "r1"},
    "wgan-gp": {"size": 8, "n_critic": 1},  # more steps of Adam magnify how sums are rounded
    "dcgan": {"size": 32, "width": 4, "penalty": "wgan-gp"},
}

FIRST_GRADIENTS = """
import os, sys, torch
from gankernels.data import load
from gankernels.games import DataSpec, get
from gankernels.train import Trainer
from gankernels.train.config import configure

for name, settings in {cases}.items():
    config, options = configure(
        get(name), dict(settings, out=sys.argv[1], device="cpu", batch_size=12, log_every=1)
    )
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # what they start with is the first one's
    game = get(name)(DataSpec(1, config.data_options.size, 10), options)
    for module in game.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # each process drops out on its own
    trainer = Trainer(game, load("digits", size=config.data_options.size), config)
    found = {{}}
    for player, optimizer in trainer.optimizers.items():
        def keep(*_, player=player):
            found.setdefault(player, [p.grad.clone() for p in trainer.parameters[player]])
        optimizer.register_step_pre_hook(keep)
    trainer.iterate()
    found["losses"] = trainer.losses.take()
    found["buffers"] = dict(trainer.game.named_buffers())
    if trainer.ranks.first:
        torch.save(found, f"{{sys.argv[1]}}/{{name}}.pt")
"""


class Processes:
    """Stands for torch.distributed and CUDA, which are not here: notes what is asked of them."""

    def __init__(self, monkeypatch, started):
        self.calls = []
        note = lambda name: lambda *a, **k: self.calls.append((name, *a, *k.items()))  # noqa: E731
        monkeypatch.setattr(torch.cuda, "set_device", note("set_device"))
        monkeypatch.setattr(ranks.dist, "init_process_group", note("init_process_group"))
        monkeypatch.setattr(ranks.dist, "is_initialized", lambda: started)
        monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(ranks.dist, "get_rank", lambda: 1)


@pytest.mark.parametrize("started", [False, True])
def test_a_process_has_its_gpu_as_the_current_device(monkeypatch, started):
    """Before NCCL starts and before anything gathers objects, which go through that device."""
    processes = Processes(monkeypatch, started)
    monkeypatch.setenv("WORLD_SIZE", "2")
    device = torch.device("cuda:1")
    ranks.Ranks(device)
    expected = [("set_device", device), ("init_process_group", "nccl", ("device_id", device))]
    assert processes.calls == (expected[:1] if started else expected)


def test_a_process_without_a_gpu_leaves_devices_alone(monkeypatch):
    processes = Processes(monkeypatch, False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks.Ranks(torch.device("cpu"))
    assert processes.calls == [("init_process_group", "gloo")]


def test_a_process_alone_leaves_the_current_device_alone(monkeypatch):
    processes = Processes(monkeypatch, False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks.Ranks(torch.device("cuda:1"))
    assert processes.calls == []


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What one process and what two of them find: `both[number][case]`."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "first_gradients.py"
    script.write_text(FIRST_GRADIENTS.format(cases=CASES))
    found = {}
    for number in (1, 2):
        (folder / str(number)).mkdir()
        start = (*TORCHRUN, f"--nproc-per-node={number}") if number > 1 else (sys.executable,)
        subprocess.run(
            [*start, str(script), str(folder / str(number))],
            env=environment(), cwd=ROOT, check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        found[number] = {name: torch.load(folder / f"{number}/{name}.pt") for name in CASES}
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_halves_are_one_whole(both, name):
    one, two = both[1][name], both[2][name]
    assert one.keys() == two.keys()
    # Those of players that move later: Adam's first step magnifies how gradients were rounded.
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3, abs=1e-3)
    for player in one.keys() - {"losses", "buffers"}:
        whole = torch.cat([g.flatten() for g in one[player]])
        halves = torch.cat([g.flatten() for g in two[player]])
        assert whole.norm() > 1e-4
        assert (halves - whole).norm() <= 1e-5 * whole.norm(), player
    for buffer, value in one["buffers"].items():
        torch.testing.assert_close(two["buffers"][buffer], value, rtol=1e-4, atol=1e-5, msg=buffer)


def test_in_half_precision_their_weights_stay_the_same(tmp_path):
    script = tmp_path / "weights.py"
    script.write_text(
        """
import sys, torch
from gankernels.data import load
from gankernels.games import DataSpec, get
from gankernels.train import Config, Trainer

config = Config(out=sys.argv[1], device="cpu", batch_size=8, precision="bf16", log_every=3)
trainer = Trainer(get("gan")(DataSpec(1, 8, 10)), load("digits", size=8), config)
for _ in range(4):
    trainer.iterate()
weights = torch.cat([p.detach().flatten() for p in trainer.game.parameters()])
first, second = trainer.ranks.gather(weights)
assert torch.equal(first, second)
"""
    )
    subprocess.run(
        [*TORCHRUN, "--nproc-per-node=2", str(script), str(tmp_path)],
        env=environment(), cwd=ROOT, check=True, timeout=300,
    )  # fmt: skip


def train(out, processes, *more):
    """The command line on several processes."""
    return [
        *TORCHRUN, f"--nproc-per-node={processes}", "-m", "gankernels", "train", "gan",
        "--batch-size", "8", "--out", str(out), "--set", "size=8", "--set", "log_every=5",
        "--device", "cpu", *more,
    ]  # fmt: skip


def run(*arguments, **more):
    return subprocess.run(
        train(*arguments), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_one_of_them_writes_and_any_number_resumes(tmp_path):
    out = tmp_path / "run"
    first = run(out, 2, "--steps", "10", "--set", "checkpoint_every=5")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("samples.png") == 1
    assert first.stderr.count("step 10/10") == 1
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10]
    more = run(out, 1, "--steps", "15", "--resume")
    assert more.returncode == 0, more.stderr
    again = run(out, 2, "--steps", "20", "--resume")
    assert again.returncode == 0, again.stderr
    assert sorted(p.name for p in (out / "checkpoints").iterdir())[-1] == "step_00000020.pt"


def test_a_batch_must_divide(tmp_path):
    result = run(tmp_path / "run", 2, "--steps", "10", "--set", "batch_size=9")
    assert result.returncode != 0
    assert "batch_size must be a multiple of the 2 processes, got 9" in result.stderr


def test_a_process_that_dies_ends_the_run_which_then_resumes(tmp_path):
    out = tmp_path / "run"
    command = train(out, 2, "--steps", "1000000", "--set", "checkpoint_every=10")
    running = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step_*.pt")):
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = subprocess.run(
        ["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    _, errors = running.communicate(timeout=120)
    assert running.returncode != 0
    assert "SIGKILL" in errors or "exitcode: -9" in errors or "exitcode : -9" in errors
    reached = int(max(p.stem[-8:] for p in out.glob("checkpoints/step_*.pt")))
    result = run(out, 2, "--steps", str(reached + 10), "--resume")
    assert result.returncode == 0, result.stderr
