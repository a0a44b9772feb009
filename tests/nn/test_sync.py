"""Synchronized layers: several processes with parts of a batch compute the same as one.

A case is run by processes that are started once for the whole file, each on its rows, and by this
process on all rows. The results of the processes are combined by the first word of their names:
rows are concatenated, sums are added, others are equal in all processes or come from the first.
"""

import copy
import datetime
import functools
import pickle
import traceback

import pytest
import torch
from torch import distributed as dist
from torch import nn

import gankernels as gk

pytestmark = pytest.mark.every_device

WORLD = 3
HALVES, UNEQUAL, EMPTY = (4, 4), (5, 1, 2), (5, 0, 3)
CASES = {}


def case(*splits, slow=False, **options):
    """Makes `function(share, **options)` a case, once for each way of splitting the batch."""

    def register(function):
        words = [function.__name__, *(f"{k}={v}" for k, v in options.items())]
        for sizes in splits or (HALVES,):
            name = "-".join((*words, "+".join(map(str, sizes))))
            CASES[name] = (functools.partial(function, **options), sizes, slow)
        return function

    return register


class Share:
    """What a process has of the batch. The parts are those whose losses it adds up itself."""

    def __init__(self, sizes, rank, group, alone):
        self.sizes, self.rank, self.group, self.alone = sizes, rank, group, alone
        starts = [sum(sizes[:r]) for r in range(len(sizes) + 1)]
        self.start, self.end = (0, sum(sizes)) if rank is None else starts[rank : rank + 2]
        self.ranks = range(len(sizes)) if rank is None else [rank]
        self.parts = [slice(starts[r] - self.start, starts[r + 1] - self.start) for r in self.ranks]

    def random(self, *shape, dtype=torch.float64):
        """Its rows of a random batch, (N, *shape), which is not centered."""
        return (torch.randn(sum(self.sizes), *shape, dtype=dtype) + 0.7)[self.start : self.end]


def penalised(share, layer, x, penalise_weights=False):
    """Output, first and second derivatives, and the buffers afterwards."""
    target = share.random(*layer(x.detach()).shape[1:], dtype=x.dtype)
    x.requires_grad_()
    y = layer(x)
    parameters = list(layer.parameters())
    losses = [((y - target).square() * target)[part].sum() for part in share.parts]
    first = torch.autograd.grad(sum(losses), [x, *parameters], create_graph=True)
    norms = first[0].flatten(1).square().sum(1)
    penalty = (norms - 1).square().sum() / 100
    if penalise_weights:  # by factors that are not the same in all processes
        for rank, loss in zip(share.ranks, losses, strict=True):
            own = torch.autograd.grad(loss, parameters, create_graph=True)
            penalty = penalty + (1 + rank) * sum(g.square().sum() for g in own)
    second = torch.autograd.grad(penalty, [x, *parameters])
    result = {"rows y": y, "rows grad_x": first[0], "rows second_x": second[0]}
    for i in range(len(parameters)):
        result[f"sum grad_{i}"] = first[1 + i]
        result[f"sum second_{i}"] = second[1 + i]
    return result | {f"same {name}": buffer.clone() for name, buffer in layer.named_buffers()}


# ---- cases: batch norm ---------------------------------------------------------------------------

SHAPES = {"1d": (3,), "2d": (3, 4, 5), "3d": (3, 2, 3, 2)}


def batch_norm(share, order, dimensions="2d", dtype=torch.float64, **options):
    options = {"sync": True, "process_group": share.group, "dtype": dtype, **options}
    layer = getattr(gk.nn, f"{order}{dimensions}")(3, **options)
    if layer.affine:
        nn.init.normal_(layer.weight, 1)
        nn.init.normal_(layer.bias)
    return layer, share.random(*SHAPES[dimensions], dtype=dtype)


def both_orders(*splits, **options):
    def register(function):
        for order in ("BatchNormLeakyReLU", "LeakyReLUBatchNorm"):
            case(*splits, order=order, **options)(function)
        return function

    return register


