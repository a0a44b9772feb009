"""The PyTorch features that work with the ops and fused networks: docs/compatibility.md.

Each row is defined here, at the test that proves it or with the names of tests elsewhere that do,
and must be equal on the page. ``python tests/test_compatibility.py`` writes the table to the page.
"""

import copy
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import gankernels as gk
from gankernels.ops.record import Draw, records

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
ROWS: dict[str, tuple[str, str, list[str]]] = {}  # feature: (answer, remark, tests)


def row(feature, answer, remark="", *tests):
    """A row that tests elsewhere show, given as "file::function"."""
    ROWS[feature] = (answer, remark, list(tests))


def shows(feature, answer, remark="", *also):
    """The row that the decorated test shows, with tests elsewhere where they are named."""

    def decorate(test):
        here = f"tests/test_compatibility.py::{test.__name__}"
        _, _, tests = ROWS.get(feature, (answer, remark, []))
        row(feature, answer, remark, *tests, here, *also)
        return test

    return decorate


# ---- networks ------------------------------------------------------------------------------------


def plain_critic():
    """Both orders of BatchNorm and LeakyReLU, and both layers that look at the batch."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(6, 5, 4, 2, 1, bias=False), nn.BatchNorm2d(5), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(5, 4, 3, 1, 1), nn.LeakyReLU(0.1), nn.BatchNorm2d(4),
        gk.nn.MinibatchStddev(), nn.Flatten(), nn.Linear(5 * 4, 8),
        gk.nn.MinibatchDiscrimination(8, 3, 2), nn.Linear(11, 1),
    )  # fmt: skip


def twins(make=plain_critic, dtype=torch.float64):
    """A fused network and the same one before it was."""
    plain = make().to(dtype)
    fused = gk.fuse(copy.deepcopy(plain))
    norms = [m for m in fused.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(type(m).__module__.startswith("gankernels.") for m in norms)
    return fused, plain


def images(n=6, dtype=torch.float64):
    return torch.randn(n, 3, 8, 8, dtype=dtype)


def penalty(network, x):
    """As people write it."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def gradients(network, loss):
    """Of a loss with a penalty: no parameter's is missing or zero."""
    network.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in network.parameters()]


def assert_close(actual, expected, tolerance=1e-9):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def with_parameters(op):
    """The public function of a record, as a function of x alone."""
    parameters = op.inputs((5, 3, 4), Draw(torch.float64))[1:]
    return lambda x: op.public(gk, x, *parameters)


OPS = {name: with_parameters(op) for name, op in records().items() if op.fused is not None}
OPS["leaky_relu_batch_norm, evaluation"] = lambda x: gk.functional.leaky_relu_batch_norm(
    x, torch.zeros(3).to(x), torch.ones(3).to(x)
)
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def samples():
    return torch.randn(5, 3, 4, dtype=torch.float64)


# ---- precision and layout ------------------------------------------------------------------------


