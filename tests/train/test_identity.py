"""A run recognizes its data by their content and the names of classes, not by their path."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gankernels import data
from gankernels.data import _image_files
from gankernels.train import CheckpointError, latest_checkpoint, load_game, start, state
from gankernels.train import checkpoint as checkpoint_module
from gankernels.train.checkpoint import list_classes
from gankernels.train.config import RESUMABLE, Config

TINY = {"batch_size": 4, "device": "cpu", "sample_every": 0, "latent_dim": 4, "size": 8}


def save(path, classes=("cat", "dog", "owl"), seed=0, count=12):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
    np.savez(path, images=images, labels=np.resize(classes, count))
    return str(path)


def save_folder(path, classes=("cat", "dog", "owl"), count=3, seed=0):
    rng = np.random.default_rng(seed)
    for name in classes:
        (path / name).mkdir(parents=True)
        for i in range(count):
            picture = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
            picture.save(path / name / f"{i}.pgm")  # all of one size
    return str(path)


@pytest.fixture
def train(tmp_path):
    """`train(steps, model, **settings)` into one folder, going on where it stopped."""

    def run(steps, model="gan", **settings):
        settings = {"out": str(tmp_path / "run"), **TINY, "steps": steps, **settings}
        trainer = start(model, resume=True, **settings)
        trainer.callbacks.clear()
        trainer.fit()
        return trainer

    return run


@pytest.mark.parametrize("kind", ["npz", "folder", "streamed"])
def test_data_may_move(train, tmp_path, kind):
    here, there = tmp_path / "here.npz", tmp_path / "there.npz"
    more = {"stream": kind == "streamed", "workers": 0}
    (save if kind == "npz" else save_folder)(here)
    first = train(1, data=str(here), **more)
    before = [p.clone() for p in first.game.parameters()]
    here.rename(there)
    with pytest.raises(ValueError, match=r"here.npz', on which .* give its new path with --data"):
        train(2)
    score = "frechet" if kind != "streamed" else None
    trainer = train(2, data=str(there), **more, score=score, log_every=1, keep=1)
    assert trainer.step == 2
    assert any(not p.equal(q) for p, q in zip(before, trainer.game.parameters(), strict=True))
    assert train(3).config.data.endswith(f":{there}")  # which is remembered


def test_workers_may_be_other_ones(train, tmp_path):
    source = save_folder(tmp_path / "set")
    train(1, data=source, stream=True, workers=0)
    assert train(2, workers=1).config.workers == 1
    with pytest.raises(ValueError, match="stream cannot change when a run is resumed"):
        train(3, stream=False)


def test_every_setting_is_decided_on():
    fixed = {"data_options", "batch_size", "seed", "precision", "ema"}
    assert fixed | RESUMABLE == set(vars(Config()))
    assert not fixed & RESUMABLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "as many rows of the same fields, but the digest of their content"),
        ({"classes": ("cat", "dog", "bird")}, "cat, dog, owl there, bird, cat, dog in the data"),
        ({"classes": ("cat", "dog", "zebra")}, "cat, dog, owl there, cat, dog, zebra in the data"),
        ({"classes": ("dog", "cat", "owl")}, "but the digest of their content"),
        (
            {"count": 13},
            r"was trained on 12 rows of images .* the data \(other.npz\) are 13 rows",
        ),
        ({"classes": ("cat", "dog")}, "cat, dog, owl there, cat, dog in the data"),
    ],
)
def test_other_data_are_refused(train, tmp_path, change, message):
    train(1, "cgan", data=save(tmp_path / "set.npz"))
    with pytest.raises(CheckpointError, match=message):
        train(2, data=save(tmp_path / "other.npz", **change), model="cgan")


@pytest.mark.parametrize("stream", [False, True])
def test_a_renamed_folder_and_a_replaced_file_are_noticed(train, tmp_path, stream):
    more = {"data": save_folder(tmp_path / "set"), "stream": stream, "workers": 0}
    train(1, "cgan", **more)
    (tmp_path / "set/owl").rename(tmp_path / "set/bird")  # now the first
    with pytest.raises(CheckpointError, match="cat, dog, owl there, bird, cat, dog in the data"):
        train(2, "cgan", **more)
    (tmp_path / "set/bird").rename(tmp_path / "set/owl")
    file = tmp_path / "set/dog/1.pgm"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="but the digest of their content"):
        train(2, "cgan", **more)
    file.write_bytes(content)
    assert train(2, "cgan", **more).step == 2


def test_identity_is_that_of_what_is_stored(tmp_path):
    path = save(tmp_path / "set.npz")
    whole = data.load(path).identity()
    # Resized pixels are rounded by one processor as another does not.
    assert data.load(path, size=5).identity() == data.load(path, size=9).identity() == whole
    assert data.load(path, size=8).identity() == whole
    assert data.load(path, channels=3, size=5).identity() != whole
    assert data.load(save(tmp_path / "other.npz", seed=1), size=5).identity() != whole
    # What splits are known by is their own content.
    resized = data.load(path, size=5)
    assert len({part.identity() for part in (resized, *resized.split())}) == 3


def test_identity_of_files_samples_a_large_set(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    save_folder(folder, ("a", "b"), count=20)
    size = (folder / "a/0.pgm").stat().st_size
    read = []
    digest = _image_files._digest
    monkeypatch.setattr(_image_files, "_digest", lambda name: read.append(name) or digest(name))

    def identity():
        read.clear()
        return data.load(folder, stream=True, size=8, channels=1).identity()

    whole = identity()
    assert len(read) == 40
    monkeypatch.setattr(_image_files, "_SAMPLED", 10 * size)  # every fourth
    sampled = identity()
    assert len(read) == 10
    assert sampled == identity() != whole
    for change in (
        lambda: [(folder / f"b/{i}.pgm").write_bytes(bytes(size)) for i in range(4)],
        lambda: (folder / "b/11.pgm").write_bytes(bytes(size - 1)),
        lambda: (folder / "b/5.pgm").rename(folder / "b/5x.pgm"),
        lambda: (folder / "a/5.pgm").rename(folder / "b/55.pgm"),
    ):
        change()
        assert identity() != sampled
        sampled = identity()
    folder.rename(tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere"
    assert identity() == sampled


def test_earlier_checkpoints_are_refused(train, tmp_path):
    train(1, "cgan", data=save(tmp_path / "set.npz"))
    path = latest_checkpoint(tmp_path / "run")
    content = checkpoint_module.read(path)
    torch.save({**content, "version": 3}, path)
    with pytest.raises(CheckpointError, match="has version 3, this gankernels reads 4: use"):
        load_game(path)


def test_another_number_of_threads_is_told(train, tmp_path, monkeypatch):
    train(1, data=save(tmp_path / "set.npz"))
    monkeypatch.setattr(state, "threads", lambda: 77)
    with pytest.warns(UserWarning, match="now there are 77: results will differ by rounding"):
        train(2)


def test_images_are_where_they_were(train, tmp_path):
    """Drawn on the device and read ahead, batches are others: free memory does not decide twice."""
    train(1, data=save(tmp_path / "set.npz"), workers=0)
    path = latest_checkpoint(tmp_path / "run")
    torch.save({**checkpoint_module.read(path), "resident": False}, path)
    assert not train(2).batches.resident


def test_home_is_meant_in_every_path(train, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "set.npz")
    trainer = train(1, data="~/set.npz", out="~/run", score="frechet")
    assert trainer.config.data == f"npz:{tmp_path}/set.npz"
    assert latest_checkpoint("~/run") == tmp_path / "run/checkpoints/step_00000001.pt"
    assert load_game("~/run")[0].spec.classes == ("cat", "dog", "owl")
    trainer.load(Path("~/run/checkpoints/step_00000001.pt"))
    assert start("~/run/config.json", out="~/again").run == tmp_path / "again"
    assert not (tmp_path / "~").exists()


def test_many_classes_are_listed_from_where_they_differ():
    names = [f"n{i}" for i in range(1000)]
    other = [*names[:500], "x", *names[501:]]
    assert list_classes(names, other).startswith("... n500, n501, ")
    assert list_classes(other, names).startswith("... x, n501, ")
    assert list_classes(names).endswith("n11 ... (1000 in all)")
    assert list_classes(["a", "b"]) == "a, b"
