"""gradient_norm_penalty, interpolate and gradient_penalty."""

import copy
import math

import pytest
import torch
from ops.oracle import HALVES, LAYOUTS, assert_as_close_as_pytorch, assert_close, seeded
from property_based import given, settings, st
from torch import nn

import gankernels as gk
from gankernels import functional
from gankernels.functional import gradient_norm_penalty, gradient_penalty, interpolate
from gankernels.ops.gradient_norm_penalty import KINDS, reference

pytestmark = pytest.mark.every_device

DTYPES = [torch.float32, torch.float64, *HALVES]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def draw(*shape, dtype=torch.float64, seed=0):
    generator = seeded(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# ---- gradient_norm_penalty: the kernels ----------------------------------------------------------


def gradients(shape, dtype=torch.float32, seed=0):
    """Samples with norms from 0.3 to 2, so that both sides of the centre 1 occur."""
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


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("contiguous", torch.float64),
        ("contiguous", torch.bfloat16),
        ("channels_last", torch.float32),
        ("sliced", torch.float32),
        ("expanded", torch.float32),
    ],
)
def test_opcheck(layout, dtype):
    ops = torch.ops.gankernels
    wide = torch.promote_types(dtype, torch.float32)
    grad = LAYOUTS[layout](gradients((4, 3, 2, 5), dtype))
    tangent, factor = draw(4, 3, 2, 5, dtype=dtype), torch.tensor(0.5, dtype=wide)
    for kind in sorted(set(KINDS.values())):
        torch.library.opcheck(ops.gradient_norm_penalty.default, (grad, kind, 1.0))
        _, norms = ops.gradient_norm_penalty(grad, kind, 1.0)
        inputs = (factor, grad, norms, kind, 1.0)
        torch.library.opcheck(ops.gradient_norm_penalty_backward.default, inputs)
        op = ops.gradient_norm_penalty_double_backward.default
        torch.library.opcheck(op, (tangent, *inputs))


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


# ---- interpolate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "sliced"])
def test_interpolate(layout, dtype):
    real, fake = (
        LAYOUTS[layout](draw(5, 3, 4, 2, dtype=dtype)),
        draw(5, 3, 4, 2, dtype=dtype, seed=1),
    )
    alpha = torch.rand(5, generator=seeded(0)).to(dtype)
    found = interpolate(real, fake, alpha)
    assert found.dtype == dtype
    a = alpha.double().reshape(5, 1, 1, 1)
    expected = a * real.double() + (1 - a) * fake.double()
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 1, 2, 2, 3)], ids=str)
def test_interpolate_derivatives_and_rank(shape):
    inputs = [draw(*shape), draw(*shape, seed=1), torch.rand(4, dtype=torch.float64)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(interpolate, inputs)
    assert torch.autograd.gradgradcheck(interpolate, inputs)


def test_interpolate_ends():
    real, fake = draw(2, 3), draw(2, 3, seed=1)
    found = interpolate(real, fake, torch.tensor([1.0, 0.0]))
    assert torch.equal(found, torch.stack((real[0], fake[1])))
    assert interpolate(real[:0], fake[:0], torch.zeros(0)).shape == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.ones(1), torch.ones(1)), TypeError, "real must be a Tensor, got list"),
        ((torch.ones(1), torch.ones(1).int(), torch.ones(1)), TypeError, "fake must have one of"),
        ((torch.ones(1), torch.ones(1), 0.5), TypeError, "alpha must .*float"),
        ((torch.ones(2, 3), torch.ones(2, 4), torch.ones(2)), ValueError, r"fake .*, got \(2, 4\)"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 1)), ValueError, r"alpha .* \(2, 1\)"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)), ValueError, r"alpha .*, got \(3,\)"),
        ((torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0)), ValueError, "alpha must"),
    ],
)  # fmt: skip
def test_interpolate_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        interpolate(*arguments)


# ---- gradient_penalty ----------------------------------------------------------------------------


class Patches(nn.Module):
    """A convolutional critic that answers with a map (N, 1, h, w)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 2))

    def forward(self, x):
        return self.layers(x)


class Labelled(nn.Module):
    """A critic that takes labels and a weight as further arguments."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 72)
        self.layers = nn.Sequential(nn.Linear(72, 8), nn.Softplus(), nn.Linear(8, 1))

    def forward(self, x, labels, weight):
        return weight * self.layers(x.flatten(1) * self.embedding(labels)).flatten()


