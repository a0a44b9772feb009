"""The numbers of batch_norm_leaky_relu and leaky_relu_batch_norm, through second derivatives."""

import pytest
import torch
import torch.nn.functional as F
from property_based import HealthCheck, given, settings, st

import gankernels as gk
from gankernels import functional

from .oracle import (
    HALVES,
    LAYOUTS,
    Case,
    Problem,
    assert_as_close_as_pytorch,
    assert_close,
    cases,
    distance,
    ours,
    reference,
    seeded,
    solve,
)

pytestmark = pytest.mark.every_device

ORDERS = (False, True)
SHAPES = [
    ((48, 5), "contiguous"),
    ((12, 5, 7), "contiguous"),
    ((12, 5, 7), "channels_last"),
    ((6, 5, 4, 5), "contiguous"),
    ((6, 5, 4, 5), "channels_last"),
    ((4, 5, 2, 3, 4), "contiguous"),
    ((4, 5, 2, 3, 4), "channels_last"),
]


def grid(**choices):
    """A parametrization over dense shapes, in every mode."""
    found = [
        c.but(shape=shape, layout=layout)
        for shape, layout in SHAPES
        for c in cases(
            activation_first=ORDERS, training=(True, False), running=(True, False), **choices
        )
    ]
    return pytest.mark.parametrize("case", found, ids=str)


def check(
    case: Case, gradient_layout: str | None = None, tolerance: float = 1e-5, floor: float = 0.0
) -> None:
    problem = Problem(case, gradient_layout)
    expected = solve(reference, problem.to(torch.float64))
    assert_close(solve(ours, problem), expected, tolerance, floor)


# ---- against float64 ---------------------------------------------------------------------------


@grid(affine=(True, False), negative_slope=(0.2, 0.0, -0.1, 1.0))
def test_oracle_float32(case):
    check(case)


@grid(affine=(True, False), negative_slope=(0.2, -0.1), dtype=(torch.float64,))
def test_oracle_float64(case):
    check(case, tolerance=1e-12)


@grid(
    affine=(True, False),
    negative_slope=(-0.1,),
    dtype=HALVES,
    parameter_dtype=(None, torch.float32),
)
def test_oracle_half(case):
    problem = Problem(case)
    assert_as_close_as_pytorch(
        solve(ours, problem), solve(reference, problem), solve(reference, problem.to(torch.float64))
    )


@pytest.mark.parametrize("activation_first", ORDERS)
@pytest.mark.parametrize("gradient_layout", LAYOUTS)
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "batch_last", "sliced", "padded"]
)
@pytest.mark.parametrize("shape", [(24, 5), (6, 5, 4), (6, 5, 4, 5)], ids=str)
def test_oracle_strides(shape, layout, gradient_layout, activation_first):
    """The incoming gradient and tangents are laid out differently from x."""
    # A gradient of one repeated number leaves nothing but rounding, hence the floor.
    case = Case(shape, activation_first, layout=layout, negative_slope=-0.1, eps=0.5)
    check(case, gradient_layout, floor=5.0)


@pytest.mark.parametrize("activation_first", ORDERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["expanded", "expanded_space", "one_number"])
def test_oracle_expanded_input(layout, training, activation_first):
    # Channels of one repeated number are ill-conditioned unless eps is large.
    check(Case((6, 5, 4, 5), activation_first, training, layout=layout, eps=0.5), "contiguous")


