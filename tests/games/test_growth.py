"""Games, metrics and kinds of data that share little with those of the package: one class each.

The trainer trains, resumes, samples, scores and reports two games as it is. One maps images to
images, which come in pairs and are not square. The other makes words: it is trained by maximum
likelihood first and by policy gradients afterwards. Words have a metric of their own, and a file
format. A third game has two discriminators, each under a penalty.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gankernels import data as data_module
from gankernels import games, metrics
from gankernels import train as training
from gankernels.cli import main
from gankernels.data import Columns, DataOptions, Image, Kind, Tokens
from gankernels.games import (
    Adversarial,
    BareOptions,
    DiscriminatorOptions,
    Game,
    Penalty,
    Player,
    adversary,
    option,
)
from gankernels.metrics import Metric
from gankernels.train import Config, Trainer, load_game


@pytest.fixture(autouse=True)
def _unregister(monkeypatch):
    """Other tests see the built-in games, metrics and kinds of data only."""
    for registry in (games._game.registry, metrics._metric._registry, data_module._kind._registry):
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- images to images ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TranslateOptions(DiscriminatorOptions):
    l1: float = option(10.0, "weight of the absolute error")
    penalty: str | None = option("r1", "penalty on the discriminator's gradient")


class Translate(Adversarial):
    """Both players see one batch; the discriminator sees input and result side by side."""

    Options = TranslateOptions
    given, makes = ("input",), "target"
    channels_last = True

    def make_generator(self):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1), nn.Tanh()
        )

    def make_discriminator(self):
        return nn.Sequential(nn.Conv2d(4, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4, 2, 1))

    def make(self, batch, rng):
        return {"target": self.generator(batch["input"])}

    def judged(self, values, batch):
        return (torch.cat([batch["input"], values["target"]], 1),)

    def players(self):
        adam = partial(torch.optim.Adam, lr=1e-2)
        decay = partial(
            torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=4
        )
        return [
            self.generator_player(adam, schedule=decay),
            self.discriminator_player(adam, schedule=decay, shared=True),
        ]

    def discriminator_loss(self, round):
        return {"real": (round.real - 1).square().mean(), "fake": round.fake.square().mean()}

    def generator_loss(self, round):
        error = F.l1_loss(round.made["target"], round.batch["target"])
        return {"adversarial": (round.fake - 1).square().mean(), "l1": self.options.l1 * error}


def pairs():
    colors = torch.randint(256, (20, 3, 6, 10), generator=rng(), dtype=torch.uint8)
    spec = {"input": Image(3, 6, 10), "target": Image(1, 6, 10)}
    return Columns(spec, {"input": colors, "target": 255 - colors[:, :1]}, "pairs")


# ---- words ---------------------------------------------------------------------------------------

WORDS = ("", "a", "b", "c")
PRETRAINING = 3


class Speak(Game):
    """Maximum likelihood for three steps, then REINFORCE with the discriminator's reward."""

    Options = BareOptions
    makes = "words"

    def __init__(self, spec, options=None):
        super().__init__(spec, options)
        size = len(spec["words"].vocabulary)
        self.generator = nn.ModuleDict(
            {
                "embedding": nn.Embedding(size + 1, 8),
                "memory": nn.GRUCell(8, 8),
                "out": nn.Linear(8, size),
            }
        )
        self.discriminator = nn.Sequential(
            nn.Embedding(size, 8), nn.Flatten(), nn.Linear(8 * spec["words"].length, 1)
        )

    def speak(self, n, rng, words=None):
        """Words drawn one after the other, or those that are given; and their log-likelihood."""
        last = torch.full((n,), len(WORDS))  # the start
        state = torch.zeros(n, 8)
        spoken, likelihood = [], 0.0
        for i in range(self.spec["words"].length):
            state = self.generator["memory"](self.generator["embedding"](last), state)
            log_p = self.generator["out"](state).log_softmax(1)
            if words is None:
                last = torch.multinomial(log_p.exp().detach(), 1, generator=rng)[:, 0]
            else:
                last = words[:, i]
            likelihood = likelihood + log_p.gather(1, last[:, None])[:, 0]
            spoken.append(last)
        return torch.stack(spoken, 1), likelihood

    def make(self, batch, rng):
        words, likelihood = self.speak(batch.size, rng)
        return {"words": words, "likelihood": likelihood}

    def players(self):
        adam = partial(torch.optim.Adam, lr=1e-2)
        pretraining, playing = (lambda step: step < PRETRAINING), (lambda step: step >= PRETRAINING)
        return [
            Player("pretraining", self.generator, self.likelihood_loss, adam, plays=pretraining),
            Player("discriminator", self.discriminator, self.judge_loss, adam, 2, plays=playing),
            Player("generator", self.generator, self.reward_loss, adam, plays=playing),
        ]

    def likelihood_loss(self, batch, rng):
        return {"nll": -self.speak(batch.size, rng, batch["words"])[1].mean()}

    def judge_loss(self, batch, rng):
        fake = self.discriminator(self.make(batch, rng)["words"])
        return {"bce": (F.softplus(-self.discriminator(batch["words"])) + F.softplus(fake)).mean()}

    def reward_loss(self, batch, rng):
        made = self.make(batch, rng)
        reward = self.discriminator(made["words"]).sigmoid()[:, 0].detach()
        return {"policy": -((reward - reward.mean()) * made["likelihood"]).mean()}


