"""Tasks x algorithms x methods, one training run of all seeds each: here one after the other, or on a Ray cluster."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leap_oper.priorities import Priorities, oper_r
from leap_oper.report import RESULT
from leap_oper.trainer import POLICIES, Trainer
from leap_shared.errors import UserError, did_you_mean
from leap_shared.files import ensure_folder, write_json
from leap_shared.offline import Transitions
from leap_shared.offline.algorithms import ALGORITHMS
from leap_shared.offline.scores import tasks
from leap_shared.offline.sources import load

__all__ = ["METHODS", "Cell", "cells", "run_cell", "run_sweep"]

CELL = "cell.json"
METHODS = ("uniform", "oper-r", "oper-a")


@dataclass(frozen=True)
class Cell:
    """One training run of a sweep."""

    data: str
    algorithm: str
    method: str
    out: Path
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int | None = None
    every: int = 5000
    episodes: int = 10
    environment: str | None = None
    keys: tuple[str, ...] = ()
    task: str | None = None
    root: Path | None = None
    device: str = "auto"
    base_prob: float = 0.0
    value_iterations: int = 5
    value_steps: int = 1_000_000
    std: float = 2.0
    threads: int = 1
    """Of PyTorch; on Ray also the CPUs that the cell takes."""

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.out / Path(self.data).stem / self.algorithm / self.method

    @property
    def settings(self) -> dict[str, Any]:
        """What the outcome depends on, as JSON values."""
        apart = ("out", "device", "threads", "root")
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in apart}
        return dict(json.loads(json.dumps(values)))

    @property
    def finished(self) -> bool:
        """Whether a run of these settings was trained to its end."""
        files = [self.folder / name for name in (POLICIES, RESULT, CELL)]
        return all(file.exists() for file in files) and json.loads(files[2].read_text()) == self.settings

    def claim(self) -> None:
        """Take the folder.

        Raises:
            UserError: it is another run's.
        """
        path = ensure_folder(self.folder) / CELL
        if path.exists() and json.loads(path.read_text()) != self.settings:
            raise UserError(f"{self.folder} holds a run of other settings: give another --out, or delete it")
        write_json(path, self.settings)


def cells(
    data: Sequence[str], algorithms: Sequence[str], methods: Sequence[str], out: Path, **settings: Any
) -> list[Cell]:
    """All combinations.

    Raises:
        UserError: a list is empty or a name unknown.
    """
    for name, given, known in (("algorithm", algorithms, ALGORITHMS), ("method", methods, METHODS)):
        for word in given:
            if word not in known:
                raise UserError(f"{name} {word!r} is unknown: {did_you_mean(word, known)}")
    if not (data and algorithms and methods):
        raise UserError("a sweep needs at least one data set, algorithm and method")
    made = [Cell(*names, out, **settings) for names in itertools.product(data, algorithms, methods)]
    if len({cell.folder for cell in made}) < len(made):
        raise UserError(f"data sets of one name would share a folder: rename one of {', '.join(data)}")
    return made


def _priorities(cell: Cell, dataset: Transitions, progress: Callable[[int, str], object] | None) -> Priorities | None:
    """Weights of the method by the paper's recipe: OPER-R for all terms, OPER-A for the policy's alone."""
    if cell.method == "uniform":
        return None
    if cell.method == "oper-r":
        return oper_r(dataset, cell.base_prob)
    from leap_oper.advantages import oper_a

    advance = None if progress is None else lambda count: progress(count, "fits values")
    fitted = oper_a(
        dataset,
        iters=cell.value_iterations,
        steps=cell.value_steps,
        device=cell.device,
        out=ensure_folder(cell.folder) / "values",
        progress=advance,
    )
    return fitted.at(cell.value_iterations).ensemble("mean").rescale(std=cell.std, eps=0.1)


def run_cell(cell: Cell, progress: Callable[[int, str], object] | None = None) -> dict[str, Any]:
    """Train one cell, or go on with it; the report as JSON values."""
    import torch

    torch.set_num_threads(cell.threads)
    cell.claim()
    dataset = load(cell.data, cell.root)
    trainer = Trainer(
        cell.algorithm,
        dataset,
        priorities=_priorities(cell, dataset, progress),
        decouple=cell.method == "oper-a",
        seeds=cell.seeds,
        steps=cell.steps,
        every=cell.every,
        episodes=cell.episodes,
        environment=cell.environment,
        keys=cell.keys,
        task=cell.task or (Path(cell.data).stem if Path(cell.data).stem in tasks() else None),
        name=Path(cell.data).stem,
        out=cell.folder,
        device=cell.device,
        label=cell.method,
    )
    trainer.train(progress=progress)
    return trainer.report().to_json()


def run_sweep(
    chosen: Sequence[Cell], *, ray: bool = False, address: str | None = None, note: Callable[[str], object] = print
) -> list[Path]:
    """Run all cells that are not finished and return the folders of all.

    Args:
        chosen: the cells.
        ray: whether cells run side by side on Ray, each with its threads' CPUs and, for a CUDA device, one GPU.
        address: of a running Ray cluster, whose machines share the output folder; None: this machine.
        note: told of every cell that ends.

    Raises:
        UserError: Ray is missing, or cells failed for the user's reasons, once all others are finished.
    """
    waiting = [cell for cell in chosen if not cell.finished]
    if len(waiting) < len(chosen):
        note(f"{len(chosen) - len(waiting)} of {len(chosen)} runs are finished already")
    failed = []
    for cell, error in _on_ray(waiting, address) if ray else _here(waiting):
        note(f"{cell.folder} is finished" if error is None else f"{cell.folder} failed: {error}")
        failed += [] if error is None else [error]
    if failed:
        raise UserError(f"{len(failed)} of {len(waiting)} runs failed, the first so: {failed[0]}") from failed[0]
    return [cell.folder for cell in chosen]


def _here(waiting: Sequence[Cell]) -> Iterator[tuple[Cell, UserError | None]]:
    for cell in waiting:
        try:
            run_cell(cell)
        except UserError as error:
            yield cell, error
        else:
            yield cell, None


def _on_ray(waiting: Sequence[Cell], address: str | None) -> Iterator[tuple[Cell, UserError | None]]:
    try:
        import ray
    except ImportError as error:
        raise UserError('a sweep on Ray needs it: pip install "leap-oper[ray]"') from error
    cluster: Any = ray
    cluster.init(address=address, ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    try:
        remote, jobs = cluster.remote(run_cell), {}
        for cell in waiting:
            gpus = 0 if cell.device == "cpu" else int(cluster.cluster_resources().get("GPU", 0) > 0)
            place = dataclasses.replace(cell, out=cell.out.resolve())
            jobs[remote.options(num_cpus=cell.threads, num_gpus=gpus).remote(place)] = cell
        while jobs:
            (done,), _ = cluster.wait(list(jobs))
            try:
                cluster.get(done)
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, UserError):
                    raise
                yield jobs.pop(done), error.cause
            else:
                yield jobs.pop(done), None
    finally:
        cluster.shutdown()
