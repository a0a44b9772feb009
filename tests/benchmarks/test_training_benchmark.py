"""The benchmark of whole training runs compares equal work, and prints correct tables."""

import json
from dataclasses import replace

import pytest
import pytorch_gan
import script
import torch
import training
from torch import Tensor, nn

from gankernels import metrics
from gankernels.nn.cpu import conv_to_one, dropout, linear, upsample_conv

MODELS = tuple(pytorch_gan.SCRIPTS)


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("model", "generator", "discriminator"),
    [
        ("cgan", 1_757_412, 1_055_845),
        ("dcgan", 1_049_985, 98_113),
        ("wgan_gp", 1_510_032, 533_505),
    ],
)
def test_parameters_are_as_many_as_in_the_scripts(model, generator, discriminator):
    script = pytorch_gan.SCRIPTS[model]
    assert count(script.make_generator()) == generator
    assert count(script.make_discriminator()) == discriminator


def test_data_modes_load_the_same_images():
    data = training.read_data(None, 64)
    for size in (28, 32):
        from_script, _ = next(pytorch_gan.script_batches(data, size))
        from_memory, _ = next(pytorch_gan.memory_batches(data, size))
        assert from_script.shape == from_memory.shape == (64, 1, size, size)
        # A data set of one batch comes as a whole, in any order; Pillow rounds otherwise.
        a, b = (x.flatten().sort().values for x in (from_script, from_memory))
        torch.testing.assert_close(a, b, atol=1.01 / 127.5, rtol=0)


# ---- the same work on both sides ---------------------------------------------------------------


class Recorder:
    """What a trainer's networks were given, and its losses, for a script to do it again."""

    def __init__(self, trainer: training.Trainer) -> None:
        self.generated: list[tuple] = []
        self.judged: list[tuple] = []
        game = trainer.game
        game.generator.register_forward_pre_hook(
            lambda _, given: self.generated.append(pair(given))
        )
        game.discriminator.register_forward_pre_hook(
            lambda _, given: self.judged.append(pair(given))
        )


