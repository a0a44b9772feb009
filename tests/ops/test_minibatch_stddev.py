"""The numbers of minibatch_stddev: against Karras' rule, against a loop over groups, and through
second derivatives against the reference in float64."""

import copy

import pytest
import torch
from property_based import given, settings, st

import gankernels as gk
from gankernels.ops.minibatch_stddev import EPS, Options, fused, reference

from .oracle import HALVES, LAYOUTS, assert_as_close_as_pytorch, assert_close, distance, seeded

pytestmark = pytest.mark.every_device

ours = gk.functional.minibatch_stddev


def karras(x, group_size, num_channels):
    """The rule as published, for batches that group_size divides."""
    c, h, w = x.shape[1:]
    y = x.reshape(group_size, -1, num_channels, c // num_channels, h, w)
    y = (y - y.mean(0)).square().mean(0)
    y = (y + 1e-8).sqrt().mean((2, 3, 4)).reshape(-1, num_channels, 1, 1)
    return y.repeat(group_size, 1, h, w)


def loop(x, group_size, num_channels):
    """One group and one run of channels at a time."""
    n, c = x.shape[:2]
    groups = -(-n // group_size)
    result = x.new_empty(n, num_channels, *x.shape[2:])
    for group in range(groups):
        for f in range(num_channels):
            width = c // num_channels
            members = x[group::groups, f * width : (f + 1) * width]
            assert 1 <= len(members) <= group_size
            result[group::groups, f] = (members.var(0, correction=0) + 1e-8).sqrt().mean()
    return result


@pytest.mark.parametrize("num_channels", [1, 2, 3])
@pytest.mark.parametrize(("n", "group_size"), [(4, 4), (12, 4), (8, 2), (6, 6), (3, 1)])
def test_is_karras_rule(n, group_size, num_channels):
    x = torch.randn(n, 6, 4, 4, dtype=torch.float64)
    expected = karras(x, group_size, num_channels)
    torch.testing.assert_close(ours(x, group_size, num_channels), expected)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 19),
    group_size=st.integers(1, 8),
    num_channels=st.integers(1, 3),
    width=st.integers(1, 5),
    space=st.lists(st.integers(1, 4), max_size=3),
    layout=st.sampled_from(("contiguous", "channels_last", "batch_last", "sliced", "expanded")),
)
def test_any_batch(n, group_size, num_channels, width, space, layout):
    torch.manual_seed(n)
    x = LAYOUTS[layout](torch.randn(n, num_channels * width, *space, dtype=torch.float64))
    torch.testing.assert_close(ours(x, group_size, num_channels), loop(x, group_size, num_channels))


# ---- through second derivatives, against float64 -------------------------------------------------


