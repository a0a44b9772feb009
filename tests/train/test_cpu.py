"""Faster layers on CPU: the same functions, derivatives and checkpoints."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gankernels.train import cpu
from gankernels.train import trainer as trainer_module
from gankernels.train.callback import Callback
from gankernels.train.cpu import accelerate, use_casts


class Own(nn.Linear):
    """A layer of somebody else's."""


def both(network):
    """The network and an accelerated copy."""
    faster = copy.deepcopy(network)
    accelerate(faster)
    return network, faster


def derivatives(network, x):
    """Output, and first and second derivatives as a gradient penalty has them."""
    x = x.clone().requires_grad_()
    y = network(x)
    parameters = [p for p in network.parameters() if p.requires_grad]
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    second = torch.autograd.grad(gradient.float().square().sum(), [x, *parameters])
    return y, gradient, *second


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def products(request, monkeypatch):
    monkeypatch.setattr(cpu, "onednn_is_faster", lambda: request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 30), (1, 30), (4, 3, 30)])
def test_linear(products, bias, shape):
    network = nn.Sequential(nn.Linear(30, 17, bias=bias), nn.Tanh(), nn.Linear(17, 4, bias=bias))
    plain, faster = both(network)
    x = torch.randn(shape)
    for ours, theirs in zip(derivatives(faster, x), derivatives(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # Strides that are not those of a matrix.
    x = torch.randn(30, 5).t()
    torch.testing.assert_close(faster(x), plain(x))
    x = torch.randn(30).expand(5, 30)
    torch.testing.assert_close(faster(x), plain(x))
    torch.testing.assert_close(faster.double()(x.double()), plain.double()(x.double()))


@pytest.mark.skipif(not cpu.onednn_is_faster(), reason="MKL has AVX-512 kernels for this processor")
def test_products_go_through_onednn():
    layer = nn.Linear(4, 4)
    accelerate(layer)
    assert "_Product" in type(layer(torch.ones(2, 4)).grad_fn.next_functions[0][0]).__name__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_under_autocast_is_what_autocast_makes_of_it(dtype):
    plain, faster = both(nn.Sequential(nn.Linear(30, 17), nn.Tanh(), nn.Linear(17, 4)))
    x = torch.randn(5, 30)
    for _ in range(2):  # the second time with what was cast the first time
        with torch.autocast("cpu", dtype), use_casts():
            results = derivatives(faster, x), derivatives(plain, x)
        for ours, theirs in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_weights_are_cast_when_they_change_and_only_then(monkeypatch):
    plain, faster = both(nn.Linear(3, 2))
    casts = []
    inner = cpu.Cast.refresh

    def count(cast):
        casts.append(cast)
        inner(cast)

    monkeypatch.setattr(cpu.Cast, "refresh", count)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, faster)]
    x = torch.randn(4, 3)
    for _ in range(3):
        for module, optimizer in zip((plain, faster), optimizers, strict=True):
            with torch.autocast("cpu", torch.bfloat16), use_casts():
                module.requires_grad_(False)(x)
                (module.requires_grad_(True)(x) + module(x)).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(plain.weight, faster.weight)
    # Once for weight and bias after each of the steps but the last, though used three times.
    assert len(casts) == 2 * 2
    faster.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    with torch.autocast("cpu", torch.bfloat16), use_casts():
        assert torch.equal(faster(torch.ones(1, 3)), torch.full((1, 2), 3.0).bfloat16())
    faster.weight = nn.Parameter(torch.zeros(2, 3))
    with torch.autocast("cpu", torch.bfloat16), use_casts():
        assert torch.equal(faster(torch.ones(1, 3)), torch.zeros(1, 2).bfloat16())