class Cubic(nn.Module):
    """For inputs of any rank: a sum of a_i x^i over all elements but the first dimension."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.3, -0.4, 0.5]))

    def forward(self, x):
        powers = self.a[0] * x + self.a[1] * x**2 + self.a[2] * x**3
        return powers.flatten(1).sum(1) if x.dim() > 1 else powers


def dense(*activation, features=72):
    layers = activation or (nn.LeakyReLU(0.2),)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(features, 16), *layers, nn.Linear(16, 16), *layers, nn.Linear(16, 1)
    )


IMAGE = (2, 6, 6)
CRITICS = {
    "(N, 1)": (dense, IMAGE, ()),
    "(N,)": (lambda: nn.Sequential(dense(), nn.Flatten(0)), IMAGE, ()),
    "(N, 1, h, w)": (Patches, IMAGE, ()),
    "labels": (Labelled, IMAGE, (torch.arange(5) % 3, 1.5)),
    "rank 1": (Cubic, (), ()),
    "rank 2": (Cubic, (7,), ()),
    "rank 3": (Cubic, (2, 3), ()),
    "rank 5": (Cubic, (2, 1, 3, 2), ()),
    "batch norm": (
        lambda: dense(gk.nn.BatchNormLeakyReLU1d(16)), IMAGE, ()
    ),
}  # fmt: skip


def problem(name, dtype=torch.float64, n=5):
    torch.manual_seed(0)
    make, shape, arguments = CRITICS[name]
    critic = make().to(dtype)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter *= 2  # norms on both sides of 1
    real, fake = draw(n, *shape, dtype=dtype), draw(n, *shape, dtype=dtype, seed=1)
    arguments = tuple(a.to(real.device) if isinstance(a, torch.Tensor) else a for a in arguments)
    return critic, real, fake, arguments


def eager(critic, real, fake, kind, center, arguments, state):
    """The penalty as it is written by hand."""
    n = len(real)
    if kind.startswith("wgan"):
        alpha = torch.rand(n, dtype=real.dtype, generator=state).reshape(
            n, *(1,) * (real.dim() - 1)
        )
        x = alpha * real + (1 - alpha) * fake
    elif kind == "dragan":
        x = real + 0.5 * real.std() * torch.rand(real.shape, dtype=real.dtype, generator=state)
    else:
        x = real if kind == "r1" else fake
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x, *arguments).sum(), x, create_graph=True)
    norm = g.reshape(n, -1).norm(2, dim=1)
    if kind in ("r1", "r2"):
        return (norm**2).mean()
    return ((norm - center) if kind != "wgan-lp" else (norm - center).clamp(min=0)).pow(2).mean()


def parameter_gradients(critic, penalty):
    parameters = [p for p in critic.parameters() if p.requires_grad]
    found = torch.autograd.grad(penalty, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(map(str, range(len(found))), found, strict=True))


def rng_state():
    """Of the default device's own generator."""
    on_cuda = torch.get_default_device().type == "cuda"
    return torch.cuda.get_rng_state() if on_cuda else torch.get_rng_state()


@pytest.mark.parametrize("center", [1.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CRITICS)
def test_penalty_against_eager(name, kind, center):
    critic, real, fake, arguments = problem(name)
    expected = eager(critic, real, fake, kind, center, arguments, seeded())
    found = gradient_penalty(
        critic, real, fake, kind=kind, center=center, critic_args=arguments, generator=seeded()
    )
    assert found.shape == ()
    torch.testing.assert_close(found, expected)
    ours, theirs = (parameter_gradients(critic, p) for p in (found, expected))
    assert any(g.any() for g in theirs.values()) or (kind, center) == ("wgan-lp", 1.0)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["dragan", "r1"])
def test_fakes_are_not_needed(kind):
    critic, real, fake, _ = problem("(N, 1)")
    without = gradient_penalty(critic, real, kind=kind, generator=seeded())
    assert without == gradient_penalty(critic, real, fake, kind=kind, generator=seeded())


def test_wgan_gp_is_the_default():
    critic, real, fake, _ = problem("(N, 1)")
    chosen = gradient_penalty(critic, real, fake, kind="wgan-gp", center=1.0, generator=seeded())
    assert gradient_penalty(critic, real, fake, generator=seeded()) == chosen
    assert gk.functional.gradient_penalty is gradient_penalty


