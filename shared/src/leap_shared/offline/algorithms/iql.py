"""IQL (Kostrikov et al. 2021) as OPER and CORL train it, with weights on every term and an own batch for the policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.offline.algorithms.base import Algorithm, Batch, Logs, Number, by_run, twice
from leap_shared.offline.networks import Adam, StackedMLP, Tape, orthogonal
from leap_shared.offline.returns import episode_returns
from leap_shared.offline.transitions import Transitions

__all__ = ["IQL", "IQLConfig", "antmaze_rewards", "locomotion_rewards"]

LARGEST_WEIGHT = 100.0
ACTION_LIMIT = 1 - 1e-5
LOG_STD_RANGE = {"oper": (-5.0, 2.0), "corl": (-20.0, 2.0)}
ADROIT = ("pen", "hammer", "door", "relocate")


@dataclass(frozen=True)
class IQLConfig:
    """Defaults for locomotion; a tuple gives each run its own value."""

    flavour: str = "oper"
    """CORL's policy weighs by the advantage before V's step, its critics' loss is half as large, log σ reaches -20."""
    expectile: Number = 0.7
    temperature: Number = 3.0
    """Inverse: β in exp(β A)."""
    discount: Number = 0.99
    target_rate: float = 0.005
    learning_rate: float = 3e-4
    schedule_steps: int | None = 1_000_000
    """Updates after which the policy's rate has fallen to 0 along a cosine; None: it stays."""
    dropout: float = 0.0
    """Behind the policy's hidden layers; CORL's Gaussian policy has none whatever is asked for."""
    deterministic: bool = False
    """The policy regresses on the actions instead of maximising their likelihood."""
    hidden: tuple[int, ...] = (256, 256)
    reweight_eval: bool = False
    """Weigh the losses of V and of the critics."""
    reweight_improve: bool = False
    reweight_constraint: bool = False
    """Equal to `reweight_improve`: IQL improves and constrains in one term."""

    def __post_init__(self) -> None:
        if self.flavour not in LOG_STD_RANGE:
            raise UserError(f"flavour is {self.flavour!r}: give oper or corl")
        if self.reweight_improve != self.reweight_constraint:
            raise UserError(
                f"reweight_improve is {self.reweight_improve} and reweight_constraint {self.reweight_constraint}: "
                "IQL improves and constrains in one term, so give both or neither"
            )
        expectiles = self.expectile if isinstance(self.expectile, tuple) else (self.expectile,)
        if not all(0 < expectile < 1 for expectile in expectiles):
            raise UserError(f"expectile is {self.expectile}: give numbers between 0 and 1, such as 0.7")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: give a number in [0, 1), such as 0.1")
        if self.schedule_steps is not None and self.schedule_steps < 1:
            raise UserError(f"schedule_steps is {self.schedule_steps}: give the number of updates of the run, or None")

    @classmethod
    def of_task(cls, task: str, flavour: str = "oper", **options: Any) -> IQLConfig:
        """The authors' values for a task of D4RL, by its name; `options` go before them."""
        domain = task.split("-", maxsplit=1)[0]
        found: dict[str, Any] = {}
        if domain == "antmaze":
            found = {"expectile": 0.9, "temperature": 10.0}
        elif flavour == "oper" and domain in ("kitchen", *ADROIT):
            found = {"temperature": 0.5, "dropout": 0.1}
        elif domain in ADROIT:
            found = {"expectile": 0.8, "dropout": 0.1}
        elif flavour == "corl" and task == "hopper-medium-expert-v2":
            found = {"expectile": 0.5, "temperature": 6.0}
        elif flavour == "corl" and task in ("hopper-medium-v2", "hopper-medium-replay-v2"):
            found = {"deterministic": True, "target_rate": 0.001}
        return cls(**{"flavour": flavour, **found, **options})


class _Values(NamedTuple):
    """What V and the target critics say in one update."""

    following: Float[Tensor, "runs batch"]
    """V(s') of the critic's batch."""
    advantages: Float[Tensor, "runs batch"]
    """min Q'(s, a) - V(s) of the policy's batch."""


