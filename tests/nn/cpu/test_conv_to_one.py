"""ConvToOneChannel2d: a convolution as a matrix product."""

import pytest
import torch
from torch import nn

from gankernels.nn.cpu import ConvToOneChannel2d, _product, conv_to_one

from .twins import both, derivatives


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def products(request, monkeypatch):
    for module in (_product,):
        monkeypatch.setattr(module, "onednn_is_faster", lambda: request.param)


def to_one_channel(*arguments, **keywords):
    conv = nn.Conv2d(64, 1, *arguments, **keywords)
    return nn.Sequential(nn.BatchNorm2d(64), conv, nn.LeakyReLU(0.2, inplace=True))


@pytest.fixture
def products_made(monkeypatch):
    """The shapes of what `product` is called with."""
    shapes, inner = [], conv_to_one.product

    def count(a, b):
        shapes.append((a.shape, b.shape))
        return inner(a, b)

    monkeypatch.setattr(conv_to_one, "product", count)
    return shapes


@pytest.mark.parametrize(
    "network",
    [
        to_one_channel(3, padding=1),
        to_one_channel(4),
        to_one_channel((2, 5), padding=(3, 0), bias=False),
        to_one_channel((3, 5), padding="same"),
    ],
)
def test_convolutions_to_one_channel(products_made, network):
    plain, faster = both(network.double().to(memory_format=torch.channels_last))
    x = torch.randn(2, 64, 5, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
    for ours, theirs in zip(derivatives(faster, x), derivatives(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert products_made == [((70, 64), (plain[1].weight[0, 0].numel(), 64))]
    assert faster[1](x[:0]).shape == plain[1](x[:0]).shape


def test_convolutions_to_one_channel_in_float32(products):
    plain, faster = both(to_one_channel(3, padding=1).to(memory_format=torch.channels_last))
    x = torch.randn(2, 64, 5, 7).to(memory_format=torch.channels_last)
    for ours, theirs in zip(derivatives(faster, x), derivatives(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("conv", "layout", "shape"),
    [
        (nn.Conv2d(64, 2, 3), torch.channels_last, (2, 64, 5, 7)),
        (nn.Conv2d(32, 1, 3), torch.channels_last, (2, 32, 5, 7)),
        (nn.Conv2d(64, 1, 1), torch.channels_last, (2, 64, 5, 7)),
        (nn.Conv2d(64, 1, 3, stride=2), torch.channels_last, (2, 64, 5, 7)),
        (nn.Conv2d(64, 1, 3, dilation=2), torch.channels_last, (2, 64, 5, 7)),
        (nn.Conv2d(64, 1, 3, 1, 1, padding_mode="reflect"), torch.channels_last, (2, 64, 5, 7)),
        (nn.Conv2d(64, 1, 3), torch.contiguous_format, (2, 64, 5, 7)),
        (nn.Conv2d(64, 1, 3), torch.contiguous_format, (64, 5, 7)),
    ],
)
def test_other_convolutions_run_as_they_are(products_made, conv, layout, shape):
    plain, faster = both(conv)
    x = torch.randn(shape).contiguous(memory_format=layout)
    assert torch.equal(plain(x), faster(x))
    assert not products_made


@pytest.mark.parametrize("autocast", [True, False])
def test_convolutions_in_half_precision_run_as_they_are(products_made, autocast):
    layout = torch.channels_last
    plain, faster = both(nn.Conv2d(64, 1, 3, dtype=None if autocast else torch.bfloat16))
    x = torch.randn(2, 64, 5, 7, dtype=plain.weight.dtype).contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(plain(x), faster(x))
    assert not products_made


@pytest.mark.parametrize("shape", [(2, 32, 5, 7), (2, 64, 2, 7), (2, 64, 5)])
def test_convolutions_complain_as_they_did(shape):
    plain, faster = both(nn.Conv2d(64, 1, 3))
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    complaints = []
    for module in (plain, faster):
        with pytest.raises(RuntimeError) as caught:
            module(x)
        complaints.append(str(caught.value))
    assert complaints[0] == complaints[1]


def test_the_layer_by_itself():
    layer = ConvToOneChannel2d(64, 3, padding=1)
    plain = nn.Conv2d(64, 1, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64, 5, 7).to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.jit.script(layer)(x), plain(x), rtol=1e-4, atol=1e-4)


def test_transforms_get_pytorchs_convolutions():
    plain, faster = both(to_one_channel(3, padding=1).to(memory_format=torch.channels_last).eval())
    x = torch.randn(2, 64, 4, 4).to(memory_format=torch.channels_last)
    ours, theirs = (torch.func.jacrev(module)(x) for module in (faster, plain))
    assert torch.equal(ours, theirs)