class Probe:
    """A critic that keeps what it is shown."""

    def __call__(self, x):
        self.x = x.detach().clone()
        self.seen = x
        return x.flatten(1).square().sum(1)


def test_alpha_is_uniform_and_one_per_sample():
    real, fake = draw(4000, 3, 2), draw(4000, 3, 2, seed=1)
    for kind in ("wgan-gp", "wgan-lp"):
        probe = Probe()
        gradient_penalty(probe, real, fake, kind=kind, generator=seeded())
        alpha = ((probe.x - fake) / (real - fake)).flatten(1)
        torch.testing.assert_close(alpha, alpha[:, :1].expand_as(alpha), rtol=1e-6, atol=1e-6)
        assert_uniform(alpha[:, 0])


def test_dragan_looks_around_the_data():
    real = 3 * draw(4000, 3, 2) + 1
    probe = Probe()
    gradient_penalty(probe, real, draw(4000, 3, 2, seed=1), kind="dragan", generator=seeded())
    noise = (probe.x - real) / (0.5 * real.std())
    assert_uniform(noise.flatten())
    assert noise.std(1).min() > 0  # not one number per sample


@pytest.mark.parametrize("kind", ["r1", "r2"])
def test_zero_centred_kinds_look_at_the_samples(kind):
    real, fake = draw(6, 3), draw(6, 3, seed=1)
    probe = Probe()
    penalty = gradient_penalty(probe, real, fake, kind=kind)
    assert torch.equal(probe.x, real if kind == "r1" else fake)
    torch.testing.assert_close(penalty, (2 * probe.x).square().sum(1).mean())


def assert_uniform(values):
    """Kolmogorov-Smirnov at the 1 % level; samples are all different."""
    n = len(values)
    steps = torch.arange(1, n + 1) / n
    assert (values.sort().values - steps).abs().max() < 1.63 / math.sqrt(n) + 1 / n
    assert len(values.unique()) > 0.99 * n


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_not_differentiated_through(kind, method):
    critic, real, fake, _ = problem("(N, 1)")
    generator_weight = torch.ones((), dtype=fake.dtype, requires_grad=True)
    real.requires_grad_()
    penalty = gradient_penalty(critic, real, fake * generator_weight, kind=kind, method=method)
    penalty.backward()
    assert generator_weight.grad is None
    assert real.grad is None
    assert all(p.grad is not None for p in critic.parameters() if p.dim() == 2)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_per_sample_and_a_zero_batch_is_harmless(kind):
    critic = dense().double()
    with torch.no_grad():
        critic[-1].weight.zero_()
    real, fake = draw(4, *IMAGE), draw(4, *IMAGE, seed=1)
    for method in ("exact", "finite-difference"):
        critic.zero_grad()
        penalty = gradient_penalty(critic, real, fake, kind=kind, method=method)
        assert penalty.item() == (1.0 if kind in ("wgan-gp", "dragan") else 0.0)
        penalty.backward()
        assert all(not p.grad.any() for p in critic.parameters() if p.grad is not None)


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize("frozen", [("1.weight", "1.bias"), ("5.weight",)])
def test_frozen_parameters(frozen, method):
    critic, real, fake, _ = problem("(N, 1)")
    critic = dense(nn.Tanh()).double()
    gradient_penalty(critic, real, fake, method=method, generator=seeded()).backward()
    expected = {name: p.grad for name, p in critic.named_parameters()}
    critic.zero_grad()
    for name in frozen:
        critic.get_parameter(name).requires_grad_(False)
    gradient_penalty(critic, real, fake, method=method, generator=seeded()).backward()
    for name, parameter in critic.named_parameters():
        assert parameter.requires_grad == (name not in frozen)
        if name in frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
