"""`gankernels bench`, and the same cases under pytest-benchmark."""

import json
import signal

import pytest

from gankernels.bench import run
from gankernels.cli import main

FAST = ["bench", "--quick", "--seconds", "0"]


def test_everything(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--ops", "--train", "gan", "--set", "size=12", "--set", "batch_size=4"]
    assert main([*FAST, *arguments]) == 0
    captured = capsys.readouterr()
    for title in ("batch_norm_leaky_relu", "minibatch_discrimination", "interpolate", "training"):
        assert f"\n{title}" in captured.out
    assert captured.out.splitlines()[-1].startswith("bench/index.html shows it")
    assert f"[{len(tiny) + 1}/{len(tiny) + 1}] gan size=12 batch_size=4: " in captured.err
    found = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert len(found["ops"]) == len(tiny)
    assert found["training"][0]["settings"] == {"size": "12", "batch_size": "4"}
    assert (tmp_path / "bench" / "speedup_training.png").exists()
    # In labels, where style() has nothing typeset.
    assert "mathdefault" not in (tmp_path / "bench" / "index.html").read_text()


def test_one_op(tiny, tmp_path, capsys):
    assert main([*FAST, "--ops", "interpolate", "--out", str(tmp_path)]) == 0
    assert [row["op"] for row in json.loads((tmp_path / "results.json").read_text())["ops"]] == [
        "interpolate"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "interpolat"], "did you mean 'interpolate'?"),
        (["--train", "cgann"], "did you mean 'cgan'?"),
        (["--train", "gan", "--set", "size"], "--set takes key=value, got 'size'"),
        (["--set", "size=12"], "--set applies to games; name at least one with --train"),
        (["--seconds", "many"], "--seconds"),
        (["--ops", "interpolate", "--device", "warp"], "device 'warp' cannot be used"),
        (["--ops", "interpolate", "--out", "file"], "File exists: 'file'"),
    ],
)
def test_errors_are_one_line(tiny, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("gankernels: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_ctrl_c_leaves_what_was_measured(tiny, tmp_path, monkeypatch, capsys):
    real, seen = run.measure, []

    def measure(case, plan):
        seen.append(case)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(case, plan)

    monkeypatch.setattr(run, "measure", measure)
    assert main([*FAST, "--ops", "--out", str(tmp_path)]) == 0
    assert f"stopped early, after 2 of {len(tiny)} cases" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    assert not found["complete"]
    assert len(found["ops"]) == 2
    assert "stopped early" in (tmp_path / "index.html").read_text()


def test_ctrl_c_before_anything_was_measured(tiny, tmp_path, monkeypatch, capsys):
    def measure(case, plan):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", measure)
    assert main([*FAST, "--ops", "--out", str(tmp_path / "new")]) == 2
    assert "stopped before anything was measured" in capsys.readouterr().err


def test_a_failure_of_ours_is_status_1(tiny, tmp_path, monkeypatch, capsys):
    def contenders(case, device, compiled):
        return {"clone": int, "eager": int, "ours": lambda: 1 / 0}

    monkeypatch.setattr(run.ops, "contenders", contenders)
    assert main([*FAST, "--ops", "interpolate", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith(": ZeroDivisionError: division by zero\n")
    assert (tmp_path / "index.html").exists()


def test_the_suite(python, tmp_path, monkeypatch):
    """pytest-benchmark times the same cases; those that cannot be are skipped."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)  # one of many workers would not time anything
    result = python(
        "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--benchmark-only",
        "--benchmark-max-time=0", "--benchmark-min-rounds=1", "--benchmark-warmup=off",
        f"--benchmark-json={tmp_path / 'found.json'}", "-k", "interpolate and 64x784",
    )  # fmt: skip
    assert "3 passed, 2 skipped" in result.stdout
    found = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    assert {b["group"] for b in found} == {"interpolate float32 64x784 forward"}
    assert [b["params"]["contender"] for b in found] == ["clone", "eager", "ours"]