@shows(
    "`torch.autocast`, bfloat16 and float16",
    "yes",
    "batch norm computes in the dtype of its input, minibatch discrimination in the autocast "
    "dtype; sums and statistics in float32",
    "tests/ops/test_batch_norm_leaky_relu_autograd.py::test_autocast_computes_in_the_dtype_of_x",
    "tests/nn/test_minibatch.py::test_discrimination_under_autocast",
    "tests/functional/test_gradient_penalty.py::test_autocast",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    fused, plain = twins(dtype=torch.float32)
    x, results = images(dtype=torch.float32), {}
    for name, network in {"fused": fused, "plain": plain, "float32": copy.deepcopy(plain)}.items():
        with torch.autocast("cpu", dtype, enabled=name != "float32"):
            out = network(x)
            loss = out.float().square().mean() + penalty(network, x)
        assert (out.dtype is dtype) is (name != "float32")
        results[name] = torch.cat([g.flatten() for g in gradients(network, loss)])
    wide = results["float32"]
    errors = [(results[name] - wide).norm() / wide.norm() for name in ("fused", "plain")]
    assert 0 < errors[0] < 2 * errors[1] + torch.finfo(dtype).eps


@shows(
    "`torch.amp.GradScaler`, one for two optimizers",
    "yes",
    "a player with an overflow skips its step, the other does not",
)
def test_grad_scaler():
    fused, plain = twins(dtype=torch.float32)
    steps = []
    for network in (fused, plain):
        halves = (network[:6], network[6:])
        adams = [torch.optim.SGD(half.parameters(), 1.0) for half in halves]
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.float16):
            loss = network(images(dtype=torch.float32)).float().square().mean()
        before = [p.detach().clone() for p in network.parameters()]
        scaler.scale(loss).backward()
        network[0].bias.grad[0] = torch.inf
        for adam in adams:
            scaler.step(adam)
        scaler.update()
        assert scaler.get_scale() == 128.0
        change = [p - b for p, b in zip(network.parameters(), before, strict=True)]
        first = len(list(halves[0].parameters()))
        assert all(c.count_nonzero() == 0 for c in change[:first])
        assert change[first].count_nonzero() > 0
        steps.append(change)
    assert_close(*steps, tolerance=0.02)


@shows("`memory_format=torch.channels_last`", "yes", "kept, in the gradients too")
def test_channels_last():
    fused, plain = twins()
    fused = fused.to(memory_format=torch.channels_last)
    x = images()
    layouts = []
    for layer in (fused[3], fused[7]):
        layer.register_forward_hook(
            lambda _, inputs, y: layouts.extend(
                t.is_contiguous(memory_format=torch.channels_last) for t in (*inputs, y)
            )
        )
    y = x.to(memory_format=torch.channels_last)
    assert_close(gradients(fused, penalty(fused, y) + fused(y).mean()),
                 gradients(plain, penalty(plain, x) + plain(x).mean()))  # fmt: skip
    assert layouts == [True] * 8


row(
    "Modules in bfloat16, float16 and float64",
    "yes",
    "parameters may stay in float32 with half-precision activations",
    "tests/fuse/test_pairs.py::test_dtypes",
    "tests/nn/test_batch_norm_leaky_relu.py::test_half_activations_with_float32_parameters",
)

# ---- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


row(
    "`torch.compile` of a network, first derivative",
    "yes",
    "without a graph break, other batch sizes and fused networks included",
    "tests/ops/test_batch_norm_leaky_relu_autograd.py::test_compile_without_graph_breaks",
    "tests/ops/test_batch_norm_leaky_relu_autograd.py::test_compile_with_other_batch_sizes",
    "tests/ops/test_minibatch_discrimination.py::test_compiles_without_a_graph_break",
    "tests/ops/test_minibatch_stddev.py::test_compiles_without_a_graph_break",
    "tests/ops/test_gradient_norm_penalty.py::test_compiles_without_a_graph_break",
    "tests/fuse/test_fused_networks.py::test_compile",
    "tests/cuda/test_compile.py::test_without_graph_breaks",
)


def functional_penalty(network):
    """A penalty as a function of parameters and input, with torch.func.grad in it."""
    buffers = dict(network.named_buffers())

    def critic(parameters, x):
        return torch.func.functional_call(network, (parameters, buffers), (x,)).sum()

    def penalty(parameters, x):
        return gk.functional.gradient_norm_penalty(torch.func.grad(critic, 1)(parameters, x))

    return penalty, {name: p.detach() for name, p in network.named_parameters()}


def dense_critic():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.LeakyReLU(0.2), nn.Linear(5, 1))


