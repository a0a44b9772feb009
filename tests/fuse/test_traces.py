"""Tracing has no side effects."""

import collections
import copy
import functools
import logging
import random
import warnings
from typing import ClassVar

import numpy as np
import torch
import torch.utils.checkpoint
from fusing import Net, fused, images
from torch import nn

import gankernels as gk


class Writing(Net):
    def __init__(self, **layers):
        super().__init__(**layers)
        self.register_buffer("u", torch.zeros(4))
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        self.last = x
        self.conv.last = x
        with torch.no_grad():
            self.u.add_(1)
        noise = torch.randn(4, 1, 1)
        return self.act(self.bn(self.conv(x))) + noise * 0


def test_nothing_is_written_or_drawn():
    network = Writing(act=nn.ReLU())
    before = copy.deepcopy(network.state_dict())
    attributes = [set(vars(m)) for m in network.modules()]
    state = torch.get_rng_state()
    assert fused(network)[0].startswith("fused bn with act")
    assert torch.equal(torch.get_rng_state(), state)
    assert network.steps == 0
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    added = [set(vars(m)) - old for m, old in zip(network.modules(), attributes, strict=True)]
    assert set.union(*added) == {"negative_slope", "_before_fusion"}


COUNTED, LATEST = [], {}


@functools.lru_cache
def remembered(x):
    return x


def helper(x, kept=[]):  # noqa: B006
    helper.calls = getattr(helper, "calls", 0) + 1
    kept.append(x)


def counter():
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        return calls

    return count


class Holder:
    __slots__ = ("__dict__", "slot")
    total = 0


class WritingEverywhere(Net):
    kept_by_class: ClassVar = []

    def __init__(self, **layers):
        super().__init__(**layers)
        self.register_buffer("u", torch.zeros(4))
        self.steps, self.once = torch.zeros(2), [self.conv.bias]
        self.list, self.set, self.deque = [], set(), collections.deque(maxlen=2)
        self.ordered = collections.OrderedDict(a=1, b=2)
        self.nested, self.counts = {"x": [[]]}, collections.Counter()
        self.holder, self.array, self.count = Holder(), np.zeros(2), counter()
        self.numbers = [torch.Generator(), random.Random(1), np.random.default_rng(1)]

    def forward(self, x):
        global COUNTED
        COUNTED = [*COUNTED, x]
        LATEST["x"] = x
        self.list.append(x), self.set.add(x), self.deque.append(x)
        self.ordered.move_to_end("a")
        self.nested["x"][0].append(x)
        self.nested["y"] = self.counts["n"] = x
        self.kept_by_class.append(x)
        Holder.total += 1
        self.holder.x = self.holder.slot = x
        self.array += 1
        self.steps[0] += 1
        self.once[0].data.clamp_(0, 1e-3)
        torch.rand(1, generator=self.numbers[0]), self.numbers[1].random(), self.numbers[2].random()
        torch.rand(1), random.random(), np.random.rand()
        remembered(x), helper(x), self.count()
        warnings.warn("seen", stacklevel=2)
        logging.getLogger("x").error("logged")
        print("printed")
        torch.set_grad_enabled(False)
        return self.act(self.bn(self.conv(x)))

    def state(self):
        first, second, third = self.numbers
        return str([
            COUNTED, LATEST, self.list, self.set, self.deque, self.ordered, self.nested,
            self.counts, self.kept_by_class, Holder.total, vars(self.holder),
            hasattr(self.holder, "slot"), self.array, self.steps, self.once, first.get_state(),
            second.getstate(), third.bit_generator.state, torch.get_rng_state(), random.getstate(),
            np.random.get_state(), remembered.cache_info().currsize, helper.__defaults__,
            vars(helper), self.count.__closure__[0].cell_contents, warnings.filters,
            torch.is_grad_enabled(), self.u,
        ])  # fmt: skip


def test_no_trace_is_left_anywhere(capfd):
    network = WritingEverywhere(act=nn.ReLU())
    before = network.state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines = []
        gk.fuse(network, log=lines.append)
    assert lines[0].startswith("fused bn with act")
    assert network.state() == before
    assert not caught
    assert capfd.readouterr() == ("", "")
    network(images())
    torch.set_grad_enabled(True)
    assert network.state() != before
