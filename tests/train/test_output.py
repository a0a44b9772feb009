"""A run continues and saves everything, even if its output cannot be written."""

import errno
import os
import signal
import sys
import time

import children
import numpy as np
import pytest

from gankernels import _console
from gankernels.cli import main
from gankernels.train import Callback, start

STEPS = 20
FULL = "gankernels: error: stdout cannot be written to: No space left on device"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(16) % 2)
    return path


@pytest.fixture
def arguments(images, tmp_path):
    def make(*more, steps=STEPS, out="run"):
        tiny = ["--set", "width=4", "--set", "log_every=1", "--set", "sample_every=0"]
        paths = ["--data", images, "--out", tmp_path / out]
        settings = ["--steps", steps, "--batch-size", 4, "--device", "cpu", *tiny, *more]
        return ["train", "cdcgan", *map(str, [*paths, *settings])]

    return make


# ---- streams; each function is called in a process of its own, before `main` ---------------------


def replace(number, descriptor):
    """As a shell does; Python's own streams are made anew."""
    name = {1: "stdout", 2: "stderr"}[number]
    if descriptor is None:
        os.close(number)
        setattr(sys, name, None)
    else:
        os.dup2(descriptor, number)
        os.close(descriptor)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))


def closed(numbers):
    for number in numbers:
        replace(number, None)


def full_disk(numbers):
    for number in numbers:
        replace(number, os.open("/dev/full", os.O_WRONLY))


def broken_pipe(numbers):
    for number in numbers:
        reader, writer = os.pipe()
        replace(number, writer)
        os.close(reader)


def stuck(numbers, blocking=True):
    """A reader that has stopped to read."""
    _console.PATIENCE = 0.1
    for number in numbers:
        _, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, bytes(4096))
        except BlockingIOError:
            pass
        os.set_blocking(writer, blocking)
        replace(number, writer)


def nonblocking(numbers):
    stuck(numbers, blocking=False)
    _console._takes = lambda file: True  # as where the reader stops in the middle of a line


def ascii_only(numbers):
    for number in numbers:
        replace(number, os.open(os.devnull, os.O_WRONLY))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")


STREAMS = (closed, full_disk, broken_pipe, stuck, nonblocking, ascii_only)


@pytest.mark.parametrize("numbers", [(1,), (2,), (1, 2)], ids=["stdout", "stderr", "both"])
@pytest.mark.parametrize("stream", STREAMS, ids=lambda function: function.__name__)
def test_a_run_whose_output_fails(arguments, tmp_path, stream, numbers):
    process = children.start(
        arguments(out="rün"), tmp_path / "log", prepare=stream, prepare_with=numbers
    )
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert (tmp_path / f"rün/checkpoints/step_{STEPS:08d}.pt").exists()
    assert (tmp_path / "rün/samples.png").exists()
    assert len((tmp_path / "rün/metrics.jsonl").read_text().splitlines()) == STEPS
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_pipeline(arguments, tmp_path, number):
    """`train 2>&1 | tee log` and Ctrl-C: tee is gone before anything can be said."""
    process = children.start(
        arguments(steps=10**6), tmp_path / "log", prepare=broken_pipe, prepare_with=(1, 2)
    )
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert f'{{"step": {int(saved.stem[5:])},' in metrics.read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "stream", "status"),
    [
        (["info"], broken_pipe, 0),
        (["train", "--help"], broken_pipe, 0),
        (["info"], closed, 0),
        (["info"], ascii_only, 0),
        (["evaluate", "--help"], ascii_only, 0),
        (["info"], full_disk, 2),
        (["fly"], broken_pipe, 2),
        (["fly"], closed, 2),
    ],
)
def test_other_commands(tmp_path, command, stream, status):
    process = children.start(command, tmp_path / "log", prepare=stream, prepare_with=(1,))
    process.join(60)
    text = (tmp_path / "log").read_text()
    assert process.exitcode == status, text
    assert text.count("\n") == (status == 2)
    if stream is full_disk:
        assert text == f"{FULL}\n"


PROGRAM = """
import os, sys, gankernels.cli
def child(prepare):
    if (pid := os.fork()) == 0:
        prepare()
        sys.exit(gankernels.cli.main(["info"]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def broken():
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)
def full():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
assert child(broken) == 0
assert child(full) == 2
os.close(0), os.close(1), os.close(2)
gankernels.cli.main(["info"])
assert open(sys.argv[1]).fileno() == 3
"""


def test_the_interpreters_end_says_nothing_either(python, tmp_path):
    """It writes once more what could not be written, and fails with status 120."""
    result = python("-c", PROGRAM, __file__)
    assert (
        result.stderr == "gankernels: error: stdout cannot be written to: No space left on device\n"
    )


def test_a_reader_who_stops_does_not_hold_up_a_run(monkeypatch):
    monkeypatch.setattr(_console, "PATIENCE", 0.2)
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        began = time.monotonic()
        while (error := _console.say("x" * 1000)) is None:
            pass
        for _ in range(100):
            assert _console.say("x" * 1000).errno == errno.EAGAIN
        assert time.monotonic() - began < 5
        os.read(reader, 10**6)
        assert _console.say("again") is None
        os.close(reader)
        assert error.errno == errno.EAGAIN
        assert _console.say("gone").errno == errno.EPIPE
        _console.settle()
        assert _console.say("nowhere") is None


