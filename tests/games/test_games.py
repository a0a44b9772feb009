"""The registry, the losses of players, and sampling."""

import pytest
import torch
import torch.nn.functional as F

from gankernels import games
from gankernels.games import Batch, DataSpec

SPEC = DataSpec(channels=1, size=12, num_classes=3)


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


def test_registry():
    assert {"gan", "cgan", "cdcgan", "dcgan", "wgan", "wgan-gp", "dragan"} <= set(games.names())
    for name in games.names():
        assert games.get(name).__doc__
        assert make(name).name == name


def test_unknown_game():
    with pytest.raises(ValueError, match=r"unknown game 'cgann'; did you mean 'cgan'\?"):
        games.get("cgann")
    with pytest.raises(ValueError, match=r"Available: .*wgan"):
        games.get("_game")


@pytest.mark.parametrize("name", games.names())
@pytest.mark.parametrize("spec", [SPEC, DataSpec(3, 32, 5), DataSpec(3, 16, 1)])
def test_every_player_learns_from_its_loss(name, spec):
    game = make(name, spec)
    images = torch.rand(4, *spec.image_shape, generator=rng()) * 2 - 1
    batch = Batch({"images": images, "labels": torch.arange(4) % spec.num_classes})
    for player in game.players():
        terms = player.loss(batch, rng())
        assert all(value.shape == () and value.isfinite() for value in terms.values())
        game.zero_grad()
        sum(terms.values()).backward()
        for key, parameter in player.network.named_parameters():
            assert parameter.grad is not None, f"{player.name}: {key}"


@pytest.mark.parametrize("name", ["gan", "cgan", "dcgan", "cdcgan"])
def test_losses_are_binary_cross_entropy(name, batch):
    game = make(name).eval()  # without dropout
    discriminator, generator = game.players()
    labels = game.conditions(batch)
    fake = game.generator(torch.randn(8, 100, generator=rng(3)), *labels)
    real_logits = game.discriminator(batch.images, *labels)
    fake_logits = game.discriminator(fake, *labels)
    ones = torch.ones(8)
    terms = discriminator.loss(batch, rng(3))
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(terms["real"], bce(real_logits, ones))
    torch.testing.assert_close(terms["fake"], bce(fake_logits, 0 * ones))
    (adversarial,) = generator.loss(batch, rng(3)).values()
    torch.testing.assert_close(adversarial, bce(fake_logits, ones))


def test_wasserstein_losses(batch):
    game = make("wgan").eval()
    critic, generator = game.players()
    fake = game.generator(torch.randn(8, 100, generator=rng(3)))
    (critic_loss,) = critic.loss(batch, rng(3)).values()
    torch.testing.assert_close(
        critic_loss, game.discriminator(fake).mean() - game.discriminator(batch.images).mean()
    )
    (generator_loss,) = generator.loss(batch, rng(3)).values()
    torch.testing.assert_close(generator_loss, -game.discriminator(fake).mean())


def test_wgan_is_configured_as_published():
    critic, generator = make("wgan", DataSpec()).players()
    assert (critic.steps, generator.steps) == (5, 1)
    for player in (critic, generator):
        optimizer = player.optimizer(list(player.network.parameters()))
        assert isinstance(optimizer, torch.optim.RMSprop)
        assert optimizer.defaults["lr"] == 5e-5
    assert max(p.abs().max().item() for p in critic.network.parameters()) > 0.01
    with torch.no_grad():
        critic.after_step()
    assert max(p.abs().max().item() for p in critic.network.parameters()) == pytest.approx(0.01)


def test_losses_stay_float32_under_autocast(batch):
    for name in games.names():
        for player in make(name).players():
            with torch.autocast("cpu", torch.bfloat16):
                terms = player.loss(batch, rng())
            assert {value.dtype for value in terms.values()} == {torch.float32}


def test_sample_repeats_and_is_an_image():
    game = make("cgan").eval()
    labels = torch.tensor([0, 1, 2, 0, 1])
    images = game.sample(5, labels=labels, rng=rng(1))
    assert images.shape == (5, 1, 12, 12)
    assert images.dtype == torch.float32
    assert not images.requires_grad
    assert torch.equal(images, game.sample(5, labels=labels, rng=rng(1)))
    assert not torch.equal(images, game.sample(5, labels=labels, rng=rng(2)))
    assert not torch.equal(images, game.sample(5, labels=labels.flip(0), rng=rng(1)))
    torch.testing.assert_close(images, game.sample(5, labels=labels, rng=rng(1), batch_size=2))


def test_sample_of_given_noise():
    game = make("cgan").eval()
    labels = torch.tensor([0, 1, 2])
    noise = game.noise(3, rng(1))
    images = game.sample(3, labels=labels, noise=noise, batch_size=2)
    torch.testing.assert_close(images, game.sample(3, labels=labels, rng=rng(1)))
    with pytest.raises(ValueError, match=r"noise must have shape \(3, 100\), got \(2, 100\)"):
        game.sample(3, labels=labels, noise=noise[:2])


def test_sample_draws_missing_labels():
    game = make("cdcgan").eval()
    state = rng(1)
    labels = game.random_labels(40, state)
    assert set(labels.tolist()) == {0, 1, 2}
    given = game.sample(40, labels=labels, rng=state)
    assert torch.equal(given, game.sample(40, rng=rng(1)))


def test_sample_errors():
    with pytest.raises(ValueError, match="gan takes no columns, got labels"):
        make("gan").sample(2, labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        make("cgan").sample(2, labels=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"lie in 0\.\.2, got 0\.\.3"):
        make("cgan").sample(2, labels=torch.tensor([0, 3]))


def test_options_are_checked():
    with pytest.raises(ValueError, match="lr must not be negative, got -1"):
        make("gan", lr=-1.0)
    with pytest.raises(ValueError, match="latent_dim must be at least 1, got 0"):
        make("gan", latent_dim=0)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("width", 0, "width must be at least 1, got 0"), ("dropout", 1.0, "dropout must be below 1")],
)
def test_convolutional_options_are_checked(option, value, message):
    with pytest.raises(ValueError, match=message):
        make("cdcgan", **{option: value})


def test_dropout_reaches_the_discriminator():
    def rates(name, **options):
        discriminator = make(name, **options).discriminator
        return {m.p for m in discriminator.modules() if isinstance(m, torch.nn.Dropout)}

    assert rates("dcgan") == {0.3}
    assert rates("cdcgan") == {0.0}
    assert rates("cdcgan", dropout=0.1) == {0.1}


def test_games_and_models_do_not_know_the_trainer():
    import subprocess
    import sys

    code = (
        "import sys; from gankernels import games; [games.get(name) for name in games.names()];"
        "assert not [name for name in sys.modules if name.startswith('gankernels.train')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_images_are_made_when_they_are_asked_for():
    made = []
    labels = torch.zeros(2)
    batch = Batch({"images": lambda: made.append(1) or torch.zeros(2, 1, 4, 4), "labels": labels})
    assert (batch.size, list(batch), made) == (2, ["images", "labels"], [])
    with torch.inference_mode():
        images = batch["images"]
    assert images is batch.images
    assert not images.is_inference()
    assert batch["labels"] is batch.labels is labels
    assert made == [1]
    with pytest.raises(AttributeError, match="must have a column 'text', got images, labels"):
        _ = batch.text