def test_casts_are_of_no_concern_outside():
    """Where nobody vouches for how weights are changed: after training, for one."""
    plain, faster = both(nn.Linear(3, 2))
    with torch.autocast("cpu", torch.bfloat16):
        with use_casts():
            faster(torch.ones(1, 3))
        for layer in (plain, faster):
            layer.weight.data.zero_()
        assert torch.equal(faster(torch.ones(1, 3)), plain(torch.ones(1, 3)))


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        layer = nn.Linear(3, 2)
    accelerate(layer)
    with torch.autocast("cpu", torch.bfloat16), use_casts(), torch.no_grad():
        assert layer(torch.ones(1, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_training_goes_on_after_a_look_at_the_samples(mode):
    plain, faster = both(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    for module in (plain, faster):
        with torch.autocast("cpu", torch.bfloat16), use_casts():
            if module is faster:  # autocast of torch 2.10 remembers casts without derivative itself
                with mode():
                    module(x)
            module(x).float().square().sum().backward()
    assert torch.equal(faster.weight.grad, plain.weight.grad)


def test_weights_are_cast_after_every_step_of_a_trainer(run, tmp_path, monkeypatch):
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
    monkeypatch.setattr(trainer_module, "accelerate", lambda network: None)
    plain = train("plain")
    assert type(plain.generator.layers[0]) is nn.Linear
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
    optimizer = torch.optim.Adam(parameters, lr=1e-2, fused=fused)
    optimizer.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


@pytest.mark.parametrize(
    "how", ["nothing", "post-hook", "pre-hook", "callback", "scheduler", "shared"]
)
def test_a_trainer_in_bf16_computes_what_it_did_with_plain_layers(how, run, tmp_path, monkeypatch):
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
    monkeypatch.setattr(trainer_module, "accelerate", lambda network: None)
    for ours, theirs in zip(kept, train("plain"), strict=True):
        if how in ("scheduler", "shared"):  # PyTorch's step on one side, ours on the other
            torch.testing.assert_close(ours, theirs)
        else:
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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(4, 4), (1, 1), (5, 7)])
@pytest.mark.parametrize("factor", [2, 2.0, (2, 2)])
def test_upsampled_convolutions(layout, size, factor):
    network = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Upsample(scale_factor=factor),
        nn.Conv2d(3, 5, 3, 1, 1),
        nn.Tanh(),
        nn.Sequential(nn.UpsamplingNearest2d(scale_factor=2), nn.Conv2d(5, 2, 3, padding=1)),
        nn.Upsample(scale_factor=factor),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Upsample(scale_factor=factor),
        nn.Conv2d(2, 1, 3, padding=1, bias=False),
    ).double()
    plain, faster = both(network.to(memory_format=layout))
    x = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=layout)
    for ours, theirs in zip(derivatives(faster, x), derivatives(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    # A part of it is not run as a pair whose other half is missing.
    torch.testing.assert_close(faster[:2](x), plain[:2](x))
    torch.testing.assert_close(faster[2:4](x), plain[2:4](x))


@pytest.mark.parametrize(
    "pair",
    [
        (nn.Upsample(scale_factor=3), nn.Conv2d(3, 5, 3, 1, 1)),
        (nn.Upsample(size=8), nn.Conv2d(3, 5, 3, 1, 1)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(3, 5, 3, 1, 1)),
        (nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, 2, 1)),
        (nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, 1, 0)),
        (nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 5, 1, 1)),
        (nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, 1, 1, groups=3)),
        (nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, 1, 1, padding_mode="reflect")),
    ],
)
def test_other_pairs_run_as_they_are(pair):
    plain, faster = both(nn.Sequential(*pair))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(plain(x), faster(x))


