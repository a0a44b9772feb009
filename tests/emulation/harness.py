"""Helpers of the tests of all emulated kernels.

A problem is a frozen dataclass of sizes, types and options. Its solution holds random inputs and,
pass by pass, what float64 autograd makes of them. `check_all` runs every pass in several orders of
threads and blocks, and compares.
"""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# The errors of one rounding to the type, and of computing in the accumulation type before it.
ROUNDING = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-8, "float16": 2.0**-11}
COMPUTED = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 1e-5, "float16": 1e-5}
# Under the sanitizers, which do not look at the values, one order is enough.
SEEDS = (0,) if "GANKERNELS_EMULATION" in os.environ else (0, 1, 2)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a tensor; numpy has no bfloat16."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return tensor.detach().contiguous().numpy()


class Problem:
    """The base of all problems. The kernels read their options from the fields."""

    dtype: str

    @property
    def accumulator(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def options(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        changed = (f"{k}={v}" for k, v in vars(self).items() if v != getattr(type(self), k))
        return "-".join(changed) or "default"


class Result(NamedTuple):
    want: torch.Tensor
    scale: torch.Tensor | float  # errors of computing in the accumulation type are relative to it


class Pass(NamedTuple):
    """A kernel, the names of the arrays that it reads, and all that it can write."""

    kernel: str
    inputs: tuple[str, ...]
    outputs: dict[str, Result]


class Solution:
    """The base of all solutions: attributes are inputs by their name, in float64."""

    passes: Sequence[Pass]
    element_dims: int  # of tensors of the problem's type; all others have the accumulation type

    def __init__(self, problem: Problem, seed: int = 0):
        self.p = problem
        self.generator = torch.Generator().manual_seed(seed)

    def random(
        self, *shape: int, dtype: str, scale: float = 1.0, offset: float = 0.0
    ) -> torch.Tensor:
        """Normal numbers, quantized to the type."""
        value = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return (offset + scale * value).to(DTYPES[dtype]).double()

    def dtype_of(self, tensor: torch.Tensor) -> str:
        return self.p.dtype if tensor.dim() == self.element_dims else self.p.accumulator

    def pack(self, tensor: torch.Tensor) -> np.ndarray:
        """The memory of a tensor as a kernel sees it."""
        return to_numpy(tensor.to(DTYPES[self.dtype_of(tensor)]))

    def unpack(self, array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if tensor.dtype == torch.int16:
            tensor = tensor.view(torch.bfloat16)
        return tensor.double().reshape(like.shape)

    def empty(self, like: torch.Tensor) -> np.ndarray:
        return self.pack(torch.full_like(like, torch.nan))

    def inputs(self, *names: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays of these names, and the options of a call that gets them."""
        return {name: self.pack(getattr(self, name)) for name in names}, self.p.options

    def check(self, name: str, array: np.ndarray, result: Result) -> None:
        """Every element within one rounding of float64, apart from what float32 computes."""
        got, (want, scale) = self.unpack(array, result.want), result
        dtype = self.dtype_of(want)
        allowed = ROUNDING[dtype] * want.abs() + COMPUTED[self.p.dtype] * scale
        if dtype == "float16":  # half the distance between its subnormals
            allowed = allowed + 2.0**-25
        wrong = ~((got - want).abs() <= allowed)  # NaN is wrong
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{name} of {self.p}: {int(wrong.sum())} of {want.numel()} elements, first {at}: "
                f"{got[at].item()!r} instead of {want[at].item()!r}"
            )


def call(
    emulated: ModuleType,
    solution: Solution,
    number: int,
    outputs: Iterable[str] = (),
    given: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Runs one of the passes, checks what it writes (`outputs`, or everything) and returns it.

    `given` are arrays that it reads instead of the solution's own.
    """
    kernel, names, results = solution.passes[number]
    given = given or {}
    arrays, options = solution.inputs(*(name for name in names if name not in given))
    written = {name: solution.empty(results[name].want) for name in outputs or results}
    getattr(emulated, kernel)({**arrays, **given}, written, options)
    for name, array in written.items():
        solution.check(f"{kernel}.{name}", array, results[name])
    return written


def run(emulated: ModuleType, solution: Solution) -> dict[str, np.ndarray]:
    """Runs and checks all passes, each of which reads what earlier ones have written."""
    arrays, latest = {}, {}
    for number, (kernel, names, _) in enumerate(solution.passes):
        given = {name: latest[name].copy() for name in names if name in latest}
        latest |= (written := call(emulated, solution, number, given=given))
        arrays |= {f"{kernel}.{name}": array for name, array in written.items()}
    return arrays


def check_all(emulated: ModuleType, solution: Solution, seeds: Iterable[int] = SEEDS) -> None:
    """Right, and the same bit for bit in every order in which threads and blocks run."""
    first = None
    for seed in seeds:
        emulated.set_seed(seed)
        arrays = run(emulated, solution)
        first = first or arrays
        for name, array in arrays.items():
            assert array.tobytes() == first[name].tobytes(), f"{name} depends on the order"


def check_every_kernel_is_launched(
    emulated: ModuleType, op: str, solutions: Iterable[Solution], count: int
) -> None:
    """These solutions launch every instance of the op's kernels in the library: `count` of them."""
    emulated.take_launches()
    for solution in solutions:
        run(emulated, solution)
    launched = {name for name, *_ in emulated.take_launches()}
    library = next(Path(emulated.__file__).parent.glob("libkernels_*.so"))
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    pattern = rf"[0-9a-f]+ [A-Za-z] (void gankernels::cuda::{op}::\w*kernel<.*\))\n"
    built = {m[1] for m in re.finditer(pattern, symbols)}
    assert built == launched
    assert len(built) == count


def parametrize(*problems: Problem) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("problem", problems, ids=str)
