"""HalfWeights: what autocast computes, with weights that are cast when they change."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from gankernels.games import DataSpec, get
from gankernels.nn.cpu import OneDNNLinear
from gankernels.nn.cpu.linear import half_copies
from gankernels.optim import Adam
from gankernels.train import Config, Trainer
from gankernels.train import trainer as trainer_module
from gankernels.train.callback import Callback
from gankernels.train.half import HalfWeights
from gankernels.train.trainer import make_optimizer


def twins(*sizes):
    """Two equal networks."""
    layers = [OneDNNLinear(a, b) for a, b in itertools.pairwise(sizes)]
    network = nn.Sequential(*layers)
    return network, copy.deepcopy(network)


def derivatives(network, x):
    """Output, and first and second derivatives as a gradient penalty has them."""
    x = x.clone().requires_grad_()
    y = network(x)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    second = torch.autograd.grad(gradient.float().square().sum(), [x, *network.parameters()][:-1])
    return y, gradient, *second


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_autocast_computes(dtype):
    plain, network = twins(30, 17, 4)
    half = HalfWeights(network, dtype)
    x = torch.randn(5, 30)
    for _ in range(2):  # the second time with the same copies
        with torch.autocast("cpu", dtype):
            with half:
                ours = derivatives(network, x)
            theirs = derivatives(plain, x)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_weights_are_cast_when_told_and_only_then(monkeypatch):
    plain, network = twins(3, 2)
    half = HalfWeights(network, torch.bfloat16)
    copies = {p: half.of(p.requires_grad_(False)) for p in network.parameters()}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, network)]
    x = torch.randn(4, 3)
    for _ in range(3):
        for module, optimizer in zip((plain, network), optimizers, strict=True):
            owner = half if module is network else HalfWeights(module, None)
            with torch.autocast("cpu", torch.bfloat16), owner:
                module.requires_grad_(False)(x)
                (module.requires_grad_(True)(x) + module(x)).float().square().sum().backward()
            optimizer.step()
            owner.refresh_after(optimizer)
            optimizer.zero_grad()
    for p, q in zip(plain.parameters(), network.parameters(), strict=True):
        assert torch.equal(p, q)
        assert half.of(q.requires_grad_(False)) is copies[q]  # the same memory all the time
        assert torch.equal(copies[q], q.bfloat16())
    weight = network[0].weight
    weight.data.zero_()
    assert copies[weight].any()
    half.refresh([weight])
    assert not copies[weight].any()


def test_other_dtypes_and_devices_have_no_copies():
    network = nn.Sequential(OneDNNLinear(3, 2), nn.Linear(2, 2), OneDNNLinear(2, 2).double())
    half = HalfWeights(network, torch.bfloat16)
    copied = [half.of(p) is not p for p in network.parameters()]
    assert copied == [True, True, False, False, False, False]
    assert all(HalfWeights(network, None).of(p) is p for p in network.parameters())
    half = HalfWeights(network.to("meta"), torch.bfloat16)
    assert all(half.of(p) is p for p in network.parameters())


def test_outside_of_the_block_autocast_casts():
    """Also weights that were changed in a way that PyTorch does not count."""
    plain, network = twins(3, 2)
    half = HalfWeights(network, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), half:
        network(torch.ones(1, 3))
    for module in (plain, network):
        module[0].weight.data.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(torch.ones(1, 3)), plain(torch.ones(1, 3)))
    with torch.autocast("cpu", torch.float16), half:  # another dtype than that of the copies
        assert torch.equal(network(torch.ones(1, 3)), plain(torch.ones(1, 3)))


def test_owners_can_be_nested():
    _, network = twins(3, 2)
    outer, inner = HalfWeights(network, torch.bfloat16), HalfWeights(network, torch.bfloat16)
    with outer:
        with inner, inner:
            assert half_copies.get() is inner
        assert half_copies.get() is outer
    assert half_copies.get() is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_training_goes_on_after_a_look_at_the_samples(mode):
    plain, network = twins(3, 2)
    x = torch.randn(4, 3)
    for module in (plain, network):
        with torch.autocast("cpu", torch.bfloat16), HalfWeights(module, torch.bfloat16):
            if module is network:  # autocast of torch 2.10 caches casts without derivative itself
                with mode():
                    module(x)
            module(x).float().square().sum().backward()
    assert torch.equal(network[0].weight.grad, plain[0].weight.grad)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        layer = OneDNNLinear(3, 2)
        half = HalfWeights(layer, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), half, torch.no_grad():
        assert layer(torch.ones(1, 3)).dtype == torch.bfloat16


# ---- gradients in half precision -----------------------------------------------------------------


def served(**options):
    torch.manual_seed(0)
    layer = OneDNNLinear(3, 4, bias=False)
    optimizer = Adam(layer.parameters(), lr=0.1, **options)
    half = HalfWeights(layer, torch.bfloat16)
    half.serve(optimizer)
    return layer.weight, optimizer, half


def backward(p, half):
    p.grad = None
    (half.of(p).float().square().sum() + p.sum()).backward()


def test_gradients_stay_in_half_precision_for_the_step_alone():
    p, optimizer, half = served()
    copied = half.of(p).detach()
    for _ in range(2):  # what nobody took is not added to
        with half.gradients(optimizer):
            backward(p, half)
        assert torch.equal(p.grad, torch.ones(4, 3))
        assert torch.equal(optimizer.half_gradients[p], (2 * copied.float()).bfloat16())
    expected = nn.Parameter(p.detach().clone())
    expected.grad = copied.float() * 2 + 1
    optimizer.step()
    Adam([expected], lr=0.1).step()
    assert torch.equal(p, expected)
    assert torch.equal(half.of(p), p.bfloat16())
    backward(p, half)
    assert not optimizer.half_gradients


@pytest.mark.parametrize(
    "watch",
    [
        lambda p, o: p.register_hook(lambda g: g),
        lambda p, o: p.register_post_accumulate_grad_hook(lambda p: None),
        lambda p, o: o.register_step_pre_hook(lambda *_: None),
        lambda p, o: o.param_groups[0].update(maximize=True),  # then PyTorch makes the step
    ],
    ids=["hook", "post-accumulate hook", "step hook", "step of PyTorch"],
)
def test_who_looks_at_gradients_gets_float32(watch):
    p, optimizer, half = served()
    watch(p, optimizer)
    with half.gradients(optimizer):
        backward(p, half)
    assert not optimizer.half_gradients
    assert torch.equal(p.grad, half.of(p).detach().float() * 2 + 1)


def test_graphs_from_before_a_refresh_raise():
    p, _, half = served()
    square = (half.of(p) * half.of(p)).sum()
    half.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


# ---- in a trainer --------------------------------------------------------------------------------


@pytest.fixture
def without_copies(monkeypatch):
    """Lets trainers run without copies from when it is called on."""

    def remove():
        monkeypatch.setattr(trainer_module, "HalfWeights", lambda game, _: HalfWeights(game, None))

    return remove


def test_weights_are_cast_after_every_step_of_a_trainer(run, tmp_path, without_copies):
    """Adam's fused step, and clipping written as it often is, change weights behind their back."""

    def train(name):
        trainer = run("wgan-gp", precision="bf16", lr=1e-2, d_lr=1e-2, out=str(tmp_path / name))
        critic = trainer.players[0]

        def clip():
            for weight in critic.network.parameters():
                weight.data.clamp_(-0.02, 0.02)

        object.__setattr__(critic, "after_step", clip)
        for _ in range(3):
            trainer.iterate()
        return trainer.game

    kept = train("kept")
    without_copies()
    plain = train("plain")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, kept.state_dict()[name]), name


