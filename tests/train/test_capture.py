"""Finds operations on the CPU that would break a CUDA graph since they wait for the device.

On the CPU nothing waits, but the operations that would wait are dispatched as well.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gankernels import games
from gankernels.nn.cpu import conv_to_one, dropout, linear, upsample_conv
from gankernels.optim import Adam

aten = torch.ops.aten
#: What gives a number to the host, or a tensor whose size the device alone knows.
WAITS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
    aten.repeat_interleave,
}  # fmt: skip

#: The same, where an index is a mask.
BY_INDEX = {aten.index, aten.index_put, aten.index_put_}


class WaitedError(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masked = function.overloadpacket in BY_INDEX and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masked or function.overloadpacket in WAITS:
            raise WaitedError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def captured(run, monkeypatch):
    """`captured(game, **settings)`: two iterations as a graph would see them, report and all."""
    # What the CPU computes in its own way.
    for module in (linear, dropout, conv_to_one, upsample_conv):
        monkeypatch.setattr(module, "runs_on_cpu", lambda x: False)
    monkeypatch.setattr(Adam, "_kernel_can_step", lambda optimizer: False)
    # Its labels are checked on the CPU, by reading them, and on CUDA by the kernel.
    monkeypatch.setattr(torch.nn.functional, "one_hot", one_hot)

    def iterations(game, **settings):
        trainer = run(game, log_every=2, **settings)

        def call(key, function, inputs):
            with NoWaiting():
                return function(inputs)

        trainer.iterate()  # an optimizer makes its state in the first
        trainer.call = call
        trainer.iterate()
        trainer.iterate()
        return trainer

    return iterations


def one_hot(labels, classes):
    return (labels.unsqueeze(-1) == torch.arange(classes)).long()


SMALL = {"dcgan": {"width": 4}, "cdcgan": {"width": 4}}
MORE = {"penalty": "dragan", "minibatch_discrimination": "6,5", "minibatch_stddev": True}


@pytest.mark.parametrize("more", [{}, MORE], ids=["plain", "more"])
@pytest.mark.parametrize("game", games.names())
def test_no_game_waits_for_the_device(captured, game, more):
    assert captured(game, **SMALL.get(game, {}), **more).step == 3


@pytest.mark.parametrize("penalty", ["r1", "wgan-lp"])
def test_no_penalty_waits_for_the_device(captured, penalty):
    assert captured("gan", penalty=penalty).step == 3


@pytest.mark.parametrize(
    "wait",
    [
        lambda terms: terms["real"].item(),
        lambda terms: bool(terms["real"] > 0),
        lambda terms: torch.arange(3)[torch.arange(3) > 1],
        lambda terms: torch.equal(terms["real"], terms["fake"]),
    ],
    ids=["item", "if", "mask", "equal"],
)
def test_a_game_that_waits_is_found(captured, wait, monkeypatch):
    inner = games.Player.loss_of

    def loss_of(player, step):
        def loss(batch, rng):
            terms = inner(player, step)(batch, rng)
            if "real" in terms and torch.utils._python_dispatch._get_current_dispatch_mode():
                wait(terms)
            return terms

        return loss

    monkeypatch.setattr(games.Player, "loss_of", loss_of)
    with pytest.raises(WaitedError):
        captured("gan")
