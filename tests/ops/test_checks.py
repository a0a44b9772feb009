"""The checks of torch.ops.gankernels itself: see csrc/ops/check.h.

fuzz.py makes random calls; the tests here compare messages.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch

import gankernels as gk

o = torch.ops.gankernels
x, statistics, m = torch.ones(4, 3, 5), torch.ones(2, 3), torch.ones(4, 2, 3)
one, norms, stddev = torch.ones(()), torch.ones(4), torch.ones(1, 1)
f64, bf16 = torch.float64, torch.bfloat16


def forward(x=x, weight=None, bias=None, statistics=None):
    return o.batch_norm_leaky_relu(x, weight, bias, statistics, 1e-5, 0.2, False)


def backward(grad_y=x, statistics=statistics, sums=None, count=20.0):
    return o.batch_norm_leaky_relu_backward(
        grad_y, x, None, None, statistics, sums, count, True, 1e-5, 0.2, False, True
    )


def double_backward(grad_grad_x=x, grad_grad_weight=None, grad_grad_bias=None, sums=None):
    return o.batch_norm_leaky_relu_double_backward(
        grad_grad_x, grad_grad_weight, grad_grad_bias, x, x, None, None, statistics, sums, 20.0,
        True, 1e-5, 0.2, False, True, True,
    )  # fmt: skip


def update(mean=None, var=None, counter=None, statistics=statistics, momentum=0.1, count=8.0):
    mean = torch.zeros(3) if mean is None else mean
    var = torch.zeros(3) if var is None else var
    return o.update_running_statistics(mean, var, counter, statistics, momentum, count)


def penalty_backward(grad_penalty=one, squared_norms=norms, kind=0):
    return o.gradient_norm_penalty_backward(grad_penalty, x, squared_norms, kind, 1.0)


def penalty_double_backward(tangent=x, squared_norms=norms):
    return o.gradient_norm_penalty_double_backward(
        tangent, torch.ones(()), x, squared_norms, 0, 1.0
    )


def stddev_double_backward(tangent=x, grad_stddev=stddev):
    return o.minibatch_stddev_double_backward(tangent, grad_stddev, x, 4, 1, 1e-8)


def resized():
    """A tensor whose storage somebody has freed, as sharded training does."""
    t = torch.ones(4, 3, 5)
    t.untyped_storage().resize_(16)
    return t


ERRORS = {
    "batch_norm_leaky_relu: x must have 2 to 5 dimensions, got shape (3,)": lambda: forward(
        torch.ones(3)
    ),
    "batch_norm_leaky_relu: x must have 2 to 5 dimensions, got shape (1, 3, 1, 1, 1, 1)": (
        lambda: forward(torch.ones(1, 3, 1, 1, 1, 1))
    ),
    "x must have dtype float32, float64, bfloat16 or float16, got int64": lambda: forward(x.long()),
    "x must have dtype float32, float64, bfloat16 or float16, got torch's ComplexFloat": (
        lambda: forward(x + 1j)
    ),
    "x must lie within its storage, got shape (4, 3, 5) in 16 bytes": lambda: forward(resized()),
    "x must have fewer than 2^40 elements, got shape (2, 1099511627776)": lambda: forward(
        torch.ones(1).expand(2, 2**40)
    ),
    "batch_norm_leaky_relu: weight must have shape (3,), got (1,)": lambda: forward(
        weight=torch.ones(1)
    ),
    "weight must have dtype float32, got float64": lambda: forward(weight=torch.ones(3).double()),
    "bias must have dtype bfloat16, got float32": lambda: forward(
        x.bfloat16(), torch.ones(3).bfloat16(), torch.ones(3)
    ),
    "bias must have dtype float32, got bfloat16": lambda: forward(
        x.bfloat16(), torch.ones(3), torch.ones(3).bfloat16()
    ),
    "batch_norm_leaky_relu: statistics must have shape (2, 3), got (2, 1)": lambda: forward(
        statistics=torch.ones(2, 1)
    ),
    "statistics must have dtype float32, got bfloat16": lambda: forward(
        x.bfloat16(), statistics=statistics.bfloat16()
    ),
    "batch_norm_leaky_relu_backward: grad_y must have shape (4, 3, 5) as x, got (4, 3)": (
        lambda: backward(grad_y=torch.ones(4, 3))
    ),
    "batch_norm_leaky_relu_backward: statistics must be a tensor, got None": lambda: backward(
        statistics=None
    ),
    "batch_norm_leaky_relu_backward: sums must have shape (2, 3), got (5, 3)": lambda: backward(
        sums=torch.ones(5, 3)
    ),
    "count must be a finite number of at least 0, got nan": lambda: backward(count=float("nan")),
    "count must be a finite number of at least 0, got -1": lambda: backward(count=-1.0),
    "batch_norm_leaky_relu_double_backward: sums must have shape (5, 3), got (2, 3)": (
        lambda: double_backward(sums=torch.ones(2, 3))
    ),
    "grad_grad_x must have dtype float32, got float64": lambda: double_backward(x.double()),
    "grad_grad_weight must have shape (3,), got (4,)": lambda: double_backward(
        grad_grad_weight=torch.ones(4)
    ),
    "grad_grad_bias must have dtype float32, got float64": lambda: double_backward(
        grad_grad_bias=torch.ones(3).double()
    ),
    "update_running_statistics: running_mean must have 1 dimension, got shape (3, 1)": (
        lambda: update(torch.zeros(3, 1))
    ),
    "running_var must have shape (3,) as running_mean, got (1,)": lambda: update(
        var=torch.zeros(1)
    ),
    "running_var must have dtype float32, got float64": lambda: update(var=torch.zeros(3).double()),
    "running_mean must have a separate element at every index, got an expanded tensor": (
        lambda: update(torch.zeros(1).expand(3))
    ),
    "running_var must not share memory with running_mean": (lambda: update(*[torch.zeros(3)] * 2)),
    "num_batches_tracked must have dtype int64, got float16": lambda: update(
        counter=torch.ones(()).half()
    ),
    "num_batches_tracked must have one element, got shape (0,)": lambda: update(
        counter=torch.ones(0, dtype=torch.int64)
    ),
    "statistics must have dtype float32, got float64": lambda: update(
        statistics=statistics.double()
    ),
    "momentum must be a number if num_batches_tracked is None, got None": lambda: update(
        momentum=None
    ),
    "update_running_statistics: count must be a finite number of at least 0, got inf": (
        lambda: update(count=float("inf"))
    ),
    "gradient_norm_penalty: kind must be 0 to 2, got 3": lambda: o.gradient_norm_penalty(x, 3, 1.0),
    "gradient_norm_penalty: grad must have at least 1 dimensions, got shape ()": (
        lambda: o.gradient_norm_penalty(torch.ones(()), 0, 1.0)
    ),
    "gradient_norm_penalty_backward: squared_norms must have shape (4,), got (1,)": (
        lambda: penalty_backward(squared_norms=torch.ones(1))
    ),
    "gradient_norm_penalty_backward: grad_penalty must have shape (), got (0,)": (
        lambda: penalty_backward(torch.ones(0))
    ),
    "gradient_norm_penalty_double_backward: tangent must have shape (4, 3, 5) as grad, got (4,)": (
        lambda: penalty_double_backward(torch.ones(4))
    ),
    "minibatch_stddev: x must not be empty, got shape (0, 4)": lambda: o.minibatch_stddev(
        torch.ones(0, 4), 4, 1, 1e-8
    ),
    "group_size must be at least 1, got 0": lambda: o.minibatch_stddev(x, 0, 1, 1e-8),
    "num_channels must divide the 3 channels of x, got 2": lambda: o.minibatch_stddev(
        x, 4, 2, 1e-8
    ),
    "minibatch_stddev_backward: grad_stddev must have shape (1, 1), got (1,)": (
        lambda: o.minibatch_stddev_backward(torch.ones(1), x, 4, 1, 1e-8)
    ),
    "minibatch_stddev_double_backward: tangent must have dtype float32, got float64": (
        lambda: stddev_double_backward(x.double())
    ),
    "minibatch_discrimination: m must have 3 dimensions, got shape (1, 2, 3, 4)": (
        lambda: o.minibatch_discrimination(torch.ones(1, 2, 3, 4))
    ),
    "minibatch_discrimination_backward: grad_o must have shape (4, 2), got (1, 1)": (
        lambda: o.minibatch_discrimination_backward(torch.ones(1, 1), m)
    ),
    "grad_grad_m must have shape (4, 2, 3) as m, got (4, 2)": (
        lambda: o.minibatch_discrimination_double_backward(
            torch.ones(4, 2), torch.ones(4, 2), m, True
        )
    ),
    "batch_norm_leaky_relu: all tensors must be on one device, got cpu and meta": lambda: forward(
        weight=torch.ones(3, device="meta")
    ),
    "update_running_statistics: all tensors must be on one device, got cpu and meta": (
        lambda: update(statistics=torch.ones(2, 3, device="meta"))
    ),
}


@pytest.mark.parametrize(("message", "call"), ERRORS.items(), ids=ERRORS)
def test_errors_name_the_argument(message, call):
    with pytest.raises(RuntimeError) as raised:
        call()
    assert message in str(raised.value).splitlines()[0]


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn])
def test_other_layouts_are_refused(change):
    for call in (lambda: forward(change(x)), lambda: forward(weight=change(torch.ones(3)))):
        with pytest.raises((NotImplementedError, RuntimeError)):
            call()


@pytest.mark.parametrize("size", [sys.maxsize, sys.maxsize - 1, 2**62, 9])
def test_the_whole_batch_as_one_group(size):
    x = torch.randn(9, 4, 3, 3, dtype=f64, requires_grad=True)
    layer = gk.nn.MinibatchStddev(group_size=size)
    with gk.use_backend("reference"):
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0), (4, 0), (4, 0, 2), (2, 3, 0, 5)])
def test_empty_batches(shape):
    """The public functions leave them to PyTorch; the ops have nothing to write to them."""
    x = torch.ones(shape)
    c = shape[1]
    given = torch.ones(2, c)
    for last in (False, True):
        y, _ = o.batch_norm_leaky_relu(x, None, None, given, 1e-5, 0.2, last)
        assert y.shape == shape
        grad_x, sums = o.batch_norm_leaky_relu_backward(
            x, x, None, None, given, None, 1.0, True, 1e-5, 0.2, last, True
        )
        assert grad_x.shape == shape
        assert torch.equal(sums, torch.zeros(2, c))
        assert o.batch_norm_leaky_relu_statistics(x, 0.2, last).shape == (2, c)


def test_half_statistics_of_a_penalty_may_lie_apart():
    grad, apart = torch.randn(4, 6), torch.rand(8)[::2] + 1
    expected = o.gradient_norm_penalty_backward(torch.ones(()), grad, apart.clone(), 0, 1.0)
    for squared_norms in (apart, apart):
        result = o.gradient_norm_penalty_backward(torch.ones(()), grad, squared_norms, 0, 1.0)
        assert torch.equal(result, expected)


# ---- where no memory is left ---------------------------------------------------------------------


def under_a_limit(megabytes, call):
    """What `call` raises, as text, in a child process that may not have much more memory."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "nothing was raised"
        try:
            signal.alarm(60)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            torch.set_num_threads(1)  # OpenMP's threads do not live here
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)
            call()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, text.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, signal.Signals(-status).name
    return text


