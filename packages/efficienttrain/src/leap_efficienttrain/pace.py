"""Whether a loader keeps up with what it feeds."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

__all__ = ["Pace"]

WARM_UP, STEPS, TOLERANCE = 10, 50, 0.1


class Pace:
    """Times the loader and its consumer, and warns once, after 50 steps, where the loader is the slower one.

    The first steps, in which workers and kernels start, do not count.

    Args:
        ahead: whether the loader works while its consumer does, in workers.
        synchronise: waits for the device, whose backlog is the consumer's time.
        clock: seconds.
    """

    def __init__(
        self,
        ahead: bool,
        synchronise: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.ahead, self.synchronise, self.clock = ahead, synchronise, clock
        self.steps, self._since = 0, 0.0
        self._forget()

    def _forget(self) -> None:
        self.images, self.waited, self.consumed = 0, 0.0, 0.0

    @property
    def had(self) -> float:
        """Images per second that the loader gave or, where it works ahead of nobody, could have given."""
        seconds = self.waited + self.consumed * self.ahead
        return self.images / seconds if seconds else 0.0

    @property
    def needed(self) -> float:
        """Images per second that the consumer could have taken."""
        return self.images / self.consumed if self.consumed else float("inf")

    def start(self) -> None:
        """A pass begins; what happened since the last one does not count."""
        self._since = self.clock()

    def loaded(self, images: int) -> None:
        """A batch is there."""
        self.images, self.waited = self.images + images, self.waited + self._passed()

    def asked(self) -> None:
        """The next batch is asked for."""
        self.consumed, self.steps = self.consumed + self._passed(), self.steps + 1
        if self.steps in (WARM_UP, STEPS):
            self.synchronise()
            backlog = self._passed()
            self.waited, self.consumed = max(self.waited - backlog, 0.0), self.consumed + backlog
        if self.steps == WARM_UP:
            self._forget()
        elif self.steps == STEPS and self.had < (1 - TOLERANCE) * self.needed:
            text = f"the loader gives {self.had:.0f} images/s, and {self.needed:.0f} are needed"
            warnings.warn(f"{text}: try more workers, augment_at='low', a cache or replay", stacklevel=4)

    def _passed(self) -> float:
        before, self._since = self._since, self.clock()
        return self._since - before
