"""Training processes that cost no imports: forked from a server that has imported all there is.

The server is multiprocessing's own. It computes nothing and has a single thread, so that its
children start from a sound state; each checks that.
"""

import multiprocessing
import os
import resource
import sys
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
#: What the package imports late: the optimisers the compiler, a grid of samples Pillow.
LAZY = ("torch._dynamo", "PIL.PngImagePlugin")


def start(arguments, log, largest_file=None, prepare=None, prepare_with=None):
    """`gankernels` with these arguments as a process of its own; what it prints goes to `log`.

    Before, it calls `prepare(prepare_with)`, a function that can be imported.
    """
    CONTEXT.set_forkserver_preload(["children", "gankernels.cli", "gankernels.train", *LAZY])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
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