def many(*shape):
    """Zeros that take no memory of their own until they are read: the page of zeros is shared."""
    return torch.zeros(1).expand(shape) if len(shape) == 3 else torch.zeros(shape)


SHORT = {
    # What is scratch memory alone, the outputs being small; then outputs, then copies.
    "sums over channels": lambda: o.batch_norm_leaky_relu_statistics(many(1, 4_000_000), 0.2, True),
    "the forward pass": lambda: gk.functional.batch_norm_leaky_relu(
        many(2, 4_000_000), None, None, training=True
    ),
    "a penalty": lambda: gk.functional.gradient_norm_penalty(many(20_000_000, 1)),
    "a penalty's backward": lambda: o.gradient_norm_penalty_backward(
        torch.ones(()), many(20_000_000, 1), torch.ones(20_000_000), 0, 1.0
    ),
    "large groups": lambda: o.minibatch_stddev(many(4_000_000, 1), sys.maxsize, 1, 1e-8),
    "discrimination": lambda: o.minibatch_discrimination(many(2, 1, 4_000_000)),
    "a copy": lambda: o.minibatch_stddev(torch.ones(1).expand(4, 20_000_000), 4, 1, 1e-8),
}


@pytest.mark.parametrize("call", SHORT.values(), ids=SHORT)
def test_short_of_memory(call):
    text = under_a_limit(180, call)
    assert text.startswith("RuntimeError"), text
    assert "allocate memory" in text, text
    assert "you tried to allocate" in text, text
