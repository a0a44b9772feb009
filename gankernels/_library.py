"""Loads the compiled kernels and chooses between them and the reference for each tensor."""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from gankernels._version import __version__

_P = ParamSpec("_P")
_R = TypeVar("_R")

_FOLDER = Path(__file__).parent
_CPU_CAPABILITIES = ("default", "avx2", "avx512")
_BACKENDS = ("auto", "reference")

_backend = "auto"
_load_error: str | None = None
_record: dict[str, Any] = {}
_entered: list[list[Any]] = []  # every open use_backend, and the choice around it
_changing = threading.Lock()
_served: set[tuple[torch.device, str]] = set()
_warned: set[tuple[torch.device, str]] = set()

# The oldest driver, by the CUDA version that it reports, that runs the runtime of a toolkit. A
# driver runs all older toolkits, and all newer ones of its own major version.
_DRIVERS = {12: "525", 13: "580"}


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


class use_backend(AbstractContextManager["use_backend"]):  # noqa: N801  (reads as a function, like torch.no_grad)
    """Selects what computes the ops, as a function or as a context manager.

    The choice applies to the whole process. A context may be entered again, also inside itself. If
    contexts end in another order than they began, as in threads and generators, the choice before
    the first is restored when the last has ended.

    Args:
        name: ``"auto"`` uses compiled kernels where available; ``"reference"`` always uses plain
            PyTorch.

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
            # The first time, restore the choice from before this object was created.
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
                _entered[i][1] = around  # the next one was entered inside this one
            else:
                _backend = around


def called_while_tracing(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Lets torch.compile call a function of constants instead of looking inside: the same as
    torch.compiler.assume_constant_result, which imports the compiler, and that takes seconds."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def has_kernel(x: Tensor, op: str) -> bool:
    """Whether there is a compiled kernel of this op for this tensor; warns once if not."""
    if _backend == "reference" or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False  # an exported graph must run without gankernels installed
    return _serves(x.device, op)


@called_while_tracing
def _serves(device: torch.device, op: str) -> bool:
    if (device, op) in _served:
        return True
    if (device, op) in _warned:
        return False
    kind = device.type
    reason = None if LOADED and kind == "meta" else why_not(kind, device)
    if reason is None and kind != "meta" and not _registered(op, kind):
        reason = f"{op} has no kernel for {kind} yet"
    if reason is None:
        _served.add((device, op))
        return True
    _warned.add((device, op))
    warnings.warn(f"{op} runs as plain PyTorch on {kind}: {reason}", stacklevel=5)
    return False


def _registered(op: str, kind: str) -> bool:
    return kind in ("cpu", "cuda") and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"gankernels::{op}", kind.upper()
    )


def why_not(kind: str, device: torch.device | None = None) -> str | None:
    """Why there are no kernels for this kind of device, or None if there are.

    For CUDA also why this device, or the current one, cannot run them.
    """
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
        if torch.version.hip is not None:
            return f"torch {torch.__version__} is built for ROCm, the kernels for CUDA"
        # Without a GPU there are only fake tensors, as in tracing.
        if not torch.cuda.is_available():
            return None
        return _driver_too_old() or _not_built_for(device)
    return f"there are kernels for cpu and cuda, none for {kind}"


def _driver_too_old() -> str | None:
    """Why this machine's driver cannot run the CUDA runtime that is linked in, or None."""
    needed = int(_record["cuda"].split(".")[0])
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # 12080 is CUDA 12.8's
    if driver // 1000 >= needed:
        return None
    number = f" ({_DRIVERS[needed]} or newer)" if needed in _DRIVERS else ""
    return (
        f"the kernels are built with CUDA {_record['cuda']}, which needs a driver of CUDA "
        f"{needed}{number}, and this machine's is of CUDA {driver // 1000}.{driver % 1000 // 10}; "
        f"update the driver or reinstall with a toolkit of CUDA {driver // 1000}"
    )


def _not_built_for(device: torch.device | None) -> str | None:
    """Why nothing in the build runs on this GPU's architecture, or None."""
    capability = torch.cuda.get_device_capability(device)
    if any(_runs(built, capability) for built in _record["cuda_architectures"]):
        return None
    return (
        f"this GPU has compute capability {capability[0]}.{capability[1]}, and the kernels are "
        f"built for {', '.join(_record['cuda_architectures'])}; reinstall with "
        f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
    )


def _runs(built: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs what was built: sm_90, sm_90a, compute_120."""
    parts = re.fullmatch(r"(\w+)_(\d+)(\d)([af]?)", built)
    if parts is None:
        return False
    kind, major, minor, specific = parts.groups()
    of = (int(major), int(minor))
    if specific == "a":  # for that architecture only
        return capability == of
    if kind == "sm" or specific == "f":  # for its generation
        return capability[0] == of[0] and capability >= of
    return capability >= of  # PTX


def build_info() -> dict[str, Any]:
    """Describes the build, the hardware that it is for, and the parts that are active here.

    Returns:
        A dict with ``version``; ``torch`` (running) and ``built_with_torch``; ``compiler``;
        ``cpu_instruction_sets`` (compiled) and ``cpu_capability`` (in use); ``cuda`` (the toolkit's
        version or None); ``cuda_architectures``; ``cuda_in_use``; ``cuda_off_because`` (None if
        CUDA kernels are in use); ``backend``; ``kernels_off_because`` (None if they are loaded).
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
