import numpy as np
import pytest
import torch
from PIL import Image

from gankernels.data import ImageData, to_float, to_uint8
from gankernels.data._pixels import convert_channels, resize


def make(n=10, channels=1, size=4, num_classes=2, name="made"):
    images = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)
    return ImageData(
        images, torch.arange(n) % num_classes, tuple(map(str, range(num_classes))), name
    )


def test_properties_and_repr():
    data = make(n=10, channels=3, size=4)
    assert (data.channels, data.size, data.num_classes, len(data)) == (3, 4, 2, 10)
    assert repr(data) == "ImageData('made': 10 images, 3x4x4, 2 classes)"


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2).long(), TypeError, "images must be torch.uint8"),
        (np.zeros((2, 1, 4, 4)), torch.zeros(2).long(), TypeError, "images must be a Tensor"),
        (torch.zeros(2, 2, 4, 4).byte(), torch.zeros(2).long(), ValueError, r"\(2, 2, 4, 4\)"),
        (torch.zeros(2, 1, 4, 5).byte(), torch.zeros(2).long(), ValueError, "square"),
        (torch.zeros(0, 1, 4, 4).byte(), torch.zeros(0).long(), ValueError, "not empty"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2), TypeError, "labels must be torch.int64"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(3).long(), ValueError, "one per image"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.tensor([0, 2]), ValueError, r"\[0, 2\)"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.tensor([-1, 0]), ValueError, r"\[0, 2\)"),
    ],
)
def test_wrong_tensors_are_refused(images, labels, error, message):
    with pytest.raises(error, match=message):
        ImageData(images, labels, ("a", "b"), "made")


def test_split_is_stratified_disjoint_and_deterministic():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 2 + [3])
    # Every image holds its own number, so that it can be recognized.
    images = torch.arange(73, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    data = ImageData(images.contiguous(), labels, ("a", "b", "c", "d"), "made")
    training, held_out = data.split(0.2, seed=3)
    assert training.labels.bincount().tolist() == [40, 16, 1, 1]
    assert held_out.labels.bincount(minlength=4).tolist() == [10, 4, 1, 0]
    numbers = [part.images[:, 0, 0, 0].tolist() for part in (training, held_out)]
    assert sorted(numbers[0] + numbers[1]) == list(range(73))
    assert all(labels[i] == label for i, label in zip(numbers[1], held_out.labels, strict=True))
    assert held_out.classes == data.classes

    assert data.split(0.2, seed=3)[1].images.equal(held_out.images)
    assert not data.split(0.2, seed=4)[1].images.equal(held_out.images)


def test_split_leaves_the_global_random_state_alone():
    data = make()
    before = torch.get_rng_state()
    data.split()
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("held_out", [0, 1, -0.1, 1.5])
def test_split_share_is_checked(held_out):
    with pytest.raises(ValueError, match=r"held_out must be in \(0, 1\)"):
        make().split(held_out)


def test_split_of_single_images_is_refused():
    with pytest.raises(ValueError, match="single image"):
        make(n=2, num_classes=2).split()


def test_digest_follows_content():
    data = make()
    same = ImageData(data.images.clone(), data.labels.clone(), data.classes, "other name")
    assert same.digest() == data.digest()
    pixel = data.images.clone()
    pixel[3, 0, 1, 2] ^= 1
    label = data.labels.clone()
    label[0] = 1
    for images, labels, classes in (
        (pixel, data.labels, data.classes),
        (data.images, label, data.classes),
        (data.images, data.labels, ("0", "x")),
        (data.images.view(10, 1, 4, 4).flip(3), data.labels, data.classes),
    ):
        assert ImageData(images, labels, classes, "made").digest() != data.digest()


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64, torch.float16):
        floats = to_float(levels, dtype)
        assert floats.dtype == dtype
        assert (floats[0], floats[255]) == (-1, 1)
        assert to_uint8(floats).equal(levels)
    # bfloat16 has 8 bits: near 1 its steps are coarser than a level.
    error = to_uint8(to_float(levels, torch.bfloat16)).int() - levels.int()
    assert error.abs().max() <= 1


def test_to_uint8_rounds_and_clamps():
    step = 2 / 255
    x = torch.tensor([-5, -1, -1 + 0.49 * step, -1 + 0.51 * step, 1 - 0.49 * step, 5, torch.inf])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert to_uint8(torch.tensor([torch.nan])).tolist() == [0]


def test_conversions_refuse_the_other_kind():
    with pytest.raises(TypeError, match=r"torch\.uint8, got torch\.float32"):
        to_float(torch.zeros(1))
    with pytest.raises(TypeError, match=r"floating point tensor, got torch\.uint8"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))


@pytest.mark.parametrize(("shape", "size"), [((40, 40), 17), ((8, 8), 28), ((9, 30), 12)])
def test_resize_is_pillows(shape, size):
    pixels = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    result = resize(torch.from_numpy(pixels).unsqueeze(1), size)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    for ours, image in zip(result[:, 0], pixels, strict=True):
        square = Image.fromarray(image[top : top + side, left : left + side])
        theirs = np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))
        assert (ours.int() - torch.tensor(theirs).int()).abs().max() <= 1


@pytest.mark.parametrize("chunk", [1, 3 * 64 * 100])
def test_conversions_go_beyond_one_chunk(monkeypatch, chunk):
    images = torch.randint(0, 256, (250, 3, 4, 4), dtype=torch.uint8)
    resized, gray = resize(images, 8), convert_channels(images, 1)
    monkeypatch.setattr("gankernels.data._pixels._CHUNK", chunk)
    result = resize(images, 8)
    assert result.shape == (250, 3, 8, 8)
    assert result.equal(resized)
    assert result[240:].equal(resize(images[240:], 8))
    assert convert_channels(images, 1).equal(gray)


def test_large_images_are_resized_one_at_a_time():
    """So that as many of them as would take 24 GiB as float32 never do."""
    images = torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8).expand(-1, 3, -1, -1)
    sizes = []

    def interpolate(x, size, **_):
        sizes.append(len(x))
        return x.new_zeros(len(x), 3, *size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.interpolate", interpolate)
        resize(images, 2500)
    assert sizes == [1, 1, 1]


def test_luma_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    ours = convert_channels(torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0), 1)
    assert ours[0, 0].numpy().tolist() == np.asarray(Image.fromarray(pixels).convert("L")).tolist()


def test_gray_is_repeated():
    gray = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    assert convert_channels(gray, 3).equal(torch.cat([gray] * 3, dim=1))
