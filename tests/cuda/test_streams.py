"""Kernels run on the current stream and on the tensors' device, asynchronously."""

import pytest
import torch

import gankernels as gk


def test_ops_run_on_the_current_stream(op, dtype):
    """Their inputs arrive late on a stream of their own; who does not wait for it sees zeros."""
    inputs = op.draw(dtype)
    expected = op.solve(inputs)
    late = [torch.zeros_like(t, requires_grad=True) for t in inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: some 10 ms
        with torch.no_grad():
            for there, here in zip(late, inputs, strict=True):
                there.copy_(here)
        found = op.solve(late)
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_ops_never_wait_for_the_device(op, dtype):
    inputs = op.draw(dtype)
    op.solve(inputs)  # what is loaded on first use may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.solve(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_layers_never_wait_for_the_device():
    layer = gk.nn.BatchNormLeakyReLU2d(3, momentum=None, device="cuda")
    x = torch.randn(4, 3, 5, 5, device="cuda")
    layer(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)
        layer.eval()(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ops_run_on_the_device_of_their_tensors(op, dtype):
    expected = op.solve(op.draw(dtype))
    inputs = [t.detach().to("cuda:1").requires_grad_() for t in op.draw(dtype)]
    with torch.cuda.device(0):
        found = op.solve(inputs)
        assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        assert a.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())


def test_parameters_on_another_device_are_refused():
    x = torch.randn(4, 3, 5, device="cuda")
    with pytest.raises(RuntimeError, match="weight must be on cuda:0 like x, got cpu"):
        gk.functional.batch_norm_leaky_relu(x, None, None, torch.ones(3), training=True)
