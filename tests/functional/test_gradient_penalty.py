"""gradient_penalty: the points where it takes gradients, its value and its gradients."""

import math

import pytest
import torch
from ops.oracle import HALVES, assert_close, seeded
from torch import nn

import gankernels as gk
from gankernels import functional
from gankernels.functional import gradient_penalty
from gankernels.ops.gradient_norm_penalty import KINDS

from .critics import (
    CRITICS,
    IMAGE,
    dense,
    draw,
    eager,
    parameter_gradients,
    problem,
    rng_state,
)

pytestmark = pytest.mark.every_device


@pytest.mark.parametrize("center", [1.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CRITICS)
def test_penalty_against_eager(name, kind, center):
    critic, real, fake, arguments = problem(name)
    expected = eager(critic, real, fake, kind, center, arguments, seeded())
    found = gradient_penalty(
        critic, real, fake, kind=kind, center=center, critic_args=arguments, generator=seeded()
    )
    assert found.shape == ()
    torch.testing.assert_close(found, expected)
    ours, theirs = (parameter_gradients(critic, p) for p in (found, expected))
    assert any(g.any() for g in theirs.values()) or (kind, center) == ("wgan-lp", 1.0)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["dragan", "r1"])
def test_fakes_are_not_needed(kind):
    critic, real, fake, _ = problem("(N, 1)")
    without = gradient_penalty(critic, real, kind=kind, generator=seeded())
    assert without == gradient_penalty(critic, real, fake, kind=kind, generator=seeded())


def test_wgan_gp_is_the_default():
    critic, real, fake, _ = problem("(N, 1)")
    chosen = gradient_penalty(critic, real, fake, kind="wgan-gp", center=1.0, generator=seeded())
    assert gradient_penalty(critic, real, fake, generator=seeded()) == chosen
    assert gk.functional.gradient_penalty is gradient_penalty


class Probe:
    """A critic that keeps what it is shown."""

    def __call__(self, x):
        self.x = x.detach().clone()
        self.seen = x
        return x.flatten(1).square().sum(1)


def test_alpha_is_uniform_and_one_per_sample():
    real, fake = draw(4000, 3, 2), draw(4000, 3, 2, seed=1)
    for kind in ("wgan-gp", "wgan-lp"):
        probe = Probe()
        gradient_penalty(probe, real, fake, kind=kind, generator=seeded())
        alpha = ((probe.x - fake) / (real - fake)).flatten(1)
        torch.testing.assert_close(alpha, alpha[:, :1].expand_as(alpha), rtol=1e-6, atol=1e-6)
        assert_uniform(alpha[:, 0])


def test_dragan_looks_around_the_data():
    real = 3 * draw(4000, 3, 2) + 1
    probe = Probe()
    gradient_penalty(probe, real, draw(4000, 3, 2, seed=1), kind="dragan", generator=seeded())
    noise = (probe.x - real) / (0.5 * real.std())
    assert_uniform(noise.flatten())
    assert noise.std(1).min() > 0  # not one number per sample


@pytest.mark.parametrize("kind", ["r1", "r2"])
def test_zero_centered_kinds_look_at_the_samples(kind):
    real, fake = draw(6, 3), draw(6, 3, seed=1)
    probe = Probe()
    penalty = gradient_penalty(probe, real, fake, kind=kind)
    assert torch.equal(probe.x, real if kind == "r1" else fake)
    torch.testing.assert_close(penalty, (2 * probe.x).square().sum(1).mean())


def assert_uniform(values):
    """Kolmogorov-Smirnov at the 1 % level; samples are all different."""
    n = len(values)
    steps = torch.arange(1, n + 1) / n
    assert (values.sort().values - steps).abs().max() < 1.63 / math.sqrt(n) + 1 / n
    assert len(values.unique()) > 0.99 * n


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_not_differentiated_through(kind, method):
    critic, real, fake, _ = problem("(N, 1)")
    generator_weight = torch.ones((), dtype=fake.dtype, requires_grad=True)
    real.requires_grad_()
    penalty = gradient_penalty(critic, real, fake * generator_weight, kind=kind, method=method)
    penalty.backward()
    assert generator_weight.grad is None
    assert real.grad is None
    assert all(p.grad is not None for p in critic.parameters() if p.dim() == 2)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_per_sample_and_a_zero_batch_is_harmless(kind):
    critic = dense().double()
    with torch.no_grad():
        critic[-1].weight.zero_()
    real, fake = draw(4, *IMAGE), draw(4, *IMAGE, seed=1)
    for method in ("exact", "finite-difference"):
        critic.zero_grad()
        penalty = gradient_penalty(critic, real, fake, kind=kind, method=method)
        assert penalty.item() == (1.0 if kind in ("wgan-gp", "dragan") else 0.0)
        penalty.backward()
        assert all(not p.grad.any() for p in critic.parameters() if p.grad is not None)


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize("frozen", [("1.weight", "1.bias"), ("5.weight",)])
def test_frozen_parameters(frozen, method):
    critic, real, fake, _ = problem("(N, 1)")
    critic = dense(nn.Tanh()).double()
    gradient_penalty(critic, real, fake, method=method, generator=seeded()).backward()
    expected = {name: p.grad for name, p in critic.named_parameters()}
    critic.zero_grad()
    for name in frozen:
        critic.get_parameter(name).requires_grad_(False)
    gradient_penalty(critic, real, fake, method=method, generator=seeded()).backward()
    for name, parameter in critic.named_parameters():
        assert parameter.requires_grad == (name not in frozen)
        if name in frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
