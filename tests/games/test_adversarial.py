"""The options of every game with a discriminator: penalties and statistics of the batch."""

import json
from dataclasses import fields

import pytest
import torch
from torch import nn

from gankernels import functional, games
from gankernels import nn as gknn
from gankernels.cli import main
from gankernels.games import Adversarial, AdversarialOptions, Batch, DataSpec, Player, Round
from gankernels.ops.gradient_norm_penalty import KINDS
from gankernels.train import load_game

SPEC = DataSpec(channels=1, size=12, num_classes=3)
NAMES = [n for n in games.names() if issubclass(games.get(n), Adversarial)]


def make(name, spec=SPEC, **options):
    torch.manual_seed(0)
    game_class = games.get(name)
    if hasattr(game_class.Options, "width"):
        options.setdefault("width", 4)
    return game_class(spec, game_class.Options(**options))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch():
    images = torch.rand(8, 1, 12, 12, generator=rng()) * 2 - 1
    return Batch({"images": images, "labels": torch.arange(8) % 3})


# ---- the penalty ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_game_takes_every_penalty(name, kind, batch):
    game = make(name, penalty=kind, penalty_weight=3.0, penalty_every=4).eval()  # no dropout
    with torch.no_grad():
        game.discriminator.head.weight *= 100  # a gradient that the one-sided kind objects to
    player = game.players()[0]
    terms = player.loss_of(4)(batch, rng(3))
    # By hand: the same noise, then whatever the penalty draws.
    state = rng(3)
    labels = game.conditions(batch)
    fake = game.generator(torch.randn(8, 100, generator=state), *labels)
    penalty = functional.gradient_penalty(
        game.discriminator, batch.images, fake, kind=kind, critic_args=labels, generator=state
    )
    assert penalty > 0
    torch.testing.assert_close(terms.pop("penalty"), 3 * 4 * penalty)
    unpenalised = player.loss_of(5)(batch, rng(3))
    assert terms.keys() == unpenalised.keys()
    for term, value in unpenalised.items():
        torch.testing.assert_close(terms[term], value)


def test_a_conditional_critic_is_penalised_at_its_labels(batch):
    game = make("cgan", penalty="r1").eval()
    (penalised,) = (p for p in game.players() if p.lazy_loss)
    one = penalised.lazy_loss(batch, rng())["penalty"]
    flipped = Batch({"images": batch.images, "labels": batch.labels.flip(0)})
    other = penalised.lazy_loss(flipped, rng())["penalty"]
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_penalty_moves_the_discriminator_only(name, batch):
    game = make(name, penalty="r2")
    game.generator.requires_grad_(False)
    for player in game.players():
        game.zero_grad()
        if player.lazy_loss is None:
            assert player.network is game.generator
            continue
        assert player.network is game.discriminator
        player.lazy_loss(batch, rng())["penalty"].backward()
        assert any(p.grad is not None and p.grad.any() for p in player.network.parameters())
        assert all(p.grad is None for p in game.generator.parameters())


def test_penalty_is_lazy():
    game = make("gan", penalty="r1", penalty_every=3)
    player, generator = game.players()
    lazy = [player.loss_of(step) is player.lazy_loss for step in range(7)]
    assert lazy == [True, False, False, True, False, False, True]
    assert {generator.loss_of(step) for step in range(3)} == {generator.loss}


def test_without_a_penalty_there_is_none(batch):
    for game in (make("gan"), make("wgan-gp", penalty=None)):
        player = game.players()[0]
        assert player.lazy_loss is None
        assert "penalty" not in player.loss_of(0)(batch, rng())


def test_lazy_every_is_checked():
    with pytest.raises(ValueError, match="lazy_every of player 'd' must be at least 1"):
        Player("d", nn.Linear(1, 1), dict, torch.optim.SGD, lazy_every=0)


# ---- wgan-gp and dragan --------------------------------------------------------------------------


def test_wgan_gp_is_configured_as_published(batch):
    critic, generator = make("wgan-gp", DataSpec()).players()
    assert (critic.steps, generator.steps, critic.lazy_every) == (5, 1, 1)
    assert critic.after_step is None
    for player in (critic, generator):
        optimizer = player.optimizer(list(player.network.parameters()))
        assert isinstance(optimizer, torch.optim.Adam)
        assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (1e-4, (0.5, 0.9))
    game = make("wgan-gp").eval()
    critic, generator = game.players()
    fake = game.generator(torch.randn(8, 100, generator=rng(3)))
    terms = critic.loss_of(0)(batch, rng(3))
    assert terms.keys() == {"wasserstein", "penalty"}
    torch.testing.assert_close(
        terms["wasserstein"],
        game.discriminator(fake).mean() - game.discriminator(batch.images).mean(),
    )
    options = game.options
    assert (options.penalty, options.penalty_weight, options.penalty_every) == ("wgan-gp", 10, 1)


