"""Malicious files are refused by name before they run code, block or take memory."""

import gzip
import io
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from gankernels.data import _files as files
from gankernels.data import cifar as cifar_module
from gankernels.data import load

GIB = 1 << 30
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 8), dtype=np.uint8)
LABELS = np.arange(6, dtype=np.uint8)


@pytest.fixture(autouse=True)
def bounded(tmp_path, monkeypatch):
    """Neither may a test hang, nor take more than a GiB, which would raise MemoryError."""

    def hang(*_):
        raise AssertionError("it hangs")

    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(20)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(source, *words, **settings):
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
        load(source, **settings)
    for word in words:
        assert word in str(caught.value)


def complaint_of(source, **settings):
    try:
        load(source, **settings)
    except ValueError as error:
        return str(error)


def picture(path="d/a/1.png", size=8):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (size, size), dtype=np.uint8)).save(path)


# ---- images -------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(any)\n%%EOF\n"
FOREIGN = {
    "eps": EPS,
    "eps for DOS": struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, len(EPS), 0, 0, 0, 0, 0xFFFF) + EPS,
    "wmf": b"\xd7\xcd\xc6\x9a\0\0" + b"\0" * 60,
    "fits": b"SIMPLE  =                    T" + b" " * 50,
    "hdf5": b"\x89HDF\r\n\x1a\n" + b"\0" * 60,
    "icns": b"icns" + b"\0" * 60,
    "psd": b"8BPS\0\1" + b"\0" * 60,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_other_decoders_are_never_started(monkeypatch, kind, name, stream):
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *command, **_: started.append(command))
    picture()
    with open(f"d/a/{name}", "wb") as file:
        file.write(FOREIGN[kind])
    refused("d", f"d/a/{name}: not a readable image: none of BMP, GIF", stream=stream)
    if stream:
        with pytest.raises(ValueError, match="not a readable image: none of"):
            load("d", size=8, channels=1, stream=True).read(np.array([1]))
    assert not started


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("place", ["pixels", "header", "random"])
def test_damaged_images_of_every_format(place):
    """Whatever a decoder raises is a ValueError with the file's name, or the damage is not seen."""
    rng = np.random.default_rng(len(place))
    refusals = 0
    os.makedirs("d/a")
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "ppm", "webp"):
        picture(f"./good.{suffix}", size=24)
        with open(f"good.{suffix}", "rb") as file:
            good = file.read()
        for _ in range(15):
            content = bytearray(good)
            low, high = {"pixels": (len(good) // 2, len(good)), "header": (0, 40)}.get(
                place, (0, len(good))
            )
            for at in rng.integers(low, high, 4):
                content[at] = rng.integers(256)
            with open(f"d/a/1.{suffix}", "wb") as file:
                file.write(content)
            complaint = complaint_of("d", size=8)
            if complaint is not None:
                assert complaint.startswith(f"d/a/1.{suffix}: not a readable image: ")
                assert "\n" not in complaint
                refusals += 1
        os.remove(f"d/a/1.{suffix}")
    assert refusals > 5


def png(width, height):
    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content)


@pytest.mark.parametrize("size", [None, 8])
def test_decompression_bomb(size):
    picture()
    with open("d/a/2.png", "wb") as file:
        file.write(png(60000, 60000))
    refused("d", "d/a/2.png: not a readable image: Image size (3600000000", size=size)


def test_images_that_change_after_they_are_listed():
    for i in range(4):
        picture(f"d/a/{i}.png")
    listed = load("d", stream=True)
    os.remove("d/a/0.png")
    os.remove("d/a/1.png")
    os.mkfifo("d/a/1.png")
    with open("d/a/2.png", "wb") as file:
        file.write(EPS)
    picture("d/a/3.png", size=11)
    for row, reason in enumerate(["[Errno 2]", "got a named pipe", "none of BMP"]):
        with pytest.raises(ValueError, match=f"d/a/{row}.png: not a readable image: ") as caught:
            listed.read(np.array([row]))
        assert reason in str(caught.value)
    assert listed.read(np.array([3]))["images"].shape == (1, 1, 8, 8)


# ---- what is no regular file --------------------------------------------------------------------


def special(path, kind):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
    else:
        os.symlink("/dev/zero", path)


