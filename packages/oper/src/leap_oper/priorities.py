"""One static weight per transition (mean 1): from returns, ensembles of them, rescaled, and kept in a file."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64
from numpy.typing import ArrayLike, NDArray

from leap_oper.released import MAGIC, read_released
from leap_shared.errors import UserError
from leap_shared.files import atomic_writer
from leap_shared.offline import Transitions, episode_returns

__all__ = ["Priorities", "advantage_weights", "convert_released", "oper_r", "top_rows"]

STORED_AXES = {"weights": 1, "seeds": 2, "iterations": 3}
AXES = {1: "(rows,)", 2: "(seeds, rows)", 3: "(seeds, iterations, rows)"}


@dataclass(frozen=True, eq=False)
class Priorities:
    """Weights of mean 1 along the last axis, (rows,), (seeds, rows) or (seeds, iterations, rows), and their origin.

    Raises:
        UserError: a weight is negative or not finite, or all are zero.
    """

    weights: Float[np.ndarray, "*axes rows"]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weights = np.asarray(self.weights, dtype=np.float64)
        if weights.ndim not in AXES or weights.size == 0:
            raise UserError(f"weights have shape {weights.shape}, expected one of {', '.join(AXES.values())}")
        for wrong, name in ((~np.isfinite(weights), "NaN or infinite"), (weights < 0, "negative")):
            if wrong.any():
                raise UserError(f"{int(wrong.sum())} weights are {name}, the first in row {np.argwhere(wrong)[0][-1]}")
        mean = weights.mean(axis=-1, keepdims=True)
        if not mean.all():
            raise UserError("all weights are zero: at least one row must be drawable")
        object.__setattr__(self, "weights", weights / mean)

    def __len__(self) -> int:
        return int(self.weights.shape[-1])

    @property
    def probs(self) -> Float[np.ndarray, " rows"]:
        """Probability of each row, sum 1, float64.

        Raises:
            UserError: there are several seeds or iterations: choose with `at` and `ensemble`.
        """
        if self.weights.size != len(self):
            raise UserError(f"weights are {AXES[self.weights.ndim]}: call .at(iteration=...) and .ensemble() first")
        probs: NDArray[np.float64] = self.weights.reshape(-1) / self.weights.sum()
        return probs

    @property
    def std(self) -> float:
        """Standard deviation of the weights that was reached (their mean is 1)."""
        return float(self.weights.std(axis=-1).mean())

    @property
    def effective_sample_size(self) -> float:
        """1 / Σ p²: as many rows of equal weight would be as informative."""
        return float(1 / np.square(self.probs).sum())

    def summary(self) -> dict[str, Any]:
        """Facts to report, of each seed and iteration: deviation reached, effective sample size, range, rows lost."""
        std = self.weights.std(axis=-1)
        facts = {
            "std": std,
            "effective_sample_size": len(self) / (1 + std**2),
            "min": self.weights.min(axis=-1),
            "max": self.weights.max(axis=-1),
            "rows_never_drawn": (self.weights == 0).sum(axis=-1),
        }
        lists = {key: value.tolist() for key, value in facts.items()}
        return {"method": self.meta.get("method"), "rows": len(self), **lists}

    @classmethod
    def stack(cls, parts: Sequence[Priorities]) -> Priorities:
        """Weights of several runs on the same data as the seeds of one; `meta` is the first's, `seeds` everyone's.

        Raises:
            UserError: there are none, or they differ in rows, in iterations or in the data they were made for.
        """
        arrays = [part.weights[None] if part.weights.ndim == 1 else part.weights for part in parts]
        if len({array.shape[1:] for array in arrays}) != 1:
            raise UserError(f"weights of shapes {[array.shape for array in arrays]} do not stack: expected equal ones")
        if len({part.meta["fingerprint"] for part in parts if "fingerprint" in part.meta}) > 1:
            raise UserError("the weights were made for different data and do not stack")
        seeds = [seed for part in parts for seed in part.meta.get("seeds", [])]
        return cls(np.concatenate(arrays), {**parts[0].meta, "seeds": seeds})

    def at(self, iteration: int) -> Priorities:
        """Weights of one iteration (from 1) of OPER-A, (seeds, rows)."""
        stored = self.weights.shape[1] if self.weights.ndim == 3 else 0
        if not 1 <= iteration <= stored:
            raise UserError(f"iteration {iteration} is not among the {stored} stored iterations")
        return Priorities(self.weights[:, iteration - 1], {**self.meta, "iteration": iteration})

    def ensemble(self, how: str = "mean") -> Priorities:
        """Mean or median over seeds, row by row (the median of an even number is the mean of the middle two)."""
        if self.weights.ndim == 3:
            raise UserError(f"weights are {AXES[self.weights.ndim]}, an ensemble needs {AXES[2]}")
        if how not in ("mean", "median"):
            raise UserError(f"ensemble {how!r} is unknown: use mean or median")
        seeds = self.weights.reshape(-1, len(self))
        together = np.median(seeds, axis=0) if how == "median" else seeds.mean(axis=0)
        return Priorities(together, {**self.meta, "ensemble": how})

    def rescale(
        self,
        std: float | None = 2.0,
        eps: float | None = 0.1,
        eps_max: float | None = None,
        *,
        weight_func: str = "linear",
        exp_lambd: float = 1.0,
        branch: str = "td3",
    ) -> Priorities:
        """The authors' second stage: weights to the probabilities that batches are drawn with.

        linear: p ∝ w - min w; its standard deviation (times rows) is set to `std`; p is raised to `eps` / rows and cut
        at `eps_max` / rows (on the branches td3 and onestep only with a `std`). Flooring makes the deviation that is
        reached another than `std`: see :attr:`std`. exp: p ∝ exp(`exp_lambd` w / mean w), without the rest.

        Raises:
            UserError: the weights are constant, so that no deviation can be reached, or an argument makes no sense.
        """
        if branch not in ("td3", "onestep", "iql") or weight_func not in ("linear", "exp"):
            raise UserError(f"branch {branch!r}, weight_func {weight_func!r}: use td3, onestep or iql; linear or exp")
        rows, weights = len(self), self.probs * len(self)
        if std is not None and not 0 < std < np.inf:
            raise UserError(f"std is {std}: give a deviation above 0, or None to leave it as it is")
        if not 0 <= (eps or 0) < (np.inf if eps_max is None else eps_max):
            raise UserError(f"eps={eps}, eps_max={eps_max}: give 0 <= eps < eps_max")
        if eps is not None and eps >= 1 and (std is not None or branch == "iql"):
            warnings.warn(f"eps={eps} raises all rows below the mean to it: sampling is nearly uniform", stacklevel=2)
        if weight_func == "exp":
            if std is not None:
                raise UserError("exp weights are not scaled to a deviation: pass std=None")
            probs = np.exp(exp_lambd * (weights - weights.max()))
        else:
            probs = weights - weights.min()
            if not probs.any():
                if std is not None:
                    raise UserError(f"the weights are constant and cannot get the deviation {std}: pass std=None")
                probs = np.ones(rows)
            probs /= probs.sum()
            if std is not None:
                probs = std / (rows * probs.std()) * (probs - 1 / rows) + 1 / rows
            if std is not None or branch == "iql":
                probs = np.clip(probs, (eps or 0) / rows, None if eps_max is None else eps_max / rows)
        recipe = {"std": std, "eps": eps, "eps_max": eps_max, "weight_func": weight_func, "branch": branch}
        return Priorities(probs, {**self.meta, "rescale": recipe})

    def floored(self, floor: float) -> Priorities:
        """Raise every weight to at least `floor` (the mean is 1), so that no row is lost, and bring the mean to 1."""
        if not 0 <= floor < 1:
            raise UserError(f"floor is {floor}: give 0 or more, and less than the mean weight 1")
        return Priorities(np.maximum(self.weights, floor), {**self.meta, "floor": floor})

    def balanced(self, update: int, *, block_updates: int = 1000, blocks: int = 800) -> Priorities:
        """Weights at an update of progressive balancing: (1 - t/T) + (t/T) w with t = update // `block_updates`.

        They are uniform at first, w from block T = `blocks` on, and stay the same within a block.
        """
        if update < 0 or block_updates < 1 or blocks < 1:
            raise UserError(f"update={update}, block_updates={block_updates}, blocks={blocks}: give 0, 1 and 1 or more")
        share = min(update // block_updates, blocks) / blocks
        return Priorities(1 - share + share * self.weights, {**self.meta, "balance": share})

    def check(self, dataset: Transitions) -> None:
        """Raise UserError unless these weights belong to `dataset`."""
        if len(self) != len(dataset):
            raise UserError(f"there are {len(self)} weights for {len(dataset)} rows: compute them for this data set")
        known = self.meta.get("fingerprint", dataset.fingerprint)
        if known != dataset.fingerprint:
            raise UserError(f"the weights were made for other data ({known[:12]}…): compute them for this data set")

    def save(self, path: Path) -> None:
        """Write an .npz file, atomically: `weights` (rows,) and `meta` (JSON, with versions), arrays in float32.

        Several seeds or iterations follow as `seeds` (seeds, rows) or `iterations` (seeds, iterations, rows), the
        seeds left out where there is one; `weights` are then the mean over seeds of the last iteration.
        """
        versions = {name: version(name) for name in ("leap-oper", "numpy", "torch")}
        (kind,) = (name for name, axes in STORED_AXES.items() if axes == self.weights.ndim)
        last = self.weights[:, -1] if kind == "iterations" else self.weights
        arrays: dict[str, Any] = {
            kind: self.weights[0] if kind != "weights" and len(self.weights) == 1 else self.weights
        }
        arrays["weights"] = last.reshape(-1, len(self)).mean(axis=0)
        arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
        arrays["meta"] = np.array(json.dumps({**self.meta, "versions": versions}))
        with atomic_writer(Path(path)) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path, dataset: Transitions | None = None, iteration: int | None = None) -> Priorities:
        """Read what `save` wrote, or a file of the authors (.npy); :meth:`check` it against `dataset`.

        Of the authors' files, weights become (1, iterations, rows), older advantages the weights of iteration 1, and
        returns those of :func:`oper_r` without base probability; nothing in them is executed.

        Args:
            path: the file.
            dataset: that the weights must belong to.
            iteration: the one to take, as :meth:`at` does; all of them if None.

        Raises:
            UserError: the file is no such file, would have to be executed, belongs to other data, or has fewer
                iterations.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                is_npy = file.read(len(MAGIC)) == MAGIC
            priorities = cls._released(path) if is_npy else cls._saved(path)
        except OSError as error:
            raise UserError(f"{path} holds no priorities: {error}") from error
        if dataset is not None:
            priorities.check(dataset)
        return priorities if iteration is None else priorities.at(iteration)

    @classmethod
    def _saved(cls, path: Path) -> Priorities:
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                kind = next((name for name in ("iterations", "seeds") if name in file.files), "weights")
                weights, meta = file[kind], json.loads(str(file["meta"]))
            single = weights.ndim < STORED_AXES[kind]
            return cls(weights[None] if single else weights, dict(meta))
        except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} holds no priorities: {error}") from error

    @classmethod
    def _released(cls, path: Path) -> Priorities:
        kind, values, meta = read_released(path)
        try:
            if kind == "returns":
                return _from_scores(values[0], {"method": "oper_r", "base_prob": 0.0, "variant": "return", **meta})
            weights = values if kind == "weights" else advantage_weights(np.ones_like(values), values)
            return cls(weights[None], {"method": "oper_a", **meta})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def convert_released(path: Path, out: Path, dataset: Transitions | None = None) -> Priorities:
    """Write a file of the authors (.npy) as .npz, tied to `dataset` if that is given.

    Raises:
        UserError: as :meth:`Priorities.load`.
    """
    priorities = Priorities.load(path, dataset)
    if dataset is not None:
        priorities = Priorities(priorities.weights, {**priorities.meta, "fingerprint": dataset.fingerprint})
    priorities.save(out)
    return priorities


