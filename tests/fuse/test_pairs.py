"""Layers that make a pair."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from fusing import B2, Net, assert_same, fused, images
from torch import nn

import gankernels as gk
from gankernels.nn.pairs import FusedLeakyReLU, FusedReLU

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
