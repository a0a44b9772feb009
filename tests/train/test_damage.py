"""Damaged files in a run folder are set aside, and training continues."""

import json
import os
import shutil
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from gankernels._files import append
from gankernels.train import Callback, report, start
from gankernels.train.callbacks import Metrics, Score

TINY = {"width": 4, "size": 8, "batch_size": 4, "device": "cpu", "log_every": 1, "sample_every": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(16) % 2)
    return str(path)


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    start("cdcgan", data=images, steps=2, out=str(out), keep=1, **TINY).fit()
    (out / "scores.json").write_text('{"frechet": 1.0}')
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def resume(images, copy):
    """`resume(steps)` trains on; the trainer and the warnings."""

    def go_on(steps=3, *callbacks):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = start("cdcgan", data=images, steps=steps, out=str(copy), resume=True)
            trainer.callbacks.extend(callbacks)
            trainer.fit()
        assert trainer.step == steps
        assert (copy / f"checkpoints/step_{steps:08d}.pt").is_file()
        assert json.loads((copy / "config.json").read_text())["batch_size"] == 4
        told = [str(w.message) for w in caught if w.category is RuntimeWarning]
        return trainer, told

    return go_on


def steps_of(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


LINES = {
    "NULs": b"\0\0\0\0\n",
    "torn": b'{"step": 2, "it_p\n',
    "no step": b'{"a": 1}\n',
    "blank": b"\n",
    "no UTF-8": b"\xff\n",
    "text": b"Killed\n",
    "step as text": b'{"step": "2"}\n',
    "step is true": b'{"step": true}\n',
    "step is null": b'{"step": null}\n',
    "step is NaN": b'{"step": NaN}\n',
    "step beyond floats": b'{"step": 1' + b"0" * 400 + b"}\n",
    "a number of many digits": b'{"step": 1' + b"0" * 9000 + b"}\n",
    "nested": b"[" * 100_000 + b"\n",
    "a list": b"[1]\n",
    "a number": b"5\n",
}


@pytest.mark.parametrize("kind", LINES)
def test_lines_in_metrics(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    row = b'{"step": %d, "loss": 1.5}\n'
    damaged = row % 1 + LINES[kind] + row % 2 + row % 3 + b'{"step": 2'
    path.write_bytes(damaged)
    trainer = SimpleNamespace(run=tmp_path, step=2)
    metrics = Metrics()
    with pytest.warns(RuntimeWarning) as told:
        metrics.on_start(trainer)
    assert len(told) == 1
    expected = f"{path} has invalid lines, the first of them line 2: it is kept as"
    assert str(told[0].message).startswith(f"{expected} metrics.jsonl.damaged")
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    metrics.on_report(trainer, {"loss": 2.5})
    assert path.read_bytes() == row % 1 + row % 2 + b'{"step": 2, "loss": 2.5}\n'


def folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "mine").touch()


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def file(path):
    if path.is_dir():
        shutil.rmtree(path)
    path.write_text("mine")


def dangling(path):
    path.unlink() if path.is_file() else shutil.rmtree(path)
    path.symlink_to("nowhere/at/all")


def content(what):
    return lambda path: path.write_bytes(what)


def cut(part):
    return lambda path: path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


def flip(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def gone(path):
    path.unlink() if path.is_file() else shutil.rmtree(path)


GRID = "samples/step_00000001.png"
NO_PIXELS = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(20)
#: (what, damage, whether it is set aside)
DAMAGE = {
    "metrics: a foreign line": ("metrics.jsonl", lambda path: append(path, b"Killed\n"), True),
    "metrics: a folder": ("metrics.jsonl", folder, True),
    "metrics: a pipe": ("metrics.jsonl", pipe, True),
    "metrics: a link to nowhere": ("metrics.jsonl", dangling, False),
    "metrics: gone": ("metrics.jsonl", gone, False),
    "metrics: empty": ("metrics.jsonl", content(b""), False),
    "metrics: NULs without an end": ("metrics.jsonl", content(bytes(500)), False),
    "config: torn": ("config.json", cut(0.5), None),
    "config: empty": ("config.json", content(b""), None),
    "config: NULs": ("config.json", content(bytes(300)), None),
    "config: a list": ("config.json", content(b"[]"), None),
    "config: of another format": (
        "config.json",
        content(b'{"format": 7, "game": "cdcgan"}'),
        None,
    ),
    "config: wrong values": (
        "config.json",
        content(b'{"format": 2, "game": "cdcgan", "batch_size": "many"}'),
        None,
    ),
    "config: no UTF-8": ("config.json", content(b'{"\xff": 1}'), None),
    "config: nested": ("config.json", content(b"[" * 100_000), None),
    "config: gone": ("config.json", gone, None),
    "config: a folder": ("config.json", folder, True),
    "config: a pipe": ("config.json", pipe, True),
    "grid: empty": (GRID, content(b""), True),
    "grid: torn": (GRID, cut(0.7), True),
    "grid: a bit": (GRID, flip, True),
    "grid: text": (GRID, content(b"a picture"), True),
    "grid: no pixels": (GRID, content(NO_PIXELS), True),
    "grid: a folder": (GRID, folder, True),
    "grid: a pipe": (GRID, pipe, True),
    "samples.png: a folder": ("samples.png", folder, True),
    "samples.png: empty": ("samples.png", content(b""), True),
    "samples: a file": ("samples", file, True),
    "samples: a link to nowhere": ("samples", dangling, True),
    "samples: gone": ("samples", gone, False),
    "tensorboard: a file": ("tensorboard", file, True),
    "tensorboard: a link to nowhere": ("tensorboard", dangling, True),
    "tensorboard: gone": ("tensorboard", gone, False),
    "report: a folder": ("report.html", folder, True),
    "report: a pipe": ("report.html", pipe, True),
    "scores: torn": ("scores.json", content(b"{"), True),
    "scores: a list": ("scores.json", content(b"[1]"), True),
    "scores: no UTF-8": ("scores.json", content(b"\xff\xff"), True),
    "scores: a folder": ("scores.json", folder, True),
    "an old checkpoint: a folder": ("checkpoints/step_00000001.pt", folder, False),
    "best.pt: a folder": ("checkpoints/best.pt", folder, False),
    "the lock: a folder": (".lock", folder, True),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage(copy, resume, monkeypatch, kind):
    name, damage, aside = DAMAGE[kind]
    drawn = []
    if not name.startswith(("samples", "report", "scores")):  # drawing takes time
        monkeypatch.setattr(report, "available", lambda: False)
    else:
        monkeypatch.setattr(report, "plot", lambda *_, **__: drawn.append(1) or FIGURE)
    path = copy / name
    damage(path)
    _, told = resume(3)
    assert steps_of(copy)[-1] == 3
    assert (copy / "samples.png").stat().st_size > 0
    assert (copy / "samples/step_00000003.png").stat().st_size > 0
    if aside:
        assert os.path.lexists(path.with_name(f"{path.name}.damaged"))
    if aside is not False:
        assert sum(str(path) in text for text in told) == 1 + (kind in BOTH)
    assert len(told) == (aside is not False) + (kind in BOTH)
    if drawn:
        assert (copy / "report.html").is_file()


#: Read by `start`, which says where the settings are from, and set aside by the trainer.
BOTH = ("config: a folder", "config: a pipe")


class FIGURE:
    """A figure that costs nothing."""

    @staticmethod
    def savefig(file, **settings):
        file.write('<svg viewBox="0 0 1 1"></svg>')


def test_all_of_it_is_gone_but_the_checkpoint(copy, resume):
    for path in list(copy.iterdir()):
        if path.name != "checkpoints":
            gone(path)
    _, told = resume()
    assert len(told) == 1
    assert "taking the settings from step_00000002.pt" in told[0]
    assert (copy / "report.html").is_file()


def test_settings_without_a_checkpoint(images, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.warns(RuntimeWarning, match=r"config\.json .*: starting a new run"):
        trainer = start("cdcgan", data=images, steps=1, out=str(tmp_path), resume=True, **TINY)
    assert trainer.step == 0


PARTS = ("metrics.jsonl", "config.json", "samples", "tensorboard", "checkpoints", ".lock", ".")


class Deletes(Callback):
    """After the first step, all at once or, where it stays there, by a file in its place."""

    def __init__(self, name, replaced):
        self.name, self.replaced, self.done = name, replaced, False

    def on_step(self, trainer):
        if not self.done:
            self.done = True
            gone(trainer.run / self.name)
            if self.replaced:
                (trainer.run / self.name).write_text("mine")


@pytest.mark.parametrize("name", PARTS)
def test_parts_deleted_while_it_trains(copy, resume, monkeypatch, name):
    monkeypatch.setattr(report, "available", lambda: False)
    _, told = resume(5, Deletes(name, replaced=False))
    assert told == []
    assert steps_of(copy)[-3:] == [3, 4, 5]
    for part in PARTS[:-2]:
        assert (copy / part).exists(), part
    assert len(list((copy / "tensorboard").iterdir())) >= 1
    assert not (copy / ".lock").exists()


@pytest.mark.parametrize("name", ["samples", "checkpoints", "tensorboard"])
def test_parts_replaced_while_it_trains(copy, resume, monkeypatch, name):
    monkeypatch.setattr(report, "available", lambda: False)
    _, told = resume(5, Deletes(name, replaced=True))
    assert len(told) == 1
    assert told[0].startswith(f"{copy / name} is not a folder: it is kept as {name}.damaged")
    assert (copy / f"{name}.damaged").read_text() == "mine"


@pytest.mark.parametrize(
    "content",
    [b"{", b"{}", b"[]", b'{"frechet": null}', b'{"frechet": NaN}', b'{"frechet": "x"}', b"\xff"],
)
def test_a_damaged_score_of_the_best_checkpoint(tmp_path, content):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.pt").write_text("weights")
    (tmp_path / "checkpoints/best.json").write_bytes(content)
    score = Score(["frechet"])
    with pytest.warns(RuntimeWarning, match=r"best\.json has no score that can be read"):
        score.on_start(SimpleNamespace(run=tmp_path))
    assert score.best is None
    assert (tmp_path / "checkpoints/best.pt.damaged").read_text() == "weights"  # it may be the best


# ---- libraries -----------------------------------------------------------------------------------


BROKEN = {
    "tensorboard": ("torch.utils.tensorboard", "TensorBoard's log"),
    "matplotlib": ("matplotlib", "report.html"),
    "pillow": ("PIL.Image", "samples"),
}


class Broken:
    """A module any use of which fails, as after half an update."""

    def __init__(self, error):
        self.error = error

    def __getattr__(self, name):
        raise self.error


@pytest.mark.parametrize(
    ("library", "error"),
    [
        ("tensorboard", ModuleNotFoundError("No module named 'pkg_resources'")),
        ("tensorboard", TypeError("Descriptors cannot be created directly.")),
        ("matplotlib", ImportError("x")),
        ("matplotlib", OSError("x.so")),
        ("pillow", ImportError("x")),
        ("pillow", AttributeError("x")),
    ],
)
def test_a_broken_library(copy, resume, monkeypatch, library, error):
    module, what = BROKEN[library]
    parent, _, child = module.rpartition(".")
    broken = Broken(error)
    monkeypatch.setitem(sys.modules, module, broken)
    if parent:
        monkeypatch.setattr(sys.modules[parent], child, broken, raising=False)
    if library != "matplotlib":
        monkeypatch.setattr(report, "available", lambda: False)
    (copy / "report.html").unlink()
    _, told = resume(4)
    assert len(told) == 1
    assert told[0].startswith(f"{copy}: there is no {what} from step ")
    assert steps_of(copy) == [1, 2, 3, 4]


PROGRAM = """
import os, sys
from pathlib import Path
from gankernels.train.report import write_report
run, settings = map(Path, sys.argv[1:])
for i, (backend, rc) in enumerate(
    [("nonsense", b""), ("agg", b"text.usetex: True\\n"), ("agg", b"\\xff\\xfe"), ("x", b"y")]
):
    os.environ |= {"PATH": "/nowhere", "MPLCONFIGDIR": str(settings), "MPLBACKEND": backend}
    (settings / "matplotlibrc").write_bytes(rc)
    (run / "report.html").unlink(missing_ok=True)
    if os.fork() == 0:
        write_report(run)
        sys.exit()
    assert os.wait()[1] == 0, i
    assert "<svg" in (run / "report.html").read_text(), i
"""


def test_settings_of_matplotlib_that_cannot_draw(python, finished, tmp_path):
    python("-W", "ignore", "-c", PROGRAM, finished, tmp_path)
