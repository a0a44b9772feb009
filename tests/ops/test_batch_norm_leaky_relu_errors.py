"""Bad input: the errors, which have the same types as PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

import gankernels as gk
from gankernels import functional

pytestmark = pytest.mark.every_device


def call(function, x=(4, 3, 5), **changes):
    if isinstance(x, tuple):
        x = torch.randn(x)
    # Those of the table below were made before there was a default device.
    x, *values = (
        v.to(torch.get_default_device()) if isinstance(v, torch.Tensor) and not v.is_meta else v
        for v in (x, *changes.values())
    )
    changes = dict(zip(changes, values, strict=True))
    arguments = {
        "running_mean": torch.zeros(3), "running_var": torch.ones(3), "weight": torch.ones(3),
        "bias": torch.zeros(3), "training": True, **changes,
    }  # fmt: skip
    return function(x, **arguments)


f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16

# name: (changed arguments, exception, message, whether PyTorch raises the same type)
ERRORS = {
    "one value per channel": (
        {"x": (1, 3)}, ValueError, r"more than 1 value per channel.*got input size \(1, 3\)", True,
    ),
    "one value per channel, 4-D": (
        {"x": (1, 3, 1, 1)}, ValueError, r"more than 1 value per channel.*\(1, 3, 1, 1\)", True,
    ),
    "eps 0 in training": ({"eps": 0.0}, ValueError, "eps must be positive.*got 0.0", True),
    "eps below 0": ({"eps": -1.0}, ValueError, "eps must be positive.*got -1.0", True),
    "eps below 0 in evaluation": (
        {"eps": -1.0, "training": False}, ValueError, "eps must be non-negative.*got -1.0", True,
    ),
    "no running statistics in evaluation": (
        {"running_mean": None, "running_var": None, "training": False}, RuntimeError,
        "running_mean and running_var must be defined in evaluation", True,
    ),
    "running_mean without running_var": (
        {"running_var": None}, ValueError,
        "running_mean and running_var must either both be None or neither", False,
    ),
    "running_var without running_mean": (
        {"running_mean": None}, ValueError,
        "running_mean and running_var must either both be None or neither", False,
    ),
    "size of weight": (
        {"weight": torch.ones(4)}, RuntimeError,
        r"weight must have shape \(3,\), .*got \(4,\)", True,
    ),
    "size of bias": (
        {"bias": torch.ones(2)}, RuntimeError,
        r"bias must have shape \(3,\), .*got \(2,\)", True,
    ),
    "size of running_mean": (
        {"running_mean": torch.ones(2)}, RuntimeError,
        r"running_mean must have shape \(3,\), .*got \(2,\)", True,
    ),
    "size of running_var": (
        {"running_var": torch.ones(5)}, RuntimeError,
        r"running_var must have shape \(3,\), .*got \(5,\)", True,
    ),
    "dimensions of weight": (
        {"weight": torch.ones(3, 1)}, RuntimeError,
        r"weight must have shape \(3,\), .*got \(3, 1\)", False,
    ),
    "dtype of weight": (
        {"weight": torch.ones(3, dtype=f64)}, RuntimeError,
        "weight must have dtype torch.float32 for an x of torch.float32, got torch.float64", True,
    ),
    "dtype of bias": (
        {"bias": torch.ones(3, dtype=f64)}, RuntimeError, "bias must .*got torch.float64", True,
    ),
    "half parameters of float32": (
        {"weight": torch.ones(3, dtype=bf16)}, RuntimeError,
        "weight must have dtype .*got torch.bfloat16", True,
    ),
    "float64 parameters of half": (
        {"x": torch.randn(4, 3, 5, dtype=bf16), "weight": torch.ones(3, dtype=f64)}, RuntimeError,
        "weight must have dtype torch.bfloat16 or torch.float32 for an x of torch.bfloat16, got "
        "torch.float64",
        True,
    ),
    "parameters of two dtypes": (
        {"x": torch.randn(4, 3, 5, dtype=bf16), "weight": torch.ones(3, dtype=bf16)}, RuntimeError,
        "weight must have the dtype of running_mean, torch.float32, got torch.bfloat16",
        True,
    ),
    "weight on another device": (
        {"weight": torch.ones(3, device="meta")}, RuntimeError,
        "weight must be on (cpu|cuda:0) like x, got meta", False,
    ),
    "x of integers": (
        {"x": torch.ones(4, 3, 5, dtype=torch.int64)}, TypeError,
        "x must have one of the dtypes torch.float32, .*got torch.int64", False,
    ),
    "x complex": (
        {"x": torch.ones(4, 3, 5, dtype=torch.complex64)}, TypeError, "x must .*torch.complex64",
        False,
    ),
    "x a list": ({"x": [1.0, 2.0]}, TypeError, "x must be a Tensor, got list", False),
    "x None": ({"x": None}, TypeError, "x must be a Tensor, got NoneType", False),
    "x of six dimensions": (
        {"x": (2, 3, 1, 1, 1, 2)}, ValueError, "x must have 2 to 5 dimensions, got shape", False,
    ),
    "momentum None": ({"momentum": None}, TypeError, "momentum must be a float, got None", True),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message", "as_pytorch"), ERRORS.values(), ids=ERRORS)
def test_errors(changes, error, message, as_pytorch, device):
    for function in (functional.batch_norm_leaky_relu, functional.leaky_relu_batch_norm):
        with pytest.raises(error, match=message):
            call(function, **changes)
    # The reference backend's checks are the same.
    with gk.use_backend("reference"), pytest.raises(error, match=message):
        call(functional.batch_norm_leaky_relu, **changes)
    if as_pytorch and device == "cpu":  # some of its checks are missing on CUDA
        with pytest.raises(error):
            call(F.batch_norm, **changes)


@pytest.mark.parametrize("shape", [(), (3,), (1,), (0,)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_fewer_than_two_dimensions_are_pytorchs_business(shape, training):
    def outcome(function):
        try:
            x = torch.randn(shape)
            return function(x, torch.zeros(0), torch.ones(0), training=training).shape
        except Exception as error:
            return type(error)

    assert outcome(functional.batch_norm_leaky_relu) == outcome(F.batch_norm)


@pytest.mark.parametrize("shape", [(4, 0), (4, 0, 3), (1, 0)], ids=str)
def test_no_channels(shape):
    def outcome(function):
        try:
            return function(torch.randn(shape), None, None, training=True).shape
        except Exception as error:
            return type(error)

    assert outcome(functional.batch_norm_leaky_relu) == outcome(F.batch_norm)


def test_failed_calls_leave_running_statistics_alone():
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="more than 1 value"):
        functional.batch_norm_leaky_relu(torch.randn(1, 3), mean, var, training=True)
    assert not mean.any()
    assert (var == 1).all()


def test_one_value_per_channel_is_fine_in_evaluation():
    x = torch.randn(1, 3)
    y = functional.batch_norm_leaky_relu(x, torch.zeros(3), torch.ones(3), eps=0.0)
    torch.testing.assert_close(y, F.leaky_relu(x, 0.2))


def test_half_statistics_beside_float32_parameters_are_refused():
    """Casting statistics to the half type would lose what float32 kept."""
    x = torch.randn(4, 3, 5, dtype=bf16)
    mean, var = torch.zeros(3, dtype=bf16), torch.ones(3, dtype=bf16)
    with pytest.raises(RuntimeError, match="weight must have the dtype of running_mean"):
        functional.batch_norm_leaky_relu(x, mean, var, torch.ones(3), training=True)
