"""The parts of `make gpu-check` that need no GPU: stages, arithmetic, table, JSON."""

import itertools
import json
import subprocess
import sys
import time
import zipfile

import gpu_check
import gpu_ops
import pytest
import torch
from gpu_check import Result, Stage, run_stage
from gpu_ops import Case, cases, contenders, small_cases

PYTHON = sys.executable


def script(text, **options):
    return Stage("fake", [PYTHON, "-c", text], options.pop("budget", 20), **options)


# ---- stages ------------------------------------------------------------------------------------


def test_a_stage_that_passes(tmp_path):
    result = run_stage(script("import os; print('x'); print('in', os.getcwd())"), tmp_path)
    assert (result.status, result.note) == ("passed", f"in {tmp_path}")
    assert result.output == f"x\nin {tmp_path}\n"


@pytest.mark.parametrize(
    ("stage", "note"),
    [
        (script("import sys; print('why'); sys.exit(3)"), "exit status 3"),
        (script("print('1 error')", must_say="0 errors"), "no '0 errors' in its output"),
        (Stage("fake", ["no-such-program"], 1), "No such file or directory: 'no-such-program'"),
    ],
)
def test_a_stage_that_fails(stage, note, tmp_path):
    result = run_stage(stage, tmp_path)
    assert result.status == "failed"
    assert note in result.note


def test_a_stage_that_takes_too_long_ends_with_all_it_started(tmp_path):
    """Its output so far is kept. The grandchild would hold the pipe open for a minute."""
    text = (
        "import subprocess, sys, time; print('so far', flush=True); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    )
    begin = time.monotonic()
    result = run_stage(script(text, budget=5), tmp_path)
    assert time.monotonic() - begin < 40
    assert (result.status, result.note, result.output) == ("timed out", "after 5 s", "so far\n")


def test_a_stage_that_is_skipped_is_not_run(tmp_path):
    stage = Stage("fake", ["no-such-program"], 1, skip_because="it is not there")
    assert run_stage(stage, tmp_path) == Result("fake", "skipped", 0.0, "it is not there")


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one; `gpu(stage, ...)` says what is done with it."""
    monkeypatch.setattr(gpu_check, "nvidia_smi", lambda query: "580.1")
    return lambda *stages: monkeypatch.setattr(gpu_check, "stages", lambda wheel: list(stages))


def test_a_failure_keeps_no_other_stage_from_running(gpu, tmp_path, capsys):
    gpu(
        script("print('all ' + 'well')"),
        script("raise SystemExit('a reason')"),
        script("import time; time.sleep(60)", budget=0.5),
        script("print('to the ' + 'end')"),
    )
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    statuses = ["passed", "failed", "timed out", "passed"]
    assert [stage["status"] for stage in found["stages"]] == statuses
    printed = capsys.readouterr().out
    assert "a reason" in printed
    assert "to the end" in printed
    assert "a reason" in (tmp_path / "out" / "gpu_check.log").read_text()


def test_what_runs_together_does_so_at_the_same_time(gpu, tmp_path):
    """Each waits for the file that another writes."""
    wait = (
        "import pathlib, time; pathlib.Path({own!r}).touch()\n"
        "while not pathlib.Path({other!r}).exists(): time.sleep(0.05)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    gpu(
        script("print('before')"),
        script(wait.format(own=a, other=b), together="pair"),
        script(wait.format(own=b, other=a), together="pair"),
        script("print('after')"),
    )
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert [stage["note"] for stage in found["stages"]] == ["before", "", "", "after"]


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [
        ("580.65.06", "13.0", "H100, driver 580.65.06, kernels of CUDA 13.0"),
        (
            "550.54.15", "13.0",
            "H100, driver 550.54.15, kernels of CUDA 13.0, WHICH NEED DRIVER 580 OR NEWER: all of "
            "them will run as plain PyTorch",
        ),
        ("550.54.15", "12.8", "H100, driver 550.54.15, kernels of CUDA 12.8"),
        ("unknown", None, "H100, driver unknown, kernels of CUDA None"),
    ],
)  # fmt: skip
def test_the_first_line_says_whether_the_driver_will_do(
    gpu, tmp_path, monkeypatch, capsys, driver, cuda, said
):
    gpu()
    answers = {"driver_version": driver, "name": "H100"}
    monkeypatch.setattr(gpu_check, "nvidia_smi", lambda query: answers.get(query, "9.0"))
    monkeypatch.setattr(gpu_check, "cuda_version", lambda wheel: cuda)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"gpu-check: {said}"


def test_cuda_of_a_wheel_and_of_nvcc(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.writestr("gankernels/_build.json", '{"cuda": "12.8"}')
    assert gpu_check.cuda_version(tmp_path / "some.whl") == "12.8"
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.1, V13.1.2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    assert gpu_check.cuda_version(None) == "13.1"
    monkeypatch.delenv("NVCC")
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path: None)
    assert gpu_check.cuda_version(None) is None


def test_sanitizers():
    """All of those that see something else; only memcheck looks at the API's errors."""
    commands = {s.name: list(map(str, s.command)) for s in gpu_check.stages(wheel=True)}
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = commands[tool]
        assert command[command.index("--tool") + 1] == tool
        assert command[-1] == "--once"
        assert ("--report-api-errors" in command) is (tool == "memcheck")


def test_each_op_has_a_process_of_its_own(monkeypatch):
    """One that is killed keeps no other from being measured, and tells by the exit status."""
    ran = []

    def run(command):
        ran.append(command[-1])
        assert command[:-1] == [sys.executable, gpu_ops.__file__, "--only"]
        return subprocess.CompletedProcess(command, -11 if command[-1] == "interpolate" else 0)

    monkeypatch.setattr(gpu_ops.subprocess, "run", run)
    monkeypatch.setattr(gpu_ops.sys, "argv", ["gpu_ops.py"])
    with pytest.raises(SystemExit) as end:
        gpu_ops.main()
    assert end.value.code == 11
    assert ran == [gpu_ops.CEILINGS, *gpu_ops.measured_ops()]


def test_a_dead_context_is_an_error_of_its_row(monkeypatch):
    """What a kernel's error leaves behind raises wherever CUDA is asked next."""

    def dead():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_ops, "seconds_of", lambda run: 1e-6)
    monkeypatch.setattr(gpu_ops, "contenders", lambda case, *, compiled: {"ours": lambda: None})
    monkeypatch.setattr(gpu_ops.torch.cuda, "empty_cache", dead)
    row = gpu_ops.measure(Case("minibatch_discrimination", "backward", (6, 3, 2)))
    assert "illegal memory access" in row["errors"]["ours"]


