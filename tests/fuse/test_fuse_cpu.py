"""fuse(network, cpu=True): replaces layers by those for CPUs."""

import copy
import io
import pickle

import pytest
import torch
from fusing import everything, images
from torch import nn

import gankernels as gk
from gankernels.nn.cpu import BitDropout, ConvToOneChannel2d, OneDNNLinear, UpsampleConv2d
from gankernels.nn.pairs import FusedUpsample


class MyLinear(nn.Linear):
    """A layer of somebody else's."""


def small():
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(3, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 1, 3, padding=1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(256, 4),
        MyLinear(4, 1),
    ).to(memory_format=torch.channels_last)


def fused(network):
    lines = []
    gk.fuse(network, cpu=True, log=lines.append)
    return lines


def types(network):
    return [type(m) for m in network.modules()]


def test_every_layer_has_a_line():
    network = small()
    keys, parameters = list(network.state_dict()), list(network.parameters())
    lines = [line.partition("(")[0] for line in fused(network)]
    assert lines == [
        "fused 2 with 3: BatchNormLeakyReLU2d",
        "fused 0 with 1: UpsampleConv2d",
        "replaced 4: ConvToOneChannel2d",
        "replaced 6: BitDropout",
        "replaced 7: OneDNNLinear",
        "left 8: MyLinear is a subclass of Linear",
    ]
    assert list(network.state_dict()) == keys
    assert all(p is q for p, q in zip(network.parameters(), parameters, strict=True))
    assert fused(network) == ["left 8: MyLinear is a subclass of Linear"]


def test_without_cpu_nothing_of_it_happens():
    network = small()
    before = types(network)
    gk.unfuse(gk.fuse(network))
    assert types(network) == before
    gk.fuse(network)
    layers = (FusedUpsample, UpsampleConv2d, ConvToOneChannel2d, BitDropout, OneDNNLinear)
    assert not any(isinstance(m, layers) for m in network.modules())


@pytest.mark.parametrize("training", [True, False])
def test_results_are_the_same(training):
    network = small().train(training)
    network[6].p = 0.0
    twin = copy.deepcopy(network)
    fused(network)
    x = images(size=8).to(memory_format=torch.channels_last)
    for ours, theirs in zip(everything(network, x), everything(twin, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def saved_and_loaded(network):
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded, lambda m: m],
    ids=["deepcopy", "pickle", "torch.save", "itself"],
)
def test_it_can_be_undone_in_copies_too(copied):
    network = small()
    before, attributes = types(network), [set(vars(m)) for m in network.modules()]
    fused(network)
    twin = copied(network)
    assert types(twin) == types(network) != before
    gk.unfuse(twin)
    assert types(twin) == before
    assert [set(vars(m)) for m in twin.modules()] == attributes
    if twin is not network:
        assert types(network) != before
    twin.load_state_dict(network.state_dict())


def test_an_upsampling_of_several_convolutions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Upsample(scale_factor=2)
            self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

        def forward(self, x):
            return self.b(self.up(self.a(self.up(x))))

    network, twin = Net(), Net()
    twin.load_state_dict(network.state_dict())
    (line,) = fused(network)
    assert line.startswith("fused up with a, b: UpsampleConv2d")
    x = images(size=4)
    torch.testing.assert_close(network(x), twin(x))


@pytest.mark.parametrize(
    ("upsample", "conv", "why"),
    [
        (nn.Upsample(scale_factor=3), nn.Conv2d(3, 5, 3, 1, 1), "settings do not match"),
        (nn.Upsample(size=8), nn.Conv2d(3, 5, 3, 1, 1), "settings do not match"),
        (nn.Upsample(None, 2, "bilinear"), nn.Conv2d(3, 5, 3, 1, 1), "settings do not match"),
        (nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, 2, 1), "settings do not match"),
        (nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, 1, 0), "settings do not match"),
        (nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 5, 1, 1), "settings do not match"),
        (nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, 1, 1, groups=3), "do not match"),
        (
            nn.Upsample(scale_factor=2),
            nn.Conv2d(3, 5, 3, 1, 1, padding_mode="reflect"),
            "settings do not match",
        ),
        (nn.Upsample(scale_factor=2), nn.Tanh(), "not followed by a Conv2d"),
    ],
)
def test_other_upsamplings_are_left_alone(upsample, conv, why):
    network = nn.Sequential(upsample, conv)
    before = types(network)
    (line,) = fused(network)
    assert line.startswith("left 0: ")
    assert why in line
    assert types(network) == before


def test_an_upsampling_whose_result_is_used_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.conv = nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            x = self.up(x)
            return x + self.conv(x)

    assert fused(Net()) == ["left up: it is not followed by a Conv2d wherever it is used"]


def test_hooks():
    network = small()
    network[0].register_forward_hook(lambda *_: None)
    assert any(line.startswith("left 0: it has hooks") for line in fused(network))
    network = small()
    fused(network)
    seen = []
    with pytest.warns(UserWarning, match="since one of them gets a hook"):
        network[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    network(images(size=8))
    assert seen == [(5, 3, 16, 16)]
    assert (type(network[0]), type(network[1])) == (nn.Upsample, nn.Conv2d)


def test_a_replaced_half():
    network = small()
    fused(network)
    with pytest.warns(UserWarning, match="since one of them is replaced"):
        network[1] = nn.Conv2d(3, 64, 3, padding=1)
    assert type(network[0]) is nn.Upsample


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Dropout(0.5, inplace=True), "it works in place"),
        (MyLinear(2, 2), "MyLinear is a subclass of Linear"),
    ],
)
def test_layers_that_are_left_alone(layer, why):
    assert fused(layer) == [f"left module: {why}"]


def test_a_replaced_forward():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x
    assert fused(layer) == ["left module: its forward is replaced"]