def test_all_parameters_frozen(method):
    critic, real, fake, _ = problem("(N, 1)")
    expected = gradient_penalty(critic, real, fake, generator=seeded())
    critic.requires_grad_(False)
    found = gradient_penalty(critic, real, fake, method=method, generator=seeded())
    assert found == expected


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, method, device):
    critic, real, fake, _ = problem("(N, 1)", torch.float32, n=32)
    critic = dense(nn.Softplus())
    expected = gradient_penalty(critic, real, fake, kind=kind, center=0.1, generator=seeded())
    dtypes = []
    critic[1].register_forward_hook(lambda m, i, o: dtypes.append(o.dtype))
    with torch.autocast(device, torch.bfloat16):
        found = gradient_penalty(
            critic, real, fake.bfloat16(),  # a generator's output is of half precision here
            kind=kind, center=0.1, method=method, generator=seeded(),
        )  # fmt: skip
    assert dtypes[0] is torch.bfloat16
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=1e-5)
    ours, theirs = (parameter_gradients(critic, p) for p in (found, expected))
    assert {g.dtype for g in ours.values()} == {torch.float32}
    assert_close(ours, theirs, 0.1, floor=1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_critics(dtype):
    critic, real, fake, _ = problem("(N, 1)", dtype)
    found = gradient_penalty(critic, real, fake, generator=seeded())
    assert found.dtype is torch.float32
    found.backward()
    assert {p.grad.dtype for p in critic.parameters() if p.grad is not None} == {dtype}


def test_generator_makes_it_repeatable_and_leaves_the_default_alone():
    critic, real, fake, _ = problem("(N, 1)")
    for kind in ("wgan-gp", "wgan-lp", "dragan"):
        before = rng_state()
        options = {"kind": kind, "center": 0.1}
        first = gradient_penalty(critic, real, fake, generator=seeded(3), **options)
        assert first == gradient_penalty(critic, real, fake, generator=seeded(3), **options)
        assert first != gradient_penalty(critic, real, fake, generator=seeded(4), **options)
        assert torch.equal(rng_state(), before)
        gradient_penalty(critic, real, fake, **options)
        assert not torch.equal(rng_state(), before)


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_without_gradients(kind, method):
    critic, real, fake, _ = problem("(N, 1)")
    expected = gradient_penalty(critic, real, fake, kind=kind, generator=seeded())
    calls = []
    critic.register_forward_hook(lambda m, i, o: calls.append(m))
    with torch.no_grad():
        found = gradient_penalty(critic, real, fake, kind=kind, method=method, generator=seeded())
    assert found == expected
    assert not found.requires_grad
    assert len(calls) == 1


def test_channels_last_gradients_are_taken_as_they_lie():
    critic, real, fake, _ = problem("(N, 1, h, w)", torch.float32)
    expected = gradient_penalty(critic, real, fake, generator=seeded())
    critic = critic.to(memory_format=torch.channels_last)
    real = real.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradient_penalty(critic, real, fake, generator=seeded()), expected)


def test_one_critic_forward_after_the_first():
    critic, real, fake, _ = problem("(N, 1)")
    calls = []
    critic.register_forward_hook(lambda m, i, o: calls.append(m))
    for count in (1, 2):
        gradient_penalty(critic, real, fake)
        assert len(calls) == count


def test_a_step_of_an_optimiser_lowers_the_penalty():
    critic, real, fake, _ = problem("(N, 1)")
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    penalties = []
    for _ in range(60):
        penalty = gradient_penalty(critic, real, fake, generator=seeded())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        penalties.append(penalty.item())
    assert penalties[-1] < 0.05 * penalties[0]


# ---- errors --------------------------------------------------------------------------------------


class _Once(torch.autograd.Function):
    """sin, whose second derivative is refused."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Once(nn.Module):
    def forward(self, x):
        return _Once.apply(x)


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


class Distances(nn.Module):
    """PyTorch's own cdist has no second derivative."""

    def forward(self, x):
        return torch.cdist(x, x.flip(0) + 1, p=1.0)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("layer", [Once, Distances])
def test_the_layer_without_second_derivative_is_named(layer, last):
    """The last layer's gradient is a function of x even where that of its output is constant."""
    _, real, fake, _ = problem("(N, 1)", torch.float32)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), layer())
    if not last:
        critic.extend([nn.Tanh(), nn.Linear(5, 1)])
    message = rf"cannot be differentiated twice: layer '2', {layer.__name__}\(\)\. .*finite-differ"
    for _ in range(2):  # a critic that failed once is looked at again
        with pytest.raises(RuntimeError, match=message):
            gradient_penalty(critic, real, fake)
    assert not any(m._forward_hooks for m in critic.modules())


