"""State values of many seeds as one program: fitted to n-step or Monte Carlo returns, and the advantages they give."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.offline import Transitions, discounted_return_to_go, n_step, state_normalisation
from leap_shared.offline.networks import Adam, StackedMLP
from leap_shared.offline.rows import RowTable

__all__ = ["Advantages", "Regression", "ValueConfig", "ValueFit", "choose"]

CHOICES = {
    "critic_type": ("doublev", "v", "vq"),
    "td_type": ("nstep", "mc"),
    "adv_type": ("nstep", "gae", "mc"),
    "schedule": ("cosine", "linear", "none"),
}
LAYERS = (("l1", "l2", "l3"), ("l4", "l5", "l6"))
EVALUATION_ROWS = {"cpu": 2048, "cuda": 16384}  # on a CPU the activations of a block stay in its cache


@dataclass(frozen=True)
class ValueConfig:
    """How values are fitted and advantages taken; the defaults are the paper's recipe for MuJoCo.

    Attributes:
        critic_type: doublev: the smaller of two state values; v: one; vq: one, fitted to the smaller of two Q.
        td_type: what values are fitted to: nstep, a return over `n_step` rows and the value after them; or mc, the
            return to go.
        adv_type: nstep and mc as `td_type`, or gae.
        n_step: rows of a return. One step bootstraps through time limits; for more, every end of an episode stops it.
        discount: per row.
        gae_lambda: of gae, which is cut at every end of an episode.
        antmaze: lower every reward by 1.
        compat: as the authors' program, lower the rewards only after returns of several rows have been summed.
        normalise: bring states to mean 0 and deviation 1 (+ 1e-3).
        hidden: widths of the hidden layers.
        learning_rate: of an iteration's first update.
        target_rate: share of the way that targets move in an update.
    """

    critic_type: str = "doublev"
    td_type: str = "nstep"
    adv_type: str = "nstep"
    n_step: int = 1
    discount: float = 0.99
    gae_lambda: float = 0.95
    antmaze: bool = False
    compat: bool = False
    normalise: bool = True
    hidden: tuple[int, int] = (256, 256)
    learning_rate: float = 3e-4
    target_rate: float = 0.005

    def __post_init__(self) -> None:
        for name in ("critic_type", "td_type", "adv_type"):
            choose(name, getattr(self, name))
        if self.n_step < 1:
            raise UserError(f"n_step is {self.n_step}: give 1 or more rows")
        for name in ("discount", "gae_lambda", "target_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a number from 0 to 1")

    def rows(self, kind: str) -> int:
        """Rows of a return of that `td_type` or `adv_type`; 0 where it reaches to the episode's end."""
        return {"nstep": self.n_step, "gae": 1, "mc": 0}[kind]


def choose(name: str, given: str) -> None:
    """Raise UserError unless `given` is one of the choices of `name`."""
    known = CHOICES[name]
    if given not in known:
        raise UserError(f"{name} {given!r} is unknown: use {', '.join(known[:-1])} or {known[-1]}")


class Advantages(NamedTuple):
    """State values by the online networks, what they are compared with, and the difference."""

    v: Float64[np.ndarray, "seeds rows"]
    q: Float64[np.ndarray, "seeds rows"]
    adv: Float64[np.ndarray, "seeds rows"]


