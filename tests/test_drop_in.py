"""Code that works with a network of PyTorch's layers also works after gankernels.fuse.

Every use below is tried on a network and on its fused twin, and has to give the same.
"""

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import gankernels as gk

pytestmark = pytest.mark.filterwarnings("ignore:.*is two layers again", "ignore:.*deprecated")


def network():
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2),
        nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    for norm in (layers[1], layers[5]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return layers


X = torch.linspace(-2, 2, 5 * 3 * 9 * 9).sin().view(5, 3, 9, 9)
USES = {}


def use(function):
    USES[function.__name__] = function
    return function


def norms(net):
    return [m for m in net.modules() if isinstance(m, _BatchNorm)]


def evaluated(net):
    return net.eval()(X)


def from_three_on(net, x):
    """After the first convolution and norm have been computed in another way."""
    return net[2:](x)


# ---- what looks for norms ------------------------------------------------------------------------


@use
def calls_by_keyword(net):
    x = X
    for layer in net:
        x = layer(input=x)
    return x


@use
def update_bn(net):
    torch.optim.swa_utils.update_bn([X, 2 * X], net)
    return list(net.buffers())


@use
def freezing(net):
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            m.requires_grad_(False)
    return [net(X), *net.buffers(), [p.requires_grad for p in net.parameters()]]


@use
def standing_statistics(net):
    for m in norms(net):
        m.reset_running_stats()
        m.momentum = None
    net(X), net(2 * X)
    return evaluated(net)


@use
def initialization_by_class_name(net):
    def initialize(m):
        if m.__class__.__name__.find("BatchNorm") != -1:
            m.weight.data.fill_(0.7)
            m.bias.data.fill_(0.1)

    return evaluated(net.apply(initialize))


@use
def replace_all_batch_norm_modules(net):
    torch.func.replace_all_batch_norm_modules_(net)
    return [net(X), evaluated(net)]


@use
def attributes(net):
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats", "training")
    values = [getattr(m, name) for m in norms(net) for name in names]
    return [values, json.dumps(values), f"{norms(net)[0].eps:g}", isinstance(values[1], float)]


@use
def setting_eps(net):
    for m in norms(net):
        m.eps = 0.5
    return evaluated(net)


@use
def other_settings(net):
    net[1].track_running_stats = False
    net[5].running_mean = net[5].running_var = None
    return [net(X), *net.buffers(), evaluated(net)]


@use
def channels_removed(net):
    """Without a word to num_features, as pruning does it."""
    net[6] = nn.Flatten()
    for layer in (net[3], net[5]):
        for name, p in [*layer.named_parameters()]:
            setattr(layer, name, nn.Parameter(p.data[:3]))
    net[5].running_mean, net[5].running_var = net[5].running_mean[:3], net[5].running_var[:3]
    return evaluated(net)


@use
def check_of_dimensions(net):
    errors = []
    for call in (net[1], net[1]._check_input_dim):
        with pytest.raises(ValueError, match="got 3D input") as caught:
            call(X[0])
        errors.append(str(caught.value))
    return errors


# ---- what makes other layers of norms ------------------------------------------------------------


@use
def convert_sync_batchnorm(net):
    held = list(net)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert held
    return [[type(m) for m in net], evaluated(net)]


@use
def folded_into_a_convolution(net):
    net.eval()
    return from_three_on(net, fuse_conv_bn_eval(net[0], net[1])(X))


@use
def folded_in_place(net):
    net.eval()
    net[0], net[1] = fuse_conv_bn_eval(net[0], net[1]), nn.Identity()
    return net(X)


@use
def folded_behind_the_back_of_the_network(net):
    net.eval()
    net._modules["0"] = fuse_conv_bn_eval(net[0], net[1])
    net._modules["1"] = nn.Identity()
    return net(X)


@use
def folded_by_hand(net):
    conv, norm = copy.deepcopy(net[0]), net[1]
    scale = norm.weight.div(torch.sqrt(norm.eps + norm.running_var))
    conv.weight.data *= scale.detach().view(-1, 1, 1, 1)
    conv.bias.data = ((conv.bias - norm.running_mean) * scale + norm.bias).detach()
    return from_three_on(net, conv(X))


@use
def folded_by_numpy(net):
    norm = net[1]
    scale = norm.weight.detach().numpy() / np.sqrt(norm.running_var.numpy() + norm.eps)
    return from_three_on(net, torch.from_numpy(scale).view(-1, 1, 1) * net[0](X))


@use
def folded_by_fx(net):
    from torch.fx.experimental.optimization import fuse

    return fuse(net.eval())(X)


class Frozen(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).data.clone())

    def forward(self, x):
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


