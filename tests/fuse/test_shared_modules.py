"""Modules that are used more than once, and activations of several norms."""

import copy
import pickle

import pytest
from fusing import B2, L2, MyBatchNorm, assert_same, difference, everything, images, net
from torch import nn

import gankernels as gk
from gankernels.nn.pairs import FusedLeakyReLU, FusedReLU


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
