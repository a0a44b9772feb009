"""The CUDA kernels of batch_norm_leaky_relu, on the emulated device, against float64 autograd.

A device has 1, 4 or 132 multiprocessors (problem.device), which decides into how many parts a
channel is divided. More than 64 KiB of x per block's channels are divided at all.
"""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from .problem import DTYPES, Problem, Solution, check, to_numpy, vary

# Under the sanitizers, which do not look at the values, one order is enough.
SEEDS = (0,) if "GANKERNELS_EMULATION" in os.environ else (0, 1, 2)
_cache = {}


def run(emulated, problem: Problem, solution: Solution, want: dict) -> dict[str, np.ndarray]:
    """Forward, backward and double backward; every output's bytes, checked against `want`."""
    p, s = problem, solution
    arrays = {}

    def call(function, inputs, outputs):
        function({"x": s.pack(s.x), **s.parameters(), **inputs}, outputs, p.options)
        arrays.update({f"{function.__name__}.{name}": a for name, a in outputs.items()})
        return outputs

    given = {"statistics": s.per_channel(s.statistics)}
    if p.training:
        out = call(emulated.forward, {}, {"statistics": s.empty_per_channel(2), "y": s.empty()})
        check(p, "statistics", torch.from_numpy(out["statistics"]), want["statistics"])
        given = {"statistics": out["statistics"].copy()}
    else:
        out = call(emulated.forward, given, {"y": s.empty()})
    check(p, "y", s.unpack(out["y"]), want["y"])

    given["grad_y"] = s.pack(s.grad_y)
    out = call(emulated.backward, given, {"sums": s.empty_per_channel(2), "grad_x": s.empty()})
    magnitude = want["magnitude"]
    check(p, "sums", torch.from_numpy(out["sums"]), want["sums"], magnitude[:2])
    check(p, "grad_x", s.unpack(out["grad_x"]), want["grad_x"], want["scale"])

    given["grad_grad_x"] = s.pack(s.grad_grad_x)
    given["grad_grad_weight"] = s.per_channel(s.grad_grad_weight)
    given["grad_grad_bias"] = s.per_channel(s.grad_grad_bias)
    outputs = {"sums": s.empty_per_channel(5), "grad_weight": s.empty_per_channel()}
    outputs |= {"grad_grad_y": s.empty(), "grad_x": s.empty()}
    out = call(emulated.double_backward, given, outputs)
    check(p, "sums", torch.from_numpy(out["sums"]), want["double_sums"], magnitude)
    check(p, "grad_grad_y", s.unpack(out["grad_grad_y"]), want["grad_grad_y"], want["scale"])
    check(p, "grad_x", s.unpack(out["grad_x"]), want["double_grad_x"], want["scale"])
    grad_weight = torch.from_numpy(out["grad_weight"])
    check(p, "grad_weight", grad_weight, want["double_grad_weight"], 3 * magnitude.amax(0))
    return arrays


def solve(problem: Problem) -> tuple[Solution, dict]:
    if problem not in _cache:
        solution = Solution(problem)
        want = {k: v.detach() for k, v in solution.solve().items()}
        # What cancels in the derivatives is of this size.
        invstd = (solution.statistics[1] + problem.eps).rsqrt()
        weight = solution.weight.abs().amax()
        want["scale"] = 3 * (1 + weight) * (1 + invstd.amax()) ** 2
        _cache.clear()
        _cache[problem] = solution, want
    return _cache[problem]


def check_all(emulated, problem: Problem) -> None:
    """Right, and the same bit for bit whatever the order in which threads and blocks run."""
    solution, want = solve(problem)
    first = None
    for seed in SEEDS:
        emulated.set_seed(seed)
        arrays = run(emulated, problem, solution, want)
        if first is None:
            first = arrays
        for name, array in arrays.items():
            assert array.tobytes() == first[name].tobytes(), f"{name} depends on the order"


def parametrize(*problems: Problem):
    return pytest.mark.parametrize("problem", problems, ids=str)