@use
def frozen_copies(net):
    for i in (1, 5):
        net[i] = Frozen(net[i])
    return net(X)


@use
def group_norms(net):
    for i, m in enumerate(net):
        if isinstance(m, _BatchNorm):
            net[i] = nn.GroupNorm(2, m.num_features)
    return net(X)


@use
def group_norms_behind_the_back_of_the_network(net):
    for i in (1, 5):
        net._modules[str(i)] = nn.GroupNorm(2, net[i].num_features)
    return net(X)


@use
def without_norms(net):
    for name, m in list(net.named_modules()):
        if isinstance(m, _BatchNorm):
            setattr(net, name, nn.Identity())
    return net(X)


# ---- what deals with activations -----------------------------------------------------------------


@use
def another_slope(net):
    net[2].negative_slope = 0.7
    return evaluated(net)


@use
def another_slope_in_a_copy(net):
    return another_slope(pickle.loads(pickle.dumps(copy.deepcopy(net))))


@use
def in_place(net):
    for m in net:
        if isinstance(m, (nn.ReLU, nn.LeakyReLU)):
            m.inplace = True
    return evaluated(net)


@use
def other_activations(net):
    held = list(net)
    for i, m in enumerate(net):
        if isinstance(m, (nn.ReLU, nn.LeakyReLU)):
            net[i] = nn.Tanh()
    assert held
    return evaluated(net)


@use
def activation_deleted(net):
    del net[2]
    return evaluated(net)


@use
def activation_popped(net):
    net.pop(4)
    return evaluated(net)


@use
def norm_deleted(net):
    del net[1]
    return evaluated(net)


@use
def hooks(net):
    seen = []
    for i in (1, 2, 4, 5):
        net[i].register_forward_hook(lambda m, args, out: seen.extend([args[0].clone(), out]))
    return [evaluated(net), *seen]


@use
def gradient_hooks(net):
    seen = []
    for i in (1, 4):
        net[i].register_full_backward_hook(lambda m, into, out: seen.extend([into[0], out[0]]))
    evaluated(net).sum().backward()
    return seen


# ---- copies, traces ------------------------------------------------------------------------------


@use
def layers_copied_one_by_one(net):
    return evaluated(nn.Sequential(*map(copy.deepcopy, net)))


@use
def shallow_copies_leave_the_pair_alone(net):
    for m in net:
        copy.copy(m)._replicate_for_data_parallel()
    for m in (net[1], net[2]):
        assert "Fused" in type(m).__name__ or type(m).__module__ != "gankernels.nn.pairs"
    return evaluated(net)


@use
def symbolic_trace(net):
    traced = torch.fx.symbolic_trace(net)
    del net
    return [evaluated(traced), [(n.op, str(n.target)) for n in traced.graph.nodes]]


@use
def parametrized_norm(net):
    nn.utils.parametrize.register_parametrization(net[1], "weight", nn.Tanh())
    return evaluated(net)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", USES)
def test_same_as_before(name):
    results = []
    for change in (lambda net: net, gk.fuse):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(USES[name](change(network())))
    assert same(*results)


