"""The numbers of minibatch_discrimination, through second derivatives, ties included."""

import itertools

import numpy
import pytest
import torch
from property_based import given, settings, st

import gankernels as gk
from gankernels.ops.minibatch_discrimination import reference

from .oracle import HALVES, assert_as_close_as_pytorch, assert_close, seeded

pytestmark = pytest.mark.every_device

ours = gk.functional.minibatch_discrimination

# B around the widths of vectors (4, 8 and 16 floats; 2, 4 and 8 doubles), alone and as a remainder
# that puts one, two, three or more samples side by side.
KERNELS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 31, 32, 33, 100)
SHAPES = [
    *((13, b, 3) for b in KERNELS),
    *((n, 5, 2) for n in (0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 63, 64, 65)),
    *((9, 17, c) for c in (1, 2, 4, 5, 15, 16, 17, 33, 512)),
    (0, 0, 0),
    (4, 0, 3),
    (131, 18, 4),  # more than one block of samples
    (400, 3, 2),
    (700, 1, 1),
    (300, 33, 2),
    (90, 2, 300),  # blocks of the fewest samples
]


def draw(shape, dtype=torch.float32, *, seed=0, ties=True, scale=None):
    """Samples of which some are equal, in all kernels or in some dimensions."""
    generator = seeded(seed)
    n, _, c = shape
    m = torch.randn(shape, generator=generator, dtype=torch.float64)
    m *= (2 / max(c, 1)) if scale is None else scale
    if ties and n > 2:
        m[1] = m[0]
        m[n // 2, :, : c // 2 + 1] = m[n - 1, :, : c // 2 + 1]
    return m.to(dtype)


class Problem:
    """m, the gradient of o, and the tangent of the gradient of m."""

    def __init__(self, shape, dtype=torch.float32, **options):
        generator = seeded(1)
        self.m = draw(shape, dtype, **options)
        self.grad_o = torch.randn(shape[:2], generator=generator).to(dtype)
        self.tangent = torch.randn(shape, generator=generator).to(dtype)

    def solve(self, function, dtype=None):
        """With a dtype on the CPU, where oracles are solved."""
        m, grad_o, tangent = (
            t.detach().to("cpu", dtype) if dtype else t.detach()
            for t in (self.m, self.grad_o, self.tangent)
        )
        m.requires_grad_()
        grad_o.requires_grad_()
        o = function(m)
        (grad_m,) = torch.autograd.grad(o, m, grad_o, create_graph=True)
        second = torch.autograd.grad(grad_m, (grad_o, m), tangent, materialize_grads=True)
        names = ("o", "grad_m", "grad_grad_o", "second_m")
        return {k: v.detach() for k, v in zip(names, (o, grad_m, *second), strict=True)}

    def check(self, tolerance=1e-5):
        expected = self.solve(reference, torch.float64)
        # Where a sum cancels to nothing, its rounding is measured against one term of it.
        assert_close(self.solve(ours), expected, tolerance, floor=1e-3)


# ---- against float64 ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle_float32(shape):
    Problem(shape).check(1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle_float64(shape):
    Problem(shape, torch.float64).check(1e-13)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle_half(shape, dtype):
    problem = Problem(shape, dtype)
    assert_as_close_as_pytorch(
        problem.solve(ours), problem.solve(reference), problem.solve(reference, torch.float64)
    )


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 30.0])
def test_oracle_scales(scale):
    Problem((40, 20, 5), scale=scale).check(3e-5 if scale == 1e-6 else 1e-5)


