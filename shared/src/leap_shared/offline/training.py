"""The loop that trains many runs as one program, and goes on to the same bits after any interruption."""

from __future__ import annotations

import time
import typing
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from leap_shared.checkpoints import CheckpointFolder, check_finite
from leap_shared.errors import UserError
from leap_shared.offline.algorithms.base import Algorithm, Logs
from leap_shared.offline.rows import Rows

__all__ = ["IndexSampler", "Training", "UniformSampler", "resume"]

LEAST_REPLAYS = 8  # periods from which a CUDA graph is worth its capture


@runtime_checkable
class IndexSampler(Protocol):
    """Draws rows with replacement, from its own generator."""

    generator: torch.Generator

    def draw(self, shape: Sequence[int]) -> Int64[Tensor, "*shape"]:
        """Independent rows."""
        ...


def resume(folder: CheckpointFolder, objects: MutableMapping[str, Any]) -> int:
    """Bring `objects` to where the run in `folder` stood, and say after how many steps; 0 where there is none.

    Raises:
        UserError: the folder holds checkpoints of other ``objects["settings"]``.
    """
    settings = objects["settings"]
    step = folder.restore(objects) or 0
    if objects["settings"] != settings:
        raise UserError(f"{folder.path} holds the checkpoints of another run: give another folder or delete it")
    return step


class UniformSampler:
    """Every row, or every one of the `allowed`, with the same probability."""

    def __init__(
        self,
        rows: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
        allowed: Int64[Tensor, " count"] | None = None,
    ) -> None:
        self.rows, self.allowed = rows, None if allowed is None else allowed.to(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, shape: Sequence[int]) -> Int64[Tensor, "*shape"]:
        """Independent rows."""
        count = self.rows if self.allowed is None else len(self.allowed)
        drawn = torch.randint(count, tuple(shape), generator=self.generator, device=self.generator.device)
        return drawn if self.allowed is None else self.allowed[drawn]


