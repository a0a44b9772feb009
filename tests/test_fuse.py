"""Networks are the same before and after, in every way but speed."""

import collections
import copy
import functools
import io
import logging
import pickle
import random
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import distributed as dist
from torch import nn

import gankernels as gk

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import networks

from gankernels.nn.pairs import FusedLeakyReLU, FusedReLU

B2 = gk.nn.BatchNormLeakyReLU2d
L2 = gk.nn.LeakyReLUBatchNorm2d


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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


# ---- networks of others --------------------------------------------------------------------------

NETWORKS = {
    "dcgan": (
        lambda: networks.DCGAN(4, 32),
        ["fused main.3 with main.4", "fused main.6 with main.7"],
    ),
    "unet": (
        lambda: networks.UNet(2),
        [
            "fused down1.norm with down1.act",
            "fused down2.norm with down2.act",
            "fused up1.norm1 with up1.act1",
            "left up1.norm2: followed by cat",
            "fused up2.norm1 with up2.act1",
            "left up2.norm2: followed by cat",
        ],
    ),
    "resnet": (
        lambda: networks.ResNet(4, 2),
        [
            "fused blocks.0.residual.0 with blocks.0.residual.1",
            "fused blocks.0.residual.3 with blocks.0.residual.4",
            "fused blocks.1.residual.0 with blocks.1.residual.1",
            "fused blocks.1.residual.3 with blocks.1.residual.4",
            "left norm: followed by relu as a function: as a module it would be fused",
        ],
    ),
    "stylegan": (lambda: networks.StyleGAN(4, 2), ["no BatchNorm to fuse"]),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("lone", [False, True])
def test_networks_of_others(name, lone):
    make, expected = NETWORKS[name]
    lines = assert_same(make(), images(size=32), lone=lone)
    if lone:
        assert [n.startswith("fused") for n in lines] == [not n.startswith("no") for n in expected]
    else:
        assert len(lines) == len(expected)
        for line, start in zip(lines, expected, strict=True):
            assert line.startswith(start)


def test_networks_of_others_have_penalties_that_change_something():
    """Or the comparison above would be of zeros."""
    for make, _ in NETWORKS.values():
        values = everything(make(), images(size=32))
        assert sum(v.abs().max() > 1e-6 for v in values) > len(values) / 2


# ---- which pairs -------------------------------------------------------------------------------

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ACTIVATIONS = [nn.LeakyReLU(-0.1), nn.LeakyReLU(0.3, True), nn.ReLU(), nn.ReLU(True)]


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_pairs(d, first, activation):
    conv = [nn.Linear(3, 4), nn.Conv2d(3, 4, 1), nn.Conv3d(3, 4, 1)][d - 1]
    norm, activation = NORMS[d](4, eps=1e-3, momentum=0.3), copy.deepcopy(activation)
    network = nn.Sequential(conv, *((activation, norm) if first else (norm, activation)))
    assert_same(network, torch.randn(6, 3, *[(), (2, 2), (2, 2, 2)][d - 1]))
    name = f"LeakyReLUBatchNorm{d}d" if first else f"BatchNormLeakyReLU{d}d"
    layer, gone = (network[2], network[1]) if first else (network[1], network[2])
    assert layer is norm
    assert type(layer) is getattr(gk.nn, name)
    assert isinstance(gone, (FusedReLU, FusedLeakyReLU))
    assert layer.negative_slope == getattr(activation, "negative_slope", 0.0)
    assert (layer.eps, layer.momentum) == (1e-3, 0.3)


def test_batch_norm_1d_of_sequences():
    assert_same(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), torch.randn(4, 3, 7))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_options_of_batch_norm(affine, tracking, momentum, training):
    norm = nn.BatchNorm2d(4, affine=affine, track_running_stats=tracking, momentum=momentum)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU()).train(training)
    (line,) = assert_same(network, images())
    assert line.startswith("fused 1 with 2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(0.2)).to(dtype)
    original, x = copy.deepcopy(network), images().to(dtype)
    fused(network)
    assert network[0].weight.dtype is network[0].running_mean.dtype is dtype
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(network(x), original(x), rtol=eps, atol=eps)


def test_devices():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).to("meta")
    assert fused(network)[0].startswith("fused 0 with 1")
    assert network[0].weight.is_meta


