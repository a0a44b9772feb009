"""Random calls of all ops and public functions, in child processes.

    python tests/ops/fuzz.py --calls 100000        (`make fuzz`)

Whatever is passed, a call ends with a result or an exception, never with a signal. Half of the
calls are valid: their results must be those of plain PyTorch, or of the same op in float64. No call
changes what it only reads, and one that is refused changes nothing. Ops are found by their schemas
and public functions by their signatures, so a new one is called too, with values by type where the
names of its arguments are not known here.

Every call is determined by the seed and its number. Children are forked from a process that has not
computed anything yet, one for each batch of calls. A child that dies has reported the number of
its call before.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import inspect
import json
import math
import mmap
import os
import random
import resource
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.fx.experimental.symbolic_shapes  # which autograd would import, in every child
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import gankernels as gk
from gankernels.ops import batch_norm_leaky_relu as bn
from gankernels.ops.record import records

BATCH = 400
SECONDS_PER_BATCH = 120
MEMORY = 2 << 30  # more than any call needs that can succeed
HALVES = (torch.bfloat16, torch.float16)
FLOATING = (torch.float32, torch.float64, *HALVES)
HUGE = (2**31, 2**33 + 1, 2**40, 2**62)
TYPES = (TypeError, ValueError, RuntimeError)  # NotImplementedError and out of memory among them
PUBLIC_TYPES = (*TYPES, IndexError)  # PyTorch's own, for empty batches and from critics


# ---- valid arguments -----------------------------------------------------------------------------


class Scene:
    """The sizes and dtypes that the arguments of one call have in common."""

    def __init__(self, rng: random.Random, op: str) -> None:
        self.rng, self.op = rng, op
        self.dtype = rng.choice(FLOATING)
        self.half = self.dtype in HALVES
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.parameter_dtype = rng.choice((self.dtype, torch.float32)) if self.half else self.dtype
        # Now and then there is work for several threads, and for whole vectors.
        large = rng.random() < 0.1
        self.n = rng.choice((16, 33, 64)) if large else rng.choice((0, 1, 1, 2, 3, 4, 5, 8))
        self.c = rng.choice((16, 40, 67)) if large else rng.choice((0, 1, 1, 2, 3, 6, 8, 17))
        sizes = (4, 9) if large else (0, 1, 1, 2, 3, 5)
        rest = [rng.choice(sizes) for _ in range(rng.choice((0, 0, 1, 2, 2, 3)))]
        if "discrimination" in op:
            rest = [rng.choice((0, 1, 2, 5, 16))]
        self.shape = (self.n, self.c, *rest)
        if "stddev" in op:
            self.shape = tuple(max(1, size) for size in self.shape)
        if "penalty" in op and rng.random() < 0.1:
            self.shape = (self.n,)
        self.n, self.c = self.shape[0], self.shape[1] if len(self.shape) > 1 else 1
        divisors = [d for d in range(1, self.c + 1) if self.c % d == 0]
        self.num_channels = rng.choice(divisors) if divisors else 1
        self.group_size = rng.choice((1, 2, 3, 4, 4, 100, sys.maxsize))
        self.groups = -(-self.n // self.group_size)

    def tensor(self, shape, dtype=None, *, positive=False, dense=False) -> Tensor:
        """Of random numbers and, unless `dense`, of random strides."""
        values = torch.rand(shape, dtype=torch.float64)
        values = (values + 0.5 if positive else 2 * values - 1).to(dtype or self.dtype)
        return values if dense else self.laid_out(values)

    def laid_out(self, values: Tensor) -> Tensor:
        rng, dims = self.rng, values.dim()
        way = rng.randrange(8)
        if way == 0 and dims:
            order = rng.sample(range(dims), dims)
            back = [order.index(d) for d in range(dims)]
            return values.permute(order).contiguous().permute(back)
        if way == 1 and dims >= 3:
            return values.movedim(1, -1).contiguous().movedim(-1, 1)
        if way == 2 and dims:
            wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), 7)
            wide[..., 1::2] = values
            return wide[..., 1::2]
        if way == 3 and dims and values.numel():
            d = rng.randrange(dims)
            return values.narrow(d, 0, 1).expand(values.shape)
        if way == 4:
            around = values.new_full((values.numel() + 5,), 7)
            around[3:-2] = values.flatten()
            return around[3:-2].view(values.shape)
        return values

    def argument(self, name: str, kind: str):
        """What may be passed for an argument of this name, or by its type."""
        rng, c = self.rng, self.c
        optional = kind.startswith("Optional") and rng.random() < 0.5
        if optional and name != "momentum":
            return None
        if name in ("weight", "bias"):
            return self.tensor((c,), self.parameter_dtype)
        if name in ("running_mean", "running_var"):
            # Not expanded, being written.
            values = self.tensor((c,), self.parameter_dtype, positive=name.endswith("var"))
            return values if c < 2 or values.stride(0) else values.contiguous()
        made = {
            "statistics": lambda: self.tensor((2, c), self.wide, positive=True),
            "sums": lambda: self.tensor((5 if "double" in self.op else 2, c), self.wide),
            "grad_grad_weight": lambda: self.tensor((c,), self.wide),
            "grad_grad_bias": lambda: self.tensor((c,), self.wide),
            "num_batches_tracked": lambda: torch.tensor(rng.choice((0, 3, 2**40))),
            "momentum": lambda: rng.choice((0.1, 0.0, 1.0, 0.5)),
            "count": lambda: float(rng.choice((2, 3.0, max(2, math.prod(self.shape))))),
            "eps": lambda: rng.choice((1e-5, 1e-3, 0.1)),
            "negative_slope": lambda: rng.choice((0.0, 0.2, 1.0, -0.5)),
            "grad_o": lambda: self.tensor(self.shape[:2]),
            "grad_penalty": lambda: self.tensor((), self.wide),
            "squared_norms": lambda: self.tensor(self.shape[:1], self.wide, positive=True),
            "center": lambda: rng.choice((1.0, 0.0, 0.5)),
            "kind": lambda: rng.randrange(3),
            "group_size": lambda: self.group_size,
            "num_channels": lambda: self.num_channels,
            "grad_stddev": lambda: self.tensor((self.groups, self.num_channels), self.wide),
            "lr": lambda: 0.01,
            "beta1": lambda: rng.choice((0.0, 0.5, 0.9)),
            "beta2": lambda: 0.99,
            "weight_decay": lambda: rng.choice((0.0, 0.1)),
        }
        if name in made:
            return made[name]()
        return {
            "Tensor": lambda: self.tensor(self.shape),
            "int": lambda: rng.randrange(4),
            "float": rng.random,
            "bool": lambda: rng.random() < 0.5,
            "List[Tensor]": lambda: [self.tensor(self.shape) for _ in range(rng.randrange(4))],
        }.get(kind.removeprefix("Optional[").removesuffix("]"), lambda: None)()

    def adam(self) -> list:
        """Its first six arguments, which belong together: dense and in the same layout."""
        rng = self.rng
        lists: list[list] = [[] for _ in range(6)]
        for _ in range(rng.randrange(1, 5)):
            shape = rng.choice([(), (3,), (0, 3), (3, 0), (17, 5), (2, 3, 4, 1), (130, 70)])
            order = rng.sample(range(len(shape)), len(shape))
            back = [order.index(d) for d in range(len(shape))]

            def made(dtype, positive=False, shape=shape, order=order, back=back):
                values = self.tensor(shape, dtype, positive=positive, dense=True)
                return values.permute(order).contiguous().permute(back)

            cast = made(torch.bfloat16) if rng.random() < 0.3 else torch.empty(0)
            step = torch.tensor(float(rng.choice((0, 1, 7, 2**25)))).reshape(
                rng.choice([(), (1,), (1, 1)])
            )
            gradient = self.tensor(shape, rng.choice((torch.float32, torch.bfloat16, self.dtype)))
            made_now = (
                made(torch.float32), gradient, made(torch.float32), made(torch.float32, True),
                step, cast,
            )  # fmt: skip
            for values, value in zip(lists, made_now, strict=True):
                values.append(value)
        return lists


def arguments_of(scene: Scene, schema) -> list:
    values = [scene.argument(a.name, str(a.type)) for a in schema.arguments]
    names = [a.name for a in schema.arguments]
    if names[:2] == ["parameters", "gradients"]:
        values[:6] = scene.adam()
    if "momentum" in names and scene.rng.random() < 0.3:
        cumulative = values[names.index("num_batches_tracked")] is not None
        values[names.index("momentum")] = None if cumulative else 0.1
    if scene.op == "batch_norm_leaky_relu" and math.prod(scene.shape) == 0:
        values[names.index("statistics")] = scene.tensor((2, scene.c), scene.wide, positive=True)
    return values


# ---- and what is wrong ---------------------------------------------------------------------------


def wrong(rng: random.Random, value, others: list):
    """Something else than `value`, of any kind."""
    if isinstance(value, list):
        return wrong_list(rng, value, others)
    if isinstance(value, Tensor) or (value is None and rng.random() < 0.5):
        return wrong_tensor(rng, value if value is not None else torch.ones(3), others)
    numbers = (
        -1, 0, 1, 2, 5, 2**31, sys.maxsize, -sys.maxsize - 1, 2**64, 3.5, 0.0, -1.0, 1e300,
        math.nan, math.inf, -math.inf, True, None, "4", torch.ones(3), torch.tensor(2), [1], 1j,
    )  # fmt: skip
    return rng.choice(numbers)


def wrong_list(rng: random.Random, values: list, others: list):
    way = rng.randrange(8)
    if values and way < 4:
        values = list(values)
        i = rng.randrange(len(values))
        values[i] = wrong_tensor(rng, values[i], others)
        return values
    if way == 4:
        return values[:-1]
    if way == 5:
        return values + values[:1] + [torch.ones(3)]
    if way == 6 and values:
        return [values[0]] * len(values)
    return rng.choice(([], None, torch.ones(3), [torch.ones(3)], [None], 3))


def resized(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def huge(rng: random.Random, t: Tensor) -> Tensor:
    shape = [rng.choice((1, 2, 3)) for _ in range(t.dim() or 1)]
    shape[rng.randrange(len(shape))] = rng.choice(HUGE)
    if rng.random() < 0.2:
        shape[rng.randrange(len(shape))] = 0
    return t.new_ones(1).expand(shape)


def other_shape(rng: random.Random, t: Tensor) -> Tensor:
    shape = list(t.shape)
    way = rng.randrange(6)
    if way == 0 or not shape:
        shape.insert(rng.randrange(len(shape) + 1), rng.choice((1, 2)))
    elif way == 1:
        del shape[rng.randrange(len(shape))]
    elif way == 2:
        shape = rng.choice(([], [1], [0], [2, 2, 2, 2, 2, 2, 2], [1] * 6))
    elif way == 3:
        rng.shuffle(shape)
    else:
        d = rng.randrange(len(shape))
        shape[d] = rng.choice((0, 1, shape[d] + 1, max(0, shape[d] - 1), 2 * shape[d]))
    return torch.zeros(shape, dtype=t.dtype)


def wrapped(t: Tensor) -> Tensor:
    """A subclass without memory of its own that lets every op through to the kernels."""

    class Wrapper(Tensor):
        @staticmethod
        def __new__(cls):
            return Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, device=t.device)

        __torch_dispatch__ = torch._C._disabled_torch_dispatch_impl

    return Wrapper()


DTYPES = (
    *FLOATING, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool,
)  # fmt: skip
WAYS = [
    lambda rng, t, others: t.to(rng.choice(DTYPES)),
    lambda rng, t, others: t.to(rng.choice(DTYPES)),
    lambda rng, t, others: other_shape(rng, t),
    lambda rng, t, others: other_shape(rng, t),
    lambda rng, t, others: other_shape(rng, t),
    lambda rng, t, others: huge(rng, t),
    lambda rng, t, others: t.to("meta"),
    lambda rng, t, others: t.float().to_sparse(),
    lambda rng, t, others: t.float().reshape(2, -1).to_sparse_csr(),
    lambda rng, t, others: t.float().to_mkldnn(),
    lambda rng, t, others: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda rng, t, others: torch.nested.nested_tensor([t, t]),
    lambda rng, t, others: torch._neg_view(t),
    lambda rng, t, others: torch.complex(t, t).conj().imag,
    lambda rng, t, others: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    lambda rng, t, others: wrapped(t),
    lambda rng, t, others: nn.Parameter(t),
    lambda rng, t, others: t.numpy(),
    lambda rng, t, others: t.reshape(-1)[:1].expand(t.shape),
    lambda rng, t, others: t.reshape(-1)[:1].expand(t.shape),
    lambda rng, t, others: torch.full_like(t, rng.choice((math.nan, math.inf, -1, 3e38))),
    lambda rng, t, others: rng.choice(others),
    lambda rng, t, others: rng.choice(others),
    lambda rng, t, others: None,
    lambda rng, t, others: rng.choice((1, 1.0, "x", [], [t])),
]


def wrong_tensor(rng: random.Random, t: Tensor, others: list):
    """Another tensor, or none at all."""
    if not is_plain(t) or t.is_neg():
        t = torch.ones(3)  # PyTorch itself does not survive all combinations
    for _ in range(5):
        try:
            return rng.choice(WAYS)(rng, t, others or [t])
        except Exception:  # not to be had of this one
            continue
    return torch.ones(1)


# ---- one call of an op ---------------------------------------------------------------------------


def op_names() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted({n.split("::")[1].split(".")[0] for n in names if n.startswith("gankernels::")})


def tensors_in(values) -> list[Tensor]:
    found = []
    for value in values:
        found += tensors_in(value) if isinstance(value, list | tuple) else [value]
    return [v for v in found if isinstance(v, Tensor)]


def is_plain(t: Tensor) -> bool:
    return (
        type(t) in (Tensor, nn.Parameter)
        and t.device.type == "cpu"
        and t.layout == torch.strided
        and not t.is_nested
        and not t.is_quantized
        and t.numel() < 10**6
        and (t.numel() == 0 or t.untyped_storage().nbytes() > 0)
        and not torch._is_zerotensor(t)
    )


def snapshot(values) -> list[tuple[Tensor, Tensor]]:
    """The whole storage of everything, to be compared later."""
    kept = []
    for t in tensors_in(values):
        if is_plain(t):
            whole = torch.empty(0, dtype=torch.uint8).set_(t.detach().untyped_storage())
            kept.append((whole, whole.clone()))
    return kept


def changed(kept) -> bool:
    return not all(torch.equal(now, before) for now, before in kept)


def call_op(rng: random.Random, names: list[str]) -> str:
    """Returns what came of it; raises AssertionError for what should not have."""
    name = rng.choice(names)
    op = getattr(torch.ops.gankernels, name).default
    scene = Scene(rng, name)
    values = arguments_of(scene, op._schema)
    valid = rng.random() < 0.5
    if not valid:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if values:
                i = rng.randrange(len(values))
                values[i] = wrong(rng, values[i], tensors_in(values))
        if values and isinstance(values[0], Tensor) and is_plain(values[0]) and rng.random() < 0.05:
            values[0] = resized(values[0])  # which PyTorch's own ops do not survive
    mutable = [
        value
        for argument, value in zip(op._schema.arguments, values, strict=True)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    describe.now = lambda: f"torch.ops.gankernels.{name}({', '.join(map(describe, values))})"
    everything = snapshot(values)
    written = {whole.data_ptr() for whole, _ in snapshot(mutable)}
    read = [(whole, kept) for whole, kept in everything if whole.data_ptr() not in written]
    expected = oracle(name, op, values) if valid else None
    on_meta = any(t.is_meta for t in tensors_in(values))  # there Python computes the shapes
    try:
        results = op(*values)
    except Exception as error:
        if not isinstance(error, TYPES) and not on_meta:
            raise
        assert not valid, "a valid call was refused:\n" + traceback.format_exc()
        # PyTorch's way of passing a tensor with its negative bit set to an op that writes to it
        # fails after the op.
        if not any(t.is_neg() for t in tensors_in(mutable)):
            assert not changed(everything), "a call that was refused has changed something"
        return f"{name} refused"
    assert not changed(read), "a call has changed what it only reads"
    if expected is not None:
        results = tensors_in(results if isinstance(results, tuple | list) else [results])
        compare(results + tensors_in(mutable), expected, scene)
    return f"{name} accepted"


def compare(results: list[Tensor], expected: list[Tensor | None], scene: Scene) -> None:
    assert len(results) == len(expected), (len(results), len(expected))
    for i, (result, e) in enumerate(zip(results, expected, strict=True)):
        if e is None:
            continue
        assert result.shape == e.shape, (result.shape, e.shape)
        dtypes = {result.dtype, scene.dtype, scene.parameter_dtype}
        tolerance = 2e-2 if dtypes & set(HALVES) else 2e-4
        result, e = result.double(), e.double()
        finite = e.isfinite()
        assert torch.equal(result.isfinite(), finite), f"result {i}: {result} for {e}"
        error = (result - e)[finite].norm()
        allowed = tolerance * (e[finite].norm() + finite.sum() ** 0.5 + 0.01)
        assert error <= allowed, f"result {i} is off by {error:g}: {result} for {e}"


# ---- what it should be ---------------------------------------------------------------------------


def in_float64(value):
    if isinstance(value, list):
        return [in_float64(v) for v in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double().contiguous().clone()
    return value.clone() if isinstance(value, Tensor) else value


def oracle(name: str, op, values: list) -> list[Tensor | None] | None:
    """The results, then what has been written; None among them for what is not compared."""
    if name == "cpu_capability":
        return None
    values = [in_float64(value) for value in values]
    if name in REFERENCES:
        return REFERENCES[name](*values)
    results = op(*values)
    return list(results) if isinstance(results, tuple | list) else [results]


def batch_norm(x, weight, bias, statistics, eps, slope, first):
    if statistics is not None:
        y = None  # PyTorch takes some empty batches only
        if x.numel():
            y = bn.reference(x, *statistics, weight, bias, False, 0.0, eps, slope, first)
        return [y, torch.empty(0)]
    u = nn.functional.leaky_relu(x, slope) if first else x
    others = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(u, others, correction=0)
    y = None
    if x.numel() > x.shape[1]:
        y = bn.reference(x, None, None, weight, bias, True, 0.0, eps, slope, first)
    return [y, torch.stack((mean, var))]


def updated(mean, var, counter, statistics, momentum, count):
    counted = [] if counter is None else [counter + 1]
    share = 1 / counted[0] if momentum is None else momentum
    unbiased = statistics[1] * (count / (count - 1))
    return [mean.lerp(statistics[0], share), var.lerp(unbiased, share), *counted]


def adam(ps, gs, ms, vs, steps, casts, lr, beta1, beta2, eps, decay):
    ps, gs, ms, vs = (list(ts) for ts in (ps, gs, ms, vs))
    steps = [step + (step < 2**24) for step in steps]  # which is as far as float32 counts
    for i, step in enumerate(steps):
        g = gs[i] + decay * ps[i]
        ms[i] = beta1 * ms[i] + (1 - beta1) * g
        vs[i] = beta2 * vs[i] + (1 - beta2) * g * g
        root = (vs[i] / (1 - beta2 ** step.item())).sqrt() + eps
        ps[i] = ps[i] - lr / (1 - beta1 ** step.item()) * ms[i] / root
    written = [p if cast.numel() else cast for p, cast in zip(ps, casts, strict=True)]
    return [*ps, *ms, *vs, *steps, *written]


REFERENCES = {
    "batch_norm_leaky_relu": batch_norm,
    "update_running_statistics": updated,
    "adam_": adam,
    **{
        name: op.kernel_reference
        for name, op in records().items()
        if op.kernel_reference is not None
    },
}


# ---- one call of the public layer ----------------------------------------------------------------


def public_names() -> list[str]:
    return [f"functional.{n}" for n in gk.functional.__all__] + [f"nn.{n}" for n in gk.nn.__all__]


# Arguments whose values do not follow from the names above.
PUBLIC = {
    "kind": lambda s: s.rng.choice(("wgan-gp", "wgan-lp", "dragan", "r1", "r2")),
    "alpha": lambda s: s.tensor(s.shape[:1]),
    "critic": lambda s: s.rng.choice((lambda x: x.flatten(1).square().sum(1), nn.Identity(), 3)),
    "method": lambda s: "exact",
    "generator": lambda s: None,
    "critic_args": lambda s: (),
    "process_group": lambda s: None,
    "sync": lambda s: False,
    "device": lambda s: None,
    "dtype": lambda s: s.parameter_dtype,
    "num_features": lambda s: s.c,
    "in_features": lambda s: s.c,
    "num_kernels": lambda s: s.rng.choice((0, 1, 3, 17)),
    "kernel_dim": lambda s: s.rng.choice((0, 1, 2, 5)),
    "training": lambda s: s.rng.random() < 0.5,
    "affine": lambda s: s.rng.random() < 0.7,
    "track_running_stats": lambda s: s.rng.random() < 0.7,
}


def call_public(rng: random.Random, names: list[str]) -> str:
    name = rng.choice(names)
    place, attribute = name.split(".")
    function = getattr(getattr(gk, place), attribute)
    scene = Scene(rng, attribute)
    values = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        optional = "None" in str(parameter.annotation)
        kind = "Optional[Tensor]" if optional else "Tensor"
        made = PUBLIC.get(parameter.name, lambda s, p=parameter, k=kind: s.argument(p.name, k))
        if parameter.default is parameter.empty or rng.random() < 0.6:
            values[parameter.name] = made(scene)
    for _ in range(rng.choice((0, 0, 1, 2))):
        if values:
            key = rng.choice(list(values))
            values[key] = wrong(rng, values[key], tensors_in(values.values()))
    described = [f"{key}={describe(value)}" for key, value in values.items()]
    describe.now = lambda: f"{name}({', '.join(described)})"
    try:
        if place == "functional":
            differentiated(rng, lambda: function(**values), tensors_in(values.values()))
        else:
            call_layer(rng, function(**values), scene, described)
    except PUBLIC_TYPES:
        return f"{name} refused"
    return f"{name} accepted"


def call_layer(rng: random.Random, layer: nn.Module, scene: Scene, described: list[str]) -> None:
    layer.train(rng.random() < 0.7)
    if rng.random() < 0.2:
        cast = rng.choice(FLOATING)
        layer = layer.type(cast) if rng.random() < 0.5 else layer.to(cast)
        described.append(f"cast to {cast}")
    for tensors in (layer._buffers, layer._parameters):
        for key, value in list(tensors.items()):
            if value is not None and rng.random() < 0.1:
                other = wrong_tensor(rng, value.detach().clone(), [])
                described.append(f"with {key} {describe(other)}")
                if isinstance(other, Tensor):
                    tensors[key] = nn.Parameter(other) if tensors is layer._parameters else other
    x = scene.tensor(scene.shape, rng.choice((scene.parameter_dtype, scene.dtype)))
    if rng.random() < 0.2:
        other = wrong_tensor(rng, x, [])
        x = other if isinstance(other, Tensor) else x
    described.append(f"of {describe(x)}")
    inputs = [x, *layer.parameters()]
    differentiated(rng, lambda: layer(x), inputs)


def differentiated(rng: random.Random, function, inputs: list[Tensor]) -> None:
    """Calls it, and takes the first and second derivatives of what it returns."""
    inputs = [t for t in inputs if t.is_leaf and (t.is_floating_point() or t.is_complex())]
    for t in inputs:
        t.requires_grad_(rng.random() < 0.7)
    y = function()
    wanted = [t for t in inputs if t.requires_grad]
    if not isinstance(y, Tensor) or not y.requires_grad or not wanted:
        return
    grads = torch.autograd.grad(y.sum(), wanted, create_graph=True, allow_unused=True)
    total = [g.square().sum() for g in grads if g is not None and g.requires_grad]
    if total:
        torch.autograd.grad(sum(total), wanted, allow_unused=True)


# ---- processes -----------------------------------------------------------------------------------


def describe(value) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(describe, value)) + "]"
    if not isinstance(value, Tensor):
        return repr(value)[:60]
    if value.is_nested or value.layout != torch.strided:
        return f"<{value.dtype} {value.layout} nested: {value.is_nested}>"
    return f"<{value.dtype} {tuple(value.shape)} strides {value.stride()} on {value.device}>"


def run_batch(what: str, seed: int, first: int, last: int, progress) -> dict:
    """In a child: the calls from `first` on. What went wrong has its number with it."""
    names = {"ops": op_names, "public": public_names}[what]()
    call = {"ops": call_op, "public": call_public}[what]
    counts: collections.Counter = collections.Counter()
    wrongs = []
    torch.set_num_threads(1 + first // BATCH % 2)
    for number in range(first, last):
        progress[:8] = number.to_bytes(8, "little")
        torch.default_generator.manual_seed(number)  # a tenth of what torch.manual_seed takes
        try:
            counts[call(random.Random(f"{what} {seed} {number}"), names)] += 1
        except BaseException as error:
            what_happened = f"{describe.now()}: {type(error).__name__}: {error}"
            if not isinstance(error, AssertionError):
                what_happened += traceback.format_exc()[-600:]
            wrongs.append(f"call {number}: {what_happened}"[:2000])
    return {"counts": counts, "wrong": wrongs}


def child(what: str, seed: int, first: int, last: int, progress, pipe: int) -> None:
    faulthandler.disable()
    signal.alarm(SECONDS_PER_BATCH)
    quiet = os.open(os.devnull, os.O_WRONLY)  # PyTorch's own reports of what it throws
    os.dup2(quiet, 2)
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # whose shadow is larger than any limit
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = json.dumps(run_batch(what, seed, first, last, progress)).encode()
    with os.fdopen(pipe, "wb") as file:
        file.write(answer)


def fuzz(what: str, seed: int, calls: int) -> dict:
    """Counts of `calls` calls: accepted, refused, signals, and what else went wrong."""
    counts: collections.Counter = collections.Counter()
    signals, wrongs = [], []
    progress = mmap.mmap(-1, mmap.PAGESIZE)
    first = 0
    while first < calls:
        last = min(calls, (first // BATCH + 1) * BATCH)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(reading)
                child(what, seed, first, last, progress, writing)
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            answer = file.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            report = json.loads(answer)
            counts.update(report["counts"])
            wrongs += report["wrong"]
            first = last
            continue
        number = int.from_bytes(progress[:8], "little")
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        signals.append(f"call {number} of {what} with seed {seed}: {name}")
        first = number + 1  # what the batch had counted before is lost
    return {
        "calls": calls,
        "accepted": sum(n for key, n in counts.items() if key.endswith("accepted")),
        "refused": sum(n for key, n in counts.items() if key.endswith("refused")),
        "signals": signals,
        "wrong": wrongs,
        "counts": dict(sorted(counts.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=100_000, help="of ops")
    parser.add_argument("--public", type=int, default=20_000, help="calls of the public layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", help="call only this one, here: ops:NUMBER or public:NUMBER")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        what, number = options.one.split(":")
        report = run_batch(what, options.seed, int(number), int(number) + 1, bytearray(8))
        sys.exit(print(describe.now(), "\n", *report["wrong"], dict(report["counts"]), sep="\n"))
    report = {
        "ops": fuzz("ops", options.seed, options.calls),
        "public": fuzz("public", options.seed, options.public),
    }
    print(json.dumps(report, indent=1))
    sys.exit(any(r["signals"] or r["wrong"] for r in report.values()))


if __name__ == "__main__":
    main()
