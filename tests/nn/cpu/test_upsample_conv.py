"""UpsampleConv2d: nearest upsampling and a convolution in one layer."""

import copy

import pytest
import torch
from torch import nn

from gankernels.nn.cpu import UpsampleConv2d

from .twins import both, derivatives


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(4, 4), (1, 1), (5, 7)])
@pytest.mark.parametrize("factor", [2, 2.0, (2, 2)])
def test_upsampled_convolutions(layout, size, factor):
    network = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Upsample(scale_factor=factor),
        nn.Conv2d(3, 5, 3, 1, 1),
        nn.Tanh(),
        nn.Sequential(nn.UpsamplingNearest2d(scale_factor=2), nn.Conv2d(5, 2, 3, padding=1)),
        nn.Upsample(scale_factor=factor),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Upsample(scale_factor=factor),
        nn.Conv2d(2, 1, 3, padding=1, bias=False),
    ).double()
    plain, faster = both(network.to(memory_format=layout))
    x = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=layout)
    for ours, theirs in zip(derivatives(faster, x), derivatives(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert sum(isinstance(m, UpsampleConv2d) for m in faster.modules()) == 3


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_by_itself(bias):
    layer = UpsampleConv2d(3, 5, bias=bias, dtype=torch.float64)
    plain = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, padding=1, bias=bias))
    plain = plain.double()
    plain[1].load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for ours, theirs in zip(derivatives(layer, x), derivatives(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.jit.script(layer)(x), plain(x))
    torch.testing.assert_close(torch.vmap(layer)(x[None])[0], plain(x))


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters_of_upsampled_convolutions_get_no_gradient(frozen):
    network = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 2, 3, padding=1)).double()
    for name in frozen:
        getattr(network[1], name).requires_grad_(False)
    plain, faster = both(network)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for module in (plain, faster):
        module(x.requires_grad_(len(frozen) == 2)).square().sum().backward()
    for (name, ours), theirs in zip(faster[1].named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (name in frozen)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_convolutions_under_autocast_are_as_exact_as_those_of_pytorch():
    """Errors against float64 stay below twice those of what they replace."""
    network = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(64, 32, 3, 1, 1))
    plain, faster = both(network.to(memory_format=torch.channels_last))
    exact = copy.deepcopy(plain).double()
    x = torch.randn(8, 64, 8, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = derivatives(faster, x), derivatives(plain, x)
    for a, b, true in zip(ours, theirs, derivatives(exact, x.double()), strict=True):
        assert a.dtype == b.dtype
        assert (a - true).norm() <= 2 * (b - true).norm() + 1e-3 * true.norm()


def test_transforms_get_pytorchs_convolutions():
    network = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(64, 3, 3, 1, 1), nn.Tanh())
    plain, faster = both(network.to(memory_format=torch.channels_last).eval())
    x = torch.randn(2, 64, 4, 4).to(memory_format=torch.channels_last)
    ours, theirs = (torch.func.jacrev(module)(x) for module in (faster, plain))
    torch.testing.assert_close(ours, theirs)