@pytest.mark.parametrize("networks", ["dense", "conv"])
def test_no_norm_in_a_wgan_gp_critic(networks):
    game = make("wgan-gp", networks=networks)
    norms = nn.modules.batchnorm._NormBase
    assert not [m for m in game.discriminator.modules() if isinstance(m, norms)]
    assert game.channels_last == (networks == "conv")


def test_wgan_gp_options_are_checked():
    with pytest.raises(ValueError, match="networks must be dense or conv, got 'deep'"):
        make("wgan-gp", networks="deep")
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        make("wgan-gp", width=0)


def test_dragan_is_configured_as_published(batch):
    game = make("dragan")
    options = game.options
    assert (options.penalty, options.penalty_weight, options.penalty_every) == ("dragan", 10, 1)
    terms = game.players()[0].loss_of(0)(batch, rng())
    assert terms.keys() == {"real", "fake", "penalty"}


@pytest.mark.parametrize("name", ["wgan-gp", "dragan"])
def test_a_penalty_pulls_the_gradient_towards_norm_one(name, batch):
    """Trained on its penalty alone, a critic ends with gradients of norm one at the data."""
    game = make(name)
    player = game.players()[0]
    optimizer = torch.optim.Adam(game.discriminator.parameters(), lr=1e-3)
    state = rng()
    for _ in range(150):
        optimizer.zero_grad()
        player.loss_of(0)(batch, state)["penalty"].backward()
        optimizer.step()
    x = batch.images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(game.discriminator(x).sum(), x)
    norms = gradient.flatten(1).norm(dim=1)
    assert (norms - 1).abs().max() < 0.35, norms


# ---- statistics of the batch ---------------------------------------------------------------------


def layers(game):
    kinds = (gknn.MinibatchDiscrimination, gknn.MinibatchStddev)
    return [m for m in game.discriminator.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize("penalty", [None, "r1"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", [SPEC, DataSpec(3, 32, 5)])
def test_every_game_takes_statistics(name, spec, penalty):
    game = make(name, spec, minibatch_discrimination="6,2", minibatch_stddev=True, penalty=penalty)
    deviation, discrimination = layers(game)
    assert isinstance(deviation, gknn.MinibatchStddev)
    assert (discrimination.num_kernels, discrimination.kernel_dim) == (6, 2)
    images = torch.rand(8, *spec.image_shape, generator=rng()) * 2 - 1
    batch = Batch({"images": images, "labels": torch.arange(8) % spec.num_classes})
    for player in game.players():
        game.zero_grad()
        sum(player.loss_of(0)(batch, rng()).values()).backward()
        for key, parameter in player.network.named_parameters():
            assert parameter.grad is not None, f"{player.name}: {key}"
            assert parameter.grad.isfinite().all(), f"{player.name}: {key}"


def test_statistics_are_not_there_unless_asked_for():
    assert all(not layers(make(name)) for name in NAMES)


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["100", "100,5,2", "a,b", "0,5", "3,-1", "", "2.5,1"])
def test_kernels_are_checked(given):
    with pytest.raises(ValueError, match=r"must be K,C, .* such as 100,5, got") as error:
        AdversarialOptions(minibatch_discrimination=given)
    assert repr(given) in str(error.value)


def test_penalty_options_are_checked():
    with pytest.raises(ValueError, match=r"penalty must be none, wgan-gp, .*, r2, got 'r3'"):
        AdversarialOptions(penalty="r3")
    with pytest.raises(ValueError, match="penalty_every must be at least 1, got 0"):
        AdversarialOptions(penalty_every=0)
    with pytest.raises(ValueError, match=r"penalty_weight must not be negative, got -1.0"):
        AdversarialOptions(penalty_weight=-1.0)


FAST = ["--steps", "5", "--batch-size", "8", "--device", "cpu", "--set", "size=12"]
FLAGS = ["--minibatch-discrimination", "4,2", "--minibatch-stddev", "--penalty", "r1"]
FLAGS += ["--penalty-weight", "0.5", "--penalty-every", "4"]


def train(out, model, *more):
    return main(["train", model, "--data", "digits", *FAST, "--out", str(out), *more])


@pytest.mark.parametrize("model", NAMES)
def test_flags_are_settings_on_any_game(tmp_path, model):
    small = ["--set", "width=4"] if hasattr(games.get(model).Options, "width") else []
    assert train(tmp_path / "run", model, *FLAGS, *small, "--set", "log_every=1") == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    chosen = {f.name: config[f.name] for f in fields(AdversarialOptions) if f.name != "latent_dim"}
    assert chosen == {
        "minibatch_discrimination": "4,2",
        "minibatch_stddev": True,
        "penalty": "r1",
        "penalty_weight": 0.5,
        "penalty_every": 4,
    }
    game, _ = load_game(tmp_path / "run")
    assert len(layers(game)) == 2
    # The log has the penalty where it was due: on steps 1 and 5, or at every fourth of five each.
    (player,) = (p for p in game.players() if p.lazy_loss)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    due = [row["step"] for row in rows if f"{player.name}/penalty" in row]
    expected = {1: [1, 5], 5: [1, 2, 3, 4, 5]}[player.steps]
    assert due == expected


def test_set_says_the_same_as_flags(tmp_path):
    assert train(tmp_path / "flags", "gan", *FLAGS) == 0
    settings = ["minibatch_discrimination=4,2", "minibatch_stddev=true", "penalty=r1"]
    settings += ["penalty_weight=0.5", "penalty_every=4"]
    assert train(tmp_path / "set", "gan", *[a for s in settings for a in ("--set", s)]) == 0
    one, other = (tmp_path / name / "samples.png" for name in ("flags", "set"))
    assert one.read_bytes() == other.read_bytes()
    again = tmp_path / "again"
    assert main(["train", str(tmp_path / "flags/config.json"), "--out", str(again)]) == 0
    assert (again / "samples.png").read_bytes() == one.read_bytes()


@pytest.mark.parametrize("model", ["gan", "wgan-gp"])
def test_resumed_runs_keep_the_rhythm_of_the_penalty(tmp_path, model):
    flags = [*FLAGS, "--set", "log_every=1"]
    assert train(tmp_path / "whole", model, *flags, "--steps", "7") == 0
    assert train(tmp_path / "parts", model, *flags, "--steps", "3") == 0
    assert train(tmp_path / "parts", model, "--steps", "7", "--resume", "--set", "log_every=1") == 0
    rows, again = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "parts")
    )
    assert [row | {"it_per_s": 0} for row in again] == [row | {"it_per_s": 0} for row in rows]
    (one,), (other,) = (
        (tmp_path / name / "checkpoints").glob("step_00000007.pt") for name in ("whole", "parts")
    )
    one, other = (torch.load(path, weights_only=True)["game"] for path in (one, other))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_penalties_can_be_left_out(tmp_path):
    assert train(tmp_path / "run", "wgan-gp", "--penalty", "none") == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["penalty"] is None


