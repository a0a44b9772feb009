"""Settings: defaults, conversion, errors."""

from dataclasses import dataclass, fields

import pytest

from gankernels import data, games
from gankernels.games import Game, Options, option
from gankernels.train.config import Config, configure, from_dict, parse_assignments, to_dict


@dataclass(frozen=True)
class EveryKind(Options):
    whole: int = option(1, "")
    number: float = option(1.0, "")
    flag: bool = option(False, "")
    text: str = option("a", "")
    maybe: int | None = option(None, "")


class Sample(Game):
    Options = EveryKind
    defaults = {"batch_size": 32, "whole": 5}  # noqa: RUF012


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("whole", "7", 7),
        ("whole", 7.0, 7),
        ("number", "1e-4", 1e-4),
        ("number", 3, 3.0),
        ("flag", "True", True),
        ("flag", "false", False),
        ("text", "x=y", "x=y"),
        ("maybe", "3", 3),
        ("maybe", "none", None),
        ("maybe", None, None),
        ("size", "32", 32),
    ],
)
def test_values(name, given, value):
    config, options = configure(Sample, {name: given})
    found = {**vars(config), **vars(config.data_options), **vars(options)}[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("whole", "1.5", "whole must be a whole number, got '1.5'"),
        ("whole", 1.5, "whole must be a whole number, got 1.5"),
        ("whole", True, "whole must be a whole number, got True"),
        ("whole", None, "whole must be a whole number, got None"),
        ("number", "fast", "number must be a number, got 'fast'"),
        ("flag", "maybe", "flag must be true or false, got 'maybe'"),
        ("batchsize", "1", "unknown setting 'batchsize'; did you mean 'batch_size'"),
        ("zzz", "1", "unknown setting 'zzz'; known: batch_size, "),
        ("steps", 0, "steps must be at least 1, got 0"),
        ("batch_size", 1, "batch_size must be at least 2, got 1"),
        ("ema", 1, r"ema must lie in \[0, 1\), got 1"),
        ("precision", "fp8", "precision must be fp32, bf16, fp16, got 'fp8'"),
    ],
)
def test_errors(name, given, message):
    with pytest.raises(ValueError, match=message):
        configure(Sample, {name: given})


def test_a_game_has_its_own_defaults():
    config, options = configure(Sample, {})
    assert (config.batch_size, options.whole) == (32, 5)
    assert configure(Sample, {"batch_size": 8})[0].batch_size == 8


@pytest.mark.parametrize("name", games.names())
def test_no_option_shadows_a_setting_and_all_are_explained(name):
    options = {f.name: f for f in fields(games.get(name).Options)}
    settings = {f.name: f for f in fields(Config) if f.name != "data_options"}
    for kind in data.kinds():
        more = {f.name: f for f in fields(data.get_kind(kind).Options)}
        assert not more.keys() & (options.keys() | settings.keys())
        assert all(f.metadata["help"] for f in more.values())
    assert not options.keys() & settings.keys()
    for f in (options | settings).values():
        assert f.metadata["help"]
    assert games.get(name).defaults.keys() <= options.keys() | settings.keys()


def test_round_trip():
    config, options = configure(games.get("wgan"), {"clip": 0.02, "steps": 7})
    content = to_dict("wgan", config, options)
    assert "out" not in content
    settings = from_dict(content, "here")
    assert settings.pop("game") == "wgan"
    assert configure(games.get("wgan"), settings) == (config, options)


def test_foreign_configurations():
    with pytest.raises(ValueError, match="here is not a configuration"):
        from_dict([1], "here")
    with pytest.raises(ValueError, match="here has format 9, this version reads 2"):
        from_dict({"format": 9, "game": "gan"}, "here")


def test_assignments():
    assert parse_assignments(["a=1", "b=c=d"]) == {"a": "1", "b": "c=d"}
    with pytest.raises(ValueError, match="--set takes key=value, got 'lr'"):
        parse_assignments(["lr"])


@pytest.mark.parametrize(
    ("name", "most"), [("steps", 2**63 - 1), ("seed", 2**64 - 1), ("sample_every", None)]
)
def test_whole_numbers_beyond_what_counts(name, most):
    assert getattr(Config(**{name: 2**62}), name) == 2**62
    if most is not None:
        assert getattr(Config(**{name: most}), name) == most
        with pytest.raises(ValueError, match=f"{name} must be at most {most}, got {most + 1}"):
            Config(**{name: most + 1})
