"""interpolate."""

import pytest
import torch
from ops.oracle import HALVES, LAYOUTS, seeded

from gankernels.functional import interpolate

from .critics import (
    draw,
)

pytestmark = pytest.mark.every_device

DTYPES = [torch.float32, torch.float64, *HALVES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "sliced"])
def test_interpolate(layout, dtype):
    real, fake = (
        LAYOUTS[layout](draw(5, 3, 4, 2, dtype=dtype)),
        draw(5, 3, 4, 2, dtype=dtype, seed=1),
    )
    alpha = torch.rand(5, generator=seeded(0)).to(dtype)
    found = interpolate(real, fake, alpha)
    assert found.dtype == dtype
    a = alpha.double().reshape(5, 1, 1, 1)
    expected = a * real.double() + (1 - a) * fake.double()
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 1, 2, 2, 3)], ids=str)
def test_interpolate_derivatives_and_rank(shape):
    inputs = [draw(*shape), draw(*shape, seed=1), torch.rand(4, dtype=torch.float64)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(interpolate, inputs)
    assert torch.autograd.gradgradcheck(interpolate, inputs)


def test_interpolate_ends():
    real, fake = draw(2, 3), draw(2, 3, seed=1)
    found = interpolate(real, fake, torch.tensor([1.0, 0.0]))
    assert torch.equal(found, torch.stack((real[0], fake[1])))
    assert interpolate(real[:0], fake[:0], torch.zeros(0)).shape == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.ones(1), torch.ones(1)), TypeError, "real must be a Tensor, got list"),
        ((torch.ones(1), torch.ones(1).int(), torch.ones(1)), TypeError, "fake must have one of"),
        ((torch.ones(1), torch.ones(1), 0.5), TypeError, "alpha must .*float"),
        ((torch.ones(2, 3), torch.ones(2, 4), torch.ones(2)), ValueError, r"fake .*, got \(2, 4\)"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 1)), ValueError, r"alpha .* \(2, 1\)"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)), ValueError, r"alpha .*, got \(3,\)"),
        ((torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0)), ValueError, "alpha must"),
    ],
)  # fmt: skip
def test_interpolate_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        interpolate(*arguments)
