"""Untrusted archives of tensors, and checks of the structure of states."""

import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from gankernels import _archive as archive
from gankernels.metrics import _cache as cache


def test_what_was_saved_is_read(tmp_path):
    content = {"a": torch.arange(3.0), "b": OrderedDict(c=(1, None, "x", 0.5, True))}
    torch.save(content, tmp_path / "a.pt")
    read = archive.load(tmp_path / "a.pt")
    assert torch.equal(read["a"], content["a"])
    assert read["b"] == content["b"]


def test_archives_that_claim_more_than_they_hold(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    assert os.path.getsize(tmp_path / "b.pt") < 10**5
    with pytest.raises(zipfile.BadZipFile, match="claim to be larger than the file"):
        archive.load(tmp_path / "b.pt")


@pytest.mark.parametrize(
    "value",
    [
        bytearray(9),
        {1},
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.float16,
    ],
)
def test_only_plain_values_and_dense_tensors_are_read(tmp_path, value):
    torch.save({"a": value}, tmp_path / "a.pt")
    with pytest.raises(zipfile.BadZipFile, match="it wants "):
        archive.load(tmp_path / "a.pt")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(OSError, match="Not a regular file"):
        archive.load(tmp_path / "a.pt")


X = torch.zeros(2, 3)
NONE = torch.zeros(0)


@pytest.mark.parametrize(
    ("value", "like", "message"),
    [
        ([], {}, r"a must be a mapping, got list \[\]"),
        ({"x": 1}, {"x": 1, "y": 2}, "a lacks 'y'"),
        ({"x": 1, 2: 2}, {"x": 1}, "a has 2, which does not belong there"),
        ({"x": {"y": "1"}}, {"x": {"y": 1}}, "a.x.y must be a number, got str '1'"),
        ([1], (1, 2), "a must be a sequence of 2"),
        (10**30, 1, "a must be a finite number of 64 bits"),
        (True, 1, "a must be a number, got bool True"),
        (float("nan"), 0.5, "a must be a finite number"),
        (0.5, 1, "a must be a number, got float 0.5"),
        (None, "x", "a must be str 'x', got NoneType None"),
        (None, X, r"a must be a tensor of float32 \(2, 3\), got NoneType None"),
        (X.T, X, r"got a tensor of float32 \(3, 2\)"),
        (X.half(), X, r"got a tensor of float16 \(2, 3\)"),
        (X.to_sparse(), X, r"got a tensor of float32 \(2, 3\) \(torch.sparse_coo\)"),
        (X[0, 0].expand(2, 3), X, "a must have memory of its own for every element"),
        (torch.zeros(2, 6)[:, ::2], X, "a must have memory of its own for every element"),
    ],
)
def test_conform(value, like, message):
    archive.conform(like, like, "a")
    with pytest.raises(ValueError, match=message):
        archive.conform(value, like, "a")


def test_mappings_that_were_tampered_with_are_refused():
    tampered = OrderedDict(x=1)
    tampered.keys = "x"
    assert archive.conform(tampered, {"x": 2}, "a") is None
    with pytest.raises(ValueError, match="a must be a mapping"):
        archive.conform(type("Mine", (dict,), {})(x=1), {"x": 2}, "a")


@pytest.fixture(params=["Adam", "RMSprop", "SGD"])
def stepped(request):
    kind = getattr(torch.optim, request.param)
    parameters = [torch.ones(2, requires_grad=True) for _ in range(2)]
    optimizer = kind(parameters, lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    return optimizer.state_dict()


def test_states_of_optimizers_conform(stepped):
    copy = pickle.loads(pickle.dumps(stepped))
    archive.conform_optimizer(copy, stepped, "a", True)
    for flag in [key for key, value in copy["param_groups"][0].items() if value is None]:
        del copy["param_groups"][0][flag]  # of a PyTorch that did not know it
    del copy["state"][1]  # of a parameter without a gradient
    copy["param_groups"][0]["initial_lr"] = 1  # of a scheduler
    archive.conform_optimizer(copy, stepped, "a", True)
    copy["state"] = {}
    archive.conform_optimizer(copy, stepped, "a", False)
    with pytest.raises(ValueError, match=r"a.state lacks every parameter"):
        archive.conform_optimizer(copy, stepped, "a", True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("state"), "a lacks 'state'"),
        (lambda s: s["param_groups"].pop(), r"a.param_groups must be a sequence of 1"),
        (lambda s: s["param_groups"][0].pop("lr"), r"a.param_groups\[0\] lacks 'lr'"),
        (lambda s: s["param_groups"][0].update(lr=1e400), r"lr must be a finite number"),
        (lambda s: s["param_groups"][0].update(foreach=1), r"foreach must be NoneType None"),
        (lambda s: s["param_groups"][0].update(params=[1, 0]), r"params must be \[0, 1\]"),
        (lambda s: s["state"].update({2: {}}), "a.state must be a mapping of parameters' numbers"),
        (lambda s: s["state"].update({0: {}}), r"a.state\[0\] lacks "),
        (lambda s: s["state"][0].update(dict.fromkeys(s["state"][0], X)), r"a.state\[0\]"),
        (lambda s: s["state"][0].update(dict.fromkeys(s["state"][0], NONE)), r"a.state\[0\]"),
    ],
)
def test_states_of_optimizers_that_do_not(stepped, change, message):
    copy = pickle.loads(pickle.dumps(stepped))
    change(copy)
    with pytest.raises(ValueError, match=message):
        archive.conform_optimizer(copy, stepped, "a", True)


def test_a_kept_classifier_is_read_without_trust(tmp_path):
    from gankernels.data import ImageData

    images = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    data = ImageData(images, torch.tensor([0, 1, 0, 1]), ("a", "b"), "four")
    state = cache.Classifier(1, 4, 2).state_dict()
    torch.save(state, tmp_path / "good.pt")
    cache._load(tmp_path / "good.pt", data)
    torch.save({**state, "head.bias": torch.zeros(1).expand(2)}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"state.head.bias must have memory of its own"):
        cache._load(tmp_path / "bad.pt", data)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(OSError, match="Not a regular file"):
        cache._load(tmp_path / "pipe.pt", data)