# Run lengths for each vector width, channel counts around a tile's (128 bytes of a row), and more
# than one part of a channel. With `misalignment` the widest access is ruled out.
EVERY_KERNEL = [
    Problem(n, c, s, channels_last, dtype, misalignment=misalignment, activation_first=first)
    for dtype in DTYPES
    for first in (False, True)
    for n, c, s, channels_last, misalignment in [
        (3, 3, 16, False, 0),
        (3, 3, 12, False, 0),
        (3, 3, 7, False, 0),
        (3, 3, 16, False, 1),
        (3, 8, 5, True, 0),
        (3, 7, 5, True, 0),
        (3, 8, 5, True, 1),
    ]
]


@parametrize(*EVERY_KERNEL)
def test_every_kernel(emulated, problem):
    check_all(emulated, problem)


def test_every_kernel_was_meant(emulated):
    """EVERY_KERNEL launches every instance that the library has: nothing is left untested."""
    emulated.take_launches()
    for problem in EVERY_KERNEL:
        if not problem.activation_first:
            solution, want = solve(problem)
            run(emulated, problem, solution, want)
    launched = {name for name, *_ in emulated.take_launches()}
    library = next(Path(emulated.__file__).parent.glob("libkernels_*.so"))
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    pattern = r"[0-9a-f]+ [A-Za-z] (void gankernels::cuda::batch_norm_leaky_relu::kernel<.*\))\n"
    built = {m[1] for m in re.finditer(pattern, symbols)}
    assert built == launched
    assert len(built) == 54


@parametrize(
    *[
        Problem(n, c, s, dtype=dtype)
        for dtype in ("float32", "bfloat16")
        for n, c, s in [
            *[(1, 2, 1), (1, 2, 2), (2, 1, 3), (1, 1, 255), (1, 2, 256), (1, 1, 257)],
            *[(31, 1, 1), (33, 2, 4), (5, 2, 49), (2, 2, 196), (1, 2, 8 * 257), (17, 3, 60)],
            *[(300, 2, 8), (7, 5, 1), (1, 1, 1)],
        ]
    ]
)
def test_sizes_contiguous(emulated, problem):
    check_all(emulated, problem)


@parametrize(
    *[
        Problem(n, c, s, channels_last=s > 1, dtype=dtype)
        for dtype in ("float32", "bfloat16")
        for n, c, s in [
            *[(1, 2, 1), (2, 3, 1), (8, 4, 1), (9, 5, 1), (3, 31, 3), (7, 32, 1), (8, 33, 1)],
            *[(9, 63, 2), (2, 64, 4), (3, 65, 1), (31, 2, 1), (32, 4, 1), (33, 6, 1)],
            *[(64, 12, 4), (5, 260, 1), (1, 100, 1), (257, 2, 1), (513, 4, 1)],
        ]
    ]
)
def test_sizes_channels_last(emulated, problem):
    check_all(emulated, problem)


# Per channel, or per tile of channels, just up to and beyond 64 KiB; on one multiprocessor of 8
# blocks, on 4 and on 132 of them. More tiles than blocks are wanted are not divided.
@pytest.mark.parametrize(
    ("problem", "divided"),
    [
        (Problem(128, 2, 128), False),
        (Problem(129, 2, 128, device=0), True),
        (Problem(129, 3, 128, device=1, activation_first=True, affine=False), True),
        (Problem(1, 2, 32771, device=1), True),
        (Problem(1, 1, 16 * 4099, device=2, dtype="bfloat16"), True),
        (Problem(700, 2, 49, dtype="float16", device=2), True),
        (Problem(43, 3, 196, dtype="float64", device=0, training=False), True),
        (Problem(43, 9, 196, dtype="float64", device=0), False),
        (Problem(512, 32, 1, device=1), False),
        (Problem(513, 33, 1, device=0), True),
        (Problem(521, 35, 1, device=1, activation_first=True), True),
        (Problem(130, 64, 5, True, device=2, dtype="bfloat16", parameter_dtype="bfloat16"), True),
        (Problem(260, 17, 5, True, device=1, dtype="float64"), True),
        (Problem(1100, 66, 1, device=1, dtype="float16"), True),
    ],
    ids=str,
)
def test_channels_divided_into_parts(emulated, problem, divided):
    emulated.take_launches()
    check_all(emulated, problem)
    launches = emulated.take_launches()
    assert {device for _, device, *_ in launches} == {problem.device}
    reductions = 3 if problem.training else 2
    assert len(launches) == len(SEEDS) * (3 + (reductions if divided else 0))


