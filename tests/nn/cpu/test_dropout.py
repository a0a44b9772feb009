"""BitDropout: the semantics of PyTorch's dropout."""

import pytest
import torch

from gankernels.nn.cpu import BitDropout


def test_it_drops_independently_with_probability_p():
    layer = BitDropout(0.4)
    x = torch.rand(400, 500, requires_grad=True)
    y = layer(x)
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(0.6, abs=0.005)
    torch.testing.assert_close(y, torch.where(kept, x / 0.6, 0.0), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, kept / 0.6, rtol=1e-4, atol=0)
    # Each of the four that share a random word is dropped like the others, and independently.
    lanes = kept.flatten().view(-1, 4).double()
    torch.testing.assert_close(lanes.mean(0), torch.full((4,), 0.6).double(), rtol=0, atol=0.01)
    assert torch.corrcoef(lanes.t()).fill_diagonal_(0).abs().max() < 0.02
    assert layer(x[:1, :3]).shape == (1, 3)
    assert not torch.equal(layer(x) != 0, kept)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    for p in (0.0, 1.0):
        layer.p = p
        torch.testing.assert_close(layer(x), x * (1 - p))
    assert layer.eval()(x) is x


def test_compilers_get_pytorchs_operation():
    layer, x = BitDropout(0.5).eval(), torch.randn(5, 3)
    for converted in (
        torch.jit.script(layer),
        torch.compile(layer, backend="aot_eager", fullgraph=True),
        torch.fx.symbolic_trace(torch.nn.Sequential(layer)),
    ):
        assert torch.equal(converted(x), x)
