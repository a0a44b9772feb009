import numpy as np
import pytest

from gankernels.data import load

RNG = np.random.default_rng(0)
LABELS = np.array([7, 2, 7, 2, 2])


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "set.npz"


@pytest.mark.parametrize("shape", [(5, 6, 6), (5, 1, 6, 6), (5, 6, 6, 1)])
def test_gray(path, shape):
    images = pixels(*shape)
    np.savez(path, images=images, labels=LABELS)
    data = load(path)
    assert data.images.shape == (5, 1, 6, 6)
    assert data.images.flatten().numpy().tolist() == images.flatten().tolist()
    assert data.labels.tolist() == [1, 0, 1, 0, 0]
    assert data.classes == ("2", "7")
    assert data.name == "set.npz"


def test_color_in_both_layouts(path):
    images = pixels(5, 6, 6, 3)
    np.savez_compressed(path, images=images, labels=LABELS)
    channels_last = load(path).images
    np.savez(path, images=images.transpose(0, 3, 1, 2), labels=LABELS[:, None])
    assert load(path).images.equal(channels_last)
    assert channels_last[3, 2, 4, 5] == images[3, 4, 5, 2]


def test_labels_may_be_names(path):
    np.savez(path, images=pixels(3, 4, 4), labels=np.array(["dog", "cat", "dog"]))
    data = load(path)
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": pixels(5, 6, 6)}, r"no array 'labels' among \['images'\]"),
        ({"x": pixels(5, 6, 6), "labels": LABELS}, r"no array 'images' among"),
        ({"images": pixels(5, 6, 6) / 255, "labels": LABELS}, "must be uint8 in 0..255, got float"),
        ({"images": pixels(5, 6, 6), "labels": LABELS / 2}, "integers or strings, got float64"),
        ({"images": pixels(5, 6, 6), "labels": LABELS[:4]}, r"one per image, \(5,\), got \(4,\)"),
        ({"images": pixels(5, 6, 6), "labels": pixels(5, 2)}, r"one per image, \(5,\)"),
        ({"images": pixels(5, 6, 6), "labels": np.array(3)}, r"one per image, \(5,\)"),
        ({"images": pixels(0, 6, 6), "labels": LABELS[:0]}, r"images are empty"),
        ({"images": np.array(np.uint8(3)), "labels": LABELS[:1]}, r"images must be \(N, H, W\)"),
        ({"images": pixels(5, 2, 6, 6), "labels": LABELS}, r"with C 1 or 3, got \(5, 2, 6, 6\)"),
        ({"images": pixels(5, 6, 4), "labels": LABELS}, "6x4, not square; give size="),
    ],
)
def test_wrong_arrays(path, arrays, message):
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=rf"set\.npz.*{message}"):
        load(path)


def test_objects_are_not_unpickled(path):
    np.savez(path, images=pixels(5, 6, 6), labels=np.array([object()] * 5))
    with pytest.raises(ValueError, match=r"set\.npz: not a readable \.npz of plain arrays"):
        load(path)


@pytest.mark.parametrize("kept", [0, 10, 300, -10])
def test_truncated_file_is_named(path, kept):
    np.savez_compressed(path, images=pixels(50, 6, 6), labels=np.arange(50))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"set\.npz: not a readable \.npz"):
        load(path)
