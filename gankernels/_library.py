"""Loads the compiled kernels and decides, tensor by tensor, between them and the reference."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from gankernels._version import __version__

_FOLDER = Path(__file__).parent
_CPU_CAPABILITIES = ("default", "avx2", "avx512")
_BACKENDS = ("auto", "reference")

_backend = "auto"
_load_error: str | None = None
_record: dict = {}
_entered: list[list] = []  # of every use_backend that is open: itself, and the choice around it
_changing = threading.Lock()
_served: set[tuple[str, str]] = set()  # (kind of device, op)
_warned: set[tuple[str, str]] = set()


def _load() -> None:
    global _load_error, _record
    library = _FOLDER / "libgankernels.so"
    if not library.exists():
        _load_error = (
            "the kernels are not compiled: install the package (pip install .) or run "
            "`python setup.py build_ext --inplace` in its source folder"
        )
        return
    try:
        torch.ops.load_library(str(library))
        _record = json.loads((_FOLDER / "_build.json").read_text())
    except OSError as error:
        _load_error = (
            f"the compiled kernels cannot be loaded into torch {torch.__version__}: {error}"
        )


_load()
LOADED = _load_error is None


class use_backend(AbstractContextManager):  # noqa: N801  (reads as a function, like torch.no_grad)
    """Selects what computes the ops, as a function or as a context manager.

    The choice is the whole process's. A context may be entered again, also inside itself; contexts
    that end in another order than they began, as in threads and generators, leave the choice as it
    was before the first when the last has ended.

    Args:
        name: ``"auto"`` uses compiled kernels wherever there are some; ``"reference"`` uses plain
            PyTorch throughout.

    Raises:
        ValueError: for any other name.

    Example::

        with gankernels.use_backend("reference"):
            expected = layer(x)
    """

    def __init__(self, name: str) -> None:
        global _backend
        if name not in _BACKENDS:
            raise ValueError(f"name must be one of {_BACKENDS}, got {name!r}")
        self._name = name
        with _changing:
            self._before, _backend = [_backend], name

    def __enter__(self) -> use_backend:
        global _backend
        with _changing:
            # The first time, what was chosen before this object was made.
            around = self._before.pop() if self._before else _backend
            _entered.append([self, around])
            _backend = self._name
        return self

    def __exit__(self, *_: object) -> None:
        global _backend
        with _changing:
            i = max(i for i, (context, _) in enumerate(_entered) if context is self)
            _, around = _entered.pop(i)
            if i < len(_entered):
                _entered[i][1] = around  # the next one was entered inside of this one
            else:
                _backend = around


def called_while_tracing(function: Callable) -> Callable:
    """Lets torch.compile call a function of constants instead of looking inside: the same as
    torch.compiler.assume_constant_result, which imports the compiler, and that takes seconds."""
    function._dynamo_marked_constant = True
    return function


def has_kernel(x: Tensor, op: str) -> bool:
    """Whether a compiled kernel of this op serves this tensor; warns once where none does."""
    if _backend == "reference" or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False  # an exported graph is to run where there is no gankernels
    return _serves(x.device.type, op)


@called_while_tracing
def _serves(kind: str, op: str) -> bool:
    if (kind, op) in _served:
        return True
    if LOADED and (kind == "meta" or _registered(op, kind)):
        _served.add((kind, op))
        return True
    if (kind, op) not in _warned:
        _warned.add((kind, op))
        reason = why_not(kind) or f"{op} has no kernel for {kind} yet"
        warnings.warn(f"{op} runs as plain PyTorch on {kind}: {reason}", stacklevel=5)
    return False


def _registered(op: str, kind: str) -> bool:
    return kind in ("cpu", "cuda") and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"gankernels::{op}", kind.upper()
    )


def why_not(kind: str) -> str | None:
    """Why there are no kernels for this kind of device, or None where there are."""
    if _load_error:
        return _load_error
    if kind == "cpu":
        return None
    if kind == "cuda":
        if not _record["cuda"]:
            return (
                "this build has no CUDA kernels; install the CUDA toolkit (nvcc) and reinstall "
                "with GANKERNELS_CUDA=1"
            )
        return None
    return f"there are kernels for cpu and cuda, none for {kind}"


def build_info() -> dict:
    """Returns what was built, for which hardware, and what is in use here.

    Returns:
        A dict with ``version``; ``torch`` (running) and ``built_with_torch``; ``compiler``;
        ``cpu_instruction_sets`` (compiled) and ``cpu_capability`` (in use); ``cuda`` (the toolkit's
        version or None); ``cuda_architectures``; ``cuda_in_use``; ``cuda_off_because`` (None where
        CUDA kernels are in use); ``backend``; ``kernels_off_because`` (None where they are loaded).
    """
    cuda_off = why_not("cuda")
    if cuda_off is None and torch.version.cuda is None:
        cuda_off = f"torch {torch.__version__} is a CPU-only build"
    if cuda_off is None and not torch.cuda.is_available():
        cuda_off = "torch finds no usable NVIDIA GPU" + (
            " (CUDA 13 needs driver 580 or newer)" if _record["cuda"].startswith("13") else ""
        )
    capability = _CPU_CAPABILITIES[torch.ops.gankernels.cpu_capability()] if LOADED else None
    return {
        "version": __version__,
        "torch": torch.__version__,
        "built_with_torch": _record.get("torch"),
        "compiler": _record.get("compiler"),
        "cpu_instruction_sets": _record.get("cpu_instruction_sets", []),
        "cpu_capability": capability,
        "cuda": _record.get("cuda"),
        "cuda_architectures": _record.get("cuda_architectures", []),
        "cuda_in_use": cuda_off is None,
        "cuda_off_because": cuda_off,
        "backend": _backend,
        "kernels_off_because": _load_error,
    }
