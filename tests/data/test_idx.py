import gzip
import struct

import numpy as np
import pytest

from gankernels.data import load

N, H, W = 7, 4, 4
PIXELS = np.random.default_rng(0).integers(0, 256, (N, H, W), dtype=np.uint8)
LABELS = np.array([3, 0, 5, 3, 0, 5, 5], dtype=np.uint8)


def idx_bytes(array, kind=8):
    return (
        bytes([0, 0, kind, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + (array.tobytes())
    )


def write(folder, images=None, labels=None, gz=False, prefix="train", separator="-"):
    images = idx_bytes(PIXELS) if images is None else images
    labels = idx_bytes(LABELS) if labels is None else labels
    for name, content in (
        (f"{prefix}-images{separator}idx3-ubyte", images),
        (f"{prefix}-labels{separator}idx1-ubyte", labels),
    ):
        path = folder / (f"{name}.gz" if gz else name)
        path.write_bytes(gzip.compress(content) if gz else content)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("separator", ["-", "."])
def test_reads_pixels_and_labels(tmp_path, gz, separator):
    write(tmp_path, gz=gz, separator=separator)
    data = load(tmp_path)
    assert data.name == tmp_path.name
    assert data.images.shape == (N, 1, H, W)
    assert data.images[:, 0].numpy().tolist() == PIXELS.tolist()
    assert data.classes == ("0", "3", "5")  # the labels that occur
    assert data.labels.tolist() == [1, 0, 2, 1, 0, 2, 2]


def test_reads_one_named_file(tmp_path):
    write(tmp_path, prefix="t10k", gz=True)
    assert len(load(str(tmp_path / "t10k-images-idx3-ubyte.gz"))) == N


def test_goes_by_content_not_by_suffix(tmp_path):
    write(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(f"{path.name}.gz"))
    assert len(load(tmp_path)) == N


def test_size_and_channels(tmp_path):
    write(tmp_path)
    assert load(tmp_path, size=9, channels=3).images.shape == (N, 3, 9, 9)


def test_larger_than_one_read(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (1800, 28, 28), dtype=np.uint8)
    write(tmp_path, idx_bytes(pixels), idx_bytes(np.arange(1800, dtype=np.uint8)), gz=True)
    assert load(tmp_path).images[:, 0].numpy().tobytes() == pixels.tobytes()


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("kept", [0, 3, 10, 16, 16 + N * H * W - 1])
def test_truncated_data_is_named(tmp_path, gz, kept):
    write(tmp_path, images=idx_bytes(PIXELS)[:kept], gz=gz)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.*(truncated|ends inside)"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [2, 15, 40, 60, -8, -1])
def test_truncated_gzip_is_named(tmp_path, kept):
    write(tmp_path, gz=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: damaged IDX file"):
        load(tmp_path)


def test_flipped_bit_in_gzip_is_named(tmp_path):
    write(tmp_path, gz=True)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # in the checksum
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz: damaged IDX file.*CRC"):
        load(tmp_path)


@pytest.mark.parametrize("gz", [False, True])
def test_absurd_header_asks_for_no_memory(tmp_path, gz):
    header = bytes([0, 0, 8, 3]) + struct.pack(">3I", *[2**32 - 1] * 3)
    write(tmp_path, images=header + b"\0" * 100, gz=gz)
    with pytest.raises(ValueError, match="truncated, the header promises"):
        load(tmp_path)


def test_trailing_bytes(tmp_path):
    write(tmp_path, labels=idx_bytes(LABELS) + b"\0")
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.*longer than the 7 bytes"):
        load(tmp_path)


def test_wrong_element_type(tmp_path):
    write(tmp_path, images=idx_bytes(PIXELS, kind=0x0D))
    with pytest.raises(ValueError, match="starts with 00 00 0d 03, expected 00 00 08 03"):
        load(tmp_path)


def test_swapped_files(tmp_path):
    write(tmp_path, images=idx_bytes(LABELS), labels=idx_bytes(PIXELS))
    with pytest.raises(ValueError, match=r"train-images.*(ends inside|starts with)"):
        load(tmp_path)


def test_missing_labels(tmp_path):
    write(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="no labels, train-labels-idx1-ubyte"):
        load(tmp_path)


def test_other_number_of_labels(tmp_path):
    write(tmp_path, labels=idx_bytes(LABELS[:-1]))
    with pytest.raises(ValueError, match="7 images but 6 labels"):
        load(tmp_path)


def test_no_images(tmp_path):
    write(tmp_path, idx_bytes(PIXELS[:0]), idx_bytes(LABELS[:0]))
    with pytest.raises(ValueError, match="holds no images"):
        load(tmp_path)


def test_not_square_needs_a_size(tmp_path):
    write(tmp_path, images=idx_bytes(PIXELS[:, :, :3]))
    with pytest.raises(ValueError, match="4x3, not square; give size="):
        load(tmp_path)
    # Of the rows, the three in the middle (rounded up) remain.
    assert load(tmp_path, size=3).images[:, 0].numpy().tolist() == PIXELS[:, :3, :3].tolist()
