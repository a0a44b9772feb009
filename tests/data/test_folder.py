import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from gankernels.data import load

RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path, array_or_image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array_or_image
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(path, **options)
    return path


def test_subfolders_are_the_classes(tmp_path):
    expected = {}
    for name in ("zebra/b.png", "ant/10.png", "ant/09.PNG"):
        expected[name] = pixels(6, 6, 3)
        save(tmp_path / name, expected[name])
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    data = load(tmp_path)
    assert data.classes == ("ant", "zebra")
    assert data.labels.tolist() == [0, 0, 1]
    assert data.name == tmp_path.name
    order = ["ant/09.PNG", "ant/10.png", "zebra/b.png"]
    assert data.images.permute(0, 2, 3, 1).numpy().tolist() == [
        expected[name].tolist() for name in order
    ]


def test_one_class_is_fine(tmp_path):
    save(tmp_path / "only" / "a.png", pixels(4, 4))
    assert load(tmp_path).classes == ("only",)


def test_gray_stays_gray_unless_one_is_colored(tmp_path):
    gray = pixels(5, 5)
    save(tmp_path / "a" / "1.png", gray)
    save(tmp_path / "a" / "2.png", Image.fromarray(gray).convert("LA"))
    data = load(tmp_path)
    assert data.channels == 1
    assert data.images[:, 0].numpy().tolist() == [gray.tolist()] * 2
    save(tmp_path / "a" / "3.png", pixels(5, 5, 3))
    assert load(tmp_path).channels == 3
    assert load(tmp_path).images[0].numpy().tolist() == [gray.tolist()] * 3
    assert load(tmp_path, channels=1).channels == 1


def test_formats_and_sizes_are_brought_to_one(tmp_path):
    save(tmp_path / "a" / "gray.png", pixels(9, 9))
    save(tmp_path / "a" / "rgb.jpg", pixels(40, 30, 3))
    save(tmp_path / "a" / "rgba.png", pixels(17, 64, 4))
    save(tmp_path / "b" / "palette.png", Image.fromarray(pixels(12, 12, 3)).quantize(16))
    save(tmp_path / "b" / "cmyk.jpeg", Image.fromarray(pixels(12, 12, 3)).convert("CMYK"))
    save(tmp_path / "b" / "bits.bmp", Image.fromarray(pixels(12, 12)).convert("1"))
    data = load(tmp_path, size=8)
    assert data.images.shape == (6, 3, 8, 8)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_the_central_square_is_kept(tmp_path):
    wide = np.zeros((4, 10), np.uint8)
    wide[:, 3:7] = 200
    save(tmp_path / "a" / "wide.png", wide)
    assert load(tmp_path, size=4).images.eq(200).all()
    assert load(tmp_path, size=2).images.eq(200).all()


def test_palette_colors(tmp_path):
    colors = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 8, 7]]], np.uint8)
    save(tmp_path / "a" / "p.png", Image.fromarray(colors).quantize(4))
    assert Image.open(tmp_path / "a" / "p.png").mode == "P"
    assert load(tmp_path).images[0].permute(1, 2, 0).numpy().tolist() == colors.tolist()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_shown_on_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (10, 10, 10, 255))
    image.putpixel((1, 2), (10, 10, 10, 0))
    if mode == "P":
        image = image.quantize(4)
    path = save(tmp_path / "a" / "t.png", image.convert(mode))
    assert Image.open(path).mode == mode
    result = load(tmp_path, channels=1).images[0, 0]
    assert result[2, 1] == 255
    assert result.eq(10).sum() == 15


def test_sixteen_bits_keep_their_range(tmp_path):
    deep = np.array([[0, 255], [256 * 100 + 7, 65535]], np.uint16)
    path = save(tmp_path / "a" / "deep.png", deep)
    assert Image.open(path).mode == "I;16"
    assert load(tmp_path).images[0, 0].tolist() == [[0, 0], [100, 255]]


UPPER = np.arange(256).reshape(16, 16)
DEEP = (UPPER * 256 + UPPER[::-1]).astype(np.uint16)