@parametrize(
    *[
        Problem(
            *(shape := (3, 5, 4, True) if last else (3, 2, 8, False)),
            dtype=dtype,
            parameter_dtype=parameter_dtype,
            activation_first=first,
            training=training,
            negative_slope=slope,
        )
        for last in (False, True)
        for dtype in DTYPES
        for parameter_dtype in dict.fromkeys((dtype, "float32"))
        for first in (False, True)
        for training, slope in ((True, -0.3), (False, 0.2), (True, 0.0), (True, 1.0))
        if not (dtype == "float64" and parameter_dtype == "float32")
    ]
)
def test_types_orders_modes_and_slopes(emulated, problem):
    check_all(emulated, problem)


@parametrize(
    Problem(4, 3, 16, affine=False),
    Problem(4, 8, 3, True, affine=False, activation_first=True, dtype="bfloat16"),
    Problem(300, 3, 16, eps=1e-5, dtype="float64"),
    Problem(300, 3, 16, eps=1e-5),
    Problem(3, 6, 20, misalignment=4, dtype="float16"),
    Problem(3, 8, 20, True, misalignment=4, dtype="bfloat16"),
)
def test_parameters(emulated, problem):
    check_all(emulated, problem)


PARTS = [Problem(4, 3, 16), Problem(9, 6, 3, True), Problem(150, 2, 128), Problem(600, 40, 1)]


@parametrize(*PARTS)
def test_statistics_and_application_apart(emulated, problem):
    s, want = solve(problem)
    inputs = {"x": s.pack(s.x), **s.parameters()}
    statistics, y = s.empty_per_channel(2), s.empty()
    emulated.forward(inputs, {"statistics": statistics}, problem.options)
    check(problem, "statistics", torch.from_numpy(statistics), want["statistics"])
    emulated.forward(inputs | {"statistics": statistics}, {"y": y}, problem.options)
    check(problem, "y", s.unpack(y), want["y"])


@parametrize(*PARTS)
def test_sums_and_application_apart(emulated, problem):
    s, want = solve(problem)
    inputs = {"x": s.pack(s.x), **s.parameters(), "statistics": s.per_channel(s.statistics)}
    inputs["grad_y"] = s.pack(s.grad_y)
    sums, grad_x = s.empty_per_channel(2), s.empty()
    emulated.backward(inputs, {"sums": sums}, problem.options)
    check(problem, "sums", torch.from_numpy(sums), want["sums"], want["magnitude"][:2])
    emulated.backward(inputs | {"sums": sums}, {"grad_x": grad_x}, problem.options)
    check(problem, "grad_x", s.unpack(grad_x), want["grad_x"], want["scale"])

    inputs["grad_grad_x"] = s.pack(s.grad_grad_x)
    inputs["grad_grad_weight"] = s.per_channel(s.grad_grad_weight)
    inputs["grad_grad_bias"] = s.per_channel(s.grad_grad_bias)
    sums = s.empty_per_channel(5)
    emulated.double_backward(inputs, {"sums": sums}, problem.options)
    check(problem, "sums", torch.from_numpy(sums), want["double_sums"], want["magnitude"])
    inputs["sums"] = sums
    for name in ("grad_grad_y", "grad_x", "grad_weight"):
        out = s.empty_per_channel() if name == "grad_weight" else s.empty()
        emulated.double_backward(inputs, {name: out}, problem.options)
        reference = want[name if name == "grad_grad_y" else f"double_{name}"]
        if name == "grad_weight":
            got, scale = torch.from_numpy(out), 3 * want["magnitude"].amax(0)
        else:
            got, scale = s.unpack(out), want["scale"]
        check(problem, name, got, reference, scale)


@parametrize(*PARTS)
def test_without_parameter_tangents(emulated, problem):
    s, scale = solve(problem)[0], solve(problem)[1]["scale"]
    want = s.solve(with_parameter_tangents=False)
    inputs = {"x": s.pack(s.x), **s.parameters(), "statistics": s.per_channel(s.statistics)}
    inputs |= {"grad_y": s.pack(s.grad_y), "grad_grad_x": s.pack(s.grad_grad_x)}
    out = {"sums": s.empty_per_channel(5), "grad_grad_y": s.empty(), "grad_x": s.empty()}
    emulated.double_backward(inputs, out, problem.options)
    check(problem, "grad_grad_y", s.unpack(out["grad_grad_y"]), want["grad_grad_y"], scale)
    check(problem, "grad_x", s.unpack(out["grad_x"]), want["double_grad_x"], scale)