@pytest.mark.parametrize("activation_first", ORDERS)
@pytest.mark.parametrize("one_by_one", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_oracle_strided_parameters(one_by_one, training, activation_first):
    problem = Problem(Case(activation_first=activation_first, training=training))
    expected = solve(ours, problem)
    value = getattr(problem, one_by_one)
    apart = torch.full((3 * len(value),), float("nan"))[1::3]
    setattr(problem, one_by_one, apart.copy_(value))
    assert_close(solve(ours, problem), expected, 0.0)


def test_running_statistics_that_lie_apart_are_the_only_ones_written():
    x = torch.randn(6, 3, 4)
    storage = torch.full((9,), 7.0)
    mean = storage[1::3].zero_()
    functional.batch_norm_leaky_relu(x, mean, torch.ones(3), training=True)
    expected = torch.full((9,), 7.0)
    expected[1::3] = 0.1 * x.mean((0, 2))
    torch.testing.assert_close(storage, expected)


# ---- sizes: vector widths, and the ways the kernels divide their work ----------------------------

WIDTHS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation_first", ORDERS)
def test_oracle_widths(activation_first, dtype, layout):
    for size in WIDTHS:
        for shape in ((3, size, 5), (3, 5, size), (size, 5, 3), (max(size, 2), size)):
            case = Case(shape, activation_first, dtype=dtype, layout=layout, eps=0.5)
            # Two values in a channel nearly cancel, so errors are measured by the scale of inputs.
            check(case, tolerance=1e-5 if dtype is torch.float32 else 1e-12, floor=0.1)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_oracle_widths_of_half(dtype, layout):
    for size in WIDTHS:
        for shape in ((5, size, 5), (5, 5, size)):
            problem = Problem(Case(shape, dtype=dtype, layout=layout, eps=0.5))
            assert_as_close_as_pytorch(
                solve(ours, problem),
                solve(reference, problem),
                solve(reference, problem.to(torch.float64)),
            )


# What is large is told in float32, for the 768 KiB that a thread's tensors may take in its cache.
WORK = {
    "cached": (8, 32, 16, 16),
    "cached, short rows": (16, 64, 2, 2),
    "cached, long columns": (300, 64, 3, 3),
    "uncached": (4, 4, 320, 300),
    "unbalanced": (16, 3, 40, 40),
    "fewer channels than threads": (16, 2, 64, 33),
    "few long rows": (1, 2, 250, 301),
    "many channels, uncached": (160, 520, 3, 3),
    "no spatial size": (700, 130),
    "no spatial size, uncached": (9001, 40),
    "too small for threads": (8, 8, 4, 4),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", WORK.values(), ids=WORK)
def test_work_division(shape, layout, threads):
    torch.set_num_threads(threads)
    check(Case(shape, layout=layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "dtype", "threads"),
    [
        ((50, 63, 700), torch.float64, 2),
        ((50, 64, 690), torch.float64, 1),
        ((131, 63, 1025), torch.bfloat16, 2),
        ((131, 64, 1024), torch.bfloat16, 1),
    ],
)
def test_results_beyond_16_MiB(shape, dtype, threads, layout):
    """Stored past the caches, whole lines or not."""
    torch.set_num_threads(threads)
    problem = Problem(Case(shape, activation_first=True, layout=layout, dtype=dtype))
    assert problem.x.nbytes > 16 << 20
    if dtype is torch.float64:
        return assert_close(solve(ours, problem), solve(reference, problem), 1e-12)
    # A float32 solution is exact enough, and half as long in coming as one in float64.
    return assert_close(solve(ours, problem), solve(reference, problem.to(torch.float32)), 2.0**-7)


@pytest.mark.cpu_only
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation_first", ORDERS)
def test_threads_change_rounding_only(layout, activation_first):
    problem = Problem(Case((40, 6, 30, 31), activation_first, layout=layout))
    torch.set_num_threads(1)
    one = solve(ours, problem)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_close(solve(ours, problem), one, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(16, 3, 40, 40), (40, 6, 30, 31), (160, 520, 3, 3)], ids=str)
def test_repeats_bitwise(shape, layout, dtype):
    torch.set_num_threads(2)
    problem = Problem(Case(shape, layout=layout, dtype=dtype))
    first = solve(ours, problem)
    for _ in range(3):
        again = solve(ours, problem)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_same_channel_same_result_whatever_its_neighbors():
    """No channel's result depends on which lanes it is computed in."""
    x = torch.randn(6, 1, 4, 5)
    alone = functional.batch_norm_leaky_relu(x, None, None, training=True)
    for layout in ("contiguous", "channels_last"):
        wide = LAYOUTS[layout](x.expand(6, 37, 4, 5))
        y = functional.batch_norm_leaky_relu(wide, None, None, training=True)
        assert (y == y[:, :1]).all()
        torch.testing.assert_close(y[:, :1], alone, rtol=1e-6, atol=1e-6)


# ---- any shape -----------------------------------------------------------------------------------


@st.composite
def any_case(draw):
    spatial = draw(st.lists(st.integers(1, 9), max_size=3))
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 40)), *spatial)
    training = draw(st.booleans())
    if training and shape[0] * torch.Size(spatial).numel() == 1:
        shape = (2, *shape[1:])
    dtype = draw(st.sampled_from([torch.float32, torch.float64, *HALVES]))
    half = dtype in HALVES
    return Case(
        shape,
        draw(st.booleans()),
        training,
        running=not training or draw(st.booleans()),
        affine=draw(st.booleans()),
        negative_slope=draw(st.sampled_from([0.2, 0.0, -0.1, 1.0, 1.5])),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "batch_last", "padded"])),
        dtype=dtype,
        parameter_dtype=draw(st.sampled_from([None, torch.float32])) if half else None,
        eps=0.5,
        seed=draw(st.integers(0, 1000)),
    )


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(any_case(), st.sampled_from(list(LAYOUTS)), st.sampled_from([1, 2]))
def test_oracle_any_shape(case, gradient_layout, threads):
    torch.set_num_threads(threads)
    problem = Problem(case, gradient_layout)
    actual, double = solve(ours, problem), solve(reference, problem.to(torch.float64))
    if case.dtype in HALVES:
        # Numbers that cancel to nearly nothing have no relative accuracy to speak of.
        assert_close(actual, double, 4 * torch.finfo(case.dtype).eps, 1.0)
    else:
        assert_close(actual, double, 1e-5 if case.dtype is torch.float32 else 1e-12, 1.0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shape", [(0, 3), (0, 3, 4), (0, 3, 4, 5), (2, 3, 0), (2, 3, 0, 4), (2, 3, 4, 0), (0, 3, 0)]
)
def test_empty_batches_are_as_in_pytorch(shape, training):
    def results(function):
        mean, var = torch.zeros(3), torch.ones(3)
        x = torch.randn(shape, requires_grad=True)
        weight, bias = (torch.randn(3, requires_grad=True) for _ in range(2))
        y = function(x, mean, var, weight, bias, training)
        y.sum().backward()
        return y.shape, x.grad.shape, weight.grad, bias.grad, mean, var

    actual = results(functional.batch_norm_leaky_relu)
    for a, b in zip(actual, results(F.batch_norm), strict=True):
        assert a == b if isinstance(a, torch.Size) else torch.equal(a, b)


