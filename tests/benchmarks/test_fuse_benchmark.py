"""The benchmark of gk.fuse runs and compares equal work, and the page shows its saved results."""

import copy
import json

import fuse
import pytest
import script
import torch

import gankernels as gk


def test_table_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script.gk, "tune_allocator", lambda: None)
    monkeypatch.setattr(fuse, "NETWORKS", {"DCGAN": lambda: fuse.DCGAN(2)})
    options = "--seconds 0 --batch 2 --threads 1 --save some"
    monkeypatch.setattr("sys.argv", ["fuse.py", *options.split()])
    fuse.main()
    (row,) = json.loads((tmp_path / "some.json").read_text())["rows"]
    assert (row["network"], row["pairs"], row["fused"]) == ("DCGAN", 3, 3)
    assert all(0 < value < 1e-10 for value in row["differences"].values())
    for what, times in row["seconds"].items():
        assert row["times_faster"][what] == times["before"] / times["after"]
    assert capsys.readouterr().out.count("DCGAN") == 1


@pytest.mark.parametrize("name", fuse.NETWORKS)
def test_pairs_are_counted_for_the_networks_of_the_benchmark(name):
    lines = []
    network = gk.fuse(fuse.NETWORKS[name](), log=lines.append)
    assert sum(line.startswith("fused") for line in lines) == network.PAIRS


@pytest.mark.parametrize("name", fuse.NETWORKS)
def test_differences_are_seen(name):
    """In all that is compared, or the table would say nothing."""
    network = fuse.NETWORKS[name]()
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1e-4 * torch.randn_like(parameter))
    x = torch.rand(2, 3, 64, 64)
    assert all(1e-6 < value < 1 for value in fuse.differences(network, other, x).values())
    assert set(fuse.differences(network, network, x).values()) == {0}


def test_page_shows_what_is_saved():
    rows = json.loads((script.RESULTS / "fuse.json").read_text())["rows"]
    assert [row["network"] for row in rows] == list(fuse.NETWORKS)
    for row in rows:
        assert row["fused"] == row["pairs"]
        assert all(value < 1e-10 for value in row["differences"].values())
    _, _, rest = fuse.PAGE.read_text().partition(fuse.BEGIN)
    expected = fuse.HEAD + "".join(map(fuse.line, rows))
    assert rest.partition(fuse.END)[0] == expected, "run: python benchmarks/fuse.py --save fuse"
