"""batch_norm_leaky_relu and leaky_relu_batch_norm in PyTorch's autograd."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import gankernels as gk
from gankernels import functional

from .oracle import LAYOUTS, Case, Problem, assert_close, cases, ours, reference, solve

pytestmark = pytest.mark.every_device

FUNCTIONS = {
    "batch_norm_leaky_relu": functional.batch_norm_leaky_relu,
    "leaky_relu_batch_norm": functional.leaky_relu_batch_norm,
}
both = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
DOUBLE = Case(dtype=torch.float64)
SHAPES = {"N,C": (6, 3), "N,C,L": (4, 3, 3), "N,C,H,W": (3, 2, 2, 3), "N,C,D,H,W": (2, 2, 1, 2, 3)}


def arguments(problem):
    """x, weight and bias as far as there are some, and the function of them alone."""
    names = [n for n in ("x", "weight", "bias") if getattr(problem, n) is not None]

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return ours(problem, given["x"], given.get("weight"), given.get("bias"))

    return function, [getattr(problem, n).detach().requires_grad_() for n in names]


@pytest.mark.parametrize(
    "case",
    cases(
        shape=SHAPES.values(),
        activation_first=(False, True),
        training=(True, False),
        affine=(True, False),
        negative_slope=(0.2, 0.0, -0.1, 1.0),
        dtype=(torch.float64,),
    ),
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_and_gradgradcheck(case, layout):
    function, tensors = arguments(Problem(case.but(layout=layout)))
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("needing", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation_first", [False, True])
def test_gradients_of_some_inputs_only(activation_first, training, needing):
    problem = Problem(DOUBLE.but(activation_first=activation_first, training=training))
    function, tensors = arguments(problem)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in needing)
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("missing", ["weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation_first", [False, True])
def test_weight_without_bias_and_the_reverse(activation_first, training, missing):
    problem = Problem(DOUBLE.but(activation_first=activation_first, training=training))
    setattr(problem, missing, None)
    function, tensors = arguments(problem)
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("through", ["x", "weight", "bias"])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "grad_y"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation_first", [False, True])
def test_second_derivative_one_by_one(activation_first, training, wanted, through):
    """The gradient of one first derivative with respect to one input, all others absent."""
    problem = Problem(DOUBLE.but(activation_first=activation_first, training=training))

    def second(function):
        inputs = {
            n: getattr(problem, n).detach().clone() for n in ("x", "weight", "bias", "grad_y")
        }
        inputs[through].requires_grad_()
        inputs[wanted].requires_grad_()
        y = function(problem, inputs["x"], inputs["weight"], inputs["bias"])
        (first,) = torch.autograd.grad(y, inputs[through], inputs["grad_y"], create_graph=True)
        if not first.requires_grad:
            return None
        tangent = getattr(problem, f"tangent_{through}")
        return torch.autograd.grad(first, inputs[wanted], tangent, materialize_grads=True)[0]

    actual, expected = second(ours), second(reference)
    if expected is None:
        assert actual is None or not actual.any()
    else:
        torch.testing.assert_close(actual, expected)


@both
def test_gradient_penalty(function):
    """What the second derivative is for, through a small critic."""

    def gradients(norm):
        torch.manual_seed(0)
        weights = [torch.randn(s, requires_grad=True) for s in ((8, 3, 3, 3), (8,), (8,), (1, 8))]
        x = torch.randn(4, 3, 6, 6, requires_grad=True)
        h = F.conv2d(x, weights[0], padding=1)
        h = norm(h, None, None, weights[1], weights[2], True, negative_slope=0.2)
        score = F.linear(h.square().mean((2, 3)), weights[3])
        (grad,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        penalty = ((grad.flatten(1).norm(dim=1) - 1) ** 2).mean()
        return torch.autograd.grad(penalty + score.mean(), weights)

    def plain(x, mean, var, weight, bias, training, negative_slope):
        if function is functional.leaky_relu_batch_norm:
            return F.batch_norm(F.leaky_relu(x, negative_slope), mean, var, weight, bias, training)
        return F.leaky_relu(F.batch_norm(x, mean, var, weight, bias, training), negative_slope)

    for actual, expected in zip(gradients(function), gradients(plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("training", [True, False])
def test_third_derivative_raises(function, training):
    x = torch.randn(6, 3, 4, requires_grad=True)
    weight = torch.randn(3, requires_grad=True)
    y = function(x, torch.zeros(3), torch.ones(3), weight, None, training)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable twice, but a third derivative"):
        torch.autograd.grad(second.square().sum(), x)


@both
def test_two_forwards_before_one_backward(function):
    """Real and fake batches through one critic, as a GAN does."""
    case = DOUBLE.but(activation_first=function is functional.leaky_relu_batch_norm)
    first, second = Problem(case), Problem(case.but(seed=1))

    def gradients(f):
        tensors = [t.detach().requires_grad_() for t in (first.weight, first.bias)]
        sum(f(p, p.x, *tensors).mul(p.grad_y).sum() for p in (first, second)).backward()
        return [t.grad for t in tensors]

    torch.testing.assert_close(gradients(ours), gradients(reference))


@both
def test_gradients_accumulate_over_repeated_backward(function):
    x = torch.randn(6, 3, 4, requires_grad=True)
    y = function(x, None, None, training=True).square().sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * once)


@both
def test_changing_x_before_backward_raises(function):
    x = torch.randn(6, 3, 4, requires_grad=True)
    inner = x * 1
    y = function(inner, None, None, training=True)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@both
def test_changing_y_in_place_is_fine(function):
    """Nothing of y is saved."""
    x = torch.randn(6, 3, 4, requires_grad=True)
    y = function(x, None, None, training=True)
    (expected,) = torch.autograd.grad((y * 2).square().sum(), x)
    y = function(x, None, None, training=True)
    (actual,) = torch.autograd.grad(y.mul_(2).square().sum(), x)
    torch.testing.assert_close(actual, expected)


@both
@pytest.mark.parametrize("create_graph", [False, True])
def test_saved_for_backward_are_x_and_per_channel_tensors(function, create_graph):
    x = torch.randn(16, 8, 10, 10, requires_grad=True)
    weight, bias = (torch.randn(8, requires_grad=True) for _ in range(2))
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(x, None, None, weight, bias, True)
        grad_y = torch.randn_like(y).requires_grad_()
        if create_graph:
            torch.autograd.grad(y, x, grad_y, create_graph=True)
    # The graph of the first derivative holds its incoming gradient too.
    large = [size for size in saved.values() if size > 1000]
    assert large == [x.nbytes] * (2 if create_graph else 1)
    assert sum(saved.values()) - sum(large) <= 4 * 8 * 4 + 64


@both
def test_no_graph_without_gradients(function):
    x = torch.randn(6, 3, 4, requires_grad=True)
    with torch.no_grad():
        assert function(x, None, None, training=True).grad_fn is None
    assert function(x.detach(), None, None, training=True).grad_fn is None
    with torch.inference_mode():
        function(x, None, None, training=True)


@both
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_last", "padded"])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 4, 5), (6, 3, 2, 4, 5)], ids=str)
def test_results_keep_the_layout_and_dtype_of_x(shape, layout, function):
    for dtype in (torch.float32, torch.bfloat16):
        x = LAYOUTS[layout](torch.randn(shape, dtype=dtype)).requires_grad_()
        y = function(x, None, None, torch.ones(3), torch.zeros(3), True)
        (grad,) = torch.autograd.grad(y.sum(), x)
        dense = layout in ("contiguous", "channels_last")
        for result in (y, grad):
            assert result.dtype is dtype
            assert result.stride() == (x.stride() if dense else torch.empty(shape).stride())


def test_inputs_are_not_written():
    problem = Problem(DOUBLE)
    before = {k: v.clone() for k, v in vars(problem).items() if isinstance(v, torch.Tensor)}
    solve(ours, problem)
    for name, value in before.items():
        assert torch.equal(value, getattr(problem, name)), name


# ---- dispatcher ----------------------------------------------------------------------------------

_ops = torch.ops.gankernels


def samples():
    """Inputs for each op of the family, by the name of the op."""
    for (dtype, affine), layout in itertools.product(
        [(torch.float32, True), (torch.bfloat16, False)], ["channels_last", "batch_last"]
    ):
        problem = Problem(Case(layout=layout, dtype=dtype, affine=affine))
        x, g, v, last = problem.x, problem.grad_y, problem.tangent_x, (1e-5, 0.2, False)
        statistics = _ops.batch_norm_leaky_relu_statistics(x, 0.2, False)
        first = (g, x, problem.weight, problem.bias, statistics)
        sums = _ops.batch_norm_leaky_relu_backward_sums(*first, *last)
        sums5 = _ops.batch_norm_leaky_relu_double_backward_sums(v, *first, *last)
        for given in (None, statistics):
            yield "batch_norm_leaky_relu", (x, problem.weight, problem.bias, given, *last)
        yield "batch_norm_leaky_relu_statistics", (x, 0.2, True)
        yield "batch_norm_leaky_relu_backward_sums", (*first, *last)
        yield "batch_norm_leaky_relu_double_backward_sums", (v, *first, *last)
        for training, want in itertools.product((True, False), repeat=2):
            given, given5 = (sums, sums5) if want else (None, None)
            options = (120.0, training, *last, want)
            yield "batch_norm_leaky_relu_backward", (*first, given, *options)
            tangents = (v, sums[1], None if want else sums[0])
            yield (
                "batch_norm_leaky_relu_double_backward",
                (*tangents, *first, given5, *options, not want),
            )
        yield "batch_norm_leaky_relu_backward", (*first, None, 120.0, False, *last, True)
        for count, momentum in ((torch.tensor(3), None), (None, 0.1)):
            mean, var = statistics.clone()
            running = (mean.clone(), var.clone())
            yield "update_running_statistics", (*running, count, statistics, momentum, 120.0)


@functools.cache
def samples_by_op(device):
    """Those of the default device, which `device` names."""
    found = {}
    for name, inputs in samples():
        found.setdefault(name, []).append(inputs)
    return found


FAMILY = sorted(
    schema.name.split("::")[1]
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith(("gankernels::batch_norm", "gankernels::update_running"))
)


@pytest.mark.parametrize("name", FAMILY)
def test_opcheck(name, device):
    op = getattr(_ops, name).default
    for inputs in samples_by_op(device)[name]:
        torch.library.opcheck(op, inputs)


def test_opcheck_covers_the_family(device):
    assert len(FAMILY) == 7
    assert sorted(samples_by_op(device)) == FAMILY


def test_partial_sums_make_the_whole():
    """Sums taken in one call and used in another, as synchronized batch norm does."""
    problem = Problem(DOUBLE)
    x, weight, bias, g = problem.x, problem.weight, problem.bias, problem.grad_y
    v, last = problem.tangent_x, (1e-5, 0.2, False)
    y, statistics = _ops.batch_norm_leaky_relu(x, weight, bias, None, *last)
    assert torch.equal(statistics, _ops.batch_norm_leaky_relu_statistics(x, 0.2, False))
    torch.testing.assert_close(statistics[0], x.mean((0, 2, 3)))
    torch.testing.assert_close(statistics[1], x.var((0, 2, 3), correction=0))
    assert torch.equal(y, _ops.batch_norm_leaky_relu(x, weight, bias, statistics, *last)[0])

    sums = _ops.batch_norm_leaky_relu_backward_sums(g, x, weight, bias, statistics, *last)
    first = (g, x, weight, bias, statistics)
    whole = _ops.batch_norm_leaky_relu_backward(*first, None, 120.0, True, *last, True)
    parts = _ops.batch_norm_leaky_relu_backward(*first, sums, 120.0, True, *last, True)
    assert torch.equal(whole[1], sums)
    torch.testing.assert_close(whole[0], parts[0])
    z = F.batch_norm(x, None, None, weight, bias, True)
    masked = torch.where(z > 0, g, 0.2 * g)
    torch.testing.assert_close(sums[0], masked.sum((0, 2, 3)))
    torch.testing.assert_close(
        sums[1], (masked * F.batch_norm(x, None, None, training=True)).sum((0, 2, 3))
    )

    sums = _ops.batch_norm_leaky_relu_double_backward_sums(v, *first, *last)
    second = (v, None, None, *first)
    whole = _ops.batch_norm_leaky_relu_double_backward(
        *second, None, 120.0, True, *last, True, True
    )
    parts = _ops.batch_norm_leaky_relu_double_backward(
        *second, sums, 120.0, True, *last, True, True
    )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(sums[4], (v * masked).sum((0, 2, 3)))


def test_statistics_of_slices_given_to_the_raw_op_may_be_strided():
    problem = Problem(DOUBLE)
    x, last = problem.x, (1e-5, 0.2, False)
    y, statistics = _ops.batch_norm_leaky_relu(x, None, None, None, *last)
    strided = statistics.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(y, _ops.batch_norm_leaky_relu(x, None, None, strided, *last)[0])


# ---- transforms ----------------------------------------------------------------------------------


@both
def test_func_grad(function):
    x, weight = torch.randn(6, 3, 4).double(), torch.randn(3).double()

    def loss(x, weight):
        return function(x, None, None, weight, None, True).pow(3).sum()

    tensors = [t.clone().requires_grad_() for t in (x, weight)]
    expected = torch.autograd.grad(loss(*tensors), tensors)
    for a, b in zip(torch.func.grad(loss, (0, 1))(x, weight), expected, strict=True):
        torch.testing.assert_close(a, b)


@both
def test_func_grad_of_grad(function):
    x, weight = torch.randn(6, 3, 4).double(), torch.randn(3).double()

    def loss(x, weight):
        return function(x, None, None, weight, None, True).pow(3).sum()

    def penalty(weight):
        return torch.func.grad(loss)(x, weight).square().sum()

    def eager_penalty(weight):
        y = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(y, weight), y, create_graph=True)
        return grad.square().sum()

    w = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(eager_penalty(w), w)
    torch.testing.assert_close(torch.func.grad(penalty)(weight), expected)


class Discriminator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.norm = gk.nn.BatchNormLeakyReLU2d(16)
        self.last = gk.nn.LeakyReLUBatchNorm2d(16)
        self.head = torch.nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.last(self.norm(self.conv(x))).square().mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_without_graph_breaks(backend, training, device):
    if (device, backend) == ("cuda", "inductor"):
        pytest.importorskip("triton", reason="torch.compile needs Triton on CUDA")
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = Discriminator().train(training)
    compiled = Discriminator().train(training)
    compiled.load_state_dict(eager.state_dict())
    run = torch.compile(compiled, backend=backend, fullgraph=True)
    x = torch.randn(4, 3, 8, 8)
    for _ in range(2):
        eager(x).mean().backward()
        run(x).mean().backward()
    for (name, a), b in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
    for (name, a), b in zip(compiled.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    torch._dynamo.reset()


def test_compile_with_other_batch_sizes():
    torch._dynamo.reset()
    layer = gk.nn.BatchNormLeakyReLU1d(5)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    other = gk.nn.BatchNormLeakyReLU1d(5)
    for n in (4, 7, 12):
        x = torch.randn(n, 5, 3)
        torch.testing.assert_close(run(x), other(x))
    torch.testing.assert_close(layer.running_var, other.running_var)
    torch._dynamo.reset()


# ---- autocast and storage ------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_the_dtype_of_x(function, dtype, device):
    weight, bias = torch.rand(3), torch.rand(3)
    mean, var = torch.zeros(3), torch.ones(3)
    with torch.autocast(device, dtype):
        for x in (torch.randn(6, 3, 4), torch.randn(6, 3, 4).to(dtype)):
            y = function(x, mean, var, weight, bias, True)
            assert y.dtype is x.dtype
        # The reference follows the same rule.
        with gk.use_backend("reference"):
            assert function(x, mean, var, weight, bias, True).dtype is dtype
    assert mean.dtype is var.dtype is torch.float32


def test_autocast_model_matches_float32(device):
    torch.manual_seed(0)
    model = Discriminator()
    x = torch.randn(8, 3, 8, 8)
    expected = torch.autograd.grad(model(x).mean(), model.norm.weight)[0]
    with torch.autocast(device, torch.bfloat16):
        loss = model(x).float().mean()
    actual = torch.autograd.grad(loss, model.norm.weight)[0]
    assert actual.dtype is torch.float32
    assert_close({"weight": actual}, {"weight": expected}, 0.1)


@both
def test_half_gradients_have_the_dtypes_of_their_parameters(function):
    x = torch.randn(6, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    for dtype in (torch.bfloat16, torch.float32):
        weight, bias = (torch.rand(3, dtype=dtype, requires_grad=True) for _ in range(2))
        y = function(x, None, None, weight, bias, True)
        grads = torch.autograd.grad(y.sum(), (x, weight, bias))
        assert [g.dtype for g in grads] == [torch.bfloat16, dtype, dtype]