LAYOUTS = {
    "samples_last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "kernels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda t: torch.stack((t, t), -1)[..., 0],
    "padded": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "reversed": lambda t: t.flip(0).contiguous().flip(0),
    "expanded_samples": lambda t: t[:1].expand_as(t),
    "expanded_last": lambda t: t[..., :1].expand_as(t),
    "one_number": lambda t: t.flatten()[0].expand_as(t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("which", ["m", "grad_o", "tangent"])
def test_oracle_strides(which, name, dtype):
    for shape in ((11, 21, 3), (11, 16, 1)):
        problem = Problem(shape, dtype)
        setattr(problem, which, LAYOUTS[name](getattr(problem, which)))
        if dtype is torch.bfloat16:
            plain = problem.solve(reference)
            assert_as_close_as_pytorch(
                problem.solve(ours), plain, problem.solve(reference, torch.float64)
            )
        else:
            problem.check()


def test_oracle_sum_sends_back_an_expanded_gradient():
    m = draw((9, 18, 4), torch.float64).requires_grad_()
    expected = torch.autograd.grad(reference(m).sum(), m)[0]
    torch.testing.assert_close(torch.autograd.grad(ours(m).sum(), m)[0], expected)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 40),
    b=st.integers(1, 40),
    c=st.integers(1, 20),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    threads=st.integers(1, 3),
    copies=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=8),
    order=st.permutations((0, 1, 2)),
    seed=st.integers(0, 1000),
)
def test_oracle_hypothesis(n, b, c, dtype, threads, copies, order, seed):
    torch.set_num_threads(threads)
    problem = Problem((n, b, c), dtype, seed=seed, ties=False)
    for source, target in copies:
        if n:
            problem.m[target % n] = problem.m[source % n]
    inverse = [order.index(d) for d in range(3)]
    problem.m = problem.m.permute(order).contiguous().permute(inverse)
    problem.check(1e-12 if dtype is torch.float64 else 1e-5)


@pytest.mark.parametrize("shape", [(6, 3, 2), (5, 17, 3), (7, 4, 1), (9, 1, 4), (2, 9, 2)], ids=str)
def test_gradcheck(shape):
    m = draw(shape, torch.float64, ties=False, scale=1).requires_grad_()
    assert torch.autograd.gradcheck(ours, m)
    assert torch.autograd.gradgradcheck(ours, m)


def test_gradcheck_several_blocks_and_threads():
    torch.set_num_threads(2)
    m = draw((40, 1, 1), torch.float64, ties=False, scale=20).requires_grad_()
    assert torch.autograd.gradgradcheck(ours, m, fast_mode=True)
    m = draw((140, 2, 1), torch.float64, ties=False, scale=100).requires_grad_()
    assert torch.autograd.gradcheck(ours, m, fast_mode=True)


# ---- ties and extremes -------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 3, 16, 21])
def test_oracle_collapsed_batch(b):
    problem = Problem((50, b, 4))
    problem.m = problem.m[:1].repeat(50, 1, 1)
    result = problem.solve(ours)
    assert torch.equal(result["o"], torch.full((50, b), 49.0))
    for name in ("grad_m", "grad_grad_o", "second_m"):
        assert torch.equal(result[name], torch.zeros_like(result[name])), name


def test_one_dimension_tied():
    """Equal in one dimension, apart in the other: that one's gradient is zero."""
    m = torch.tensor([[[1.0, 2.0]], [[1.0, 2.5]]], requires_grad=True)
    (grad,) = torch.autograd.grad(ours(m).sum(), m)
    assert torch.equal(grad[..., 0], torch.zeros(2, 1))
    e = torch.exp(torch.tensor(-0.5)).item()
    assert grad[..., 1].flatten().tolist() == pytest.approx([2 * e, -2 * e])


def test_kernels_of_no_dimension():
    assert torch.equal(ours(torch.zeros(5, 3, 0)), torch.full((5, 3), 4.0))