def clip(optimizer, *_):
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.data.clamp_(-0.02, 0.02)


class Clip(Callback):
    def on_step(self, trainer):
        for weight in trainer.game.parameters():
            weight.data.clamp_(-0.02, 0.02)


def scheduled(parameters, fused=True):
    optimizer = Adam(parameters, lr=1e-2, fused=fused)
    optimizer.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


@pytest.mark.parametrize(
    "how", ["nothing", "post-hook", "pre-hook", "callback", "scheduler", "shared"]
)
def test_a_trainer_in_bf16_computes_what_it_does_without_copies(
    how, run, tmp_path, monkeypatch, without_copies
):
    """Whatever else changes weights, looks at gradients or moves the same parameters."""

    def train(name):
        torch.manual_seed(0)
        trainer = run("wgan-gp", precision="bf16", steps=3, log_every=2, out=str(tmp_path / name))
        critic = trainer.players[0].name
        optimizer = trainer.optimizers[critic]
        norms = []
        if how == "post-hook":
            optimizer.register_step_post_hook(clip)
        elif how == "pre-hook":
            parameters = trainer.parameters[critic]
            optimizer.register_step_pre_hook(
                lambda *_: norms.append(nn.utils.clip_grad_norm_(parameters, 0.1).item())
            )
        elif how == "callback":
            trainer.callbacks.append(Clip())
            trainer.has_user_callbacks = True
        trainer.fit()
        return [*norms, *trainer.game.state_dict().values()]

    if how in ("scheduler", "shared"):
        inner = trainer_module.make_optimizer

        def make(player, parameters):
            if how == "scheduler":
                return scheduled(parameters)
            if player.name == "generator":
                return inner(player, parameters)
            return torch.optim.AdamW(parameters, lr=1e-2)

        monkeypatch.setattr(trainer_module, "make_optimizer", make)
    kept = train("kept")
    without_copies()
    for ours, theirs in zip(kept, train("plain"), strict=True):
        assert ours == theirs if isinstance(ours, float) else torch.equal(ours, theirs)