@both_orders(HALVES, UNEQUAL, EMPTY, backend="auto")
@both_orders(HALVES, UNEQUAL, EMPTY, backend="reference")
def derivatives(share, order, backend):
    with gk.use_backend(backend):
        return penalised(share, *batch_norm(share, order))


@both_orders(HALVES, EMPTY, backend="auto")
@both_orders(HALVES, backend="reference")
def penalty_on_weight_gradients(share, order, backend):
    with gk.use_backend(backend):
        return penalised(share, *batch_norm(share, order), penalise_weights=True)


@both_orders(HALVES, UNEQUAL, EMPTY)
def channels_last(share, order):
    layer, x = batch_norm(share, order)
    x = x.to(memory_format=torch.channels_last)
    result = penalised(share, layer, x)
    assert result["rows y"].is_contiguous(memory_format=torch.channels_last)
    return result


@both_orders(HALVES, UNEQUAL, EMPTY, dimensions="1d")  # with one row, and so one value per channel
@both_orders(HALVES, UNEQUAL, dimensions="3d")
@both_orders(HALVES, affine=False)
@both_orders(HALVES, track_running_stats=False)
@both_orders(UNEQUAL, momentum=None)
@both_orders(UNEQUAL, momentum=1.0, negative_slope=1.0, eps=0.1)
def options(share, **options):
    return penalised(share, *batch_norm(share, **options))


@both_orders(UNEQUAL, backend="auto")
@both_orders(UNEQUAL, backend="reference")
def running_statistics(share, order, backend):
    """Three steps of a cumulative average, then evaluation by one process alone."""
    layer, _ = batch_norm(share, order, momentum=None)
    with gk.use_backend(backend), torch.no_grad():
        for _ in range(3):
            layer(share.random(*SHAPES["2d"]))
        x = share.random(*SHAPES["2d"])[share.parts[0]]
        y = x if share.rank else layer.eval()(x)
    return {"first y": y} | {f"same {name}": buffer for name, buffer in layer.named_buffers()}


@both_orders(UNEQUAL, dtype=torch.float32)
@both_orders(UNEQUAL, dtype=torch.bfloat16)
def in_less_precision(share, order, dtype):
    layer, x = batch_norm(share, order, dtype=torch.float32)
    x = x.to(dtype).requires_grad_()
    y = layer(x)
    (y.float().square() * share.random(*SHAPES["2d"]).float()).sum().backward()
    assert y.dtype is x.grad.dtype is dtype
    return {"rows y": y, "rows grad": x.grad, "same mean": layer.running_mean}


@both_orders(HALVES)
def mean_far_from_zero(share, order):
    layer, x = batch_norm(share, order, dtype=torch.float32, momentum=1.0)
    layer(x + 3000)
    return {"same var": layer.running_var}


@case(HALVES)
def strange_strides(share):
    layer, x = batch_norm(share, "BatchNormLeakyReLU")
    x = x.transpose(2, 3).requires_grad_()
    (layer(x)[:, :, ::2].sum(3).square() * 3).sum().backward()
    return {"rows grad": x.grad, "sum weight": layer.weight.grad}


@case(HALVES)
def gradients_not_needed(share):
    """The first process wants its input's gradient, the second one does not."""
    layer, x = batch_norm(share, "BatchNormLeakyReLU")
    weights = share.random(*SHAPES["2d"])
    x.requires_grad_(share.rank != 1)
    (layer(x).square() * weights).sum().backward()
    grad = x if x.grad is None else x.grad
    return {"sum weight": layer.weight.grad, "first grad": grad[share.parts[0]]}


