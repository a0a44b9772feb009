"""One process at a time in a run folder."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from gankernels.train import lock
from gankernels.train.lock import RunLock

fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "DEAD", 0.3)


@pytest.fixture
def held(tmp_path):
    taken = RunLock(tmp_path)
    taken.acquire()
    yield taken
    taken.release()


def record(folder):
    return json.loads((folder / ".lock").read_text())


def test_the_second_is_refused_and_the_first_named(held, tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} is in use: process {os.getpid()} on .*, "):
        RunLock(tmp_path).acquire()
    held.release()
    assert list(tmp_path.iterdir()) == []
    RunLock(tmp_path).acquire()


def test_a_trainer_is_refused_before_it_writes(run, held, tmp_path):
    before = (tmp_path / ".lock").read_text()
    trainer = run(steps=5, out=str(tmp_path))
    with pytest.raises(ValueError, match="is in use: process"):
        trainer.fit()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert (tmp_path / ".lock").read_text() == before
    held.release()
    trainer.fit()
    assert not (tmp_path / ".lock").exists()


def _hold(folder, ready, workers):
    RunLock(folder).acquire()
    for _ in range(workers):
        fork.Process(target=time.sleep, args=(20,)).start()
    ready.set()
    time.sleep(20)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_killed_one_leaves_is_in_nobodys_way(tmp_path, workers):
    """Nor do workers that live on for a moment."""
    ready = fork.Event()
    process = fork.Process(target=_hold, args=(tmp_path, ready, workers))
    process.start()
    assert ready.wait(10)
    with pytest.raises(ValueError, match=f"process {process.pid} on"):
        RunLock(tmp_path).acquire()
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        children = [int(pid) for pid in file.read().split()]
    assert len(children) == workers
    process.kill()
    process.join()
    taken = RunLock(tmp_path)
    taken.acquire()
    assert record(tmp_path)["pid"] == os.getpid()
    taken.release()
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _race(folder, barrier, results):
    mine = RunLock(folder)
    barrier.wait()
    try:
        mine.acquire()
        results.put("taken")
        time.sleep(0.5)
        mine.release()
    except ValueError:
        results.put("refused")


@pytest.mark.parametrize("locks", [True, False])
def test_of_many_one_gets_it(tmp_path, monkeypatch, locks):
    if not locks:
        no_locks(monkeypatch)
        monkeypatch.setattr(lock, "BEAT", 0.2)
    barrier, results = fork.Barrier(4), fork.Queue()
    all_ = [fork.Process(target=_race, args=(tmp_path, barrier, results)) for _ in range(4)]
    for process in all_:
        process.start()
    assert sorted(results.get(timeout=20) for _ in all_) == ["refused"] * 3 + ["taken"]
    for process in all_:
        process.join()
    assert list(tmp_path.iterdir()) == []


def no_locks(monkeypatch):
    def flock(number, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_locks_of_the_system_the_process_is_looked_for(held, tmp_path, monkeypatch):
    no_locks(monkeypatch)
    with pytest.raises(ValueError, match="is in use"):
        RunLock(tmp_path).acquire()
    mine = record(tmp_path)
    # The same number again, of another process that began at another time; and of nobody.
    for change in ({"started": 1}, {"pid": 2**22 + 1}, {"pid": "x"}):
        (tmp_path / ".lock").write_text(json.dumps({**mine, **change}))
        RunLock(tmp_path).acquire()
        assert record(tmp_path)["started"] == mine["started"]


@pytest.mark.parametrize("alive", [True, False])
def test_another_machine_is_watched_for_signs_of_life(tmp_path, recwarn, alive):
    """Its lock of the system's may not reach us; containers with equal numbers are no machines."""
    path = tmp_path / ".lock"
    there = {"host": "there", "pid": os.getpid(), "boot": "another", "since": "noon"}
    path.write_text(json.dumps(there))
    stop = threading.Event()

    def live():
        while alive and not stop.wait(0.02):
            os.utime(path)

    beats = threading.Thread(target=live)
    beats.start()
    mine = RunLock(tmp_path)
    try:
        if alive:
            with pytest.raises(ValueError, match=r"is in use: process .* on there, since noon"):
                mine.acquire()
            assert record(tmp_path) == there
        else:
            mine.acquire()
        (warning,) = recwarn
        assert f"was left by process {os.getpid()} on there" in str(warning.message)
    finally:
        stop.set()
        beats.join()
        mine.release()


def test_another_container_on_this_machine_is_not_waited_for(held, tmp_path, recwarn):
    left = {**record(tmp_path), "host": "container", "processes": "pid:[1]"}
    held.release()
    (tmp_path / ".lock").write_text(json.dumps(left))
    RunLock(tmp_path).acquire()
    assert not recwarn


def test_signs_of_life(held, tmp_path):
    first = (tmp_path / ".lock").stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while (tmp_path / ".lock").stat().st_mtime_ns == first:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("content", [b"", b"\0\0", b"[1]", b"{", b'{"pid": []}', b"[" * 10**5])
def test_a_damaged_record_is_in_nobodys_way(tmp_path, content, recwarn):
    (tmp_path / ".lock").write_bytes(content)
    RunLock(tmp_path).acquire()
    assert record(tmp_path)["pid"] == os.getpid()


def test_a_folder_in_place_of_the_lock(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.warns(RuntimeWarning, match=r"\.lock is not a file: it is kept as \.lock\.damaged"):
        RunLock(tmp_path).acquire()


def test_a_lock_that_was_deleted_or_taken_over(held, tmp_path):
    held.check()
    (tmp_path / ".lock").unlink()
    held.check()
    assert record(tmp_path)["pid"] == os.getpid()
    with pytest.raises(ValueError, match="is in use"):
        RunLock(tmp_path).acquire()
    (tmp_path / ".lock").write_text(json.dumps({"pid": 7, "host": "there"}))
    with pytest.raises(ValueError, match="was taken over by process 7 on there"):
        held.check()
    held.release()
    assert record(tmp_path)["pid"] == 7  # it is not ours to delete


def test_a_folder_that_cannot_be_written_to(run, tmp_path):
    (tmp_path / "file").touch()
    trainer = run(steps=5, out=str(tmp_path / "file" / "run"))
    with pytest.raises(NotADirectoryError):
        trainer.fit()
    assert trainer.step == 0
