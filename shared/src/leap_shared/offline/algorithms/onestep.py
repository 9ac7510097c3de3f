"""One-step improvement (Brandfonbrener et al. 2021): the behaviour policy, its Q, one weighted imitation."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.offline.algorithms.base import Algorithm, Batch, Logs, Number, by_run, twice
from leap_shared.offline.algorithms.bc import gaussian, layer_names, log_likelihood, mean_action
from leap_shared.offline.networks import Adam, StackedMLP

__all__ = ["OneStep", "OneStepConfig"]

POLICIES = ("normal", "truncated")
ACTION_BOUND = 1 - 1e-4  # of the actions whose likelihood under π is raised


@dataclass(frozen=True)
class OneStepConfig:
    """Defaults of OPER's case study, which draws batches of 512; a tuple gives each run its own value.

    The authors only resample: `reweight_eval` (behaviour and Q) and `reweight_improve` (policy) are this package's.
    """

    behaviour_updates: int = 500_000
    q_updates: int = 2_000_000
    policy_updates: int = 100_000
    temperature: Number = 1.0
    discount: Number = 0.99
    target_rate: float = 0.005
    samples: int = 10
    largest_weight: Number = 100.0
    learning_rate: float = 1e-4
    hidden: tuple[int, ...] = (1024, 1024)
    policy: str = "normal"
    """normal, as in the authors' runs, where π is a copy of β with all it has; or truncated, as their settings say."""
    double: bool = False
    compat: bool = False
    """With `double`, swap networks as the authors do: the online ones make y, the targets the weights of imitation."""
    reweight_eval: bool = False
    reweight_improve: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UserError(f"policy {self.policy!r} is unknown: give {' or '.join(POLICIES)}")
        lengths = {name: getattr(self, name) for name in ("behaviour_updates", "q_updates", "policy_updates")}
        for name, length in lengths.items():
            if length < 0:
                raise UserError(f"{name} is {length}: give a number of updates, or 0 to leave the phase out")
        if self.samples < 1:
            raise UserError(f"samples is {self.samples}: give at least 1")

    @property
    def updates(self) -> int:
        """Of all three phases."""
        return self.behaviour_updates + self.q_updates + self.policy_updates


