"""OneDNNLinear: the same function, derivatives and checkpoints as torch.nn.Linear."""

import pytest
import torch
from torch import nn

from gankernels.nn.cpu import OneDNNLinear, _product, linear

from .twins import both, derivatives


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def products(request, monkeypatch):
    for module in (linear, _product):
        monkeypatch.setattr(module, "onednn_is_faster", lambda: request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 30), (1, 30), (4, 3, 30)])
def test_linear(products, bias, shape):
    network = nn.Sequential(nn.Linear(30, 17, bias=bias), nn.Tanh(), nn.Linear(17, 4, bias=bias))
    plain, faster = both(network)
    x = torch.randn(shape)
    for ours, theirs in zip(derivatives(faster, x), derivatives(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # Strides that are not those of a matrix.
    x = torch.randn(30, 5).t()
    torch.testing.assert_close(faster(x), plain(x))
    x = torch.randn(30).expand(5, 30)
    torch.testing.assert_close(faster(x), plain(x))
    torch.testing.assert_close(faster.double()(x.double()), plain.double()(x.double()))


@pytest.mark.skipif(not _product.onednn_is_faster(), reason="MKL is faster on this processor")
def test_products_go_through_onednn():
    layer = OneDNNLinear(4, 4)
    function = layer(torch.ones(2, 4)).grad_fn.next_functions[0][0]
    assert "OneDNNProduct" in type(function).__name__


def test_transforms_and_compilers_get_pytorchs_operations(products):
    plain, faster = both(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    x = torch.randn(5, 3)

    def results(network):
        def loss(parameters, x):
            return torch.func.functional_call(network, parameters, (x,)).float().square().sum()

        parameters = {name: p.detach() for name, p in network.named_parameters()}
        yield from torch.func.grad(loss)(parameters, x).values()
        yield torch.func.grad(loss, argnums=1)(parameters, x)
        yield torch.vmap(network)(x)
        yield from torch.func.jvp(network, (x,), (x,))
        torch.compiler.reset()
        yield torch.compile(network, backend="aot_eager", fullgraph=True)(x)
        yield torch.jit.trace(network, x)(x)
        yield torch.jit.script(network)(x)
        yield torch.export.export(network, (x,)).module()(x)
        yield torch.fx.symbolic_trace(network)(x)

    for ours, theirs in zip(list(results(faster)), list(results(plain)), strict=True):
        torch.testing.assert_close(ours, theirs)
