"""Trained policies of all runs: act, be simulated, be kept in one file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from leap_shared.checkpoints import write_safetensors
from leap_shared.errors import UserError, did_you_mean
from leap_shared.offline.algorithms import ALGORITHMS, Algorithm
from leap_shared.offline.simulation import run_episodes

__all__ = ["EVALUATION_SEED", "Policies"]

EVALUATION_SEED = 10_000


class Policies:
    """Deterministic policies of an algorithm's runs, with the scale of the states that they were trained on."""

    def __init__(
        self,
        algorithm: Algorithm,
        mean: Float[Tensor, "runs 1 observation"],
        std: Float[Tensor, "runs 1 observation"],
    ) -> None:
        self.algorithm, self.mean, self.std = algorithm, mean, std

    @torch.no_grad()
    def act(
        self, observations: Float32[np.ndarray, "runs batch observation"], chosen: slice = slice(None)
    ) -> Float32[np.ndarray, "runs batch action"]:
        """Actions in [-1, 1] of the `chosen` runs, each for its own observations."""
        states = torch.from_numpy(np.ascontiguousarray(observations)).to(self.mean.device)
        actions = self.algorithm.act((states - self.mean[chosen]) / self.std[chosen], chosen)
        found: NDArray[np.float32] = actions.cpu().numpy()
        return found

    def policy(self, run: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """One run's policy: observations (batch, width) to actions (batch, width)."""
        return lambda observations: self.act(observations[None], slice(run, run + 1))[0]

    def returns(
        self, environment: str | Callable[[], Any], episodes: int = 10, seed: int = EVALUATION_SEED, **options: Any
    ) -> Float64[np.ndarray, "runs episodes"]:
        """Undiscounted returns in simulation; see :func:`leap_shared.offline.simulation.run_episodes`."""
        return run_episodes(self.act, environment, len(self.algorithm.seeds), episodes, seed, **options)

    def save(self, path: Path) -> None:
        """Write every network of every run as `run.network.parameter`, in the layout of the authors' checkpoints."""
        runs = range(len(self.algorithm.seeds))
        states = {f"{run}.{net}": state for run in runs for net, state in self.algorithm.export(run).items()}
        tensors = {f"{where}.{key}": value for where, state in states.items() for key, value in state.items()}
        facts = {
            "algorithm": self.algorithm.name,
            "observation": self.algorithm.observation,
            "action": self.algorithm.action,
            "seeds": self.algorithm.seeds,
            "config": dataclasses.asdict(self.algorithm.config),
        }
        scale = {"mean": self.mean[:, 0], "std": self.std[:, 0]}
        write_safetensors(path, {**tensors, **scale}, {"leap": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "cpu") -> Policies:
        """Read what `save` wrote.

        Raises:
            UserError: the file cannot be read, or is none of these.
        """
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                facts = json.loads((file.metadata() or {})["leap"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} holds no policies ({reason}): give the policies.safetensors of a run") from error
        kind, config = ALGORITHMS.get(facts["algorithm"], (None, None))
        if kind is None or config is None:
            raise UserError(
                f"{path} is of the algorithm {facts['algorithm']!r}: {did_you_mean(facts['algorithm'], ALGORITHMS)}"
            )
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in facts["config"].items()}
        algorithm = kind(facts["observation"], facts["action"], facts["seeds"], config(**options), device)
        for run in range(len(algorithm.seeds)):
            for net, state in algorithm.export(run).items():
                for key, own in state.items():
                    own.copy_(tensors[f"{run}.{net}.{key}"])
        return cls(algorithm, tensors["mean"][:, None], tensors["std"][:, None])