@pytest.mark.parametrize("model", ["wgan-gp", "dragan"])
def test_conv_networks_train(tmp_path, model):
    more = ["--set", "networks=conv", "--set", "width=4"] if model == "wgan-gp" else []
    assert train(tmp_path / "run", model, *more) == 0


def test_options_that_do_not_fit_say_so(tmp_path, monkeypatch, capsys):
    def fails(model, *flags):
        capsys.readouterr()
        assert train(tmp_path / "run", model, *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return error

    assert "penalty must be none, wgan-gp" in fails("gan", "--penalty", "gp")
    assert "must be K,C" in fails("gan", "--minibatch-discrimination", "many")

    class Alone(games.Game):
        """Has no discriminator."""

    class Odd(games.get("gan")):
        """Has a discriminator without a head."""

        def make_discriminator(self):
            return nn.Sequential(nn.Flatten(), nn.Linear(144, 1))

    monkeypatch.setattr(games, "get", {"alone": Alone, "odd": Odd}.get)
    assert "unknown setting 'penalty'" in fails("alone", "--penalty", "r1")
    assert "Sequential has no linear or convolutional head" in fails("odd", "--minibatch-stddev")


# ---- real and generated images -------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_judging_in_one_go_changes_nothing(name, batch):
    game = make(name).eval()
    fake = torch.rand_like(batch.images) * 2 - 1
    labels = game.conditions(batch)
    others = tuple((given + 1) % 3 for given in labels)
    calls = []
    game.discriminator.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    made = {"images": fake, **dict(zip(game.given, others, strict=True))}

    def outputs(made):
        batch.made = made
        settings = {"make": game.make, "network": game.discriminator, "judged": game.judged}
        round = Round(batch, torch.Generator(), **settings, together=True)
        return round.real, round.fake

    found = outputs(made)
    together = getattr(game.discriminator, "per_sample", False)
    assert calls == ([16] if together else [8, 8])
    expected = game.discriminator(batch.images, *labels), game.discriminator(fake, *others)
    torch.testing.assert_close(found, expected)
    # The labels of real images are those of fakes that come without their own.
    torch.testing.assert_close(outputs({"images": fake})[1], game.discriminator(fake, *labels))
