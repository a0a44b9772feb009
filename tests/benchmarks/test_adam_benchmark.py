"""The benchmark of Adam's step compares equal steps."""

import adam
import pytest
import torch


@pytest.mark.parametrize("half", [False, True])
def test_both_sides_move_alike(half):
    networks = []
    for side in (adam.theirs, adam.ours):
        torch.manual_seed(0)
        network = adam.NETWORKS["64 layers of 16"]()
        before = [p.detach().clone() for p in network.parameters()]
        step = side(network, half)
        for _ in range(3):
            step()
        for p, start in zip(network.parameters(), before, strict=True):
            assert not torch.equal(p, start)
        networks.append(network)
    for theirs, ours in zip(*(n.parameters() for n in networks), strict=True):
        torch.testing.assert_close(ours, theirs)
