"""A trainer does not change its arguments, nor global state of the process."""

import os
import random
import signal
import threading
import warnings
from functools import partial

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

from gankernels import _threads as cpus
from gankernels._shard import per_sample, shard
from gankernels.games import DataSpec, Game, Player, get
from gankernels.nn.cpu import OneDNNLinear
from gankernels.nn.cpu.linear import half_copies
from gankernels.train import Callback, Config, Trainer
from gankernels.train.half import HalfWeights


class Mine(Game):
    """With a frozen encoder and a dropout in evaluation mode, as a constructor may leave them."""

    name = "mine"

    def __init__(self, spec, options=None):
        super().__init__(spec, options)
        n = spec.channels * spec.size**2
        self.generator = Generator(n, spec.image_shape)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(n, 16), nn.BatchNorm1d(16))
        self.encoder = encoder.requires_grad_(False).eval()
        self.discriminator = nn.Sequential(
            nn.Linear(16, 4), nn.Dropout(0.5).eval(), nn.Linear(4, 1)
        )
        self.discriminator[0].bias.requires_grad = False
        self.fail = False

    def players(self):
        adam = partial(torch.optim.Adam, lr=1e-2)
        players = (self.discriminator, self.judge), (self.generator, self.fool)
        return [Player(loss.__name__, network, loss, adam) for network, loss in players]

    def judge(self, batch, rng):
        assert not any(p.requires_grad for p in self.generator.parameters())
        fake = self.fake(batch.labels, rng)
        return {"real": -self.score(batch.images), "fake": self.score(fake)}

    def fool(self, batch, rng):
        assert not any(p.requires_grad for p in self.discriminator.parameters())
        if self.fail:
            raise KeyError("enough")
        return {"adversarial": -self.score(self.fake(batch.labels, rng))}

    def score(self, images):
        return self.discriminator(self.encoder(images)).tanh().mean()


class Generator(nn.Module):
    """With noise of its own, from PyTorch's default generator."""

    def __init__(self, n, shape):
        super().__init__()
        self.shape = shape
        self.net = nn.Sequential(nn.Linear(100, n), nn.BatchNorm1d(n), nn.Tanh())

    def forward(self, z, labels=None):
        return self.net(z + 0.1 * torch.randn_like(z)).view(-1, *self.shape)


@pytest.fixture
def make(digits, tmp_path):
    def trainer(game=None, callbacks=(), own=False, **settings):
        torch.manual_seed(0)
        game = game or Mine(DataSpec(1, 8, 10))
        settings = {"steps": 4, "batch_size": 8, "log_every": 2, "sample_every": 2} | settings
        config = Config(out=str(tmp_path / str(random.random())), device="cpu", **settings)
        made = Trainer(game, digits, config, callbacks)
        if not own:
            made.callbacks = list(callbacks)
        return made

    return trainer


def modes(game):
    return {name: module.training for name, module in game.named_modules()}


def flags(game):
    return {name: p.requires_grad for name, p in game.named_parameters()}


class Watch(Callback):
    """Sees modes and flags as they were between any two iterations."""

    def __init__(self, game):
        self.game, self.seen = game, []

    def on_step(self, trainer):
        self.seen.append((modes(self.game), flags(self.game)))

    def on_samples(self, trainer, path):
        self.on_step(trainer)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_modes_and_flags_are_the_caller_s(make, precision):
    game = Mine(DataSpec(1, 8, 10))
    before = modes(game), flags(game)
    assert len(set(before[0].values())) == len(set(before[1].values())) == 2
    frozen = {k: v.clone() for k, v in game.state_dict().items() if k.startswith("encoder.")}
    bias = game.discriminator[0].bias.clone()
    watch = Watch(game)
    make(game, [watch], precision=precision).fit()
    assert len(watch.seen) == 7
    assert all(seen == before for seen in [*watch.seen, (modes(game), flags(game))])
    assert all(game.state_dict()[name].equal(value) for name, value in frozen.items())
    assert game.discriminator[0].bias.equal(bias)
    assert all(p.grad is None for p in game.parameters())


def test_also_after_an_exception(make):
    game = Mine(DataSpec(1, 8, 10))
    before = modes(game), flags(game)
    game.fail = True
    trainer = make(game)
    with pytest.raises(KeyError, match="enough"):
        trainer.fit()
    assert (modes(game), flags(game)) == before
    with pytest.raises(KeyError), trainer.sampling():
        raise KeyError
    assert (modes(game), flags(game)) == before
    assert game.generator is not trainer.ema["generator"]


def test_what_a_callback_freezes_stays_frozen(make):
    class Freeze(Callback):
        def on_step(self, trainer):
            if trainer.step == 2:
                layer = trainer.game.discriminator[2].requires_grad_(False).eval()
                self.kept = layer.weight.clone()

    freeze = Freeze()
    trainer = make(callbacks=[freeze])
    trainer.fit()
    layer = trainer.game.discriminator[2]
    assert layer.weight.equal(freeze.kept)
    assert not layer.weight.requires_grad
    assert not layer.training