KINDS = ["a named pipe", "a socket", "a device"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("linked", [False, True])
def test_special_files_are_not_opened(kind, linked):
    def put(path):
        special("pipe" if linked else path, kind)
        if linked:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            os.symlink(os.path.abspath("pipe"), path)

    def clear(path):
        shutil.rmtree(path.split("/")[0]) if "/" in path else os.remove(path)
        if linked:
            os.remove("pipe")

    for path in ("x.npz", "x.tar.gz", "train-images-idx3-ubyte", "x.png", "x"):
        put(path)
        refused(path, f"source '{path}' must be a file or a folder, got {kind}")
        clear(path)
    for suffix in ("", ".gz"):
        write_idx("d", suffix=suffix)
        os.remove(path := f"d/train-images-idx3-ubyte{suffix}")
        put(path)
        refused("d", path, f"must be a regular file, got {kind}")
        clear(path)
    for stream in (False, True):
        put("d/a/x.png")
        refused("d", "d/a/x.png", f"got {kind}", stream=stream)
        clear("d/a/x.png")
    write_idx("d")
    os.remove("d/train-labels-idx1-ubyte")
    put("d/train-labels-idx1-ubyte")
    refused("d", "d/train-labels-idx1-ubyte", f"got {kind}")
    clear("d/x")
    for name in ("data_batch_1", "batches.meta"):
        write_cifar("d")
        os.remove(f"d/{name}")
        put(f"d/{name}")
        refused("d", f"d/{name}", f"got {kind}")
        clear("d/x")
    write_idx("root/MNIST/raw")
    os.remove("root/MNIST/raw/train-images-idx3-ubyte")
    put("root/MNIST/raw/train-images-idx3-ubyte")
    refused("root", "root/MNIST/raw/train-images-idx3-ubyte", f"got {kind}")
    clear("root/x")
    put("d/set.npz")
    refused("d", "d/set.npz", f"got {kind}")


# ---- IDX ----------------------------------------------------------------------------------------


def idx_header(*shape, kind=8):
    return struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape)


def write_idx(folder, images=None, labels=None, suffix=""):
    os.makedirs(folder, exist_ok=True)
    images = idx_header(6, 8, 8) + PIXELS.tobytes() if images is None else images
    labels = idx_header(6) + LABELS.tobytes() if labels is None else labels
    for name, content in (("images-idx3", images), ("labels-idx1", labels)):
        with open(f"{folder}/train-{name}-ubyte{suffix}", "wb") as file:
            file.write(content)


@pytest.fixture(scope="module")
def zeros():
    """10 GiB of zeros in gzip."""
    return gzip.compress(bytes(GIB // 64), 9) * 640


def test_idx_that_expands(zeros):
    # Within what the format allows, DEFLATE being able to expand a thousandfold.
    header = gzip.compress(idx_header(10 * 1024, 1024, 1024))
    write_idx("d", images=header + zeros, suffix=".gz")
    refused("d", "d/train-images-idx3-ubyte.gz: damaged IDX file: ", "as no images compress")
    # Beyond what its header says.
    content = gzip.compress(idx_header(6, 8, 8) + PIXELS.tobytes()) + zeros
    write_idx("d", images=content, suffix=".gz")
    refused("d", "d/train-images-idx3-ubyte.gz: damaged IDX file: longer than the 384 bytes")
    write_idx("d", images=gzip.compress(idx_header(0, 8, 8)) + zeros, suffix=".gz")
    refused("d", "d/train-images-idx3-ubyte.gz: damaged IDX file: longer than the 0 bytes")


def test_idx_larger_than_memory():
    write_idx("d", images=idx_header(1 << 20, 1024, 1024))
    os.truncate("d/train-images-idx3-ubyte", 16 + (1 << 40))
    refused("d", "train-images-idx3-ubyte: damaged IDX file: needs 1,099,511,627,776 bytes of mem")


# ---- .npz ---------------------------------------------------------------------------------------


def npy(shape, dtype="|u1", version=b"\x01\x00", fortran=False):
    text = repr({"descr": dtype, "fortran_order": fortran, "shape": shape}).encode() + b"\n"
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + version + size + text


LABELS_NPY = npy((6,)) + LABELS.tobytes()
IMAGES_NPY = npy((6, 8, 8)) + PIXELS.tobytes()


def write_npz(path="x.npz", images=IMAGES_NPY, labels=LABELS_NPY, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("images.npy", images)
        archive.writestr("labels.npy", labels)


def test_npz_bomb():
    """Eight GiB of zeros, consistent in all that it says."""
    n = 8 * 1024 + 1
    with zipfile.ZipFile("x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.npy", npy((n,)) + bytes(n))
    # Spliced together, since compressing as much would take half a minute.
    block = zlib.compressobj(9, zlib.DEFLATED, -15)
    header = npy((n, 1024, 1024))
    start = block.compress(header) + block.flush(zlib.Z_FULL_FLUSH)
    mebi = block.compress(bytes(1 << 20)) + block.flush(zlib.Z_FULL_FLUSH)
    content = start + mebi * n + block.flush()
    with zipfile.ZipFile("x.npz", "a") as archive:
        entry = zipfile.ZipInfo("images.npy")
        archive.writestr(entry, content)
        entry.compress_type, entry.file_size = zipfile.ZIP_DEFLATED, len(header) + (n << 20)
    with open("x.npz", "r+b") as file:  # the local header, too
        raw = bytearray(file.read())
        raw[entry.header_offset + 8 : entry.header_offset + 10] = struct.pack("<H", 8)
        file.seek(0)
        file.write(raw)
    refused("x.npz", "x.npz: not a readable .npz of plain arrays: ", "as no images compress")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": npy((1 << 33, 8, 8)) + bytes(100)},
            "images.npy promises 549,755,813,888 bytes",
        ),
        ({"images": npy((6, 8, 8)) + bytes(383)}, "images.npy promises 384 bytes, but has"),
        ({"images": npy((6, 8, 8)) + bytes(385)}, "images.npy promises 384 bytes, but has"),
        ({"images": npy((-6, 8, -8)) + bytes(384)}, "images.npy promises 384 bytes, but has"),
        ({"images": npy((6, 1 << 62, 1 << 62)) + bytes(9)}, "images.npy promises "),
        ({"images": npy((0, 1 << 62, 1 << 62))}, "images are empty"),
        ({"labels": npy((6,), "<U100000000") + bytes(9)}, "labels.npy promises 2,400,000,000 by"),
        ({"labels": npy((6,), "|O") + pickle.dumps([print])}, "Objects in labels.npy are not read"),
        ({"images": npy((6,), "|O") + b"x"}, "Objects in images.npy are not read"),
        ({"images": npy((6, 8, 8), [("a", "|O")]) + b"x"}, "Objects in images.npy are not read"),
        ({"labels": npy((6,), "<f8") + bytes(48)}, "labels must be integers or strings"),
        ({"images": npy((6, 8, 8), version=b"\x09\x00") + bytes(9)}, "images.npy"),
        ({"images": npy((6, 8, 8), "__import__('os')") + bytes(384)}, "not a readable .npz"),
        ({"images": npy("x" * 20000) + bytes(384)}, "not a readable .npz"),
        ({"images": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"(" * 100}, "not a readable .npz"),
        ({"images": b""}, "not a readable .npz"),
        ({"images": npy((6, 8, 8)) + bytes(384), "labels": b""}, "not a readable .npz"),
    ],
)
def test_npz_headers_that_lie(arrays, message):
    write_npz(**arrays)
    refused("x.npz", "x.npz: ", message)