def png(depth, color, pixels, **chunks):
    """PNGs that Pillow does not write."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, depth, color, 0, 0, 0))
    more = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + more + end


def tiff(bits, photometric, pixels, order="<", orientation=1, alpha=0):
    tags = {
        256: 16, 257: 16, 258: bits, 259: 1, 262: photometric, 273: 8, 274: orientation, 277: 1,
        278: 16, 279: len(pixels),
    }  # fmt: skip
    if alpha:
        tags |= {277: 2, 338: alpha}
    result = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(pixels))
    result += pixels + struct.pack(f"{order}H", len(tags))
    for tag in sorted(tags):
        if alpha and tag == 258:
            result += struct.pack(f"{order}HHIHH", tag, 3, 2, bits, bits)
        else:
            result += struct.pack(f"{order}HHII", tag, 4, 1, tags[tag])
    return result + bytes(4)


def twelve_bits():
    pairs = (DEEP >> 4).astype(int).reshape(-1, 2).tolist()
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)


GREYS = {
    "pgm": b"P5 16 16 65535\n" + DEEP.astype(">u2").tobytes(),
    "plain.pgm": b"P2 16 16 65535\n" + b" ".join(b"%d" % value for value in DEEP.flatten()),
    "12.pgm": b"P5 16 16 4095\n" + (DEEP >> 4).astype(">u2").tobytes(),
    "pnm": b"P5 16 16 65535\n" + DEEP.astype(">u2").tobytes(),
    "png": png(16, 0, DEEP.astype(">u2")),
    "alpha.png": png(16, 4, np.stack([DEEP, np.full_like(DEEP, 65535)], -1).astype(">u2")),
    "tif": tiff(16, 1, DEEP.astype("<u2").tobytes()),
    "big-endian.tif": tiff(16, 1, DEEP.astype(">u2").tobytes(), ">"),
    "white-is-zero.tif": tiff(16, 0, (~DEEP).astype("<u2").tobytes()),
    "turned.tif": tiff(16, 1, DEEP[::-1, ::-1].astype("<u2").tobytes(), orientation=3),
    "12.tif": tiff(12, 1, twelve_bits()),
    "packed.tif": {"compression": "tiff_lzw"},
    "deflated-big-endian.tif": {"compression": "tiff_adobe_deflate"},
    "8.tif": tiff(8, 1, UPPER.astype(np.uint8).tobytes()),
    "8-white-is-zero.tif": tiff(8, 0, (255 - UPPER).astype(np.uint8).tobytes()),
    "8.pgm": b"P5 16 16 255\n" + UPPER.astype(np.uint8).tobytes(),
}


@pytest.mark.parametrize("name", GREYS)
def test_upper_eight_bits_of_every_container(tmp_path, name):
    content = GREYS[name]
    if isinstance(content, dict):
        save(
            tmp_path / "a" / f"x.{name}", DEEP.astype(">u2" if "big" in name else "<u2"), **content
        )
    else:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / f"x.{name}").write_bytes(content)
    data = load(tmp_path)
    assert data.channels == 1
    assert data.images[0, 0].tolist() == UPPER.tolist()
    assert load(tmp_path, stream=True).read(torch.tensor([0]))["images"].equal(data.images)


def test_transparent_values_of_deep_gray(tmp_path):
    (tmp_path / "a").mkdir()
    clear = int(DEEP[0, 5])
    content = png(16, 0, DEEP.astype(">u2"), tRNS=struct.pack(">H", clear))
    (tmp_path / "a" / "1.png").write_bytes(content)
    expected = UPPER.copy()
    expected[0, 5] = 255
    assert load(tmp_path).images[0, 0].tolist() == expected.tolist()


def test_gray_times_alpha(tmp_path):
    (tmp_path / "a").mkdir()
    stored = np.stack([UPPER // 2, np.full_like(UPPER, 128)], -1).astype(np.uint8)
    path = tmp_path / "a" / "1.tif"
    path.write_bytes(tiff(8, 1, stored.tobytes(), alpha=1))
    assert Image.open(path).mode == "La"
    expected = UPPER // 2 + 127  # half of the gray, half white
    assert np.abs(load(tmp_path).images[0, 0].numpy() - expected).max() <= 2


@pytest.mark.parametrize("suffix", ["gif", "png", "apng", "tif", "webp"])
def test_first_frame(tmp_path, suffix):
    first, second = (Image.new("RGB", (6, 6), color) for color in ("red", "blue"))
    options = {"lossless": True} if suffix == "webp" else {}
    save(tmp_path / "a" / f"1.{suffix}", first, save_all=True, append_images=[second], **options)
    assert load(tmp_path).images[0, :, 3, 3].tolist() == [255, 0, 0]


@pytest.mark.parametrize("name", ["float.tiff", "float.pnm", "32.tif"])
def test_pixels_without_a_range_are_refused(tmp_path, name):
    path = tmp_path / "a" / name
    values = RNG.random((4, 4)).astype(np.float32)
    if name == "float.pnm":
        path.parent.mkdir()
        path.write_bytes(b"Pf\n4 4\n-1.0\n" + values.tobytes())
    else:
        save(path, values if name == "float.tiff" else values.astype(np.int32))
    with pytest.raises(ValueError, match=rf"{path}.*mode '[FI]' have no fixed range; save them"):
        load(tmp_path)


def test_orientation_is_applied(tmp_path):
    picture = np.zeros((4, 4), np.uint8)
    picture[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    save(tmp_path / "a" / "turned.png", picture, exif=exif)
    assert load(tmp_path).images[0, 0].tolist() == picture[::-1].tolist()


def test_sizes_that_differ_need_a_size(tmp_path):
    save(tmp_path / "a" / "1.png", pixels(4, 4))
    save(tmp_path / "a" / "2.png", pixels(6, 5))
    with pytest.raises(ValueError, match=r"2\.png: is 6x5, but .*1\.png is 4x4; give size="):
        load(tmp_path)


def test_not_square_needs_a_size(tmp_path):
    save(tmp_path / "a" / "1.png", pixels(4, 6))
    with pytest.raises(ValueError, match=r"1\.png: is 4x6, not square; give size="):
        load(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_image_is_named(tmp_path, suffix):
    save(tmp_path / "a" / f"0.{suffix}", pixels(64, 64, 3))
    path = save(tmp_path / "a" / f"1.{suffix}", pixels(64, 64, 3))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=rf"{path}: not a readable image"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_what_is_no_image_is_named(tmp_path, content):
    save(tmp_path / "a" / "0.png", pixels(4, 4))
    (tmp_path / "a" / "1.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"1\.png: not a readable image"):
        load(tmp_path)


def test_images_without_labels(tmp_path):
    save(tmp_path / "1.png", pixels(4, 4))
    with pytest.raises(ValueError, match="images without labels; put the images of each class"):
        load(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: empty"):
        load(tmp_path)


def test_empty_class(tmp_path):
    save(tmp_path / "a" / "1.png", pixels(4, 4))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "note.txt").touch()
    with pytest.raises(ValueError, match=rf"{tmp_path / 'b'}: a class folder without an image"):
        load(tmp_path)


def test_one_level_too_high(tmp_path):
    save(tmp_path / "train" / "a" / "1.png", pixels(4, 4))
    with pytest.raises(ValueError, match=rf"load {tmp_path / 'train'} instead"):
        load(tmp_path)
