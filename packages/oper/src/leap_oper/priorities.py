"""One static weight per transition (mean 1): from returns, ensembles of them, rescaled, and kept in a file."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from leap_shared.errors import UserError
from leap_shared.files import atomic_writer
from leap_shared.offline import Transitions, episode_returns

__all__ = ["Priorities", "advantage_weights", "oper_r"]

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
        if self.weights.ndim != 1:
            raise UserError(f"weights are {AXES[self.weights.ndim]}: call .at(iteration=...) and .ensemble() first")
        probs: NDArray[np.float64] = self.weights / self.weights.sum()
        return probs

    @property
    def std(self) -> float:
        """Standard deviation of the weights that was reached (their mean is 1)."""
        return float(self.weights.std(axis=-1).mean())

    @property
    def effective_sample_size(self) -> float:
        """1 / Σ p²: as many rows of equal weight would be as informative."""
        return float(1 / np.square(self.probs).sum())

    def at(self, iteration: int) -> Priorities:
        """Weights of one iteration (from 1) of OPER-A."""
        stored = self.weights.shape[1] if self.weights.ndim == 3 else 0
        if not 1 <= iteration <= stored:
            raise UserError(f"iteration {iteration} is not among the {stored} stored iterations")
        return Priorities(self.weights[:, iteration - 1], {**self.meta, "iteration": iteration})

    def ensemble(self, how: str = "mean") -> Priorities:
        """Mean or median over seeds, row by row (the median of an even number is the mean of the middle two)."""
        if self.weights.ndim != 2:
            raise UserError(f"weights are {AXES[self.weights.ndim]}, an ensemble needs {AXES[2]}")
        if how not in ("mean", "median"):
            raise UserError(f"ensemble {how!r} is unknown: use mean or median")
        together = np.median(self.weights, axis=0) if how == "median" else self.weights.mean(axis=0)
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

    def check(self, dataset: Transitions) -> None:
        """Raise UserError unless these weights belong to `dataset`."""
        if len(self) != len(dataset):
            raise UserError(f"there are {len(self)} weights for {len(dataset)} rows: compute them for this data set")
        known = self.meta.get("fingerprint", dataset.fingerprint)
        if known != dataset.fingerprint:
            raise UserError(f"the weights were made for other data ({known[:12]}…): compute them for this data set")

    def save(self, path: Path) -> None:
        """Write an .npz file with `weights` (float32) and `meta` (JSON), atomically."""
        with atomic_writer(Path(path)) as file:
            np.savez(file, weights=self.weights.astype(np.float32), meta=np.array(json.dumps(dict(self.meta))))

    @classmethod
    def load(cls, path: Path, dataset: Transitions | None = None) -> Priorities:
        """Read what `save` wrote, and :meth:`check` it against `dataset`.

        Raises:
            UserError: the file is no such .npz, would need unpickling, or belongs to other data.
        """
        try:
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                priorities = cls(file["weights"], json.loads(str(file["meta"])))
        except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} holds no priorities: {error}") from error
        if dataset is not None:
            priorities.check(dataset)
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
    score = score.astype(np.float64)
    low, high = score.min(), score.max()
    meta = {"method": "oper_r", "base_prob": base_prob, "variant": variant, "fingerprint": dataset.fingerprint}
    if low == high:
        warnings.warn(f"all returns are {low:g}: the priorities are uniform", stacklevel=2)
        return Priorities(np.ones(len(dataset)), meta)
    share = (score - low) / (high - low)
    return Priorities((1 - share if variant == "inverse" else share) + base_prob, meta)


def advantage_weights(
    previous: ArrayLike, advantages: ArrayLike, scale_std: float | None = None, eps: float = 0.1
) -> NDArray[np.float64]:
    """Weights of the next iteration of OPER-A along the last axis: W ∝ previous ∘ (A - min A), mean 1.

    So the row of least advantage gets weight 0 for ever. With `scale_std`, weights that deviate less are stretched to
    that deviation, raised to `eps` and brought to mean 1 again.

    Raises:
        UserError: all advantages are equal, or not finite.
    """
    values = np.asarray(advantages, dtype=np.float64)
    factor = values - values.min(axis=-1, keepdims=True)
    if not (np.isfinite(factor).all() and factor.any(axis=-1).all()):
        raise UserError("the advantages are all equal or not finite: they order no rows")
    weights: NDArray[np.float64] = np.asarray(previous) * factor / factor.mean(axis=-1, keepdims=True)
    weights /= weights.mean(axis=-1, keepdims=True)
    if scale_std is not None:
        stretch = scale_std / weights.std(axis=-1, keepdims=True)
        stretched = np.maximum(stretch * (weights - 1) + 1, eps)
        weights = np.where(stretch > 1, stretched / stretched.mean(axis=-1, keepdims=True), weights)
    return weights
