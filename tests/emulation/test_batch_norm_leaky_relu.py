"""The CUDA kernels of batch_norm_leaky_relu, on the emulated device, against float64 autograd.

A device has 1, 4 or 132 multiprocessors (problem.device), which decides into how many parts a
channel is divided. More than 64 KiB of x per block's channels are divided at all.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from . import harness
from .harness import DTYPES, SEEDS, call, check_every_kernel_is_launched, parametrize, to_numpy
from .norm_problem import Problem, Solution


def check_all(emulated, problem: Problem) -> None:
    harness.check_all(emulated, Solution(problem))


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
    solutions = (Solution(p) for p in EVERY_KERNEL if not p.activation_first)
    check_every_kernel_is_launched(emulated, "batch_norm_leaky_relu", solutions, 54)


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
        (Problem(129, 3, 128, device=1, activation_first=True, parameters=False), True),
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
    Problem(4, 3, 16, parameters=False),
    Problem(4, 8, 3, True, parameters=False, activation_first=True, dtype="bfloat16"),
    Problem(300, 3, 16, eps=1e-5, dtype="float64"),
    Problem(300, 3, 16, eps=1e-5),
    Problem(3, 6, 20, misalignment=4, dtype="float16"),
    Problem(3, 8, 20, True, misalignment=4, dtype="bfloat16"),
)
def test_parameters(emulated, problem):
    check_all(emulated, problem)


PARTS = [Problem(4, 3, 16), Problem(9, 6, 3, True), Problem(150, 2, 128), Problem(600, 40, 1)]


@parametrize(*PARTS)
def test_reduction_and_application_apart(emulated, problem):
    s = Solution(problem)
    for number, sums, applied in (
        (0, "statistics", ["y"]),
        (1, "sums", ["grad_x"]),
        (2, "sums", ["grad_grad_y", "grad_x", "grad_weight"]),
    ):
        given = call(emulated, s, number, [sums])
        for name in applied:
            call(emulated, s, number, [name], given)


@parametrize(*PARTS)
def test_without_parameter_tangents(emulated, problem):
    s = Solution(problem, parameter_tangents=False)
    call(emulated, s, 2, ["sums", "grad_grad_y", "grad_x"])


@parametrize(*(replace(p, training=False) for p in PARTS))
def test_evaluation_without_sums(emulated, problem):
    call(emulated, Solution(problem), 1, ["grad_x"])


# As instance norm of (N, C, S): n = 1, c = N * C, affine = C.
@parametrize(
    *[
        Problem(n, c, s, last, affine=affine, **options)
        for options in (
            {},
            {"activation_first": True, "dtype": "bfloat16"},
            {"training": False, "dtype": "float64", "parameter_dtype": "float64"},
        )
        for n, c, s, last, affine in [
            *[
                (1, 12, 16, False, 4),
                (1, 70, 3, False, 7),
            ],
            *[(5, 12, 7, False, 1), (3, 12, 5, True, 4), (600, 42, 1, False, 21)],
        ]
    ],
    Problem(1, 6, 16_500, affine=3),
)
def test_fewer_parameters_than_channels(emulated, problem):
    check_all(emulated, problem)


@pytest.mark.parametrize("activation_first", [False, True])
def test_instance_norm(emulated, activation_first):
    """What the problems above are is what PyTorch's instance norm computes of them."""
    n, c, s = 5, 3, 40
    solution = Solution(Problem(1, n * c, s, affine=c, activation_first=activation_first))
    p = solution.p
    x = solution.x.view(n, c, s).clone().requires_grad_()
    weight, bias = (t.clone().requires_grad_() for t in (solution.weight, solution.bias))
    u = F.leaky_relu(x, p.negative_slope) if activation_first else x
    y = F.instance_norm(u, weight=weight, bias=bias, eps=p.eps)
    y = y if activation_first else F.leaky_relu(y, p.negative_slope)
    want = torch.autograd.grad(y, (x, bias, weight), solution.grad_y.view(n, c, s))
    y_, x_ = (solution.passes[i].outputs[name].want for i, name in ((0, "y"), (1, "grad_x")))
    sums = solution.passes[1].outputs["sums"].want
    torch.testing.assert_close(y_.view(n, c, s), y.detach())
    torch.testing.assert_close(x_.view(n, c, s), want[0])
    torch.testing.assert_close(sums.view(2, n, c).sum(1), torch.stack(want[1:]))
    harness.check_all(emulated, solution)


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
    (inputs, options), elements = s.inputs("x", "weight", "bias"), s.empty(s.x)
    statistics = s.empty(s.statistics)
    emulated.batch_norm_leaky_relu_forward(
        inputs, {"statistics": statistics, "y": elements}, options
    )
    assert np.isnan(statistics).all()
    inputs["statistics"] = np.ones_like(statistics)
    inputs["grad_y"] = inputs["grad_grad_x"] = s.pack(s.grad_y)
    sums = s.pack(torch.full((2, problem.c), torch.nan))
    emulated.batch_norm_leaky_relu_backward(inputs, {"sums": sums, "grad_x": elements}, options)
    assert (sums == 0).all()
    sums, weight = (s.pack(torch.full((k, problem.c), torch.nan)) for k in (5, 1))
    outputs = {"sums": sums, "grad_x": elements, "grad_weight": weight}
    emulated.batch_norm_leaky_relu_double_backward(inputs, outputs, options)
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
    statistics = s.empty(s.statistics)
    inputs, options = s.inputs("x")
    emulated.batch_norm_leaky_relu_forward(inputs, {"statistics": statistics}, options)
    mean, var = torch.from_numpy(statistics).double()
    torch.testing.assert_close(mean, s.statistics[0], rtol=2e-7, atol=0)
    torch.testing.assert_close(var, s.statistics[1], rtol=1e-5, atol=0)


def test_not_a_number_stays_in_its_channel(emulated):
    s = Solution(Problem(40, 3, 16))
    y = s.passes[0].outputs["y"]
    s.x[7, 1, 5] = torch.nan
    inputs, options = s.inputs("x", "weight", "bias")
    out = {"statistics": s.empty(s.statistics), "y": s.empty(s.x)}
    emulated.batch_norm_leaky_relu_forward(inputs, out, options)
    assert np.isnan(out["statistics"][:, 1]).all()
    assert np.isnan(out["y"][:, 1]).all()
    out["y"][:, 1] = y.want[:, 1]
    s.check("y", out["y"], y)


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
    emulated.batch_norm_leaky_relu_forward(
        {"x": to_numpy(x), "statistics": statistics}, {"y": y}, problem.options
    )
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
    s = Solution(Problem(device=2))
    inputs, options = s.inputs("x", "statistics")
    emulated.take_launches()
    emulated.batch_norm_leaky_relu_forward(inputs, {"y": s.empty(s.x)}, options)
    ((_, device, *_),) = emulated.take_launches()
    assert device == 2
    assert emulated.current_device() == 0
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        emulated.batch_norm_leaky_relu_forward(inputs, {"y": s.empty(s.x)}, options | {"device": 3})
    assert emulated.current_device() == 0