def test_all_passed_is_status_0(gpu, tmp_path):
    gpu(script("print('well')"), Stage("fake", [], 1, skip_because="no tool"))
    assert gpu_check.main(["--out", str(tmp_path)]) == 0


def test_out_is_taken_from_the_environment(gpu, tmp_path, monkeypatch):
    gpu()
    monkeypatch.setenv("OUT", str(tmp_path / "there"))
    assert gpu_check.main([]) == 0
    assert (tmp_path / "there" / "gpu_check.json").exists()


def test_a_wheel_is_what_is_imported(gpu, tmp_path):
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.writestr("gankernels/__init__.py", "name = 'of the wheel'")
    inside = tmp_path / "inside.py"  # a script's own folder comes first on its path
    inside.write_text("import gankernels; print(gankernels.name)")
    gpu(
        script("import gankernels; print(gankernels.name)", must_say="of the wheel"),
        Stage("fake", [PYTHON, inside], 20, must_say="of the wheel"),
    )
    arguments = ["--wheel", str(tmp_path / "some.whl"), "--out", str(tmp_path)]
    assert gpu_check.main(arguments) == 0


def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "nvidia_smi", lambda query: "unknown")
    monkeypatch.setattr(gpu_check.Path, "exists", lambda path: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert "there is no NVIDIA GPU here" in capsys.readouterr().out


def test_all_stages_take_less_than_ten_minutes():
    planned = gpu_check.stages(wheel=False)
    groups = gpu_check.groups(planned)
    assert sum(max(stage.budget for stage in group) for group in groups) < 600
    assert [[stage.name for stage in group] for group in groups if len(group) > 1] == [
        ["tests", "graphs, streams, compile"],
        ["memcheck", "racecheck", "synccheck", "initcheck"],
    ]
    assert [stage for group in groups for stage in group] == planned
    assert [stage.name for stage in gpu_check.stages(wheel=True) if stage.skip_because][:1] == [
        "build"
    ]
    paths = [p for s in planned for p in s.command if isinstance(p, gpu_check.Path)]
    assert paths
    assert all(path.exists() for path in paths)


def test_tools_are_found_in_the_toolkit_that_is_not_on_the_path(tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho ERROR SUMMARY: 0 errors in $3\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    memcheck = next(s for s in gpu_check.stages(wheel=True) if s.name == "memcheck")
    assert memcheck.command[0] == str(tool)
    assert run_stage(memcheck, tmp_path).note == "ERROR SUMMARY: 0 errors in --error-exitcode"


def test_missing_tools_are_skipped_and_named(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path: None)
    monkeypatch.setattr(gpu_check, "has", lambda module: module not in ("pytest", "xdist"))
    skipped = {s.name: s.skip_because for s in gpu_check.stages(wheel=False) if s.skip_because}
    assert skipped == {
        "tests": "pytest is not installed",
        "graphs, streams, compile": "pytest is not installed",
        "memcheck": "compute-sanitizer is not on the PATH",
        "racecheck": "compute-sanitizer is not on the PATH",
        "synccheck": "compute-sanitizer is not on the PATH",
        "initcheck": "compute-sanitizer is not on the PATH",
    }
    missing = gpu_check.report([])["environment"]["missing"]
    assert missing.keys() == {"pytest", "xdist"}
    assert "not installed: xdist: tests run one after" in gpu_check.describe(gpu_check.report([]))


# ---- bytes and operations ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "fewest", "moved"),
    [("forward", 2, 3), ("backward", 3, 5), ("double backward", 5, 8)],
)
def test_bytes_of_batch_norm(what, fewest, moved):
    case = Case("batch_norm_leaky_relu", what, (64, 128, 128, 128), torch.bfloat16)
    assert case.input_bytes == 268_435_456
    assert (case.bytes, case.moved_bytes) == (fewest * 268_435_456, moved * 268_435_456)
    assert case.additions is None


@pytest.mark.parametrize("case", [case for case in small_cases() if case.bytes], ids=str)
def test_tensors_of_the_inputs_size_are_counted(case):
    """What a pass reads is known from its derivative, what it writes from its results."""
    results = contenders(case, "cpu")["ours"]()
    results = results if isinstance(results, tuple) else (results,)
    size = case.input_bytes // case.dtype.itemsize
    written = sum(r.numel() == size and r.dim() == len(case.shape) for r in results)
    read = {"forward": 1, "backward": 2, "double backward": 3}[case.what]
    if case.op == "interpolate":
        read = 2
    if case.op in ("gradient_norm_penalty", "minibatch_stddev") and case.what != "forward":
        read -= 1  # the incoming gradient is a scalar, or one number per group
    assert case.bytes == (read + written) * case.input_bytes


def test_additions_are_counted_pair_by_pair():
    n, b, c = 5, 3, 2
    terms = sum(1 for _ in itertools.permutations(range(n), 2) for _ in range(b * c))
    for what, each in (("forward", 2), ("backward", 3), ("double backward", 5)):
        assert Case("minibatch_discrimination", what, (n, b, c)).additions == each * terms


def test_bars():
    def bar(op, shape, what="forward", **options):
        return gpu_ops.bar(Case(op, what, shape, **options))

    assert bar("batch_norm_leaky_relu", (64, 128, 128, 128)) == ("bandwidth", 0.9)
    assert bar("batch_norm_leaky_relu", (64, 256)) == ("launches", 1)
    assert bar("batch_norm_leaky_relu", (64, 128, 32, 32)) is None
    assert bar("batch_norm_leaky_relu", (64, 256), "penalty step") is None
    assert bar("minibatch_discrimination", (512, 100, 16)) == ("additions", 0.7)
    assert bar("minibatch_discrimination", (512, 100, 5)) is None
    assert bar("minibatch_discrimination", (512, 100, 16), "backward") is None


def test_the_cases_hold_every_bar_and_op():
    found = list(cases())
    assert {gpu_ops.bar(case) for case in found} == {
        None, ("bandwidth", 0.9), ("launches", 1), ("additions", 0.7)
    }  # fmt: skip
    assert (
        {case.op for case in found} == set(gpu_ops.measured_ops()) == {c.op for c in small_cases()}
    )
    assert len(set(found)) == len(found)
    assert 4 <= sum(map(gpu_ops.with_compiler, found)) <= 6


STEPS = [
    Case("batch_norm_leaky_relu", "forward", (6, 3, 4, 4)),
    Case("batch_norm_leaky_relu", "forward + backward", (6, 3, 4, 4), layout="channels_last"),
    Case("batch_norm_leaky_relu", "penalty step", (6, 3, 4, 4)),
    Case("batch_norm_leaky_relu", "penalty step", (60, 3), torch.bfloat16),
    Case("minibatch_discrimination", "forward", (7, 5, 3)),
    Case("minibatch_discrimination", "forward + backward", (7, 5, 3)),
    Case("gradient_norm_penalty", "forward", (7, 5, 3)),
    Case("interpolate", "forward", (7, 5, 3)),
    Case("minibatch_stddev", "forward + backward", (7, 5, 3)),
    Case("minibatch_stddev", "penalty step", (16, 5, 3), torch.bfloat16),
]


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_contenders_compute_the_same(case):
    runs = contenders(case, "cpu")
    results = []
    for name in ("ours", "eager"):
        found = runs[name]()
        results.append([t.float() for t in (found if isinstance(found, tuple) else (found,))])
    ours, eager = results
    if case.what == "forward":
        ours = ours[:1]  # without the statistics, or norms, that are kept
    tolerance = 3e-2 if case.dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)


