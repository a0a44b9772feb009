"""The report of a run, from any content of its folder."""

import base64
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from gankernels.train import report
from gankernels.train.report import collect, plot, read_metrics, smooth, thin, write_report

CONFIG = {
    "format": 2, "game": "wgan-gp", "data": "/data/<mnist>", "steps": 3000, "batch_size": 64,
    "precision": "bf16", "penalty": None, "lr": 1e-4, "minibatch_stddev": False,
}  # fmt: skip


def row(step, **more):
    return {"step": step, "it_per_s": 20.0, "critic/wasserstein": -2.0 + step / 1e4, **more}


@pytest.fixture
def folder(tmp_path):
    """`folder(rows, grids)`: a run folder."""

    def make(rows=(), grids=(), final=False, config=CONFIG):
        (tmp_path / "samples").mkdir()
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        for step in grids:
            save(tmp_path / f"samples/step_{step:08d}.png", step)
        if final:
            save(tmp_path / "samples.png", 1)
        return tmp_path

    return make


def save(path, seed, size=(30, 40)):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, size, np.uint8)).save(path)


def read(path):
    return path.read_text()


def alts(html):
    return re.findall(r'alt="([^"]*)"', html)


def pictures(html):
    return [base64.b64decode(part) for part in re.findall(r"base64,([^\"]*)", html)]


def test_a_finished_run(folder):
    rows = [row(step, **{"generator/adversarial": 0.5}) for step in range(100, 3001, 100)]
    run = folder(rows, grids=[1000, 2000, 3000], final=True)
    path = write_report(run)
    assert path == run / "report.html"
    html = read(path)
    assert "<h1>wgan-gp on &lt;mnist&gt;</h1>" in html
    assert "<dd>3,000 of 3,000</dd>" in html
    assert "<dd>finished</dd>" in html
    assert "<dd>20.0</dd>" in html
    assert "<dd>2 min 30 s</dd>" in html  # 3000 steps at 20 per second
    assert re.findall(r'<svg[^>]* aria-label="([^"]*)"', html) == [
        "critic loss over steps: wasserstein",
        "generator loss over steps: adversarial",
        "Iterations per second over steps",
    ]
    assert alts(html) == [
        "A grid of samples of the trained generator",
        *(f"A grid of samples at step {step}" for step in ("1,000", "2,000", "3,000")),
    ]
    assert pictures(html)[0] == (run / "samples.png").read_bytes()
    assert pictures(html)[1] == (run / "samples/step_00001000.png").read_bytes()
    assert re.search(r"<img [^>]*width=\"880\"", html)  # 40 pixels, 22 for each
    for name, value in (("penalty", "null"), ("lr", "0.0001"), ("data", "/data/&lt;mnist&gt;")):
        assert f'<th scope="row">{name}</th><td>{value}</td>' in html
    assert "Running mean" not in html


def test_a_run_that_has_just_begun(folder):
    run = folder()
    (run / "metrics.jsonl").unlink()
    (run / "samples").rmdir()
    html = read(write_report(run))
    assert "<dd>0 of 3,000</dd>" in html
    assert "<dd>not finished</dd>" in html
    assert not pictures(html)
    assert "<svg" not in html
    assert "Configuration" in html


def test_one_row_and_one_grid(folder):
    html = read(write_report(folder([row(100)], grids=[100])))
    assert alts(html) == ["A grid of samples at step 100"]
    assert html.count("<svg") == 2


def test_damaged_lines_and_strange_values_are_passed_over(folder):
    run = folder([row(200), row(100, note="text", flag=True, nothing=None, nan=float("nan"))])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"step": "x"}\n{"it_per_s": 3}\n\xff\xfe\n{"step": 300, "critic/wass')
    rows = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in rows] == [100, 200]
    assert collect(rows).keys() == {"it_per_s", "critic/wasserstein"}
    assert "<dd>200 of 3,000</dd>" in read(write_report(run))


def test_metrics_are_grouped_by_what_stands_before_the_slash(folder):
    more = {
        "score/frechet": 200.0,
        "critic/gradient_norm": 2.0,
        "gradient_norm/generator": 1.0,
        "critic/penalty": 0.3,
        "score/accuracy": 0.5,
        "lr": 0.1,
    }
    rows = [row(step, **more) for step in (1, 2)]
    html = read(write_report(folder(rows)))
    assert re.findall(r'<svg[^>]* aria-label="([^"]*)"', html) == [
        "critic loss over steps: wasserstein, penalty",
        "score over steps: frechet, accuracy",
        "gradient norm over steps: critic, generator",
        "lr over steps: lr",
        "Iterations per second over steps",
    ]


