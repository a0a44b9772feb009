"""Adam in one call: PyTorch's numbers, states and hooks."""

import copy
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gankernels.optim import Adam

SHAPES = [(), (1,), (7,), (16,), (3, 5), (40, 431), (130, 70), (6, 4, 3, 3)]


def parameters(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(0)
    made = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    made[-1] = made[-1].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(p) for p in made]


def gradients(step, ps):
    torch.manual_seed(step + 1)
    return [torch.randn(p.shape) * 10 ** (step % 3) for p in ps]


class KernelCalls(TorchDispatchMode):
    """How often the kernel is called."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.gankernels.adam_.default
        return function(*args, **(kwargs or {}))


def train(optimizer, ps, steps=5, first=0):
    for step in range(first, first + steps):
        for p, g in zip(ps, gradients(step, ps), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return [p.detach().double() for p in ps]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-2},
        {"lr": 2e-4, "betas": (0.5, 0.999)},
        {"lr": 1e-2, "betas": (0.0, 0.9), "eps": 1e-3},
        {"lr": 1e-2, "weight_decay": 0.1},
    ],
)
def test_as_close_to_the_truth_as_pytorch(options):
    truth = parameters(torch.float64)
    expected = train(torch.optim.Adam(truth, **options), truth)
    plain, fast = parameters(), parameters()
    theirs = train(torch.optim.Adam(plain, fused=True, **options), plain)
    for e, t, o in zip(expected, theirs, train(Adam(fast, **options), fast), strict=True):
        error, allowed = (o - e).abs().max(), (t - e).abs().max()
        assert error <= 2 * allowed + 1e-7 * e.abs().max()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability, rerun_with_capability):
    rerun_with_capability(capability, __file__, "truth or half or strides")


def test_threads_change_nothing():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        ps = parameters()
        results.append(train(Adam(ps, lr=1e-2), ps))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_half_gradients_and_copies():
    ps, expected = parameters(), parameters()
    optimizer, reference = Adam(ps, lr=1e-2), Adam(expected, lr=1e-2)
    optimizer.copies = {p: p.detach().bfloat16() for p in ps[::2]}
    optimizer.half_gradients = {}
    for step in range(3):
        for p, e, g in zip(ps, expected, gradients(step, ps), strict=True):
            half = g.bfloat16()
            p.grad, e.grad = None if p in optimizer.copies else half.float(), half.float()
            if p in optimizer.copies:
                optimizer.half_gradients[p] = half
        if step == 2:  # PyTorch makes the step, and does what the kernel does
            optimizer.param_groups[0]["maximize"] = reference.param_groups[0]["maximize"] = True
        optimizer.step()
        reference.step()
        for p, e in zip(ps, expected, strict=True):
            assert torch.equal(p, e)
        for p, copy_ in optimizer.copies.items():
            assert torch.equal(copy_, p.detach().bfloat16())
        assert not optimizer.half_gradients  # taken


def test_half_gradients_are_added_to_others():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, reference = Adam([p], lr=0.1), Adam([q], lr=0.1)
    half = torch.randn(3).bfloat16()
    optimizer.half_gradients = {p: half}
    p.grad, q.grad = torch.full((3,), 0.3), torch.full((3,), 0.3) + half.float()
    optimizer.step()
    reference.step()
    assert torch.equal(p, q)


def test_graphs_from_before_a_step_raise():
    p = nn.Parameter(torch.randn(4, 3))
    optimizer = Adam([p], lr=0.1)
    optimizer.copies = {p: p.detach().bfloat16()}
    x = torch.ones(4, 3, dtype=torch.bfloat16, requires_grad=True)
    for used in (p, optimizer.copies[p]):
        loss = (x * used).sum()
        p.grad = torch.ones(4, 3)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_who_may_see_gradients():
    p = nn.Parameter(torch.ones(3))
    optimizer = Adam([p], lr=0.1)
    assert optimizer.takes_half_gradients
    handle = optimizer.register_step_pre_hook(lambda *_: None)
    assert not optimizer.takes_half_gradients
    handle.remove()
    optimizer.param_groups[0]["maximize"] = True  # then PyTorch makes the step
    assert not optimizer.takes_half_gradients


def test_gradients_of_other_strides():
    ps, expected = parameters(), parameters()
    optimizer, reference = Adam(ps, lr=1e-2), torch.optim.Adam(expected, lr=1e-2)
    for p, e in zip(ps, expected, strict=True):
        p.grad = torch.randn(p.shape[::-1]).permute(tuple(range(p.dim()))[::-1])
        e.grad = p.grad.clone()
    optimizer.step()
    reference.step()
    for p, e in zip(ps, expected, strict=True):
        torch.testing.assert_close(p, e)
        assert p.stride() == e.stride()


def test_states_are_pytorchs():
    ps, theirs = parameters(), parameters()
    optimizer = Adam(ps, lr=1e-2)
    train(optimizer, ps)
    with torch.no_grad():
        for p, t in zip(ps, theirs, strict=True):
            t.copy_(p)
    plain = torch.optim.Adam(theirs, lr=1e-2, fused=True)
    saved = pickle.dumps(optimizer.state_dict())
    plain.load_state_dict(pickle.loads(saved))
    expected = train(plain, theirs, first=5)
    again = parameters()
    with torch.no_grad():
        for p, a in zip(ps, again, strict=True):
            a.copy_(p)
    resumed = Adam(again, lr=1)
    resumed.load_state_dict(pickle.loads(saved))
    for mine, other, new in zip(
        train(optimizer, ps, first=5), expected, train(resumed, again, first=5), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
        assert torch.equal(mine, new)


def test_parameters_without_a_gradient_stay():
    still, moved = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Adam([still, moved], lr=0.1)
    for _ in range(2):
        moved.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(still, torch.ones(3))
    still.grad = torch.ones(3)
    optimizer.step()
    # The first step is one of lr whenever it comes.
    torch.testing.assert_close(still.detach(), torch.full((3,), 0.9))
    assert [optimizer.state[p]["step"].item() for p in (still, moved)] == [1, 3]
    optimizer.zero_grad()
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (still, moved)] == [1, 3]


def test_behaves_like_an_optimizer():
    p = nn.Parameter(torch.ones(3))
    optimizer = Adam([p], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    version = p._version
    assert optimizer.step(closure).item() == 3
    schedule.step()
    assert called == ["before", "after"]
    assert p._version > version
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))
    optimizer.step(closure)
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.85))
    called.clear()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(other) is Adam
        (twin,) = other.param_groups[0]["params"]
        twin.grad = torch.ones(3)
        other.step()
        torch.testing.assert_close(twin.detach(), torch.full((3,), 0.8))
    optimizer.step(closure)
    assert called == ["before", "after"]  # not twice, which PyTorch takes care of when it copies


@pytest.mark.parametrize(
    ("options", "parameter", "calls"),
    [
        ({}, torch.ones(3), 1),
        ({"fused": True}, torch.ones(3), 1),
        ({"amsgrad": True}, torch.ones(3), 0),
        ({"maximize": True}, torch.ones(3), 0),
        ({"lr": torch.tensor(0.1)}, torch.ones(3), 0),
        ({}, torch.ones(3, dtype=torch.float64), 0),
        ({}, torch.ones(6)[::2], 0),
    ],
)
def test_the_kernel_steps_where_it_can(options, parameter, calls):
    p = nn.Parameter(parameter)
    q = nn.Parameter(parameter.clone())
    optimizer, reference = Adam([p], **options), torch.optim.Adam([q], **options)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    with KernelCalls() as seen:
        optimizer.step()
    assert seen.count == calls
    reference.step()
    torch.testing.assert_close(p, q)


def test_a_gradient_scaler():
    """With and without `fused`, which leaves unscaling to the optimizer."""
    results = []
    for make in (Adam, partial(Adam, fused=True)):
        p = nn.Parameter(torch.ones(3))
        optimizer = make([p], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for gradient in (1.0, float("inf"), 3.0):
            optimizer.zero_grad()
            scaler.scale((p * gradient).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[p]["step"] == 2
        results.append(p.detach())
    assert torch.equal(*results)
    assert results[0].isfinite().all()


def test_hooks_are_called_once_whoever_makes_the_step():
    """Also where nobody has made an optimizer of PyTorch's before, which it then prepares."""
    code = """
import torch, gankernels as gk
p = torch.nn.Parameter(torch.ones(3))
optimizer = gk.optim.Adam([p], lr=0.1)
seen = []
optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
optimizer.register_step_post_hook(lambda *_: seen.append("after"))
def steps():
    seen.clear()
    for maximize in (False, True):
        optimizer.param_groups[0]["maximize"] = maximize
        p.grad = torch.ones(3)
        optimizer.step()
    assert seen == ["before", "after"] * 2, seen
steps()
torch.optim.Adam([p])
steps()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["amsgrad", "maximize", "decoupled_weight_decay", "lr"])
def test_what_the_kernel_cannot_do_is_pytorchs(name):
    def moved(by_us):
        p = nn.Parameter(torch.ones(3))
        make = Adam if by_us else torch.optim.Adam
        optimizer = make([p], lr=0.1, fused=True)
        for step in range(3):
            if step == 1:
                optimizer.param_groups[0][name] = torch.tensor(0.2) if name == "lr" else True
                if name == "amsgrad":
                    optimizer.state[p]["max_exp_avg_sq"] = torch.zeros(3)
            p.grad = torch.full((3,), 1.0 + step)
            optimizer.step()
        return p.detach()

    torch.testing.assert_close(moved(True), moved(False))


def test_groups_that_come_later():
    p, double = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = Adam([p], lr=0.1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert type(optimizer) is Adam
    optimizer.add_param_group({"params": [double]})
    for q in (p, double):
        q.grad = torch.ones_like(q)
    optimizer.step()
    torch.testing.assert_close(double.detach(), torch.full((3,), 0.9, dtype=torch.float64))


@pytest.mark.parametrize("make", [Adam, torch.optim.Adam])
def test_a_scheduler(make):
    p = nn.Parameter(torch.ones(3))
    optimizer = make([p], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # replaces the instance's `step`
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.89))


def test_state_of_another_layout_and_dtype():
    p, t = parameters()[-1], parameters()[-1]
    optimizer, theirs = Adam([p], lr=0.1), torch.optim.Adam([t], lr=0.1, foreach=False)
    state = {
        name: torch.rand(p.shape, dtype=torch.float64) + 0.5 for name in ("exp_avg", "exp_avg_sq")
    }
    state["step"] = torch.tensor(3.0, dtype=torch.float64)
    saved = {**optimizer.state_dict(), "state": {0: state}}
    for o, q in ((optimizer, p), (theirs, t)):
        o.load_state_dict(copy.deepcopy(saved))
        q.grad = torch.ones_like(q)
        o.step()
    torch.testing.assert_close(p, t)
    assert optimizer.state[p]["step"] == 4


def test_what_does_not_fit_is_refused():
    p = nn.Parameter(torch.ones(1000))
    optimizer = Adam([p], lr=0.1)
    p.grad = torch.ones(1000)
    optimizer.step()
    for name, value, message in (
        ("exp_avg", torch.ones(2), r"must have shape \(1000,\) as its parameter, got \(2,\)"),
        ("exp_avg_sq", torch.ones(1000, dtype=torch.float64), "must have dtype float32, got float"),
        ("exp_avg", torch.ones(2000)[::2], "must have the strides of its parameter"),
        ("step", torch.ones((), dtype=torch.float64), "must have dtype float32, got float64"),
        ("step", torch.ones(0), r"must have one element, got shape \(0,\)"),
        ("step", torch.tensor(float("nan")), "must be a number of steps, got"),
    ):
        kept, optimizer.state[p][name] = optimizer.state[p][name], value
        with pytest.raises(RuntimeError, match=rf"adam_: {name}s\[0\] {message}"):
            optimizer.step()
        optimizer.state[p][name] = kept
    lists = [[torch.ones(3)]] * 5
    with pytest.raises(
        RuntimeError, match="adam_: casts must have as many tensors as parameters, 1, got"
    ):
        torch.ops.gankernels.adam_(*lists, [], 0.1, 0.9, 0.9, 1e-8, 0.0)
    embedding = nn.Embedding(5, 3, sparse=True)
    sparse = Adam(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        sparse.step()


def raw(shapes=((4,), (2, 3))):
    """Lists for the op itself, as after some steps."""
    made = [[torch.rand(shape) + 1 for shape in shapes] for _ in range(4)]
    return [*made, [torch.tensor(5.0) for _ in shapes], [torch.empty(0) for _ in shapes]]


def replaced(lists, which, value):
    changed = [list(values) for values in lists]
    changed[which][1] = value
    return changed


PARAMETER, GRADIENT, EXP_AVG, EXP_AVG_SQ, STEP, CAST = range(6)


@pytest.mark.parametrize(
    ("which", "value", "message"),
    [
        (EXP_AVG, torch.ones(3, 2), r"exp_avgs\[1\] must have shape \(2, 3\) as .*, got \(3, 2\)"),
        (EXP_AVG, torch.ones(6), r"exp_avgs\[1\] must have shape \(2, 3\)"),
        (EXP_AVG_SQ, torch.ones(1).expand(2, 3), r"exp_avg_sqs\[1\] must have the strides of"),
        (GRADIENT, torch.ones(3, 2), r"gradients\[1\] must have shape \(2, 3\)"),
        (GRADIENT, torch.ones(2, 3, dtype=torch.int64), r"gradients\[1\] must have dtype .*int64"),
        (STEP, torch.ones(0), r"steps\[1\] must have one element, got shape \(0,\)"),
        (STEP, torch.ones(2), r"steps\[1\] must have one element, got shape \(2,\)"),
        (STEP, torch.tensor(-1.0), r"steps\[1\] must be a number of steps, got -1"),
        (STEP, torch.tensor(1e30), r"steps\[1\] must be a number of steps, got 1e\+30"),
        (STEP, torch.tensor(5), r"steps\[1\] must have dtype float32, got int64"),
        (CAST, torch.ones(2, 3), r"casts\[1\] must have dtype bfloat16, got float32"),
        (CAST, torch.ones(6, dtype=torch.bfloat16), r"casts\[1\] must have shape \(2, 3\)"),
        (PARAMETER, torch.ones(1).expand(2, 3), r"parameters\[1\] must have no gaps"),
        (PARAMETER, torch.ones(2, 3).double(), r"parameters\[1\] must have dtype float32"),
    ],
)
def test_what_is_refused_changes_nothing(which, value, message):
    """Also of the first parameter, with which all is well."""
    lists = replaced(raw(), which, value)
    before = copy.deepcopy(lists)
    with pytest.raises(RuntimeError, match="adam_: " + message):
        torch.ops.gankernels.adam_(*lists, 0.1, 0.9, 0.99, 1e-8, 0.0)
    for values, old in zip(lists, before, strict=True):
        assert all(torch.equal(v, o) for v, o in zip(values, old, strict=True))


@pytest.mark.parametrize(
    ("first", "second"),
    [(PARAMETER, PARAMETER), (PARAMETER, EXP_AVG), (EXP_AVG, EXP_AVG_SQ), (EXP_AVG_SQ, STEP)],
)
def test_what_is_written_has_memory_of_its_own(first, second):
    for offset in (0, 2):
        lists = raw(((4,), (4,)))
        memory = torch.rand(8)
        lists[first][0] = memory[:4]
        lists[second][1] = memory[offset] if second == STEP else memory[offset : offset + 4]
        before = memory.clone()
        with pytest.raises(RuntimeError, match="must not share memory with"):
            torch.ops.gankernels.adam_(*lists, 0.1, 0.9, 0.99, 1e-8, 0.0)
        assert torch.equal(memory, before)


def test_empty_parameters():
    shapes = ((0,), (3, 0), (0, 3), (2,))
    ps, theirs = ([nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    for q in (*ps, *theirs):
        q.grad = torch.ones_like(q)
    Adam(ps, lr=0.1).step()
    torch.optim.Adam(theirs, lr=0.1).step()
    torch.testing.assert_close(ps, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"step": torch.empty(0)},
            r"state\[0\]\['step'\] must be one number of steps, got a torch",
        ),
        ({"step": torch.ones(2)}, r"\['step'\] must be one number .*of shape \(2,\)"),
        ({"step": torch.tensor(float("inf"))}, r"\['step'\] must be one number of steps, got inf"),
        ({"step": "ten"}, "could not convert string to float"),
        ({"step": None}, "must be a state of Adam, got TypeError"),
        (
            {"exp_avg": torch.ones(1)},
            r"\['exp_avg'\] must be a floating-point tensor of its",
        ),
        ({"exp_avg": torch.ones(3, 2)}, r"of its parameter's shape \(2, 3\), got .*\(3, 2\)"),
        ({"exp_avg_sq": [1.0]}, r"\['exp_avg_sq'\] must be .*, got a list"),
        ({"exp_avg_sq": torch.ones(2, 3, device="meta")}, "must be a state of Adam, got NotImpl"),
    ],
)
def test_hostile_states_are_refused_when_they_are_loaded(change, message):
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = Adam([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({**saved, "state": {0: {**saved["state"][0], **change}}})
    for name in ("exp_avg", "exp_avg_sq", "step"):  # it is as before
        assert torch.equal(optimizer.state[p][name], saved["state"][0][name])
    optimizer.step()
    with pytest.raises(ValueError, match=r"\['exp_avg'\] must be .* got a NoneType"):
        optimizer.load_state_dict({**saved, "state": {0: {"step": torch.tensor(1.0)}}})
    for options in ({"lr": "fast"}, {"betas": (0.9,)}, {"betas": (0.9, None)}, {"eps": None}):
        group = {**saved["param_groups"][0], **options}
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            optimizer.load_state_dict({**saved, "param_groups": [group]})
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["step"] == 1


def test_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        p = nn.Parameter(torch.ones(3, dtype=torch.float32))
        optimizer = Adam([p], lr=0.1)
        p.grad = torch.ones_like(p)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[p]["step"] == 1
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))
