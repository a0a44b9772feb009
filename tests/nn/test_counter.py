"""num_batches_tracked counts as in PyTorch's layers, also after other code replaced it."""

import copy

import pytest
import torch
from torch import nn

import gankernels as gk

DTYPES = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.float16, torch.bfloat16,
          torch.float32, torch.float64, torch.complex64, torch.bool]  # fmt: skip


def outcome(layer, counter, momentum, batches=3):
    """The buffers after some batches, or the type of what was raised."""
    layer = copy.deepcopy(layer).train()
    layer.momentum = momentum
    if counter is None:
        layer.num_batches_tracked = None
    else:
        layer._buffers["num_batches_tracked"] = counter.clone()
    torch.manual_seed(0)
    try:
        for _ in range(batches):
            layer(torch.randn(6, 3, 5) + 1)
    except Exception as error:
        return type(error)
    return layer.running_mean, layer.running_var, layer.num_batches_tracked


COUNTERS = {str(d).removeprefix("torch."): torch.zeros((), dtype=d) for d in DTYPES} | {
    "one of several dimensions": torch.zeros(1, 1, dtype=torch.int64),
    "two": torch.zeros(2, dtype=torch.int64),
    "none": torch.zeros(0, dtype=torch.int64),
    "expanded": torch.zeros(1, dtype=torch.int64).expand(2),
    "on another device": torch.zeros((), dtype=torch.int64, device="meta"),
    "half a two": torch.tensor(0.5),
    "at its limit": torch.tensor(2048.0, dtype=torch.float16),
    "about to wrap": torch.tensor(254, dtype=torch.uint8),
    "one that was left out": None,
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("counter", COUNTERS.values(), ids=COUNTERS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_counts_as_pytorch(backend, counter, momentum):
    theirs = outcome(nn.BatchNorm1d(3), counter, momentum)
    with gk.use_backend(backend):
        ours = outcome(gk.nn.BatchNormLeakyReLU1d(3, negative_slope=1.0), counter, momentum)
    if isinstance(theirs, type):
        assert ours is theirs
        return
    torch.testing.assert_close(ours[:2], theirs[:2])
    if counter is None:
        assert ours[2] is None
    else:
        assert ours[2].dtype == theirs[2].dtype
        assert ours[2].is_meta or torch.equal(ours[2], theirs[2])


def test_memory_beside_the_counter_is_left_alone():
    around = torch.zeros(4, dtype=torch.float16)
    layer = gk.nn.BatchNormLeakyReLU1d(3)
    layer._buffers["num_batches_tracked"] = around[1]
    for _ in range(3):
        layer(torch.randn(4, 3))
    assert around.tolist() == [0, 3, 0, 0]


def test_a_network_that_is_cast_as_a_whole():
    plain = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()).type(torch.FloatTensor)
    ours = gk.fuse(copy.deepcopy(plain))
    for _ in range(3):
        x = torch.randn(8, 4)
        torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    assert ours[1].num_batches_tracked == 3.0
