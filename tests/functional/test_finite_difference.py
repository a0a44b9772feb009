"""gradient_penalty by finite differences."""

import copy

import pytest
import torch
from ops.oracle import assert_close, seeded
from torch import nn

from gankernels.functional import gradient_penalty
from gankernels.ops.gradient_norm_penalty import KINDS

from .critics import (
    Doubled,
    Once,
    Sine,
    dense,
    draw,
    parameter_gradients,
    problem,
    rng_state,
)

pytestmark = pytest.mark.every_device


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-3), (torch.float64, 1e-8)])
@pytest.mark.parametrize("activation", [nn.Softplus, nn.Tanh, nn.SiLU])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_difference_of_smooth_critics(kind, activation, dtype, error):
    _, real, fake, _ = problem("(N, 1)", dtype, n=16)
    critic = dense(activation()).to(dtype)
    with torch.no_grad():
        critic[-1].weight *= 5  # norms that the one-sided kind objects to
    penalties = [
        gradient_penalty(
            critic, real, fake, kind=kind, center=0.1, method=method, generator=seeded()
        )
        for method in ("exact", "finite-difference")
    ]
    torch.testing.assert_close(*penalties)
    exact, difference = (
        torch.cat([g.flatten() for g in parameter_gradients(critic, p).values()]) for p in penalties
    )
    assert exact.norm() > 0
    assert (difference - exact).norm() < error * exact.norm()


@pytest.mark.parametrize("name", ["(N,)", "(N, 1, h, w)", "labels", "rank 1", "rank 3"])
def test_finite_difference_of_any_critic(name):
    critic, real, fake, arguments = problem(name)  # LeakyReLU's kinks are far apart in float64
    found = [
        parameter_gradients(
            critic,
            gradient_penalty(
                critic, real, fake, method=method, critic_args=arguments, generator=seeded()
            ),
        )
        for method in ("exact", "finite-difference")
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("p", [0.3, 0.6])
def test_finite_difference_sees_one_dropout_mask(p):
    _, real, fake, _ = problem("(N, 1)", n=16)
    critic = dense(nn.Softplus(), nn.Dropout(p)).double()
    results, states = [], []
    for method in ("exact", "finite-difference"):
        torch.manual_seed(11)
        penalty = gradient_penalty(critic, real, fake, method=method, generator=seeded())
        results.append(parameter_gradients(critic, penalty))
        states.append(rng_state())
    assert_close(results[1], results[0], 1e-7, floor=1e-9)
    assert torch.equal(*states)  # what comes after draws the same numbers too
    torch.manual_seed(12)
    other = parameter_gradients(critic, gradient_penalty(critic, real, fake, generator=seeded()))
    assert not torch.allclose(other["0"], results[0]["0"])


@pytest.mark.parametrize("how", ["whole", "in place"])
def test_finite_difference_of_a_compiled_module(how):
    torch._dynamo.reset()
    _, real, fake, _ = problem("(N, 1)")
    critic = Doubled().double()
    expected = parameter_gradients(critic, gradient_penalty(critic, real, fake, generator=seeded()))
    compiled = copy.deepcopy(critic)
    if how == "whole":
        compiled = torch.compile(compiled, backend="aot_eager")
    else:
        compiled.compile(backend="aot_eager")
    penalty = gradient_penalty(compiled, real, fake, method="finite-difference", generator=seeded())
    assert_close(parameter_gradients(compiled, penalty), expected, 1e-8, floor=1e-9)


def test_finite_difference_of_a_layer_without_second_derivative():
    _, real, fake, _ = problem("(N, 1)")
    differentiable = dense(Sine()).double()
    once = dense(Once()).double()
    once.load_state_dict(differentiable.state_dict())
    expected = parameter_gradients(
        differentiable, gradient_penalty(differentiable, real, fake, generator=seeded())
    )
    penalty = gradient_penalty(once, real, fake, method="finite-difference", generator=seeded())
    assert_close(parameter_gradients(once, penalty), expected, 1e-8, floor=1e-9)


@pytest.mark.parametrize(("method", "evaluations"), [("exact", 1), ("finite-difference", 3)])
def test_evaluations_that_buffers_see(method, evaluations):
    critic, real, fake, _ = problem("batch norm")
    norm = critic[2]
    assert norm.num_batches_tracked == 0
    gradient_penalty(critic, real, fake, method=method)
    # The layer stands in the critic twice.
    assert norm.num_batches_tracked == 2 * evaluations


def test_finite_difference_of_samples_of_any_size():
    """The step follows the size of the samples."""
    _, real, fake, _ = problem("(N, 1)")
    critic = dense(nn.Softplus()).double()
    for scale in (1e-2, 1e2):
        with torch.no_grad():
            critic[1].weight.copy_(draw(16, 72, seed=5) / 8 / scale)
        found = [
            parameter_gradients(
                critic,
                gradient_penalty(
                    critic, scale * real, scale * fake, method=method, generator=seeded()
                ),
            )
            for method in ("exact", "finite-difference")
        ]
        assert_close(found[1], found[0], 1e-5, floor=1e-9)