def sentences():
    words = torch.randint(1, 4, (30, 5), generator=rng())
    return Columns({"words": Tokens(WORDS, 5)}, {"words": words.sort(1).values}, "sentences")


class Bigrams(Metric):
    """The total variation distance between the frequencies of pairs of neighboring words."""

    needs = (Tokens,)
    labels = {"bigrams": ("distance of the bigrams", "{:.3f}")}  # noqa: RUF012

    def frequencies(self, words):
        pairs = words[:, :-1] * self.size + words[:, 1:]
        return pairs.flatten().bincount(minlength=self.size**2).double() / pairs.numel()

    def prepare(self, data, cache):
        self.size = len(data.spec[self.column].vocabulary)
        self.real = self.frequencies(data.columns[self.column])

    def score(self, samples):
        found = self.frequencies(samples[self.column])
        return {"bigrams": (found - self.real).abs().sum().item() / 2}


@dataclass(frozen=True)
class LinesOptions(DataOptions):
    length: int = option(5, "words per line")


class Lines(Kind):
    """A text file with a sentence of one-letter words per line."""

    Options = LinesOptions
    accepted = "a .words file"

    @classmethod
    def accepts(cls, path):
        return path.suffix == ".words"

    @classmethod
    def open(cls, source, options, name):
        words = [line.split()[: options.length] for line in Path(source).read_text().splitlines()]
        words = torch.tensor([[WORDS.index(word) for word in line] for line in words])
        return Columns({"words": Tokens(WORDS, options.length)}, {"words": words}, name)


# ---- two domains ---------------------------------------------------------------------------------


class Domains(Game):
    """Two discriminators of one generator, which judge two columns of one batch."""

    Options = BareOptions

    def __init__(self, spec, options=None):
        super().__init__(spec, options)
        self.generator = nn.Linear(4, 2 * 64)
        self.whole, self.part = nn.Linear(64, 1), nn.Linear(32, 1)

    def make(self, batch, rng):
        noise = torch.randn(batch.size, 4, generator=rng)
        whole, half = self.generator(noise).chunk(2, 1)
        return {"images": whole.unflatten(1, (1, 8, 8)), "half": half[:, :32]}

    def loss(self, round):
        return {"wasserstein": round.fake.mean() - round.real.mean()}

    def fool(self, batch, rng):
        made = self.make(batch, rng)
        whole, half = self.whole(made["images"].flatten(1)), self.part(made["half"])
        return {"whole": -whole.mean(), "half": -half.mean()}

    def players(self):
        adam = partial(torch.optim.Adam, lr=1e-2)

        def judged_whole(values, batch):
            return (values["images"].flatten(1),)

        def judged_half(values, batch):
            half = values["half"] if "half" in values else values["images"].flatten(1)[:, :32]
            return (half,)

        parts = {
            "whole": (self.whole, judged_whole, Penalty("wgan-gp", 10.0)),
            "half": (self.part, judged_half, Penalty("r1", 5.0, every=2)),
        }
        critics = [
            adversary(
                name, network, self.loss, adam, make=self.make, judged=judged, penalty=penalty,
                shared=name == "half",
            )
            for name, (network, judged, penalty) in parts.items()
        ]  # fmt: skip
        return [*critics, Player("generator", self.generator, self.fool, adam)]


