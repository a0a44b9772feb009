"""The errors of `gankernels train` for damaged, odd or missing data: one line, status 2."""

import gzip
import os
import pickle
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gankernels.cli import main
from gankernels.data import load

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (10, 12, 12), dtype=np.uint8)
LABELS = np.arange(10, dtype=np.uint8)


@pytest.fixture
def train(tmp_path, capsys):
    """`train(data, ...)`: the status, and what is printed on stderr."""

    def run(data, *more):
        arguments = ["train", "cgan", "--data", data, "--out", tmp_path / "run", "--steps", "2"]
        arguments += ["--batch-size", "16", "--device", "cpu", *more]
        return main([str(argument) for argument in arguments]), capsys.readouterr().err

    return run


def pictures(folder, *names, side=12):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return folder


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def idx_folder(folder, images, labels, suffix=".gz"):
    (folder / f"train-images-idx3-ubyte{suffix}").write_bytes(images)
    (folder / f"train-labels-idx1-ubyte{suffix}").write_bytes(labels)
    return folder


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from the data was run')",)


def empty_folder(folder):
    return folder


def truncated_jpeg(folder):
    path = pictures(folder, "a/1.jpg", "a/2.jpg") / "a" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def image_of_no_bytes(folder):
    (pictures(folder, "a/1.jpg", "a/2.jpg") / "a" / "2.jpg").write_bytes(b"")
    return folder


def link_to_nowhere(folder):
    (pictures(folder, "a/1.png") / "a" / "2.png").symlink_to("nowhere")
    return folder


def several_sizes(folder):
    pictures(folder, "a/1.png")
    return pictures(folder, "a/2.png", side=20)


def truncated_gzip(folder):
    return idx_folder(folder, gzip.compress(idx(PIXELS))[:-20], gzip.compress(idx(LABELS)))


def truncated_idx(folder):
    return idx_folder(folder, idx(PIXELS)[:-20], idx(LABELS))


def idx_of_no_bytes(folder):
    return idx_folder(folder, b"", idx(LABELS))


def fewer_labels_than_images(folder):
    return idx_folder(folder, idx(PIXELS), idx(LABELS[:7]))


def npz_of_no_bytes(folder):
    (folder / "set.npz").write_bytes(b"")
    return folder / "set.npz"


def npz_with_pickled_objects(folder):
    np.savez(folder / "set.npz", images=PIXELS, labels=np.array([Bomb()] * 10))
    return folder / "set.npz"


def pickle_called_npz(folder):
    (folder / "set.npz").write_bytes(pickle.dumps(Bomb()))
    return folder / "set.npz"


def npy_called_npz(folder):
    with open(folder / "set.npz", "wb") as file:
        np.save(file, PIXELS)
    return folder / "set.npz"


def spoiled_npz(folder):
    path = folder / "set.npz"
    np.savez(path, images=PIXELS, labels=LABELS)
    content = path.read_bytes()
    place = content.index(PIXELS.tobytes()) + 5
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_folder, "{folder}: empty, neither subfolders of images nor"),
        (truncated_jpeg, "{folder}/a/2.jpg: not a readable image: "),
        (image_of_no_bytes, "{folder}/a/2.jpg: not a readable image: "),
        (link_to_nowhere, "{folder}/a/2.png: not a readable image: [Errno 2] No such file"),
        (
            several_sizes,
            "{folder}/a/2.png: is 20x20, but {folder}/a/1.png is 12x12; "
            "give size= to resize all to one size\n",
        ),
        (truncated_gzip, "{folder}/train-images-idx3-ubyte.gz: damaged IDX file: Compressed file"),
        (truncated_idx, "{folder}/train-images-idx3-ubyte.gz: damaged IDX file: truncated"),
        (idx_of_no_bytes, "{folder}/train-images-idx3-ubyte.gz: damaged IDX file: it ends inside"),
        (fewer_labels_than_images, "{folder}/train-images-idx3-ubyte.gz: 10 images but 7 labels\n"),
        (npz_of_no_bytes, "{folder}/set.npz: not a readable .npz of plain arrays: not a zip"),
        (npz_with_pickled_objects, "{folder}/set.npz: not a readable .npz of plain arrays: Object"),
        (pickle_called_npz, "{folder}/set.npz: not a readable .npz of plain arrays: not a zip"),
        (npy_called_npz, "{folder}/set.npz: not a readable .npz of plain arrays: not a zip"),
        (spoiled_npz, "{folder}/set.npz: not a readable .npz of plain arrays: Bad CRC"),
    ],
)
def test_refused_in_one_line(train, tmp_path, make, message):
    folder = tmp_path / "data"
    folder.mkdir()
    status, text = train(make(folder))
    assert status == 2
    assert text.startswith("gankernels: error: " + message.format(folder=folder))
    assert text.count("\n") == 1
    assert "allow_pickle=`" not in text  # numpy's advice to load it unsafely
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("forbidden", ["a/1.png", "a", ".", "set.npz", "train-images-idx3-ubyte"])
def test_what_may_not_be_read(forbidden):
    # Not tmp_path, which only its owner may enter: root may read everything, so become another.
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = pictures(Path(parent) / "data", "a/1.png")
        np.savez(folder / "set.npz", images=PIXELS, labels=LABELS)
        if forbidden.startswith("train"):
            idx_folder(folder, idx(PIXELS), idx(LABELS), suffix="")
        path = folder / forbidden
        mode = path.stat().st_mode
        path.chmod(0)
        if os.getuid() == 0:
            os.seteuid(65534)
        try:
            # The command line makes one line of either, as the tests above show.
            with pytest.raises((ValueError, OSError)) as caught:
                load(path if path.suffix == ".npz" else folder)
        finally:
            os.seteuid(os.getuid())
            path.chmod(mode)
    assert "[Errno 13] Permission denied" in str(caught.value)
    assert f"'{path}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_sizes_with_a_size(train, tmp_path):
    status, text = train(several_sizes(tmp_path / "data"), "--set", "size=16")
    assert status == 0, text


def test_one_class_with_fewer_images_than_a_batch(train, tmp_path):
    """Batches are drawn with replacement, so that any number will do."""
    status, text = train(pictures(tmp_path / "data", "only/1.png", "only/2.png"))
    assert status == 0, text


def test_resume_on_data_with_other_classes(train, tmp_path):
    data = pictures(tmp_path / "data", "a/1.png", "b/2.png")
    assert train(data)[0] == 0
    pictures(data, "c/3.png")
    status, text = train(data, "--resume")
    assert status == 2
    assert "was trained on other classes: a, b there, a, b, c in the data" in text
    assert text.count("\n") == 1