class Regression:
    """Networks of one output, `heads` for each run, fitted to targets by mean squared error; slow copies; an own Adam.

    Args:
        width: of the inputs.
        seeds: of the initial weights, one per run.
        heads: 1 or 2.
        first: offset that tells these networks' initial weights from others of the same seeds.
        config: hidden widths and rates.
        device: where to compute.
    """

    def __init__(
        self, width: int, seeds: Sequence[int], heads: int, first: int, config: ValueConfig, device: torch.device
    ) -> None:
        self.heads, self._rate = heads, config.target_rate
        numbers = [4 * seed + first + head for seed in seeds for head in range(heads)]
        self.online = StackedMLP((width, *config.hidden, 1), numbers, device)
        self.target = self.online.copy()
        self.optimizer = Adam.of(self.online, config.learning_rate)

    def _for_heads(self, inputs: Tensor) -> Tensor:
        return inputs[:, None].expand(-1, self.heads, -1, -1).flatten(0, 1)

    def least(
        self, network: StackedMLP, inputs: Float[Tensor, "runs batch width"], first_run: int = 0
    ) -> Float[Tensor, "runs batch"]:
        """The smallest output of each run's heads, for the runs from `first_run` on."""
        chosen = slice(first_run * self.heads, (first_run + len(inputs)) * self.heads)
        return network(self._for_heads(inputs), chosen).view(len(inputs), self.heads, -1).amin(1)

    def fit(
        self,
        inputs: Float[Tensor, "runs batch width"],
        goal: Float[Tensor, "runs batch"],
        rate: float | Tensor | None = None,
    ) -> tuple[Float[Tensor, " runs"], Float[Tensor, "runs heads"]]:
        """One step of Adam on L = Σ_heads mean (f(x) - y)²; returns L and the mean outputs before it."""
        values, tape = self.online.forward(self._for_heads(inputs))
        values = values.view(len(inputs), self.heads, -1)
        error = values - goal[:, None]
        self.online.backward(tape, (error * (2 / goal.shape[1])).view(len(self.online), -1, 1))
        self.optimizer.step(rate)
        return error.square().mean(-1).sum(1), values.mean(-1)

    def follow(self) -> None:
        """Move the slow copies."""
        self.target.follow(self.online, self._rate)

    def export(self, run: int, name: str) -> dict[str, dict[str, Tensor]]:
        """{name: {l1.weight, ...}, name_target: ...} of one run: views."""
        states = {}
        for key, network in ((name, self.online), (f"{name}_target", self.target)):
            parts = [network.export(run * self.heads + head, LAYERS[head]) for head in range(self.heads)]
            states[key] = {leaf: value for part in parts for leaf, value in part.items()}
        return states

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on."""
        return {name: getattr(self, name).state_dict() for name in ("online", "target", "optimizer")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state in place."""
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


