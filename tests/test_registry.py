"""Classes that are found by name: games, kinds of data and metrics."""

import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from gankernels import _registry, games
from gankernels._registry import Registry
from gankernels.games import Game
from gankernels.games.gan import GAN


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(_registry, "_installed", lambda group: EntryPoints())
    return Registry("gankernels.games", "game", Game)


class Mine(GAN):
    pass


def test_unknown_names(registry):
    with pytest.raises(
        ValueError, match=r"^unknown game 'wgan_gp'; did you mean 'wgan-gp'\? Avail"
    ):
        registry.get("wgan_gp")
    with pytest.raises(ValueError, match=r"^unknown game 'zzz'\. Available: cdcgan, cgan, .*wgan"):
        registry.get("zzz")


def test_registered_classes(registry):
    assert registry.register("mine", Mine) is Mine
    assert registry.register("mine", Mine) is Mine
    assert registry.get("mine") is Mine
    assert registry.name_of(Mine) == "mine"
    assert registry.name_of(GAN) == "gan"
    assert registry.names() == sorted([*games.names(), "mine"])
    with pytest.raises(ValueError, match="name must be new, got 'mine', which another game has"):
        registry.register("mine", type("Other", (GAN,), {}))
    with pytest.raises(ValueError, match="name must be new, got 'gan'"):
        registry.register("gan", Mine)
    with pytest.raises(TypeError, match="other must be a subclass of Game, got <class 'int'>"):
        registry.register("other", int)


def test_entry_points(registry, monkeypatch):
    found = EntryPoint("theirs", f"{__name__}:Mine", "gankernels.games")
    monkeypatch.setattr(_registry, "_installed", lambda group: EntryPoints([found]))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Mine.__module__])
    assert "theirs" in registry.names()
    assert registry.get("theirs") is Mine
    assert registry.name_of(Mine) == "theirs"


def test_a_module_must_define_one_class(registry, tmp_path, monkeypatch):
    (tmp_path / "no_game.py").write_text("")
    (tmp_path / "two_games.py").write_text(
        "from gankernels.games.gan import GAN\nclass A(GAN): pass\nclass B(GAN): pass\n"
    )
    monkeypatch.setattr(games, "__path__", [*games.__path__, str(tmp_path)])
    with pytest.raises(TypeError, match=r"games\.no_game must define one Game, got none"):
        registry.get("no-game")
    with pytest.raises(TypeError, match=r"games\.two_games must define one Game, got A, B"):
        registry.get("two-games")
    for name in ("no_game", "two_games"):
        sys.modules.pop(f"gankernels.games.{name}", None)
