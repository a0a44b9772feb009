"""Writes are atomic and change no other file."""

import errno
import multiprocessing
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from gankernels import _files as files
from gankernels._files import (
    append,
    copy_atomically,
    delete_leftovers,
    make_way,
    set_aside,
    temporary_file,
    temporary_name,
    write_atomically,
)
from gankernels.train import sample


def write(path, content=b"new"):
    write_atomically(Path(path), lambda file: file.write(content))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/file").write_bytes(b"old")
    (tmp_path / "one").symlink_to("far/file")
    (tmp_path / "two").symlink_to("one")
    (tmp_path / "dangling").symlink_to("far/later")
    for name in ("two", "dangling"):
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_bytes() == b"new"
    assert (tmp_path / "one").is_symlink()
    assert names(tmp_path / "far") == ["file", "later"]
    copy_atomically(tmp_path / "far/later", tmp_path / "two")
    assert (tmp_path / "two").is_symlink()


def test_a_pipe_is_written_to(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        seen = []
        reader = threading.Thread(target=lambda: seen.append(pipe.read_bytes()))  # noqa: B023
        reader.start()
        # As archives do it: back and forth, which a pipe does not allow.
        write_atomically(path, lambda file: (file.write(b"NEW"), file.seek(0), file.write(b"n")))
        reader.join()
        assert seen == [b"nEW"]
        assert stat.S_ISFIFO(pipe.stat().st_mode)
        assert link.is_symlink()
    assert names(tmp_path) == ["link", "pipe"]


def test_what_stands_for_a_descriptor_is_written_to(tmp_path):
    """As `--json /dev/stdout > file`: the file stays the one that stdout leads to."""
    with (tmp_path / "file").open("wb+") as file:
        file.write(b"before ")
        file.flush()
        (tmp_path / "link").symlink_to(f"/proc/self/fd/{file.fileno()}")
        write(tmp_path / "link")
        file.write(b" after")
        file.flush()
        assert (tmp_path / "file").read_bytes() == b"before new after"
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(tmp_path / "file"))


def test_a_folder_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a folder is where .* to be: '.*file'"):
        write(tmp_path / "file")
    assert names(tmp_path) == ["file"]


