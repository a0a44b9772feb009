import io
import pickle
import tarfile

import numpy as np
import pytest

from gankernels.data import load

NAMES = ["airplane", "automobile", "bird", "cat", "deer"]
FOLDER = "cifar-10-batches-py"
PER_BATCH = 4
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5 * PER_BATCH, 3072), dtype=np.uint8)
LABELS = [i % len(NAMES) for i in range(5 * PER_BATCH)]


def batch(i):
    part = slice(i * PER_BATCH, (i + 1) * PER_BATCH)
    return {b"batch_label": b"x", b"labels": LABELS[part], b"data": PIXELS[part]}


def contents():
    files = {f"data_batch_{i + 1}": pickle.dumps(batch(i), protocol=4) for i in range(5)}
    files["batches.meta"] = pickle.dumps({b"label_names": [n.encode() for n in NAMES]}, protocol=4)
    return files


def python2_pickle(labels, pixels):
    """A batch byte for byte as Python 2's cPickle and numpy 1 wrote it: protocol 2, str data."""

    def string(raw):
        return b"T" + len(raw).to_bytes(4, "little") + raw

    def integer(value):
        return b"J" + value.to_bytes(4, "little", signed=True)

    dtype = (
        b"cnumpy\ndtype\n" + string(b"u1") + integer(0) + integer(1) + b"\x87R"
        b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        + integer(0) + b"\x85" + string(b"b") + b"\x87R"
        + b"(" + integer(1) + integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86"
        + dtype + b"\x89" + string(pixels.tobytes()) + b"tb"
    )  # fmt: skip
    return (
        b"\x80\x02}("
        + string(b"data") + array
        + string(b"labels") + b"](" + b"".join(map(integer, labels)) + b"e"
        + b"u."
    )  # fmt: skip


def write_folder(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {**files, "readme.html": b"<html>", "test_batch": b"unread"}.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def check(data):
    assert data.images.shape == (20, 3, 32, 32)
    assert data.images.reshape(20, -1).numpy().tolist() == PIXELS.tolist()
    assert data.labels.tolist() == LABELS
    assert data.classes == tuple(NAMES)


def test_archive(tmp_path):
    archive = write_archive(tmp_path / "cifar-10-python.tar.gz", contents())
    check(load(archive))
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]  # nothing unpacked


def test_folder(tmp_path):
    check(load(write_folder(tmp_path / FOLDER, contents())))


def test_as_python_2_wrote_it(tmp_path):
    files = contents()
    for i in range(5):
        part = batch(i)
        files[f"data_batch_{i + 1}"] = python2_pickle(part[b"labels"], part[b"data"])
    # The stand-in is what Python itself reads as a numpy array, too.
    read = pickle.loads(files["data_batch_1"], encoding="bytes")
    assert (read[b"data"] == PIXELS[:PER_BATCH]).all()
    check(load(write_folder(tmp_path / FOLDER, files)))


def test_fortran_order_and_str_keys(tmp_path):
    files = contents()
    rewritten = {"labels": LABELS[:PER_BATCH], "data": np.asfortranarray(PIXELS[:PER_BATCH])}
    files["data_batch_1"] = pickle.dumps(rewritten, protocol=4)
    check(load(write_folder(tmp_path / FOLDER, files)))


def test_size_and_channels(tmp_path):
    folder = write_folder(tmp_path / FOLDER, contents())
    assert load(folder, size=16, channels=1).images.shape == (20, 1, 16, 16)


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return open, (str(self.victim), "w")


def test_malicious_pickle_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "victim"
    attack = pickle.dumps({**batch(0), b"extra": Malicious(victim)}, protocol=4)
    pickle.loads(attack)[b"extra"].close()
    assert victim.exists()  # the attack works where pickle is trusted
    victim.unlink()

    for source in (
        write_folder(tmp_path / FOLDER, {**contents(), "data_batch_1": attack}),
        write_archive(tmp_path / "c.tar.gz", {**contents(), "data_batch_1": attack}),
    ):
        with pytest.raises(
            ValueError, match=r"data_batch_1: not a CIFAR-10 batch: it names .*open"
        ):
            load(source)
        assert not victim.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os\nsystem", "builtins\neval", "builtins\ngetattr", "numpy\nload",
        "numpy.core.multiarray\nscalar", "numpy\ndtype.__init__", "_codecs\nencode",
    ],
)  # fmt: skip
def test_no_other_name_is_admitted(tmp_path, name):
    content = b"\x80\x02c" + name.encode() + b"\n."
    folder = write_folder(tmp_path / FOLDER, {**contents(), "data_batch_3": content})
    with pytest.raises(ValueError, match=r"data_batch_3: not a CIFAR-10 batch: it names"):
        load(folder)


def test_no_dotted_name_reaches_past_the_records(tmp_path):
    # Protocol 4 resolves dotted names by attribute, such as numpy.ndarray.__class__.
    content = b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93."
    folder = write_folder(tmp_path / FOLDER, {**contents(), "data_batch_3": content})
    with pytest.raises(ValueError, match=r"it names numpy\.ndarray\.__init__"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 1, 50, 5000])
def test_truncated_batch_is_named(tmp_path, kept):
    files = contents()
    files["data_batch_2"] = files["data_batch_2"][:kept]
    with pytest.raises(ValueError, match=r"data_batch_2: not a CIFAR-10 batch"):
        load(write_folder(tmp_path / FOLDER, files))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_archive_is_named(tmp_path, share):
    archive = write_archive(tmp_path / "cifar.tar.gz", contents())
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cifar\.tar\.gz"):
        load(archive)


def test_missing_batch(tmp_path):
    files = contents()
    del files["data_batch_4"]
    with pytest.raises(ValueError, match=r"incomplete: no data_batch_4$"):
        load(write_folder(tmp_path / FOLDER, files))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"labels": [0]}, "data_batch_1: 4 images, but another number of labels"),
        ({b"labels": [0, 1, 2, 5]}, "a label outside the 5 classes"),
        ({b"labels": [0, 1, 2, b"3"]}, "a label outside the 5 classes"),
        ({b"labels": 3}, "data_batch_1: damaged, no 'labels' entry"),
        ({b"data": b"raw"}, "data_batch_1: damaged, no 'data' entry"),
        ({b"data": PIXELS[:4].astype(np.int16)}, "data_batch_1: damaged 'data' entry"),
        ({b"data": PIXELS[:4, :100]}, r"data_batch_1: damaged 'data' entry.*\(4, 100\)"),
    ],
)
def test_damaged_entries(tmp_path, change, message):
    damaged = pickle.dumps({**batch(0), **change}, protocol=4)
    with pytest.raises(ValueError, match=message):
        load(write_folder(tmp_path / FOLDER, {**contents(), "data_batch_1": damaged}))