def test_curves_that_would_flatten_each_other_have_a_panel_each():
    def series(*values):
        return report.Series(np.arange(3.0), np.array(values, float))

    together = plot({"real": series(0.5, 1, 2), "fake": series(3, -4, 2)}, "loss").axes
    assert [len(ax.lines) for ax in together] == [2]
    apart = plot({"frechet": series(200, 90, 50), "accuracy": series(0, 0.5, 0.9)}, "score").axes
    assert [len(ax.lines) for ax in apart] == [1, 1]
    for ax in [*together, *apart]:
        assert ax.get_legend() is not None
        assert ax.get_ylabel() in {"loss", "score"}
    assert together[0].get_xlabel() == apart[1].get_xlabel() == "step"


def test_scores_have_a_panel_each(folder):
    """However alike their sizes are: they are of different kinds."""
    pair = {"score/frechet": 1.4, "score/accuracy": 0.9, "critic/a": 1.4, "critic/b": 0.9}
    rows = [{"step": step, **pair} for step in (1, 2)]
    html = read(write_report(folder(rows)))
    panels = re.findall(r'id="(figure-\d)-axes_\d"', html)
    assert panels == ["figure-1", "figure-1", "figure-2"]


def test_many_points_are_drawn_as_few_that_look_alike():
    rng = np.random.default_rng(0)
    series = report.Series(np.arange(1.0, 10_001), 0.7 + 0.1 * rng.standard_normal(10_000))
    series.values[5000] = 1000.0
    few, mean = thin(series), smooth(series)
    assert len(few.values) == len(few.steps) <= 2 * report.DRAWN
    assert (few.values.min(), few.values.max()) == (series.values.min(), 1000.0)
    assert len(mean.values) == len(mean.steps) <= report.DRAWN
    assert (mean.steps[0], mean.steps[-1]) == (1.0, 10_000.0)
    expected = [series.values[max(i - 100, 0) : i + 101].mean() for i in mean.steps.astype(int) - 1]
    np.testing.assert_allclose(mean.values, expected, rtol=1e-9)
    (ax,) = plot({"real": series}, "loss").axes
    assert ax.get_ylim()[1] < 20  # the mean goes up to 5.7, a single value does not count
    front, faint = ax.lines
    assert front.get_color() == faint.get_color()
    assert faint.get_alpha() < 0.5
    assert faint.get_zorder() < front.get_zorder()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["real"]


def test_few_points_are_drawn_as_they_are():
    series = report.Series(np.arange(50.0), np.arange(50.0) ** 2)
    (ax,) = plot({"real": series}, "loss").axes
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_ydata(), series.values)


def test_speed_begins_at_zero():
    series = report.Series(np.arange(5.0), 30 + np.arange(5.0))
    (ax,) = plot({"it/s": series}, "speed", from_zero=True).axes
    assert ax.get_ylim()[0] == 0


@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 100])
def test_at_most_twelve_grids_with_the_first_and_the_last(folder, count):
    steps = [500 * (i + 1) for i in range(count)]
    html = read(write_report(folder(grids=steps)))
    shown = re.findall(r"<figcaption>step ([\d,]+)</figcaption>", html)
    shown = [int(text.replace(",", "")) for text in shown]
    if count == 1:
        assert shown == []  # it is there already, large
    else:
        assert len(shown) == min(count, 12)
        assert (shown[0], shown[-1]) == (steps[0], steps[-1])
        gaps = np.diff(shown)
        assert gaps.max() - gaps.min() <= 500


def test_a_resumed_run_shows_its_newest_grid(folder):
    run = folder(grids=[1000, 2000], final=True)
    age = (run / "samples.png").stat().st_mtime
    os.utime(run / "samples/step_00002000.png", (age + 9, age + 9))
    assert alts(read(write_report(run)))[0] == "A grid of samples at step 2,000"


def test_large_grids_are_made_smaller_but_for_the_last(folder):
    run = folder()
    for step in (1, 2):
        save(run / f"samples/step_{step:08d}.png", step, (900, 1200))
    last, *small = pictures(read(write_report(run)))
    assert last == (run / "samples/step_00000002.png").read_bytes()
    for png in small:
        (run / "small.png").write_bytes(png)
        assert Image.open(run / "small.png").size == (480, 360)


def test_scores(folder):
    run = folder()
    (run / "scores.json").write_text(json.dumps({"frechet": 4.125, "data": "<digits>"}))
    html = read(write_report(run))
    assert "<dt>frechet</dt><dd>4.125</dd>" in html
    assert "<dt>data</dt><dd>&lt;digits&gt;</dd>" in html


def test_a_real_run(run, tmp_path):
    trainer = run(steps=40, sample_every=20, data="digits")
    trainer.fit()
    html = read(write_report(tmp_path / "run"))
    assert "<h1>cgan on digits</h1>" in html
    assert "discriminator loss over steps: real, fake" in html


def test_errors(tmp_path, folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none.config\.json"):
        write_report(tmp_path / "none")
    run = folder([row(1)])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="reports need matplotlib"):
        write_report(run)
    assert not (run / "report.html").exists()
