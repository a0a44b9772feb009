"""The layers look, print, serialize and behave as torch.nn's do."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gankernels as gk

pytestmark = pytest.mark.every_device

LAYERS = {
    "BatchNormLeakyReLU1d": (nn.BatchNorm1d, (6, 3)),
    "BatchNormLeakyReLU2d": (nn.BatchNorm2d, (6, 3, 4, 5)),
    "BatchNormLeakyReLU3d": (nn.BatchNorm3d, (6, 3, 2, 4, 5)),
    "LeakyReLUBatchNorm1d": (nn.BatchNorm1d, (6, 3, 4)),
    "LeakyReLUBatchNorm2d": (nn.BatchNorm2d, (6, 3, 4, 5)),
    "LeakyReLUBatchNorm3d": (nn.BatchNorm3d, (6, 3, 2, 4, 5)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def pair(name, slope=0.2, **options):
    """Our layer and PyTorch's modules, with the same parameters away from their first values."""
    layer = getattr(gk.nn, name)(3, negative_slope=slope, **options)
    norm = LAYERS[name][0](3, **options)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    if norm.track_running_stats:
        nn.init.normal_(norm.running_mean)
    layer.load_state_dict(norm.state_dict(), strict=True)
    activation = nn.LeakyReLU(slope)
    parts = [activation, norm] if name.startswith("Leaky") else [norm, activation]
    return layer, nn.Sequential(*parts), norm


def batch(name):
    return torch.randn(LAYERS[name][1])


def assert_close_in(dtype, actual, expected):
    """PyTorch rounds to half types on the way too."""
    eps = 0 if dtype is torch.float64 else torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=4 * eps + 1e-9, atol=4 * eps + 1e-9)


@every_layer
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track_running_stats", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None, 0.7])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_as_pytorchs_modules(name, affine, track_running_stats, momentum, backend):
    layer, theirs, norm = pair(
        name, affine=affine, track_running_stats=track_running_stats, momentum=momentum
    )
    with gk.use_backend(backend):
        for training in (True, True, True, False, True, False):
            x = batch(name)
            y = layer.train(training)(x)
            torch.testing.assert_close(y, theirs.train(training)(x))
            torch.testing.assert_close(layer.state_dict(), norm.state_dict())


@every_layer
def test_without_bias(name):
    if "bias" not in inspect.signature(nn.BatchNorm2d).parameters:
        pytest.skip("PyTorch's layer has no such option")
    layer, theirs, _ = pair(name, bias=False)
    assert "bias=False" in repr(layer)
    x = batch(name)
    for network in (layer, theirs):
        network(x).square().sum().backward()
    torch.testing.assert_close(layer(x), theirs(x))
    torch.testing.assert_close(*(next(m.parameters()).grad for m in (layer, theirs)))


@every_layer
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_state_dict_goes_both_ways(name, options):
    layer, _, norm = pair(name, **options)
    layer(batch(name))
    assert list(layer.state_dict()) == list(norm.state_dict())
    assert layer.state_dict()._metadata[""]["version"] == norm.state_dict()._metadata[""]["version"]
    norm.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(norm.state_dict(), layer.state_dict(), rtol=0, atol=0)
    fresh = getattr(gk.nn, name)(3, **options)
    fresh.load_state_dict(norm.state_dict(), strict=True)
    torch.testing.assert_close(fresh.state_dict(), layer.state_dict(), rtol=0, atol=0)


@every_layer
def test_version_1_state_dict_without_num_batches_tracked(name):
    layer, _, norm = pair(name)
    old = norm.state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    for module in (layer, norm):
        module.load_state_dict(old, strict=True)
        assert module.num_batches_tracked == 0


