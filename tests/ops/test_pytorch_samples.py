"""PyTorch's own sample inputs for batch norm, given to our ops and layers."""

import copy

import pytest
import torch
import torch.nn.functional as F

import gankernels as gk
from gankernels import functional

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

pytestmark = pytest.mark.every_device

(OP,) = (op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name)
MODULES = {
    torch.nn.BatchNorm1d: gk.nn.BatchNormLeakyReLU1d,
    torch.nn.BatchNorm2d: gk.nn.BatchNormLeakyReLU2d,
    torch.nn.BatchNorm3d: gk.nn.BatchNormLeakyReLU3d,
}
INFOS = [info for info in module_db if info.module_cls in MODULES]


def grads_of(function, sample):
    """The result, two derivatives and running statistics, or the type of the error."""
    sample = copy.deepcopy(sample)
    mean, var, weight, bias = sample.args
    tensors = [t for t in (sample.input, weight, bias) if t is not None]
    try:
        y = function(sample.input, mean, var, weight, bias, **sample.kwargs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return type(error)
    if not y.numel():
        return [y, mean, var]
    grads = torch.autograd.grad(y.pow(3).sum(), tensors, create_graph=True)
    second = torch.autograd.grad(
        sum(g.square().sum() for g in grads), tensors, materialize_grads=True
    )
    return [y, *grads, *second, mean, var]


def leaky_then_norm(slope):
    return lambda x, *args, **kwargs: F.batch_norm(F.leaky_relu(x, slope), *args, **kwargs)


def norm_then_leaky(slope):
    return lambda x, *args, **kwargs: F.leaky_relu(F.batch_norm(x, *args, **kwargs), slope)


@pytest.mark.parametrize("slope", [1.0, 0.2])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (functional.batch_norm_leaky_relu, norm_then_leaky),
        (functional.leaky_relu_batch_norm, leaky_then_norm),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sample_inputs(dtype, ours, theirs, slope, device):
    torch.manual_seed(0)
    samples = list(OP.sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) > 10
    computed = 0
    for sample in samples:
        expected = grads_of(theirs(slope), sample)
        actual = grads_of(lambda *a, **k: ours(*a, negative_slope=slope, **k), sample)
        if isinstance(expected, type):
            assert actual is expected, sample
            continue
        computed += 1
        # Two values in a channel leave rounding errors in gradients that should be zero.
        sizes = (float(t.detach().abs().max()) for t in expected if t is not None and t.numel())
        scale = max(sizes, default=0.0)
        tolerance = (1e-4 if dtype is torch.float32 else 1e-9) * scale
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=tolerance)
    assert computed > 8


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_module_inputs(info, training, device):
    seen = 0
    for sample in info.module_inputs_func(
        info, device=device, dtype=torch.float64, requires_grad=True, training=training
    ):
        arguments = sample.constructor_input
        if "bias" in arguments.kwargs:
            continue  # torch 2.12's new option
        theirs = info.module_cls(*arguments.args, **arguments.kwargs).double().train(training)
        names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
        options = dict(zip(names, arguments.args, strict=False))
        layer = MODULES[info.module_cls](options.pop("num_features"), **options, negative_slope=1.0)
        layer = layer.double().train(training)
        (x,) = sample.forward_input.args
        a, b = layer(x), theirs(x)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(layer.state_dict(), theirs.state_dict())
        inputs = [x, *layer.parameters()], [x, *theirs.parameters()]
        grads = (
            torch.autograd.grad(y.square().sum(), i) for y, i in zip((a, b), inputs, strict=True)
        )
        for first, second in zip(*grads, strict=True):
            torch.testing.assert_close(first, second)
        seen += 1
    assert seen >= 6


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_module_error_inputs(info, device):
    samples = info.module_error_inputs_func(
        info, device=device, dtype=torch.float32, requires_grad=False, training=True
    )
    assert samples
    for sample in samples:
        assert sample.error_on is ModuleErrorEnum.FORWARD_ERROR
        arguments = sample.module_error_input.constructor_input
        layer = MODULES[info.module_cls](*arguments.args, **arguments.kwargs)
        with pytest.raises(sample.error_type, match=sample.error_regex):
            layer(*sample.module_error_input.forward_input.args)
