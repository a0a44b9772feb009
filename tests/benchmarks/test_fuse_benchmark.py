"""The benchmark of gk.fuse runs, and compares what it says."""

import json

import fuse
import harness


def test_table_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness.gk, "tune_allocator", lambda: None)
    monkeypatch.setattr(fuse, "NETWORKS", {"DCGAN": lambda: fuse.DCGAN(2, 16)})
    options = "--seconds 0 --batch 2 --size 16 --threads 1 --save some"
    monkeypatch.setattr("sys.argv", ["fuse.py", *options.split()])
    fuse.main()
    rows = json.loads((tmp_path / "some.json").read_text())["rows"]
    assert [(row["network"], row["what"], row["fused"]) for row in rows] == [
        ("DCGAN", "forward + backward", 1),
        ("DCGAN", "penalty step", 1),
    ]
    for row in rows:
        assert row["ratio"] == row["seconds"]["before"] / row["seconds"]["after"]
    assert capsys.readouterr().out.count("DCGAN") == 2
