"""CQL (Kumar et al. 2020) as CORL trains it, with weights on every term and an own batch for those tied to the data."""

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
from torch.nn.functional import softplus

from leap_shared.errors import UserError
from leap_shared.offline.algorithms.base import Algorithm, Batch, Logs, Number, by_run, twice
from leap_shared.offline.networks import Adam, Layer, StackedMLP, Tape, torch_default
from leap_shared.offline.transitions import Transitions

__all__ = ["CQL", "CQLConfig", "cql_antmaze_rewards"]

LOG_STD_RANGE = (-20.0, 2.0)
LAST_GAIN = 1e-2
BLOCK_ROWS = 1024
LARGEST_MULTIPLIER = 1e6
ADROIT = ("pen", "hammer", "door", "relocate")


@dataclass(frozen=True)
class CQLConfig:
    """Defaults for locomotion; a tuple gives each run its own value."""

    alpha: Number = 10.0
    """Weight of the conservative gap."""
    temperature: Number = 1.0
    """Of the logsumexp."""
    samples: int = 10
    """Actions drawn uniformly, and from the policy at s and at s', for the logsumexp."""
    target_gap: Number | None = None
    """What the Lagrange multiplier holds the gap to; None: there is no multiplier."""
    gap_min: Number | None = None
    gap_max: Number | None = None
    """What logsumexp - Q(s, a) is clipped to; None: no bound."""
    max_target_backup: bool = False
    """The target is the largest of `samples` next actions."""
    discount: Number = 0.99
    target_rate: float = 0.005
    policy_learning_rate: float = 3e-5
    """Also of the entropy's temperature."""
    critic_learning_rate: float = 3e-4
    """Also of the Lagrange multiplier."""
    target_entropy: float | None = None
    """Nats; None is minus the number of actions."""
    hidden: tuple[int, ...] = (256, 256, 256)
    critic_hidden: tuple[int, ...] = (256, 256, 256)
    orthogonal_init: bool = True
    """Of the critics."""
    reweight_eval: bool = False
    reweight_improve: bool = False
    reweight_constraint: bool = False
    """Weigh the conservative gap."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples is {self.samples}: give at least 1")
        for name in ("policy_learning_rate", "critic_learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: give a positive number")
        temperatures = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        if not min(temperatures) > 0:
            raise UserError(f"temperature is {self.temperature}: give positive numbers")

    @classmethod
    def of_task(cls, task: str, **options: Any) -> CQLConfig:
        """CORL's values for a task of D4RL, by its name; `options` go before them."""
        domain = task.split("-", maxsplit=1)[0]
        found: dict[str, Any] = {}
        if domain == "antmaze":
            found = {"alpha": 5.0, "target_gap": 0.8, "gap_min": -200.0, "max_target_backup": True}
            found |= {"policy_learning_rate": 1e-4, "critic_hidden": (256,) * 5}
        elif domain == "maze2d":
            found = {"target_gap": 5.0}
        elif domain in ADROIT:
            found = {"alpha": 1.0, "policy_learning_rate": 1e-4}
        return cls(**{**found, **options})


class _Sample(NamedTuple):
    """a = tanh u, u = μ + σ ε."""

    actions: Tensor
    log_probs: Tensor
    reach: Tensor
    """σ ε, the derivative of u by log σ."""