def test_modes(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "file")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
        (tmp_path / "file").chmod(0o604)
        write(tmp_path / "file")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o604
        sample.save_folder([torch.zeros(1, 1, 2, 2).byte()], None, tmp_path / "set")
        assert stat.S_IMODE((tmp_path / "set").stat().st_mode) == 0o750
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_the_owner_stays(tmp_path):
    write(tmp_path / "file")
    os.chown(tmp_path / "file", 1234, 1235)
    write(tmp_path / "file")
    found = (tmp_path / "file").stat()
    assert (found.st_uid, found.st_gid) == (1234, 1235)


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "n" * 251 + ".png"])
def test_names_as_long_as_the_limit(tmp_path, name):
    write(tmp_path / name, b"old")
    write(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"new"
    sample.save_folder([torch.zeros(1, 1, 2, 2).byte()], None, tmp_path / "x" / name)
    with pytest.warns(RuntimeWarning, match="is kept as"):
        aside = set_aside(tmp_path / name, "is bad")
    assert aside.read_bytes() == b"new"
    assert aside.name.endswith(".damaged")
    assert names(tmp_path) == sorted([aside.name, "x"])


def test_what_is_set_aside_replaces_nothing(tmp_path):
    for i in range(3):
        (tmp_path / "file").write_text(str(i))
        with pytest.warns(RuntimeWarning, match="file is bad: it is kept as file.damaged"):
            set_aside(tmp_path / "file", "is bad")
    assert [(tmp_path / f"file.damaged{x}").read_text() for x in ("", "-1", "-2")] == list("012")


def test_nobody_elses_temporary_files(tmp_path):
    """The names that were ours once, and those of another process, may be somebody's."""
    (tmp_path / ".set.tmp").mkdir()
    (tmp_path / ".set.tmp/mine").touch()
    (tmp_path / ".file.tmp").write_text("mine")
    sample.save_folder([torch.zeros(1, 1, 2, 2).byte()], None, tmp_path / "set")
    write(tmp_path / "file")
    delete_leftovers(tmp_path)
    assert names(tmp_path) == [".file.tmp", ".set.tmp", "file", "set"]
    assert names(tmp_path / ".set.tmp") == ["mine"]


def test_only_leftovers_of_the_dead_are_deleted(tmp_path):
    temporary_name(tmp_path).write_bytes(b"half of it")
    with temporary_file(tmp_path) as (file, path):
        delete_leftovers(tmp_path, tmp_path / "nowhere")
        assert names(tmp_path) == [path.name]
        file.write(b"all of it")
    assert names(tmp_path) == []


def test_a_file_that_was_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    real, made = files.create_temporary, []

    def create(folder):
        path, number = real(folder)
        if not made:
            path.unlink()
        made.append(path)
        return path, number

    monkeypatch.setattr(files, "create_temporary", create)
    write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert len(made) == 2


def _write_often(path, letter, barrier):
    barrier.wait()
    for _ in range(40):
        write(path, letter * 100_000)


def test_two_processes_and_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    path = tmp_path / "file"
    both = [context.Process(target=_write_often, args=(path, x, barrier)) for x in (b"a", b"b")]
    for process in both:
        process.start()
    barrier.wait()
    seen = set()
    while any(process.is_alive() for process in both):
        if path.exists():
            seen.add(path.read_bytes())
    assert [process.exitcode for process in both] == [0, 0]
    assert seen <= {b"a" * 100_000, b"b" * 100_000}
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_a_folder_that_cannot_be_synchronized(tmp_path, monkeypatch, number, recwarn):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("one", "two"):
        write(tmp_path / name)
    assert names(tmp_path) == ["one", "two"]
    (warning,) = recwarn
    assert f"{tmp_path} cannot be synchronized with its disk" in str(warning.message)


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_that_cannot_be_synchronized(tmp_path, monkeypatch, number, fails):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if fails:
        with pytest.raises(OSError, match=r"Input/output error: '.*file'"):
            write(tmp_path / "file")
    else:
        with pytest.warns(RuntimeWarning, match="cannot be synchronized"):
            write(tmp_path / "file")
    assert names(tmp_path) == ([] if fails else ["file"])


def test_an_interruption_is_what_it_is(tmp_path):
    """Through torch.save it arrives as a RuntimeError about the archive's end."""
    interrupted = []

    def save(file):
        class Slow:
            def write(self, part):
                if not interrupted:
                    interrupted.append(True)
                    raise KeyboardInterrupt
                return file.write(part)

            def flush(self):
                pass

        torch.save({"x": torch.zeros(10_000)}, Slow())

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", save)
    assert names(tmp_path) == []
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:  # that one is handled already
        with pytest.raises(ZeroDivisionError):
            write_atomically(tmp_path / "file", lambda file: 1 / 0)


def test_errors_name_the_file_and_not_the_temporary_one(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(arguments[0]), None, "file")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=r"busy: '[^']*file'$"):
        write(tmp_path / "file")


def test_files_do_not_become_the_standard_streams(tmp_path):
    pid = os.fork()
    if pid == 0:
        os.close(1)
        os.close(2)
        append(tmp_path / "log", b"line\n")
        with temporary_file(tmp_path) as (file, _):
            os._exit(0 if file.fileno() > 2 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "log").read_bytes() == b"line\n"


def test_a_folder_of_samples_into_an_empty_one(tmp_path):
    """Through a link, and without replacing it: it may be a mount, or where a shell is."""
    image = torch.zeros(1, 1, 2, 2).byte()
    (tmp_path / "empty").mkdir(mode=0o711)
    before = (tmp_path / "empty").stat()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "later").symlink_to("new")
    for name, real in (("link", "empty"), ("later", "new")):
        sample.save_folder([image], torch.tensor([3]), tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert names(tmp_path / real) == ["3"]
    after = (tmp_path / "empty").stat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)


@pytest.mark.filterwarnings("ignore:.*is kept as")
def test_making_way(tmp_path):
    (tmp_path / "samples").touch()
    (tmp_path / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").touch()
    for name in ("samples/x.png", "broken/x.png", "pipe", "folder", "link", "new", "new/new"):
        make_way(tmp_path / name)
    kept = [f"{name}.damaged" for name in ("broken", "folder", "pipe", "samples")]
    assert names(tmp_path) == sorted([*kept, "file", "link"])
