"""The verb that measures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from leap_shared.cli import Command, Context

__all__ = ["Bench"]


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure the attention, layers, training and whole models beside their peers, interleaved, and count memory.

    Parts are operator, modules, training, models, neighborhood (natten, FlexAttention) and memory, which is counted
    over kernel sizes; each writes its table, picture and the machine's stamp. On a CPU everything is in float32, and
    one thread is timed by its own clock; on a GPU in bfloat16, in batches of 64, and models are compiled.

    Examples:
        leap-slide bench --parts operator memory --threads 1
        leap-slide bench --no-peers --json
        leap-slide bench --quick
    """

    parts: tuple[str, ...] = ()
    """Parts to measure; all where none is given."""
    threads: tuple[int, ...] = (1, 0)
    """Numbers of CPU threads, one after the other; 0 is what PyTorch takes by itself."""
    rounds: int = 15
    """How often each contender's turn comes."""
    peers: bool = True
    """Measure beside softmax attention, natten and timm's models too, not forms of the same formula alone."""
    flex: bool = False
    """Compile FlexAttention on a CPU too, which takes a C++ compiler and a minute."""
    quick: bool = False
    """A trial of less than a minute on small sizes: shows that everything runs."""

    def run(self, context: Context) -> object:
        """Measure."""
        from leap_slide import benchmark

        sizes: dict[str, Any] = {"parts": self.parts, "threads": self.threads, "peers": self.peers, "flex": self.flex}
        make = benchmark.Settings.quick if self.quick else partial(benchmark.Settings, rounds=self.rounds)
        settings = make(**sizes)
        return benchmark.run(settings, context)