# ---- all ----------------------------------------------------------------------------------------

GAMES = {"translate": (Translate, pairs), "speak": (Speak, sentences)}


@pytest.fixture(params=GAMES)
def start(request, tmp_path):
    game_class, make_data = GAMES[request.param]

    def start(out, steps=8, **settings):
        data = make_data()
        torch.manual_seed(0)
        settings = {"log_every": 1, "sample_every": 4, "checkpoint_every": 4} | settings
        settings |= {"out": str(tmp_path / out), "steps": steps, "batch_size": 8, "device": "cpu"}
        config = Config(data="made by hand", **settings)
        return Trainer(game_class(data.spec), data, config)

    return start


def test_it_trains_samples_and_reports(start):
    trainer = start("run")
    trainer.fit()
    run = trainer.run
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    suffix = {"target": "png", "words": "txt"}[trainer.game.makes]
    assert (run / f"samples.{suffix}").stat().st_size > 0
    assert {path.name for path in (run / "samples").iterdir()} == {
        f"step_{step:08d}.{suffix}" for step in (4, 8)
    }
    report = (run / "report.html").read_text()
    for name in ("l1", "real", "penalty") if suffix == "png" else ("nll", "bce", "policy"):
        assert name in report
    if suffix == "txt":
        line = (run / "samples.txt").read_text().splitlines()[0]
        assert set(line.split()) <= set(WORDS[1:])
        assert line in report


def test_it_resumes_bit_for_bit(start):
    whole = start("whole")
    whole.fit()
    start("parts", steps=4).fit()
    parts = start("parts")
    parts.load(parts.run / "checkpoints" / "step_00000004.pt")
    parts.fit()
    for name, value in whole.game.state_dict().items():
        assert torch.equal(parts.game.state_dict()[name], value), name
    for average, other in zip(whole.ema.values(), parts.ema.values(), strict=True):
        for name, value in average.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


def test_it_is_loaded_and_sampled(start):
    trainer = start("run", steps=2)
    trainer.fit()
    game, _ = load_game(trainer.run, game=type(trainer.game))
    given = {name: torch.zeros(3, *trainer.data.spec[name].shape) for name in game.given}
    made = game.sample(3, rng=rng(1), **given)
    with trainer.sampling() as trained:
        torch.testing.assert_close(made, trained.sample(3, rng=rng(1), **given))
    assert made.shape == (3, *trainer.data.spec[game.makes].shape)


def test_words_have_a_metric(start, tmp_path):
    if "bigrams" not in metrics.names():
        metrics.register("bigrams", Bigrams)
    if start("plain").game.makes != "words":
        with pytest.raises(ValueError, match="'bigrams' must be of type Tokens, got of type Image"):
            start("other", score="bigrams")
        return
    trainer = start("run", score="bigrams")
    trainer.fit()
    kept = json.loads((trainer.run / "checkpoints/best.json").read_text())
    rows = [json.loads(line) for line in (trainer.run / "metrics.jsonl").open()]
    scores = {row["step"]: row["score/bigrams"] for row in rows if "score/bigrams" in row}
    assert list(scores) == [4, 8]
    assert (kept["metric"], kept["score"]) == ("bigrams", min(scores.values()))


