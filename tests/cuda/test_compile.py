"""torch.compile of a first-order model that has every op in it."""

import copy

import pytest
import torch
from torch import nn

import gankernels as gk

pytest.importorskip("triton", reason="torch.compile needs Triton on CUDA")


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            gk.nn.BatchNormLeakyReLU2d(16),
            nn.Conv2d(16, 16, 3, 2, 1),
            gk.nn.LeakyReLUBatchNorm2d(16),
            gk.nn.MinibatchStddev(),
            nn.Flatten(),
        )
        self.compare = gk.nn.MinibatchDiscrimination(17 * 16, 6, 5)
        self.head = nn.Linear(17 * 16 + 6, 1)

    def forward(self, real, fake, alpha):
        x = gk.functional.interpolate(real, fake, alpha)
        features = self.features(x)
        penalty = gk.functional.gradient_norm_penalty(features)
        return self.head(self.compare(features)).mean() + penalty


@pytest.mark.parametrize("training", [True, False])
def test_without_graph_breaks(training):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = Discriminator().cuda().train(training)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True)
    real, fake = (torch.randn(12, 3, 16, 16, device="cuda") for _ in range(2))
    alpha = torch.rand(12, device="cuda")
    losses = []
    for model in (eager, compiled):
        for _ in range(2):
            loss = model(real, fake, alpha)
            loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(other.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)
    for (name, a), b in zip(other.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    torch._dynamo.reset()