NEIGHBORS = {
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(6, 6)),
    "parametrizations.spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(
        nn.Linear(6, 6)
    ),
    "parametrizations.weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    "in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "fused": lambda: gk.fuse(nn.Sequential(nn.BatchNorm1d(6), nn.ReLU())),
    "dropout": lambda: nn.Dropout(0.5),
    "GRU": lambda: InDict(nn.GRU(6, 6, batch_first=True), None),
    "keywords": lambda: InDict(nn.Bilinear(6, 6, 6), "input1", "input2"),
    "no tensors": lambda: InDict(NoTensors(), None),
}


class InDict(nn.Module):
    """Calls a layer by names, or for results that are no tensor."""

    def __init__(self, layer, *names):
        super().__init__()
        self.layer, self.names = layer, names

    def forward(self, x):
        if self.names == (None,):
            out = self.layer(x if isinstance(self.layer, NoTensors) else x[:, None])
            return out["y"] if isinstance(out, dict) else out[0][:, 0]
        return self.layer(**dict.fromkeys(self.names, x))


class NoTensors(nn.Module):
    def forward(self, x):
        return {"y": x.sin(), "name": "y", "none": None, "more": [x.cos()]}


@pytest.mark.filterwarnings("ignore:.*weight_norm", "error:.*by themselves again")
@pytest.mark.parametrize("kind", NEIGHBORS)
def test_the_search_for_the_layer_to_blame_passes_by_all_others(kind):
    """It neither fails in them nor blames them, and leaves them as they are."""
    critic = nn.Sequential(nn.Linear(4, 6), NEIGHBORS[kind](), Once(), nn.Linear(6, 1))
    x = torch.randn(8, 4)
    critic(x)
    buffers = [(b, b._version) for b in critic[1].buffers()]
    seen = []
    critic[3].register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(RuntimeError, match=r"differentiated twice: layer '2', Once\(\)\. "):
        gradient_penalty(critic, x, x + 1)
    assert all(b is old for b, (old, _) in zip(critic[1].buffers(), buffers, strict=True))
    assert len(seen) == 2  # the penalty and the search, which calls no hook when it tries a layer
    assert sum(len(m._forward_hooks) for m in critic.modules()) == 1
    assert all(p.grad is None for p in critic.parameters())


