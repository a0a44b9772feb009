"""MinibatchDiscrimination and MinibatchStddev as layers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import gankernels as gk

pytestmark = pytest.mark.every_device


def discrimination(**options):
    torch.manual_seed(0)
    return gk.nn.MinibatchDiscrimination(12, 7, 3, **options)


def test_discrimination_is_its_definition():
    layer = discrimination(dtype=torch.float64)
    x = torch.randn(9, 12, dtype=torch.float64)
    m = torch.einsum("ni,ibc->nbc", x, layer.weight)
    expected = torch.stack(
        [sum(torch.exp(-(m[n] - m[j]).abs().sum(-1)) for j in range(9) if j != n) for n in range(9)]
    )
    torch.testing.assert_close(layer(x), torch.cat((x, expected), 1))


def test_discrimination_twice_differentiable_in_input_and_weight():
    layer = discrimination(dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)

    def function(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, layer.weight), fast_mode=True)


def test_discrimination_initialization():
    torch.manual_seed(0)
    layer = gk.nn.MinibatchDiscrimination(1024, 100, 5)
    assert layer.weight.shape == (1024, 100, 5)
    norms = layer.weight.norm(dim=0)
    assert abs(norms.mean() - 1) < 0.01
    assert norms.std() < 0.05
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


def test_discrimination_state_dict_copy_and_pickle():
    layer, other = discrimination(), gk.nn.MinibatchDiscrimination(12, 7, 3)
    assert list(layer.state_dict()) == ["weight"]
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 12)
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_discrimination_dtype_device_and_repr():
    assert repr(discrimination()) == "MinibatchDiscrimination(12, num_kernels=7, kernel_dim=3)"
    assert discrimination(dtype=torch.float64).weight.dtype is torch.float64
    assert discrimination().to(torch.bfloat16)(torch.zeros(2, 12).bfloat16()).dtype is (
        torch.bfloat16
    )
    meta = discrimination(device="meta")
    assert meta(torch.zeros(2, 12, device="meta")).shape == (2, 19)


def test_discrimination_under_autocast(device):
    layer, x = discrimination(), torch.randn(6, 12)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert torch.equal(y[:, :12].float(), x)
    m = (x.bfloat16() @ layer.weight.bfloat16().flatten(1)).unflatten(1, (7, 3))
    assert torch.equal(y[:, 12:].bfloat16(), gk.functional.minibatch_discrimination(m))


def test_discrimination_learns_to_tell_collapse():
    """Copies of one sample get the largest features there can be."""
    x = torch.randn(1, 12).repeat(8, 1)
    assert torch.equal(discrimination()(x)[:, 12:], torch.full((8, 7), 7.0))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 12, 1), ValueError, r"expected 2D input \(got 3D input\)"),
        (torch.zeros(12), ValueError, r"expected 2D input \(got 1D input\)"),
        (torch.zeros(2, 11), RuntimeError, r"12 features \(in_features\), got 11 in .*\(2, 11\)"),
    ],
)
def test_discrimination_input_errors(x, error, message):
    with pytest.raises(error, match=message):
        discrimination()(x)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_discrimination_constructor_errors(place):
    sizes = [4, 5, 6]
    sizes[place] = 0
    name = ("in_features", "num_kernels", "kernel_dim")[place]
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        gk.nn.MinibatchDiscrimination(*sizes)


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 5), (7, 6, 4, 4), (2, 6, 2, 2, 2)])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_stddev_appends_maps(shape, num_channels):
    x = torch.randn(shape)
    layer = gk.nn.MinibatchStddev(3, num_channels)
    y = layer(x)
    assert torch.equal(y[:, :6], x)
    assert torch.equal(y[:, 6:], gk.functional.minibatch_stddev(x, 3, num_channels))


def test_stddev_in_a_model():
    model = nn.Sequential(gk.nn.MinibatchStddev(), nn.Conv2d(4, 2, 3))
    assert repr(model[0]) == "MinibatchStddev(group_size=4, num_channels=1)"
    assert list(model.state_dict()) == ["1.weight", "1.bias"]
    x = torch.randn(5, 3, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert model[1].weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["group_size", "num_channels"])
def test_stddev_constructor_errors(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        gk.nn.MinibatchStddev(**{name: 0})
