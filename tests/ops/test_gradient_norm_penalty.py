"""The kernels of gradient_norm_penalty."""

import pytest
import torch
from property_based import given, settings, st

import gankernels as gk
from gankernels.functional import gradient_norm_penalty
from gankernels.ops.gradient_norm_penalty import KINDS, reference
from ops.oracle import HALVES, LAYOUTS, assert_as_close_as_pytorch, assert_close, seeded

pytestmark = pytest.mark.every_device

DTYPES = [torch.float32, torch.float64, *HALVES]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def draw(*shape, dtype=torch.float64, seed=0):
    generator = seeded(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def gradients(shape, dtype=torch.float32, seed=0):
    """Samples with norms from 0.3 to 2, so that both sides of the center 1 occur."""
    wide = draw(*shape, seed=seed)
    flat = wide.flatten(1) if wide.dim() > 1 else wide.unsqueeze(1)
    size = 0.3 + 1.7 * torch.rand(shape[0], 1, generator=seeded(seed + 1))
    return (flat / flat.norm(dim=1, keepdim=True) * size).reshape(shape).to(dtype)


def plain(grad, kind="wgan-gp", center=1.0):
    return reference(grad, KINDS[kind], center)


def solve(function, grad, kind, center, tangent):
    """The penalty, its derivative, and that one's derivatives along a tangent."""
    grad = grad.detach().requires_grad_()
    penalty = function(grad, kind, center)
    factor = penalty.new_tensor(0.7).requires_grad_()
    (first,) = torch.autograd.grad(penalty, grad, factor, create_graph=True)
    second = torch.autograd.grad(first, (grad, factor), tangent)
    names = ("penalty", "first", "second", "second_factor")
    found = dict(zip(names, (penalty, first, *second), strict=True))
    return {name: value.detach() for name, value in found.items()}


def check(grad, kind="wgan-gp", center=1.0, tangent=None, floor=0.0):
    if tangent is None:
        tangent = draw(*grad.shape, dtype=grad.dtype, seed=9)
    actual = solve(gradient_norm_penalty, grad, kind, center, tangent)
    expected = solve(plain, grad.double().cpu(), kind, center, tangent.double().cpu())
    if grad.dtype in HALVES:
        pytorch = solve(plain, grad, kind, center, tangent)
        halves, wide = ("first", "second"), ("penalty", "second_factor")
        assert_as_close_as_pytorch(
            *({n: r[n] for n in halves} for r in (actual, pytorch, expected))
        )
        assert_close(*({n: r[n] for n in wide} for r in (actual, expected)), 1e-5, floor)
    else:
        assert_close(actual, expected, TOLERANCE[grad.dtype], floor)
    wide = torch.promote_types(grad.dtype, torch.float32)
    dtypes = {name: value.dtype for name, value in actual.items()}
    assert dtypes == {
        "penalty": wide, "first": grad.dtype, "second": grad.dtype, "second_factor": wide
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("center", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(12,), (6, 5), (8, 3, 7), (5, 3, 4, 6), (3, 2, 3, 2, 3)], ids=str
)
def test_oracle(shape, kind, center, dtype):
    check(gradients(shape, dtype), kind, center)


def test_oracle_by_hand():
    grad = torch.tensor([[3.0, 4.0], [0.0, 0.5], [0.0, 0.0]])
    expected = {
        "wgan-gp": (16 + 0.25 + 1) / 3,
        "dragan": (16 + 0.25 + 1) / 3,
        "wgan-lp": 16 / 3,
        "r1": 25.25 / 3,
        "r2": 25.25 / 3,
    }
    for kind, value in expected.items():
        assert gradient_norm_penalty(grad, kind).item() == pytest.approx(value)
        with gk.use_backend("reference"):
            assert gradient_norm_penalty(grad, kind).item() == pytest.approx(value)
    assert gradient_norm_penalty(grad, center=5.0).item() == pytest.approx((4.5**2 + 25) / 3)


# Around vectors, four of them, and the chunks in which sums are taken.
WIDTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 4095, 4096, 4097, 8193)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_widths(dtype):
    for d in WIDTHS:
        for n in (1, 3):
            check(gradients((n, d), dtype, seed=d), "wgan-gp", 1.0)