@parametrize(*(vary(p, training=False) for p in PARTS))
def test_evaluation_without_sums(emulated, problem):
    s, want = solve(problem)
    inputs = {"x": s.pack(s.x), **s.parameters(), "statistics": s.per_channel(s.statistics)}
    inputs["grad_y"] = s.pack(s.grad_y)
    grad_x = s.empty()
    emulated.backward(inputs, {"grad_x": grad_x}, problem.options)
    check(problem, "grad_x", s.unpack(grad_x), want["grad_x"], want["scale"])


@parametrize(
    *[
        Problem(n, c, s, channels_last, training=training)
        for n, c, s in ((0, 3, 4), (2, 3, 0), (2, 0, 4), (0, 0, 0), (0, 1, 5))
        for channels_last in (False, True)
        for training in (False, True)
    ]
)
def test_empty(emulated, problem):
    """Nothing is written out of bounds; sums are 0, statistics 0 / 0."""
    s = Solution(problem)
    inputs = {"x": s.pack(s.x), **s.parameters()}
    statistics = s.empty_per_channel(2)
    emulated.forward(inputs, {"statistics": statistics, "y": s.empty()}, problem.options)
    assert np.isnan(statistics).all()
    inputs["statistics"] = np.ones_like(statistics)
    inputs["grad_y"] = inputs["grad_grad_x"] = s.pack(s.grad_y)
    sums, grad_x = s.empty_per_channel(2), s.empty()
    emulated.backward(inputs, {"sums": sums, "grad_x": grad_x}, problem.options)
    assert (sums == 0).all()
    sums = s.empty_per_channel(5)
    outputs = {"sums": sums, "grad_x": s.empty(), "grad_weight": s.empty_per_channel()}
    emulated.double_backward(inputs, outputs, problem.options)
    assert (sums == 0).all()


@parametrize(
    Problem(300, 3, 16, mean=1e4),
    Problem(150, 2, 256, mean=1e4, device=0),
    Problem(400, 40, 3, True, mean=1e4, device=0),
    Problem(300, 3, 16, mean=1e4, std=1e-2, eps=1e-5),
    Problem(150, 2, 256, mean=1e4, std=1e-2, eps=1e-5, device=0),
    Problem(400, 40, 3, True, mean=1e4, std=1e-2, eps=1e-5, device=0),
    Problem(150, 2, 256, mean=1e4, std=1e-2, eps=1e-5, device=0, activation_first=True),
)
def test_a_large_mean_does_not_cancel(emulated, problem):
    """E[x^2] - E[x]^2 would be wrong by 6 here: float32 keeps 1e8 to within 8. Nor can a float32
    hold the mean well enough to take deviations of 1e-2 from it: its last digit is 1e-3."""
    s = Solution(problem)
    statistics = s.empty_per_channel(2)
    emulated.forward({"x": s.pack(s.x)}, {"statistics": statistics}, problem.options)
    mean, var = torch.from_numpy(statistics).double()
    torch.testing.assert_close(mean, s.statistics[0], rtol=2e-7, atol=0)
    torch.testing.assert_close(var, s.statistics[1], rtol=1e-5, atol=0)


def test_not_a_number_stays_in_its_channel(emulated):
    problem = Problem(40, 3, 16)
    s, want = solve(problem)
    x = s.x.clone()
    x[7, 1, 5] = torch.nan
    out = {"statistics": s.empty_per_channel(2), "y": s.empty()}
    emulated.forward({"x": s.pack(x), **s.parameters()}, out, problem.options)
    y = s.unpack(out["y"])
    assert y[:, 1].isnan().all()
    assert np.isnan(out["statistics"][:, 1]).all()
    for c in (0, 2):
        check(problem, "y", y[:, c : c + 1], want["y"][:, c : c + 1])


