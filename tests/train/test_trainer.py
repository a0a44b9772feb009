"""The training loop: its results, the files that it writes, and how it stops."""

import io
import json
import multiprocessing
import os
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gankernels._devices import choose_device
from gankernels.games import DataSpec, Game, Player
from gankernels.metrics.accuracy import Accuracy
from gankernels.metrics.frechet import Frechet
from gankernels.train import Callback, Config, DivergenceError, Trainer, load_game, start
from gankernels.train import trainer as trainer_module
from gankernels.train.callbacks import Score


class Toy(Game):
    """Two players with one weight each: every step can be computed by hand."""

    def __init__(self, spec):
        super().__init__(spec)
        self.generator = nn.Linear(1, 1, bias=False)
        self.opponent = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.generator.weight)
        nn.init.ones_(self.opponent.weight)
        self.moves = []

    def players(self):
        sgd = partial(torch.optim.SGD, lr=0.5)
        return [
            Player("opponent", self.opponent, self.opponent_loss, sgd, 2, self.after),
            Player("generator", self.generator, self.generator_loss, sgd),
        ]

    def opponent_loss(self, batch, rng):
        self.moves.append(self.frozen())
        return {"product": (self.opponent.weight * self.generator.weight).sum()}

    def generator_loss(self, batch, rng):
        self.moves.append(self.frozen())
        square = self.generator.weight.square().sum() / 2
        return {"square": square, "pull": (self.opponent.weight * self.generator.weight).sum()}

    def frozen(self):
        return {name for name, p in self.named_parameters() if not p.requires_grad}

    def after(self):
        self.moves.append("after")
        assert not torch.is_grad_enabled()

    def sample(self, n, rng=None, labels=None):
        return torch.zeros(n, *self.spec.image_shape)


@pytest.fixture
def toy(digits, tmp_path):
    def make(**settings):
        game = Toy(DataSpec(1, 8, 10))
        config = Config(out=str(tmp_path / "toy"), device="cpu", **settings)
        return Trainer(game, digits, config)

    return make


def test_order_freezing_and_arithmetic(toy):
    trainer = toy(ema=0.75)
    trainer.iterate()
    game = trainer.game
    others = [{"generator.weight"}, "after", {"generator.weight"}, "after", {"opponent.weight"}]
    assert game.moves == others
    # The opponent: 1 - .5 * 1 twice. The generator: 1 - .5 * (1 + 0).
    assert game.opponent.weight.item() == 0.0
    assert game.generator.weight.item() == 0.5
    assert trainer.ema["generator"].weight.item() == 0.75 * 1 + 0.25 * 0.5
    assert all(p.grad is None for p in game.parameters())
    # The opponent's product was 1, then 0.5; the generator's terms .5 and 0.
    assert trainer.losses.take() == {
        "opponent/product": 0.75,
        "generator/square": 0.5,
        "generator/pull": 0.0,
    }


def test_parameters_frozen_by_the_user_stay_frozen(toy, digits, tmp_path):
    game = Toy(DataSpec(1, 8, 10))
    game.opponent.bias = nn.Parameter(torch.ones(1), requires_grad=False)
    trainer = Trainer(game, digits, Config(out=str(tmp_path), device="cpu"))
    trainer.iterate()
    assert "opponent.bias" in game.moves[0]


def test_batches_are_real_images_with_their_labels(run, digits):
    trainer = run("dcgan", width=4)
    pairs = digits.images, digits.labels
    known = {(image.numpy().tobytes(), int(y)) for image, y in zip(*pairs, strict=True)}
    first, second = trainer.batches.draw(), trainer.batches.draw()
    assert first.images.shape == (16, 1, 8, 8)
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(first.images, second.images)
    for image, label in zip(first.images, first.labels, strict=True):
        pixels = ((image + 1) * 127.5).round().to(torch.uint8).contiguous().numpy()
        assert (pixels.tobytes(), int(label)) in known
    assert first.images.min() == -1


