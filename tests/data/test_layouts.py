"""Folders as they are written by torchvision, archives, NAS and people.

They are read, or the advice in the error works.
"""

import gzip
import pickle
import re
import shutil
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from gankernels.data import ImageFiles, canonical, load
from gankernels.train.start import start

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 8), dtype=np.uint8)
LABELS = np.array([3, 1, 3, 2, 1, 3], np.uint8)
COLORS = RNG.integers(0, 256, (6, 3072), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def put(tmp_path):
    """`put(path, content)`: bytes, or a picture of noise where there are none."""

    def write(path, content=None):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
        else:
            path.write_bytes(content)
        return path

    return write


def idx(array, kind=8):
    array = array.astype({8: ">u1", 12: ">i4"}[kind])
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


def put_idx(put, folder, stem="train", images=PIXELS, labels=LABELS, suffix=""):
    pack = gzip.compress if suffix else bytes
    put(f"{folder}/{stem}-images-idx3-ubyte{suffix}", pack(idx(images)))
    put(f"{folder}/{stem}-labels-idx1-ubyte{suffix}", pack(idx(labels)))


def put_cifar(put, folder, kind):
    if kind == 10:
        put(f"{folder}/batches.meta", pickle.dumps({b"label_names": [b"a", b"b", b"c", b"d"]}, 4))
        for i in range(5):
            batch = {b"data": COLORS, b"labels": LABELS.tolist()}
            put(f"{folder}/data_batch_{i + 1}", pickle.dumps(batch, 4))
    else:
        names = {b"fine_label_names": [b"a", b"b", b"c", b"d"], b"coarse_label_names": [b"x"]}
        put(f"{folder}/meta", pickle.dumps(names, 4))
        fine = {b"data": COLORS, b"fine_labels": LABELS.tolist(), b"coarse_labels": [0] * 6}
        put(f"{folder}/train", pickle.dumps(fine, 4))
        put(f"{folder}/test", pickle.dumps({**fine, b"data": 255 - COLORS}, 4))


def pack(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.rsplit("/", 1)[-1])


def advised(source):
    """What the error says to load instead."""
    with pytest.raises(ValueError, match=r"load .* instead") as caught:
        load(source)
    advice = re.search(r"load (.*?) instead", str(caught.value))[1]
    return re.split(r", | or ", advice)


def is_the_set(data):
    assert data.images[:, 0].numpy().tolist() == PIXELS.tolist()
    assert [data.classes[label] for label in data.labels] == list(map(str, LABELS))
    return True


# ---- torchvision's roots ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_root_of_the_mnist_family(put, name, suffix):
    put_idx(put, f"root/{name}/raw", suffix=suffix)
    put_idx(put, f"root/{name}/raw", "t10k", images=255 - PIXELS, suffix=suffix)
    put(f"root/{name}/processed/training.pt", b"of an old torchvision")
    for source in ("root", f"root/{name}", f"root/{name}/raw"):
        assert is_the_set(load(source))
        assert is_the_set(load(source, stream=True))


def test_unpacked_and_packed_side_by_side_are_one(put):
    put_idx(put, "root/MNIST/raw")
    put_idx(put, "root/MNIST/raw", suffix=".gz", images=255 - PIXELS)
    assert is_the_set(load("root"))


def test_several_sets_in_a_root(put):
    put_idx(put, "root/MNIST/raw")
    put_idx(put, "root/KMNIST/raw", suffix=".gz")
    put_cifar(put, "root/cifar-100-python", 100)
    sources = advised("root")
    assert len(sources) == 3
    for source in sources:
        assert len(load(source)) == 6


@pytest.mark.parametrize("stem", ["emnist-balanced-train", "emnist-letters-train"])
def test_emnist_is_turned_upright(put, stem):
    put_idx(put, "root/EMNIST/raw", stem, images=PIXELS.transpose(0, 2, 1), suffix=".gz")
    put_idx(put, "root/EMNIST/raw", stem.replace("train", "test"), images=255 - PIXELS)
    assert is_the_set(load("root"))  # letters count from 1, as these do


def test_emnist_of_several_splits(put):
    for split in ("balanced", "byclass", "bymerge", "digits", "letters", "mnist"):
        stem = f"emnist-{split}-train"
        put_idx(put, "root/EMNIST/raw/gzip", stem, images=PIXELS.transpose(0, 2, 1), suffix=".gz")
    sources = advised("root")
    assert len(sources) == 6
    assert all(is_the_set(load(source)) for source in sources)


def test_qmnist(put):
    columns = np.stack([LABELS, *[np.arange(6) - 3] * 7], axis=1)
    for part, images in (("qmnist-train", PIXELS), ("qmnist-test", 255 - PIXELS)):
        put(f"root/QMNIST/raw/{part}-images-idx3-ubyte", idx(images))
        put(f"root/QMNIST/raw/{part}-labels-idx2-int", idx(columns, 12))
    put("root/QMNIST/raw/xnist-images-idx3-ubyte", idx(255 - PIXELS))
    assert is_the_set(load("root"))
    assert load("root/QMNIST/raw/qmnist-test-images-idx3-ubyte").labels.tolist() == [
        2, 0, 2, 1, 0, 2,
    ]  # fmt: skip


def test_labels_of_32_bits(put):
    put("d/train-images-idx3-ubyte", idx(PIXELS))
    put("d/train-labels-idx1-int", idx(LABELS, 12))
    assert is_the_set(load("d"))


def test_labels_of_other_columns_are_refused(put):
    put("d/train-images-idx3-ubyte", idx(PIXELS))
    put("d/train-labels-idx2-int", idx(np.zeros((6, 2)), 12))
    with pytest.raises(ValueError, match=r"labels must be \(N,\) or QMNIST's \(N, 8\), got \(6, 2"):
        load("d")


def test_test_images_alone(put):
    put_idx(put, "root/MNIST/raw", "t10k")
    for source in ("root", "root/MNIST/raw"):
        assert all(is_the_set(load(found)) for found in advised(source))


def test_kaggles_folders_named_like_the_files(put):
    put("d/train-images.idx3-ubyte", idx(PIXELS))
    put("d/train-labels.idx1-ubyte", idx(LABELS))
    put("d/train-images-idx3-ubyte/train-images-idx3-ubyte", idx(PIXELS))
    put("d/train-labels-idx1-ubyte/train-labels-idx1-ubyte", idx(LABELS))
    assert is_the_set(load("d"))


@pytest.mark.parametrize(
    ("kind", "name", "archive"),
    [
        (10, "cifar-10-batches-py", "cifar-10-python.tar.gz"),
        (100, "cifar-100-python", "cifar-100-python.tar.gz"),
    ],
)
def test_cifar(put, kind, name, archive):
    put_cifar(put, f"root/{name}", kind)
    pack(f"root/{name}", f"root/{archive}")
    for source in ("root", f"root/{name}", f"root/{archive}"):
        data = load(source)
        assert data.classes == ("a", "b", "c", "d")
        assert data.images[:6].flatten(1).numpy().tolist() == COLORS.tolist()
        assert data.labels[:6].tolist() == LABELS.tolist()
    shutil.rmtree(f"root/{name}")
    assert load("root").images.equal(data.images)


def test_cifar_unpacked_in_part(put):
    put_cifar(put, "root/cifar-10-batches-py", 10)
    pack("root/cifar-10-batches-py", "root/cifar-10-python.tar.gz")
    put("root/cifar-10-batches-py/data_batch_3", b"cut")
    (source,) = advised("root")
    assert len(load(source)) == 30


def test_npz_in_a_folder(put):
    put("d/readme.txt", b"")
    np.savez("d/set.npz", images=PIXELS, labels=LABELS)
    assert is_the_set(load("d"))
    np.savez("d/test.npz", images=PIXELS, labels=LABELS)
    assert len(advised("d")) == 2


def test_image_folder_with_packed_data_beside_it(put):
    put("d/a/1.png")
    put("d/features.npz", b"not ours")
    assert len(load("d")) == 1


# ---- image folders ------------------------------------------------------------------------------

JUNK = [
    "__MACOSX/a/._1.png", "__MACOSX/1.png", "a/._1.png", "a/@eaDir/1.png", "@eaDir/1.png",
    "a/.ipynb_checkpoints/1-checkpoint.png", ".ipynb_checkpoints/x.png", "a/.DS_Store",
    ".DS_Store", "a/Thumbs.db", "Thumbs.db", "desktop.ini", "a/DESKTOP.INI", "lost+found/x",
    ".thumbnails/1.png", "a/.thumbnails/1.png", "#recycle/1.png", "$RECYCLE.BIN/1.png",
    "System Volume Information/x", ".git/1.png", "a/__pycache__/x.pyc", "a/Icon\r",
    ".AppleDouble/1.png", "a/@__thumb.txt",
]  # fmt: skip


def test_junk(put):
    put("d/a/1.png")
    put("d/b/2.png")
    plain = load("d")
    for name in JUNK:
        put(f"d/{name}", b"junk")
    data = load("d")
    assert data.classes == ("a", "b")
    assert data.digest() == plain.digest()
    assert len(load("d", stream=True)) == 2


def test_junk_beside_packed_data(put):
    put_idx(put, "root/MNIST/raw")
    put("root/MNIST/raw/._train-images-idx3-ubyte", b"junk")
    put("root/__MACOSX/MNIST/raw/train-images-idx3-ubyte", b"junk")
    assert is_the_set(load("root"))


@pytest.mark.parametrize(
    ("files", "instead"),
    [
        (["d/a/1.png", "d/b/1.png"], ["d"]),
        (["d/d/a/1.png", "d/d/b/1.png", "d/__MACOSX/d/a/1.png"], ["d/d"]),
        (["d/e/f/g/a/1.png"], ["d/e/f/g"]),
        (
            ["d/test/a/1.png", "d/train/a/1.png", "d/train/b/1.png", "d/val/a/1.png"],
            ["d/train", "d/test", "d/val"],
        ),
        (["d/train/a/1.png", "d/test/1.png"], ["d/train"]),
        (["d/x/train/a/1.png", "d/x/test/1.png"], ["d/x/train"]),
        (["d/celeba/all/1.png", "d/celeba/list.txt"], ["d/celeba"]),
        (
            ["d/food/images/a/1.png", "d/food/images/b/1.png", "d/food/meta/x.txt"],
            ["d/food/images"],
        ),
        (["d/a/1.JPG", "d/a/2.Webp", "d/a/3.tIFF", "d/a/4.PGM", "d/a/5.bmp", "d/a/6.gif"], ["d"]),
    ],
)
def test_images_lie_deeper(put, files, instead):
    for file in files:
        put(file, b"" if file.endswith(".txt") else None)
    found = ["d"] if instead == ["d"] else advised("d")
    assert found == instead
    for source in found:
        load(source, channels=1)
        assert isinstance(load(source, channels=1, stream=True), ImageFiles)


def test_a_folder_among_the_images_of_a_class(put):
    for name in ("d/a/1.png", "d/a/small/1.png", "d/b/2.png"):
        put(name)
    with pytest.raises(
        ValueError, match=r"d/a: .*'small'; if it is not a class, take small out of there$"
    ):
        load("d")
    shutil.move("d/a/small", "small")
    assert load("d").classes == ("a", "b")


def test_a_folder_that_is_no_class(put):
    for name in ("d/a/1.png", "d/labels/1.txt", "d/labels/2.txt", "d/labels/readme"):
        put(name, None if name.endswith("png") else b"")
    message = (
        r"d/labels: a class folder without an image, it holds 2 \.txt, 1 without an ext.*\.webp"
    )
    with pytest.raises(ValueError, match=message + r".* take it out of d$"):
        load("d")
    shutil.move("d/labels", "labels")
    assert load("d").classes == ("a",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.mat", "2.mat", "x.TXT"], r"holds 2 \.mat, 1 \.txt, neither subfolders of images nor"),
        (["0001", "0002"], r"holds 2 without an extension, neither"),
        (["gzip.zip"], r"holds 1 \.zip, neither .* a packed set is unpacked first"),
        (["data_batch_1.bin"], r"holds 1 \.bin, neither .*CIFAR's python batches"),
        (["1.png"], "images without labels; put the images of each class into a subfolder"),
        ([], "empty, neither"),
        ([".DS_Store", "Thumbs.db"], "empty, neither"),
    ],
)
def test_nothing_that_can_be_read(put, tmp_path, names, message):
    (tmp_path / "d").mkdir()
    for name in names:
        put(f"d/{name}", b"x")
    with pytest.raises(ValueError, match=rf"^d: {message}"):
        load("d")