@pytest.mark.parametrize(
    "shape", [(0, 3), (4, 3, 0), (2, 3, 0, 4), (2, 3, 4, 0), (4, 0), (4, 0, 3)]
)
def test_kernels_survive_empty_tensors(shape):
    """The raw ops, which a compiled graph may call with any size."""
    ops, x = torch.ops.gankernels, torch.randn(shape)
    torch.set_num_threads(2)
    y, statistics = ops.batch_norm_leaky_relu(x, None, None, None, 1e-5, 0.2, False)
    assert y.shape == x.shape
    options = (0.0, True, 1e-5, 0.2, False)
    grad_x, _ = ops.batch_norm_leaky_relu_backward(
        y, x, None, None, statistics, None, *options, True
    )
    assert grad_x.shape == x.shape
    results = ops.batch_norm_leaky_relu_double_backward(
        x, None, None, y, x, None, None, statistics, None, *options, True, True
    )
    assert results[0].shape == results[1].shape == x.shape


# ---- numbers that are hard to work with ----------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 8, 16, 16), (4, 3, 100, 100), (4096, 24)], ids=str)
def test_large_mean_and_small_deviation_do_not_cancel(shape, layout):
    """E[x^2] - E[x]^2 has no correct digit here, a sum in float32 few."""
    x = LAYOUTS[layout](torch.randn(shape, generator=seeded(0)) * 1e-2 + 1e4)
    mean, var = torch.zeros(shape[1]), torch.zeros(shape[1])
    y = functional.batch_norm_leaky_relu(x, mean, var, None, None, True, 1.0, negative_slope=1.0)
    dims = [d for d in range(x.dim()) if d != 1]
    exact_mean, exact_var = x.double().mean(dims), x.double().var(dims)
    assert_close({"mean": mean, "var": var}, {"mean": exact_mean, "var": exact_var}, 1e-5)
    # Statistics are float32, so that half of the last digit of the mean remains as an offset.
    exact = F.batch_norm(x.double(), None, None, training=True)
    offset = float(torch.finfo(torch.float32).eps * 1e4 / 2 / exact_var.sqrt().min())
    assert float((y - exact).abs().max()) < 1.01 * offset + 1e-4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("what", ["outlier first", "steps between samples", "constant"])