def test_batch_of_one_and_none():
    for n in (0, 1):
        m = torch.randn(n, 3, 2, requires_grad=True)
        o = ours(m)
        assert torch.equal(o, torch.zeros(n, 3))
        assert torch.equal(torch.autograd.grad(o.sum(), m)[0], torch.zeros(n, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("b", [1, 3, 16, 21])
def test_oracle_far_apart_is_exactly_zero(b, dtype):
    problem = Problem((7, b, 3), dtype, ties=False)
    problem.m = problem.m.sign() * 1e30 * torch.arange(1, 8, dtype=dtype).reshape(7, 1, 1)
    for name, value in problem.solve(ours).items():
        assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("b", [3, 16, 21])
def test_oracle_nan_reaches_its_kernel_and_no_other(b):
    problem = Problem((9, b, 3), ties=False)
    problem.m[4, 2, 1] = torch.nan
    expected = problem.solve(reference)
    for name, value in problem.solve(ours).items():
        assert torch.equal(value.isnan(), expected[name].isnan()), name
        assert not value[:, torch.arange(b) != 2].isnan().any(), name


def test_oracle_infinity():
    problem = Problem((10, 3, 2))
    problem.m[4, 1, 0] = torch.inf
    problem.m[5, 2, 0] = -torch.inf
    assert_close({"o": ours(problem.m)}, {"o": reference(problem.m.double())}, 1e-6)


# ---- accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_oracle_exp_within_two_units_in_the_last_place(dtype, device):
    """o of two samples, one of them zero, is exp of minus the other."""
    limit = {torch.float32: 87.3365, torch.float64: 708.396}[dtype]
    distances = torch.cat(
        (
            torch.linspace(0, 3, 60_000, dtype=torch.float64),
            torch.linspace(3, limit, 60_000, dtype=torch.float64),
            torch.logspace(-30, 0, 2_000, dtype=torch.float64),
        )
    ).to(dtype)
    o = ours(torch.stack((torch.zeros_like(distances), distances)).unsqueeze(-1))[0]
    distances = distances.cpu().numpy()
    expected = numpy.exp(-distances.astype(numpy.longdouble))  # 64 bits of mantissa on x86
    unit = numpy.spacing(expected.astype(distances.dtype)).astype(numpy.longdouble)
    error = abs(o.cpu().numpy() - expected) / unit
    # CUDA's exponent in float32 is rounded once, as the sums are that a distance is made of.
    allowed = 2 + (2 * distances if device == "cuda" and dtype is torch.float32 else 0)
    assert (error <= allowed).all(), distances[int((error - allowed).argmax())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_oracle_exp_beyond_the_normal_numbers_is_zero(dtype):
    limit = -torch.tensor(torch.finfo(dtype).tiny, dtype=torch.float64).log()
    m = torch.stack((torch.zeros(2), torch.stack((limit * 1.001, torch.tensor(torch.inf)))))
    assert torch.equal(ours(m.to(dtype).unsqueeze(-1)), torch.zeros(2, 2, dtype=dtype))


def test_long_sums():
    """Thousands of terms near one: neither the sum nor the gradient loses digits."""
    Problem((1500, 1, 2), scale=0.05).check(1e-6)
    same = torch.zeros(5000, 1, 1)
    assert torch.equal(ours(same), torch.full((5000, 1), 4999.0))


@pytest.mark.parametrize("shape", [(64, 100, 5), (300, 18, 3), (257, 3, 2)], ids=str)
def test_bitwise_repeatable(shape):
    torch.set_num_threads(2)
    problem = Problem(shape)
    first = problem.solve(ours)
    for _ in range(3):
        for name, value in problem.solve(ours).items():
            assert torch.equal(value, first[name]), name
    for threads in (1, 3, 5):
        torch.set_num_threads(threads)
        assert_close(problem.solve(ours), first, 1e-6)


@pytest.mark.cpu_only
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_oracle_threads(threads):
    torch.set_num_threads(threads)
    for shape in ((200, 20, 4), (150, 2, 3), (120, 100, 2)):
        Problem(shape).check(1e-6)


@pytest.mark.cpu_only
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability, rerun_with_capability):
    rerun_with_capability(capability, __file__, "oracle and not strides and not threads")


# ---- PyTorch's side ----------------------------------------------------------------------------


def test_third_derivative_raises():
    m = draw((5, 3, 2)).requires_grad_()
    (first,) = torch.autograd.grad(ours(m).sum(), m, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), m, create_graph=True)
    with pytest.raises(RuntimeError, match=r"minibatch_discrimination .* third derivative"):
        torch.autograd.grad(second.sum(), m)


def test_second_derivative_of_some_inputs_only():
    problem = Problem((8, 5, 3), torch.float64)
    expected = problem.solve(reference)
    for wanted in ("grad_grad_o", "second_m"):
        m, grad_o = problem.m.clone().requires_grad_(), problem.grad_o.clone()
        grad_o.requires_grad_(wanted == "grad_grad_o")
        (first,) = torch.autograd.grad(ours(m), m, grad_o, create_graph=True)
        of = grad_o if wanted == "grad_grad_o" else m
        (second,) = torch.autograd.grad(first, of, problem.tangent)
        torch.testing.assert_close(second, expected[wanted])


def test_func_grad_and_vjp():
    m = draw((6, 4, 3), torch.float64)

    def loss(function):
        return lambda m: function(m).square().sum()

    expected = torch.func.grad(loss(reference))(m)
    torch.testing.assert_close(torch.func.grad(loss(ours))(m), expected)

    def penalty(function):
        return lambda m: torch.func.grad(loss(function))(m).square().sum()

    torch.testing.assert_close(
        torch.func.grad(penalty(ours))(m), torch.func.grad(penalty(reference))(m)
    )


def test_compiles_without_a_graph_break():
    m = draw((6, 4, 3)).requires_grad_()
    compiled = torch.compile(lambda m: ours(m * 2).sum(), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(ours(m * 2).sum(), m)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(m), m)[0], expected)