def test_activation_on_both_sides_goes_with_the_one_behind():
    network = nn.Sequential(nn.LeakyReLU(0.1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    lines = assert_same(network, images())
    assert lines[0].startswith("fused 1 with 2")
    assert lines[1].startswith("left 3")
    assert type(network[0]) is nn.LeakyReLU


def test_lone():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Tanh())
    assert assert_same(copy.deepcopy(network), images()) == [
        "left 0: followed by Conv2d",
        "left 2: followed by Tanh",
    ]
    lines = assert_same(network, images(), lone=True)
    assert lines[0].startswith("fused 0 alone (followed by Conv2d)")
    assert type(network[2]) is B2
    assert network[2].negative_slope == 1.0
    assert type(network[3]) is nn.Tanh
    alone = nn.BatchNorm2d(3)
    assert fused(alone) == ["left module: no forward calls it"]
    fused(alone, lone=True)
    assert type(alone) is B2
    assert type(gk.unfuse(alone)) is nn.BatchNorm2d


def test_lone_first_and_pairs_stay():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    fused(network)
    lines = fused(network, lone=True)
    assert len(lines) == 1
    assert lines[0].startswith("fused 2 alone")
    assert (network[0].negative_slope, network[2].negative_slope) == (0.0, 1.0)


def test_nested_modules():
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    network = nn.Sequential(nn.Sequential(inner, nn.ModuleDict({"a": nn.ReLU()})["a"]), nn.Tanh())
    assert assert_same(network, images())[0].startswith("fused 0.0.1 with 0.0.2")


class Flexible(Net):
    """Tests, branches and keywords that say nothing against the pair."""

    def forward(self, x, y=None, *, both=False, scale=1.0):
        assert x.shape[1] == 3
        if x.dim() != 4:
            raise ValueError("images are needed")
        self.seen = x
        h = self.act(self.bn(self.conv(x)))
        if y is not None:
            h = h + y
        if both and self.training:
            return h, scale * h
        return h


def test_branches_that_agree():
    network = Flexible(act=nn.LeakyReLU(0.2))
    assert assert_same(network, images())[0].startswith("fused bn with act")
    assert_same(Flexible(act=nn.LeakyReLU(0.2)), images(), torch.ones(()))


class Skipping(Net):
    def forward(self, x, mask=None):
        h = self.bn(self.conv(x))
        return h if self.skips(h, mask) else self.act(h)


@pytest.mark.parametrize(
    "skips",
    [
        lambda net, h, mask: not net.training,
        lambda net, h, mask: h.shape[-1] > 3,
        lambda net, h, mask: mask is None,
        lambda net, h, mask: mask is not None,
        lambda net, h, mask: h.mean() > 0,
    ],
    ids=["training", "shape", "missing", "given", "value"],
)
def test_a_branch_without_the_activation(skips):
    cls = type("Skips", (Skipping,), {"skips": skips})
    (line,) = assert_same(cls(act=nn.ReLU()), images())
    assert line.startswith("left bn")


# ---- pairs that are none -------------------------------------------------------------------------


def net(forward, **layers):
    """A network of Net's layers with this forward."""
    return type("Other", (Net,), {"forward": forward})(**layers)


def twice(self, x):
    h = self.bn(self.conv(x))
    return self.act(h) + h


def out_too(self, x):
    h = self.bn(self.conv(x))
    return self.act(h), h


def function(self, x):
    return F.leaky_relu(self.bn(self.conv(x)), 0.2)


def torch_function(self, x):
    return torch.relu(self.bn(self.conv(x)))


def method(self, x):
    return self.bn(self.conv(x)).relu_()


def between(self, x):
    return self.act(F.dropout(self.bn(self.conv(x)), 0.0))


def in_place_between(self, x):
    h = self.bn(self.conv(x))
    h += 1
    return self.act(h)


def changed_between(self, x):
    h = self.conv(x)
    a = self.act(h)
    h = h.add_(1)
    return self.bn(a) + h


def act_without_gradient(self, x):
    h = self.conv(x)
    with torch.no_grad():
        h = self.act(h)
    return self.bn(h)


def in_place_on_input(self, x):
    h = x.flatten(2)[:, :, :9].reshape(x.shape[0], 3, 3, 3)
    return self.norm(self.act(h * 1.0)) + self.conv(x).mean()


def in_place_and_seen(self, x):
    h = self.stem(x)
    return self.norm(self.act(h)) + h


def shared_activation(self, x):
    return self.act(self.norm(self.act(self.bn(self.conv(x)))) + 1)


def activation_on_either_side(self, x):
    return self.norm(self.act(self.act(self.bn(self.conv(x))) * 2))


def activation_of_a_norm_that_is_used_twice(self, x):
    h = self.norm(self.act(self.bn(self.conv(x))) * 2)
    return self.act(h) + h


def shared_norm(self, x):
    return self.bn(self.conv(x)) + self.act(self.bn(self.conv(x) + 1))


@pytest.mark.parametrize(
    ("forward", "layers", "why"),
    [
        (twice, {}, "left bn: its output is used 2 times"),
        (out_too, {}, "left bn: its output is used 2 times"),
        (function, {}, "left bn: followed by leaky_relu as a function"),
        (torch_function, {}, "left bn: followed by relu as a function"),
        (method, {}, "left bn: followed by relu_ as a function"),
        (between, {}, "left bn: followed by dropout"),
        (in_place_between, {}, "left bn: "),
        (changed_between, {}, "left bn: preceded by act, with something else done in between"),
        (act_without_gradient, {}, "left bn: its output leaves the module"),
        (in_place_on_input, {"act": nn.ReLU(True), "norm": 3}, "left bn: no for"),
        (in_place_and_seen, {"act": nn.ReLU(True), "norm": 3}, "left bn: no for"),
        (shared_activation, {"norm": 4}, "left bn: followed by act, which has"),
        (activation_on_either_side, {"norm": 4}, "left bn: followed by act, which has"),
        (
            activation_of_a_norm_that_is_used_twice,
            {"norm": 4},
            "left bn: followed by act, which has",
        ),
        (shared_norm, {}, "left bn: followed by act, but not wherever it is used"),
    ],
)
def test_no_pair(forward, layers, why):
    layers = {k: nn.BatchNorm2d(v) if k == "norm" else v for k, v in layers.items()}
    network = net(forward, **{"act": nn.ReLU(), "stem": nn.Conv2d(3, 3, 1), **layers})
    lines = assert_same(network, images())
    assert lines[0].startswith(why)
    assert all(line.startswith("left") for line in lines)
    if forward in (in_place_on_input, in_place_and_seen):
        assert lines[1].startswith("left norm: preceded by act, in place on what others may see")


@pytest.mark.parametrize("between", [nn.Dropout(0.0), nn.Identity(), nn.Flatten()], ids=str)
def test_something_between(between):
    network = nn.Sequential(nn.BatchNorm2d(3), between, nn.LeakyReLU())
    assert assert_same(network, images()) == [f"left 0: followed by {type(between).__name__}"]


@pytest.mark.parametrize("other", [nn.Tanh(), nn.ReLU6(), nn.SiLU(inplace=True)], ids=str)
def test_other_activations(other):
    network = nn.Sequential(nn.BatchNorm2d(3), other)
    assert assert_same(network, images()) == [f"left 0: followed by {type(other).__name__}"]
    assert_same(network, images(), lone=True)


def test_pair_divided_between_modules():
    """Someone may call the inner one by itself."""
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.ReLU())
    assert assert_same(network, images()) == [
        "left 0.1: its output leaves the module that calls it"
    ]