@pytest.mark.parametrize("model", ["cgan", "cdcgan", "wgan", "wgan-gp", "dragan"])
def test_no_step_waits_for_the_device(run, monkeypatch, model):
    trainer = run(model, **({"width": 4} if model == "cdcgan" else {}))
    trainer.iterate()

    def forbidden(*args, **kwargs):
        raise AssertionError("a step read a tensor back")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    trainer.iterate()
    monkeypatch.undo()
    assert trainer.step == 2


@pytest.fixture
def folder(digits, tmp_path):
    """The first 60 digits as files."""
    for i, (image, label) in enumerate(zip(digits.images[:60], digits.labels, strict=False)):
        path = tmp_path / f"files/{label}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    return tmp_path / "files"


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_images_go_on_where_they_stopped(run, folder, tmp_path, workers):
    settings = {"data": str(folder), "stream": True, "workers": workers, "checkpoint_every": 0}
    whole = run("wgan", steps=4, out=str(tmp_path / "whole"), **settings)
    whole.fit()
    parts = {"out": str(tmp_path / "parts"), **settings, "workers": 0}
    run("wgan", steps=2, **parts).fit()
    resumed = start("wgan", steps=4, resume=True, **parts)
    resumed.fit()
    for name, value in whole.game.state_dict().items():
        assert torch.equal(value, resumed.game.state_dict()[name]), name
    assert not multiprocessing.active_children()


def test_streamed_batches_are_the_files(run, folder, digits):
    trainer = run("cgan", data=str(folder), stream=True)
    pairs = zip(digits.images[:60], digits.labels[:60], strict=True)
    known = {image.numpy().tobytes(): int(y) for image, y in pairs}
    seen = []
    player = trainer.players[0]
    inner = player.loss
    object.__setattr__(player, "loss", lambda batch, rng: seen.append(batch) or inner(batch, rng))
    trainer.iterate()
    trainer.batches.close()
    for image, label in zip(seen[0].images, seen[0].labels, strict=True):
        pixels = ((image + 1) * 127.5).round().to(torch.uint8).contiguous().numpy()
        assert known[pixels.tobytes()] == int(label)


