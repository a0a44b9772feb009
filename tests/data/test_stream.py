"""Images that are decoded when they are drawn."""

import os
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from gankernels.data import BatchLoader, ImageData, ImageFiles, load

RNG = np.random.default_rng(0)


def save(path, *shape, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def pictures(tmp_path):
    """Two classes of pictures of several sizes, kinds and colors."""
    for i in range(5):
        save(tmp_path / "pictures" / "ant" / f"{i}.jpg", 12 + i, 10, 3)
    for i in range(4):
        save(tmp_path / "pictures" / "zebra ü" / f"{i}.png", 9, 9)
    return tmp_path / "pictures"


@pytest.fixture
def loader():
    """BatchLoader, closed at the end."""
    made = []

    def make(*args, **settings):
        made.append(BatchLoader(*args, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def take(batches, n):
    return [(b["images"].tolist(), b["labels"].tolist()) for b in islice(batches, n)]


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_files_are_what_memory_would_hold(pictures, channels):
    whole = load(pictures, size=8, channels=channels)
    files = load(pictures, size=8, channels=channels, stream=True)
    assert isinstance(files, ImageFiles)
    for name in ("channels", "size", "num_classes", "classes", "name"):
        assert getattr(files, name) == getattr(whole, name), name
    assert len(files) == len(whole)
    assert files.labels.equal(whole.labels)
    rows = torch.tensor([8, 0, 3, 3])
    read, expected = files.read(rows), whole.read(rows)
    assert read["images"].equal(whole.images[rows])
    assert read["images"].dtype == torch.uint8
    assert read.keys() == expected.keys() == files.spec.keys()
    assert all(read[name].equal(expected[name]) for name in read)
    assert files.spec == whole.spec
    assert repr(files) == repr(whole).replace("ImageData", "ImageFiles")


def test_size_and_color_come_from_the_headers(tmp_path):
    for name in ("a/1.png", "a/2.png"):
        save(tmp_path / name, 6, 6)
    files = load(tmp_path, stream=True)
    assert (files.size, files.channels) == (6, 1)
    save(tmp_path / "b" / "3.png", 6, 6, 3)
    assert load(tmp_path, stream=True).channels == 3
    save(tmp_path / "b" / "4.png", 7, 7, 3)
    with pytest.raises(ValueError, match=r"4\.png: is 7x7, but .*1\.png is 6x6; give size="):
        load(tmp_path, stream=True)


def test_no_file_is_opened_where_all_is_known(pictures):
    for path in pictures.rglob("*.*"):
        path.write_bytes(b"")
    files = load(pictures, size=8, channels=3, stream=True)
    assert len(files) == 9
    with pytest.raises(ValueError, match=r"4\.jpg: not a readable image"):
        files.read(torch.tensor([4]))


def test_other_kinds_are_read_into_memory(tmp_path):
    np.savez(
        tmp_path / "set.npz", images=RNG.integers(0, 256, (3, 4, 4), np.uint8), labels=[0, 1, 0]
    )
    assert isinstance(load(tmp_path / "set.npz", stream=True), ImageData)


@pytest.mark.parametrize("kind", ["files", "memory"])
def test_draws_depend_on_seed_and_number_alone(pictures, loader, kind):
    data = load(pictures, size=8, stream=kind == "files")
    expected = take(loader(data, 6, seed=3), 7)
    assert len({str(batch) for batch in expected}) == 7
    known = {str(image) for image in load(pictures, size=8).images.tolist()}
    assert all(str(image) in known for images, _ in expected for image in images)
    assert not any(batch in expected for batch in take(loader(data, 6, seed=4), 7))
    for workers in (0, 1, 2):
        assert take(loader(data, 6, seed=3, workers=workers), 7) == expected
        assert take(loader(data, 6, seed=3, first=5, workers=workers), 2) == expected[5:]


def test_labels_go_with_their_images(loader):
    images = torch.arange(50, dtype=torch.uint8).view(-1, 1, 1, 1)
    data = ImageData(images, torch.arange(50), tuple(map(str, range(50))), "made")
    drawn, labels = next(loader(data, 5000, seed=0)).values()
    assert drawn.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert drawn.flatten().equal(labels.byte())
    # With replacement and uniform: 100 of each are expected.
    counts = labels.bincount(minlength=50)
    assert counts.min() > 60
    assert counts.max() < 150


@pytest.mark.parametrize("workers", [0, 2])
def test_random_state_and_signals_are_left_alone(pictures, loader, workers):
    data = load(pictures, size=8, stream=True)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    handler = signal.getsignal(signal.SIGCHLD)
    next(loader(data, 4, seed=0, workers=workers))
    assert torch.get_rng_state().equal(before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert signal.getsignal(signal.SIGCHLD) is handler


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_file_is_named_in_one_line(pictures, loader, workers):
    path = pictures / "ant" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    batches = loader(load(pictures, size=8, stream=True), 64, seed=0, workers=workers)
    with pytest.raises(ValueError, match=r"2\.jpg: not a readable image") as caught:
        next(batches)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_close_ends_workers(pictures, loader):
    batches = loader(load(pictures, size=8, stream=True), 4, seed=0, workers=2)
    next(batches)
    workers = pids(batches)
    assert len(workers) == 2
    batches.close()
    assert gone(workers, 2)
    assert list(batches) == []
    batches.close()


def test_workers_end_with_the_process(pictures):
    """Without close(), and although they ignore SIGTERM."""
    code = f"""
from gankernels.data import BatchLoader, load
batches = BatchLoader(load({str(pictures)!r}, size=8, stream=True), 4, seed=0, workers=1)
next(batches)
print(batches._workers[0].pid, flush=True)
raise KeyError
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        worker = int(process.stdout.readline())
        try:
            _, error = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            raise
    assert b"KeyError" in error
    assert gone([worker], 2)


def test_stop_signals_are_left_to_the_trainer(pictures, loader):
    batches = loader(load(pictures, size=8, stream=True), 4, seed=0, workers=2)
    expected = take(loader(load(pictures, size=8), 4, seed=0), 20)
    first = take(batches, 1)
    for pid in pids(batches):
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert first + take(batches, 19) == expected


def test_killed_worker_is_an_error_and_no_hang(pictures, loader):
    batches = loader(load(pictures, size=8, stream=True), 4, seed=0, workers=2)
    next(batches)
    os.kill(pids(batches)[0], signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"died with status -9; .* use fewer workers"):
        take(batches, 100)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"first": -1}, "first must be at least 0, got -1"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
    ],
)
def test_wrong_arguments(setting, message):
    data = ImageData(torch.zeros(2, 1, 4, 4).byte(), torch.tensor([0, 1]), ("a", "b"), "made")
    settings = {"batch_size": 4, "seed": 0, **setting}
    with pytest.raises(ValueError, match=message):
        BatchLoader(data, **settings)


@pytest.mark.cuda
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_on_the_gpu(pictures, loader, workers):
    data = load(pictures, size=8, stream=True)
    expected = take(loader(data, 6, seed=3), 9)
    batches = loader(data, 6, seed=3, workers=workers, device="cuda")
    images, labels = next(batches)
    assert images.is_cuda
    assert labels.is_cuda
    assert [(images.tolist(), labels.tolist()), *take(batches, 8)] == expected


def pids(batches):
    return [worker.pid for worker in batches._workers]


def gone(processes, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(os.path.exists(f"/proc/{pid}") for pid in processes):
            return True
        time.sleep(0.01)
    return False
