"""TD3+BC (Fujimoto and Gu 2021) with weights on every term and an own batch for the policy (OPER)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.offline.algorithms.base import Algorithm, Batch, Logs, Number, by_run, twice
from leap_shared.offline.networks import Adam, StackedMLP

__all__ = ["TD3BC", "TD3BCConfig"]

ACTOR, CRITICS = ("l1", "l2", "l3"), (("l1", "l2", "l3"), ("l4", "l5", "l6"))


@dataclass(frozen=True)
class TD3BCConfig:
    """Defaults of the paper; a tuple gives each run its own value."""

    alpha: Number = 2.5
    discount: Number = 0.99
    target_rate: float = 0.005
    policy_noise: Number = 0.2
    noise_clip: Number = 0.5
    learning_rate: float = 3e-4
    max_action: float = 1.0
    hidden: tuple[int, ...] = (256, 256)
    reweight_eval: bool = False
    reweight_improve: bool = False
    reweight_constraint: bool = False
    clip_constraint: int = 0
    """Weights w of the constraint: 0 as they are, 1 max(w, 1), 2 √w where w < 1."""

    def __post_init__(self) -> None:
        if self.clip_constraint not in (0, 1, 2):
            raise UserError(f"clip_constraint is {self.clip_constraint}: give 0, 1 or 2")


class TD3BC(Algorithm):
    """Actor s -> a, max_action tanh; twin critics (s, a) -> Q; targets of both, which move with the actor."""

    name: ClassVar[str] = "td3bc"
    period: ClassVar[int] = 2

    def __init__(
        self,
        observation: int,
        action: int,
        seeds: Sequence[int],
        config: TD3BCConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(observation, action, seeds, device)
        self.config = config = config or TD3BCConfig()
        runs = len(self.seeds)
        numbers = ("alpha", "discount", "policy_noise", "noise_clip")
        self._numbers = {name: by_run(name, getattr(config, name), runs, self.device) for name in numbers}
        self._reach, bound = ((self._numbers[x] * config.max_action)[:, None, None] for x in numbers[2:])
        self._bounds = -bound, bound
        self.actor = StackedMLP((observation, *config.hidden, action), [3 * seed for seed in seeds], device)
        heads = [3 * seed + head for seed in seeds for head in (1, 2)]
        self.critic = StackedMLP((observation + action, *config.hidden, 1), heads, device)
        self.actor_target, self.critic_target = self.actor.copy(), self.critic.copy()
        self.actor_optimizer = Adam.of(self.actor, config.learning_rate)
        self.critic_optimizer = Adam.of(self.critic, config.learning_rate)

    @property
    def normalises_states(self) -> bool:
        """They do."""
        return True

    def parts(self) -> Mapping[str, StackedMLP | Adam]:
        """See `Algorithm`."""
        names = ("actor", "actor_target", "critic", "critic_target", "actor_optimizer", "critic_optimizer")
        return {name: getattr(self, name) for name in names}

    def wants_policy_batch(self) -> bool:
        """Every second update moves the actor."""
        return self.updates % 2 == 1

    def noise(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Of the target actions."""
        shape = (len(self.seeds), batch_size, self.action)
        return (torch.randn(shape, generator=generator, device=self.device),)

    @torch.no_grad()
    def update(self, batch: Batch, policy_batch: Batch | None, noise: Sequence[Tensor]) -> Logs:
        """See `Algorithm`."""
        logs = self._update_critic(batch, noise[0])
        self.updates += 1
        if self.updates % 2 == 0:
            logs |= self._update_actor(batch if policy_batch is None else policy_batch)
            self.critic_target.follow(self.critic, self.config.target_rate)
            self.actor_target.follow(self.actor, self.config.target_rate)
        return logs

    def _update_critic(self, batch: Batch, noise: Tensor) -> Logs:
        """L = mean w [(Q1 - y)² + (Q2 - y)²], y = r + γ min Q'(s', π'(s') + clip ε)."""
        config, runs, rows = self.config, len(self.seeds), batch.rewards.shape[1]
        after = self.actor_target(batch.next_observations).tanh_().mul_(config.max_action)
        after.add_(torch.clamp(noise * self._reach, *self._bounds)).clamp_(-config.max_action, config.max_action)
        ahead = self.critic_target(twice(torch.cat([batch.next_observations, after], -1))).view(runs, 2, rows).amin(1)
        goal = batch.rewards + self._numbers["discount"][:, None] * batch.not_terminal * ahead
        values, tape = self.critic.forward(twice(torch.cat([batch.observations, batch.actions], -1)))
        values = values.view(runs, 2, rows)
        error = values - goal[:, None]
        weighted = error * batch.weights[:, None] if config.reweight_eval else error
        self.critic.backward(tape, (weighted * (2 / rows)).view(2 * runs, rows, 1))
        self.critic_optimizer.step()
        q1, q2 = values.mean(-1).unbind(1)
        return {"Q1": q1, "Q2": q2, "critic_loss": (error * weighted).mean(-1).sum(1)}

    def _update_actor(self, batch: Batch) -> Logs:
        """L = -λ mean w Q1(s, π) + mean w_c (π - a)², λ = α / mean |Q1(s, π)|, which is not differentiated."""
        config, rows = self.config, batch.rewards.shape[1]
        outputs, actor_tape = self.actor.forward(batch.observations)
        policy = outputs.tanh_()
        inputs = torch.cat([batch.observations, policy * config.max_action], -1)
        values, critic_tape = self.critic.forward(inputs, slice(0, None, 2))
        values = values[..., 0]
        scale = self._numbers["alpha"] / values.abs().mean(-1)
        improve = batch.weights if config.reweight_improve else torch.ones_like(values)
        constraint = self._constraint_weights(batch)
        ascent = (-scale[:, None] / rows * improve)[..., None]
        distance = policy * config.max_action - batch.actions
        descent = distance * constraint[..., None] * (2 / (rows * self.action))
        descent += self.critic.backward(critic_tape, ascent, weights=False, inputs=True)[..., self.observation :]
        self.actor.backward(actor_tape, descent * (1 - policy * policy) * config.max_action)
        self.actor_optimizer.step()
        constraint_loss = (distance.square().mean(-1) * constraint).mean(-1)
        loss = constraint_loss - scale * (values * improve).mean(-1)
        return {"actor_loss": loss, "constraint_loss": constraint_loss, "lambda": scale}

    def _constraint_weights(self, batch: Batch) -> Float[Tensor, "runs batch"]:
        weights = batch.weights
        if not self.config.reweight_constraint:
            return torch.ones_like(weights)
        if self.config.clip_constraint == 1:
            return weights.clamp(min=1)
        return torch.where(weights < 1, weights.sqrt(), weights) if self.config.clip_constraint == 2 else weights

    @torch.no_grad()
    def act(
        self, observations: Float[Tensor, "runs batch observation"], chosen: slice = slice(None)
    ) -> Float[Tensor, "runs batch action"]:
        """See `Algorithm`."""
        return self.actor(observations, chosen).tanh_().mul_(self.config.max_action)

    def export(self, run: int) -> dict[str, dict[str, Tensor]]:
        """{actor: {l1.weight, ...}, critic: {l1.weight, ..., l6.bias}} and the targets."""
        states = {}
        for suffix in ("", "_target"):
            critic: StackedMLP = getattr(self, f"critic{suffix}")
            states[f"actor{suffix}"] = getattr(self, f"actor{suffix}").export(run, ACTOR)
            states[f"critic{suffix}"] = critic.export(2 * run, CRITICS[0]) | critic.export(2 * run + 1, CRITICS[1])
        return states

    def load(self, run: int, states: Mapping[str, Mapping[str, ArrayLike | Tensor]]) -> None:
        """See `Algorithm`."""
        for name, own in self.export(run).items():
            for key, value in own.items():
                value.copy_(torch.as_tensor(states[name][key]))