class IQL(Algorithm):
    """V(s); twin critics (s, a) -> Q and their targets; a policy of mean tanh, whose log σ depends on no state.

    The policy's rate follows from `updates` in `prepare`, which so belongs before every update.
    """

    name: ClassVar[str] = "iql"

    def __init__(
        self,
        observation: int,
        action: int,
        seeds: Sequence[int],
        config: IQLConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(observation, action, seeds, device)
        self.config = config = config or IQLConfig()
        runs, hidden = len(self.seeds), config.hidden
        numbers = ("expectile", "temperature", "discount")
        self._numbers = {name: by_run(name, getattr(config, name), runs, self.device)[:, None] for name in numbers}
        self.value = StackedMLP((observation, *hidden, 1), [4 * seed for seed in seeds], device, orthogonal)
        self.actor = StackedMLP((observation, *hidden, action), [4 * seed + 1 for seed in seeds], device, orthogonal)
        heads = [4 * seed + head for seed in seeds for head in (2, 3)]
        self.critic = StackedMLP((observation + action, *hidden, 1), heads, device, orthogonal)
        self.critic_target = self.critic.copy()
        self.log_std = torch.zeros(runs, action, device=device)
        self.log_std_gradient = torch.zeros_like(self.log_std)
        self.value_optimizer = Adam.of(self.value, config.learning_rate)
        self.critic_optimizer = Adam.of(self.critic, config.learning_rate)
        self.actor_optimizer = Adam.of(self.actor)
        self.log_std_optimizer = Adam(self.log_std, self.log_std_gradient)
        self._actor_rate = torch.tensor(config.learning_rate, device=device)
        ignored = config.flavour == "corl" and not config.deterministic
        self._dropout = 0.0 if ignored else config.dropout

    def parts(self) -> Mapping[str, StackedMLP | Adam]:
        """See `Algorithm`."""
        names = ("value", "actor", "critic", "critic_target")
        optimizers = ("value_optimizer", "actor_optimizer", "critic_optimizer", "log_std_optimizer")
        return {name: getattr(self, name) for name in (*names, *optimizers)}

    @property
    def normalises_states(self) -> bool:
        """As CORL does; OPER does not."""
        return bool(self.config.flavour == "corl")

    def prepare(self) -> None:
        """Set the policy's rate."""
        steps = self.config.schedule_steps
        if steps is not None:
            part = min(self.updates / steps, 1.0)
            self._actor_rate.fill_(self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * part)))

    def noise(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Uniform numbers for each hidden layer that dropout acts behind."""
        widths = self.config.hidden if self._dropout else ()
        shapes = [(len(self.seeds), batch_size, width) for width in widths]
        return tuple(torch.rand(shape, generator=generator, device=self.device) for shape in shapes)

    @torch.no_grad()
    def update(self, batch: Batch, policy_batch: Batch | None, noise: Sequence[Tensor]) -> Logs:
        """See `Algorithm`; `adv` is the mean advantage of the policy's batch."""
        if self.config.flavour == "oper":
            batch = _within(batch)
            policy_batch = None if policy_batch is None else _within(policy_batch)
        logs, values = self._update_value(batch, policy_batch)
        logs |= self._update_actor(batch if policy_batch is None else policy_batch, values.advantages, noise)
        logs |= self._update_critic(batch, values.following)
        self.critic_target.follow(self.critic, self.config.target_rate)
        self.updates += 1
        return logs

    def _update_value(self, batch: Batch, policy_batch: Batch | None) -> tuple[Logs, _Values]:
        """L = mean w |τ - 1(d <= 0)| d², d = min Q'(s, a) - V(s).

        V(s') and the policy's advantages are those after the step (OPER) or before it (CORL).
        """
        config, rows, data = self.config, batch.rewards.shape[1], batch if policy_batch is None else policy_batch
        pair, count = [batch] if policy_batch is None else [batch, data], data.rewards.shape[1]
        states, actions = (
            torch.cat([part.observations for part in pair], 1),
            torch.cat([part.actions for part in pair], 1),
        )
        goals = self.target_values(states, actions)
        after = config.flavour == "oper"
        first = batch.observations if after else torch.cat([states, batch.next_observations], 1)
        outputs, tape = self.value.forward(first)
        values = outputs[:, :rows, 0]
        error = goals[:, :rows] - values
        share = torch.where(error > 0, self._numbers["expectile"], 1 - self._numbers["expectile"])
        weighted = share * error * batch.weights if config.reweight_eval else share * error
        logs = {"value_loss": (weighted * error).mean(-1), "v": values.mean(-1)}
        here = Tape(tape.units, [[layer[..., :rows, :] for layer in layers] for layers in tape.inputs], tape.scale)
        self.value.backward(here, (weighted * (-2 / rows))[..., None])
        self.value_optimizer.step()
        if after:
            outputs = self.value(torch.cat([data.observations, batch.next_observations], 1))
        following, current = outputs[:, -rows:, 0], outputs[:, -rows - count : -rows, 0]
        return logs, _Values(following, goals[:, -count:] - current)

    def _update_actor(self, batch: Batch, advantages: Tensor, noise: Sequence[Tensor]) -> Logs:
        """L = -mean min(exp(β A) w, 100) log π(a|s), or with `deterministic` mean min(exp(β A) w, 100) |π(s) - a|²."""
        config, rows = self.config, batch.rewards.shape[1]
        weights = (self._numbers["temperature"] * advantages).exp_()
        weights = (weights * batch.weights if config.reweight_improve else weights).clamp_(max=LARGEST_WEIGHT)
        kept = [uniform >= self._dropout for uniform in noise]
        outputs, tape = self.actor.forward(batch.observations, kept=kept, dropout=self._dropout)
        mean = outputs.tanh_()
        error, share = mean - batch.actions, (weights / rows)[..., None]
        if config.deterministic:
            loss = error.square().sum(-1)
            slope = 2 * share * error
        else:
            low, high = LOG_STD_RANGE[config.flavour]
            log_std = self.log_std.clamp(low, high)
            precision = (-2 * log_std).exp_()[:, None]
            scaled = error * precision
            squares = error * scaled
            loss = 0.5 * squares.sum(-1) + (log_std.sum(-1) + 0.5 * math.log(2 * math.pi) * self.action)[:, None]
            slope = share * scaled
            inside = (self.log_std >= low) & (self.log_std <= high)
            torch.mul((share * (1 - squares)).sum(1), inside, out=self.log_std_gradient)
            self.log_std_optimizer.step(self._actor_rate)
        self.actor.backward(tape, slope * (1 - mean * mean))
        self.actor_optimizer.step(self._actor_rate)
        return {"actor_loss": (weights * loss).mean(-1), "adv": advantages.mean(-1)}

    def _update_critic(self, batch: Batch, following: Float[Tensor, "runs batch"]) -> Logs:
        """L = mean w [(Q1 - y)² + (Q2 - y)²], y = r + γ V(s'); half of it in CORL."""
        config, runs, rows = self.config, len(self.seeds), batch.rewards.shape[1]
        goal = batch.rewards + self._numbers["discount"] * batch.not_terminal * following
        outputs, tape = self.critic.forward(twice(torch.cat([batch.observations, batch.actions], -1)))
        values = outputs.view(runs, 2, rows)
        error = values - goal[:, None]
        scale = 1.0 if config.flavour == "oper" else 0.5
        weighted = error * (batch.weights[:, None] * scale if config.reweight_eval else scale)
        self.critic.backward(tape, (weighted * (2 / rows)).view(2 * runs, rows, 1))
        self.critic_optimizer.step()
        q1, q2 = values.mean(-1).unbind(1)
        return {"critic_loss": (error * weighted).mean(-1).sum(1), "q1": q1, "q2": q2}

    def values(self, observations: Float[Tensor, "runs batch observation"]) -> Float[Tensor, "runs batch"]:
        """V(s)."""
        return self.value(observations)[..., 0]

    def target_values(
        self, observations: Float[Tensor, "runs batch observation"], actions: Float[Tensor, "runs batch action"]
    ) -> Float[Tensor, "runs batch"]:
        """Min Q'(s, a) of the two target critics."""
        outputs = self.critic_target(twice(torch.cat([observations, actions], -1)))
        return outputs.view(len(self.seeds), 2, -1).amin(1)

    @torch.no_grad()
    def act(
        self, observations: Float[Tensor, "runs batch observation"], chosen: slice = slice(None)
    ) -> Float[Tensor, "runs batch action"]:
        """Means, which lie in [-1, 1]."""
        return self.actor(observations, chosen).tanh_()

    def export(self, run: int) -> dict[str, dict[str, Tensor]]:
        """{actor: {l1.weight, ..., mean.bias, log_std}, critic: {0.l1.weight, ...}, target_critic, value}."""
        layers = [f"l{number}" for number in range(1, len(self.config.hidden) + 2)]
        actor = self.actor.export(run, [*layers[:-1], "mean"]) | {"log_std": self.log_std[run]}
        states = {"actor": actor, "value": self.value.export(run, layers)}
        for name, critic in (("critic", self.critic), ("target_critic", self.critic_target)):
            heads = [critic.export(2 * run + head, [f"{head}.{layer}" for layer in layers]) for head in (0, 1)]
            states[name] = heads[0] | heads[1]
        return states

    def load(self, run: int, states: Mapping[str, Mapping[str, ArrayLike | Tensor]]) -> None:
        """See `Algorithm`."""
        for name, own in self.export(run).items():
            for key, value in own.items():
                value.copy_(torch.as_tensor(states[name][key]))

    def state_dict(self) -> dict[str, Any]:
        """See `Algorithm`."""
        return super().state_dict() | {"log_std": self.log_std}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Algorithm`."""
        super().load_state_dict(state)
        self.log_std.copy_(state["log_std"])


def _within(batch: Batch) -> Batch:
    return batch._replace(actions=batch.actions.clamp(-ACTION_LIMIT, ACTION_LIMIT))


def locomotion_rewards(dataset: Transitions) -> Float32[np.ndarray, " rows"]:
    """1000 r / (largest - smallest return of an episode).

    Raises:
        UserError: all returns are equal.
    """
    returns = episode_returns(dataset.rewards, dataset.ends)
    span = float(returns.max()) - float(returns.min())
    if not span > 0:
        raise UserError(f"all episodes return {returns.max():g}, so that their range scales nothing: keep the rewards")
    scaled: NDArray[np.float32] = (dataset.rewards * (1000 / span)).astype(np.float32)
    return scaled


def antmaze_rewards(dataset: Transitions) -> Float32[np.ndarray, " rows"]:
    """Rewards r - 1."""
    shifted: NDArray[np.float32] = dataset.rewards - np.float32(1)
    return shifted