def test_small_cases_of_minibatch_discrimination():
    """Of every size of C that has a kernel of its own, and of none."""
    found = [case for case in small_cases() if case.op == "minibatch_discrimination"]
    assert {case.shape[2] for case in found} > {2, 4, 5, 8, 12, 16, 24, 32}
    for case in found:
        results = contenders(case, "cpu")["ours"]()
        for result in results if isinstance(results, tuple) else (results,):
            assert result.shape in (case.shape, case.shape[:2])
            assert result.isfinite().all()


def test_layouts():
    case = Case("batch_norm_leaky_relu", "forward", (4, 3, 5, 5), layout="channels_last")
    y = contenders(case, "cpu")["ours"]()[0]
    assert y.is_contiguous(memory_format=torch.channels_last)


# ---- report ------------------------------------------------------------------------------------


def measured(case, launches=None, errors=None, **seconds):
    bar = gpu_ops.bar(case)
    return {
        "op": case.op, "what": case.what, "shape": list(case.shape),
        "dtype": str(case.dtype)[6:], "layout": case.layout, "bytes": case.bytes,
        "moved_bytes": case.moved_bytes, "additions": case.additions,
        "bar": bar and list(bar), "launches": launches, "seconds": seconds,
        "errors": errors or {},
    }  # fmt: skip