@shows(
    "`torch.compile` of a whole penalty step, `torch.func.grad` inside",
    "yes",
    "without a graph break; the gradients are those of eager mode; not with torch 2.10 where batch "
    "norm keeps running statistics, which its compiler refuses to change inside `torch.func.grad`",
)
@pytest.mark.skipif(
    torch.__version__.startswith("2.10."),
    reason="its compiler refuses to change buffers inside torch.func.grad",
)
@pytest.mark.parametrize(
    ("backend", "make", "x"),
    [
        ("aot_eager", plain_critic, images()),
        pytest.param("inductor", dense_critic, torch.randn(6, 4).double(), marks=pytest.mark.slow),
    ],
    ids=["aot_eager", "inductor"],
)
def test_compiled_penalty_step(backend, make, x, compiler):
    fused, plain = twins(make)
    expected = penalty(plain, x)
    of = dict(plain.named_parameters())
    second = torch.autograd.grad(expected, of.values(), allow_unused=True, materialize_grads=True)
    assert sum(g.abs().max() > 1e-4 for g in second) >= len(second) / 2
    function, parameters = functional_penalty(fused)
    step = compiler(torch.func.grad_and_value(function), backend=backend, fullgraph=True)
    grads, value = step(parameters, x)
    assert_close([value, *(grads[name] for name in of)], [expected.detach(), *second])


@shows(
    "A compiled module differentiated twice",
    "no (PyTorch raises)",
    "`gradient_penalty` names the module; compile the whole step, or take "
    '`method="finite-difference"`',
    "tests/functional/test_gradient_penalty_errors.py::test_compiled_critics_are_recognized",
    "tests/functional/test_finite_difference.py::test_finite_difference_of_a_compiled_module",
)
def test_compiled_module_differentiated_twice(compiler):
    fused, _ = twins(dense_critic)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        penalty(compiler(fused, backend="aot_eager"), torch.randn(6, 4).double()).backward()


def test_importing_does_not_import_the_compiler(python):
    """Which takes seconds; the ops meet it when it calls them."""
    script = "import gankernels, sys; print('torch._dynamo' in sys.modules)"
    assert python("-c", script).stdout == "False\n"


# ---- transforms ----------------------------------------------------------------------------------


@shows(
    "`torch.func.grad`, `vjp`, `grad` of `grad`, `functional_call`",
    "yes",
    "buffers that the function only captures are updated, where PyTorch's BatchNorm raises",
    "tests/ops/test_batch_norm_leaky_relu_autograd.py::test_func_grad_of_grad",
    "tests/ops/test_minibatch_discrimination.py::test_func_grad_and_vjp",
    "tests/ops/test_minibatch_stddev.py::test_func_grad_and_vjp",
    "tests/ops/test_gradient_norm_penalty.py::test_func_grad_of_grad",
    "tests/nn/test_batch_norm_leaky_relu.py::test_functional_call_and_ema",
)
def test_func_grad():
    fused, plain = twins()
    x = images()
    function, parameters = functional_penalty(fused)
    grads = torch.func.grad(function)(parameters, x)
    expected = gradients(plain, penalty(plain, x) + 0 * plain(x).sum())
    assert_close(grads.values(), expected)
    plain.zero_grad()
    plain.train()(x)
    assert fused[3].num_batches_tracked == 1
    with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
        torch.func.grad(functional_penalty(plain)[0])(parameters, x)


WAY_OUT = r'gankernels\.use_backend\("reference"\)'


@shows(
    "`torch.vmap`, `jacrev`",
    "no (raises a clear error)",
    'under `gk.use_backend("reference")`; per-sample gradients by a loop too',
)
@every_op
def test_vmap(op):
    x, stacked = samples(), torch.stack([samples(), samples()])
    for function, of in (
        (torch.vmap(op), stacked),
        (torch.vmap(torch.func.grad(lambda x: op(x).square().sum())), stacked),
        (torch.func.jacrev(op), x),
    ):
        with pytest.raises(NotImplementedError, match=rf"has no rule for torch\.vmap; .*{WAY_OUT}"):
            function(of)
        with gk.use_backend("reference"):
            function(of)
    with gk.use_backend("reference"):
        batched = torch.vmap(op)(stacked)
    assert_close(batched, [op(x) for x in stacked])


