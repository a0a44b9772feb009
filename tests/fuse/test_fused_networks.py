"""Fused networks work with copies, pickles, compilers, optimizers and processes."""

import copy
import io
import pickle

import pytest
import torch
import torch.utils.checkpoint
from fusing import B2, L2, assert_same, difference, everything, fused, images, net, warmed
from torch import nn

import gankernels as gk


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


def test_an_optimizer_made_before_goes_on():
    network, plain = small(), small()
    plain.load_state_dict(network.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3, 0.9) for m in (network, plain)]
    x = images()
    for step in range(4):
        if step == 2:
            fused(network)
        for m, optimizer in zip((network, plain), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
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