class Features(nn.Module):
    """Steps through a Sequential and keeps what comes in between, as perceptual losses do."""

    def __init__(self, wanted):
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Tanh())
        self.wanted = wanted

    def forward(self, x):
        out = []
        for name, layer in self.main.named_children():
            x = layer(x)
            if name in self.wanted:
                out.append(x)
        return tuple(out)


@pytest.mark.parametrize(("wanted", "start"), [("13", "left"), ("23", "fused"), ("3", "fused")])
def test_sequential_that_is_stepped_through(wanted, start):
    assert assert_same(Features(wanted), images())[0].startswith(start)


class ByType(Features):
    def forward(self, x):
        out = []
        for layer in self.main:
            if isinstance(layer, nn.ReLU):
                out.append(x)
            x = layer(x)
        return (*out, x)


def test_forward_that_asks_for_types():
    for lone in (False, True):
        (line,) = assert_same(ByType(""), images(), lone=lone)
        assert line.startswith("left main.1: forward of module (ByType) cannot be traced: it may")


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        x = torch.stack([x[i] * 2 for i in range(len(x))])
        return self.act(self.bn(self.main(x)))


class Reaching(Untraceable):
    def forward(self, x):
        x = torch.stack([x[i] for i in range(len(x))])
        return self.main(x) + self.main[:2](x)


