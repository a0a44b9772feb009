"""Layers that are not replaced."""

import pickle

import pytest
import torch
import torch.utils.checkpoint
from fusing import MyBatchNorm, assert_same, fused, images
from torch import distributed as dist
from torch import nn

import gankernels as gk


class MyReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("lone", [False, True])
def test_subclasses(lone):
    network = nn.Sequential(MyBatchNorm(3), nn.ReLU())
    assert assert_same(network, images(), lone=lone) == ["left 0: MyBatchNorm is a subclass"]
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
    assert fused(network, lone=True) == ["left 0: LazyBatchNorm2d is a subclass"]
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


def test_norms_of_neighbors_stay():
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


def test_parametrized_batch_norm():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    nn.utils.parametrizations.weight_norm(network[0], dim=None)
    assert fused(network) == ["left 0: ParametrizedBatchNorm2d is a subclass"]


def test_mixed_dtypes():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    network[0].running_var = network[0].running_var.float()
    assert fused(network) == ["left 0: its parameters and statistics are of different dtypes"]
