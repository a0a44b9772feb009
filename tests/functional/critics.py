"""Critics, and penalties as they are usually written in PyTorch."""

import torch
from ops.oracle import seeded
from torch import nn

import gankernels as gk


def draw(*shape, dtype=torch.float64, seed=0):
    generator = seeded(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Patches(nn.Module):
    """A convolutional critic that answers with a map (N, 1, h, w)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 2))

    def forward(self, x):
        return self.layers(x)


class Labelled(nn.Module):
    """A critic that takes labels and a weight as further arguments."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 72)
        self.layers = nn.Sequential(nn.Linear(72, 8), nn.Softplus(), nn.Linear(8, 1))

    def forward(self, x, labels, weight):
        return weight * self.layers(x.flatten(1) * self.embedding(labels)).flatten()


class Cubic(nn.Module):
    """For inputs of any rank: a sum of a_i x^i over all elements but the first dimension."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.3, -0.4, 0.5]))

    def forward(self, x):
        powers = self.a[0] * x + self.a[1] * x**2 + self.a[2] * x**3
        return powers.flatten(1).sum(1) if x.dim() > 1 else powers


def dense(*activation, features=72):
    layers = activation or (nn.LeakyReLU(0.2),)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(features, 16), *layers, nn.Linear(16, 16), *layers, nn.Linear(16, 1)
    )


IMAGE = (2, 6, 6)
CRITICS = {
    "(N, 1)": (dense, IMAGE, ()),
    "(N,)": (lambda: nn.Sequential(dense(), nn.Flatten(0)), IMAGE, ()),
    "(N, 1, h, w)": (Patches, IMAGE, ()),
    "labels": (Labelled, IMAGE, (torch.arange(5) % 3, 1.5)),
    "rank 1": (Cubic, (), ()),
    "rank 2": (Cubic, (7,), ()),
    "rank 3": (Cubic, (2, 3), ()),
    "rank 5": (Cubic, (2, 1, 3, 2), ()),
    "batch norm": (
        lambda: dense(gk.nn.BatchNormLeakyReLU1d(16)), IMAGE, ()
    ),
}  # fmt: skip


def problem(name, dtype=torch.float64, n=5):
    torch.manual_seed(0)
    make, shape, arguments = CRITICS[name]
    critic = make().to(dtype)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter *= 2  # norms on both sides of 1
    real, fake = draw(n, *shape, dtype=dtype), draw(n, *shape, dtype=dtype, seed=1)
    arguments = tuple(a.to(real.device) if isinstance(a, torch.Tensor) else a for a in arguments)
    return critic, real, fake, arguments


def eager(critic, real, fake, kind, center, arguments, state):
    """The penalty as it is written by hand."""
    n = len(real)
    if kind.startswith("wgan"):
        alpha = torch.rand(n, dtype=real.dtype, generator=state).reshape(
            n, *(1,) * (real.dim() - 1)
        )
        x = alpha * real + (1 - alpha) * fake
    elif kind == "dragan":
        x = real + 0.5 * real.std() * torch.rand(real.shape, dtype=real.dtype, generator=state)
    else:
        x = real if kind == "r1" else fake
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x, *arguments).sum(), x, create_graph=True)
    norm = g.reshape(n, -1).norm(2, dim=1)
    if kind in ("r1", "r2"):
        return (norm**2).mean()
    return ((norm - center) if kind != "wgan-lp" else (norm - center).clamp(min=0)).pow(2).mean()


def parameter_gradients(critic, penalty):
    parameters = [p for p in critic.parameters() if p.requires_grad]
    found = torch.autograd.grad(penalty, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(map(str, range(len(found))), found, strict=True))


def rng_state():
    """Of the default device's own generator."""
    on_cuda = torch.get_default_device().type == "cuda"
    return torch.cuda.get_rng_state() if on_cuda else torch.get_rng_state()


class OnceDifferentiable(torch.autograd.Function):
    """sin, whose second derivative is refused."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Once(nn.Module):
    def forward(self, x):
        return OnceDifferentiable.apply(x)


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = dense(nn.Softplus())

    def forward(self, x):
        return 2 * self.layers(x)
