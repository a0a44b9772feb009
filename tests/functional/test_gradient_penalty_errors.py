"""The errors of gradient_penalty, and how it finds a layer without a second derivative."""

import pytest
import torch
from ops.oracle import seeded
from torch import nn

import gankernels as gk
from gankernels.functional import gradient_penalty

from .critics import (
    Doubled,
    Once,
    OnceDifferentiable,
    dense,
    problem,
)

pytestmark = pytest.mark.every_device


class Distances(nn.Module):
    """PyTorch's own cdist has no second derivative."""

    def forward(self, x):
        return torch.cdist(x, x.flip(0) + 1, p=1.0)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("layer", [Once, Distances])
def test_the_layer_without_second_derivative_is_named(layer, last):
    """The last layer's gradient is a function of x even where that of its output is constant."""
    _, real, fake, _ = problem("(N, 1)", torch.float32)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), layer())
    if not last:
        critic.extend([nn.Tanh(), nn.Linear(5, 1)])
    message = rf"cannot be differentiated twice: layer '2', {layer.__name__}\(\)\. .*finite-differ"
    for _ in range(2):  # a critic that failed once is looked at again
        with pytest.raises(RuntimeError, match=message):
            gradient_penalty(critic, real, fake)
    assert not any(m._forward_hooks for m in critic.modules())


NEIGHBORS = {
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(6, 6)),
    "parametrizations.spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(
        nn.Linear(6, 6)
    ),
    "parametrizations.weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    "in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "fused": lambda: gk.fuse(nn.Sequential(nn.BatchNorm1d(6), nn.ReLU())),
    "dropout": lambda: nn.Dropout(0.5),
    "GRU": lambda: InDict(nn.GRU(6, 6, batch_first=True), None),
    "keywords": lambda: InDict(nn.Bilinear(6, 6, 6), "input1", "input2"),
    "no tensors": lambda: InDict(NoTensors(), None),
}


class InDict(nn.Module):
    """Calls a layer by names, or for results that are no tensor."""

    def __init__(self, layer, *names):
        super().__init__()
        self.layer, self.names = layer, names

    def forward(self, x):
        if self.names == (None,):
            out = self.layer(x if isinstance(self.layer, NoTensors) else x[:, None])
            return out["y"] if isinstance(out, dict) else out[0][:, 0]
        return self.layer(**dict.fromkeys(self.names, x))


class NoTensors(nn.Module):
    def forward(self, x):
        return {"y": x.sin(), "name": "y", "none": None, "more": [x.cos()]}


@pytest.mark.filterwarnings("ignore:.*weight_norm", "error:.*by themselves again")
@pytest.mark.parametrize("kind", NEIGHBORS)
def test_the_search_for_the_layer_to_blame_passes_by_all_others(kind):
    """It neither fails in them nor blames them, and leaves them as they are."""
    critic = nn.Sequential(nn.Linear(4, 6), NEIGHBORS[kind](), Once(), nn.Linear(6, 1))
    x = torch.randn(8, 4)
    critic(x)
    buffers = [(b, b._version) for b in critic[1].buffers()]
    seen = []
    critic[3].register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(RuntimeError, match=r"differentiated twice: layer '2', Once\(\)\. "):
        gradient_penalty(critic, x, x + 1)
    assert all(b is old for b, (old, _) in zip(critic[1].buffers(), buffers, strict=True))
    assert len(seen) == 2  # the penalty and the search, which calls no hook when it tries a layer
    assert sum(len(m._forward_hooks) for m in critic.modules()) == 1
    assert all(p.grad is None for p in critic.parameters())