@case(HALVES)
def collectives(share):
    """As many as are promised, whether somebody asks for all gradients or for one."""
    layer, x = batch_norm(share, "BatchNormLeakyReLU")
    if share.rank is None:
        return {"same": torch.tensor([[1, 0], [0, 1], [0, 1]] * 2)}
    calls, counted, target = [0, 0], [], x.detach().clone()
    originals = dist.all_gather, dist.all_reduce

    def counting(i):
        def call(*args, **kwargs):
            calls[i] += 1
            return originals[i](*args, **kwargs)

        return call

    def note():
        counted.append([*calls])
        calls[:] = [0, 0]

    dist.all_gather, dist.all_reduce = counting(0), counting(1)
    try:
        for wanted in ([x, layer.weight, layer.bias], [layer.bias]):
            for tensor in (x, layer.weight, layer.bias):
                tensor.requires_grad_(any(tensor is t for t in wanted))
            y = layer(x)
            note()
            first = torch.autograd.grad((y * target).sum(), wanted, create_graph=True)
            note()
            torch.autograd.grad(first[0].square().sum(), wanted, allow_unused=True)
            note()
    finally:
        dist.all_gather, dist.all_reduce = originals
    return {"same": torch.tensor(counted)}


@case(HALVES)
def one_process_of_a_group(share):
    return alike(share, share.alone)


@case(HALVES)
def evaluation_without_running_statistics(share):
    """By the statistics of the process' own batch, as SyncBatchNorm."""
    return alike(share, share.group, training=False, track_running_stats=False)


def alike(share, group, training=True, **options):
    """Whether a layer that might synchronize gives bits of one that cannot."""
    layer, x = batch_norm(share, "BatchNormLeakyReLU", process_group=group, **options)
    other = gk.nn.BatchNormLeakyReLU2d(3, dtype=torch.float64, **options)
    other.load_state_dict(layer.state_dict())
    both = []
    for m in (layer, other):
        x = x.detach().requires_grad_()
        y = m.train(training)(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        both.append([y, grad, x.grad, m.weight.grad, *m.buffers()])
    return {"same": torch.tensor(all(map(torch.equal, *both)))}


@case(HALVES)
def third_derivative(share):
    return refuses_third_derivative(*batch_norm(share, "BatchNormLeakyReLU"))


def refuses_third_derivative(layer, x):
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x, create_graph=True)
    try:
        torch.autograd.grad(second.square().sum(), x)
    except RuntimeError as error:
        return {"same": torch.tensor("a third derivative was asked for" in str(error))}
    return {"same": torch.tensor(False)}