class OneStep(Algorithm):
    """Behaviour policy β and policy π, s -> normal distribution; Q or twin Q, (s, a) -> value, with a target.

    The phases follow each other as `updates` grows: behaviour, q, policy (which has no end). π is β's copy until its
    phase. The public functions of the phases neither count updates nor ask for the phase.
    """

    name: ClassVar[str] = "onestep"
    period: ClassVar[int] = 2  # of the targets, in the q phase; the other phases repeat with every update
    needs_next_actions: ClassVar[bool] = True

    def __init__(
        self,
        observation: int,
        action: int,
        seeds: Sequence[int],
        config: OneStepConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(observation, action, seeds, device)
        self.config = config = config or OneStepConfig()
        numbers = ("temperature", "discount", "largest_weight")
        self._numbers = {name: by_run(name, getattr(config, name), len(self.seeds), self.device) for name in numbers}
        self._heads, self._swapped = 2 if config.double else 1, config.double and config.compat
        self.beta = StackedMLP((observation, *config.hidden, 2 * action), [3 * seed for seed in seeds], device)
        heads = [3 * seed + 1 + head for seed in seeds for head in range(self._heads)]
        self.q = StackedMLP((observation + action, *config.hidden, 1), heads, device)
        self.pi, self.q_target = self.beta.copy(), self.q.copy()
        self.beta_optimizer, self.q_optimizer, self.pi_optimizer = (
            Adam.of(network, config.learning_rate) for network in (self.beta, self.q, self.pi)
        )

    def parts(self) -> Mapping[str, StackedMLP | Adam]:
        """See `Algorithm`."""
        names = ("beta", "q", "q_target", "pi", "beta_optimizer", "q_optimizer", "pi_optimizer")
        return {name: getattr(self, name) for name in names}

    @property
    def phase(self) -> str:
        """Of the next update: behaviour, q or policy."""
        if self.updates < self.config.behaviour_updates:
            return "behaviour"
        return "q" if self.updates < self.config.behaviour_updates + self.config.q_updates else "policy"

    def same_for(self) -> int:
        """Number of updates to come in this phase."""
        end = self.config.behaviour_updates + (self.config.q_updates if self.phase == "q" else 0)
        return sys.maxsize if self.phase == "policy" else end - self.updates

    def wants_policy_batch(self) -> bool:
        """Only π is tied to the data by priorities where they are decoupled."""
        return self.phase == "policy"

    def noise(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Of the behaviour policy's samples, in the policy phase."""
        shape = (len(self.seeds), self.config.samples, batch_size, self.action)
        return (torch.randn(shape, generator=generator, device=self.device),) if self.phase == "policy" else ()

    @torch.no_grad()
    def update(self, batch: Batch, policy_batch: Batch | None, noise: Sequence[Tensor]) -> Logs:
        """See `Algorithm`."""
        phase = self.phase
        if phase == "behaviour":
            logs = self.update_behaviour(batch)
        elif phase == "q":
            logs = self.update_q(batch, follow=(self.updates - self.config.behaviour_updates) % 2 == 1)
        else:
            batch = batch if policy_batch is None else policy_batch
            logs = self.update_policy(batch, self.samples(batch.observations, noise[0]))
        self.updates += 1
        return logs

    @torch.no_grad()
    def update_behaviour(self, batch: Batch) -> Logs:
        """L = mean -log β(a|s); π becomes the new β."""
        outputs, tape = self.beta.forward(batch.observations)
        weights = batch.weights if self.config.reweight_eval else torch.ones_like(batch.weights)
        likelihood, slope = log_likelihood(outputs, batch.actions, truncated=False)
        self.beta.backward(tape, slope.mul_((weights / -weights.shape[1])[..., None]))
        self.beta_optimizer.step()
        self.pi.flat.copy_(self.beta.flat)
        return {"behaviour_loss": -(weights * likelihood).mean(-1)}

    @torch.no_grad()
    def update_q(self, batch: Batch, *, follow: bool) -> Logs:
        """L = Σ over heads of mean (Q - y)², y = r + γ Q'(s', a') (double: min Q'), a' of the data.

        Args:
            batch: with next actions.
            follow: move the targets, as after every second update.

        Raises:
            UserError: the batch has no next actions.
        """
        if batch.next_actions is None:
            raise UserError("the batch has no next_actions: make it by Rows(..., next_actions=True)")
        config, runs, rows = self.config, len(self.seeds), batch.rewards.shape[1]
        ahead = self._least(self.q if self._swapped else self.q_target, batch.next_observations, batch.next_actions)
        goal = batch.rewards + self._numbers["discount"][:, None] * batch.not_terminal * ahead
        values, tape = self.q.forward(self._inputs(batch.observations, batch.actions))
        values = values.view(runs, self._heads, rows)
        error = values - goal[:, None]
        weighted = error * batch.weights[:, None] if config.reweight_eval else error
        self.q.backward(tape, (weighted * (2 / rows)).view(-1, rows, 1))
        self.q_optimizer.step()
        if follow:
            self.q_target.follow(self.q, config.target_rate)
        return {"q_loss": (error * weighted).mean(-1).sum(1), "q": values.mean((1, 2))}

    @torch.no_grad()
    def samples(
        self, observations: Float[Tensor, "runs batch observation"], noise: Float[Tensor, "runs samples batch action"]
    ) -> Float[Tensor, "runs samples batch action"]:
        """Actions of β, not clipped."""
        mean, log_std = gaussian(self.beta(observations))
        return torch.addcmul(mean[:, None], noise, log_std.exp()[:, None])

    @torch.no_grad()
    def update_policy(self, batch: Batch, samples: Float[Tensor, "runs samples batch action"]) -> Logs:
        """L = mean -w log π(a|s), w = min(exp(temperature (Q(s, a) - b)), 100), b = mean Q(s, samples).

        Args:
            batch: of the data.
            samples: actions of β at the batch's states.
        """
        rows, numbers = batch.rewards.shape[1], self._numbers
        actions = torch.cat([batch.actions[:, None], samples], 1)
        states = batch.observations[:, None].expand(-1, actions.shape[1], -1, -1)
        values = self._least(self.q_target if self._swapped else self.q, states.flatten(1, 2), actions.flatten(1, 2))
        values = values.view(*actions.shape[:3])
        advantage = values[:, 0] - values[:, 1:].mean(1)
        weights = torch.minimum((numbers["temperature"][:, None] * advantage).exp(), numbers["largest_weight"][:, None])
        if self.config.reweight_improve:
            weights *= batch.weights
        outputs, tape = self.pi.forward(batch.observations)
        clamped = batch.actions.clamp(-ACTION_BOUND, ACTION_BOUND)
        likelihood, slope = log_likelihood(outputs, clamped, truncated=self.config.policy == "truncated")
        self.pi.backward(tape, slope.mul_((weights / -rows)[..., None]))
        self.pi_optimizer.step()
        return {"policy_loss": -(weights * likelihood).mean(-1), "advantage": advantage.mean(-1)}

    def _inputs(self, observations: Tensor, actions: Tensor) -> Float[Tensor, "networks batch width"]:
        inputs = torch.cat([observations, actions], -1)
        return twice(inputs) if self.config.double else inputs

    def _least(self, network: StackedMLP, observations: Tensor, actions: Tensor) -> Float[Tensor, "runs batch"]:
        """Q(s, a), the smaller one of two."""
        values = network(self._inputs(observations, actions))
        return values.view(len(self.seeds), self._heads, -1).amin(1)

    @torch.no_grad()
    def act(
        self, observations: Float[Tensor, "runs batch observation"], chosen: slice = slice(None)
    ) -> Float[Tensor, "runs batch action"]:
        """See `Algorithm`; of π, which is β before its phase."""
        return mean_action(self.pi(observations, chosen), self.config.policy)

    def export(self, run: int) -> dict[str, dict[str, Tensor]]:
        """{pi, beta: {net.net.1.weight, ...}, q, q_target: the same, or {net1.net.1.weight, ...} of twins}."""
        hidden = self.config.hidden
        states = {name: getattr(self, name).export(run, layer_names(hidden)) for name in ("pi", "beta")}
        for name in ("q", "q_target"):
            states[name] = {}
            for head, stem in enumerate(("net1.net", "net2.net") if self.config.double else ("net.net",)):
                state = getattr(self, name).export(self._heads * run + head, layer_names(hidden, stem))
                states[name].update(state)
        return states

    def load(self, run: int, states: Mapping[str, Mapping[str, ArrayLike | Tensor]]) -> None:
        """See `Algorithm`."""
        for name, own in self.export(run).items():
            for key, value in own.items():
                value.copy_(torch.as_tensor(states[name][key]))
