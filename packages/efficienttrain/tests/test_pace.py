"""Whether the loader keeps up: told by a clock of our own."""

from __future__ import annotations

import warnings

import pytest

from leap_efficienttrain.pace import Pace


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(pace: Pace, clock: Clock, wait: float, work: float, steps: int = 50) -> None:
    pace.start()
    for _ in range(steps):
        clock.now += wait
        pace.loaded(32)
        clock.now += work
        pace.asked()


def test_a_loader_that_is_slower_warns_once_with_what_it_gives_and_what_is_needed() -> None:
    pace = Pace(ahead=True, clock=(clock := Clock()))
    with pytest.warns(UserWarning, match="the loader gives 80 images/s, and 320 are needed"):
        run(pace, clock, 0.3, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(pace, clock, 0.3, 0.1, 100)


@pytest.mark.parametrize(("ahead", "wait"), [(True, 0.0), (True, 0.005), (False, 0.09)])
def test_a_loader_that_keeps_up_is_silent(ahead: bool, wait: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Pace(ahead, clock=(clock := Clock())), clock, wait, 0.1)


def test_the_first_steps_do_not_count() -> None:
    pace = Pace(ahead=True, clock=(clock := Clock()))
    run(pace, clock, 100, 0.1, 10)
    run(pace, clock, 0.0, 0.1, 40)
    assert pace.had == pytest.approx(320)


def test_a_device_that_is_behind_is_what_is_slow() -> None:
    clock = Clock()

    def catch_up() -> None:
        clock.now += 10

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Pace(True, catch_up, clock), clock, 0.1, 0.01)


def test_fifty_steps_over_several_passes_are_enough() -> None:
    pace = Pace(ahead=False, clock=(clock := Clock()))
    run(pace, clock, 0.3, 0.1, 25)
    clock.now += 1000  # between passes
    with pytest.warns(UserWarning, match="the loader gives 107 images/s, and 320 are needed"):
        run(pace, clock, 0.3, 0.1, 25)