@case(HALVES)
def networks_of_many_layers(share):
    """The order of collectives is the same wherever gradients join."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            new = functools.partial(batch_norm, share)
            self.a, _ = new("BatchNormLeakyReLU")
            self.b, _ = new("LeakyReLUBatchNorm")
            self.c, _ = new("BatchNormLeakyReLU")
            self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False, dtype=torch.float64)

        def forward(self, x):
            x = self.a(self.conv(x))
            return self.b(x) + self.c(self.conv(x)) * x

    return penalised(share, Network(), share.random(*SHAPES["2d"]))


@case(HALVES)
def functional_gradient(share):
    layer, x = batch_norm(share, "BatchNormLeakyReLU", track_running_stats=False)
    target = share.random(*SHAPES["2d"])
    return {"rows grad": torch.func.grad(lambda x: (layer(x) * target).square().sum())(x)}


@case(HALVES, UNEQUAL)
def fused(share):
    """SyncBatchNorm itself needs GPUs, so the whole batch has BatchNorm."""
    layers = [nn.SyncBatchNorm(3, process_group=share.group), nn.LeakyReLU(0.1)]
    layers += [nn.ReLU(), nn.SyncBatchNorm(3, momentum=None, process_group=share.group)]
    if share.rank is None:
        layers = [nn.BatchNorm2d(3), layers[1], layers[2], nn.BatchNorm2d(3, momentum=None)]
    network = nn.Sequential(*layers[:2], nn.Conv2d(3, 3, 1, bias=False), *layers[2:]).double()
    return penalised(share, gk.fuse(network), share.random(*SHAPES["2d"]))


# ---- cases: minibatch discrimination -------------------------------------------------------------


@case(HALVES, UNEQUAL, EMPTY, backend="auto")
@case(HALVES, UNEQUAL, EMPTY, backend="reference")
def discrimination(share, backend):
    layer = gk.nn.MinibatchDiscrimination(
        6, 5, 2, dtype=torch.float64, sync=True, process_group=share.group
    )
    with gk.use_backend(backend):
        return penalised(share, layer, share.random(6))


@case(UNEQUAL)
def discrimination_in_half_precision(share):
    layer = gk.nn.MinibatchDiscrimination(6, 5, 2, sync=True, process_group=share.group)
    layer.bfloat16()
    x = share.random(6).bfloat16().requires_grad_()
    layer(x).sum().backward()
    return {"rows y": layer(x), "rows grad": x.grad}


@case(UNEQUAL)
def discrimination_in_evaluation(share):
    layer = gk.nn.MinibatchDiscrimination(6, 5, 2, sync=True, process_group=share.group).eval()
    x = share.random(6).float()
    return {"rows y": torch.cat([layer(x[part]) for part in share.parts])}


@case(HALVES)
def third_derivative_of_discrimination(share):
    layer = gk.nn.MinibatchDiscrimination(
        6, 5, 2, dtype=torch.float64, sync=True, process_group=share.group
    )
    return refuses_third_derivative(layer, share.random(6))


# ---- cases: both in one network, as users run it. PyTorch takes seconds to import what these need.


class Together(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False, dtype=torch.float64)
        self.norm, _ = batch_norm(share, "BatchNormLeakyReLU")
        self.discrimination = gk.nn.MinibatchDiscrimination(
            60, 2, 2, dtype=torch.float64, sync=True, process_group=share.group
        )

    def forward(self, x):
        return self.discrimination(self.norm(self.conv(x)).flatten(1))


@case(HALVES, slow=True)
def distributed_data_parallel(share):
    network, x = Together(share), share.random(*SHAPES["2d"])
    wrapped, scale = network, 1
    if share.rank is not None:
        wrapped = nn.parallel.DistributedDataParallel(network, process_group=share.group)
        scale = len(share.sizes)  # it averages
    for _ in range(2):
        wrapped(x).square().sum().backward()
    result = {f"same grad {name}": p.grad * scale for name, p in network.named_parameters()}
    return result | {f"same {name}": buffer for name, buffer in network.named_buffers()}


@case(HALVES, slow=True)
def compiled(share):
    network, x = Together(share), share.random(*SHAPES["2d"])
    called = network if share.rank is None else torch.compile(network, backend="aot_eager")
    for _ in range(2):
        y = called(x.requires_grad_())
        y.square().sum().backward()
    result = {f"sum {name}": p.grad for name, p in network.named_parameters()}
    return result | {"rows y": y, "rows grad": x.grad, "same": network.norm.running_var}


# ---- the processes -------------------------------------------------------------------------------


def work(rank, folder, device, slow):
    """One of the processes: its results of all cases that are slow, or are not."""
    torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" and torch.cuda.device_count() >= WORLD else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.set_default_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    groups = {WORLD: None, 2: dist.new_group([0, 1])}
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    results = {}
    for name, (function, sizes, is_slow) in CASES.items():
        if rank >= len(sizes) or slow is not is_slow:
            continue
        torch.manual_seed(0)
        try:
            results[name] = detached(function(Share(sizes, rank, groups[len(sizes)], alone)))
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def detached(result):
    return {name: tensor.detach() for name, tensor in result.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """`results(device, slow)`: for each process, its results by the names of the cases."""

    @functools.cache
    def run(device, slow):
        folder = tmp_path_factory.mktemp("processes")
        torch.multiprocessing.spawn(work, (str(folder), device, slow), nprocs=WORLD)
        return [torch.load(folder / f"{rank}.pt", map_location=device) for rank in range(WORLD)]

    return run


def put_together(how, tensors):
    if how == "rows":
        return torch.cat(tensors)
    if how == "sum":
        return sum(tensors)
    assert how == "first" or all(torch.equal(t, tensors[0]) for t in tensors)
    return tensors[0]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if CASES[n][2] else ()) for n in CASES]
)
def test_processes_together_do_what_one_does(name, results, device):
    function, sizes, slow = CASES[name]
    torch.manual_seed(0)
    whole = detached(function(Share(sizes, None, None, None)))
    parts = [result[name] for result in results(device, slow)[: len(sizes)]]
    for part in parts:
        assert not isinstance(part, str), part
        assert part.keys() == whole.keys()
    for key, expected in whole.items():
        actual = put_together(key.split()[0], [part[key] for part in parts])
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2}.get(expected.dtype, 1e-10)
        scale = max(1, expected.double().abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def test_cases_can_fail(results, device):
    """Statistics of one's own part of the batch are something else."""
    name = "derivatives-order=BatchNormLeakyReLU-backend=auto-4+4"
    function, sizes, _ = CASES[name]
    torch.manual_seed(0)
    share = Share(sizes, 0, None, None)  # no processes, so each is by itself
    by_itself, first = function(share), results(device, False)[0][name]
    for key, tensor in by_itself.items():
        if key != "same num_batches_tracked":
            assert (tensor - first[key]).abs().max() > 1e-3, key