class OtherMeans(Untraceable):
    def forward(self, x):
        x = torch.stack([x[i] for i in range(len(x))])
        return self.step(x)

    def step(self, x):
        return getattr(self, "ma" + "in")[:2](x)


class Catching(Net):
    def forward(self, x):
        try:
            n = int(x.shape[0])
        except TypeError:
            return self.act(self.bn(self.conv(x)))
        return self.bn(self.conv(x)) * n


def test_forward_that_catches_errors():
    (line,) = assert_same(Catching(act=nn.ReLU()), images())
    assert line == "left bn: forward of module (Catching) cannot be traced: it catches exceptions"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_pair(reentrant):
    def forward(self, x):
        h = self.conv(x)
        run = torch.utils.checkpoint.checkpoint
        return run(lambda h: self.act(self.bn(h)), h, use_reentrant=reentrant)

    network = net(forward, act=nn.LeakyReLU(0.2))
    original, x = copy.deepcopy(network), images()
    assert fused(network)[0].startswith("fused bn with act")
    for m in (network, original):
        m(x).square().sum().backward()
    grads = [[p.grad for p in m.parameters()] for m in (network, original)]
    assert difference(*grads) < 1e-10


class Initialising(Net):
    """Asks for types in a method that forward does not call."""

    def initialise(self):
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.zeros_(m.bias)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def test_types_asked_for_elsewhere():
    assert assert_same(Initialising(act=nn.ReLU()), images())[0].startswith("fused bn with act")


class Helped(ByType):
    def forward(self, x):
        return super().forward(x)[-1]


def test_types_asked_for_in_the_base_class():
    assert "it may depend on the types" in assert_same(Helped(""), images())[0]


def test_untraceable_forward():
    """What it calls itself is left alone, and a Sequential that it may reach into too."""
    lines = assert_same(Untraceable(), images())
    assert lines[0].startswith("fused main.1 with main.2")
    assert lines[1].startswith("left bn: forward of module (Untraceable) cannot be traced: ")
    for cls in (Reaching, OtherMeans):
        lines = assert_same(cls(), images())
        assert lines[0].startswith(f"left main.1: forward of module ({cls.__name__}) cannot be")
    lines = assert_same(Untraceable(), images(), lone=True)
    assert lines[1].startswith("fused bn alone (forward of")


def test_forward_that_decides_without_end():
    def forward(self, x):
        while x.sum() > 0:
            x = x - 1
        return self.act(self.bn(self.conv(x)))

    (line,) = assert_same(net(forward, act=nn.ReLU()), images())
    assert "it decides by values too often" in line


def test_replaced_forward():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    network.forward = lambda x: network[0](x)
    (line,) = fused(network)
    assert line == "left 0: forward of module (Sequential) cannot be traced: it is replaced"
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    network[1].forward = torch.tanh
    (line,) = fused(network)
    assert line.endswith("1, which cannot be fused: its forward is replaced")


# ---- shared modules ----------------------------------------------------------------------------


def test_shared_pair():
    block = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    network = nn.Sequential(block, nn.Tanh(), block, block[0], block[1])
    assert assert_same(network, images())[0].startswith("fused 0.0 with 0.1")
    assert network[3] is block[0]
    assert type(network[4]) is FusedReLU


def test_shared_batch_norm_in_different_company():
    norm = nn.BatchNorm2d(3)
    network = nn.Sequential(norm, nn.ReLU(), norm, nn.Tanh())
    assert assert_same(network, images()) == ["left 0: followed by 1, but not wherever it is used"]


def test_shared_activation():
    relu = nn.ReLU()
    network = nn.Sequential(nn.BatchNorm2d(3), relu, nn.Conv2d(3, 3, 1), relu)
    (line,) = assert_same(network, images())
    assert line == "left 0: followed by 1, which has other uses too: give it one of its own"


class MyBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class Block(nn.Module):
    """One activation for all norms, as torchvision's blocks have; there it also follows the sum."""

    def __init__(self, act, first=False, after_sum=False, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1, bias=False), norm(3)
        self.act, self.first, self.after_sum = act, first, after_sum

    def pair(self, norm, x):
        return norm(self.act(x)) if self.first else self.act(norm(x))

    def forward(self, x):
        h = self.pair(self.bn2, self.conv2(self.pair(self.bn1, self.conv1(x)))) + x
        return self.act(h) if self.after_sum else h


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.3, inplace=True)], ids=str)
def test_activation_of_several_norms(activation, first):
    activation = copy.deepcopy(activation)
    network = nn.Sequential(Block(activation, first), Block(activation, first))
    lines = assert_same(network, images())
    kind = "LeakyReLUBatchNorm2d" if first else "BatchNormLeakyReLU2d"
    names = ("0.bn1", "0.bn2", "1.bn1", "1.bn2")
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"fused {name} with 0.act: {kind}(3, negative_slope=0.")
    assert isinstance(activation, (FusedReLU, FusedLeakyReLU))
    other = pickle.loads(pickle.dumps(network))
    x = images()
    assert difference(everything(other, x), everything(network, x)) == 0
    gk.unfuse(network[1])  # takes the activation back, so all who shared it need theirs again
    assert str(network) == str(nn.Sequential(*(Block(activation, first) for _ in range(2))))
    assert type(other[0].bn1) in (B2, L2)


@pytest.mark.parametrize(
    "options", [{"after_sum": True}, {"norm": MyBatchNorm}], ids=["after the sum", "unfit norm"]
)
def test_activation_of_several_norms_and_something_else(options):
    for network in (Block(nn.ReLU(), **options), Block(nn.LeakyReLU(0.2), **options)):
        lines = assert_same(network, images())
        assert lines[0] == (
            "left bn1: followed by act, which has other uses too: give it one of its own"
        )
        assert lines[1].startswith("left bn2")


def test_layers_that_are_also_held_in_a_list():
    """They stay the same objects."""

    def forward(self, x):
        for layer in self.kept:
            x = layer(x)
        return x

    network = net(forward, act=nn.ReLU())
    network.kept = [network.conv, network.bn, network.act]
    assert assert_same(network, images())[0].startswith("fused bn with act")
    assert type(network.kept[1]) is B2


# ---- layers that are left alone ------------------------------------------------------------------


class MyReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("lone", [False, True])
def test_subclasses(lone):
    network = nn.Sequential(MyBatchNorm(3), nn.ReLU())
    assert assert_same(network, images(), lone=lone) == [
        "left 0: MyBatchNorm is a class of its own"
    ]
    network = nn.Sequential(nn.BatchNorm2d(3), MyReLU())
    assert assert_same(network, images()) == ["left 0: followed by MyReLU"]


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 4), (5, 3, 2, 2, 2)])
def test_sync(shape):
    """With others at hand: tests/nn/test_sync.py."""
    group = dist.GroupMember.NON_GROUP_MEMBER
    norms = [nn.SyncBatchNorm(3, process_group=group) for _ in range(3)]
    network = nn.Sequential(
        norms[0], nn.LeakyReLU(0.1), nn.Identity(), nn.ReLU(), norms[1], nn.Identity(), norms[2]
    )
    lines = assert_same(network, torch.randn(shape), lone=True)
    assert [line.split(":")[0] for line in lines] == [
        "fused 0 with 1",
        "fused 4 with 3",
        "fused 6 alone (its output leaves the module that calls it)",
    ]
    assert all(norm.sync and norm.process_group == group for norm in norms)
    assert "negative_slope=0.1" in repr(norms[0])
    assert repr(norms[0]).endswith("sync=True)")
    twin = pickle.loads(pickle.dumps(network))
    assert repr(twin) == repr(network)
    norms[0].sync = False
    gk.unfuse(network)
    assert all(type(norm) is nn.SyncBatchNorm and "sync" not in vars(norm) for norm in norms)