@every_layer
def test_state_dict_errors(name):
    layer = getattr(gk.nn, name)(3)
    state = layer.state_dict()
    del state["weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(getattr(gk.nn, name)(4).state_dict())


@every_layer
def test_repr(name):
    layer = getattr(gk.nn, name)(3, negative_slope=0.1, momentum=None, affine=False)
    assert repr(layer) == (
        f"{name}(3, negative_slope=0.1, eps=1e-05, momentum=None, affine=False, "
        "track_running_stats=True)"
    )


@every_layer
def test_name_module_and_documentation(name):
    layer = getattr(gk.nn, name)
    assert (layer.__name__, layer.__qualname__) == (name, name)
    assert "num_features: the number of channels" in layer.__doc__
    order = "LeakyReLU then Batch" if name.startswith("Leaky") else "Batch normalization then Leaky"
    assert layer.__doc__.startswith(order)
    assert f"BatchNorm{name[-2]}d" in layer.__doc__


@every_layer
def test_copies_and_pickles(name):
    layer, _, _ = pair(name, slope=-0.1)
    layer.eval()
    x = batch(name)
    expected = layer(x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stream, weights_only=False),
    ):
        assert type(other) is type(layer)
        assert other.weight is not layer.weight
        assert repr(other) == repr(layer)
        assert torch.equal(other(x), expected)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_conversions(name, dtype):
    layer, theirs, norm = pair(name)
    layer.to(dtype)
    theirs.to(dtype)
    assert layer.weight.dtype is layer.running_var.dtype is dtype
    assert layer.num_batches_tracked.dtype is torch.int64
    x = batch(name).to(dtype)
    for training in (True, False):
        y = layer.train(training)(x)
        assert y.dtype is dtype
        assert_close_in(dtype, y, theirs.train(training)(x))
        assert_close_in(dtype, layer.running_var, norm.running_var)


@every_layer
def test_named_conversions_and_devices(name):
    layer = getattr(gk.nn, name)(3)
    assert layer.half().weight.dtype is torch.float16
    assert layer.double().weight.dtype is torch.float64
    assert layer.float().weight.dtype is torch.float32
    assert getattr(gk.nn, name)(3, dtype=torch.float64).running_mean.dtype is torch.float64
    meta = getattr(gk.nn, name)(3, device="meta")
    assert meta.weight.is_meta
    assert meta.running_var.is_meta
    y = meta(batch(name).to("meta"))
    assert y.is_meta
    assert y.shape == LAYERS[name][1]
    assert meta.to_empty(device="cpu").weight.device.type == "cpu"


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_activations_with_float32_parameters(name, dtype):
    layer, theirs, _ = pair(name)
    x = batch(name).to(dtype)
    for training in (True, False):
        y = layer.train(training)(x)
        assert y.dtype is dtype
        assert_close_in(dtype, y, theirs.train(training)(x))
    assert layer.running_mean.dtype is torch.float32


@every_layer
def test_options_are_by_keyword_only(name):
    """The 0.8 that many a GAN means as momentum would be eps."""
    with pytest.raises(TypeError, match="positional argument"):
        getattr(gk.nn, name)(3, 0.8)


@every_layer
def test_defaults(name):
    layer, norm = getattr(gk.nn, name)(3), LAYERS[name][0](3)
    assert layer.negative_slope == 0.2
    for attribute in ("eps", "momentum", "affine", "track_running_stats", "num_features"):
        assert getattr(layer, attribute) == getattr(norm, attribute)
    torch.testing.assert_close(layer.state_dict(), norm.state_dict())


@every_layer
def test_is_a_batch_norm_to_those_who_look_for_them(name):
    layer = getattr(gk.nn, name)(3)
    assert isinstance(layer, LAYERS[name][0])
    assert "BatchNorm" in type(layer).__name__
    assert set(vars(layer)) == set(vars(LAYERS[name][0](3))) | {
        "negative_slope", "sync", "process_group",
    }  # fmt: skip
    x = batch(name)
    torch.optim.swa_utils.update_bn([x], layer)
    assert layer.num_batches_tracked == 1
    assert layer(input=x).shape == x.shape


@every_layer
@pytest.mark.parametrize("dimensions", range(7))
def test_number_of_dimensions(name, dimensions):
    layer, norm = getattr(gk.nn, name)(3), LAYERS[name][0](3)
    x = torch.randn((2, 3, 2, 2, 2, 2)[:dimensions])
    try:
        norm(x)
    except ValueError:
        with pytest.raises(ValueError, match=rf"expected .*D input \(got {dimensions}D input\)"):
            layer(x)
    else:
        assert layer(x).shape == x.shape