def test_the_search_for_the_layer_to_blame_never_takes_the_place_of_the_error():
    class Moody(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:
                raise OSError("not today")
            return x * 2

    critic = nn.Sequential(Moody(), nn.Linear(4, 4), Once(), nn.Linear(4, 1))
    x = torch.randn(8, 4)
    with pytest.raises(RuntimeError, match=r"twice: the layer could not .*PyTorch says: trying to"):
        gradient_penalty(critic, x, x + 1)


@pytest.mark.parametrize("memory", [torch.OutOfMemoryError("full"), "can't allocate memory: 8 GB"])
def test_no_layer_is_blamed_for_a_lack_of_memory(memory):
    class Hungry(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x * 1)

        @staticmethod
        def backward(ctx, grad):
            return Greedy.apply(grad)

    class Greedy(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x * 1)

        @staticmethod
        def backward(ctx, grad):
            raise memory if isinstance(memory, Exception) else RuntimeError(memory)

    class Layer(nn.Module):
        def forward(self, x):
            return Hungry.apply(x)

    critic, x = nn.Sequential(nn.Linear(4, 4), Layer(), nn.Linear(4, 1)), torch.randn(8, 4)
    with pytest.raises(RuntimeError, match=r"^(full|can't allocate)"):
        gradient_penalty(critic, x, x + 1)


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize("kind", ["wgan-gp", "wgan-lp", "dragan", "r1", "r2"])
def test_inference_mode(kind, method):
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layers = nn.Embedding(3, 4), dense()

        def forward(self, x, labels):
            return self.layers(x.flatten(1)) * self.embed(labels["of"][0]).sum(1, keepdim=True)

    def penalty(real, fake, labels):
        options = {"kind": kind, "method": method, "critic_args": ({"of": [labels]},)}
        return gradient_penalty(critic, real, fake, generator=seeded(0), **options)

    _, real, fake, _ = problem("(N, 1)", torch.float32)
    critic, labels = Critic(), torch.arange(len(real)) % 3
    expected = penalty(real, fake, labels)
    with torch.inference_mode():
        made = real * 1, fake * 1, labels * 1
        for tensors in ((real, fake, labels), made):
            value = penalty(*tensors)
            torch.testing.assert_close(value, expected)
            assert not value.requires_grad
        assert torch.is_inference_mode_enabled()
    loss = penalty(*made)
    torch.testing.assert_close(loss, expected)
    gradients = [
        torch.autograd.grad(p, critic.layers.parameters(), allow_unused=True)
        for p in (loss, expected)
    ]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        assert not penalty(*made).requires_grad


def test_what_lies_outside_all_layers_is_said_to():
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = dense()

        def forward(self, x):
            return self.layers(OnceDifferentiable.apply(x.square()))

    _, real, fake, _ = problem("(N, 1)", torch.float32)
    with pytest.raises(RuntimeError, match="twice: the cause is outside its layers, in a forward"):
        gradient_penalty(Critic(), real, fake)


@pytest.mark.parametrize("how", ["whole", "part", "in place"])
def test_compiled_critics_are_recognized(how):
    torch._dynamo.reset()
    _, real, fake, _ = problem("(N, 1)", torch.float32)
    critic = dense(nn.Softplus())
    if how == "whole":
        critic = torch.compile(critic, backend="aot_eager")
    elif how == "part":
        critic[1] = torch.compile(nn.Sequential(critic[1], nn.Tanh()), backend="aot_eager")
    else:
        critic = Doubled()
        critic.compile(backend="aot_eager")
    name = "layer '1'" if how == "part" else "it"
    message = rf"twice: {name} is a module compiled by torch\.compile .*finite-difference"
    with pytest.raises(RuntimeError, match=message):
        gradient_penalty(critic, real, fake)


def test_other_errors_of_a_critic_are_its_own():
    def critic(x):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        gradient_penalty(critic, torch.ones(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize(
    "critic",
    [
        lambda x: x.detach().sum(1),
        lambda x: torch.ones(2, requires_grad=True) * 2,
        torch.no_grad()(lambda x: x.sum(1)),
    ],
)
def test_critics_that_do_not_depend_on_their_input(critic, method):
    with pytest.raises(RuntimeError, match="does not depend on its input"):
        gradient_penalty(critic, torch.ones(2, 3), torch.ones(2, 3), method=method)


def test_critics_that_return_no_tensor():
    with pytest.raises(TypeError, match="critic must return a Tensor, got tuple"):
        gradient_penalty(lambda x: (x, x), torch.ones(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 3)), {"kind": "gp"}, ValueError, "kind must .*got 'gp'"),
        ((torch.ones(2, 3), torch.ones(2, 3)), {"method": "fd"}, ValueError, "method must .* 'fd'"),
        ((torch.ones(2, 3), torch.ones(2, 4)), {}, ValueError, r"fake must .*, got \(2, 4\)"),
        ((torch.ones(2, 3), torch.ones(3)), {}, ValueError, r"fake must .*, got \(3,\)"),
        ((torch.ones(2, 3),), {}, ValueError, "fake must .* for kind 'wgan-gp', got None"),
        ((torch.ones(2, 3),), {"kind": "r2"}, ValueError, "fake must .* for kind 'r2', got None"),
        ((torch.tensor(1.0),), {"kind": "r1"}, ValueError, "real must have shape .* scalar"),
        ((torch.ones(2, 3).byte(), torch.ones(2, 3)), {}, TypeError, "real must .*torch.uint8"),
        ((torch.ones(2, 3), torch.ones(2, 3).byte()), {}, TypeError, "fake must .*torch.uint8"),
        (([1.0], torch.ones(2, 3)), {}, TypeError, "real must be a Tensor, got list"),
        ((torch.ones(2, 3), 0.0), {}, TypeError, "fake must be a Tensor, got float"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gradient_penalty(lambda x: x.sum(1), *arguments, **options)
