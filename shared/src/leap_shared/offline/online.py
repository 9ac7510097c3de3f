"""Learners that make the policies of offline data sets: SAC (Haarnoja et al. 2018) and TD3 (Fujimoto et al. 2018).

Both act while they learn, and are written like the offline algorithms: flat parameters, explicit backward passes,
fused Adam.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from leap_shared.errors import UserError
from leap_shared.offline.networks import Adam, StackedMLP, Tape

__all__ = ["SAC", "TD3", "Experience", "Learner", "SACConfig", "TD3Config"]

LAYERS = "l{}"
LOG_STD_RANGE = (-20.0, 2.0)
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
Logs = dict[str, Float[Tensor, ""]]


class Experience(NamedTuple):
    """A batch of steps."""

    observations: Float[Tensor, "batch observation"]
    actions: Float[Tensor, "batch action"]
    rewards: Float[Tensor, " batch"]
    not_terminal: Float[Tensor, " batch"]
    next_observations: Float[Tensor, "batch observation"]


@dataclass(frozen=True)
class SACConfig:
    """Defaults of the paper, with a learned temperature."""

    hidden: tuple[int, ...] = (256, 256)
    batch_size: int = 256
    discount: float = 0.99
    target_rate: float = 0.005
    learning_rate: float = 3e-4
    target_entropy: float | None = None
    """Nats; None is minus the number of actions."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class TD3Config:
    """Defaults of the paper; noise in units of the largest action."""

    hidden: tuple[int, ...] = (256, 256)
    batch_size: int = 256
    discount: float = 0.99
    target_rate: float = 0.005
    learning_rate: float = 3e-4
    exploration_noise: float = 0.1
    policy_noise: float = 0.2
    noise_clip: float = 0.5
    policy_delay: int = 2
    """Critic updates per update of the actor and the targets."""

    def __post_init__(self) -> None:
        _check(self)
        if self.policy_delay < 1 or min(self.exploration_noise, self.policy_noise, self.noise_clip) < 0:
            raise UserError(f"{self}: expected policy_delay >= 1 and noise >= 0")


def _check(config: SACConfig | TD3Config) -> None:
    if not config.hidden or min(config.hidden) < 1 or config.batch_size < 1:
        raise UserError(f"{config}: expected at least one hidden layer, and widths and batch_size of at least 1")
    if not (0 <= config.discount < 1 and 0 < config.target_rate <= 1 and config.learning_rate > 0):
        raise UserError(f"{config}: expected discount in [0, 1), target_rate in (0, 1] and learning_rate > 0")