def pair(given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    """Noise or images, and labels where there are some."""
    value, *labels = (t.detach().clone(memory_format=torch.contiguous_format) for t in given)
    return value, *(labels or [None])


@pytest.fixture(autouse=True)
def _plain_layers(monkeypatch):
    """Faster layers compute the same, but round differently, which Adam's first steps magnify."""
    for module in (linear, dropout, conv_to_one, upsample_conv):
        monkeypatch.setattr(module, "runs_on_cpu", lambda x: False)


@pytest.fixture
def losses(monkeypatch) -> dict[str, list[float]]:
    """The values that the players of any game minimise, as they come."""
    values: dict[str, list[float]] = {}

    def recording(player):
        def record(loss):
            def wrapped(batch, rng):
                terms = loss(batch, rng)
                total = sum(term.item() for term in terms.values())
                values.setdefault(player.name, []).append(total)
                return terms

            return loss and wrapped

        return replace(player, loss=record(player.loss), lazy_loss=record(player.lazy_loss))

    for game in (training.SameFakes, training.DenseWGANGP):
        players = game.players
        monkeypatch.setattr(
            game, "players", lambda self, players=players: [recording(p) for p in players(self)]
        )
    return values


def both(model: str) -> tuple[training.Trainer, pytorch_gan.Script]:
    """A trainer and a script with the same weights, and without dropout."""
    trainer = training.make_trainer(model, "fp32", training.read_data(None, 100))
    # Nor real and generated images in one go, whose gradients are then added in another order.
    trainer.game.discriminator.per_sample = False
    script = pytorch_gan.SCRIPTS[model](print=lambda line: None)
    for ours, theirs in (
        (trainer.game.generator, script.generator),
        (trainer.game.discriminator, script.discriminator),
    ):
        theirs.load_state_dict(ours.state_dict())
        for module in (*ours.modules(), *theirs.modules()):
            if isinstance(module, (nn.Dropout, nn.Dropout2d)):
                module.p = 0.0
    return trainer, script


def assert_same_weights(trainer: training.Trainer, script: pytorch_gan.Script) -> None:
    """To a twentieth of Adam's step, wherever the gradient is more than rounding.

    Adam makes a whole step of any gradient, and a bias before batch norm has none but rounding. How
    much that is depends on the processor, so that all gradients (by their running mean) are
    compared as well, to a thousandth of the largest.
    """
    for ours, theirs, optimizer in (
        (trainer.game.generator, script.generator, script.optimizer_g),
        (trainer.game.discriminator, script.discriminator, script.optimizer_d),
    ):
        mine = dict(ours.named_parameters())
        sizes = {p: state["exp_avg_sq"].sqrt() for p, state in optimizer.state.items()}
        largest = max(size.max() for size in sizes.values())
        mine_by = {p: s for o in trainer.optimizers.values() for p, s in o.state.items()}
        # From a first gradient of 3 eps on: below, rounding changes what part of a step Adam makes.
        least = 3e-8 * (1 - pytorch_gan.BETAS[1]) ** 0.5
        compared = 0
        for name, weight in theirs.named_parameters():
            means = (
                by[p]["exp_avg"] for by, p in ((mine_by, mine[name]), (optimizer.state, weight))
            )
            error = torch.sub(*means).abs().max()
            assert error < 1e-3 * largest / (1 - pytorch_gan.BETAS[1]) ** 0.5, name
            moved = sizes[weight] > max(1e-5 * largest, least)
            compared += int(moved.sum())
            difference = (mine[name] - weight)[moved].abs()
            assert difference.numel() == 0 or difference.max() < pytorch_gan.LR / 20, name
        assert compared > count(theirs) / 3
        for name, statistics in theirs.named_buffers():
            torch.testing.assert_close(dict(ours.named_buffers())[name], statistics)


@pytest.mark.parametrize("model", ["cgan", "dcgan"])
def test_alternating_step_does_what_the_script_does(model, losses):
    trainer, script = both(model)
    recorder = Recorder(trainer)
    trainer.iterate()
    ((noise, labels),) = recorder.generated
    (generated, (images, real_labels), again) = recorder.judged
    assert torch.equal(generated[0], again[0])
    reported = []
    script.noise, script.random_labels = lambda n: noise, lambda n: labels
    script.report = lambda d_loss, g_loss: reported.extend([d_loss.item(), g_loss.item()])
    script.step(images, real_labels)
    assert losses["discriminator"] == pytest.approx(reported[:1], rel=1e-5)
    assert losses["generator"] == pytest.approx(reported[1:], rel=1e-5)
    assert_same_weights(trainer, script)


def test_wgan_gp_iteration_is_five_critic_steps_and_a_generator_step(losses):
    trainer, script = both("wgan_gp")
    recorder = Recorder(trainer)
    trainer.iterate()
    assert len(recorder.generated) == pytorch_gan.N_CRITIC + 1
    assert training.BATCHES["wgan_gp"] == pytorch_gan.N_CRITIC
    critic_losses = []
    for step in range(pytorch_gan.N_CRITIC):
        real, fake, between = (given[0] for given in recorder.judged[3 * step : 3 * step + 3])
        apart = real - fake
        alpha = ((between - fake) * apart).sum((1, 2, 3)) / apart.square().sum((1, 2, 3))
        script.alpha = lambda n, alpha=alpha: alpha.view(n, 1, 1, 1)
        noise = recorder.generated[step][0]
        critic_losses.append(script.critic_step(real, noise).item())
    generator_loss = script.generator_step(recorder.generated[-1][0]).item()
    assert losses["critic"] == pytest.approx(critic_losses, rel=1e-4)
    assert losses["generator"] == pytest.approx([generator_loss], rel=1e-4, abs=1e-5)
    assert_same_weights(trainer, script)


def test_the_wgan_gp_script_moves_the_generator_on_every_fifth_batch(monkeypatch):
    script = pytorch_gan.WGANGP(print=lambda line: None)
    moved = []
    monkeypatch.setattr(
        script, "generator_step", lambda noise: moved.append(script.batches) or torch.zeros(())
    )
    batches = pytorch_gan.memory_batches(training.read_data(None, 64), script.size)
    for _ in range(7):
        script.step(*next(batches))
    assert moved == [0, 5]


# ---- tables ------------------------------------------------------------------------------------


def test_ratios_are_medians_over_rounds_that_share_their_weather():
    rounds = [
        {"script": 10.0, "memory": 20.0, "bf16": 40.0},
        {"script": 1.0, "memory": 2.0, "bf16": 5.0},
        {"script": 10.0, "memory": 20.0, "bf16": 60.0},
    ]
    row = training.summarise("cgan", "bf16", rounds)
    assert (row["it_per_s"], row["times_script"], row["times_memory"]) == (40, 5, 2.5)
    assert row["times_memory_malloc"] is None
    assert row["bar"] == 3.5
    assert row["met"]
    assert not training.summarise("dcgan", "bf16", rounds)["met"]
    assert training.describe(row).split() == ["cgan", "bf16", "40.00", "5.00", "(3.5)", "2.50"]
    keras = training.summarise("keras cgan", "bf16", [{"fp32": 100.0, "bf16": 190.0}])
    assert not keras["met"]  # its bar is a speed


def test_quality_is_told_apart_by_two_standard_errors():
    def rows(contender, *values):
        return [{"model": "cgan", "contender": contender, "frechet": value} for value in values]

    same = rows("memory", 5.0, 6.0, 7.0) + rows("fp32", 6.0, 7.0, 8.0)
    assert training.quality_table(same)[-1].endswith(": the same")
    other = rows("memory", 5.0, 6.0, 7.0) + rows("fp32", 8.0, 9.0, 10.0)
    assert training.quality_table(other)[-1].endswith(": differs")
    alone = rows("memory", 5.0) + rows("fp32", 5.0)
    assert training.quality_table(alone)[-1].endswith(": too few runs")


def test_every_operator_has_a_group():
    for operator, group in (
        ("gankernels::batch_norm_leaky_relu_backward", "gankernels"),
        ("aten::convolution_backward", "convolution and GEMM"),
        ("aten::_fused_adam_", "optimizer"),
        ("gankernels::adam_", "optimizer"),
        ("Optimizer.step#Adam.step", "autograd and Python"),
        ("AddmmBackward0", "autograd and Python"),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", "autograd and Python"),
        ("aten::leaky_relu_backward", "other elementwise"),
    ):
        assert training.group_of(operator) == group


def test_speed_table_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(training, "contenders_of", lambda model, device: ("script", "bf16"))
    options = "--quick --models wgan_gp --threads 1 --save some"
    monkeypatch.setattr("sys.argv", ["training.py", *options.split()])
    training.main()
    rows = json.loads((tmp_path / "some.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["script", "bf16"]
    assert all(row["it_per_s"] > 0 for row in rows)
    assert capsys.readouterr().out.count("wgan_gp") == len(rows)
    monkeypatch.setattr("sys.argv", ["training.py", *options.split()[:-2], "--json"])
    training.main()
    records = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert [record["row"]["contender"] for record in records] == ["script", "bf16"]


def test_quality_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    jobs = []

    class Worker:
        def __init__(self, contender, job):
            jobs.append((contender, job["seed"]))
            if len(jobs) == 3:
                raise KeyboardInterrupt

        def answer(self):
            return {"frechet": float(len(jobs)), "cpu_seconds": 1.0}

        def close(self):
            pass

    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(training, "Worker", Worker)
    options = "--quality --models cgan --seeds 2"
    monkeypatch.setattr("sys.argv", ["training.py", *options.split()])
    with pytest.raises(KeyboardInterrupt):
        training.main()
    training.main()
    order = [(contender, seed) for seed in (0, 1) for contender in training.QUALITY]
    assert jobs == [*order[:3], *order[2:]]  # the interrupted one again, and no other
    rows = json.loads((tmp_path / "training_quality.json").read_text())["rows"]
    assert [(row["contender"], row["seed"]) for row in rows] == order
    assert len(capsys.readouterr().out.splitlines()) == len(order) + 1 + len(training.QUALITY)


@pytest.mark.parametrize(("model", "contender"), [("cgan", "fp32"), ("wgan_gp", "memory")])
def test_score_is_of_the_trained_generator(model, contender, monkeypatch, tmp_path):
    def untrained(data, **_):
        return metrics.Classifier(1, data.size, 10).eval(), 0.1

    monkeypatch.setattr(training.gk, "tune_allocator", lambda: None)
    monkeypatch.setattr(metrics._cache, "train_classifier", untrained)
    data = training.read_data(None, 100)
    run = training.Run(model, contender, data)
    steps = []
    monkeypatch.setattr(run, "step", lambda: steps.append(1))
    job = {"model": model, "iterations": 5, "cache": str(tmp_path)}
    torch.manual_seed(0)
    before = training.score(run, job, data)
    assert len(steps) == 5
    assert before["frechet"] > 0
    with torch.no_grad():
        run.generator.layers[-2].bias.fill_(5.0)
    torch.manual_seed(0)
    after = training.score(run, job, data)
    assert after["frechet"] != before["frechet"]
    assert (after["accuracy"] is not None) == (model == "cgan")