class Training:
    """Draws batches, updates, records and saves.

    On a CPU the indices of a block of updates are drawn at once. On CUDA `period` updates with their draws are one
    graph, which is replayed.

    Args:
        algorithm: the runs.
        rows: their data, run by run.
        critic: one sampler per run.
        policy: one sampler per run for the terms that tie the policy to the data; None: they share the critic's batch.
        batch_size: rows of one run's batch.
        settings: plain values that the outcome depends on; a folder of other settings is refused.

    Raises:
        UserError: numbers of runs, rows and samplers differ.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        rows: Rows,
        critic: Sequence[IndexSampler],
        policy: Sequence[IndexSampler] | None = None,
        *,
        batch_size: int = 256,
        settings: Any = None,
    ) -> None:
        counts = {len(algorithm.seeds), len(rows.lengths), len(critic), len(critic if policy is None else policy)}
        if len(counts) != 1 or batch_size < 1:
            raise UserError(
                f"runs, data sets and samplers number {sorted(counts)}, batch_size is {batch_size}: mend them"
            )
        self.algorithm, self.rows, self.critic, self.policy = algorithm, rows, list(critic), policy and list(policy)
        self.batch_size, self.settings = batch_size, settings
        self.generator = torch.Generator(rows.device).manual_seed(algorithm.seeds[0])
        self.history: list[dict[str, Any]] = []
        self._folder: CheckpointFolder | None = None
        self._sums: Logs = {}
        self._times: dict[str, int] = {}
        self._graph: Any = None
        self._phase: str | None = None
        self._logged: dict[str, int] = {}

    def train(
        self,
        updates: int,
        *,
        every: int = 1000,
        out: Path | None = None,
        evaluate: Callable[[Training], dict[str, Any]] | None = None,
        progress: Callable[[int, str], object] | None = None,
    ) -> list[dict[str, Any]]:
        """Train every run to `updates` updates in all.

        Args:
            updates: of each run.
            every: updates between two records of the history and two checkpoints.
            out: folder of checkpoints; a killed call goes on from the last one, to the same bits on CPU.
            evaluate: what to add to a record, as plain values.
            progress: called with the number of updates done and a word on them.

        Returns:
            The history: {update, updates_per_second, means of each logged quantity per run, ...}.

        Raises:
            UserError: a loss is not finite (the last good checkpoint stays), or `out` belongs to another run.
        """
        objects: dict[str, Any] = {"settings": {"run": self.settings, "every": every}, "history": self.history}
        objects |= {"algorithm": self.algorithm, "noise": self.generator}
        for kind, samplers in (("critic", self.critic), ("policy", self.policy or [])):
            objects |= {f"{kind}{run}": sampler.generator for run, sampler in enumerate(samplers)}
        self._folder = folder = None if out is None else CheckpointFolder(out)
        before = self.algorithm.updates
        if folder is not None and before == 0:
            resume(folder, objects)
            self.history = objects["history"]
        if progress is not None and self.algorithm.updates > before:
            progress(min(self.algorithm.updates, updates), "resumed")
        try:
            while (done := self.algorithm.updates) < updates:
                count = min(every - done % every, updates - done)
                start = time.perf_counter()
                logs = self.advance(count)
                record: dict[str, Any] = {"update": done + count, **{name: x.tolist() for name, x in logs.items()}}
                record["updates_per_second"] = count / (time.perf_counter() - start)
                self.history.append(record | (evaluate(self) if evaluate is not None else {}))
                if folder is not None:
                    folder.save(done + count, {**objects, "history": self.history})
                if progress is not None:
                    progress(count, f"{record['updates_per_second']:.0f} updates/s")
        finally:
            if folder is not None:
                folder.close()
        return self.history

    def advance(self, count: int) -> Logs:
        """`count` updates; the mean of everything logged, per run.

        Raises:
            UserError: a loss is not finite; names the update on CPU, the block on CUDA.
        """
        done = self.algorithm.updates
        if self.rows.device.type == "cuda":
            means = self._replay(count)
            check_finite(sum(mean.sum() for mean in means.values()), done + count, self._folder)
            return means
        critic = self._draw(self.critic, (count, self.batch_size))
        policy = self._draw(self.policy, (count, self.batch_size)) if self.policy else [None] * count
        logs = []
        for indices, chosen in zip(critic, policy, strict=True):
            self.algorithm.prepare()
            logs.append(self._update(indices, chosen))
        means = {}
        for name in dict.fromkeys(name for log in logs for name in log):
            values = torch.stack([log[name] for log in logs if name in log])
            means[name] = values.mean(dim=0)
        if not all(mean.isfinite().all() for mean in means.values()):
            for update, log in enumerate(logs, done + 1):
                check_finite(sum(value.sum() for value in log.values()), update, self._folder)
        return means

    def _update(self, indices: Tensor, chosen: Tensor | None) -> Logs:
        algorithm = self.algorithm
        policy_batch = self.rows.batch(chosen) if chosen is not None and algorithm.wants_policy_batch() else None
        noise = algorithm.noise(self.batch_size, self.generator)
        return algorithm.update(self.rows.batch(indices), policy_batch, noise)

    @staticmethod
    def _draw(samplers: Sequence[IndexSampler], shape: tuple[int, ...]) -> Int64[Tensor, "*shape"]:
        """Indices (*leading, runs, batch)."""
        return torch.stack([sampler.draw(shape) for sampler in samplers], dim=-2)

    def _step(self) -> None:
        """One update with its own draws; what it logs is added up on the device."""
        shape = (self.batch_size,)
        chosen = self._draw(self.policy, shape) if self.policy else None
        for name, value in self._update(self._draw(self.critic, shape), chosen).items():
            self._sums.setdefault(name, torch.zeros_like(value)).add_(value)
            self._times[name] = self._times.get(name, 0) + 1

    def _replay(self, count: int) -> Logs:
        """`count` updates, whole periods of equal operations as replays of one CUDA graph, the others one by one."""
        for name, total in self._sums.items():
            total.zero_()
            self._times[name] = 0
        algorithm, end = self.algorithm, self.algorithm.updates + count
        while algorithm.updates < end:
            periods = min(end - algorithm.updates, algorithm.same_for()) // algorithm.period
            if algorithm.updates % algorithm.period or periods < LEAST_REPLAYS:
                algorithm.prepare()
                self._step()
                continue
            if self._phase != algorithm.phase:
                self._capture()
                continue
            for _ in range(periods):
                algorithm.prepare()
                self._graph.replay()
                algorithm.updates += algorithm.period
                for name, times in self._logged.items():
                    self._times[name] += times
        return {name: total / self._times[name] for name, total in self._sums.items() if self._times[name]}

    def _capture(self) -> None:
        """Run two periods as a warm-up on a side stream, then record one."""
        algorithm, new_stream = self.algorithm, typing.cast("Any", torch.cuda.Stream)
        stream = new_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2 * algorithm.period):
                algorithm.prepare()
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph, before, done = torch.cuda.CUDAGraph(), dict(self._times), algorithm.updates
        for sampler in [*self.critic, *(self.policy or [])]:
            self._graph.register_generator_state(sampler.generator)
        self._graph.register_generator_state(self.generator)
        with torch.cuda.graph(self._graph):
            for _ in range(algorithm.period):
                self._step()
        self._logged = {name: times - before[name] for name, times in self._times.items()}
        self._phase, self._times, algorithm.updates = algorithm.phase, before, done