def oper_r(dataset: Transitions, base_prob: float = 0.0, variant: str = "return") -> Priorities:
    """Priorities from the return of each row's episode (OPER-R): p ∝ (G - min G) / (max G - min G) + base_prob.

    `inverse` prefers low returns, `reward` uses each row's own reward. With `base_prob` 0 the worst episodes are never
    drawn. Rewards must be as recorded, before any shift. If all returns are equal the weights are uniform, with a
    warning.

    Raises:
        UserError: `base_prob` is negative or `variant` is unknown.
    """
    if not 0 <= base_prob < np.inf or variant not in ("return", "inverse", "reward"):
        raise UserError(f"base_prob={base_prob}, variant={variant!r}: use 0 or more, and return, inverse or reward")
    score = dataset.rewards if variant == "reward" else episode_returns(dataset.rewards, dataset.ends)
    meta = {"method": "oper_r", "base_prob": base_prob, "variant": variant, "fingerprint": dataset.fingerprint}
    return _from_scores(score.astype(np.float64), meta)


def _from_scores(scores: Float64[np.ndarray, " rows"], meta: Mapping[str, Any]) -> Priorities:
    """Weights from a return (or reward) per row; `meta` holds the base probability and the variant."""
    low, high = scores.min(), scores.max()
    if low == high:
        warnings.warn(f"all returns are {low:g}: the priorities are uniform", stacklevel=3)
        return Priorities(np.ones(len(scores)), meta)
    share = (scores - low) / (high - low)
    return Priorities((1 - share if meta["variant"] == "inverse" else share) + meta["base_prob"], meta)


