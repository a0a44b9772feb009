"""Two games that share little with those of the package, each a class of its own and nothing else.

The trainer trains, resumes, samples and reports them as it is. One maps images to images, which
come in pairs and are not square. The other makes words: it is trained by maximum likelihood first
and by policy gradients afterwards.
"""

import json
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gankernels.data import Columns, Image, Tokens
from gankernels.games import Adversarial, BareOptions, DiscriminatorOptions, Game, Player, option
from gankernels.train import Config, Trainer, load_game


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


# ---- both ----------------------------------------------------------------------------------------

GAMES = {"translate": (Translate, pairs), "speak": (Speak, sentences)}


@pytest.fixture(params=GAMES)
def start(request, tmp_path):
    game_class, make_data = GAMES[request.param]

    def start(out, steps=8, **settings):
        data = make_data()
        torch.manual_seed(0)
        settings = {"log_every": 1, "sample_every": 4, "checkpoint_every": 4} | settings
        config = Config(
            out=str(tmp_path / out), steps=steps, batch_size=8, device="cpu", **settings
        )
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
