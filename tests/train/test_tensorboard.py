"""Event files, as TensorBoard itself reads them."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tensorboard")

from gankernels.train.tensorboard import TensorBoard


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0})
    events.Reload()
    return events


def curve(folder, name):
    return [(event.step, event.value) for event in read(folder).Scalars(name)]


def test_curves(tmp_path):
    board = TensorBoard(tmp_path / "board")
    for step in (100, 200):
        board.write(step, {"critic/penalty": step / 8, "it_per_s": 30.0})
    board.close()
    assert read(tmp_path / "board").Tags()["scalars"] == ["critic/penalty", "it_per_s"]
    assert curve(tmp_path / "board", "critic/penalty") == [(100, 12.5), (200, 25.0)]


def test_a_resumed_run_replaces_what_a_killed_one_logged_beyond_its_checkpoint(tmp_path):
    first = TensorBoard(tmp_path)
    for step in (100, 200, 300, 400):
        first.write(step, {"loss": 1.0})
    first.close()
    second = TensorBoard(tmp_path, step=200)
    second.write(300, {"loss": 2.0})
    second.close()
    assert curve(tmp_path, "loss") == [(100, 1.0), (200, 1.0), (300, 2.0)]


def pixels(folder, name="samples"):
    (event,) = read(folder).Images(name)
    return event.step, np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


def gray_as_color(picture):
    return np.stack([picture] * 3, axis=2)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_a_png_file(tmp_path, shape):
    picture = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    Image.fromarray(picture).save(tmp_path / "grid.png")
    board = TensorBoard(tmp_path / "board")
    board.image(500, tmp_path / "grid.png")
    step, shown = pixels(tmp_path / "board")  # before close
    board.close()
    assert step == 500
    assert np.array_equal(shown, picture if picture.ndim == 3 else gray_as_color(picture))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_tensor(tmp_path, channels):
    picture = torch.randint(255, (channels, 4, 6), dtype=torch.uint8)
    board = TensorBoard(tmp_path)
    board.image(7, picture, name="real")
    board.close()
    _, shown = pixels(tmp_path, "real")
    expected = picture.permute(1, 2, 0).numpy() if channels == 3 else gray_as_color(picture[0])
    assert np.array_equal(shown, expected)


def test_wrong_tensors(tmp_path):
    board = TensorBoard(tmp_path)
    with pytest.raises(ValueError, match=r"\(C, H, W\) with C 1 or 3, got \(2, 4, 4\)"):
        board.image(1, torch.zeros(2, 4, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"must be torch\.uint8, got torch\.float32"):
        board.image(1, torch.zeros(1, 4, 4))
    board.close()


def test_where_tensorboard_is_missing(tmp_path, monkeypatch):
    assert TensorBoard.available()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not TensorBoard.available()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"need tensorboard: pip install gankernels\[train\]"):
        TensorBoard(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_importing_costs_nothing(python):
    python(
        "-c",
        "import sys, gankernels.train, gankernels.train.tensorboard, gankernels.train.report;"
        "assert not {'tensorboard', 'torch.utils.tensorboard', 'matplotlib'} & set(sys.modules)",
    )
