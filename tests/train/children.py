"""Training processes that are forked from a server, to save the time of imports.

The server is multiprocessing's fork server. It computes nothing and has a single thread, so that
its children start from a clean state; each of them checks that.
"""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from multiprocessing import forkserver
from pathlib import Path

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parent))),
}
#: What the package imports late: the optimizers the compiler, a grid of samples Pillow.
LAZY = ("torch._dynamo", "PIL.PngImagePlugin")


def serve():
    """Have the server run, with all that is imported there."""
    CONTEXT.set_forkserver_preload(["children", "gankernels.cli", "gankernels.train", *LAZY])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


def start(arguments, log, largest_file=None, prepare=None, prepare_with=None):
    """`gankernels` with these arguments as a process of its own; what it prints goes to `log`.

    Before, it calls `prepare(prepare_with)`, a function that can be imported.
    """
    serve()
    more = str(log), largest_file, prepare, prepare_with
    process = CONTEXT.Process(target=run, args=(list(map(str, arguments)), *more))
    process.start()
    return process


def run(arguments, log, largest_file, prepare, prepare_with):
    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from gankernels.cli import main

    if prepare is not None:
        prepare(prepare_with)
    sys.exit(main(arguments))


def run_many(cases, log, results, memory, seconds):
    """`gankernels` on many lists of arguments in one process, which a signal or time may end.

    A run stops after a step. To `results` goes a line for every case: status and what it printed,
    or the traceback. The process may take so many bytes of memory, and so long for a case.
    """
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(0)
    os.chdir(Path(results).parent)  # some name places by less than a path
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    from gankernels.cli import main
    from gankernels.train import Trainer, report
    from gankernels.train.tensorboard import TensorBoard

    Trainer._stopping = lambda self: True
    report.available = TensorBoard.available = lambda: False  # slow, and not what is tried
    with open(results, "a") as file:
        for case in cases:
            signal.alarm(seconds)
            printed = io.StringIO()
            try:
                with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
                    outcome = main(case), printed.getvalue()
            except BaseException:
                outcome = None, printed.getvalue() + traceback.format_exc()
            file.write(json.dumps(outcome) + "\n")
            file.flush()
