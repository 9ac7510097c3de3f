"""OPER-A: priorities from advantages, whose value networks are fitted to batches drawn by the priorities so far."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from leap_oper.batched import Batches
from leap_oper.priorities import Priorities, advantage_weights
from leap_oper.values import Advantages, ValueConfig, ValueFit, choose
from leap_shared.checkpoints import CheckpointFolder, check_finite
from leap_shared.devices import resolve_device
from leap_shared.errors import UserError, did_you_mean
from leap_shared.files import atomic_writer
from leap_shared.offline import Transitions, training

__all__ = ["Advantages", "ValueConfig", "ValueFit", "iterate", "learning_rate", "oper_a"]

BLOCK = 500  # updates whose batches are drawn at once


def learning_rate(schedule: str, done: int, total: int, base: float = 3e-4) -> float:
    """Learning rate of the update after `done` of an iteration's `total` ones.

    Raises:
        UserError: `schedule` is not cosine, linear or none.
    """
    choose("schedule", schedule)
    share = done / total
    return base * {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "none": 1.0}[schedule]


def iterate(
    fit: ValueFit,
    *,
    iters: int = 5,
    steps: int = 1_000_000,
    first_steps: int | None = None,
    batch_size: int = 256,
    schedule: str = "cosine",
    scale_std: float | None = None,
    scale_eps: float = 0.1,
    floor: float = 0.0,
    sampler: str = "alias",
    batches: Batches | None = None,
    every: int = 5000,
    out: Path | str | None = None,
    resume: bool = True,
    progress: Callable[[int], object] | None = None,
) -> Float64[np.ndarray, "seeds iterations rows"]:
    """Weights of every iteration: fit the values on batches drawn by the last weights, then reweigh by the advantages.

    Args:
        fit: the networks, which are trained further.
        iters: iterations K; the first draws uniformly.
        steps: updates of an iteration; `first_steps` (if given) of the first.
        first_steps: see `steps`.
        batch_size: rows per seed and update.
        schedule: of the learning rate within an iteration: cosine, linear or none.
        scale_std: see :func:`leap_oper.priorities.advantage_weights`, as `scale_eps` and `floor`.
        scale_eps: least weight after stretching.
        floor: least weight; 0, as the authors have it, never draws the row of least advantage again.
        sampler: alias, cdf, or reference, the authors' stream.
        batches: where batches come from, in the place of `sampler` and `batch_size`.
        every: updates between two checkpoints.
        out: folder of checkpoints and weights; a call that was killed goes on from the last, to the same bits on CPU.
        resume: go on with the run that `out` holds; with False a folder that holds one is refused.
        progress: called with the number of updates done.

    Raises:
        UserError: a loss is not finite, an iteration without updates, or `out` belongs to another run.
    """
    budget = [steps if k or first_steps is None else first_steps for k in range(iters)]
    if min(iters, every, *budget, steps) < 1:
        raise UserError(
            f"iters={iters}, steps={steps}, first_steps={first_steps}, every={every}: each must be at least 1"
        )
    choose("schedule", schedule)
    if batches is None:
        batches = Batches(fit.num_rows, fit.seeds, fit.device, kind=sampler, batch_size=batch_size)
    if batches.batch_size > fit.num_rows:
        warnings.warn(f"a batch of {batches.batch_size} is drawn from {fit.num_rows} rows: rows repeat", stacklevel=2)
    path = None if out is None else Path(out)
    if path is not None and not resume and any(path.glob("step-*")):
        raise UserError(f"{path} holds a run already: resume it, or give another folder")
    options = [budget, batches.batch_size, batches.kind, schedule, scale_std, scale_eps, floor, every]
    objects: dict[str, Any] = {"settings": {**fit.settings, "options": options}, "fit": fit, "batches": batches}
    folder = None if path is None else CheckpointFolder(path)
    done = 0 if folder is None else training.resume(folder, objects)
    weights = [np.ones((len(fit.seeds), fit.num_rows))]
    if progress is not None:
        progress(done)
    try:
        for iteration, total in enumerate(budget):
            begin = sum(budget[:iteration])
            end = begin + total
            if done < end:
                batches.use(weights[-1] if iteration else None, fresh=done == begin)
                if done == begin:
                    fit.restart()
            while done < end:
                count = min(BLOCK, every, end - done)
                rates = [
                    learning_rate(schedule, done - begin + k, total, fit.config.learning_rate) for k in range(count)
                ]
                _block(fit, batches.draw(count), rates, done, folder)
                done += count
                if done == end:
                    new = advantage_weights(weights[-1], fit.advantages().adv, scale_std, scale_eps, floor=floor)
                    _write(path, iteration + 1, new)
                if folder is not None and (done == end or done // every > (done - count) // every):
                    folder.save(done, objects)
                if progress is not None:
                    progress(count)
            weights.append(_read(path, iteration + 1, weights[0].shape) if path is not None else new)
    finally:
        if folder is not None:
            folder.close()
    return np.stack(weights[1:], axis=1)


def _block(
    fit: ValueFit,
    batches: Int64[Tensor, "steps seeds batch"],
    rates: Sequence[float],
    done: int,
    folder: CheckpointFolder | None,
) -> None:
    """Updates on these batches; stops at the first whose loss is not finite."""
    logs = [fit.update(indices, rate) for indices, rate in zip(batches, rates, strict=True)]
    kinds = [name for name in logs[0] if name.endswith("_loss")]
    losses = torch.stack([torch.stack([log[name] for name in kinds]).sum() for log in logs])
    if not (finite := torch.isfinite(losses)).all():
        step = int(finite.int().argmin())
        check_finite(losses[step], done + step + 1, folder)


def _write(path: Path | None, iteration: int, weights: NDArray[np.float64]) -> None:
    """Keep the weights of an iteration; they are large, so checkpoints go without them."""
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path / f"weights-{iteration}.npy") as file:
            np.save(file, weights, allow_pickle=False)


def _read(path: Path, iteration: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    file = path / f"weights-{iteration}.npy"
    try:
        weights: NDArray[np.float64] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {file}, which the checkpoints need: delete {path} and start again") from error
    if weights.shape != shape:
        raise UserError(f"{file} holds weights of shape {weights.shape}, expected {shape}: delete {path}, start again")
    return weights


def oper_a(
    dataset: Transitions,
    iters: int = 5,
    steps: int = 1_000_000,
    n_step: int = 1,
    seeds: Sequence[int] = (1, 2, 3),
    device: str = "auto",
    *,
    first_steps: int | None = None,
    batch_size: int = 256,
    schedule: str = "cosine",
    scale_std: float | None = None,
    scale_eps: float = 0.1,
    floor: float = 0.0,
    sampler: str = "alias",
    every: int = 5000,
    out: Path | str | None = None,
    resume: bool = True,
    progress: Callable[[int], object] | None = None,
    **config: Any,
) -> Priorities:
    """Priorities from advantages (OPER-A), all seeds in one batched program: weights (seeds, iterations, rows).

    ``oper_a(data).at(iteration=5).ensemble("mean").rescale(std=2.0, eps=0.1)`` is the authors' recipe for MuJoCo;
    kitchen and pen take n_step=5 and steps=500_000, AntMaze antmaze=True. `config` are fields of
    :class:`ValueConfig`, the other arguments those of :func:`iterate`.

    Raises:
        UserError: as :class:`ValueFit` and :func:`iterate`; or a field is unknown.
    """
    if not seeds:
        raise UserError("there are no seeds: give at least one")
    fields = [field.name for field in dataclasses.fields(ValueConfig)]
    if unknown := [name for name in config if name not in fields]:
        raise UserError(f"unknown option {unknown[0]!r}: {did_you_mean(unknown[0], fields)}")
    fit = ValueFit([dataset] * len(seeds), seeds, ValueConfig(n_step=n_step, **config), device=resolve_device(device))
    options: dict[str, Any] = {
        "iters": iters,
        "steps": steps,
        "first_steps": first_steps,
        "batch_size": batch_size,
        "schedule": schedule,
        "scale_std": scale_std,
        "scale_eps": scale_eps,
        "floor": floor,
        "sampler": sampler,
    }
    weights = iterate(fit, **options, every=every, out=out, resume=resume, progress=progress)
    meta = {"method": "oper_a", "seeds": list(seeds), **options, **dataclasses.asdict(fit.config)}
    return Priorities(weights, {**meta, "fingerprint": dataset.fingerprint})