def test_phases_and_schedules(start):
    trainer = start("run")
    names, rates = [], []
    for _ in range(5):
        trainer.iterate()
        names.append({name.split("/")[0] for name in trainer.losses.take()})
        rates += [group["lr"] for group in trainer.optimizers["generator"].param_groups]
    if isinstance(trainer.game, Speak):
        assert names == [{"pretraining"}] * 3 + [{"discriminator", "generator"}] * 2
    else:
        assert rates == pytest.approx([0.0075, 0.005, 0.0025, 0, 0])


def test_players_that_share_a_batch_see_the_same_fakes():
    data = pairs()
    game = Translate(data.spec)
    seen = []
    game.generator.register_forward_hook(lambda *_: seen.append(1))
    config = Config(steps=1, batch_size=8, device="cpu", ema=0)
    Trainer(game, data, config).iterate()
    assert len(seen) == 1


def test_a_file_format_a_game_and_a_metric_of_others_work_from_the_command_line(
    tmp_path, monkeypatch, capsys
):
    """Each is registered once, as by an entry point, and known to every command by its name."""
    for registry, name, cls in (
        (data_module, "lines", Lines), (games, "speech", Speak), (metrics, "bigrams", Bigrams),
    ):  # fmt: skip
        registry.register(name, cls)
    monkeypatch.chdir(tmp_path)
    lines = "".join(" ".join(WORDS[i] for i in row) + "\n" for row in sentences().columns["words"])
    (tmp_path / "set.words").write_text(lines)
    train = ["train", "speech", "--data", "set.words", "--device", "cpu", "--out", "run"]
    settings = ["--set", "length=4", "--set", "score=bigrams", "--batch-size", "8"]
    assert main([*train, *settings, "--steps", "5"]) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["game"], config["length"]) == ("speech", 4)
    assert config["data"] == f"lines:{tmp_path}/set.words"
    assert "size" not in config
    assert main([*train, "--resume", "--steps", "6"]) == 0
    with pytest.raises(ValueError, match="length cannot change when a run is resumed"):
        training.start("speech", out="run", resume=True, length=5)
    capsys.readouterr()
    assert main(["evaluate", "run", "--device", "cpu", "--json", "scores.json"]) == 0
    assert "distance of the bigrams" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert 0 < scores["bigrams"] <= 1
    assert main(["evaluate", "run", "--device", "cpu", "--metrics", "frechet"]) == 2
    assert "'frechet' must be of type Image, got of type Tokens" in capsys.readouterr().err
    assert main(["sample", "run", "--device", "cpu"]) == 2
    assert "must be of a game that makes images from noise" in capsys.readouterr().err
    again = training.start("run/config.json", out="again")
    assert len(again.data) == 30
    assert again.data.spec["words"].length == 4
    assert (
        training.start("speech", data="lines:set.words", out="named").data.spec["words"].length == 5
    )


def test_a_game_with_two_penalties(tmp_path):
    images = torch.randint(256, (20, 1, 8, 8), generator=rng(), dtype=torch.uint8)
    data = Columns({"images": Image(1, 8, 8)}, {"images": images}, "noise")
    config = Config(out=str(tmp_path), steps=2, batch_size=8, device="cpu")
    torch.manual_seed(0)
    trainer = Trainer(Domains(data.spec), data, config)
    terms = []
    for _ in range(2):
        trainer.iterate()
        terms.append(set(trainer.losses.take()))
    assert {"whole/penalty", "half/penalty", "generator/whole"} <= terms[0]
    assert "whole/penalty" in terms[1]
    assert "half/penalty" not in terms[1]
    with pytest.raises(ValueError, match=r"penalty must be none, .*, got 'gp'"):
        Penalty("gp")
    with pytest.raises(ValueError, match="penalty_every must be at least 1, got 0"):
        Penalty(every=0)