def test_all_parameters_frozen(method):
    critic, real, fake, _ = problem("(N, 1)")
    expected = gradient_penalty(critic, real, fake, generator=seeded())
    critic.requires_grad_(False)
    found = gradient_penalty(critic, real, fake, method=method, generator=seeded())
    assert found == expected


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, method, device):
    critic, real, fake, _ = problem("(N, 1)", torch.float32, n=32)
    critic = dense(nn.Softplus())
    expected = gradient_penalty(critic, real, fake, kind=kind, center=0.1, generator=seeded())
    dtypes = []
    critic[1].register_forward_hook(lambda m, i, o: dtypes.append(o.dtype))
    with torch.autocast(device, torch.bfloat16):
        found = gradient_penalty(
            critic, real, fake.bfloat16(),  # a generator's output is of half precision here
            kind=kind, center=0.1, method=method, generator=seeded(),
        )  # fmt: skip
    assert dtypes[0] is torch.bfloat16
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=1e-5)
    ours, theirs = (parameter_gradients(critic, p) for p in (found, expected))
    assert {g.dtype for g in ours.values()} == {torch.float32}
    assert_close(ours, theirs, 0.1, floor=1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_critics(dtype):
    critic, real, fake, _ = problem("(N, 1)", dtype)
    found = gradient_penalty(critic, real, fake, generator=seeded())
    assert found.dtype is torch.float32
    found.backward()
    assert {p.grad.dtype for p in critic.parameters() if p.grad is not None} == {dtype}


def test_generator_makes_it_repeatable_and_leaves_the_default_alone():
    critic, real, fake, _ = problem("(N, 1)")
    for kind in ("wgan-gp", "wgan-lp", "dragan"):
        before = rng_state()
        options = {"kind": kind, "center": 0.1}
        first = gradient_penalty(critic, real, fake, generator=seeded(3), **options)
        assert first == gradient_penalty(critic, real, fake, generator=seeded(3), **options)
        assert first != gradient_penalty(critic, real, fake, generator=seeded(4), **options)
        assert torch.equal(rng_state(), before)
        gradient_penalty(critic, real, fake, **options)
        assert not torch.equal(rng_state(), before)


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_without_gradients(kind, method):
    critic, real, fake, _ = problem("(N, 1)")
    expected = gradient_penalty(critic, real, fake, kind=kind, generator=seeded())
    calls = []
    critic.register_forward_hook(lambda m, i, o: calls.append(m))
    with torch.no_grad():
        found = gradient_penalty(critic, real, fake, kind=kind, method=method, generator=seeded())
    assert found == expected
    assert not found.requires_grad
    assert len(calls) == 1


def test_channels_last_gradients_are_taken_as_they_lie():
    critic, real, fake, _ = problem("(N, 1, h, w)", torch.float32)
    expected = gradient_penalty(critic, real, fake, generator=seeded())
    critic = critic.to(memory_format=torch.channels_last)
    real = real.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradient_penalty(critic, real, fake, generator=seeded()), expected)


def test_one_critic_forward_after_the_first():
    critic, real, fake, _ = problem("(N, 1)")
    calls = []
    critic.register_forward_hook(lambda m, i, o: calls.append(m))
    for count in (1, 2):
        gradient_penalty(critic, real, fake)
        assert len(calls) == count


def test_a_step_of_an_optimizer_lowers_the_penalty():
    critic, real, fake, _ = problem("(N, 1)")
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    penalties = []
    for _ in range(60):
        penalty = gradient_penalty(critic, real, fake, generator=seeded())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        penalties.append(penalty.item())
    assert penalties[-1] < 0.05 * penalties[0]


def test_public_names():
    assert {"gradient_norm_penalty", "gradient_penalty", "interpolate"} <= set(functional.__all__)