@pytest.mark.cpu_only
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("n", "d"),
    [
        (1, 40_003),
        (2, 20_001),
        (3, 16_385),
        (7, 4097),
        (17, 1000),
        (16, 1024),
        (40, 999),
        (9001, 3),
    ],
)
def test_oracle_threads(n, d, threads):
    """Few samples are divided among the threads, many are dealt out to them."""
    torch.set_num_threads(threads)
    check(gradients((n, d)), "wgan-lp")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 1_500_001), torch.float32),
        ((512, 8209), torch.float32),
        ((3, 1_000_003), torch.float64),
        ((1001, 8_401), torch.bfloat16),
    ],
)
def test_results_beyond_16_MiB(shape, dtype):
    """Stored past the caches, from addresses that are no multiples of a vector."""
    grad = gradients(shape, dtype)
    assert grad.nbytes > 16 << 20
    if dtype is torch.bfloat16:  # not compared with PyTorch's own: rounding is all there is
        tangent = draw(*shape, dtype=dtype, seed=9)
        found = solve(gradient_norm_penalty, grad, "wgan-gp", 1.0, tangent)
        wide = solve(plain, grad.float(), "wgan-gp", 1.0, tangent.float())
        return assert_close(found, wide, 2.0**-8)
    return check(grad)


LAYOUTS = {
    **LAYOUTS,
    "offset": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "rows_apart": lambda x: torch.stack((x, x), 1)[:, 0],
    "columns_reversed": lambda x: x.flip(-1).contiguous().flip(-1),
}
SHAPES = [(9,), (7, 5), (6, 3, 5), (6, 3, 4, 5), (4, 3, 2, 3, 2)]
LAID_OUT = [
    (shape, layout)
    for shape in SHAPES
    for layout in LAYOUTS
    if len(shape) > 1 or layout not in ("channels_last", "batch_last", "padded", "expanded_space")
]


@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
@pytest.mark.parametrize(("shape", "layout"), LAID_OUT, ids=str)
def test_oracle_strides(shape, layout, kind):
    grad = LAYOUTS[layout](gradients(shape))
    check(grad, kind)
    contiguous = grad.contiguous()
    assert gradient_norm_penalty(grad, kind) == gradient_norm_penalty(contiguous, kind) or (
        layout in ("channels_last", "batch_last")  # summed in another order
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outer", LAYOUTS)
def test_oracle_tangent_strides(outer, layout):
    """The tangent is laid out differently from the gradient."""
    shape = (6, 3, 4, 5)
    tangent = LAYOUTS[outer](draw(*shape, dtype=torch.float32, seed=9))
    check(LAYOUTS[layout](gradients(shape)), tangent=tangent, floor=0.01)


def test_layout_is_kept():
    grad = LAYOUTS["channels_last"](gradients((6, 3, 4, 5))).requires_grad_()
    (first,) = torch.autograd.grad(gradient_norm_penalty(grad), grad, create_graph=True)
    assert first.stride() == grad.stride()
    (second,) = torch.autograd.grad(first.square().sum(), grad)
    assert second.stride() == grad.stride()


@st.composite
def any_gradient(draw_):
    shape = (draw_(st.integers(1, 12)), *draw_(st.lists(st.integers(1, 9), max_size=3)))
    names = [name for s, name in LAID_OUT if len(s) == min(len(shape), 2)]
    return (
        gradients(shape, draw_(st.sampled_from(DTYPES)), draw_(st.integers(0, 99))),
        draw_(st.sampled_from(names)),
        draw_(st.sampled_from(names)),
        draw_(st.sampled_from(list(KINDS))),
        draw_(st.sampled_from([0.0, 0.5, 1.0])),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(any_gradient(), st.sampled_from([1, 2]))
def test_oracle_any_shape(problem, threads):
    torch.set_num_threads(threads)
    grad, layout, outer, kind, center = problem
    grad = LAYOUTS[layout](grad)
    tangent = LAYOUTS[outer](draw(*grad.shape, dtype=grad.dtype, seed=9))
    found = solve(gradient_norm_penalty, grad, kind, center, tangent)
    expected = solve(plain, grad.double().cpu(), kind, center, tangent.double().cpu())
    # Where an excess or a product is next to nothing there is no relative accuracy.
    tolerance = TOLERANCE.get(grad.dtype, 4 * torch.finfo(grad.dtype).eps)
    assert_close(found, expected, tolerance, floor=1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4,), (3, 5), (3, 2, 2), (2, 3, 2, 2)], ids=str)
def test_gradcheck_and_gradgradcheck(shape, kind):
    grad = gradients(shape, torch.float64).requires_grad_()

    def function(g):
        return gradient_norm_penalty(g, kind, 0.9)

    assert torch.autograd.gradcheck(function, grad)
    assert torch.autograd.gradgradcheck(function, grad)