def test_a_pair_that_comes_apart_says_so():
    net = gk.fuse(network())
    with pytest.warns(UserWarning, match="is two layers again.*since one of them is replaced"):
        net[2] = nn.Tanh()
    assert type(net[1]) is nn.BatchNorm2d
    with pytest.warns(UserWarning, match="since one of them gets a hook"):
        net[4].register_forward_hook(print)
    assert [type(net[4]), type(net[5])] == [nn.ReLU, nn.BatchNorm2d]
    assert str(net[5]) == str(network()[5])


def test_nothing_comes_apart_by_itself():
    net = gk.fuse(network(), lone=True)
    described = str(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(pickle.loads(pickle.dumps(copy.deepcopy(net)))) == described
        net[1] = net[1]
        assert net[1].eps == 1e-5
        assert str(copy.deepcopy(net[1]).eps) == "1e-05"
        nn.Sequential(*net)
        net.half().float().train().zero_grad()
    assert str(net) == described


def test_slopes_set_on_the_fused_layer_outlive_it():
    net = gk.fuse(network())
    net[1].negative_slope, net[5].negative_slope = 0.4, 0.3
    expected = evaluated(net)
    gk.unfuse(net)
    assert (net[2].negative_slope, net[4].negative_slope) == (0.4, 0.3)
    torch.testing.assert_close(evaluated(net), expected)


def test_slopes_of_a_shared_activation():
    shared = nn.ReLU()
    net = nn.Sequential(*(nn.Sequential(nn.BatchNorm1d(3), shared) for _ in range(2)))
    gk.fuse(net)
    net[0][0].negative_slope = 0.5
    with pytest.raises(ValueError, match="share an activation must have one slope"):
        gk.unfuse(net)
    net[1][0].negative_slope = 0.5
    assert repr(gk.unfuse(net)[1][1]) == "LeakyReLU(negative_slope=0.5)"


def test_a_parametrized_half_is_not_taken_apart():
    net = gk.fuse(network())
    nn.utils.parametrize.register_parametrization(net[1], "weight", nn.Tanh())
    with pytest.raises(TypeError, match="remove its parametrizations first"):
        gk.unfuse(net)
    nn.utils.parametrize.remove_parametrizations(net[1], "weight")
    assert type(gk.unfuse(net)[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    "take",
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(m)),
        lambda m: fuse_conv_bn_eval(nn.Conv2d(3, 4, 1).eval(), m.eval()),
        lambda m: fuse_linear_bn_eval(nn.Linear(3, 4).eval(), m.eval()),
        lambda m: nn.BatchNorm2d(m.num_features, m.eps),
        lambda m: m.running_var.numpy() + m.eps,
        lambda m: float(m.eps),
        Frozen,
    ],
)
def test_a_layer_of_its_own_is_not_taken_for_a_norm(take):
    """There is no activation beside it that could take over."""
    for layer in (gk.nn.BatchNormLeakyReLU2d(4), gk.nn.LeakyReLUBatchNorm2d(4)):
        with pytest.raises(TypeError, match="cannot be copied or folded as a BatchNorm"):
            take(layer)
    take(gk.nn.BatchNormLeakyReLU2d(4, negative_slope=1.0))  # which is one


def test_layers_of_ours_in_a_trace():
    layers = [nn.Linear(4, 6), gk.nn.MinibatchStddev(), gk.nn.MinibatchDiscrimination(7, 3, 2),
              gk.nn.BatchNormLeakyReLU1d(10)]  # fmt: skip
    net, x = nn.Sequential(*layers), torch.randn(8, 4)
    traced = torch.fx.symbolic_trace(net)
    assert [n.op for n in traced.graph.nodes] == ["placeholder", *["call_module"] * 4, "output"]
    torch.testing.assert_close(traced.eval()(x), net.eval()(x))
    h = x
    for layer in layers:
        h = layer(input=h)
    torch.testing.assert_close(h, net(x))