def test_lazy():
    network = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
    assert fused(network, lone=True) == ["left 0: LazyBatchNorm2d is a class of its own"]
    lazy = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
    lazy(images())
    assert fused(lazy)[0].startswith("fused 0 with 1")


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    ],
    ids=["forward", "forward_pre", "backward", "backward_pre"],
)
@pytest.mark.parametrize("which", [0, 1])
def test_hooks(register, which):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    handle = register(network[which])
    (line,) = fused(network)
    assert line.startswith("left 0")
    assert "it has hooks" in line
    assert "remove them first" in line
    handle.remove()
    assert fused(network)[0].startswith("fused 0 with 1")


def test_hooks_on_the_network_do_not_matter():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    seen = []
    network.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert fused(network)[0].startswith("fused 0 with 1")
    assert network(images()) is seen[0]


def test_norms_of_neighbours_stay():
    network = nn.Sequential(
        nn.utils.spectral_norm(nn.Conv2d(3, 3, 1)),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1)),
        nn.BatchNorm2d(3),
        nn.LeakyReLU(0.2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),
    )
    assert [line[:12] for line in assert_same(network, images())] == [
        "fused 1 with",
        "fused 4 with",
    ]
    assert nn.utils.parametrize.is_parametrized(network[3])


def test_parametrised_batch_norm():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    nn.utils.parametrizations.weight_norm(network[0], dim=None)
    assert fused(network) == ["left 0: ParametrizedBatchNorm2d is a class of its own"]


def test_mixed_dtypes():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    network[0].running_var = network[0].running_var.float()
    assert fused(network) == ["left 0: its parameters and statistics are of different dtypes"]


# ---- traces leave nothing behind -----------------------------------------------------------------


class Writing(Net):
    def __init__(self, **layers):
        super().__init__(**layers)
        self.register_buffer("u", torch.zeros(4))
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        self.last = x
        self.conv.last = x
        with torch.no_grad():
            self.u.add_(1)
        noise = torch.randn(4, 1, 1)
        return self.act(self.bn(self.conv(x))) + noise * 0


def test_nothing_is_written_or_drawn():
    network = Writing(act=nn.ReLU())
    before = copy.deepcopy(network.state_dict())
    attributes = [set(vars(m)) for m in network.modules()]
    state = torch.get_rng_state()
    assert fused(network)[0].startswith("fused bn with act")
    assert torch.equal(torch.get_rng_state(), state)
    assert network.steps == 0
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    added = [set(vars(m)) - old for m, old in zip(network.modules(), attributes, strict=True)]
    assert set.union(*added) == {"negative_slope", "_before_fusion"}


COUNTED, LATEST = [], {}


@functools.lru_cache
def remembered(x):
    return x


def helper(x, kept=[]):  # noqa: B006
    helper.calls = getattr(helper, "calls", 0) + 1
    kept.append(x)


def counter():
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        return calls

    return count


class Holder:
    __slots__ = ("__dict__", "slot")
    total = 0


class WritingEverywhere(Net):
    kept_by_class: ClassVar = []

    def __init__(self, **layers):
        super().__init__(**layers)
        self.register_buffer("u", torch.zeros(4))
        self.steps, self.once = torch.zeros(2), [self.conv.bias]
        self.list, self.set, self.deque = [], set(), collections.deque(maxlen=2)
        self.ordered = collections.OrderedDict(a=1, b=2)
        self.nested, self.counts = {"x": [[]]}, collections.Counter()
        self.holder, self.array, self.count = Holder(), np.zeros(2), counter()
        self.numbers = [torch.Generator(), random.Random(1), np.random.default_rng(1)]

    def forward(self, x):
        global COUNTED
        COUNTED = [*COUNTED, x]
        LATEST["x"] = x
        self.list.append(x), self.set.add(x), self.deque.append(x)
        self.ordered.move_to_end("a")
        self.nested["x"][0].append(x)
        self.nested["y"] = self.counts["n"] = x
        self.kept_by_class.append(x)
        Holder.total += 1
        self.holder.x = self.holder.slot = x
        self.array += 1
        self.steps[0] += 1
        self.once[0].data.clamp_(0, 1e-3)
        torch.rand(1, generator=self.numbers[0]), self.numbers[1].random(), self.numbers[2].random()
        torch.rand(1), random.random(), np.random.rand()
        remembered(x), helper(x), self.count()
        warnings.warn("seen", stacklevel=2)
        logging.getLogger("x").error("logged")
        print("printed")
        torch.set_grad_enabled(False)
        return self.act(self.bn(self.conv(x)))

    def state(self):
        first, second, third = self.numbers
        return str([
            COUNTED, LATEST, self.list, self.set, self.deque, self.ordered, self.nested,
            self.counts, self.kept_by_class, Holder.total, vars(self.holder),
            hasattr(self.holder, "slot"), self.array, self.steps, self.once, first.get_state(),
            second.getstate(), third.bit_generator.state, torch.get_rng_state(), random.getstate(),
            np.random.get_state(), remembered.cache_info().currsize, helper.__defaults__,
            vars(helper), self.count.__closure__[0].cell_contents, warnings.filters,
            torch.is_grad_enabled(), self.u,
        ])  # fmt: skip


