"""Every command on real digits, and errors by users."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from gankernels import data, games
from gankernels.cli import main
from gankernels.cli.info import describe_build

FAST = ["--steps", "4", "--batch-size", "8", "--device", "cpu", "--set", "size=12"]


def train(out, model="cgan", *more):
    return main(["train", model, "--data", "digits", *FAST, "--out", str(out), *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cgan"
    assert train(out) == 0
    return out


@pytest.mark.parametrize("model", games.names())
def test_train_and_sample_every_model(tmp_path, capsys, model):
    assert train(tmp_path / "run", model) == 0
    assert str(tmp_path / "run" / "samples.png") in capsys.readouterr().out
    out = tmp_path / "grid.png"
    assert main(["sample", str(tmp_path / "run"), "--out", str(out), "--count", "9"]) == 0
    assert Image.open(out).size[1] >= 12


def test_models_need_no_more_than_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_gan.py").write_text(
        "from gankernels.games.gan import GAN\n"
        "class MyGAN(GAN):\n"
        "    'Mine, and nobody else knows.'\n"
    )
    monkeypatch.setattr(games, "__path__", [*games.__path__, str(tmp_path)])
    try:
        assert train(tmp_path / "run", "my-gan") == 0
        with pytest.raises(SystemExit):
            main(["train", "--help"])
        assert "Mine, and nobody else knows." in capsys.readouterr().out
    finally:
        sys.modules.pop("gankernels.games.my_gan", None)


def test_resume_and_set(tmp_path, capsys):
    out = tmp_path / "run"
    assert train(out, "wgan", "--set", "n_critic=2", "--set", "clip=0.03") == 0
    more = ["--steps", "6", "--resume"]
    assert train(out, "wgan", *more) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["steps"], config["n_critic"], config["clip"]) == (6, 2, 0.03)
    assert (out / "checkpoints/step_00000006.pt").exists()


def test_config_json_as_model(trained, tmp_path):
    again = tmp_path / "again"
    assert main(["train", str(trained / "config.json"), "--out", str(again)]) == 0
    assert (again / "samples.png").read_bytes() == (trained / "samples.png").read_bytes()


def test_sample(trained, tmp_path):
    def sample(name, *arguments):
        path = tmp_path / name
        assert main(["sample", str(trained), "--out", str(path), *arguments]) == 0
        return np.asarray(Image.open(path))

    grid = sample("all.png")
    assert grid.shape == (7 * 14 + 2, 10 * 14 + 2)
    assert np.array_equal(grid, sample("same.png", "--seed", "0"))
    assert not np.array_equal(grid, sample("other.png", "--seed", "1"))
    some = sample("some.png", "--labels", "3,1", "--count", "4")
    assert some.shape == (2 * 14 + 2, 2 * 14 + 2)
    swapped = sample("swapped.png", "--labels", "1,3", "--count", "4")
    assert not np.array_equal(some, swapped)
    (checkpoint,) = (trained / "checkpoints").iterdir()
    path = tmp_path / "file.png"
    assert main(["sample", str(checkpoint), "--out", str(path)]) == 0
    assert np.array_equal(grid, np.asarray(Image.open(path)))


def test_sample_any_number_as_files_or_an_array(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["sample", str(trained), "--count", "23", "--batch-size", "10", "--device", "cpu"]
    assert main([*common, "--out", "set.npz"]) == 0
    assert capsys.readouterr().out == "set.npz: 23 samples\n"
    assert main([*common, "--format", "png", "--out", "set"]) == 0
    array, folder = data.load("set.npz"), data.load("set")
    assert array.images.shape == (23, 1, 12, 12)
    assert array.labels.tolist() == [i % 10 for i in range(23)]
    assert torch.equal(folder.images, array.images[array.labels.argsort(stable=True)])
    for form, name in (("npz", "samples.npz"), ("png", "samples"), ("grid", "samples.png")):
        assert main([*common, "--format", form]) == 0
        assert (tmp_path / name).exists()
    assert main([*common[:2], "--out", "more.npz", "--count", "31"]) == 0
    more = data.load("more.npz").images[:23].int()
    assert (more - array.images.int()).abs().max() <= 1  # but for rounding


def test_sample_without_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("run", "gan") == 0
    assert main(["sample", "run", "--count", "5", "--format", "npz"]) == 0
    assert data.load("samples.npz").labels.tolist() == [0] * 5
    assert main(["sample", "run", "--count", "5", "--format", "png"]) == 0
    assert len(list((tmp_path / "samples").glob("*.png"))) == 5
    assert main(["sample", "run", "--interpolate", "1,2", "--columns", "4"]) == 0
    assert Image.open("samples.png").size == (4 * 14 + 2, 8 * 14 + 2)


def test_interpolate(trained, tmp_path):
    def sample(name, *arguments):
        path = tmp_path / name
        assert main(["sample", str(trained), "--out", str(path), *arguments]) == 0
        return data.load(path)

    walk = sample("walk.npz", "--interpolate", "3,4", "--columns", "5")
    assert walk.labels.tolist() == [label for label in range(10) for _ in range(5)]
    rows = walk.images.unflatten(0, (10, 5)).int()
    for seed, end in (("3", rows[:, 0]), ("4", rows[:, -1])):
        images = sample(f"{seed}.npz", "--seed", seed, "--count", "10").images
        assert (images.int() - end).abs().max() <= 1
    assert not torch.equal(rows[:, 1], rows[:, 0])
    some = sample("some.npz", "--interpolate", "3,4", "--labels", "7,1", "--count", "30")
    assert some.labels.tolist() == [1] * 10 + [0] * 10 + [1] * 10  # indices into "1" and "7"


def test_truncation_narrows_what_is_drawn(trained, tmp_path):
    spread = {}
    for threshold in ("0.01", "1", "9"):
        path = tmp_path / f"{threshold}.npz"
        arguments = ["--truncation", threshold, "--labels", "3", "--count", "50"]
        assert main(["sample", str(trained), "--out", str(path), *arguments]) == 0
        spread[threshold] = data.load(path).images.float().std(dim=0).mean().item()
    assert spread["0.01"] < 0.1 * spread["1"] < 0.1 * spread["9"]


def test_train_help_is_enough(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for part in [*games.names(), "--resume", "batch_size=64", "n_critic=5", "ema=", "lr=5e-05"]:
        assert part in text


def test_info(capsys):
    import gankernels

    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for key in gankernels.build_info():
        assert key in text


def test_build_info_is_readable():
    info = {"version": "1.0", "cuda": {"built": False, "why": None}, "cpu": ["avx2", "avx512"]}
    assert list(describe_build(info)) == [
        "version  1.0",
        "cuda",
        "  built  False",
        "  why    -",
        "cpu      avx2, avx512",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "cgann"], "unknown game 'cgann'; did you mean 'cgan'?"),
        (["train", "cgan", "--data", "nowhere"], "nowhere"),
        (["train", "cgan", "--steps", "many"], "steps must be a whole number, got 'many'"),
        (["train", "cgan", "--set", "batchsize=3"], "did you mean 'batch_size'?"),
        (["train", "cgan", "--set", "lr"], "--set takes key=value"),
        (["train", "cgan", "--device", "warp"], "device 'warp' cannot be used"),
        (["train", "cgan", "--precision", "fp1"], "precision must be"),
        (["train", "dcgan", "--set", "size=30"], "size must be divisible by 4, got 30"),
        (
            ["train", "wgan", "--set", "n_critic=0"],
            "steps of player 'critic' must be",
        ),
        (["train", "cgan", "--device", "meta"], "device 'meta' cannot be used: "),
        (["train", "cgan", "--device", "privateuseone"], "device 'privateuseone' cannot be used: "),
        (["train", "cgan", "--set", "latent_dim=1000000000000"], "the networks of these settings"),
        (["train", "cgan", "--set", f"latent_dim={2**62}"], "the networks of these settings are"),
        (["train", "dcgan", "--set", f"width={2**40}"], "the networks of these settings"),
        (["train", "cgan", "--batch-size", f"{2**62}"], f"batch_size={2**62} needs "),
        (["train", "cgan", "--batch-size", "100000000"], "batch_size=100000000 needs "),
        (["train", "cgan", "--set", "seed=" + "9" * 5000], "seed must be a whole number, got '999"),
        (["train", "cgan", "--set", f"seed={2**64}"], f"seed must fit into 64 bits, got '{2**64}'"),
        (["train", "cgan", "--set", "lr=1e400"], "lr must be a finite number, got '1e400'"),
        (["train", "cgan", "--set", "lr=nan"], "lr must be a finite number, got 'nan'"),
        (["train", "wgan", "--set", f"n_critic={10**12}"], "an iteration of 1000000000001 steps"),
        (["train", "cgan", "--set", "size=100000"], "1797 images of size 100000: needs "),
        (["train", "cgan", "--out", ""], "out must name something, got ''"),
        (["train", "x\ny"], r"unknown game 'x\ny'"),
        (["evaluate", "nowhere", "--count", f"{10**15}"], f"--count {10**15} needs "),
        (["bench", "--seconds", "inf"], "seconds must be finite, got inf"),
        (["train", "missing.json"], "missing.json"),
        (["train"], "GAME"),
        (["fly"], "fly"),
        (["sample", "nowhere"], "nowhere does not exist"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("gankernels: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "0,11"], "labels must be among 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, got '11'"),
        (["--labels", "one"], "labels must be among 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, got 'one'"),
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--columns", "-1"], "--columns must be at least 1, got -1"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--seed", str(2**64)], f"seed must fit into 64 bits, got {2**64}"),
        (["--truncation", "0"], "truncation must be above 0, got 0.0"),
        (["--count", f"{10**15}"], f"--count {10**15} needs "),
        (["--columns", f"{10**15}"], f"--columns {10**15} needs "),
        (["--device", "warp"], "device 'warp' cannot be used: "),
        (["--interpolate", "1"], "--interpolate must be numbers like 1,2, got '1'"),
        (["--interpolate", "1,2", "--seed", "0"], "--seed cannot be combined with --interpolate"),
        (["--interpolate", "1,2", "--count", "64"], "a multiple of the 10 columns, got 64"),
        (["--format", "npz"], "--out must end in .npz for npz only, got --format npz, --out "),
        (["--format", "png"], "--format png makes a folder, and grid one PNG: got --out "),
    ],
)
def test_sample_errors(trained, tmp_path, capsys, arguments, message):
    out = tmp_path / "grid.png"
    assert main(["sample", str(trained), "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gankernels: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_samples_that_would_not_fit_on_the_disk(trained, tmp_path, capsys):
    for out, form in (("a.npz", "npz"), ("a", "png")):
        out = ["--out", str(tmp_path / out), "--format", form, "--count", f"{10**15}"]
        assert main(["sample", str(trained), *out]) == 2
        assert f"--count {10**15} needs " in (error := capsys.readouterr().err)
        assert "of disk" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is not a JSON file: "),
        (b'{"format": ' + b"9" * 5000 + b"}", "is not a JSON file: "),
        (b"\x80\x02", "is not a JSON file: "),
        (b'{"format": 2, "game": "gan", "lr": NaN}', "lr must be a finite number, got nan"),
        (b'{"format": 2, "game": "gan", "steps": 1e400}', "steps must be a whole number, got inf"),
        (b'{"format": 2, "game": "gan", "data": [1]}', "data must be text, got [1]"),
        (b'{"format": 2, "game": ["gan"]}', "game must be the name of a game, got ['gan']"),
        (b'{"format": 2, "game": "gan", "' + b"a" * 10**6 + b'": 1}', "unknown setting 'aaaa"),
        (b'{"format": 2, "game": "gan", "score": 2}', "score must be text, got 2"),
    ],
)
def test_configurations_that_are_none(tmp_path, capsys, content, message):
    (tmp_path / "config.json").write_bytes(content)
    assert main(["train", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < 1500


def test_a_configuration_in_any_unicode(trained, tmp_path, capsys):
    text = json.dumps({**json.loads((trained / "config.json").read_text()), "zzz": 1})
    for code in ("utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "config.json").write_bytes(text.encode(code))
        assert main(["train", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]) == 2
        assert "unknown setting 'zzz'" in capsys.readouterr().err


def test_what_is_no_file_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "checkpoints").mkdir()
    os.mkfifo(tmp_path / "checkpoints/step_00000001.pt")
    for arguments in (
        ["train", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")],
        ["train", "cgan", "--out", str(tmp_path), "--resume"],
    ):
        assert main(arguments) == 2
        assert "Not a regular file" in capsys.readouterr().err
    for command in ("sample", "evaluate"):
        for source in (tmp_path, tmp_path / "config.json"):
            assert main([command, str(source)]) == 2
            error = capsys.readouterr().err
            assert "ot a regular file" in error or "must be a run folder or the file" in error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), KeyError("a"), ZeroDivisionError()]
)
def test_a_defect_keeps_its_traceback(tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("gankernels.train.trainer.Trainer.__init__", fail)
    with pytest.raises(type(error)):
        train(tmp_path / "run")


def test_no_memory_in_training_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gankernels.train.Trainer.advance", lambda self: torch.empty(10**15))
    assert train(tmp_path / "run") == 2
    assert capsys.readouterr().err.startswith("gankernels: error: out of memory, asking for 40000")


def test_damaged_checkpoint_is_the_users_to_put_right(tmp_path, capsys):
    assert train(tmp_path / "run") == 0
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(f"gankernels: error: {checkpoint} is damaged")


def test_divergence_ends_with_status_1(tmp_path, capsys):
    assert train(tmp_path / "run", "gan", "--set", "lr=1e30", "--set", "log_every=1") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("gankernels: error: step ")
    assert last.endswith("is nan")


def test_module_and_sigterm(tmp_path):
    command = [sys.executable, "-m", "gankernels", "train", "cgan", "--out", str(tmp_path / "run")]
    command += ["--device", "cpu", "--steps", "1000000", "--batch-size", "8", "--set", "size=12"]
    command += ["--set", "log_every=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (tmp_path / f"run/checkpoints/step_{last:08d}.pt").exists()
    assert b"continue with: gankernels train cgan --resume" in out