def test_npz_header_is_read_in_part():
    """A header may claim 4 GiB, and numpy would read them before it finds them too many."""
    write_npz(images=b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 20) + b" " * (1 << 20))
    refused("x.npz", "EOF: reading array header, expected 1048576 bytes got 65524")


def test_npz_larger_than_memory(monkeypatch):
    write_npz()
    monkeypatch.setattr(files, "available", lambda: 383)
    refused("x.npz", "x.npz: not a readable .npz of plain arrays: needs 384 bytes of memory, 383")


def test_npz_beyond_zip():
    for flag, method in ((1, 0), (0, 93)):  # encrypted; compressed in a way that zipfile lacks
        write_npz()
        with open("x.npz", "rb") as file:
            raw = bytearray(file.read())
        for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            at = raw.find(signature)
            while at >= 0:
                raw[at + offset : at + offset + 4] = struct.pack("<HH", flag, method)
                at = raw.find(signature, at + 4)
        with open("x.npz", "wb") as file:
            file.write(raw)
        refused("x.npz", "x.npz: not a readable .npz of plain arrays: ")


# ---- CIFAR --------------------------------------------------------------------------------------


def batch(**more):
    pixels = RNG.integers(0, 256, (2, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": pixels, b"labels": [0, 1], **more}, 4)


def write_cifar(folder):
    os.makedirs(folder, exist_ok=True)
    for name, content in cifar().items():
        with open(f"{folder}/{name}", "wb") as file:
            file.write(content)


def cifar():
    names = pickle.dumps({b"label_names": [b"a", b"b"]}, 4)
    return {"batches.meta": names, **{f"data_batch_{i + 1}": batch() for i in range(5)}}


def tar(members, path="c.tar.gz", end=b"", claim=()):
    """A tar in gzip whose members called in `claim` say that they have other sizes."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            start = raw.tell()
            archive.addfile(info, io.BytesIO(content))
            if name in dict(claim):
                info.size = dict(claim)[name]
                raw.seek(start)
                raw.write(info.tobuf(tarfile.GNU_FORMAT))
                raw.seek(0, io.SEEK_END)
    with open(path, "wb") as file:
        file.write(gzip.compress(raw.getvalue()) + end)


def test_cifar_of_any_damage():
    """A byte flipped anywhere, and every cut."""
    tar(cifar())
    with open("c.tar.gz", "rb") as file:
        good = file.read()
    assert len(load("c.tar.gz")) == 10
    rng = np.random.default_rng(1)
    damaged = [good[:-cut] for cut in (1, 5, 8, 9, 100, 10000)]
    for at in (*rng.integers(10, len(good), 25), len(good) - 2, len(good) - 6):
        damaged.append(good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :])
    for content in damaged:
        with open("c.tar.gz", "wb") as file:
            file.write(content)
        refused("c.tar.gz", "c.tar.gz: ")


@pytest.mark.parametrize("name", ["data_batch_1", "readme.html", "data_batch_9", "batches.meta"])
def test_cifar_that_claims_a_terabyte(name):
    tar({name: b"x", **cifar()} if name not in cifar() else cifar(), claim=[(name, 1 << 40)])
    refused("c.tar.gz", "c.tar.gz: damaged archive: ", "bytes are more than CIFAR's")


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g", b"0", b"S"])
def test_tar_of_zeros_without_end(zeros, kind):
    """As a long name, a long link, attributes, a file, a sparse one: none is read into memory."""
    info = tarfile.TarInfo("data_batch_1")
    info.type, info.size = kind, 10 * GIB
    with open("c.tar.gz", "wb") as file:
        file.write(gzip.compress(info.tobuf(tarfile.GNU_FORMAT)) + zeros)
    refused("c.tar.gz", "c.tar.gz: ")


def test_sparse_file_of_a_terabyte():
    info = tarfile.TarInfo("data_batch_1")
    info.type = b"S"
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 0)
    header[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    with open("c.tar.gz", "wb") as file:
        file.write(gzip.compress(header + bytes(1024)))
    refused("c.tar.gz", "1,099,511,627,776 bytes are more than CIFAR's")


def test_cifar_that_expands_behind_its_end(zeros, monkeypatch):
    monkeypatch.setattr(cifar_module, "_MAX_BYTES", 1 << 26)
    tar(cifar(), end=zeros)
    refused("c.tar.gz", "c.tar.gz: damaged archive: ", "bytes are more than CIFAR's")


def test_cifar_in_a_folder_that_is_too_large():
    write_cifar("d")
    os.truncate("d/data_batch_2", 1 << 40)
    refused("d", "d/data_batch_2: 1,099,511,627,776 bytes are more than CIFAR's")


def test_pickle_of_many_steps(monkeypatch):
    """A byte can make an object of 56."""
    monkeypatch.setattr(cifar_module, "_MAX_STEPS", 10_000)
    write_cifar("d")
    with open("d/data_batch_1", "wb") as file:
        file.write(b"\x80\x04" + b"]" * 20_000 + b".")
    refused("d", "d/data_batch_1: not a CIFAR-10 batch: it takes too many steps")


NESTED = b"]" * 20_000 + b"a" * 19_999


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04]r\xff\xff\xff\xff.",  # a table of 2^32 places
        b"\x80\x04]p4000000000\n.",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 42) + b".",  # a bytearray of 4 TiB
        b"\x80\x05\x8e" + struct.pack("<Q", 1 << 62) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b".",
        b"\x80\x02cos\nsystem\n.",
        b"\x80\x02(S'echo'\nios\nsystem\n.",
        b"\x80\x02\x82\x01.",  # a code of copyreg's table
        b"\x80\x02P1\n.",
        b"\x80\x04" + NESTED + b".",
        b"\x80\x04}\x8c\x0blabel_names]" + NESTED + b"as.",
        b"\x80\x04}\x8c\x04data" + NESTED + b"s.",
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, [1]]}, 4),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1 << 80]}, 4),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, True]}, 4),
        pickle.dumps({b"data": np.zeros((2, 3072), object), b"labels": [0, 1]}, 4),
        pickle.dumps({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}, 4),
        pickle.dumps([1], 4),
    ],
)
@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_pickles(content, name):
    write_cifar("d")
    with open(f"d/{name}", "wb") as file:
        file.write(content)
    has_places = content[3:4] in (b"r", b"p")
    refused("d", "d", "it names place 4," if has_places else name)


def test_cifar_without_images():
    write_cifar("d")
    empty = {b"data": np.zeros((0, 3072), np.uint8), b"labels": []}
    for i in range(5):
        with open(f"d/data_batch_{i + 1}", "wb") as file:
            pickle.dump(empty, file, 4)
    refused("d", "d: holds no images")


# ---- sizes that cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [100_000, 10**9, 10**18])
def test_sizes_that_do_not_fit(size):
    picture()
    picture("d/a/2.png")
    write_npz()
    for source, settings in (("d", {}), ("d", {"stream": True}), ("x.npz", {})):
        refused(source, f"{size}", "bytes of memory", size=size, **settings)


def test_free_memory_follows_the_limit_of_the_process():
    assert 0 < files.available() <= GIB
