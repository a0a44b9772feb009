"""The plan, the measurement, and the output of results."""

import json
import math
import re

import pytest
import torch

import gankernels as gk
from gankernels import bench
from gankernels._html import Page
from gankernels.bench import Timing, ops, page, results, run, training
from gankernels.bench.training import Training

CPU = torch.device("cpu")


def timing(median, spread=0.1):
    return Timing(median, median * (1 - spread / 2), median * (1 + spread / 2), median / 2, 7, 1)


def row(case, errors=None, **medians):
    kind = results.OpRow if isinstance(case, bench.Case) else results.TrainingRow
    return kind(case, {name: timing(t) for name, t in medians.items()}, errors or {})


# ---- the plan ------------------------------------------------------------------------------------


def test_what_is_chosen():
    everything = bench.plan(quick=True)
    assert everything.cases == tuple(bench.cases(quick=True))
    assert [str(t) for t in everything.trainings] == [
        "wgan-gp", "cgan minibatch_discrimination=100,5"
    ]  # fmt: skip
    assert everything.seconds < bench.plan(["interpolate"]).seconds
    some = bench.plan(["interpolate", "minibatch_stddev"], quick=True)
    assert {case.op for case in some.cases} == {"interpolate", "minibatch_stddev"}
    assert some.trainings == ()
    games = bench.plan(games=["gan", "wgan"], settings={"size": "12"})
    assert games.cases == ()
    assert games.trainings == (Training("gan", {"size": "12"}), Training("wgan", {"size": "12"}))
    assert bench.plan([], quick=True).cases == everything.cases
    assert len(bench.plan(games=[]).trainings) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op_names": ["minibatch_stdev"]}, "did you mean 'minibatch_stddev'"),
        ({"games": ["cgann"]}, "did you mean 'cgan'"),
        ({"games": ["gan"], "settings": {"sice": "12"}}, "did you mean 'size'"),
        ({"settings": {"size": "12"}}, "--set applies to games"),
        ({"seconds": -1}, "seconds must not be negative, got -1"),
        ({"seconds": math.nan}, "seconds must not be negative, got nan"),
        ({"device": "warp"}, "device 'warp' cannot be used"),
    ],
)
def test_bad_plans(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bench.plan(**{"op_names": ["interpolate"], **arguments})


def test_there_must_be_kernels(monkeypatch):
    monkeypatch.setattr(run, "why_not", lambda kind: "they are not compiled")
    with pytest.raises(
        ValueError, match="no gankernels kernels are available on cpu: they are not comp"
    ):
        bench.plan(["interpolate"])


# ---- measuring -----------------------------------------------------------------------------------


def test_rows(tiny, capsys):
    found = bench.compare(bench.Plan(tuple(tiny), (), CPU, quick=True, seconds=0))
    assert [r.case for r in found.rows] == tiny
    assert found.complete
    for r in found.rows:
        assert not r.errors
        assert {"clone", "eager", "ours"} <= r.timings.keys()
        assert r.ratio("eager") == r.timings["eager"].median / r.timings["ours"].median
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(tiny)
    assert lines[0].startswith(f"[1/{len(tiny)}] {tiny[0]}: ")


def test_a_contender_that_fails_is_left_out(tiny, monkeypatch, capsys):
    def contenders(case, device, compiled):
        def fail():
            raise RuntimeError("out of memory\nand more")

        return {"clone": int, "eager": fail, "cdist": int, "ours": int}

    monkeypatch.setattr(ops, "contenders", contenders)
    found = bench.compare(bench.Plan(tuple(tiny[:1]), (), CPU, seconds=0))
    assert found.rows[0].errors == {"eager": "RuntimeError: out of memory"}
    assert found.rows[0].timings.keys() == {"clone", "cdist", "ours"}
    assert found.rows[0].ratio("eager") is None
    assert not found.failed
    assert "eager failed: RuntimeError: out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["Ctrl-C", "stop"])
def test_what_was_measured_is_left(tiny, monkeypatch, how):
    real, seen = run.measure, []

    def measure(case, plan):
        seen.append(case)
        if how == "Ctrl-C" and len(seen) == 3:
            raise KeyboardInterrupt
        return real(case, plan)

    monkeypatch.setattr(run, "measure", measure)
    plan = bench.Plan(tuple(tiny), (), CPU, quick=True, seconds=0)
    found = bench.compare(plan, lambda: how == "stop" and len(seen) == 2)
    assert [r.case for r in found.rows] == tiny[:2]
    assert not found.complete


def test_games(monkeypatch):
    """Eager is the very same trainer on the reference backend; nothing is written."""
    backends = []
    original = training.Trainer.iterate

    def iterate(self):
        backends.append((id(self), gk.build_info()["backend"], self.run.exists()))
        original(self)

    monkeypatch.setattr(training.Trainer, "iterate", iterate)
    monkeypatch.setattr(training, "READ_EVERY", 2)
    game = Training("gan", {"size": 12, "batch_size": 4})
    found = bench.compare(bench.Plan((), (game,), CPU, quick=True, seconds=0))
    (measured,) = found.rows
    assert measured.timings.keys() == {"eager", "ours"}
    assert isinstance(measured, results.TrainingRow)
    assert {(backend, exists) for _, backend, exists in backends} == {
        ("reference", False), ("auto", False)
    }  # fmt: skip
    assert len({trainer for trainer, *_ in backends}) == 2
    assert gk.build_info()["backend"] == "auto"


def test_a_bar_on_a_terminal(tiny, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bench.compare(bench.Plan(tuple(tiny[:3]), (), CPU, quick=True, seconds=0))
    told = capsys.readouterr().err
    assert "0/3 [" in told
    assert str(tiny[2]) in told
    assert "[1/3]" not in told


# ---- results -------------------------------------------------------------------------------------


@pytest.fixture
def measured(tiny):
    """Results as of a run: each case twice as fast as eager, the first without it."""
    rows = [row(case, clone=1e-4, eager=8e-4, ours=4e-4) for case in tiny]
    rows[0] = row(tiny[0], {"eager": "MemoryError: <none> left"}, clone=1e-4, ours=4e-4)
    rows.append(row(Training("gan", {"size": 12}), eager=0.5, ours=0.25))
    roofs = {"memory": 2e10, "cache": 1e11, "operations": 5e10}
    environment = run.environment(CPU) | {"load": 0.5, "processors": 2}
    return bench.Results(environment, len(rows), quick=True, ceilings=roofs, rows=rows)


def test_row():
    case = bench.Case("minibatch_stddev", "forward", (4, 3))
    found = row(case, clone=1.0, eager=8.0, cdist=4.0, ours=2.0)
    assert (found.ratio("eager"), found.ratio("cdist"), found.ratio("compiled")) == (4, 2, None)
    assert found.baselines == ["eager", "cdist"]
    assert found.clones == 2
    assert found.spread == pytest.approx(0.1)
    assert (
        row(bench.Case("minibatch_discrimination", "forward", (4, 3, 2)), ours=1.0).clones is None
    )


def test_terminal(measured):
    lines = list(bench.describe(measured))
    assert measured.environment["cpu"] in lines[0]
    first = next(line for line in lines if line.startswith("  float32 6x3 "))
    assert re.split(r" {2,}", first.strip()) == [
        "float32 6x3", "forward", "0.400", "-", "-", "10%", "4.00", "1.00"
    ]  # fmt: skip
    last = re.split(r" {2,}", lines[-1].strip())
    assert last == ["gan size=12", "4.00", "2.00", "2.00x", "10%"]
    assert not any("machine was busy" in line for line in lines)
    measured.environment["load"] = 2.5
    busy = list(bench.describe(measured))[-1]
    assert "busy: a load of 2.5 on 2 processors at the start, and noise above 30% in 0 of" in busy
    measured.environment["load"] = 0.0
    for r in measured.rows:
        r.timings, r.errors = {"ours": timing(1.0, 0.5)}, {}
    assert "noise above 30% in 11 of 11 rows" in list(bench.describe(measured))[-1]


def test_json(measured):
    found = json.loads(json.dumps(measured.to_json()))
    assert found["environment"]["torch"] == torch.__version__
    assert (found["complete"], found["quick"]) == (True, True)
    assert len(found["ops"]) == len(measured.rows) - 1
    case = next(r for r in found["ops"] if r["shape"] == [8, 4, 3, 3])
    assert (case["op"], case["what"], case["dtype"], case["layout"]) == (
        "batch_norm_leaky_relu", "forward", "float32", "contiguous"
    )  # fmt: skip
    assert (case["clones"], case["fewest_clones"], case["ratios"]) == (4, 1, {"times_eager": 2})
    assert case["seconds"]["ours"]["median"] == 4e-4
    assert found["ops"][0]["errors"] == {"eager": "MemoryError: <none> left"}
    (game,) = found["training"]
    assert (game["game"], game["settings"], game["ratios"]) == (
        "gan", {"size": 12}, {"times_eager": 2}
    )  # fmt: skip


def test_page_and_plots(measured, tmp_path):
    index = bench.write(measured, tmp_path / "new" / "folder")
    tmp_path = tmp_path / "new" / "folder"
    assert index == tmp_path / "index.html"
    assert json.loads((tmp_path / "results.json").read_text())["complete"]
    html = index.read_text()
    for text in ("batch_norm_leaky_relu", "2.00x", "MemoryError: &lt;none&gt; left", "quick"):
        assert text in html
    assert html.count("<svg") == len(list(tmp_path.glob("*.png")))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "roofline.png",
        "speedup_batch_norm_leaky_relu.png",
        "speedup_interpolate.png",
        "speedup_minibatch_discrimination.png",
        "speedup_training.png",
        "time_batch_norm_leaky_relu.png",
    ]


def test_what_the_plots_show(measured, monkeypatch, tmp_path):
    shown = {}
    monkeypatch.setattr(Page, "figure", lambda self, figure, alt, **_: shown.update({alt: figure}))
    bench.write(measured, tmp_path)
    (bars,) = shown["Speed-up of interpolate"].axes
    assert [bar.get_x() + bar.get_width() for bar in bars.patches] == [2.0]
    panels = shown["Time of batch_norm_leaky_relu against the size of its input"].axes
    assert [ax.get_title() for ax in panels] == list(ops.PASSES)
    curves = {line.get_label(): line.get_xydata().tolist() for line in panels[0].get_lines()}
    assert curves["ours"] == [[18, 0.4], [288, 0.4]]
    assert curves["eager"] == [[288, 0.8]]
    assert curves["fewest bytes at a clone's speed"] == [[18, 0.1], [288, 0.1]]


def test_roofline(measured):
    points = [p for p in page.roofline(measured) if p[0] == "interpolate"]
    perbyte = 3 / (3 * 2)  # bfloat16
    assert [point[:3] for point in points] == [
        ("interpolate", "ours", perbyte), ("interpolate", "eager", perbyte)
    ]  # fmt: skip
    assert [point[3] for point in points] == [3 * 12 / 4e-4, 3 * 12 / 8e-4]


def test_a_page_of_little(measured, tmp_path):
    """One case without any comparison, and no roofs."""
    measured.rows = measured.rows[:1]
    bench.write(measured, tmp_path)
    html = (tmp_path / "index.html").read_text()
    assert "stopped early" in html
    assert [path.name for path in tmp_path.glob("*.png")] == ["roofline.png"]