def test_warnings_that_are_errors_are_told_all_the_same(capsys):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _console.warn("something is missing")
    assert capsys.readouterr().err == "warning: something is missing\n"


# ---- signals -------------------------------------------------------------------------------------


@pytest.fixture
def trainer(images, tmp_path):
    def make(*callbacks, **settings):
        tiny = {"width": 4, "batch_size": 4, "device": "cpu", "sample_every": 0, "steps": 1000}
        out = str(tmp_path / "run")
        made = start("cdcgan", data=str(images), out=out, **{**tiny, **settings})
        made.callbacks.extend(callbacks)
        return made

    return make


class Signals(Callback):
    """At step 3."""

    def __init__(self, *numbers, pause=0.0):
        self.numbers, self.pause = numbers, pause

    def on_step(self, trainer):
        if trainer.step == 3:
            for number in self.numbers:
                signal.raise_signal(number)
                time.sleep(self.pause)


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGHUP,),
        (signal.SIGHUP, signal.SIGHUP),  # the terminal's and the shell's
        (signal.SIGTERM, signal.SIGTERM),  # `timeout` and others send it twice
        (signal.SIGINT, signal.SIGINT),  # torchrun passes on what the terminal has sent already
        (signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    ],
)
def test_requests_to_stop(trainer, tmp_path, numbers):
    before = [signal.getsignal(number) for number in numbers]
    made = trainer(Signals(*numbers))
    made.fit()
    assert made.step == 3
    assert (tmp_path / "run/checkpoints/step_00000003.pt").exists()
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_ctrl_c_stops_at_once_and_damages_nothing(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("gankernels.train.signals.StopRequest.TWICE", 0.01)
    with pytest.raises(KeyboardInterrupt):
        trainer(Signals(signal.SIGINT, signal.SIGINT, pause=0.05)).fit()
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    assert not (tmp_path / "run/.lock").exists()


def test_sighup_under_nohup(trainer):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        made = trainer(Signals(signal.SIGHUP), steps=5)
        made.fit()
        assert made.step == 5
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupted_command_is_no_defect(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("gankernels.cli.info.describe_build", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "gankernels: interrupted\n"


# ---- callbacks -----------------------------------------------------------------------------------


class Fails(Callback):
    def __init__(self, event, error):
        self.events, self.event, self.error = [], event, error

    def __getattribute__(self, name):
        if name.startswith("on_"):
            self.events.append(name)
            if name == self.event and self.events.count(name) >= 3 - 2 * (name != "on_step"):
                raise_ = self.error

                def fail(*arguments):
                    raise raise_

                return fail
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("event", ["on_step", "on_report", "on_checkpoint", "on_samples"])
@pytest.mark.parametrize("error", [KeyError("mine"), SystemExit(3)], ids=["error", "exit"])
def test_what_a_callback_raises_is_raised_after_a_checkpoint(trainer, tmp_path, event, error):
    callback = Fails(event, error)
    made = trainer(callback, log_every=3, checkpoint_every=3, sample_every=3)
    with pytest.raises(type(error)):
        made.fit()
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert saved.stem == f"step_{made.step:08d}"
    assert made.step == 3
    assert callback.events[-1] == "on_end"
    assert (tmp_path / "run/samples.png").exists()


def test_a_callback_that_fails_at_the_start(trainer, tmp_path):
    made = trainer(Fails("on_start", KeyError("mine")))
    with pytest.raises(KeyError):
        made.fit()
    assert made.step == 0
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


@pytest.mark.parametrize("name", ["Progress", "Metrics", "Board", "Report"])
@pytest.mark.parametrize("event", ["on_start", "on_report", "on_samples", "on_end"])
def test_what_only_shows_a_run_cannot_end_it(trainer, tmp_path, monkeypatch, name, event):
    def fail(*arguments):
        raise RuntimeError("no way")

    made = trainer(log_every=1, steps=3)
    (own,) = (callback for callback in made.callbacks if type(callback).__name__ == name)
    monkeypatch.setattr(own, event, fail, raising=False)
    monkeypatch.setattr("gankernels.train.report.available", lambda: False)
    with pytest.warns(
        RuntimeWarning, match=f"there is no {own.shows} from step .*: no way"
    ) as told:
        made.fit()
    assert len(told) == 1
    assert (tmp_path / "run/checkpoints/step_00000003.pt").exists()


def test_a_checkpoint_is_saved_before_anybody_is_told(trainer, tmp_path):
    class Looks(Callback):
        def on_report(self, trainer, values):
            assert (tmp_path / f"run/checkpoints/step_{trainer.step:08d}.pt").exists()

        on_samples = on_report

    trainer(Looks(), steps=4, log_every=2, checkpoint_every=2, sample_every=2).fit()


def test_measurements_are_written_before_they_are_told(tmp_path, monkeypatch):
    """`bench 2>&1 | tee` and Ctrl-C."""
    from gankernels import bench
    from gankernels.bench import run

    reader, writer = os.pipe()
    os.close(reader)
    real, seen = run.measure, []

    def measure(case, plan):
        seen.append(case)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(case, plan)

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(bench, "write", lambda results, folder: rows.extend(results.rows))
    rows = []
    with os.fdopen(writer, "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "stderr", file)
        arguments = ["--quick", "--seconds", "0", "--ops", "interpolate", "--out", str(tmp_path)]
        assert main(["bench", *arguments]) == 0
    assert len(rows) == 2
