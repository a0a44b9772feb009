import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from gankernels import data
from gankernels.data import load


def test_digits_as_they_are():
    data = load("digits", size=8)
    assert repr(data) == "ImageData('digits': 1797 images, 1x8x8, 10 classes)"
    assert data.classes == tuple("0123456789")
    digits = load_digits()
    assert data.labels.tolist() == digits.target.tolist()
    assert data.images.min() == 0
    assert data.images.max() == 255
    error = data.images[:, 0].numpy() / 255 - digits.images / 16
    assert np.abs(error).max() <= 0.5 / 255 + 1e-9


def test_digits_resized():
    data = load("digits", size=28, channels=3)
    assert data.images.shape == (1797, 3, 28, 28)
    assert data.images[:, 0].equal(data.images[:, 2])
    # Bilinear: no overshoot, and the average brightness stays.
    native = load("digits", size=8).images.float().mean()
    assert abs(data.images.float().mean() - native) < 0.03 * native
    assert data.images.is_contiguous()
    assert data.images.dtype == torch.uint8


@pytest.mark.parametrize("path", ["no/such/place", "digit"])
def test_unknown_source_lists_what_is_accepted(path):
    with pytest.raises(
        ValueError, match=rf"'{path}' is not the name.*accepted: .*'digits', a folder"
    ):
        load(path)


def test_unknown_file(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("1,2,3")
    with pytest.raises(ValueError, match=r"data\.csv' is of no known kind; accepted: .*'digits'"):
        load(path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": 3}, TypeError, "source must be a str or a Path, got int"),
        ({"source": "digits", "size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"source": "digits", "size": 2.0}, TypeError, "size must be an int or None, got float"),
        ({"source": "digits", "channels": 4}, ValueError, "channels must be 1, 3 or None, got 4"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        load(**arguments)


@pytest.mark.parametrize(("library", "source"), [("sklearn", "digits"), ("PIL", "FOLDER")])
def test_missing_extras_say_what_to_install(tmp_path, library, source):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    source = str(tmp_path) if source == "FOLDER" else source
    code = f"""
import sys
sys.modules[{library!r}] = None  # importing it now raises ImportError
from gankernels import data
from gankernels.data import load
try:
    load({source!r})
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install gankernels[train]" in result.stdout, result.stderr


def test_a_kind_that_is_named(tmp_path):
    images, labels = np.zeros((2, 4, 4), np.uint8), np.arange(2)
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    assert len(load(f"npz:{tmp_path}/set.npz")) == len(load(f"npz:{tmp_path}")) == 2
    assert load(f"npz:{tmp_path}/set.npz").name == "set.npz"
    with pytest.raises(ValueError, match=r"accepted: an \.npz with images and labels$"):
        load("npz:nowhere")
    with pytest.raises(ValueError, match=r"set\.npz' is of no known kind; accepted: a folder with"):
        load(f"idx:{tmp_path}/set.npz")
    with pytest.raises(ValueError, match="is not the name of a data set"):
        load(f"zip:{tmp_path}/set.npz")  # no kind


def test_a_source_of_several_kinds_is_ambiguous(tmp_path, monkeypatch):
    class Other(data.get_kind("npz")):
        pass

    monkeypatch.setattr(data._kind._registry, "_registered", {"other": Other})
    np.savez(tmp_path / "set.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.arange(2))
    path = f"{tmp_path}/set.npz"
    with pytest.raises(
        ValueError, match=rf"may be of several kinds; load npz:{path} or other:{path} instead"
    ):
        load(path)
    assert data.canonical(f"other:{path}") == f"other:{path}"
    assert data.kind_of(f"other:{path}") is Other


def test_options_of_another_kind():
    with pytest.raises(TypeError, match="digits takes channels, size, stream, got length"):
        load("digits", length=3)
