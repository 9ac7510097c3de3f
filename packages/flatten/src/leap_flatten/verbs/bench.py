"""The verb that measures."""

from __future__ import annotations

from dataclasses import dataclass

from leap_shared.cli import Command, Context

__all__ = ["Bench"]


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure layers, training and whole models beside their peers, interleaved, and their growth with the tokens.

    Parts are modules, operator, training, models and tokens; each writes its table, picture and the machine's stamp,
    tokens also its growth as a figure, and all together memory.md. On a CPU everything is in float32, and one thread is
    timed by its own clock; on a GPU in bfloat16, in batches of 64, and models are compiled.

    Examples:
        leap-flatten bench --parts modules --threads 1
        leap-flatten bench --no-peers --json
        leap-flatten bench --quick
    """

    parts: tuple[str, ...] = ()
    """Parts to measure; all where none is given."""
    threads: tuple[int, ...] = (1, 0)
    """Numbers of CPU threads, one after the other; 0 is what PyTorch takes by itself."""
    peers: bool = True
    """Measure beside softmax attention and timm's models too, not the eager formula and the floor alone."""
    quick: bool = False
    """A trial of less than a minute on small sizes: shows that everything runs."""

    def run(self, context: Context) -> object:
        """Measure."""
        from leap_flatten import benchmark

        make = benchmark.Settings.quick if self.quick else benchmark.Settings
        return benchmark.run(make(parts=self.parts, threads=self.threads, peers=self.peers), context)