def top_rows(returns: ArrayLike, percent: float) -> Int64[np.ndarray, " kept"]:
    """Rows whose return reaches the (100 - `percent`)-th percentile over rows, linearly interpolated; ties all stay.

    Raises:
        UserError: `percent` is outside (0, 100], or there are no returns or one is not finite.
    """
    values = np.asarray(returns).reshape(-1)
    if not 0 < percent <= 100:
        raise UserError(f"percent is {percent}: give more than 0 and at most 100")
    if not values.size or not np.isfinite(values).all():
        raise UserError("returns must be there and finite: repair or drop those episodes")
    return np.flatnonzero(values >= np.percentile(values, 100 - percent))


def advantage_weights(
    previous: ArrayLike,
    advantages: ArrayLike,
    scale_std: float | None = None,
    eps: float = 0.1,
    *,
    floor: float = 0.0,
) -> NDArray[np.float64]:
    """Weights of the next iteration of OPER-A along the last axis: W ∝ previous ∘ (A - min A), mean 1.

    So the row of least advantage gets weight 0 for ever, unless a `floor` raises smaller weights. With `scale_std`,
    weights that deviate less are stretched to that deviation, raised to `eps` and brought to mean 1 again.

    Raises:
        UserError: all advantages are equal, or not finite.
    """
    values = np.asarray(advantages, dtype=np.float64)
    factor = values - values.min(axis=-1, keepdims=True)
    if not (np.isfinite(factor).all() and factor.any(axis=-1).all()):
        raise UserError("the advantages are all equal or not finite: they order no rows")
    weights: NDArray[np.float64] = np.asarray(previous) * factor / factor.mean(axis=-1, keepdims=True)
    weights /= weights.mean(axis=-1, keepdims=True)
    if floor:
        weights = np.maximum(weights, floor)
        weights /= weights.mean(axis=-1, keepdims=True)
    if scale_std is not None:
        stretch = scale_std / weights.std(axis=-1, keepdims=True)
        stretched = np.maximum(stretch * (weights - 1) + 1, eps)
        weights = np.where(stretch > 1, stretched / stretched.mean(axis=-1, keepdims=True), weights)
    return weights