def test_stale_gradients_take_no_part(make):
    one, other = make(), make()
    for p in one.game.parameters():
        p.grad = torch.full_like(p, 100.0)
    for trainer in (one, other):
        torch.manual_seed(1)
        trainer.iterate()
    for p, q in zip(one.game.parameters(), other.game.parameters(), strict=True):
        assert p.equal(q)


def test_a_game_in_evaluation_mode_is_told_of(make):
    game = Mine(DataSpec(1, 8, 10)).eval()
    with pytest.warns(UserWarning, match="in evaluation mode and stays so: .* game.train"):
        make(game).iterate()
    assert not any(module.training for module in game.modules())


def test_looking_at_samples_changes_nothing(make):
    """Not even where networks draw from PyTorch's default generator as they please."""
    seen, unseen = make(sample_every=1), make(sample_every=0)
    for trainer in (seen, unseen):
        torch.manual_seed(1)
        trainer.fit()
    for p, q in zip(seen.game.parameters(), unseen.game.parameters(), strict=True):
        assert p.equal(q)
    path = seen.run / "again.png"
    seen.save_samples(path)
    assert path.read_bytes() == (seen.run / "samples.png").read_bytes()


def state_of_the_process():
    return {
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "tf32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "python's random numbers": random.getstate(),
        "numpy's": str(np.random.get_state()),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "warnings": list(warnings.filters),
        "half copies": half_copies.get(),
        "matplotlib": dict(matplotlib.rcParams),
    }


def test_the_process_is_as_it_was(make, monkeypatch):
    monkeypatch.setattr(cpus, "available", lambda: 1)
    torch.set_num_threads(2)
    trainer = make(own=True, precision="bf16")
    inside = []
    trainer.callbacks.append(type("Look", (Callback,), {})())
    trainer.callbacks[-1].on_step = lambda trainer: inside.append(torch.get_num_threads())
    before = state_of_the_process()
    trainer.fit()
    assert inside == [1] * 4
    now = state_of_the_process()
    assert before.keys() == now.keys()
    for name, value in before.items():
        assert now[name] == value, name


def test_trainers_in_threads_leave_no_flag_and_do_not_mix(make, capsys):
    """Each computes what it computes alone, and nothing of the process is left changed."""
    torch.set_num_threads(1)

    def trainer(seed, own):
        torch.manual_seed(seed)
        game = get("gan")(DataSpec(1, 8, 10))
        settings = {"precision": "bf16", "steps": 30, "sample_every": 0, "seed": seed}
        return make(game, own=own, **settings)

    alone, together = [[trainer(seed, own) for seed in range(3)] for own in (False, True)]
    for one in alone:
        one.fit()
    before = state_of_the_process()
    threads = [threading.Thread(target=one.fit) for one in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state_of_the_process() == before
    for one, other in zip(alone, together, strict=True):
        assert other.step == 30
        for p, q in zip(one.game.parameters(), other.game.parameters(), strict=True):
            assert p.equal(q)


def test_what_belongs_to_a_thread():
    """Half-precision copies and parts of a batch are those of the thread that trains."""
    entered, leave = threading.Event(), threading.Event()

    half = HalfWeights(OneDNNLinear(2, 2), torch.bfloat16)

    def other():
        with HalfWeights(OneDNNLinear(2, 2), torch.bfloat16), shard(1, 2):
            entered.set()
            leave.wait(10)

    draw = torch.arange
    thread = threading.Thread(target=other)
    with half, shard(0, 3):
        thread.start()
        assert entered.wait(10)
        assert per_sample(draw, 2).tolist() == [0, 1]
        with shard(2, 3):
            assert per_sample(draw, 2).tolist() == [4, 5]
        assert half_copies.get() is half
    assert half_copies.get() is None
    assert per_sample(draw, 2).tolist() == [0, 1]
    leave.set()
    thread.join()
    assert half_copies.get() is None


def test_compiled_code_follows_the_part():
    compiled = torch.compile(
        lambda x: x + per_sample(torch.arange, 2), fullgraph=True, backend="eager"
    )
    zero = torch.zeros(2)
    assert compiled(zero).tolist() == [0, 1]
    with shard(1, 2):
        assert compiled(zero).tolist() == [2, 3]
    assert compiled(zero).tolist() == [0, 1]


def test_no_class_is_changed(make):
    """Neither of layers nor of optimizers, before, during and after a run."""
    trainer = make(precision="bf16")
    assert type(trainer.game.discriminator[0]) is nn.Linear

    def types():
        return [type(m) for m in trainer.game.modules()]

    seen = []
    trainer.callbacks.append(type("Look", (Callback,), {})())
    trainer.callbacks[-1].on_step = lambda trainer: seen.append(types())
    before = types()
    trainer.fit()
    assert seen == [before] * 4
    assert types() == before
    assert {type(o) for o in trainer.optimizers.values()} == {torch.optim.Adam}