class Problem:
    """x, the gradient of the maps, and the tangent of the gradient of x."""

    def __init__(
        self, shape, dtype=torch.float32, group_size=4, num_channels=1, *,
        layout="contiguous", tangent_layout=None, mean=0.5, std=1.5, seed=0,
    ):  # fmt: skip
        self.arguments = group_size, num_channels

        def draw(*shape, offset):
            return torch.randn(shape, generator=seeded(seed + offset), dtype=torch.float64)

        lay, lay_tangent = LAYOUTS[layout], LAYOUTS[tangent_layout or layout]
        self.x = lay((draw(*shape, offset=0) * std + mean).to(dtype))
        maps = (shape[0], num_channels, *shape[2:])
        self.grad_y = draw(*maps, offset=1).to(dtype)
        self.tangent = lay_tangent(draw(*shape, offset=2).to(dtype))

    def solve(self, function, dtype=None):
        """With a dtype on the CPU, where oracles are solved."""
        x, grad_y, tangent = (
            t.detach().to("cpu", dtype) if dtype else t.detach()
            for t in (self.x, self.grad_y, self.tangent)
        )
        x.requires_grad_()
        grad_y.requires_grad_()
        y = function(x, *self.arguments)
        (grad_x,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
        second = torch.autograd.grad(grad_x, (grad_y, x), tangent)
        names = ("y", "grad_x", "grad_grad_y", "second_x")
        return {k: v.detach() for k, v in zip(names, (y, grad_x, *second), strict=True)}

    def sizes(self):
        """The norms of what results are sums and differences of, where it may cancel: with two
        members nearly all of the second derivative does."""
        x, grad_y, tangent = (
            t.detach().to("cpu", torch.float64)
            for t in vars(self).values()
            if isinstance(t, torch.Tensor)
        )
        group_size, num_channels = self.arguments
        groups = -(-x.shape[0] // group_size)
        first, second, product = 0, 0, 0
        for group in range(groups):
            y, g, t = (
                v[group::groups].reshape(-1, num_channels, v[0].numel() // num_channels)
                for v in (x, grad_y, tangent)
            )
            k, p = y.shape[0], y.shape[2]
            sigma = (y.var(0, correction=0) + EPS).sqrt()
            u = g.abs().sum((0, 2))[:, None] / (p * k)
            first += (u**2 * k).sum() * p
            second += (u * t / sigma).square().sum()
            product += (t.square().sum(0).sqrt().mean(1) ** 2).sum() / k * g[:, 0].numel()
        return {"grad_x": first**0.5, "second_x": second**0.5, "grad_grad_y": product**0.5}

    def check(self, oracle=None):
        tolerance = 1e-13 if self.x.dtype is torch.float64 else 3e-6
        expected = (oracle or self).solve(reference, torch.float64)
        found, sizes = self.solve(ours), self.sizes()
        assert_close({"y": found["y"]}, {"y": expected["y"]}, tolerance)
        wrong = {
            name: (error, size)
            for name, size in sizes.items()
            if not (error := distance(found[name], expected[name])) <= tolerance * size
        }
        assert not wrong, wrong


# (shape, group_size, num_channels): vectors of 2 to 16 positions with and without elements left
# over, tasks of 1024 positions with and without positions left over, groups of one and of two
# sizes, held in registers and not, one thread and several.
SHAPES = [
    *(((8, c, 1), 4, 1) for c in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33)),
    *(((n, 6, 3, 3), 4, 2) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13)),
    *(((6, 5, 4), group_size, 1) for group_size in (1, 2, 3, 5, 6, 7)),
    *(((4, f * 3, 5), 4, f) for f in (1, 2, 3, 7)),
    *(((5, 2, p), 5, 2) for p in (1023, 1024, 1025, 2049)),
    ((8, 6), 4, 3),
    ((6, 4, 2, 3, 2), 3, 2),
    ((40, 3, 5, 5), 40, 1),
    ((16, 64, 8, 8), 4, 2),
    ((13, 40, 13, 7), 5, 5),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize(("shape", "group_size", "num_channels"), SHAPES, ids=str)
def test_oracle(shape, group_size, num_channels, dtype, layout):
    problem = Problem(shape, dtype, group_size, num_channels, layout=layout)
    if dtype not in HALVES:
        problem.check()
        return
    assert_as_close_as_pytorch(
        problem.solve(ours), problem.solve(reference), problem.solve(reference, torch.float64)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_channels", [1, 3])
def test_oracle_strides(layout, num_channels, dtype):
    for x_layout, tangent_layout in ((layout, "contiguous"), ("channels_last", layout)):
        Problem(
            (9, 6, 4, 5), dtype, 4, num_channels, layout=x_layout, tangent_layout=tangent_layout
        ).check()


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 40),
    group_size=st.integers(1, 41),
    num_channels=st.integers(1, 4),
    width=st.integers(1, 20),
    space=st.lists(st.integers(1, 9), max_size=3),
    layout=st.sampled_from(("contiguous", "channels_last", "batch_last", "sliced")),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_oracle_hypothesis(n, group_size, num_channels, width, space, layout, dtype, threads, seed):
    torch.set_num_threads(threads)
    shape = (n, num_channels * width, *space)
    problem = Problem(shape, dtype, group_size, num_channels, layout=layout, seed=seed)
    problem.check()


@pytest.mark.parametrize(("n", "group_size"), [(4, 4), (7, 4), (6, 6)])
@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(n, group_size, num_channels, layout):
    x = torch.randn(n, 4, 2, dtype=torch.float64, generator=seeded())
    x = LAYOUTS[layout](x).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours(x, group_size, num_channels), x)
    assert torch.autograd.gradgradcheck(lambda x: ours(x, group_size, num_channels), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [8, 7, 12])
def test_oracle_large_mean(n, dtype):
    """Deviations of a few units in the last place of the mean: all that float32 holds of them."""
    mean = 1e4 if dtype is torch.float32 else 1e13
    std = mean * 8 * torch.finfo(dtype).eps
    problem = Problem((n, 5, 7, 3), dtype, 6 if n == 12 else 4, mean=mean, std=std)
    around_zero = copy.copy(problem)
    around_zero.x = problem.x.double() - mean  # exactly; the reference would not be exact enough
    problem.check(around_zero)


@pytest.mark.parametrize("std", [1e-6, 1e-4, 1e4, 1e15])
def test_oracle_scales(std):
    """Below, at and above the root of what is added to the variance."""
    Problem((8, 6, 5, 5), mean=0.0, std=std).check()


@pytest.mark.cpu_only
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_oracle_threads(threads):
    torch.set_num_threads(threads)
    Problem((12, 30, 9, 9), group_size=4, num_channels=3).check()
    Problem((64, 300), group_size=64).check()


def test_bitwise_repeatable():
    """Whatever the number of threads: tasks are of a fixed size."""
    problem = Problem((16, 32, 19, 17), num_channels=2)
    first = problem.solve(ours)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for name, value in problem.solve(ours).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.cpu_only
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability, rerun_with_capability):
    rerun_with_capability(capability, __file__, "oracle and not strides and not threads")


