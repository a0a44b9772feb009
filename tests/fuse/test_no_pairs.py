"""Layers that do not make a pair, and their lines in the log."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from fusing import Net, assert_same, difference, fused, images, net
from torch import nn


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
        assert lines[1].startswith(
            "left norm: preceded by act, in place on a tensor that others may see"
        )


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


class Initializing(Net):
    """Asks for types in a method that forward does not call."""

    def initialize(self):
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.zeros_(m.bias)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def test_types_asked_for_elsewhere():
    assert assert_same(Initializing(act=nn.ReLU()), images())[0].startswith("fused bn with act")


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