LARGE = Case("batch_norm_leaky_relu", "forward", (64, 128, 128, 128))  # 0.54 GB


def test_rows_are_as_measured(monkeypatch):
    """Measured on the CPU by a clock that stands still; one contender fails."""

    def seconds_of(run):
        run()
        return 1e-6

    def on_the_cpu(case, *, compiled):
        return {**contenders(case, "cpu"), "failing": lambda: 1 / 0}

    monkeypatch.setattr(gpu_ops, "seconds_of", seconds_of)
    monkeypatch.setattr(gpu_ops, "launches_of", lambda run: 2)
    monkeypatch.setattr(gpu_ops, "contenders", on_the_cpu)
    for case in (
        Case("batch_norm_leaky_relu", "forward", (60, 3)),
        Case("minibatch_discrimination", "backward", (6, 3, 2)),
    ):
        row = gpu_ops.measure(case)
        errors = {"failing": "ZeroDivisionError: division by zero"}
        launches = 2 if gpu_ops.bar(case) else None
        assert json.loads(json.dumps(row)) == measured(case, launches, errors, **row["seconds"])
        assert row["seconds"]["ours"] == 1e-6
        assert gpu_check.table([gpu_check.assess(row, 1e12, 1e12)])


def test_shares_ratios_and_verdicts():
    bytes_ = LARGE.bytes
    row = gpu_check.assess(measured(LARGE, ours=2e-3, eager=5e-3), bytes_ / 1e-3, None)
    assert row["shares"]["bandwidth"] == pytest.approx(0.5)
    assert row["shares"]["moved_bandwidth"] == pytest.approx(0.75)
    assert row["times_eager"] == pytest.approx(2.5)
    assert "times_compiled" not in row
    assert row["bar_met"] is False
    assert gpu_check.assess(measured(LARGE, ours=1e-3), bytes_ / 1e-3, None)["bar_met"] is True
    assert gpu_check.assess(measured(LARGE, ours=1e-3), None, None)["bar_met"] is None
    case = Case("minibatch_discrimination", "forward", (512, 100, 16))
    for seconds, met in ((1.0, True), (2.0, False)):
        row = gpu_check.assess(measured(case, ours=seconds), None, case.additions / 0.75)
        assert row["shares"]["additions"] == pytest.approx(0.75 / seconds)
        assert row["bar_met"] is met
    small = Case("gradient_norm_penalty", "forward", (64, 784))
    for launches, met in ((1, True), (2, False)):
        row = gpu_check.assess(measured(small, launches, ours=1e-6), 1e12, 1e12)
        assert row["bar_met"] is met