@shows(
    "`torch.func.jvp`, `jacfwd`, `hessian`, `torch.autograd.forward_ad`",
    "no (raises a clear error)",
    'under `gk.use_backend("reference")`; `torch.autograd.functional.hessian` without it too',
)
@every_op
@pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
def test_forward_mode(op, recording):
    x, tangent = samples(), samples()

    def dual(x):
        with forward_ad.dual_level(), torch.set_grad_enabled(recording):
            return forward_ad.unpack_dual(op(forward_ad.make_dual(x, tangent))).tangent

    for function in (lambda x: torch.func.jvp(op, (x,), (tangent,)), torch.func.jacfwd(op), dual):
        with pytest.raises(NotImplementedError, match=rf"has no forward-mode .*{WAY_OUT}"):
            function(x)
        with gk.use_backend("reference"):
            assert function(x) is not None
    with pytest.raises(NotImplementedError, match=WAY_OUT):
        torch.func.hessian(lambda x: op(x).sum())(x)


@shows(
    "`torch.autograd.functional.jacobian` and `hessian`, `is_grads_batched`",
    "yes",
    "`vectorize=True` included",
)
@every_op
def test_functional_jacobian(op):
    x = samples()
    results = []
    for backend in ("auto", "reference"):
        with gk.use_backend(backend):
            results.append(
                [
                    torch.autograd.functional.jacobian(op, x, vectorize=backend == "auto"),
                    torch.autograd.functional.hessian(lambda x: op(x).square().sum(), x),
                ]
            )
    assert_close(*results)


row(
    "Third derivatives",
    "no (raises a clear error)",
    "",
    "tests/ops/test_batch_norm_leaky_relu_autograd.py::test_third_derivative_raises",
    "tests/ops/test_minibatch_discrimination.py::test_third_derivative_raises",
    "tests/ops/test_minibatch_stddev.py::test_third_derivative_raises",
    "tests/ops/test_gradient_norm_penalty.py::test_third_derivative_raises",
)

# ---- autograd ------------------------------------------------------------------------------------


@shows(
    "`torch.utils.checkpoint`, double backward included",
    "yes",
    "`use_reentrant=False` for penalties; running statistics see every computation, as with "
    "PyTorch's BatchNorm",
    "tests/fuse/test_no_pairs.py::test_checkpointed_pair",
)
def test_checkpoint():
    fused, plain = twins()
    x, results = images(), []
    for network in (fused, plain):

        def critic(x, network=network):
            return checkpoint(network, x, use_reentrant=False)

        loss = penalty(critic, x) + critic(x).mean()
        results.append([*gradients(network, loss), *network.buffers()])
    assert_close(*results)
    assert fused[3].num_batches_tracked > 2