def test_hooks_are_called():
    _, faster = both(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, 1, 1)))
    seen = []
    faster[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    faster(torch.randn(2, 3, 4, 4))
    assert seen == [(2, 3, 8, 8)]


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters_of_upsampled_convolutions_get_no_gradient(frozen):
    network = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 2, 3, padding=1)).double()
    for name in frozen:
        getattr(network[1], name).requires_grad_(False)
    plain, faster = both(network)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for module in (plain, faster):
        module(x.requires_grad_(len(frozen) == 2)).square().sum().backward()
    for (name, ours), theirs in zip(faster[1].named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (name in frozen)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def to_one_channel(*arguments, **keywords):
    conv = nn.Conv2d(64, 1, *arguments, **keywords)
    return nn.Sequential(nn.BatchNorm2d(64), conv, nn.LeakyReLU(0.2, inplace=True))


@pytest.fixture
def products_made(monkeypatch):
    """The shapes of what `_product` is called with."""
    shapes, inner = [], cpu._product

    def count(a, b):
        shapes.append((a.shape, b.shape))
        return inner(a, b)

    monkeypatch.setattr(cpu, "_product", count)
    return shapes


@pytest.mark.parametrize(
    "network",
    [
        to_one_channel(3, padding=1),
        to_one_channel(4),
        to_one_channel((2, 5), padding=(3, 0), bias=False),
        to_one_channel((3, 5), padding="same"),
    ],
)
def test_convolutions_to_one_channel(products_made, network):
    plain, faster = both(network.double().to(memory_format=torch.channels_last))
    x = torch.randn(2, 64, 5, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
    for ours, theirs in zip(derivatives(faster, x), derivatives(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert products_made == [((70, 64), (plain[1].weight[0, 0].numel(), 64))]
    assert faster[1](x[:0]).shape == plain[1](x[:0]).shape


def test_convolutions_to_one_channel_in_float32(products):
    plain, faster = both(to_one_channel(3, padding=1).to(memory_format=torch.channels_last))
    x = torch.randn(2, 64, 5, 7).to(memory_format=torch.channels_last)
    for ours, theirs in zip(derivatives(faster, x), derivatives(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("conv", "layout", "shape"),
    [
        (nn.Conv2d(64, 2, 3), torch.channels_last, (2, 64, 5, 7)),
        (nn.Conv2d(32, 1, 3), torch.channels_last, (2, 32, 5, 7)),
        (nn.Conv2d(64, 1, 1), torch.channels_last, (2, 64, 5, 7)),
        (nn.Conv2d(64, 1, 3, stride=2), torch.channels_last, (2, 64, 5, 7)),
        (nn.Conv2d(64, 1, 3, dilation=2), torch.channels_last, (2, 64, 5, 7)),
        (nn.Conv2d(64, 1, 3, 1, 1, padding_mode="reflect"), torch.channels_last, (2, 64, 5, 7)),
        (nn.Conv2d(64, 1, 3), torch.contiguous_format, (2, 64, 5, 7)),
        (nn.Conv2d(64, 1, 3), torch.contiguous_format, (64, 5, 7)),
    ],
)
def test_other_convolutions_run_as_they_are(products_made, conv, layout, shape):
    plain, faster = both(conv)
    x = torch.randn(shape).contiguous(memory_format=layout)
    assert torch.equal(plain(x), faster(x))
    assert not products_made


@pytest.mark.parametrize("autocast", [True, False])
def test_convolutions_in_half_precision_run_as_they_are(products_made, autocast):
    layout = torch.channels_last
    plain, faster = both(nn.Conv2d(64, 1, 3, dtype=None if autocast else torch.bfloat16))
    x = torch.randn(2, 64, 5, 7, dtype=plain.weight.dtype).contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(plain(x), faster(x))
    assert not products_made


@pytest.mark.parametrize("shape", [(2, 32, 5, 7), (2, 64, 2, 7), (2, 64, 5)])
def test_convolutions_complain_as_they_did(shape):
    plain, faster = both(nn.Conv2d(64, 1, 3))
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    complaints = []
    for module in (plain, faster):
        with pytest.raises(RuntimeError) as caught:
            module(x)
        complaints.append(str(caught.value))
    assert complaints[0] == complaints[1]


def test_convolutions_under_autocast_are_as_exact_as_those_of_pytorch():
    """Errors against float64 stay below twice those of what they replace."""
    network = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(64, 32, 3, 1, 1))
    plain, faster = both(network.to(memory_format=torch.channels_last))
    exact = copy.deepcopy(plain).double()
    x = torch.randn(8, 64, 8, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = derivatives(faster, x), derivatives(plain, x)
    for a, b, true in zip(ours, theirs, derivatives(exact, x.double()), strict=True):
        assert a.dtype == b.dtype
        assert (a - true).norm() <= 2 * (b - true).norm() + 1e-3 * true.norm()


def test_dropout_is_what_pytorch_says_it_is():
    layer = nn.Dropout(0.4)
    accelerate(layer)
    x = torch.rand(400, 500, requires_grad=True)
    y = layer(x)
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(0.6, abs=0.005)
    torch.testing.assert_close(y, torch.where(kept, x / 0.6, 0.0), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, kept / 0.6, rtol=1e-4, atol=0)
    # Each of the four that share a random word is dropped like the others, and independently.
    lanes = kept.flatten().view(-1, 4).double()
    torch.testing.assert_close(lanes.mean(0), torch.full((4,), 0.6).double(), rtol=0, atol=0.01)
    assert torch.corrcoef(lanes.t()).fill_diagonal_(0).abs().max() < 0.02
    assert layer(x[:1, :3]).shape == (1, 3)
    assert not torch.equal(layer(x) != 0, kept)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    for p in (0.0, 1.0):
        layer.p = p
        torch.testing.assert_close(layer(x), x * (1 - p))
    assert layer.eval()(x) is x


def test_everything_else_stays(run):
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), Own(2, 2), nn.ReLU())
    plain, faster = both(network)
    assert repr(plain) == repr(faster)
    assert plain.state_dict().keys() == faster.state_dict().keys()
    assert type(faster[2]) is Own
    with torch.autocast("cpu", torch.bfloat16), use_casts():
        faster(torch.ones(3, 2))
    for again in (copy.deepcopy(faster), pickle.loads(pickle.dumps(faster))):
        x = torch.randn(4, 2)
        torch.testing.assert_close(again.eval()(x), plain.eval()(x))
    # A trainer on a CPU does it to the networks of any game.
    game = run("cgan").game
    assert isinstance(game.generator.layers[0], cpu.Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transforms_and_compilers_get_pytorchs_layers(products, dtype):
    plain, faster = both(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    x = torch.randn(5, 3)

    def results(network):
        def loss(parameters, x):
            return torch.func.functional_call(network, parameters, (x,)).float().square().sum()

        parameters = {name: p.detach() for name, p in network.named_parameters()}
        half = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        with half, use_casts():
            network(x)  # casts weights
            yield from torch.func.grad(loss)(parameters, x).values()
            yield torch.func.grad(loss, argnums=1)(parameters, x)
            yield torch.vmap(network)(x)
            yield from torch.func.jvp(network, (x,), (x,))
            torch.compiler.reset()
            yield torch.compile(network, backend="aot_eager", fullgraph=True)(x)

        yield torch.jit.trace(network, x)(x)

    for ours, theirs in zip(list(results(faster)), list(results(plain)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(64, 3, 3, 1, 1), nn.Tanh()),
        lambda: to_one_channel(3, padding=1),
    ],
    ids=["upsampled", "to one channel"],
)
def test_transforms_get_pytorchs_convolutions(make):
    plain, faster = both(make().to(memory_format=torch.channels_last).eval())
    x = torch.randn(2, 64, 4, 4).to(memory_format=torch.channels_last)
    ours, theirs = (torch.func.jacrev(module)(x) for module in (faster, plain))
    assert torch.equal(ours, theirs)