def test_scores_and_the_best_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Score, "COUNT", 64)
    settings = {"steps": 12, "checkpoint_every": 3, "keep": 1}
    plain = run(out=str(tmp_path / "plain"), **settings)
    plain.fit()
    distances = iter([5.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(Frechet, "score", lambda self, samples: {"frechet": next(distances)})
    trainer = run(score="frechet,accuracy", **settings)
    trainer.fit()
    # Scores change nothing.
    for name, value in plain.game.state_dict().items():
        assert torch.equal(value, trainer.game.state_dict()[name]), name
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scored = {row["step"]: row["score/frechet"] for row in rows if "score/frechet" in row}
    assert scored == {3: 5.0, 6: 2.0, 9: 3.0, 12: 4.0}
    accuracies = [row["score/accuracy"] for row in rows if "score/accuracy" in row]
    assert len(accuracies) == 4
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    checkpoints = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in checkpoints.glob("*.pt")) == ["best.pt", "step_00000012.pt"]
    assert torch.load(checkpoints / "best.pt")["step"] == 6
    load_game(checkpoints / "best.pt")
    assert json.loads((checkpoints / "best.json").read_text()) == {
        "checkpoint": "step_00000006.pt", "metric": "frechet", "score": 2.0,
    }  # fmt: skip
    # A resumed run knows how good the best one was.
    distances = iter([2.5])
    start("cgan", resume=True, out=str(tmp_path / "run"), steps=15).fit()
    assert torch.load(checkpoints / "best.pt")["step"] == 6


def test_another_metric_decides_anew(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Score, "COUNT", 64)
    monkeypatch.setattr(Frechet, "score", lambda self, samples: {"frechet": 0.001})
    accuracies = iter([0.5, 0.75, 0.25])
    monkeypatch.setattr(Accuracy, "score", lambda self, samples: {"accuracy": next(accuracies)})
    settings = {"checkpoint_every": 1, "keep": 1}
    run(steps=1, score="frechet", **settings).fit()
    with pytest.warns(RuntimeWarning, match="is the best by frechet: the best by accuracy replac"):
        start("cgan", resume=True, out=str(tmp_path / "run"), steps=4, score="accuracy").fit()
    kept = json.loads((tmp_path / "run/checkpoints/best.json").read_text())
    assert kept == {"checkpoint": "step_00000003.pt", "metric": "accuracy", "score": 0.75}


def test_scores_need_the_images_in_memory(run, folder):
    with pytest.raises(ValueError, match="'frechet' must be labeled images in memory, got"):
        run("gan", data=str(folder), stream=True, score="frechet")


def test_average_follows_weights_and_statistics(run):
    trainer = run(ema=0.9)
    before = {name: t.clone() for name, t in trainer.ema["generator"].state_dict().items()}
    trainer.iterate()
    now = trainer.game.generator.state_dict()
    moved = 0
    for name, average in trainer.ema["generator"].state_dict().items():
        if average.is_floating_point():
            torch.testing.assert_close(average, 0.9 * before[name] + 0.1 * now[name])
            moved += not torch.equal(average, before[name])
    assert moved == len([t for t in now.values() if t.is_floating_point()])
    assert trainer.game.training
    with trainer.sampling() as game:
        assert game.generator is trainer.ema["generator"]
        assert not any(module.training for module in game.modules())
    assert game.generator is not trainer.ema["generator"]
    assert all(module.training for module in game.modules())


def test_bf16_computes_in_bf16_and_keeps_float32_weights(run, tmp_path):
    seen = []
    half = run(precision="bf16", out=str(tmp_path / "half"))
    half.game.generator.layers[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    half.iterate()
    full = run(precision="fp32", out=str(tmp_path / "full"))
    full.iterate()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in half.game.parameters()} == {torch.float32}
    ours, theirs = half.losses.take(), full.losses.take()
    assert ours != theirs
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=0.05)


def test_gradient_norms_are_told_with_every_report(toy):
    trainer = toy(ema=0, log_every=2)
    trainer.iterate()
    assert "opponent/gradient_norm" not in trainer.losses.take()
    trainer.game.opponent.weight.data.fill_(3.0)
    trainer.game.generator.weight.data.fill_(2.0)
    trainer.iterate()
    values = trainer.losses.take()
    # The opponent's gradient is the generator's weight; then 3 - 1 - 1 = 1 of it is left.
    assert values["opponent/gradient_norm"] == 2.0
    assert values["generator/gradient_norm"] == 2.0 + 1.0


