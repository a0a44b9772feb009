"""Infinite and NaN elements: gradients are finite where PyTorch's are."""

import pytest
import torch
from torch.autograd import grad

import gankernels as gk
from gankernels import functional

pytestmark = pytest.mark.every_device

INF, NAN = float("inf"), float("nan")
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


def derivatives(x, weight, bias, function, upstream):
    """y, then first derivatives, then the second of those with respect to x and of all of them."""
    y = function(x, weight, bias)
    inputs = [t for t in (x, weight, bias) if t is not None]
    first = grad(y, inputs, upstream, create_graph=True)
    tangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    of_x = grad(
        (first[0] * tangent).sum(), [upstream, *inputs], retain_graph=True, allow_unused=True
    )
    of_all = grad(sum(g.sum() for g in first), [upstream, *inputs], allow_unused=True)
    zeros = [torch.zeros_like(t) for t in (upstream, *inputs)] * 2
    seconds = [z if g is None else g for g, z in zip((*of_x, *of_all), zeros, strict=True)]
    return [y, *first, *seconds]


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["batch_norm_leaky_relu", "leaky_relu_batch_norm"])
def test_norms(name, layout, affine, training, value):
    """In evaluation one element says nothing of the others, in training it spoils its channel."""
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    x[1, 2, 3, 4] = value
    x = LAYOUTS[layout](x).requires_grad_()
    weight, bias = (torch.rand(5, dtype=torch.float64).requires_grad_() for _ in range(2))
    parameters = (weight, bias) if affine else (None, None)
    mean, var = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
    upstream = torch.randn(x.shape, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        running = (None, None) if training else (mean, var)
        return getattr(functional, name)(x, *running, weight, bias, training)

    ours = derivatives(x, *parameters, function, upstream)
    with gk.use_backend("reference"):
        theirs = derivatives(x, *parameters, function, upstream)
    for mine, expected in zip(ours, theirs, strict=True):
        if training:  # a spoiled channel's gradients are no numbers, whichever they are
            mine, expected = (t.nan_to_num(NAN, NAN, NAN) for t in (mine, expected))
        else:  # PyTorch's weights are spoiled by products with zero, where ours need not be
            mine = mine.where(~expected.isnan(), NAN)
        torch.testing.assert_close(mine, expected, equal_nan=True)
    if not training:
        assert ours[1].isfinite().all()


@pytest.mark.parametrize("value", [INF, -INF, NAN, 1e200])  # the last has an infinite square
@pytest.mark.parametrize("kind", ["r1", "r2", "wgan-gp", "wgan-lp"])
@pytest.mark.parametrize("shape", [(3, 7), (2, 40000)], ids=str)
def test_penalties(kind, shape, value):
    g = torch.randn(shape, dtype=torch.float64)
    g[1, 3] = value
    g.requires_grad_()
    tangent = torch.randn(shape, dtype=torch.float64)

    def second():
        (first,) = grad(functional.gradient_norm_penalty(g, kind), g, create_graph=True)
        (result,) = grad((first * tangent).sum(), g, allow_unused=True)
        return first.detach(), result

    ours = second()
    with gk.use_backend("reference"):
        theirs = second()
    if theirs[1] is None:
        theirs = (theirs[0], torch.zeros_like(g))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("group_size", [1, 2, 3, 100])
def test_stddev(group_size, value):
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    x[2, 1, 3] = value
    x.requires_grad_()
    tangent = torch.randn(x.shape, dtype=torch.float64)

    def all_of_it():
        y = functional.minibatch_stddev(x, group_size, 2)
        (first,) = grad(y.square().sum(), x, create_graph=True)
        return y, first, grad((first * tangent).sum(), x)[0]

    ours = all_of_it()
    with gk.use_backend("reference"):
        theirs = all_of_it()
    torch.testing.assert_close(ours, theirs, equal_nan=True)


# ---- minibatch discrimination --------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(5, 5, 0), (1, 3, 0), (40, 17, 0), (3, 1, 0), (0, 4, 0)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_dimensions_to_differ_in(shape, dtype):
    m = torch.randn(shape, dtype=dtype, requires_grad=True)
    upstream = torch.randn(shape[:2], dtype=dtype, requires_grad=True)

    def all_of_it():
        y = functional.minibatch_discrimination(m)
        (first,) = grad(y, m, upstream, create_graph=True)
        second = grad(first.sum(), (upstream, m), allow_unused=True)
        return y, first, *(torch.zeros_like(t) if g is None else g
                           for g, t in zip(second, (upstream, m), strict=True))  # fmt: skip

    ours = all_of_it()
    with gk.use_backend("reference"):
        theirs = all_of_it()
    torch.testing.assert_close(ours, theirs)
    assert (ours[0] == max(0, shape[0] - 1)).all()


@pytest.mark.parametrize("value", [INF, -INF, NAN, 1e30])
@pytest.mark.parametrize("shape", [(1, 3, 2), (5, 3, 2), (5, 17, 3)], ids=str)
def test_far_samples(shape, value):
    m = torch.randn(shape)
    m[0, 1, 1] = value
    with gk.use_backend("reference"):
        expected = functional.minibatch_discrimination(m)
    torch.testing.assert_close(functional.minibatch_discrimination(m), expected, equal_nan=True)