@pytest.mark.parametrize("c", [0, 1, 31, 33, 1500])
@pytest.mark.parametrize("running_dtype", DTYPES)
@pytest.mark.parametrize("statistics_dtype", ["float32", "float64"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_running_statistics(emulated, c, running_dtype, statistics_dtype, momentum):
    generator = torch.Generator().manual_seed(c)
    statistics = torch.rand(2, c, generator=generator, dtype=DTYPES[statistics_dtype])
    running = torch.rand(2, c, generator=generator).to(DTYPES[running_dtype])
    count, before = 40, 6
    factor = 1 / (before + 1) if momentum is None else momentum
    unbiased = statistics.double() * torch.tensor([[1.0], [count / (count - 1)]])
    want = (1 - factor) * running.double() + factor * unbiased
    options = {"c": c, "statistics_dtype": statistics_dtype, "running_dtype": running_dtype}
    options |= {"cumulative": momentum is None, "momentum": momentum or 0.0, "device": 1}
    options["count"] = float(count)
    for tracked in ([before], None) if momentum is not None else ([before],):
        outputs = {
            "running_mean": to_numpy(running[0]).copy(),
            "running_var": to_numpy(running[1]).copy(),
        }
        if tracked is not None:
            outputs["num_batches_tracked"] = np.array(tracked)
        emulated.update_running_statistics({"statistics": to_numpy(statistics)}, outputs, options)
        if tracked is not None:
            assert outputs["num_batches_tracked"] == before + 1
        for got, expected in zip(
            (outputs["running_mean"], outputs["running_var"]), want, strict=True
        ):
            rounded = to_numpy(expected.to(DTYPES[running_dtype]))
            if running_dtype in ("float32", "float64"):
                np.testing.assert_allclose(got, rounded, rtol=2e-7)
            else:  # one unit in the last place, for another order of the same double operations
                np.testing.assert_array_less(abs(got.view(np.int16) - rounded.view(np.int16)), 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_is_converted(emulated, dtype):
    """Through x -> 1 * (x - 0) / sqrt(1 + 0) + 0, which is x."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    problem = Problem(1, 1, 2**16, dtype=dtype, eps=0.0, negative_slope=1.0, training=False)
    statistics = np.array([[0.0], [1.0]], dtype=np.float32)
    y = np.zeros(2**16, dtype=to_numpy(x).dtype)
    emulated.forward({"x": to_numpy(x), "statistics": statistics}, {"y": y}, problem.options)
    y = torch.from_numpy(y).view(DTYPES[dtype])
    nan = x.isnan()
    assert torch.equal(y.isnan(), nan)
    assert torch.equal(y[~nan], x[~nan])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_to_half(emulated, dtype):
    """Random floats of all magnitudes, and ties, as PyTorch rounds them."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32)
    halves = torch.arange(1, 2**15 - 1, 3, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    ties = (halves[:-1].double() + halves[1:].double()).float() / 2
    values = torch.cat([bits.view(torch.float32), ties])
    values = values[values.isfinite()]
    outputs = {
        "running_mean": to_numpy(torch.zeros(len(values), dtype=DTYPES[dtype])),
        "running_var": to_numpy(torch.zeros(len(values), dtype=DTYPES[dtype])),
    }
    options = {"c": len(values), "statistics_dtype": "float32", "running_dtype": dtype}
    options |= {"cumulative": False, "momentum": 1.0, "count": 2.0, "device": 0}
    statistics = to_numpy(torch.stack([values, values / 2]))
    emulated.update_running_statistics({"statistics": statistics}, outputs, options)
    for got, value in zip(outputs.values(), (values, values / 2 * 2), strict=True):
        want = value.to(DTYPES[dtype])
        got = torch.from_numpy(got).view(DTYPES[dtype])
        assert torch.equal(got, want)


def test_device_is_restored_and_checked(emulated):
    assert emulated.current_device() == 0
    problem = Problem(device=2)
    s, _ = solve(problem)
    inputs = {"x": s.pack(s.x), "statistics": s.per_channel(s.statistics)}
    emulated.take_launches()
    emulated.forward(inputs, {"y": s.empty()}, problem.options)
    ((_, device, *_),) = emulated.take_launches()
    assert device == 2
    assert emulated.current_device() == 0
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        emulated.forward(inputs, {"y": s.empty()}, problem.options | {"device": 3})
    assert emulated.current_device() == 0