@pytest.mark.parametrize("kind", KINDS)
def test_third_derivative_raises(kind):
    grad = gradients((3, 5)).requires_grad_()
    (first,) = torch.autograd.grad(gradient_norm_penalty(grad, kind), grad, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), grad, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gradient_norm_penalty .* third derivative"):
        torch.autograd.grad(second.sum(), grad)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_derivative_at_zero_is_zero(kind, dtype, backend):
    grad = gradients((4, 6), dtype)
    grad[1] = 0
    tangent = draw(4, 6, dtype=dtype)
    with gk.use_backend(backend):
        found = solve(gradient_norm_penalty, grad, kind, 1.0, tangent)
        rest = solve(gradient_norm_penalty, grad[[0, 2, 3]], kind, 1.0, tangent[[0, 2, 3]])
    assert all(value.isfinite().all() for value in found.values())
    assert not found["first"][1].any()
    if kind not in ("r1", "r2"):
        assert not found["second"][1].any()
    at_zero = 1.0 if kind in ("wgan-gp", "dragan") else 0.0
    torch.testing.assert_close(4 * found["penalty"], 3 * rest["penalty"] + at_zero)
    close = {"rtol": 1e-2, "atol": 1e-3} if dtype in HALVES else {}
    for name in ("first", "second"):
        torch.testing.assert_close(4 * found[name][[0, 2, 3]], 3 * rest[name], **close)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_and_empty_samples(kind):
    nothing = torch.zeros(0, 5, requires_grad=True)
    penalty = gradient_norm_penalty(nothing, kind)
    assert penalty.isnan()  # a mean over nothing
    (first,) = torch.autograd.grad(penalty, nothing, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), nothing)
    assert first.shape == second.shape == (0, 5)
    flat = torch.zeros(3, 0, requires_grad=True)
    penalty = gradient_norm_penalty(flat, kind)
    assert penalty == (1.0 if kind in ("wgan-gp", "dragan") else 0.0)
    assert torch.autograd.grad(penalty, flat)[0].shape == (3, 0)


def test_one_sample():
    check(gradients((1, 3, 4, 5)))


def test_not_a_number_spreads():
    grad = gradients((3, 40_000)).requires_grad_()
    with torch.no_grad():
        grad[1, 39_999] = float("nan")
    penalty = gradient_norm_penalty(grad)
    assert penalty.isnan()
    (first,) = torch.autograd.grad(penalty, grad)
    assert first[1].isnan().all()
    assert first[[0, 2]].isfinite().all()


def test_large_half_gradients_do_not_overflow():
    grad = torch.full((2, 1000), 300.0, dtype=torch.float16)  # squares are beyond 65504
    assert gradient_norm_penalty(grad, "r1").item() == pytest.approx(9e7)


def test_sums_of_many_do_not_drift():
    """A million equal terms: a plain float32 sum would be off in the fourth digit."""
    grad = torch.full((1, 1 << 20), 1.1)
    exact = (1 << 20) * float(torch.tensor(1.1)) ** 2
    assert gradient_norm_penalty(grad, "r1").item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 20_001), (16, 3000), (64, 785)], ids=str)
def test_repeats_bitwise(shape):
    torch.set_num_threads(2)
    grad, tangent = gradients(shape), draw(*shape, dtype=torch.float32)
    first = solve(gradient_norm_penalty, grad, "wgan-gp", 1.0, tangent)
    for _ in range(5):
        again = solve(gradient_norm_penalty, grad, "wgan-gp", 1.0, tangent)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.cpu_only
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability, rerun_with_capability):
    selection = "oracle_widths or oracle_threads or shape0-dtype0 or drift or at_zero"
    rerun_with_capability(capability, __file__, selection)


def test_compiles_without_a_graph_break():
    def loss(grad):
        return gradient_norm_penalty(grad.square(), "wgan-lp")

    grad = gradients((6, 5)).mul(2).requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(grad), loss(grad))
    expected = torch.autograd.grad(loss(grad), grad)
    torch.testing.assert_close(torch.autograd.grad(compiled(grad), grad), expected)


def test_func_grad_of_grad():
    grad = gradients((6, 5), torch.float64)

    def slope(function):
        return torch.func.grad(lambda g: torch.func.grad(function)(g).square().sum())(grad)

    torch.testing.assert_close(slope(gradient_norm_penalty), slope(plain))


def test_saves_no_copy_of_the_gradient():
    grad = gradients((8, 100)).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gradient_norm_penalty(grad)
    others = [t for t in saved if t.data_ptr() != grad.data_ptr()]
    assert sum(t.numel() for t in others) == 8


def test_norm_penalty_errors():
    with pytest.raises(TypeError, match="grad must be a Tensor, got list"):
        gradient_norm_penalty([1.0])
    with pytest.raises(TypeError, match=r"grad must .* torch.float32, .*got torch.int64"):
        gradient_norm_penalty(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"grad must have shape \(N, ...\), got a scalar"):
        gradient_norm_penalty(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"kind must be one of 'wgan-gp', 'wgan-lp', .*got 'gp'"):
        gradient_norm_penalty(torch.zeros(3, 2), "gp")