def test_statistics_of_samples_far_from_each_other(what, layout):
    """The kernels sum deviations from a guess of the mean: one that is far off must not matter."""
    x = torch.randn(96, 5, 12, 12, generator=seeded(0))
    if what == "outlier first":
        x[0, :, 0, 0] = 3e4
    elif what == "steps between samples":
        x = (
            x * 1e-3
            + torch.tensor([0.0, 1e3, -7e2, 50.0]).repeat_interleave(24)[:, None, None, None]
        )
    else:
        x = torch.full_like(x, 0.1)
    mean, var = torch.zeros(5), torch.zeros(5)
    functional.batch_norm_leaky_relu(
        LAYOUTS[layout](x), mean, var, None, None, True, 1.0, negative_slope=1.0
    )
    exact = {"mean": x.double().mean((0, 2, 3)), "var": x.double().var((0, 2, 3))}
    assert_close({"mean": mean, "var": var}, exact, 1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_mean_is_as_close_as_in_pytorch(dtype, layout):
    problem = Problem(Case((16, 8, 12, 12), layout=layout, dtype=dtype, mean=300.0, affine=False))
    assert_as_close_as_pytorch(
        solve(ours, problem), solve(reference, problem), solve(reference, problem.to(torch.float64))
    )


@pytest.mark.parametrize("activation_first", ORDERS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_constant_channels(dtype, layout, activation_first):
    """The variance is zero, and eps alone keeps the result finite."""
    x = LAYOUTS[layout](torch.full((6, 5, 4, 4), 3.0, dtype=dtype)).requires_grad_()
    function = (
        functional.leaky_relu_batch_norm if activation_first else functional.batch_norm_leaky_relu
    )
    bias = torch.linspace(-1, 1, 5, dtype=dtype)
    y = function(x, None, None, torch.ones(5, dtype=dtype), bias, training=True)
    expected = bias if activation_first else F.leaky_relu(bias, 0.2)
    assert torch.equal(y, expected.reshape(1, 5, 1, 1).expand_as(y))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("activation_first", ORDERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("slope", [0.2, 0.0])
def test_nan_and_infinity_spread_as_in_pytorch(
    slope, value, dtype, layout, training, activation_first
):
    case = Case((4, 5, 3, 3), activation_first, training, layout=layout, dtype=dtype)
    problem = Problem(case.but(negative_slope=slope))
    problem.x[1, 2, 0, 1] = value
    y = ours(problem, problem.x, problem.weight, problem.bias)
    mean, var = problem.running_mean, problem.running_var
    problem = Problem(case.but(negative_slope=slope)).to(dtype)
    problem.x[1, 2, 0, 1] = value
    expected = reference(problem, problem.x, problem.weight, problem.bias)
    assert torch.equal(y.isnan().cpu(), expected.isnan())
    assert torch.equal(y.isinf().cpu(), expected.isinf())
    assert torch.equal(mean.isfinite().cpu(), problem.running_mean.isfinite())
    assert torch.equal(var.isfinite().cpu(), problem.running_var.isfinite())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_gradient_stays_in_its_channel(layout):
    problem = Problem(Case((4, 5, 3, 3), layout=layout))
    problem.grad_y[1, 2, 0, 1] = float("nan")
    x = problem.x.requires_grad_()
    (grad,) = torch.autograd.grad(ours(problem, x, None, None), x, problem.grad_y)
    assert grad[:, 2].isnan().all()
    assert grad[:, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_conversions_are_exact(dtype):
    """Every finite number of the type goes through the identity that is slope 1 in evaluation."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    x = x[x.isfinite()].reshape(-1, 1)
    if dtype is torch.bfloat16:  # instructions that round to it may take subnormal numbers as zero
        x = x[x.abs() >= torch.finfo(dtype).tiny].reshape(-1, 1)
    zero, one = torch.zeros(1), torch.ones(1)
    y = functional.batch_norm_leaky_relu(x, zero, one, eps=0.0, negative_slope=1.0)
    assert torch.equal(y.view(torch.int16), (x + 0.0).view(torch.int16))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_to_half_is_to_nearest_even(dtype):
    """Scaled by float32 weights, so that results lie between the type's numbers."""
    generator = seeded(0)
    x = torch.randn(4000, 1, generator=generator).to(dtype)
    x = torch.cat([x, x * 1e-5, x * 2e4])  # subnormals and overflow in float16
    for weight in (1.0 + 2.0**-9, 1.0 + 2.0**-12, 0.7311, 3.0):
        y = functional.batch_norm_leaky_relu(
            x, torch.zeros(1), torch.ones(1), torch.tensor([weight]), torch.zeros(1), eps=0.0,
            negative_slope=1.0,
        )  # fmt: skip
        assert torch.equal(y, (x.float() * torch.tensor(weight)).to(dtype))


# ---- running statistics --------------------------------------------------------------------------


@pytest.mark.parametrize("activation_first", ORDERS)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, -0.5])
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [(torch.float32, None), (torch.float64, None), (torch.bfloat16, None),
     (torch.float16, None), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)  # fmt: skip
def test_running_statistics(dtype, parameter_dtype, momentum, activation_first):
    case = Case(
        activation_first=activation_first, dtype=dtype, parameter_dtype=parameter_dtype,
        momentum=momentum,
    )  # fmt: skip
    results, expected = (
        solve(f, p)
        for f, p in ((ours, Problem(case)), (reference, Problem(case).to(torch.float64)))
    )
    for name in ("running_mean", "running_var"):
        assert results[name].dtype == (parameter_dtype or dtype)
        tolerance = max(torch.finfo(results[name].dtype).eps, 1e-14)
        torch.testing.assert_close(
            results[name].double().cpu(), expected[name], rtol=tolerance, atol=4 * tolerance
        )


def test_running_statistics_are_untouched_in_evaluation():
    problem = Problem(Case(training=False))
    before = problem.running_mean.clone(), problem.running_var.clone()
    ours(problem, problem.x, problem.weight, problem.bias)
    assert torch.equal(before[0], problem.running_mean)
    assert torch.equal(before[1], problem.running_var)


# ---- instruction sets and backends ---------------------------------------------------------------


@pytest.mark.cpu_only
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability, rerun_with_capability):
    selection = "widths or any_shape or rounding_to_half or conversions or cancel"
    rerun_with_capability(capability, __file__, selection)


@pytest.mark.cpu_only
def test_instruction_sets_agree(python, usable):
    script = """if True:
        import torch, gankernels as gk
        torch.manual_seed(0)
        x = torch.randn(8, 37, 5, 7)
        y = gk.functional.batch_norm_leaky_relu(x, None, None, training=True)
        print(gk.build_info()["cpu_capability"], y.double().norm().item())
    """
    outputs = [
        python("-c", script, env={"ATEN_CPU_CAPABILITY": c}).stdout.split()
        for c in ("default", "avx2", "avx512")
    ]
    assert [o[0] for o in outputs] == [usable(c) for c in ("default", "avx2", "avx512")]
    norms = [float(o[1]) for o in outputs]
    assert max(norms) - min(norms) < 1e-5 * norms[0]


def test_kernels_are_what_runs(monkeypatch):
    """The tests above would say nothing if the reference had run."""
    calls = []
    from gankernels.ops import batch_norm_leaky_relu as op

    monkeypatch.setattr(op, "reference", lambda *a: calls.append(a))
    problem = Problem(Case())
    ours(problem, problem.x, problem.weight, problem.bias)
    assert not calls
    with gk.use_backend("reference"):
        ours(problem, problem.x, problem.weight, problem.bias)
    assert len(calls) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation_first", ORDERS)
def test_reference_backend_gives_the_same(activation_first, training):
    problem = Problem(Case(activation_first=activation_first, training=training))
    expected = solve(ours, problem)
    with gk.use_backend("reference"):
        assert_close(solve(ours, problem), expected, 1e-5)
    assert distance(expected["y"], ours(problem, problem.x, problem.weight, problem.bias)) == 0