def test_no_trace_is_left_anywhere(capfd):
    network = WritingEverywhere(act=nn.ReLU())
    before = network.state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines = []
        gk.fuse(network, log=lines.append)
    assert lines[0].startswith("fused bn with act")
    assert network.state() == before
    assert not caught
    assert capfd.readouterr() == ("", "")
    network(images())
    torch.set_grad_enabled(True)
    assert network.state() != before


# ---- what fused networks live through ------------------------------------------------------------


def small():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.3, inplace=True),
        nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4),
    )  # fmt: skip


def saved_and_loaded(network):
    stream = io.BytesIO()
    torch.save(network, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies(copied):
    network = warmed(small(), images())
    described = str(network)
    fused(network)
    other = copied(network)
    assert str(other) == str(network) != described
    assert other[1].weight is not network[1].weight
    x = images()
    assert difference(everything(other, x), everything(network, x)) == 0
    unfused = gk.unfuse(other)
    assert unfused is other
    assert str(other) == described
    assert type(network[1]) is B2
    assert type(network[5]) is L2
    assert difference(everything(other, x), everything(network, x)) < 1e-10


def test_unfuse_keeps_parameters_and_what_was_done_meanwhile():
    network = small()
    weight, keys = network[1].weight, list(network.state_dict())
    fused(network)
    network.eval().half()
    network[1].momentum = 0.7
    gk.unfuse(network)
    assert network[1].weight is weight
    assert list(network.state_dict()) == keys
    assert (network[1].momentum, network[1].training) == (0.7, False)
    assert weight.dtype is torch.float16
    assert network[2].inplace is True
    assert network[2].negative_slope == 0.3
    described = str(network)
    assert str(gk.unfuse(network)) == described


def test_unfuse_leaves_layers_of_ours_alone():
    network = nn.Sequential(gk.nn.BatchNormLeakyReLU2d(3), nn.Identity())
    assert fused(network) == ["no BatchNorm to fuse"]
    assert type(gk.unfuse(network)[0]) is B2


def test_unfuse_a_part_takes_its_activation_along():
    def forward(self, x):
        return self.act(self.block.bn(self.conv(x)))

    network = net(forward, block=nn.ModuleDict({"bn": nn.BatchNorm2d(4)}), act=nn.ReLU())
    del network.bn
    assert fused(network)[0].startswith("fused block.bn with act")
    gk.unfuse(network.block)
    assert type(network.act) is nn.ReLU
    assert type(network.block.bn) is nn.BatchNorm2d


def test_state_dict_goes_both_ways():
    plain, other = warmed(small(), images()), small()
    gk.fuse(other)
    other.load_state_dict(plain.state_dict(), strict=True)
    x = images()
    assert difference(everything(other, x), everything(plain, x)) < 1e-10
    fresh = small()
    fresh.load_state_dict(other.state_dict(), strict=True)
    fresh.eval()
    torch.testing.assert_close(fresh(x), other.eval()(x))
    metadata = [m.get("version") for m in plain.state_dict()._metadata.values()]
    assert metadata == [m.get("version") for m in other.state_dict()._metadata.values()]


def test_an_optimiser_made_before_goes_on():
    network, plain = small(), small()
    plain.load_state_dict(network.state_dict())
    optimisers = [torch.optim.SGD(m.parameters(), 1e-3, 0.9) for m in (network, plain)]
    x = images()
    for step in range(4):
        if step == 2:
            fused(network)
        for m, optimiser in zip((network, plain), optimisers, strict=True):
            optimiser.zero_grad()
            m(x).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(network.state_dict(), plain.state_dict())


def test_in_place_addition_to_what_the_pair_returns():
    def forward(self, x):
        h = self.act(self.bn(self.conv(x)))
        h += 1
        return h

    assert_same(net(forward, act=nn.LeakyReLU(0.2)), images())


def test_compile():
    pytest.importorskip("torch._dynamo")
    network = gk.fuse(small())
    other = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = images()
    results = []
    for m in (compiled, other):
        m.zero_grad()
        out = m(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in m.parameters())])
    assert difference(*results) < 1e-10


