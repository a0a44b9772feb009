"""The numbers of minibatch_stddev against Karras' rule and against a loop over groups."""

import pytest
import torch
from property_based import given, settings, st

import gankernels as gk

from .oracle import LAYOUTS

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


@pytest.mark.parametrize("n", [4, 7])
def test_gradcheck(n):
    x = torch.randn(n, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ours(x, 4, 2), x)
    assert torch.autograd.gradgradcheck(lambda x: ours(x, 4, 2), x)


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


def test_compiles_without_a_graph_break():
    x = torch.randn(8, 4, 2, 2)
    compiled = torch.compile(lambda x: ours(x).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x).sum())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3.0,), TypeError, r"x is a float; a Tensor is needed"),
        ((torch.zeros(2, 3, dtype=torch.int32),), TypeError, r"x has dtype torch.int32; accepted"),
        ((torch.zeros(3),), ValueError, r"x has shape \(3,\); at least two dimensions"),
        ((torch.zeros(2, 3), 0), ValueError, r"group_size is 0; it must be at least 1"),
        ((torch.zeros(2, 3), 4, 0), ValueError, r"num_channels is 0; it must be at least 1"),
        ((torch.zeros(2, 3), 4, 2), ValueError, r"x has 3 channels, which num_channels=2 does not"),
        ((torch.zeros(2, 0), 4, 1), ValueError, r"x has 0 channels, which num_channels=1 does not"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ours(*arguments)