class Learner(ABC):
    """Actor, twin critics (s, a) -> Q and their targets; actions lie in [-1, 1]."""

    name: ClassVar[str]
    has_density: ClassVar[bool]
    """Whether `explore` knows the log density of its actions."""

    def __init__(self, observation: int, action: int, outputs: int, config: SACConfig | TD3Config, seed: int) -> None:
        self.observation, self.action, self.updates = observation, action, 0
        self.actor = StackedMLP((observation, *config.hidden, outputs), [3 * seed])
        self.critic = StackedMLP((observation + action, *config.hidden, 1), [3 * seed + 1, 3 * seed + 2])
        self.critic_target = self.critic.copy()
        self.actor_optimizer = Adam.of(self.actor, config.learning_rate)
        self.critic_optimizer = Adam.of(self.critic, config.learning_rate)

    def parts(self) -> Mapping[str, StackedMLP | Adam]:
        """Networks and optimisers by name: what a checkpoint holds beside `updates`."""
        names = ("actor", "critic", "critic_target", "actor_optimizer", "critic_optimizer")
        return {name: getattr(self, name) for name in names}

    @abstractmethod
    def noise(self, updates: int, generator: torch.Generator) -> Float[Tensor, "updates rows action"]:
        """Normal numbers for that many updates."""

    @abstractmethod
    def update(self, batch: Experience, noise: Float[Tensor, "rows action"]) -> Logs:
        """One update; returns batch means before it."""

    @abstractmethod
    def explore(
        self, observations: Float[Tensor, "batch observation"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "batch action"], Float[Tensor, " batch"]]:
        """Sampled actions and the logarithms of their densities (NaN where these are not known)."""

    @abstractmethod
    def act(self, observations: Float[Tensor, "batch observation"]) -> Float[Tensor, "batch action"]:
        """Deterministic actions."""

    def export_policy(self) -> dict[str, Tensor]:
        """{l1.weight, l1.bias, ...} of the actor, in the layout of `torch.nn.Linear`; views."""
        return self.actor.export(0, [LAYERS.format(n + 1) for n in range(len(self.actor.widths) - 1)])

    def load_policy(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `export_policy` gives."""
        for name, own in self.export_policy().items():
            own.copy_(state[name])

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on."""
        return {"updates": self.updates, **{name: part.state_dict() for name, part in self.parts().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self.updates = int(state["updates"])
        for name, part in self.parts().items():
            part.load_state_dict(state[name])

    def _values(
        self, critic: StackedMLP, observations: Tensor, actions: Tensor
    ) -> tuple[Float[Tensor, "2 batch"], Tape]:
        """Both critics' values of the same rows."""
        outputs, tape = critic.forward(torch.cat([observations, actions], -1).expand(2, -1, -1))
        return outputs[..., 0], tape

    def _regress(self, batch: Experience, goal: Float[Tensor, " batch"]) -> Logs:
        """L = mean (Q1 - y)² + mean (Q2 - y)²."""
        values, tape = self._values(self.critic, batch.observations, batch.actions)
        error = values - goal
        self.critic.backward(tape, (error * (2 / len(goal)))[..., None])
        self.critic_optimizer.step()
        return {"Q1": values[0].mean(), "critic_loss": error.square().sum() / len(goal)}

    def _action_gradient(self, tape: Tape, gradient: Float[Tensor, "2 batch"]) -> Float[Tensor, "batch action"]:
        """Gradient with respect to the actions that went into both critics."""
        inputs = self.critic.backward(tape, gradient[..., None], weights=False, inputs=True)
        return inputs.sum(0)[:, self.observation :]


class SAC(Learner):
    """Actor s -> (μ, log σ), a = tanh(μ + σ ε); temperature α learned towards the target entropy."""

    name: ClassVar[str] = "sac"
    has_density: ClassVar[bool] = True

    def __init__(self, observation: int, action: int, config: SACConfig | None = None, seed: int = 0) -> None:
        self.config = config = config or SACConfig()
        super().__init__(observation, action, 2 * action, config, seed)
        self.log_temperature, self.temperature_gradient = torch.zeros(1), torch.zeros(1)
        self.temperature_optimizer = Adam(self.log_temperature, self.temperature_gradient, config.learning_rate)
        self.target_entropy = -float(action) if config.target_entropy is None else config.target_entropy

    def noise(self, updates: int, generator: torch.Generator) -> Float[Tensor, "updates rows action"]:
        """Of the actions at s, then at s'."""
        return torch.randn((updates, 2 * self.config.batch_size, self.action), generator=generator)

    @torch.no_grad()
    def update(self, batch: Experience, noise: Float[Tensor, "rows action"]) -> Logs:
        """Critics towards y = r + γ (min Q'(s', a') - α log π(a'|s')); then actor, temperature and targets.

        Both losses see the actor and α as they were before the update, so one forward pass gives a and a'.
        Actor: L = mean (α log π(a|s) - min Q(s, a)). Temperature: L = -log α mean (log π(a|s) + target entropy).
        """
        config, rows = self.config, len(batch.rewards)
        temperature = self.log_temperature.exp()
        states = torch.cat([batch.observations, batch.next_observations])
        outputs, tape = self.actor.forward(states[None])
        actions, log_probs, reach = _squashed(outputs[0], noise)
        ahead = self._values(self.critic_target, batch.next_observations, actions[rows:])[0].amin(0)
        soft = ahead - temperature * log_probs[rows:]
        logs = self._regress(batch, torch.addcmul(batch.rewards, batch.not_terminal, soft, value=config.discount))

        action, log_prob = actions[:rows], log_probs[:rows]
        values, critic_tape = self._values(self.critic, batch.observations, action)
        first = (values[0] <= values[1]).to(values.dtype)
        slope = self._action_gradient(critic_tape, torch.stack([first, 1 - first]).mul_(-1 / rows))
        share = temperature / rows
        inner = slope * (1 - action * action) + 2 * share * action
        outer = (inner * reach[:rows] - share) * _inside(outputs[0, :rows, self.action :])
        here = Tape(tape.units, [[x[..., :rows, :] for x in layers] for layers in tape.inputs], tape.scale)
        self.actor.backward(here, torch.cat([inner, outer], -1)[None])
        self.actor_optimizer.step()
        entropy = -log_prob.mean()
        self.temperature_gradient.copy_(entropy - self.target_entropy)
        self.temperature_optimizer.step()
        self.critic_target.follow(self.critic, config.target_rate)
        self.updates += 1
        return logs | {"entropy": entropy, "temperature": temperature[0]}

    @torch.no_grad()
    def explore(
        self, observations: Float[Tensor, "batch observation"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "batch action"], Float[Tensor, " batch"]]:
        """See `Learner`."""
        noise = torch.randn((len(observations), self.action), generator=generator)
        return _squashed(self.actor(observations[None])[0], noise)[:2]

    @torch.no_grad()
    def act(self, observations: Float[Tensor, "batch observation"]) -> Float[Tensor, "batch action"]:
        """Tanh μ."""
        return self.actor(observations[None])[0, :, : self.action].tanh()

    def state_dict(self) -> dict[str, Any]:
        """See `Learner`."""
        optimizer = self.temperature_optimizer.state_dict()
        return super().state_dict() | {"log_temperature": self.log_temperature, "temperature_optimizer": optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Learner`."""
        super().load_state_dict(state)
        self.log_temperature.copy_(state["log_temperature"])
        self.temperature_optimizer.load_state_dict(state["temperature_optimizer"])


def _inside(log_std: Tensor) -> Tensor:
    low, high = LOG_STD_RANGE
    return ((log_std >= low) & (log_std <= high)).to(log_std.dtype)


def _squashed(
    outputs: Float[Tensor, "batch outputs"], noise: Float[Tensor, "batch action"]
) -> tuple[Float[Tensor, "batch action"], Float[Tensor, " batch"], Float[Tensor, "batch action"]]:
    """Actions tanh u, u = μ + σ ε; log π = Σ log N(u) - log(1 - tanh² u); and σ ε, the derivative of u by log σ."""
    mean, log_std = outputs.chunk(2, -1)
    log_std = log_std.clamp(*LOG_STD_RANGE)
    reach = log_std.exp() * noise
    before = mean + reach
    squash = 2 * (math.log(2) - before - softplus(-2 * before))
    log_prob = -(0.5 * noise * noise + log_std + squash).sum(-1) - HALF_LOG_TWO_PI * noise.shape[-1]
    return before.tanh(), log_prob, reach


class TD3(Learner):
    """Actor s -> a through tanh, with a target; it and the targets move at every `policy_delay`-th update."""

    name: ClassVar[str] = "td3"
    has_density: ClassVar[bool] = False

    def __init__(self, observation: int, action: int, config: TD3Config | None = None, seed: int = 0) -> None:
        self.config = config = config or TD3Config()
        super().__init__(observation, action, action, config, seed)
        self.actor_target = self.actor.copy()

    def parts(self) -> Mapping[str, StackedMLP | Adam]:
        """See `Learner`."""
        return {**super().parts(), "actor_target": self.actor_target}

    def noise(self, updates: int, generator: torch.Generator) -> Float[Tensor, "updates rows action"]:
        """Of the target actions."""
        return torch.randn((updates, self.config.batch_size, self.action), generator=generator)

    @torch.no_grad()
    def update(self, batch: Experience, noise: Float[Tensor, "rows action"]) -> Logs:
        """Critics towards y = r + γ min Q'(s', clip(π'(s') + clip(ε))).

        At every `policy_delay`-th update the actor by L = -mean Q1(s, π(s)), and the targets.
        """
        config, rows = self.config, len(batch.rewards)
        after = self.actor_target(batch.next_observations[None])[0].tanh_()
        after += (noise * config.policy_noise).clamp_(-config.noise_clip, config.noise_clip)
        ahead = self._values(self.critic_target, batch.next_observations, after.clamp_(-1, 1))[0].amin(0)
        logs = self._regress(batch, torch.addcmul(batch.rewards, batch.not_terminal, ahead, value=config.discount))
        self.updates += 1
        if self.updates % config.policy_delay == 0:
            outputs, actor_tape = self.actor.forward(batch.observations[None])
            action = outputs.tanh_()
            inputs = torch.cat([batch.observations[None], action], -1)
            values, tape = self.critic.forward(inputs, slice(1))
            ascent = torch.full_like(values, -1 / rows)
            slope = self.critic.backward(tape, ascent, weights=False, inputs=True)[..., self.observation :]
            self.actor.backward(actor_tape, slope * (1 - action * action))
            self.actor_optimizer.step()
            self.critic_target.follow(self.critic, config.target_rate)
            self.actor_target.follow(self.actor, config.target_rate)
        return logs

    @torch.no_grad()
    def explore(
        self, observations: Float[Tensor, "batch observation"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "batch action"], Float[Tensor, " batch"]]:
        """Clip(π(s) + noise); clipping leaves no density."""
        noise = torch.randn((len(observations), self.action), generator=generator)
        actions = (self.act(observations) + self.config.exploration_noise * noise).clamp_(-1, 1)
        return actions, torch.full((len(observations),), torch.nan)

    @torch.no_grad()
    def act(self, observations: Float[Tensor, "batch observation"]) -> Float[Tensor, "batch action"]:
        """See `Learner`."""
        return self.actor(observations[None])[0].tanh_()