def test_gradients_that_a_game_asks_for_are_float32(run):
    trainer = run("cgan", precision="bf16")
    player = trainer.players[0]
    inner, seen = player.loss, []
    weight = next(p for p in player.network.parameters() if p.dim() == 2)

    def loss(batch, rng):
        terms = inner(batch, rng)
        (gradient,) = torch.autograd.grad(sum(terms.values()), weight, retain_graph=True)
        seen.append(gradient.dtype)
        return terms

    object.__setattr__(player, "loss", loss)
    trainer.iterate()
    assert seen == [torch.float32]
    assert {p.grad for p in trainer.game.parameters()} == {None}
    # And after training: anything that PyTorch has trains the networks on.
    for p in player.network.parameters():
        p.requires_grad_(True)
    batch = trainer.batches.draw()
    with torch.autocast("cpu", torch.bfloat16):
        sum(player.loss(batch, trainer.rng).values()).backward()
    assert {p.grad.dtype for p in player.network.parameters()} == {torch.float32}


class Unrolled(get("gan")):
    """The generator plays against the discriminator after a step of its own (Metz et al. 2017)."""

    def players(self):
        discriminator, generator = super().players()
        inner = generator.loss

        def loss(batch, rng):
            terms = inner(batch, rng)
            current = dict(self.discriminator.named_parameters())
            start = {name: p.detach().requires_grad_() for name, p in current.items()}
            call = partial(torch.func.functional_call, self.discriminator)
            fake = self.generator(self.noise(batch.size, rng))
            step = call(start, fake.detach()).sigmoid().sum()
            gradients = torch.autograd.grad(step, list(start.values()), create_graph=True)
            moved = {n: p - 0.1 * g for (n, p), g in zip(start.items(), gradients, strict=True)}
            return {**terms, "unrolled": -call(moved, fake).mean()}

        object.__setattr__(generator, "loss", loss)
        return [discriminator, generator]


def test_functional_calls_in_a_loss(digits, tmp_path, monkeypatch, without_copies):
    """They compute what they should, and the copies of the real parameters stay in use."""

    def train(name):
        torch.manual_seed(0)
        settings = {"batch_size": 16, "device": "cpu", "precision": "bf16"}
        config = Config(out=str(tmp_path / name), **settings)
        trainer = Trainer(Unrolled(DataSpec(1, 8, 10)), digits, config)
        before = dict(trainer.optimizers["discriminator"].copies)
        for _ in range(3):
            trainer.iterate()
        return trainer, before

    trainer, before = train("copies")
    assert len(before) == 6
    read = []
    inner = HalfWeights.of
    monkeypatch.setattr(
        HalfWeights, "of", lambda self, p: read.append((p, copy := inner(self, p))) or copy
    )
    trainer.iterate()
    used = {p for p, copied in read if copied.dtype == torch.bfloat16}
    assert before.keys() <= used
    for p, copied in trainer.optimizers["discriminator"].copies.items():
        assert copied is before[p]
        assert torch.equal(copied, p.detach().bfloat16())
    without_copies()
    plain, copies = train("plain")
    assert not copies
    plain.iterate()
    for name, value in plain.game.state_dict().items():
        assert torch.equal(value, trainer.game.state_dict()[name]), name


def test_networks_hold_nothing_of_it(run):
    trainer = run("cgan", precision="bf16")
    before = [set(vars(m)) for m in trainer.game.modules()]
    trainer.iterate()
    assert [set(vars(m)) for m in trainer.game.modules()] == before
    for again in (copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))):
        twin = again(trainer.game.generator)
        assert all(trainer.half_weights.of(p) is p for p in twin.parameters())
        for p, q in zip(twin.parameters(), trainer.game.generator.parameters(), strict=True):
            assert torch.equal(p, q)


def test_weights_may_change_between_iterations(run, tmp_path, without_copies):
    def train(name):
        torch.manual_seed(0)
        trainer = run("cgan", precision="bf16", out=str(tmp_path / name))
        for _ in range(2):
            trainer.iterate()
            Clip().on_step(trainer)
        return trainer.game.state_dict()

    ours = train("copies")
    without_copies()
    for name, value in train("plain").items():
        assert torch.equal(value, ours[name]), name


def test_pytorchs_stays_what_it_is(run):
    trainer = run("cgan")
    factory = partial(torch.optim.Adam, lr=0.1)
    object.__setattr__(trainer.players[0], "optimizer", factory)
    parameters = trainer.parameters[trainer.players[0].name]
    assert type(make_optimizer(trainer.players[0], parameters)) is torch.optim.Adam


def test_a_trainer_takes_it(run):
    trainer = run("cgan", precision="bf16")
    assert {type(o) for o in trainer.optimizers.values()} == {Adam}
    trainer.iterate()
    generator = trainer.optimizers["generator"]
    weight = trainer.game.generator.layers[0].weight
    assert torch.equal(generator.copies[weight], weight.detach().bfloat16())
