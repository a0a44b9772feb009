"""Helpers of the tests of fuse: networks are the same before and after, except for speed."""

import copy

import torch
import torch.utils.checkpoint
from torch import nn

import gankernels as gk

B2 = gk.nn.BatchNormLeakyReLU2d
L2 = gk.nn.LeakyReLUBatchNorm2d


class Net(nn.Module):
    """Holds layers and does with them what its subclass says."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in {"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), **layers}.items():
            setattr(self, name, layer)


def fused(network, **options):
    """Fuses it and returns the log; checks what holds for every network."""
    parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    keys, names = list(network.state_dict()), [name for name, _ in network.named_modules()]
    modes = [m.training for m in network.modules()]
    lines = []
    assert gk.fuse(network, log=lines.append, **options) is network
    for before, after in (
        (parameters, dict(network.named_parameters())),
        (buffers, dict(network.named_buffers())),
    ):
        assert before.keys() == after.keys()
        assert all(before[k] is after[k] for k in before)
    assert list(network.state_dict()) == keys
    assert [name for name, _ in network.named_modules()] == names
    assert [m.training for m in network.modules()] == modes
    return lines


def warmed(network, x):
    """Parameters and statistics away from their first values."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
        for _ in range(3):
            network(torch.randn_like(x) + 0.5)
    return network


def everything(network, x, *args):
    """What a user can see: output, gradients, second derivatives, and the buffers afterwards."""
    x = x.clone().requires_grad_()
    out = network(x, *args)
    out = torch.cat([o.flatten(1) for o in out], 1) if isinstance(out, tuple) else out
    weights = [p for p in network.parameters() if p.requires_grad]
    unused = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(out.square().sum(), [x, *weights], create_graph=True, **unused)
    norms = first[0].flatten(1).norm(dim=1)
    penalty = (norms - 1).square().mean()
    second = torch.autograd.grad(penalty, [x, *weights], **unused)
    return [out, *first, *second, *(b.clone().to(x.dtype) for b in network.buffers())]


def difference(actual, expected):
    """The largest, relative to the size of what is compared."""
    assert len(actual) == len(expected)
    return max(
        ((a - e).abs().max() / e.abs().max().clamp(min=1)).item()
        for a, e in zip(actual, expected, strict=True)
    )


def assert_same(network, x, *args, **options):
    """Fuses the network, checks that nothing changes in training and evaluation, that there is
    nothing left to do, and that it can be undone. Returns the log."""
    original = copy.deepcopy(warmed(network, x))
    lines = fused(network, **options)
    described = str(network)
    left = [line for line in lines if line.startswith("left")]
    assert fused(network, **options) == (left or ["no BatchNorm to fuse"])
    assert str(network) == described
    for training in (True, False):
        network.train(training)
        original.train(training)
        assert difference(everything(network, x, *args), everything(original, x, *args)) < 1e-10
    with torch.no_grad():
        network(x)  # spectral_norm keeps what cannot be copied otherwise
    undone = gk.unfuse(copy.deepcopy(network).train(original.training))
    assert str(undone) == str(original)
    assert [vars(m).keys() for m in undone.modules()] == [
        vars(m).keys() for m in original.modules()
    ]
    return lines


def images(n=5, channels=3, size=8):
    return torch.randn(n, channels, size, size)


def net(forward, **layers):
    """A network of Net's layers with this forward."""
    return type("Other", (Net,), {"forward": forward})(**layers)


class MyBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2