# Ours, PyTorch's, and what synchronized layers say.
WRONG_NUMBER = r"mean must have shape \(2,\)|mean should contain 2 elements|3 channels.*got 2"


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_number_of_features(name, training):
    wrong = batch(name)[:, :2]
    for layer in (getattr(gk.nn, name)(3), LAYERS[name][0](3)):
        with pytest.raises(
            RuntimeError, match=r"mean must have shape|contain 2 elements not 3|3 channels.*got 2"
        ):
            layer.train(training)(wrong)


@every_layer
def test_number_of_features_without_parameters(name):
    """PyTorch lets this pass; nothing else would tell."""
    layer = getattr(gk.nn, name)(3, affine=False, track_running_stats=False)
    with pytest.raises(RuntimeError, match=r"3 channels.*got 2"):
        layer(batch(name)[:, :2])


@every_layer
def test_one_value_per_channel(name):
    x = torch.randn(1, 3, *(1,) * (len(LAYERS[name][1]) - 2))
    for layer in (getattr(gk.nn, name)(3), LAYERS[name][0](3)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(x)
        layer.eval()(x)


@every_layer
def test_other_dtype_of_x(name):
    for layer in (getattr(gk.nn, name)(3), LAYERS[name][0](3)):
        with pytest.raises(RuntimeError):
            layer(batch(name).double())


@every_layer
def test_empty_batch_counts_as_one(name):
    x = batch(name)[:0]
    for layer in (getattr(gk.nn, name)(3), LAYERS[name][0](3)):
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.shape
        assert layer.num_batches_tracked == 1
        assert torch.equal(layer.weight.grad, torch.zeros(3))
        assert torch.equal(layer.running_mean, torch.zeros(3))


@every_layer
def test_cumulative_average(name):
    """momentum=None: the running mean is the mean of the batches' means."""
    layer = getattr(gk.nn, name)(3, momentum=None, negative_slope=1.0)
    batches = [batch(name) for _ in range(5)]
    for x in batches:
        layer(x)
    dims = [d for d in range(batches[0].dim()) if d != 1]
    mean = torch.stack([x.mean(dims) for x in batches]).mean(0)
    var = torch.stack([x.var(dims) for x in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)
    assert layer.num_batches_tracked == 5


@every_layer
def test_reset(name):
    layer, _, _ = pair(name)
    layer(batch(name))
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), getattr(gk.nn, name)(3).state_dict())


@every_layer
def test_learns(name):
    """One step of an optimizer takes both to the same place."""
    layer, theirs, norm = pair(name)
    x, target = batch(name), batch(name)
    for module in (layer, theirs):
        optimizer = torch.optim.Adam(module.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(module(x), target).backward()
            optimizer.step()
    torch.testing.assert_close(layer.state_dict(), norm.state_dict(), rtol=1e-4, atol=1e-5)


def test_eval_layer_is_unchanged_by_forward():
    layer, _, _ = pair("BatchNormLeakyReLU2d")
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    layer(batch("BatchNormLeakyReLU2d"))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_hooks_and_parametrizations_work():
    layer = gk.nn.BatchNormLeakyReLU2d(3)
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    nn.utils.parametrizations.weight_norm(nn.Sequential(nn.Conv2d(3, 3, 1), layer)[0])
    layer(torch.randn(6, 3, 4, 5))
    assert seen == [(6, 3, 4, 5)]


@every_layer
def test_functional_call_and_ema(name):
    layer, _, _ = pair(name)
    layer.eval()
    x = batch(name)
    doubled = {k: 2 * v for k, v in layer.named_parameters()}
    y = torch.func.functional_call(layer, doubled, (x,))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(y, layer(x))
    average = torch.optim.swa_utils.AveragedModel(layer)
    average.update_parameters(layer)
    torch.testing.assert_close(average.eval()(x), layer(x))


def test_a_penalty_alone_gives_the_bias_a_zero_gradient():
    """As PyTorch's ops do: `autograd.grad` without `allow_unused` works on a fused network too."""
    layer = gk.nn.BatchNormLeakyReLU1d(3)
    theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.LeakyReLU(0.2))
    x = torch.randn(8, 3)
    results = []
    for network in (layer, theirs):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(leaf).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), list(network.parameters())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        torch.autograd.grad(
            gk.functional.gradient_penalty(layer, x, kind="r1"), layer.bias, materialize_grads=False
        )[0],
        torch.zeros(3),
    )
