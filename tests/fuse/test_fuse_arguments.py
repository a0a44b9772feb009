"""Arguments of fuse, and its log."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import gankernels as gk


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None,), {}, "module must be a torch.nn.Module, got NoneType"),
        ((torch.zeros(1),), {}, "must be a torch.nn.Module, got Tensor"),
        (({"a": 1},), {}, "must be a torch.nn.Module, got dict"),
        ((nn.ReLU,), {}, "must be a torch.nn.Module, got type"),
        ((nn.ReLU(),), {"lone": 1}, "lone must be a bool, got int"),
        ((nn.ReLU(),), {"cpu": None}, "cpu must be a bool, got NoneType"),
        ((nn.ReLU(),), {"log": True}, "log must be callable, got bool"),
        ((nn.ReLU(), True), {}, "positional"),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(TypeError, match=message):
        gk.fuse(*arguments, **options)
    if arguments[0].__class__ is not nn.ReLU:
        with pytest.raises(TypeError, match=message):
            gk.unfuse(*arguments)


def test_script_modules():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    for change in (gk.fuse, gk.unfuse):
        with pytest.raises(TypeError, match="module must not be compiled by TorchScript"):
            change(scripted)


def test_log_is_printed_as_it_is(capsys):
    gk.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Tanh()), log=print)
    assert capsys.readouterr().out.splitlines() == [
        "fused 0 with 1: BatchNormLeakyReLU2d(3, negative_slope=0.0, eps=1e-05, momentum=0.1, "
        "affine=True, track_running_stats=True)",
        "left 2: followed by Tanh",
    ]
