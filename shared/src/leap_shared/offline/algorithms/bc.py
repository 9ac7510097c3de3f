"""Behaviour cloning with Gaussian, truncated Gaussian or deterministic policies, and weights on the loss (OPER)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from leap_shared.errors import UserError, did_you_mean
from leap_shared.offline.algorithms.base import Algorithm, Batch, Logs
from leap_shared.offline.networks import Adam, StackedMLP

__all__ = ["BC", "BCConfig", "gaussian", "layer_names", "log_likelihood", "mean_action"]

POLICIES = ("normal", "truncated", "deterministic")
HALF_RANGE = 2.5  # of the log deviation, which lies in (-5, 0)
LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)
LEAST_MASS = 1e-8  # of the normal within the bounds


@dataclass(frozen=True)
class BCConfig:
    """Defaults of OPER's case study, which draws batches of 512."""

    policy: str = "normal"
    """normal, truncated (to [-1, 1]) or deterministic."""
    learning_rate: float = 1e-4
    hidden: tuple[int, ...] = (1024, 1024)
    reweight: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UserError(f"policy {self.policy!r} is unknown: {did_you_mean(self.policy, POLICIES)}")


def layer_names(hidden: Sequence[int], stem: str = "net.net") -> list[str]:
    """The authors' names of the linear layers: net.net.1, net.net.3, ..."""
    return [f"{stem}.{2 * layer + 1}" for layer in range(len(hidden) + 1)]


def gaussian(
    outputs: Float[Tensor, "*batch outputs"],
) -> tuple[Float[Tensor, "*batch action"], Float[Tensor, "*batch action"]]:
    """Mean tanh(o1) and log deviation -5 + 2.5 (tanh(o2) + 1) of outputs (o1, o2)."""
    mean, spread = outputs.tanh().chunk(2, -1)
    return mean, (spread - 1) * HALF_RANGE


def log_likelihood(
    outputs: Float[Tensor, "*batch outputs"], actions: Float[Tensor, "*batch action"], *, truncated: bool
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch outputs"]]:
    """L = log p(a) = Σ -½z² - ½log 2π - log σ [- log Z], z = (a - μ) / σ, and its gradient with respect to the outputs.

    Z is the normal's mass within [-1, 1], and stands there if `truncated`.
    """
    mean, log_std = gaussian(outputs)
    scale = torch.exp(-log_std)
    z = (actions - mean) * scale
    square = z * z
    each = log_std + 0.5 * square
    by_mean, by_log_std = z * scale, square - 1
    if truncated:
        lower, upper, mass, at_lower, at_upper = _truncation(mean, scale)
        each += mass.log()
        by_mean -= (at_lower - at_upper) * scale
        by_log_std -= at_lower * lower - at_upper * upper
    by_mean *= 1 - mean * mean
    by_log_std *= -log_std * (2 + log_std / HALF_RANGE)
    return -each.sum(-1) - LOG_ROOT_2PI * actions.shape[-1], torch.cat([by_mean, by_log_std], -1)


def _truncation(mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Standardised bounds -1 and 1, the mass Z between them, and the truncated density at each, times σ."""
    lower, upper = (-1 - mean) * scale, (1 - mean) * scale
    mass = (0.5 * (torch.erf(upper * math.sqrt(0.5)) - torch.erf(lower * math.sqrt(0.5)))).clamp_min_(LEAST_MASS)
    at_lower, at_upper = (torch.exp(-0.5 * x * x - LOG_ROOT_2PI) / mass for x in (lower, upper))
    return lower, upper, mass, at_lower, at_upper


def mean_action(outputs: Float[Tensor, "*batch outputs"], policy: str) -> Float[Tensor, "*batch action"]:
    """What is done at evaluation; a truncated normal's mean is μ + σ (φ(lower) - φ(upper)) / Z."""
    if policy == "deterministic":
        return outputs.tanh()
    mean, log_std = gaussian(outputs)
    if policy == "normal":
        return mean
    *_, at_lower, at_upper = _truncation(mean, torch.exp(-log_std))
    return mean + (at_lower - at_upper) * log_std.exp()


class BC(Algorithm):
    """One policy s -> a per run, fitted to the actions of the batch: only prioritised batches matter."""

    name: ClassVar[str] = "bc"

    def __init__(
        self,
        observation: int,
        action: int,
        seeds: Sequence[int],
        config: BCConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(observation, action, seeds, device)
        self.config = config = config or BCConfig()
        self._deterministic = config.policy == "deterministic"
        outputs = action if self._deterministic else 2 * action
        self.policy = StackedMLP((observation, *config.hidden, outputs), self.seeds, device)
        self.optimizer = Adam.of(self.policy, config.learning_rate)

    def parts(self) -> Mapping[str, StackedMLP | Adam]:
        """See `Algorithm`."""
        return {"policy": self.policy, "optimizer": self.optimizer}

    @torch.no_grad()
    def update(self, batch: Batch, policy_batch: Batch | None, noise: Sequence[Tensor]) -> Logs:  # noqa: ARG002
        """L = mean -w log π(a|s), or mean w (π(s) - a)² over rows and dimensions for a deterministic policy.

        The batch is `policy_batch` where there is one.
        """
        batch = batch if policy_batch is None else policy_batch
        rows = batch.rewards.shape[1]
        outputs, tape = self.policy.forward(batch.observations)
        if self._deterministic:
            actions = outputs.tanh_()
            error = actions - batch.actions
            loss = error.square().mean(-1)
            gradient = error * (1 - actions * actions).mul_(2 / (rows * self.action))
        else:
            likelihood, slope = log_likelihood(outputs, batch.actions, truncated=self.config.policy == "truncated")
            loss, gradient = -likelihood, slope.mul_(-1 / rows)
        if self.config.reweight:
            loss *= batch.weights
            gradient *= batch.weights[..., None]
        self.policy.backward(tape, gradient)
        self.optimizer.step()
        self.updates += 1
        return {"loss": loss.mean(-1)}

    @torch.no_grad()
    def log_prob(
        self,
        observations: Float[Tensor, "runs batch observation"],
        actions: Float[Tensor, "runs batch action"],
        chosen: slice = slice(None),
    ) -> Float[Tensor, "runs batch"]:
        """Logarithm of the density π(a|s) of the `chosen` runs.

        Raises:
            UserError: the policy is deterministic.
        """
        if self._deterministic:
            raise UserError("a deterministic policy has no density: train with policy='normal' or 'truncated'")
        outputs = self.policy(observations, chosen)
        return log_likelihood(outputs, actions, truncated=self.config.policy == "truncated")[0]

    @torch.no_grad()
    def act(
        self, observations: Float[Tensor, "runs batch observation"], chosen: slice = slice(None)
    ) -> Float[Tensor, "runs batch action"]:
        """See `Algorithm`."""
        return mean_action(self.policy(observations, chosen), self.config.policy)

    def _names(self) -> list[str]:
        hidden = self.config.hidden
        return [f"l{layer + 1}" for layer in range(len(hidden) + 1)] if self._deterministic else layer_names(hidden)

    def export(self, run: int) -> dict[str, dict[str, Tensor]]:
        """{pi: {net.net.1.weight, ...}}; {pi: {l1.weight, ...}} of a deterministic policy."""
        return {"pi": self.policy.export(run, self._names())}

    def load(self, run: int, states: Mapping[str, Mapping[str, ArrayLike | Tensor]]) -> None:
        """See `Algorithm`."""
        self.policy.load(run, self._names(), states["pi"])