def test_fuse_what_is_compiled_already():
    network = small()
    original = copy.deepcopy(network)
    compiled = torch.compile(network, backend="aot_eager")
    x = images()
    compiled(x)
    original(x)
    assert [n[:5] for n in fused(compiled)] == ["fused", "fused"]
    torch.testing.assert_close(compiled(x), original(x))


DISTRIBUTED = """
import copy, os, sys, torch, gankernels as gk
from torch import nn
first, store = sys.argv[1] == "first", sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
make = lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Flatten()]
network = nn.Sequential(*make()).double()
plain = copy.deepcopy(network)
if first:
    gk.fuse(network)
wrapped = nn.parallel.DistributedDataParallel(network)
if not first:
    gk.fuse(wrapped)
assert type(network[1]) is gk.nn.BatchNormLeakyReLU2d
x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
for m in (wrapped, plain):
    m(x).square().sum().backward()
for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)
print("same gradients", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("order", ["first", "last"])
def test_distributed_data_parallel(order, tmp_path, python):
    """In a process of its own, since a process group may stay behind."""
    assert "same gradients" in python("-c", DISTRIBUTED, order, tmp_path / "store").stdout


def test_data_parallel_and_average():
    for wrap in (nn.DataParallel, torch.optim.swa_utils.AveragedModel):
        assert [n[:5] for n in assert_same(wrap(small()), images())] == ["fused", "fused"]


def test_graph_modules():
    network = torch.fx.symbolic_trace(small())
    assert [n[:5] for n in assert_same(network, images())] == ["fused", "fused"]


def test_export_has_none_of_our_ops():
    network = gk.fuse(warmed(small(), images()).eval())
    x = images()
    expected = network(x)
    exported = torch.export.export(network, (x,))
    traced = torch.jit.trace(network, x)
    for graph in (exported.graph, traced.inlined_graph):
        assert "gankernels::" not in str(graph).replace("ops.gankernels.", "gankernels::")
        assert "batch_norm" in str(graph)
    torch.testing.assert_close(exported.module()(x), expected)
    torch.testing.assert_close(traced(x), expected)


# ---- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None,), {}, "module must be a torch.nn.Module, got NoneType"),
        ((torch.zeros(1),), {}, "must be a torch.nn.Module, got Tensor"),
        (({"a": 1},), {}, "must be a torch.nn.Module, got dict"),
        ((nn.ReLU,), {}, "must be a torch.nn.Module, got type"),
        ((nn.ReLU(),), {"lone": 1}, "lone must be a bool, got int"),
        ((nn.ReLU(),), {"cpu": None}, "cpu must be a bool, got NoneType"),
        ((nn.ReLU(),), {"log": True}, "log must be a function of a line, got bool"),
        ((nn.ReLU(), True), {}, "positional"),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(TypeError, match=message):
        gk.fuse(*arguments, **options)
    if arguments[0].__class__ is not nn.ReLU:
        with pytest.raises(TypeError, match=message):
            gk.unfuse(*arguments)


def test_script_modules():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    for change in (gk.fuse, gk.unfuse):
        with pytest.raises(TypeError, match="module must not be compiled by TorchScript"):
            change(scripted)


def test_log_is_printed_as_it_is(capsys):
    gk.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Tanh()), log=print)
    assert capsys.readouterr().out.splitlines() == [
        "fused 0 with 1: BatchNormLeakyReLU2d(3, negative_slope=0.0, eps=1e-05, momentum=0.1, "
        "affine=True, track_running_stats=True)",
        "left 2: followed by Tanh",
    ]