def test_a_gradient_that_is_not_finite_is_named(run):
    class Trap(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    trainer = run(steps=40, log_every=10)
    player = trainer.players[1]
    inner = player.loss

    def loss(batch, rng):
        terms = inner(batch, rng)
        return {name: Trap.apply(t) if trainer.step == 19 else t for name, t in terms.items()}

    object.__setattr__(player, "loss", loss)
    with pytest.raises(DivergenceError, match="step 20: the gradient of player 'generator' is nan"):
        trainer.fit()


def test_fp16_computes_in_fp16_and_trains(run):
    trainer = run("gan", precision="fp16", steps=60, lr=1e-3)
    seen = []
    trainer.game.generator.layers[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    trainer.fit()
    assert set(seen[:-1]) == {torch.float16}  # the last grid is drawn without autocast
    assert {p.dtype for p in trainer.game.parameters()} == {torch.float32}


def test_fp16_skips_the_steps_of_one_player_only(run):
    trainer = run("gan", precision="fp16")
    for _ in range(3):
        trainer.iterate()
    _, generator = trainer.players
    inner = generator.loss

    def overflowing(batch, rng):
        terms = inner(batch, rng)
        return {name: t + (t - t.detach()) * 1e38 * 1e3 for name, t in terms.items()}

    object.__setattr__(generator, "loss", overflowing)
    before = {name: t.clone() for name, t in trainer.game.state_dict().items()}
    scales = {name: s.get_scale() for name, s in trainer.scalers.items()}
    trainer.iterate()
    moved = {p: any(not torch.equal(t, before[f"{p}.{name}"]) for name, t in part) for p, part in (
        ("discriminator", list(trainer.game.discriminator.named_parameters())),
        ("generator", list(trainer.game.generator.named_parameters())),
    )}  # fmt: skip
    assert moved == {"discriminator": True, "generator": False}
    assert trainer.scalers["discriminator"].get_scale() == scales["discriminator"]
    assert trainer.scalers["generator"].get_scale() == scales["generator"] / 2
    trainer.config = replace(trainer.config, steps=100, log_every=10, checkpoint_every=0)
    with pytest.raises(DivergenceError, match="gradient of player 'generator' is not finite at"):
        trainer.fit()


def test_callbacks_are_told_in_order_and_can_stop(run, tmp_path):
    class Witness(Callback):
        def __init__(self):
            self.events = []

        def on_start(self, trainer):
            self.events.append("start")

        def on_step(self, trainer):
            self.events.append(trainer.step)
            if trainer.step == 7:
                trainer.stop()

        def on_report(self, trainer, values):
            self.events.append(sorted(values)[-1])

        def on_samples(self, trainer, path):
            assert path.exists()
            self.events.append(path.name)

        def on_checkpoint(self, trainer, path):
            assert path.exists()
            self.events.append(path.name)

        def on_end(self, trainer):
            self.events.append("end")

    trainer = run("gan", steps=100, log_every=6, sample_every=5, checkpoint_every=4)
    witness = Witness()
    trainer.callbacks.append(witness)
    trainer.fit()
    told = "it_per_s"
    assert witness.events == [
        "start", 1, 2, 3, 4, "step_00000004.pt", 5, "step_00000005.png", 6, told, 7, told,
        "step_00000007.pt", "samples.png", "end",
    ]  # fmt: skip


def test_the_end_is_told_after_an_error_too(run):
    class Fails(Callback):
        ended = False

        def on_step(self, trainer):
            raise KeyError("mine")

        def on_end(self, trainer):
            self.ended = True

    trainer, callback = run("gan"), Fails()
    trainer.callbacks.append(callback)
    with pytest.raises(KeyError, match="mine"):
        trainer.fit()
    assert callback.ended


def test_a_discriminator_left_alone_learns_to_tell(run):
    trainer = run("gan")
    (discriminator, _) = trainer.players
    batches = (trainer.batches.draw() for _ in range(60))
    moves = (trainer.move(discriminator, discriminator.loss, batch) for batch in batches)
    losses = [sum(terms.values()) for terms in moves]
    assert losses[0] > 1.2
    assert losses[-1] < 0.2


def test_run_folder(run, tmp_path):
    trainer = run(steps=50, sample_every=25, checkpoint_every=20, keep=2)
    trainer.fit()
    folder = tmp_path / "run"
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files.pop().startswith("tensorboard/events.out")
    assert files == [
        "checkpoints/step_00000040.pt",
        "checkpoints/step_00000050.pt",
        "config.json",
        "metrics.jsonl",
        "report.html",
        "samples.png",
        "samples/step_00000025.png",
        "samples/step_00000050.png",
    ]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40, 50]
    terms = {"discriminator/real", "discriminator/fake", "generator/adversarial"}
    norms = {"discriminator/gradient_norm", "generator/gradient_norm"}
    assert all(terms | {"step", "it_per_s"} | norms == row.keys() for row in rows[:2])
    assert terms | {"step", "it_per_s"} == rows[2].keys()  # cut short: norms are not taken
    grid = np.asarray(Image.open(folder / "samples.png"))
    assert grid.shape == (8 * 10 + 2, 10 * 10 + 2)  # 80 digits, a column per class
    assert grid.std() > 10
    config = json.loads((folder / "config.json").read_text())
    assert (config["game"], config["batch_size"], config["lr"]) == ("cgan", 16, 2e-4)


def test_config_json_reruns_the_run(run, tmp_path):
    first = run(steps=10, seed=3, lr=1e-3)
    first.fit()
    again = run(tmp_path / "run" / "config.json", out=str(tmp_path / "again"))
    assert again.config.seed == 3
    again.fit()
    weights = again.game.state_dict()
    for name, value in first.game.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_lines_where_there_is_no_terminal(run, capsys):
    run(steps=40).fit()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for part in ("step 20/40", "discriminator/real", "generator/adversarial", "it/s", "left"):
        assert part in lines[0]


def test_a_bar_on_a_terminal(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    run(steps=40).fit()
    text = terminal.getvalue()
    for part in ("40/40", "it/s", "discriminator/real", "generator/adversarial"):
        assert part in text
    assert "step 20" not in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_save(run, tmp_path, number):
    trainer = run(steps=10_000)
    before = signal.getsignal(number)
    (player, _) = trainer.players
    inner = player.loss

    def loss(batch, rng):
        if trainer.step == 6:
            os.kill(os.getpid(), number)
        return inner(batch, rng)

    object.__setattr__(player, "loss", loss)
    trainer.fit()
    assert trainer.step == 7
    assert (tmp_path / "run/checkpoints/step_00000007.pt").exists()
    assert (tmp_path / "run/samples.png").exists()
    assert signal.getsignal(number) is before


def test_reports_are_means_since_the_last(toy):
    trainer = toy(ema=0)
    for _ in range(2):
        trainer.iterate()
    assert trainer.losses.take().keys() == {
        "opponent/product",
        "generator/square",
        "generator/pull",
    }
    assert trainer.losses.take() == {}


def spoil(player, step, trainer, term, value):
    inner = player.loss

    def loss(batch, rng):
        terms = inner(batch, rng)
        if trainer.step == step:
            terms[term] = terms[term] * value
        return terms

    object.__setattr__(player, "loss", loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_names_step_player_and_term(run, tmp_path, value):
    trainer = run(steps=100, log_every=10, checkpoint_every=5)
    spoil(trainer.players[0], 17, trainer, "fake", value)
    with pytest.raises(DivergenceError, match=r"step 18: .*'fake' of player 'discriminator' is"):
        trainer.fit()
    saved = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert saved == ["step_00000010.pt", "step_00000015.pt"]


def test_a_loss_is_checked_before_a_checkpoint_too(run, tmp_path):
    trainer = run(steps=100, log_every=50, checkpoint_every=10)
    spoil(trainer.players[1], 12, trainer, "adversarial", float("nan"))
    with pytest.raises(DivergenceError, match=r"step 13: .*'adversarial' of player 'generator'"):
        trainer.fit()
    saved = [p.name for p in (tmp_path / "run/checkpoints").iterdir()]
    assert saved == ["step_00000010.pt"]


def test_spoiled_weights_are_not_saved(run, tmp_path):
    trainer = run(steps=10)
    with torch.no_grad():
        trainer.game.generator.layers[0].bias[3] = float("inf")
    with pytest.raises(DivergenceError, match="step 0: a weight of player 'generator'"):
        trainer.save()
    assert not (tmp_path / "run/checkpoints").exists()


def test_data_must_fit_the_game(digits):
    with pytest.raises(
        ValueError, match=r"images of the data must be Image\(.*height=12, width=12"
    ):
        Trainer(Toy(DataSpec(1, 12, 10)), digits, Config())
    game = Toy(DataSpec(1, 8, 3))
    game.given = ("labels",)
    with pytest.raises(
        ValueError, match=r"labels of the data must be Label\(.*build the game with"
    ):
        Trainer(game, digits, Config())
    game.given = ("text",)
    with pytest.raises(ValueError, match="must have a column 'text' for test-trainer, got images"):
        Trainer(game, digits, Config())


def test_unknown_device(run):
    with pytest.raises(ValueError, match="device 'warp' cannot be used"):
        run(device="warp")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_on_a_machine_has_a_gpu_of_its_own(monkeypatch, name):
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    zero = torch.zeros(())
    monkeypatch.setattr(torch, "zeros", lambda *size, device: asked.append(device) or zero)
    assert choose_device(name) == asked[0] == torch.device("cuda:3")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert choose_device(name) == torch.device("cuda:2")


# ---- what a graph takes for constant -------------------------------------------------------------


class Stands:
    """For Graphs: what a graph of each key would have read is what the first call with it read."""

    def __init__(self):
        self.keys = []

    def __call__(self, key, function, inputs):
        self.keys.append(key)
        return function(inputs)


@pytest.fixture
def as_on_cuda(toy, monkeypatch):
    """A trainer whose optimizers have their learning rates in tensors, as they have on CUDA."""

    def make(player, parameters):
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(1e-3)
        return optimizer

    monkeypatch.setattr(trainer_module, "make_optimizer", make)
    trainer = toy(log_every=1000)
    trainer.call = Stands()
    return trainer


@pytest.mark.parametrize("how", ["a number", "another tensor", "in place", "loaded"])
def test_a_new_learning_rate_is_written_where_the_graph_reads_it(as_on_cuda, how):
    trainer = as_on_cuda
    optimizer = trainer.optimizers["generator"]
    rate = optimizer.param_groups[0]["lr"]
    trainer.iterate()
    before = trainer.game.generator.weight.item()
    if how == "a number":
        optimizer.param_groups[0]["lr"] = 0.5
    elif how == "another tensor":
        optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    elif how == "in place":
        optimizer.param_groups[0]["lr"] *= 500
    else:  # as by a scheduler's or a checkpoint's state, with a number as older ones have
        state = optimizer.state_dict()
        state["param_groups"][0]["lr"] = 0.5
        optimizer.load_state_dict(state)
    trainer.iterate()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5
    assert abs(trainer.game.generator.weight.item() - before) > 0.1
    assert len(set(trainer.call.keys)) == 1, "no graph is captured anew"


@pytest.mark.parametrize("option", ["betas", "eps", "weight_decay", "lr"])
def test_other_settings_have_graphs_of_their_own(toy, option):
    """And the rate of an optimizer that PyTorch cannot capture with a tensor."""
    trainer = toy(log_every=1000)
    trainer.call = Stands()
    new = {"betas": [0.5, 0.9], "eps": 1e-3, "weight_decay": 0.1, "lr": 0.25}[option]
    trainer.iterate()
    trainer.iterate()
    trainer.optimizers["opponent"].param_groups[0][option] = new
    trainer.iterate()
    first, second, third = trainer.call.keys
    assert first == second != third


def test_rates_are_tensors_where_graphs_can_read_them(monkeypatch):
    """Of what PyTorch has fused and capturable, on CUDA alone: here a tensor that says it is."""

    class OnCuda:
        is_cuda, device = True, "cpu"

    def factory(parameters, *, fused, capturable=False):
        assert fused
        return SimpleNamespace(param_groups=[{"lr": 1e-3}, {"lr": torch.tensor(2e-3)}])

    player = SimpleNamespace(optimizer=factory)
    groups = trainer_module.make_optimizer(player, [OnCuda()]).param_groups
    assert [type(group["lr"]) for group in groups] == [torch.Tensor] * 2
    assert [group["lr"].item() for group in groups] == pytest.approx([1e-3, 2e-3])
    assert {group["lr"].dtype for group in groups} == {torch.float32}
    player = SimpleNamespace(optimizer=partial(torch.optim.SGD, lr=0.1))
    weight = nn.Parameter(torch.ones(1))
    assert trainer_module.make_optimizer(player, [weight]).param_groups[0]["lr"] == 0.1