class ValueFit:
    """Value networks s -> 256 -> 256 -> 1 of every seed with slowly moving targets, in one batched program.

    They are fitted to y = R + g min V'(s_n), where V' are the target networks. `n_step` = 1: R is the reward and g the
    discount, or 0 at terminals (time limits are bootstrapped through). For more, R is the n-step return, and every end
    of an episode gives g = 0. Monte Carlo: R is the discounted return to go and g = 0. With `vq`, twin Q(s, a) are
    fitted to y and V to min Q'(s, a).

    Args:
        datasets: one per seed, of equal length; the same object for seeds that share it.
        seeds: of the initial weights.
        config: see :class:`ValueConfig`.
        device: where to compute.

    Raises:
        UserError: numbers of data sets and seeds differ, or lengths or widths of the data sets.
    """

    def __init__(
        self,
        datasets: Sequence[Transitions],
        seeds: Sequence[int],
        config: ValueConfig | None = None,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        shapes = {(len(data), data.observations.shape[1], data.actions.shape[1]) for data in datasets}
        if len(shapes) != 1 or len(datasets) != len(seeds):
            raise UserError(
                f"{len(seeds)} seeds and {len(datasets)} data sets of (rows, observation, action) {sorted(shapes)}: "
                "expected one data set per seed, all of one shape"
            )
        ((self.num_rows, observation, action),) = shapes
        self.config = config = config or ValueConfig()
        self.device, self.seeds, self.datasets = torch.device(device), list(seeds), list(datasets)
        fitted, compared = config.rows(config.td_type), config.rows(config.adv_type)
        self._widths = [observation, observation if fitted else 0, 1, 1]
        has_critic = config.critic_type == "vq"
        self._table = RowTable(datasets, lambda data: _columns(data, fitted, config, actions=has_critic), self.device)
        self._compared = self._table
        if fitted != compared:
            self._compared = RowTable(datasets, lambda data: _columns(data, compared, config), self.device)
        heads = 2 if config.critic_type == "doublev" else 1
        self.value = Regression(observation, seeds, heads, 0, config, self.device)
        self.critic = Regression(observation + action, seeds, 2, 2, config, self.device) if has_critic else None

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values that the fit depends on."""
        prints = [data.fingerprint for data in self.datasets]
        return {"data": prints, "seeds": self.seeds, **dataclasses.asdict(self.config)}

    def restart(self) -> None:
        """Start Adam afresh, as every iteration does; the networks stay."""
        for part in (self.value, self.critic):
            if part is not None:
                part.optimizer.reset()

    @torch.no_grad()
    def update(
        self, indices: Int64[Tensor, "seeds batch"], rate: float | Tensor | None = None
    ) -> dict[str, Float[Tensor, " seeds"]]:
        """One update on the given rows.

        Returns:
            For each seed, before the update: value_loss, the mean outputs v1 and v2 (one network: v), and for vq
            critic_loss and q, the mean of what V is fitted to.
        """
        gathered = self._table.gather(indices)
        states, after, returns, gain = torch.split(gathered[..., : sum(self._widths)], self._widths, dim=-1)
        goal = returns[..., 0]
        if self._widths[1]:
            goal = torch.addcmul(goal, gain[..., 0], self.value.least(self.value.target, after))
        logs = {}
        if self.critic is not None:
            pairs = torch.cat([states, gathered[..., sum(self._widths) :]], -1)
            logs["critic_loss"], _ = self.critic.fit(pairs, goal, rate)
            goal = self.critic.least(self.critic.target, pairs)
            logs["q"] = goal.mean(-1)
        logs["value_loss"], means = self.value.fit(states, goal, rate)
        logs |= dict(zip(("v1", "v2") if self.value.heads == 2 else ("v",), means.unbind(1), strict=True))
        for part in (self.value, self.critic):
            if part is not None:
                part.follow()
        return logs

    @torch.no_grad()
    def advantages(self) -> Advantages:
        """Of all rows: A = q - V, with q = R + g V(s_n), the return to go, or A + V for gae.

        gae: A_t = δ_t + discount · gae_lambda · (1 - end_t) A_{t+1}, δ the advantage of one step. In float64 where
        differences are taken.
        """
        v, q = np.empty((2, len(self.seeds), self.num_rows))
        width, reach = self._widths[0], self.config.rows(self.config.adv_type)
        size = EVALUATION_ROWS.get(self.device.type, EVALUATION_ROWS["cpu"])
        for run, data in enumerate(self.datasets):
            for start in range(0, self.num_rows, size):
                rows = slice(start, min(start + size, self.num_rows))
                block = self._compared.block(run, rows.start, rows.stop)
                v[run, rows] = self._values(block[:, :width], run)
                end = width + (width if reach else 0)
                returns, gain = block[:, end : end + 2].cpu().double().numpy().T
                q[run, rows] = returns + (gain * self._values(block[:, width:end], run) if reach else 0.0)
            if self.config.adv_type == "gae":
                decay = self.config.discount * self.config.gae_lambda
                q[run] = discounted_return_to_go(q[run] - v[run], data.ends, decay) + v[run]
        return Advantages(v, q, q - v)

    def _values(self, states: Float[Tensor, "rows observation"], run: int) -> NDArray[np.float64]:
        values: NDArray[np.float64] = self.value.least(self.value.online, states[None], run)[0].cpu().double().numpy()
        return values

    def export(self, run: int) -> dict[str, dict[str, Tensor]]:
        """{value: {l1.weight, ...}, value_target: ...} of one run, for vq also critic and critic_target."""
        return self.value.export(run, "value") | ({} if self.critic is None else self.critic.export(run, "critic"))

    def load(self, run: int, states: Mapping[str, Mapping[str, ArrayLike | Tensor]]) -> None:
        """Take over what `export` gives."""
        for name, own in self.export(run).items():
            for key, value in own.items():
                value.copy_(torch.as_tensor(states[name][key]))

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on."""
        parts = {"value": self.value, "critic": self.critic}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


def _columns(
    data: Transitions, rows: int, config: ValueConfig, *, actions: bool = False
) -> Float32[Tensor, "rows width"]:
    """One matrix [s, s_n, R, g] (without s_n if `rows` is 0, and with a at the end on demand): one gather a batch."""
    rewards = data.rewards - np.float32(config.antmaze)
    summed = data.rewards if config.compat else rewards
    after: list[NDArray[np.float32]] = []
    if rows == 0:
        returns, gain = discounted_return_to_go(summed, data.ends, config.discount), np.zeros(len(data))
    elif rows == 1:
        returns, gain, after = rewards, config.discount * ~data.terminals, [data.next_observations]
    else:
        longest = int(np.diff(np.flatnonzero(data.ends), prepend=-1).max())
        if rows > longest:
            warnings.warn(f"n_step={rows} is more than the longest episode, {longest} rows", stacklevel=4)
        returns, done, states = n_step(summed, data.next_observations, data.ends, config.discount, rows)
        gain, after = config.discount**rows * ~done, [states]
    mean, std = state_normalisation(data.observations) if config.normalise else (0.0, 1.0)
    width = data.observations.shape[1]
    end = width * (1 + len(after))
    matrix = np.empty((len(data), end + 2 + (data.actions.shape[1] if actions else 0)), np.float32)
    for index, states in enumerate((data.observations, *after)):
        part = matrix[:, index * width : (index + 1) * width]
        np.subtract(states, mean, out=part)
        part /= std
    matrix[:, end], matrix[:, end + 1] = returns, gain
    if actions:
        matrix[:, end + 2 :] = data.actions
    return torch.from_numpy(matrix)