@pytest.mark.parametrize("n", [8, 7])
def test_collapsed_group_has_finite_gradients(n):
    x = torch.ones(n, 4, 3, 3, requires_grad=True)
    y = ours(x)
    torch.testing.assert_close(y, torch.full((n, 1, 3, 3), 1e-4))
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * torch.randn_like(first)).sum(), x)
    assert torch.equal(first, torch.zeros_like(x))
    assert second.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_computed_in_float32(dtype):
    x = (torch.randn(8, 6, 4, 4) * 1e-3 + 1).to(dtype)
    torch.testing.assert_close(ours(x), ours(x.float()).to(dtype), rtol=0, atol=0)
    y = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ours(y).sum(), y)
    assert grad.dtype is dtype
    assert grad.isfinite().all()


def test_empty():
    assert ours(torch.zeros(0, 4, 2, 2)).shape == (0, 1, 2, 2)
    assert ours(torch.zeros(3, 4, 0, 2), 2, 2).shape == (3, 2, 0, 2)


def test_oracle_collapsed():
    """All members of some groups agree: derivatives as finite as those of the reference."""
    problem = Problem((12, 6, 5, 5))
    problem.x[::3] = problem.x[:1]  # one group of three
    problem.x[:, :, 0] = 3.0  # some positions of all
    problem.check()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sample", [0, 5])
def test_oracle_not_finite(sample, value):
    """As with the reference, what is not finite stays in its group and feature."""
    problem = Problem((8, 4, 5), num_channels=2)
    problem.x[sample, 1, 2] = value
    expected = problem.solve(reference)
    for name, found in problem.solve(ours).items():
        assert torch.equal(found.isfinite(), expected[name].isfinite()), name
        assert not found.isfinite().all(), name


# ---- PyTorch's side ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_lie_as_the_input(layout):
    problem = Problem((8, 6, 4, 4), num_channels=2, layout=layout)
    found = problem.solve(ours)
    for name in ("grad_x", "second_x"):
        assert found[name].stride() == problem.x.stride()


def test_statistics_are_of_the_accumulation_type():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        stddev = fused.apply(torch.randn(7, 6, 4).to(dtype), Options(4, 3))
        assert stddev.shape == (2, 3)
        assert stddev.dtype is wide


def test_third_derivative_raises():
    x = torch.randn(8, 4, 3, 3, requires_grad=True)
    (first,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"minibatch_stddev .* third derivative"):
        torch.autograd.grad(second.sum(), x)


def test_func_grad_and_vjp():
    x = torch.randn(7, 4, 3, dtype=torch.float64, generator=seeded())

    def loss(function):
        return lambda x: function(x, 4, 2).square().sum()

    def penalty(function):
        return lambda x: torch.func.grad(loss(function))(x).square().sum()

    for of in (loss, penalty):
        torch.testing.assert_close(torch.func.grad(of(ours))(x), torch.func.grad(of(reference))(x))


def test_compiles_without_a_graph_break():
    x = torch.randn(7, 4, 2, 2).requires_grad_()
    compiled = torch.compile(lambda x: ours(x * 2).sum(), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(ours(x * 2).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


def test_meta():
    x = torch.empty(7, 4, 3, device="meta", requires_grad=True)
    y = ours(x, 4, 2)
    assert y.shape == (7, 2, 3)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_saves_only_its_input():
    saved = []
    x = torch.randn(8, 4, 3, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.data_ptr()) or t, lambda t: t
    ):
        ours(x)
    assert saved == [x.data_ptr()]


def test_reference_backend():
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    with gk.use_backend("reference"):
        assert torch.equal(ours(x), reference(x, 4, 1))


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3.0,), TypeError, r"x must be a Tensor, got float"),
        (
            (torch.zeros(2, 3, dtype=torch.int32),),
            TypeError,
            r"x must .*got torch.int32",
        ),
        ((torch.zeros(3),), ValueError, r"x must have shape \(N, C\) or \(N, C, ...\), got \(3,\)"),
        ((torch.zeros(2, 3), 0), ValueError, r"group_size must be at least 1, got 0"),
        ((torch.zeros(2, 3), 4, 0), ValueError, r"num_channels must be at least 1, got 0"),
        (
            (torch.zeros(2, 3), 4, 2),
            ValueError,
            r"x must .* by num_channels=2, got 3",
        ),
        (
            (torch.zeros(2, 0), 4, 1),
            ValueError,
            r"x must .* by num_channels=1, got 0",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ours(*arguments)