class CQL(Algorithm):
    """A tanh-Gaussian policy with scaled and shifted log σ; twin critics (s, a) -> Q and their targets.

    Decoupled, the critic's batch gives the squared error and its target; the gap, the policy's loss and the entropy's
    see the policy's batch. All losses are those before any step.
    """

    name: ClassVar[str] = "cql"

    def __init__(
        self,
        observation: int,
        action: int,
        seeds: Sequence[int],
        config: CQLConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(observation, action, seeds, device)
        self.config = config = config or CQLConfig()
        runs = len(self.seeds)
        values = {name: getattr(config, name) for name in ("alpha", "temperature", "discount")}
        bounds = (("target_gap", 0.0), ("gap_min", -math.inf), ("gap_max", math.inf))
        values |= {name: open_ if getattr(config, name) is None else getattr(config, name) for name, open_ in bounds}
        self._numbers = {name: by_run(name, value, runs, self.device) for name, value in values.items()}
        self.target_entropy = -float(action) if config.target_entropy is None else config.target_entropy
        policy, critic = (observation, *config.hidden, 2 * action), (observation + action, *config.critic_hidden, 1)
        self.actor = StackedMLP(policy, [3 * seed for seed in seeds], device, _small_last)
        heads = [3 * seed + head for seed in seeds for head in (1, 2)]
        self.critic = StackedMLP(critic, heads, device, _orthogonal if config.orthogonal_init else _small_last)
        self.critic_target = self.critic.copy()
        self.actor_optimizer = Adam.of(self.actor, config.policy_learning_rate)
        self.critic_optimizer = Adam.of(self.critic, config.critic_learning_rate)
        self._critic_gradient = torch.zeros_like(self.critic.gradient)
        start = torch.tensor([[0.0], [1.0], [-1.0]], device=device)
        self.scalars = start.repeat(1, runs)
        self.scalar_gradient = torch.zeros_like(self.scalars)
        self.log_multiplier = torch.ones(runs, device=device)
        self.multiplier_gradient = torch.zeros_like(self.log_multiplier)
        self.scalar_optimizer = Adam(self.scalars, self.scalar_gradient, config.policy_learning_rate)
        self.multiplier_optimizer = Adam(self.log_multiplier, self.multiplier_gradient, config.critic_learning_rate)

    @property
    def normalises_states(self) -> bool:
        """They do."""
        return True

    def parts(self) -> Mapping[str, StackedMLP | Adam]:
        """See `Algorithm`."""
        names = ("actor", "critic", "critic_target")
        optimizers = ("actor_optimizer", "critic_optimizer", "scalar_optimizer", "multiplier_optimizer")
        return {name: getattr(self, name) for name in (*names, *optimizers)}

    def noise(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Normal numbers of the policy's action, its samples at s and s' and the target's actions; uniform actions.

        All are (runs, batch, count, action).
        """
        samples = self.config.samples
        counts = (1, samples, samples, samples if self.config.max_target_backup else 1)
        shapes = [(len(self.seeds), batch_size, count, self.action) for count in (*counts, samples)]
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        uniform = torch.rand(shapes[-1], **options).mul_(2).sub_(1)
        return (*(torch.randn(shape, **options) for shape in shapes[:-1]), uniform)

    @torch.no_grad()
    def update(self, batch: Batch, policy_batch: Batch | None, noise: Sequence[Tensor]) -> Logs:
        """See `Algorithm`."""
        data = batch if policy_batch is None else policy_batch
        rows, count = batch.rewards.shape[1], data.rewards.shape[1]
        states = [data.observations, data.next_observations]
        states += [] if policy_batch is None else [batch.next_observations]
        outputs, tape = self.actor.forward(torch.cat(states, 1))
        here, following, ahead = outputs[:, :count], outputs[:, count : 2 * count], outputs[:, -rows:]
        goal = self._goal(batch, self._squashed(ahead, noise[3]).actions)
        samples = self._squashed(following, noise[2]), self._squashed(here, noise[1])
        self._critic_gradient.zero_()
        logs = self._conserve(data, noise[4], samples, goal if policy_batch is None else None)
        if policy_batch is not None:
            logs |= self._regress(batch, goal)
        logs |= self._improve(data, self._squashed(here, noise[0]), here, tape)
        self.critic.gradient.copy_(self._critic_gradient)
        self.scalar_optimizer.step()
        self.actor_optimizer.step()
        self.critic_optimizer.step()
        if self.config.target_gap is not None:
            self.multiplier_optimizer.step()
        self.critic_target.follow(self.critic, self.config.target_rate)
        self.updates += 1
        return logs

    def _squashed(self, outputs: Float[Tensor, "runs batch outputs"], noise: Tensor) -> _Sample:
        """Actions (runs, batch, count, action); log π = Σ log N(u) - log(1 - a²)."""
        mean, raw = outputs[:, :, None].chunk(2, -1)
        log_std = self._log_std(raw).clamp_(*LOG_STD_RANGE)
        reach = log_std.exp() * noise
        before = mean + reach
        squash = 2 * (math.log(2) - before - softplus(-2 * before))
        log_probs = -(0.5 * noise * noise + log_std + squash).sum(-1) - 0.5 * math.log(2 * math.pi) * self.action
        return _Sample(before.tanh(), log_probs, reach)

    def _log_std(self, raw: Tensor) -> Tensor:
        scale, shift = self.scalars[1:, :, None, None, None].unbind()
        return torch.addcmul(shift, raw, scale)

    def _goal(self, batch: Batch, actions: Float[Tensor, "runs batch count action"]) -> Float[Tensor, "runs batch"]:
        """Goals y = r + γ max over a' of min Q'(s', a')."""
        values = self.critic_target(_inputs(batch.next_observations, actions))
        ahead = values.view(len(self.seeds), 2, *actions.shape[1:3]).amin(1).amax(-1)
        return batch.rewards + self._numbers["discount"][:, None] * batch.not_terminal * ahead

    def _regress(self, batch: Batch, goal: Float[Tensor, "runs batch"]) -> Logs:
        """Add the gradient of the squared error to that of the critics."""
        outputs, tape = self.critic.forward(_inputs(batch.observations, batch.actions[:, :, None]))
        values = outputs.view(len(self.seeds), 2, -1)
        slope, losses = self._squared(values, goal, batch.weights)
        self.critic.backward(tape, slope.div_(values.shape[-1]).view(outputs.shape))
        self._critic_gradient.add_(self.critic.gradient)
        return self._means(values, losses)

    def _squared(self, values: Tensor, goal: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Squares w (Q - y)² of both critics, and the derivative of its sum."""
        error = values - goal[:, None]
        weighted = error * weights[:, None] if self.config.reweight_eval else error
        return weighted * 2, error * weighted

    @staticmethod
    def _means(values: Tensor, losses: Tensor) -> Logs:
        q1, q2 = values.mean(-1).unbind(1)
        return {"Q1": q1, "Q2": q2, "td_loss": losses.mean(-1).sum(1)}

    def _conserve(
        self, data: Batch, uniform: Tensor, samples: Sequence[_Sample], goal: Float[Tensor, "runs batch"] | None
    ) -> Logs:
        """L = α (α') mean w clip(T logsumexp((Q(s, a') - log p(a')) / T) - Q(s, a)), once for each critic.

        The multiplier α' = clip(exp(log α'), 0, 1e6) descends -½ α α' Σ (gap - target gap). With a `goal`, the squared
        error of the same Q(s, a) is part of L. On a CPU the states come in blocks whose layers fit into its cache.
        """
        runs, rows, numbers = len(self.seeds), data.rewards.shape[1], self._numbers
        actions = torch.cat([uniform, *(sample.actions for sample in samples), data.actions[:, :, None]], 2)
        log_density = torch.full_like(uniform[..., 0], -self.action * math.log(2))
        densities = torch.cat([log_density, *(sample.log_probs for sample in samples)], 2)[:, None]
        inputs = _inputs(data.observations, actions)
        each = actions.shape[2]
        block = max(1, BLOCK_ROWS // each) if self.device.type == "cpu" else rows
        multiplier = self.log_multiplier.exp().clamp_(0, LARGEST_MULTIPLIER)
        lagrange = self.config.target_gap is not None
        scale = (numbers["alpha"] * multiplier if lagrange else numbers["alpha"])[:, None, None]
        low, high, temperature = (numbers[name][:, None, None] for name in ("gap_min", "gap_max", "temperature"))
        weights = data.weights[:, None] if self.config.reweight_constraint else torch.ones_like(densities[..., 0])
        recorded = torch.empty(3, runs, 2, rows, device=self.device)
        values, gaps, losses = recorded
        for start in range(0, rows, block):
            chosen = slice(start, start + block)
            outputs, tape = self.critic.forward(inputs[:, start * each : (start + block) * each])
            found = outputs.view(runs, 2, -1, each)
            scores = (found[..., :-1] - densities[:, :, chosen]).div_(temperature[..., None])
            total = scores.logsumexp(-1)
            gap = temperature * total - found[..., -1]
            clipped = gap.clamp(low, high)
            share = scale * weights[:, :, chosen] * (gap == clipped)
            slope = torch.cat([(scores - total[..., None]).exp_().mul_(share[..., None]), -share[..., None]], -1)
            values[:, :, chosen], gaps[:, :, chosen] = found[..., -1], clipped
            if goal is not None:
                part, losses[:, :, chosen] = self._squared(found[..., -1], goal[:, chosen], data.weights[:, chosen])
                slope[..., -1] += part
            self.critic.backward(tape, slope.div_(rows).view(outputs.shape))
            self._critic_gradient.add_(self.critic.gradient)
        means = (gaps * weights).mean(-1)
        logs = {"gap": means.mean(1)}
        if lagrange:
            excess = (means - numbers["target_gap"][:, None]).sum(1)
            inside = self.log_multiplier <= math.log(LARGEST_MULTIPLIER)
            torch.mul(multiplier * numbers["alpha"] * excess, -0.5 * inside, out=self.multiplier_gradient)
            logs["multiplier"] = multiplier
        return logs if goal is None else logs | self._means(values, losses)

    def _improve(self, data: Batch, policy: _Sample, outputs: Tensor, actor_tape: Tape) -> Logs:
        """L = mean w (α log π(a|s) - min Q(s, a)); and of the entropy, -log α mean (log π + target entropy)."""
        runs, rows = len(self.seeds), data.rewards.shape[1]
        values, tape = self.critic.forward(_inputs(data.observations, policy.actions))
        values = values.view(runs, 2, rows)
        weights = (data.weights if self.config.reweight_improve else torch.ones_like(data.weights)) / rows
        first = (values[:, :1] <= values[:, 1:]).to(values.dtype)
        ascent = torch.cat([first, 1 - first], 1) * -weights[:, None]
        slopes = self.critic.backward(tape, ascent.view(2 * runs, rows, 1), weights=False, inputs=True)
        slope = slopes.view(runs, 2, rows, -1)[..., self.observation :].sum(1)
        action, log_prob, reach = (part[:, :, 0] for part in policy)
        temperature = self.scalars[0].exp()
        share = (temperature[:, None] * weights)[..., None]
        inner = slope * (1 - action * action) + 2 * share * action
        raw = outputs[..., self.action :]
        log_std = self._log_std(raw[:, :, None])[:, :, 0]
        outer = (inner * reach - share) * ((log_std >= LOG_STD_RANGE[0]) & (log_std <= LOG_STD_RANGE[1]))
        here = Tape(
            actor_tape.units, [[x[..., :rows, :] for x in layers] for layers in actor_tape.inputs], actor_tape.scale
        )
        self.actor.backward(here, torch.cat([inner, outer * self.scalars[1, :, None, None]], -1))
        entropy = -log_prob.mean(-1)
        slopes_of_scalars = entropy - self.target_entropy, (outer * raw).sum((1, 2)), outer.sum((1, 2))
        torch.stack(slopes_of_scalars, out=self.scalar_gradient)
        loss = (weights * (temperature[:, None] * log_prob - values.amin(1))).sum(-1)
        return {"actor_loss": loss, "entropy": entropy, "entropy_temperature": temperature}

    @torch.no_grad()
    def act(
        self, observations: Float[Tensor, "runs batch observation"], chosen: slice = slice(None)
    ) -> Float[Tensor, "runs batch action"]:
        """Tanh μ."""
        return self.actor(observations, chosen)[..., : self.action].tanh()

    def export(self, run: int) -> dict[str, dict[str, Tensor]]:
        """{actor: {l1.weight, ..., log_std_multiplier, log_std_offset}, critic: {0.l1.weight, ...}, scalars, ...}.

        `scalars` are log_alpha, of the entropy's temperature, and log_alpha_prime, of the multiplier.
        """
        names = [f"l{number}" for number in range(1, len(self.config.hidden) + 2)]
        layers = [f"l{number}" for number in range(1, len(self.config.critic_hidden) + 2)]
        scalars = {"log_std_multiplier": self.scalars[1, run], "log_std_offset": self.scalars[2, run]}
        states = {"actor": self.actor.export(run, names) | scalars}
        for name, critic in (("critic", self.critic), ("target_critic", self.critic_target)):
            heads = [critic.export(2 * run + head, [f"{head}.{layer}" for layer in layers]) for head in (0, 1)]
            states[name] = heads[0] | heads[1]
        logarithms = {"log_alpha": self.scalars[0, run], "log_alpha_prime": self.log_multiplier[run]}
        return states | {"scalars": logarithms}

    def load(self, run: int, states: Mapping[str, Mapping[str, ArrayLike | Tensor]]) -> None:
        """See `Algorithm`."""
        for name, own in self.export(run).items():
            for key, value in own.items():
                value.copy_(torch.as_tensor(states[name][key]))

    def state_dict(self) -> dict[str, Any]:
        """See `Algorithm`."""
        return super().state_dict() | {"scalars": self.scalars, "log_multiplier": self.log_multiplier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Algorithm`."""
        super().load_state_dict(state)
        self.scalars.copy_(state["scalars"])
        self.log_multiplier.copy_(state["log_multiplier"])


def _small_last(generator: torch.Generator, fan_in: int, fan_out: int, last: bool) -> Layer:
    """PyTorch's default, but Xavier-uniform of gain 1e-2 without bias in the last layer."""
    if not last:
        return torch_default(generator, fan_in, fan_out, last)
    weight = torch.empty(fan_in, fan_out)
    torch.nn.init.xavier_uniform_(weight, LAST_GAIN, generator=generator)
    return weight, torch.zeros(fan_out)


def _orthogonal(generator: torch.Generator, fan_in: int, fan_out: int, last: bool) -> Layer:
    """Orthogonal weights of gain sqrt(2), in the last layer 1e-2; zero biases."""
    weight = torch.empty(fan_in, fan_out)
    torch.nn.init.orthogonal_(weight, LAST_GAIN if last else math.sqrt(2), generator=generator)
    return weight, torch.zeros(fan_out)


def _inputs(
    states: Float[Tensor, "runs batch observation"], actions: Float[Tensor, "runs batch count action"]
) -> Float[Tensor, "networks rows pair"]:
    """(s, a) of every action for both critics, state after state."""
    return twice(torch.cat([states[:, :, None].expand(-1, -1, actions.shape[2], -1), actions], -1).flatten(1, 2))


def cql_antmaze_rewards(dataset: Transitions) -> Float32[np.ndarray, " rows"]:
    """10 r - 5."""
    scaled: NDArray[np.float32] = dataset.rewards * np.float32(10) - np.float32(5)
    return scaled