def test_meta():
    m = torch.empty(5, 3, 2, device="meta", requires_grad=True)
    o = ours(m)
    assert o.shape == (5, 3)
    assert torch.autograd.grad(o.sum(), m)[0].shape == m.shape


def test_saves_only_its_input():
    saved = []
    m = draw((20, 10, 4)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.data_ptr()) or t, lambda t: t
    ):
        ours(m)
    assert saved == [m.data_ptr()]


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace(dtype):
    """At most twice the bytes of m, besides results, O(N B) and the blocks of each thread."""
    torch.set_num_threads(2)
    shape = (700, 112, 16)
    problem = Problem(shape, dtype)
    of_m, of_o = problem.m.nbytes, problem.grad_o.nbytes
    size = torch.ops.gankernels
    results = {
        "forward": (lambda: size.minibatch_discrimination(problem.m), of_o),
        "backward": (
            lambda: size.minibatch_discrimination_backward(problem.grad_o, problem.m), of_m,
        ),
        "double backward": (
            lambda: size.minibatch_discrimination_double_backward(
                problem.tangent, problem.grad_o, problem.m, True
            ),
            of_m + of_o,
        ),
    }  # fmt: skip
    for name, (run, result) in results.items():
        used = _largest_allocation(run)
        assert used <= max(result, 2 * of_m + 32 * of_o + (4 << 20)), (name, used / of_m)


def _largest_allocation(run):
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    return max(e.nbytes() for e in profile.profiler.kineto_results.events())


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "error", "message"),
    [
        ([1.0], TypeError, r"m must be a Tensor, got list"),
        (
            torch.zeros(2, 3, 4, dtype=torch.int64),
            TypeError,
            r"m must .*got torch.int64",
        ),
        (torch.zeros(2, 3, 4, dtype=torch.complex64), TypeError, r"m must .*got torch.complex64"),
        (torch.zeros(2, 3), ValueError, r"m must have shape \(N, B, C\), got \(2, 3\)"),
        (torch.zeros(()), ValueError, r"m must have shape \(N, B, C\), got \(\)"),
    ],
)
def test_errors(m, error, message):
    with pytest.raises(error, match=message):
        ours(m)


def test_reference_backend():
    m = draw((7, 5, 3), torch.float64)
    with gk.use_backend("reference"):
        assert torch.equal(ours(m), reference(m))


def test_reference_is_the_definition():
    m = draw((5, 3, 2), torch.float64)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for n, j in itertools.permutations(range(5), 2):
        expected[n] += torch.exp(-(m[n] - m[j]).abs().sum(-1))
    torch.testing.assert_close(reference(m), expected)