def test_table():
    failing = measured(Case("interpolate", "forward", (4, 3)), 1, {"ours": "RuntimeError: no"})
    rows = [
        measured(LARGE, ours=1e-3, eager=2.5e-3),
        measured(Case("minibatch_discrimination", "forward", (512, 100, 16)), ours=1e-4),
        measured(Case("gradient_norm_penalty", "forward", (64, 784)), 2, ours=4e-6),
        failing,
        measured(Case("gradient_norm_penalty", "backward", (64, 784)), ours=4e-6),
    ]
    rows = [gpu_check.assess(row, 2e12, 2e13) for row in rows]
    header, *lines = gpu_check.table(rows).splitlines()
    assert header.split() == " ".join(gpu_check.COLUMNS).split()
    assert [" ".join(line.split()) for line in lines] == [
        "batch_norm_leaky_relu forward 64x128x128x128 float32 contiguous 1000.0 us 1074 MB "
        "54% copy, 81% moved 90% ! 2.5",
        "minibatch_discrimination forward 512x100x16 float32 100.0 us 0.837 Gadd 42% FADD 70% !",
        "gradient_norm_penalty forward 64x784 float32 4.0 us 0.2007 MB 2 launched 1 launch !",
        "interpolate forward 4x3 float32 failed 0.000144 MB 1 launched 1 launch",
        "gradient_norm_penalty backward 64x784 float32 4.0 us 0.4014 MB 1 launch ?",
    ]
    shapes = ("64x", "512x", "64x", "4x", "64x")
    starts = {line.index(shape) for line, shape in zip(lines, shapes, strict=True)}
    assert len(starts) == 1


TRAINED = {
    "model": "wgan_gp", "contender": "bf16", "it_per_s": 1234.0, "times_script": 9.5,
    "bar": 10.0, "met": False,
}  # fmt: skip


def test_report(gpu):
    gpu()
    row = measured(LARGE, errors={"eager": "OutOfMemoryError: too large"}, ours=1e-3)
    lines = [
        {"copy_bytes_per_second": 4e12},
        {"additions": {"adds_per_second": 3e13, "clock_hz": 1.9e9, "how": "measured"}},
        {"row": row},
    ]
    output = "\n".join(["a warning", *map(json.dumps, lines), '{"row": {"op": "cut sho'])
    found = gpu_check.report(
        [
            Result("environment", "passed", 1.0, "", '{"device": "NVIDIA X", "torch": "2.11"}'),
            Result("benchmarks", "timed out", 110.0, "after 110 s", output),
            Result("training", "passed", 80.0, "", json.dumps({"row": TRAINED})),
        ]
    )
    assert json.loads(json.dumps(found)) == found
    assert found.keys() == {"environment", "stages", "ceilings", "rows", "training"}
    assert found["environment"].keys() == {"device", "torch", "driver", "date", "missing"}
    assert found["environment"]["device"] == "NVIDIA X"
    assert found["stages"][1].keys() == {"name", "status", "seconds", "note"}
    assert found["ceilings"]["copy_bytes_per_second"] == 4e12
    assert len(found["rows"]) == 1
    text = gpu_check.describe(found)
    assert "NVIDIA X, driver 580.1, torch 2.11, 20" in text
    assert "copy bandwidth 4.00 TB/s" in text
    assert "wgan_gp, bf16: 1234 it/s, 9.5x PyTorch-GAN's (bar 10 !)" in text
    assert "additions 30.00 T/s at 1.90 GHz (measured)" in text
    assert "eager: OutOfMemoryError: too large" in text
    assert "benchmarks                 timed out   110.0 s  after 110 s" in text