def test_the_search_for_the_layer_to_blame_never_takes_the_place_of_the_error():
    class Moody(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:
                raise OSError("not today")
            return x * 2

    critic = nn.Sequential(Moody(), nn.Linear(4, 4), Once(), nn.Linear(4, 1))
    x = torch.randn(8, 4)
    with pytest.raises(RuntimeError, match=r"twice: which of its layers .*PyTorch says: trying to"):
        gradient_penalty(critic, x, x + 1)


@pytest.mark.parametrize("memory", [torch.OutOfMemoryError("full"), "can't allocate memory: 8 GB"])
def test_no_layer_is_blamed_for_a_lack_of_memory(memory):
    class Hungry(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x * 1)

        @staticmethod
        def backward(ctx, grad):
            return Greedy.apply(grad)

    class Greedy(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x * 1)

        @staticmethod
        def backward(ctx, grad):
            raise memory if isinstance(memory, Exception) else RuntimeError(memory)

    class Layer(nn.Module):
        def forward(self, x):
            return Hungry.apply(x)

    critic, x = nn.Sequential(nn.Linear(4, 4), Layer(), nn.Linear(4, 1)), torch.randn(8, 4)
    with pytest.raises(RuntimeError, match=r"^(full|can't allocate)"):
        gradient_penalty(critic, x, x + 1)


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize("kind", ["wgan-gp", "wgan-lp", "dragan", "r1", "r2"])
def test_inference_mode(kind, method):
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layers = nn.Embedding(3, 4), dense()

        def forward(self, x, labels):
            return self.layers(x.flatten(1)) * self.embed(labels["of"][0]).sum(1, keepdim=True)

    def penalty(real, fake, labels):
        options = {"kind": kind, "method": method, "critic_args": ({"of": [labels]},)}
        return gradient_penalty(critic, real, fake, generator=seeded(0), **options)

    _, real, fake, _ = problem("(N, 1)", torch.float32)
    critic, labels = Critic(), torch.arange(len(real)) % 3
    expected = penalty(real, fake, labels)
    with torch.inference_mode():
        made = real * 1, fake * 1, labels * 1
        for tensors in ((real, fake, labels), made):
            value = penalty(*tensors)
            torch.testing.assert_close(value, expected)
            assert not value.requires_grad
        assert torch.is_inference_mode_enabled()
    loss = penalty(*made)
    torch.testing.assert_close(loss, expected)
    gradients = [
        torch.autograd.grad(p, critic.layers.parameters(), allow_unused=True)
        for p in (loss, expected)
    ]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        assert not penalty(*made).requires_grad


def test_what_lies_outside_all_layers_is_said_to():
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = dense()

        def forward(self, x):
            return self.layers(_Once.apply(x.square()))

    _, real, fake, _ = problem("(N, 1)", torch.float32)
    with pytest.raises(RuntimeError, match="twice: something outside its layers, in a forward"):
        gradient_penalty(Critic(), real, fake)


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = dense(nn.Softplus())

    def forward(self, x):
        return 2 * self.layers(x)


@pytest.mark.parametrize("how", ["whole", "part", "in place"])
def test_compiled_critics_are_recognised(how):
    torch._dynamo.reset()
    _, real, fake, _ = problem("(N, 1)", torch.float32)
    critic = dense(nn.Softplus())
    if how == "whole":
        critic = torch.compile(critic, backend="aot_eager")
    elif how == "part":
        critic[1] = torch.compile(nn.Sequential(critic[1], nn.Tanh()), backend="aot_eager")
    else:
        critic = Doubled()
        critic.compile(backend="aot_eager")
    name = "layer '1'" if how == "part" else "it"
    message = rf"twice: {name} is a module compiled by torch\.compile .*finite-difference"
    with pytest.raises(RuntimeError, match=message):
        gradient_penalty(critic, real, fake)


def test_other_errors_of_a_critic_are_its_own():
    def critic(x):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        gradient_penalty(critic, torch.ones(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize(
    "critic",
    [
        lambda x: x.detach().sum(1),
        lambda x: torch.ones(2, requires_grad=True) * 2,
        torch.no_grad()(lambda x: x.sum(1)),
    ],
)
def test_critics_that_do_not_depend_on_their_input(critic, method):
    with pytest.raises(RuntimeError, match="does not depend on its input"):
        gradient_penalty(critic, torch.ones(2, 3), torch.ones(2, 3), method=method)


def test_critics_that_return_no_tensor():
    with pytest.raises(TypeError, match="critic must return a Tensor, got tuple"):
        gradient_penalty(lambda x: (x, x), torch.ones(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 3)), {"kind": "gp"}, ValueError, "kind must .*got 'gp'"),
        ((torch.ones(2, 3), torch.ones(2, 3)), {"method": "fd"}, ValueError, "method must .* 'fd'"),
        ((torch.ones(2, 3), torch.ones(2, 4)), {}, ValueError, r"fake must .*, got \(2, 4\)"),
        ((torch.ones(2, 3), torch.ones(3)), {}, ValueError, r"fake must .*, got \(3,\)"),
        ((torch.ones(2, 3),), {}, ValueError, "fake must .* for kind 'wgan-gp', got None"),
        ((torch.ones(2, 3),), {"kind": "r2"}, ValueError, "fake must .* for kind 'r2', got None"),
        ((torch.tensor(1.0),), {"kind": "r1"}, ValueError, "real must have shape .* scalar"),
        ((torch.ones(2, 3).byte(), torch.ones(2, 3)), {}, TypeError, "real must .*torch.uint8"),
        ((torch.ones(2, 3), torch.ones(2, 3).byte()), {}, TypeError, "fake must .*torch.uint8"),
        (([1.0], torch.ones(2, 3)), {}, TypeError, "real must be a Tensor, got list"),
        ((torch.ones(2, 3), 0.0), {}, TypeError, "fake must be a Tensor, got float"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gradient_penalty(lambda x: x.sum(1), *arguments, **options)


# ---- finite differences --------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-3), (torch.float64, 1e-8)])
@pytest.mark.parametrize("activation", [nn.Softplus, nn.Tanh, nn.SiLU])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_difference_of_smooth_critics(kind, activation, dtype, error):
    _, real, fake, _ = problem("(N, 1)", dtype, n=16)
    critic = dense(activation()).to(dtype)
    with torch.no_grad():
        critic[-1].weight *= 5  # norms that the one-sided kind objects to
    penalties = [
        gradient_penalty(
            critic, real, fake, kind=kind, center=0.1, method=method, generator=seeded()
        )
        for method in ("exact", "finite-difference")
    ]
    torch.testing.assert_close(*penalties)
    exact, difference = (
        torch.cat([g.flatten() for g in parameter_gradients(critic, p).values()]) for p in penalties
    )
    assert exact.norm() > 0
    assert (difference - exact).norm() < error * exact.norm()


@pytest.mark.parametrize("name", ["(N,)", "(N, 1, h, w)", "labels", "rank 1", "rank 3"])
def test_finite_difference_of_any_critic(name):
    critic, real, fake, arguments = problem(name)  # LeakyReLU's kinks are far apart in float64
    found = [
        parameter_gradients(
            critic,
            gradient_penalty(
                critic, real, fake, method=method, critic_args=arguments, generator=seeded()
            ),
        )
        for method in ("exact", "finite-difference")
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("p", [0.3, 0.6])
def test_finite_difference_sees_one_dropout_mask(p):
    _, real, fake, _ = problem("(N, 1)", n=16)
    critic = dense(nn.Softplus(), nn.Dropout(p)).double()
    results, states = [], []
    for method in ("exact", "finite-difference"):
        torch.manual_seed(11)
        penalty = gradient_penalty(critic, real, fake, method=method, generator=seeded())
        results.append(parameter_gradients(critic, penalty))
        states.append(rng_state())
    assert_close(results[1], results[0], 1e-7, floor=1e-9)
    assert torch.equal(*states)  # what comes after draws the same numbers too
    torch.manual_seed(12)
    other = parameter_gradients(critic, gradient_penalty(critic, real, fake, generator=seeded()))
    assert not torch.allclose(other["0"], results[0]["0"])


@pytest.mark.parametrize("how", ["whole", "in place"])
def test_finite_difference_of_a_compiled_module(how):
    torch._dynamo.reset()
    _, real, fake, _ = problem("(N, 1)")
    critic = Doubled().double()
    expected = parameter_gradients(critic, gradient_penalty(critic, real, fake, generator=seeded()))
    compiled = copy.deepcopy(critic)
    if how == "whole":
        compiled = torch.compile(compiled, backend="aot_eager")
    else:
        compiled.compile(backend="aot_eager")
    penalty = gradient_penalty(compiled, real, fake, method="finite-difference", generator=seeded())
    assert_close(parameter_gradients(compiled, penalty), expected, 1e-8, floor=1e-9)


def test_finite_difference_of_a_layer_without_second_derivative():
    _, real, fake, _ = problem("(N, 1)")
    differentiable = dense(Sine()).double()
    once = dense(Once()).double()
    once.load_state_dict(differentiable.state_dict())
    expected = parameter_gradients(
        differentiable, gradient_penalty(differentiable, real, fake, generator=seeded())
    )
    penalty = gradient_penalty(once, real, fake, method="finite-difference", generator=seeded())
    assert_close(parameter_gradients(once, penalty), expected, 1e-8, floor=1e-9)


@pytest.mark.parametrize(("method", "evaluations"), [("exact", 1), ("finite-difference", 3)])
def test_evaluations_that_buffers_see(method, evaluations):
    critic, real, fake, _ = problem("batch norm")
    norm = critic[2]
    assert norm.num_batches_tracked == 0
    gradient_penalty(critic, real, fake, method=method)
    # The layer stands in the critic twice.
    assert norm.num_batches_tracked == 2 * evaluations


def test_finite_difference_of_samples_of_any_size():
    """The step follows the size of the samples."""
    _, real, fake, _ = problem("(N, 1)")
    critic = dense(nn.Softplus()).double()
    for scale in (1e-2, 1e2):
        with torch.no_grad():
            critic[1].weight.copy_(draw(16, 72, seed=5) / 8 / scale)
        found = [
            parameter_gradients(
                critic,
                gradient_penalty(
                    critic, scale * real, scale * fake, method=method, generator=seeded()
                ),
            )
            for method in ("exact", "finite-difference")
        ]
        assert_close(found[1], found[0], 1e-5, floor=1e-9)


def test_public_names():
    assert {"gradient_norm_penalty", "gradient_penalty", "interpolate"} <= set(functional.__all__)
