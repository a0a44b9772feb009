"""The analysis of a forward's source."""

import pytest
from fusing import Net
from torch import nn

import gankernels as gk
from gankernels.fuse._source import Source, UnreadableError, refuses


def conditional(x):
    if x > 1: raise ValueError("one line")  # fmt: skip  # noqa: E701


def message(x):
    raise ValueError("a message of " + x)


def asserting(x):
    assert x > 1, (
        "too small"
    )  # fmt: skip


def failing(x):
    return x + "text"


def refusing(x):
    if x < 2:
        raise ValueError(
            f"{x} is too small"
        )  # fmt: skip


@pytest.mark.parametrize(
    ("function", "argument", "expected"),
    [
        (refusing, 1, True),
        (asserting, 1, True),
        (asserting, "text", False),  # the comparison fails
        (failing, 1, False),
        (message, 1, False),  # the message fails
        (conditional, 2, False),  # it may have been the condition
    ],
)
def test_whose_error_it_is(function, argument, expected):
    with pytest.raises((AssertionError, TypeError, ValueError)) as caught:
        function(argument)
    assert refuses(caught.value) is expected


def made_from_text():
    space = {"nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return x", space)
    return space["Typed"]


def test_code_without_a_source_is_left_alone():
    with pytest.raises(UnreadableError, match="there is no source of forward"):
        Source(made_from_text())

    class Holder(made_from_text()):
        def __init__(self):
            super().__init__()
            self.bn, self.act = nn.BatchNorm2d(4), nn.ReLU()

    lines = []
    gk.fuse(Holder(), log=lines.append)
    (line,) = lines
    assert line.endswith("cannot be traced: there is no source of forward")


class Suppressing(Net):
    def forward(self, x):
        from contextlib import suppress

        with suppress(TypeError):
            x = self.conv(x)
        return self.bn(x).relu()


def test_errors_that_are_suppressed_are_caught_too():
    assert Source(Suppressing).catches_errors
    assert not Source(nn.Sequential).catches_errors