# ---- without other processes ---------------------------------------------------------------------

NORMS = [f"{order}{d}d" for order in ("BatchNormLeakyReLU", "LeakyReLUBatchNorm") for d in "123"]


@pytest.mark.parametrize("name", NORMS)
def test_layers_that_synchronize_look_as_others(name):
    layer, other = getattr(gk.nn, name)(3, sync=True), getattr(gk.nn, name)(3)
    assert (layer.sync, other.sync, other.process_group) == (True, False, None)
    assert repr(layer) == repr(other)[:-1] + ", sync=True)"
    assert list(layer.state_dict()) == list(other.state_dict())
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert twin.sync is True


def test_discrimination_that_synchronizes_looks_as_others():
    layer, other = (gk.nn.MinibatchDiscrimination(4, 3, 2, sync=g) for g in (True, False))
    assert (layer.sync, other.sync, other.process_group) == (True, False, None)
    assert repr(layer) == repr(other)[:-1] + ", sync=True)"
    assert list(layer.state_dict()) == list(other.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert twin.sync is True


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nothing_changes_without_processes(name, training, backend):
    layer = getattr(gk.nn, name)(3, sync=True)
    other = getattr(gk.nn, name)(3)
    x = torch.randn(4, 3, *(2, 3, 2)[: int(name[-2]) if name[-2] != "1" else 0])
    with gk.use_backend(backend):
        y, expected = (m.train(training)(x) for m in (layer, other))
    assert torch.equal(y, expected)
    assert torch.equal(layer.running_var, other.running_var)


def test_one_value_per_channel_without_processes():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        gk.nn.BatchNormLeakyReLU1d(3, sync=True)(torch.randn(1, 3))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda **options: gk.nn.BatchNormLeakyReLU2d(3, **options), "sync"),
        (lambda **options: gk.nn.LeakyReLUBatchNorm1d(3, **options), "sync"),
        (lambda **options: gk.nn.MinibatchDiscrimination(3, 4, 2, **options), "sync"),
    ],
)
def test_wrong_arguments(make, name):
    with pytest.raises(TypeError, match=f"{name} must be a bool, got str"):
        make(**{name: "yes"})
    with pytest.raises(TypeError, match=r"process_group must be .* got list"):
        make(**{name: True}, process_group=[0, 1])
    make(**{name: True}, process_group=dist.GroupMember.NON_GROUP_MEMBER)