@shows(
    "`torch.no_grad`, `torch.inference_mode`",
    "yes",
    "running statistics are updated in both; penalties accept tensors that were created there",
    "tests/functional/test_gradient_penalty_errors.py::test_inference_mode",
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    fused, plain = twins()
    x = images()
    with mode():
        for training in (True, False):
            y = fused.train(training)(x)
            assert_close([y], [plain.train(training)(x)])
            assert not y.requires_grad
    assert y.is_inference() is (mode is torch.inference_mode)
    assert_close(fused.buffers(), plain.buffers())
    with torch.inference_mode():
        kept = images()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        gk.nn.BatchNormLeakyReLU2d(3).double()(kept)


@shows("`torch.autograd.graph.save_on_cpu`, saved-tensor hooks", "yes")
def test_saved_tensor_hooks():
    fused, plain = twins()
    x = images()
    with torch.autograd.graph.save_on_cpu():
        loss = penalty(fused, x) + fused(x).mean()
    assert_close(gradients(fused, loss), gradients(plain, penalty(plain, x) + plain(x).mean()))


row(
    "Two forward passes before one backward",
    "yes",
    "even if running statistics are overwritten in between, as DistributedDataParallel does",
    "tests/ops/test_batch_norm_leaky_relu_autograd.py::test_two_forwards_before_one_backward",
)

# ---- copies and processes ------------------------------------------------------------------------

row(
    "`copy.deepcopy`, `pickle`, `torch.save`",
    "yes",
    "`gk.unfuse` works on the copies",
    "tests/fuse/test_fused_networks.py::test_copies",
    "tests/nn/test_minibatch.py::test_discrimination_state_dict_copy_and_pickle",
)
row(
    "`state_dict` from and to plain PyTorch",
    "yes",
    "the keys are the same",
    "tests/fuse/test_fused_networks.py::test_state_dict_goes_both_ways",
)
row(
    "Optimizers made before `gk.fuse`",
    "yes",
    "the parameters stay the same objects",
    "tests/fuse/test_fused_networks.py::test_an_optimizer_made_before_goes_on",
)
row(
    "`nn.utils.parametrizations.spectral_norm` and `weight_norm` on neighbors",
    "yes",
    "untouched; a parametrized BatchNorm is left alone",
    "tests/fuse/test_left_alone.py::test_norms_of_neighbors_stay",
    "tests/fuse/test_left_alone.py::test_parametrized_batch_norm",
)
row(
    "Code that looks for norms: `isinstance(m, nn.BatchNorm2d)`, `swa_utils.update_bn`, freezing, "
    "standing statistics",
    "yes",
    "the layers are BatchNorms, and a pair's activation stays a LeakyReLU or ReLU, whose slope may "
    "be set",
    "tests/test_drop_in.py::test_same_as_before",
    "tests/nn/test_batch_norm_leaky_relu.py::test_is_a_batch_norm_to_those_who_look_for_them",
)
row(
    "Code that replaces, copies or folds norms: `convert_sync_batchnorm`, `fuse_conv_bn_eval`, "
    "`setattr(m, name, nn.GroupNorm(...))`",
    "yes, by two layers again",
    "with a warning; to synchronize, set `sync`. A layer that `gk.fuse` has not made has no "
    "activation beside it: what copies or folds it raises. Not seen: a layer put in between, code "
    "that calls one of the two by itself",
    "tests/test_drop_in.py::test_same_as_before",
    "tests/test_drop_in.py::test_a_pair_that_comes_apart_says_so",
    "tests/test_drop_in.py::test_a_layer_of_its_own_is_not_taken_for_a_norm",
)
row(
    "Hooks on the pair's layers",
    "left alone, and reported",
    "registered later, they make a pair two layers again, with a warning; hooks on modules around "
    "them are fine",
    "tests/fuse/test_left_alone.py::test_hooks",
    "tests/fuse/test_left_alone.py::test_hooks_on_the_network_do_not_matter",
    "tests/test_drop_in.py::test_a_pair_that_comes_apart_says_so",
)
row(
    "`torch.fx.symbolic_trace` of fused networks",
    "yes",
    "every layer is one node, as before",
    "tests/test_drop_in.py::test_same_as_before",
    "tests/test_drop_in.py::test_layers_of_ours_in_a_trace",
)
row(
    "`nn.DataParallel`, `AveragedModel`, `torch.fx.GraphModule`",
    "yes",
    "",
    "tests/fuse/test_fused_networks.py::test_data_parallel_and_average",
    "tests/fuse/test_fused_networks.py::test_graph_modules",
)

DISTRIBUTED = """
import copy, os, sys
sys.path.insert(0, "tests")
import torch
from test_compatibility import assert_close, gradients, images, penalty, twins
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1
)
fused, plain = twins()
wrapped = torch.nn.parallel.DistributedDataParallel(fused)
real, fake = images(), images()
losses = [m(fake).mean() - m(real).mean() + penalty(m, real) for m in (wrapped, plain)]
fused[3].running_mean.add_(1)  # as the broadcast of buffers does where there are others
assert_close(gradients(fused, losses[0]), gradients(plain, losses[1]))
print("same gradients", flush=True)
os._exit(0)
"""


@shows(
    "`DistributedDataParallel`, several forward passes before one backward",
    "yes",
    "what it broadcasts into the running statistics in between disturbs nothing, since they are "
    "not saved",
    "tests/fuse/test_fused_networks.py::test_distributed_data_parallel",
)
def test_distributed_data_parallel(tmp_path, python):
    assert "same gradients" in python("-c", DISTRIBUTED, tmp_path / "store").stdout


PROCESSES = """
import multiprocessing, sys
sys.path.insert(0, "tests")
import torch
from test_compatibility import gradients, penalty, twins


def work(network, x):
    torch.set_num_threads(1)
    return [g.numpy() for g in gradients(network, penalty(network, x) + network(x).mean())]


if __name__ == "__main__":
    torch.set_num_threads(2)
    fused, _ = twins()
    fused.eval()
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    here = work(fused, x)
    torch.set_num_threads(2)
    big = torch.nn.Sequential(fused[3], torch.nn.Flatten())
    big(torch.randn(64, 5, 64, 64, dtype=torch.float64))  # starts the threads
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        there = pool.apply_async(work, (fused.requires_grad_(), x)).get(timeout=60)
    assert all((a == b).all() for a, b in zip(here, there, strict=True))
    print("same gradients")
"""


@shows(
    "`multiprocessing`, fork and spawn, kernels used before",
    "yes",
    "a forked process calls `torch.set_num_threads(1)` first, as a DataLoader's workers do: "
    "PyTorch's threads, which the kernels run on, do not survive a fork",
)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(method, tmp_path, python):
    (tmp_path / "script.py").write_text(PROCESSES)
    assert python(tmp_path / "script.py", method).stdout == "same gradients\n"


row(
    "`nn.SyncBatchNorm`",
    "yes",
    "becomes a layer with `sync=True`, which has both derivatives, on CPUs too; breaks a graph of "
    "`torch.compile`",
    "tests/fuse/test_left_alone.py::test_sync",
    "tests/nn/test_sync.py::test_processes_together_do_what_one_does",
)

# ---- export ------------------------------------------------------------------------------------

row(
    "`torch.jit.trace`",
    "yes",
    "contains plain PyTorch ops, as all exports do",
    "tests/fuse/test_fused_networks.py::test_export_has_none_of_our_ops",
)


@shows(
    "`torch.export`, evaluation and training",
    "yes",
    "plain PyTorch ops; the batch may be dynamic",
    "tests/fuse/test_fused_networks.py::test_export_has_none_of_our_ops",
)
@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    fused, plain = twins()
    fused, x = fused[:8].train(training), images()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(copy.deepcopy(fused), (x,), dynamic_shapes=dynamic)
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "aten.leaky_relu.default" in names
    assert any("batch_norm" in name for name in names)
    assert not any("gankernels" in name for name in names)
    assert_close([exported.module()(x[:4])], [plain[:8].train(training)(x[:4])])


@shows(
    "ONNX (`torch.onnx.export`), evaluation",
    "yes",
    "BatchNormalization and LeakyRelu nodes; the exporter merges a BatchNorm into a convolution "
    "before it, as it does without gankernels",
)
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
def test_onnx(dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    layers = [nn.BatchNorm2d(3), nn.LeakyReLU(0.2), nn.Conv2d(3, 4, 3), nn.ReLU(),
              nn.BatchNorm2d(4)]  # fmt: skip
    fused, plain = twins(lambda: nn.Sequential(*layers), torch.float32)
    x = images(dtype=torch.float32)
    fused(x), plain(x)  # running statistics other than the first ones
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, such as that torchvision is missing
        torch.onnx.export(fused.eval(), (x,), tmp_path / "fused.onnx", dynamo=dynamo, verbose=False)
    model = onnx.load(tmp_path / "fused.onnx")
    kinds = [node.op_type for node in model.graph.node if node.op_type != "Identity"]
    kinds = ["LeakyRelu" if kind == "Relu" else kind for kind in kinds]
    assert kinds == ["BatchNormalization", "LeakyRelu", "Conv", "LeakyRelu", "BatchNormalization"]
    assert {node.domain for node in model.graph.node} == {""}
    (found,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    assert_close([torch.from_numpy(found)], [plain.eval()(x)], 1e-5)


@shows(
    "`torch.jit.script`",
    "yes",
    "plain PyTorch ops; not in training with `sync=True`",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_script(momentum, tmp_path):
    fused, plain = twins()
    for network in (fused, plain):
        network[3].momentum = momentum
    described, norms = str(fused), (fused[3], fused[7])
    torch.jit.script(fused).save(tmp_path / "scripted.pt")
    scripted = torch.jit.load(tmp_path / "scripted.pt")
    assert str(fused) == described
    assert (fused[3], fused[7]) == norms
    assert scripted.state_dict().keys() == plain.state_dict().keys()
    for x in (images(6), images(5)):
        # From the second call on TorchScript differentiates by formulas of its own, less exact ones
        # for networks without a layer of ours too.
        assert_close(gradients(scripted, penalty(scripted, x) + scripted(x).mean()),
                     gradients(plain, penalty(plain, x) + plain(x).mean()), 1e-6)  # fmt: skip
        assert_close(scripted.buffers(), plain.buffers())
    assert_close([scripted.eval()(x)], [plain.eval()(x)])
    assert "gankernels::" not in str(torch.jit.freeze(scripted).inlined_graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_where_the_batch_is_that_of_several_processes():
    for layer, option in (
        (gk.nn.BatchNormLeakyReLU1d(3, sync=True), "sync"),
        (gk.nn.MinibatchDiscrimination(3, 2, 2, sync=True), "sync"),
    ):
        scripted, x = torch.jit.script(layer), torch.randn(5, 3)
        with pytest.raises(torch.jit.Error, match=f"cannot train with {option}=True"):
            scripted(x)
        assert_close([scripted.eval()(x)], [layer.eval()(x)], 1e-5)


# ---- devices -------------------------------------------------------------------------------------

row(
    "CUDA graphs",
    "yes, on CUDA",
    "ops through the second derivative, running statistics, whole training iterations",
    "tests/cuda/test_graphs.py::test_ops_forward_backward_and_double_backward",
    "tests/cuda/test_graphs.py::test_running_statistics",
    "tests/cuda/test_graphs.py::test_a_whole_training_iteration",
)
row(
    "Streams, several GPUs",
    "yes, on CUDA",
    "the current stream of the tensor's device; nothing waits for the device",
    "tests/cuda/test_streams.py::test_ops_run_on_the_current_stream",
    "tests/cuda/test_streams.py::test_ops_never_wait_for_the_device",
    "tests/cuda/test_streams.py::test_ops_run_on_the_device_of_their_tensors",
)
row(
    "Meta and fake tensors",
    "yes",
    "",
    "tests/fuse/test_pairs.py::test_devices",
    "tests/ops/test_batch_norm_leaky_relu_autograd.py::test_opcheck",
)
row(
    "Other devices: `mps`, `xpu`; CUDA tensors in a build without CUDA",
    "by PyTorch's ops",
    "with one warning",
    "tests/test_library.py::test_warns_once_on_a_device_without_kernels",
    "tests/test_library.py::test_warns_on_cuda_where_the_build_has_no_cuda",
)

# ---- the page ------------------------------------------------------------------------------------

BEGIN, END = "<!-- table: python tests/test_compatibility.py -->\n", "<!-- end -->\n"


def table():
    lines = ["| with | works | remarks | shown by |", "|---|---|---|---|"]
    for feature, (answer, remark, tests) in ROWS.items():
        links = []
        for test in dict.fromkeys(tests):
            path, name = test.split("::")
            links.append(f"[{name}](../{path})")
        lines.append(f"| {feature} | {answer} | {remark} | {', '.join(links)} |")
    return "\n".join(lines) + "\n"


def test_page_has_this_table():
    _, _, rest = PAGE.read_text().partition(BEGIN)
    assert rest.partition(END)[0] == table(), "run: python tests/test_compatibility.py"


@pytest.mark.parametrize("feature", ROWS)
def test_every_row_has_tests(feature):
    tests = ROWS[feature][2]
    assert tests
    for test in tests:
        path, name = test.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), test


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
    sys.exit()
