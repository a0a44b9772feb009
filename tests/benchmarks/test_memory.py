"""The benchmark of memory counts the memory that is kept, and reports it."""

import json

import memory
import pytest
import script
import torch
from torch import nn

import gankernels as gk

N = 4 * 5 * 8 * 8 * 4  # bytes of an activation below


def pair(inplace):
    """A convolution of 1x1 keeps its input, a pair what the benchmark says; 5 channels between."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.LeakyReLU(0.2, inplace), nn.Conv2d(5, 1, 1)
    )


@pytest.mark.parametrize(
    ("network", "activations"),
    [(pair(False), 3), (pair(True), 2), (gk.fuse(pair(True)), 2)],
    ids=["eager", "in place", "fused"],
)
def test_what_a_pair_keeps(network, activations):
    torch.set_num_threads(1)  # each thread of a convolution has a buffer of its own
    x = torch.randn(4, 3, 8, 8)
    found = memory.measure(lambda: network(x).sum().backward(), network)
    statistics, given = 2 * 5 * 4, 4 * 3 * 8 * 8 * 4
    assert found["saved"] == activations * N + given + statistics
    without = found["saved"] - (N if isinstance(network[1], gk.nn.BatchNormLeakyReLU2d) else 0)
    assert found["saved_without_inputs"] == without
    # x, y and the output, or their gradients, and z or what the backward pass has in its place.
    assert 3 * N <= found["allocated"] < 5 * N


def test_nothing_is_kept_without_gradients():
    network = pair(False)
    found = memory.measure(torch.no_grad()(lambda: network(torch.randn(4, 3, 8, 8))), network)
    assert found["saved"] == 0
    assert found["allocated"] > 0


def test_table_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    options = "--batch 2 --width 2 --save some"
    monkeypatch.setattr("sys.argv", ["memory.py", *options.split()])
    memory.main()
    rows = json.loads((tmp_path / "some.json").read_text())["rows"]
    saved = {(row["step"], row["network"]): row["saved"] for row in rows}
    names = ["eager", "eager, in place", "fused"]
    expected = [("DCGAN", n) for n in [*names, "in-place ABN, computed"]]
    assert list(saved) == [*expected, *(("WGAN-GP", n) for n in names)]
    for step in ("DCGAN", "WGAN-GP"):
        assert saved[step, "fused"] <= saved[step, "eager, in place"] < saved[step, "eager"]
    assert saved["DCGAN", "in-place ABN, computed"] < saved["DCGAN", "fused"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == len(rows) + 2


def test_page_has_the_figures():
    rows = json.loads((script.RESULTS / "memory.json").read_text())["rows"]
    page = (script.RESULTS.parents[1] / "docs" / "kernels.md").read_text()
    assert "\n" + "\n".join(map(memory.line, rows)) + "\n\n" in page