def test_links_in_a_circle(put, tmp_path):
    put("d/x/1.txt", b"")
    (tmp_path / "d" / "x" / "up").symlink_to(tmp_path / "d")
    with pytest.raises(ValueError, match="d/x: a class folder must hold images"):
        load("d")
    put_idx(put, "d/raw")
    assert is_the_set(load("d"))


def test_images_and_packed_sets_in_a_root(put):
    put_idx(put, "root/MNIST/raw")
    put("root/food/images/a/1.png")
    file, folder = advised("root")
    assert is_the_set(load(file))
    assert load(folder).classes == ("a",)

    put("root/b/1.png")
    assert len(advised("root")) == 2
    for name in ("MNIST", "food"):  # or take out what the error names
        with pytest.raises(ValueError, match=f"^root/{name}: .*take it out of root"):
            load("root")
        shutil.move(f"root/{name}", name)
    assert load("root").classes == ("b",)


# ---- names --------------------------------------------------------------------------------------


def test_a_folder_called_digits(put, tmp_path, monkeypatch):
    put("digits/a/1.png")
    assert len(load("digits")) == 1797
    assert canonical("digits") == "digits"
    for source in ("./digits", tmp_path / "digits", "digits/"):
        assert len(load(source)) == 1
        assert canonical(source) == f"folder:{tmp_path}/digits"
    assert canonical("nowhere") == "nowhere"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load("~/digits")) == 1
    assert canonical("~/digits") == f"folder:{tmp_path}/digits"


def test_a_run_called_digits(put):
    """Its folder does not become the data, neither of itself nor of the next run."""
    put("digits/checkpoints/readme.txt", b"")
    for out in ("digits", "other"):
        trainer = start("gan", data="digits", out=out, device="cpu")
        assert (trainer.config.data, len(trainer.data)) == ("digits", 1797)


def test_no_name():
    with pytest.raises(ValueError, match=r"^source '' is not the name of a data set"):
        load("")
