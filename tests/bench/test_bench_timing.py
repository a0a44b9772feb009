"""The timing, with a clock that the tests control."""

import pytest

from gankernels.bench import timing
from gankernels.bench.timing import interleaved, machine


@pytest.fixture
def clock(monkeypatch):
    """`clock.run(name, *seconds)` makes a contender that takes these times in turn."""

    class Clock:
        now, told = 0.0, []

        def run(self, name, *seconds):
            left = list(seconds)

            def contender():
                self.told.append(name)
                self.now += left.pop(0) if len(left) > 1 else left[0]

            return contender

    clock = Clock()
    clock.told = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_contenders_run_in_turn(clock):
    runs = {"a": clock.run("a", 1.0), "b": clock.run("b", 2.0)}
    times = interleaved(runs, seconds=0, least=3)
    assert clock.told == [*"aabb", *"ababab"]
    assert (times["a"].median, times["b"].median) == (1.0, 2.0)
    assert (times["a"].rounds, times["a"].calls, times["a"].spread) == (3, 1, 0.0)


def test_it_goes_on_for_as_long_as_asked(clock):
    assert interleaved({"a": clock.run("a", 1.0)}, seconds=20, least=1)["a"].rounds == 20


def test_it_ends_when_it_must(clock):
    """With fewer rounds than wanted, but one."""
    runs = {"a": clock.run("a", 1.0)}
    assert interleaved(runs, seconds=0, least=9, most=3)["a"].rounds == 4
    assert interleaved(runs, seconds=0, least=9, most=0)["a"].rounds == 1


def test_medians_and_quartiles(clock):
    warm_up, measured = [9.0, 9.0], [5.0, 1.0, 3.0, 2.0, 4.0]
    (found,) = interleaved({"a": clock.run("a", *warm_up, *measured)}, seconds=0, least=5).values()
    assert found[:4] == (3.0, 2.0, 4.0, 1.0)
    assert found.spread == pytest.approx(2 / 3)


def test_one_round_has_no_spread(clock):
    (found,) = interleaved({"a": clock.run("a", 2.0)}, seconds=0, least=1).values()
    assert found[:4] == (2.0, 2.0, 2.0, 2.0)


def test_short_calls_are_repeated(clock):
    runs = {"short": clock.run("short", 0.25), "long": clock.run("long", 5.0)}
    times = interleaved(runs, seconds=0, least=2, span=1.0)
    assert (times["short"].calls, times["long"].calls) == (4, 1)
    assert times["short"].median == 0.25  # of one call
    tiny = interleaved({"": clock.run("", 1e-9)}, seconds=0, span=1.0)[""]
    assert tiny.calls == timing.MOST_CALLS


def test_the_clock_waits_for_the_device(clock):
    def wait():
        clock.now += 1.0

    assert interleaved({"a": lambda: None}, seconds=0, wait=wait)["a"].median == 1.0


def test_machine():
    assert {"cpu", "threads", "capability", "torch", "gankernels", "date"} == machine().keys()


def test_roofs(monkeypatch):
    """With a clock by which everything takes a thousandth of a second."""
    calls = []

    def interleaved(runs, **options):
        calls.append(options)
        runs[""]()
        return {"": timing.Timing(2e-3, 1e-3, 3e-3, 1e-3, 5, 1)}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    roofs = timing.ceilings("cpu")
    assert roofs == {
        "memory": pytest.approx(2 * 4 * 2**26 / 1e-3),
        "cache": pytest.approx(2 * 4 * 2**16 / 1e-3),
        "operations": pytest.approx(2 * (16 * 256 * 16 * 16) * (256 * 9) / 1e-3),
    }
