"""IQL's update against plain autograd of its losses, and its runs against each other."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.offline import Transitions
from leap_shared.offline.algorithms.base import Batch
from leap_shared.offline.algorithms.iql import IQL, IQLConfig, antmaze_rewards, locomotion_rewards

OBSERVATION, ACTION, ROWS = 4, 2, 12
SMALL, LARGE = (16, 8), (256, 256)


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch_of(seed: int, runs: int, rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(runs, rows, *shape, generator=generator)

    states, after, actions = normal(OBSERVATION), normal(OBSERVATION), normal(ACTION).clamp(-1, 1)
    return Batch(states, actions, normal(), after, (normal() > -1).to(states.dtype), normal().exp())


def part(batch: Batch | None, run: int) -> Batch | None:
    return None if batch is None else Batch(*(None if x is None else x[run : run + 1] for x in batch))


class Plain:
    """One run of IQL with autograd and `torch.optim.Adam`, written from the equations."""

    def __init__(self, states: dict[str, dict[str, Tensor]], config: IQLConfig) -> None:
        self.config = config
        self.nets = {net: {k: x.clone().requires_grad_() for k, x in state.items()} for net, state in states.items()}
        self.optimizers = {net: torch.optim.Adam(self.nets[net].values(), 3e-4) for net in ("value", "actor", "critic")}
        self.updates = 0

    def mlp(self, net: str, x: Tensor, prefix: str = "", last: str = "l3", keep: Any = (1.0, 1.0)) -> Tensor:
        state = self.nets[net]
        for index, layer in enumerate(("l1", "l2", last)):
            x = x @ state[f"{prefix}{layer}.weight"].T + state[f"{prefix}{layer}.bias"]
            if index < 2:
                x = x.relu() * keep[index]
        return x

    def q(self, net: str, batch: Batch, head: int) -> Tensor:
        return self.mlp(net, torch.cat([batch.observations, batch.actions], -1), f"{head}.")[..., 0]

    def step(self, net: str, loss: Tensor, rate: float = 3e-4) -> None:
        self.optimizers[net].param_groups[0]["lr"] = rate
        self.optimizers[net].zero_grad()
        loss.backward()
        self.optimizers[net].step()

    def update(self, batch: Batch, policy_batch: Batch | None, noise: tuple[Tensor, ...]) -> dict[str, float]:
        config, oper = self.config, self.config.flavour == "oper"
        if oper:
            limit = 1 - 1e-5
            batch = batch._replace(actions=batch.actions.clamp(-limit, limit))
            if policy_batch is not None:
                policy_batch = policy_batch._replace(actions=policy_batch.actions.clamp(-limit, limit))
        data = batch if policy_batch is None else policy_batch
        with torch.no_grad():
            goals = [torch.minimum(self.q("target_critic", b, 0), self.q("target_critic", b, 1)) for b in (batch, data)]
            old_next, old_here = (
                self.mlp("value", batch.next_observations)[..., 0],
                self.mlp("value", data.observations)[..., 0],
            )
        error = goals[0] - self.mlp("value", batch.observations)[..., 0]
        share = (config.expectile - (error <= 0).to(error.dtype)).abs()
        outer = batch.weights if config.reweight_eval else torch.ones_like(error)
        value_loss = (outer * share * error**2).mean()
        self.step("value", value_loss)
        with torch.no_grad():
            new_next, new_here = (
                self.mlp("value", batch.next_observations)[..., 0],
                self.mlp("value", data.observations)[..., 0],
            )
        following, here = (new_next, new_here) if oper else (old_next, old_here)
        weights = torch.exp(config.temperature * (goals[1] - here))
        weights = (weights * data.weights if config.reweight_improve else weights).clamp(max=100.0)
        keep = [(u >= config.dropout) / (1 - config.dropout) for u in noise] if noise else (1.0, 1.0)
        mean = self.mlp("actor", data.observations, last="mean", keep=keep).tanh()
        if config.deterministic:
            actor_loss = (weights * ((mean - data.actions) ** 2).sum(-1)).mean()
        else:
            std = self.nets["actor"]["log_std"].clamp(-5.0 if oper else -20.0, 2.0).exp()
            actor_loss = -(weights * torch.distributions.Normal(mean, std).log_prob(data.actions).sum(-1)).mean()
        steps = config.schedule_steps
        self.step(
            "actor", actor_loss, 3e-4 if steps is None else 3e-4 * 0.5 * (1 + math.cos(math.pi * self.updates / steps))
        )
        goal = batch.rewards + config.discount * batch.not_terminal * following
        errors = [(self.q("critic", batch, head) - goal) ** 2 for head in (0, 1)]
        critic_loss = (outer * (errors[0] + errors[1])).mean() * (1.0 if oper else 0.5)
        self.step("critic", critic_loss)
        with torch.no_grad():
            for key, target in self.nets["target_critic"].items():
                target.lerp_(self.nets["critic"][key], config.target_rate)
        self.updates += 1
        return {"value_loss": value_loss.item(), "actor_loss": actor_loss.item(), "critic_loss": critic_loss.item()}


VARIANTS: dict[str, dict[str, Any]] = {
    "oper": {},
    "oper reweighted": {"reweight_eval": True, "reweight_improve": True, "reweight_constraint": True},
    "oper policy reweighted": {"reweight_improve": True, "reweight_constraint": True, "temperature": 8.0},
    "oper dropout": {"dropout": 0.25},
    "corl": {"flavour": "corl"},
    "corl reweighted": {
        "flavour": "corl",
        "reweight_eval": True,
        "reweight_improve": True,
        "reweight_constraint": True,
    },
    "corl deterministic": {"flavour": "corl", "deterministic": True, "target_rate": 0.125, "dropout": 0.5},
}


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("hidden", [SMALL, LARGE])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("_float64")
def test_update_follows_autograd_of_the_losses(variant: str, hidden: tuple[int, int], decoupled: bool) -> None:
    numbers = {"expectile": 0.75, "discount": 0.5, "temperature": 3.0, "schedule_steps": 5, "hidden": hidden}
    config = IQLConfig(**{**numbers, **VARIANTS[variant]})
    algorithm = IQL(OBSERVATION, ACTION, [3, 5], config)
    algorithm.log_std.copy_(torch.tensor([[0.5, -6.0], [2.5, -1.0]]))
    algorithm.critic_target.flat.mul_(1.5)
    plain = [Plain(algorithm.export(run), config) for run in (0, 1)]
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        batch, policy_batch = batch_of(step, 2), batch_of(9 + step, 2, ROWS + 3) if decoupled else None
        noise = algorithm.noise(ROWS + 3 if decoupled else ROWS, generator)
        algorithm.prepare()
        logs = algorithm.update(batch, policy_batch, noise)
        for run in (0, 1):
            chosen = tuple(x[run : run + 1] for x in noise)
            want = plain[run].update(part(batch, run), part(policy_batch, run), chosen)
            assert {name: logs[name][run].item() for name in want} == pytest.approx(want, rel=1e-6)
    for run in (0, 1):
        for net, state in algorithm.export(run).items():
            for key, value in state.items():
                torch.testing.assert_close(value, plain[run].nets[net][key].detach(), rtol=0, atol=1e-8)


@pytest.mark.usefixtures("_float64")
def test_gradients_have_the_size_of_the_losses() -> None:
    """Adam's first steps hide a factor; the gradients themselves do not."""
    config = IQLConfig(flavour="corl", expectile=0.75, discount=0.5, hidden=SMALL)
    algorithm, batch = IQL(OBSERVATION, ACTION, [3], config), batch_of(0, 1)
    plain = Plain(algorithm.export(0), config)
    algorithm.update(batch, None, ())
    plain.update(batch, None, ())
    for net in ("value", "critic", "actor"):
        network = getattr(algorithm, net)
        network.flat.copy_(network.gradient)
    algorithm.log_std.copy_(algorithm.log_std_gradient)
    for net in ("value", "critic", "actor"):
        for key, found in algorithm.export(0)[net].items():
            torch.testing.assert_close(found, plain.nets[net][key].grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("hidden", [SMALL, LARGE])
@pytest.mark.parametrize("flavour", ["oper", "corl"])
def test_batched_runs_equal_single_runs(flavour: Any, hidden: tuple[int, int]) -> None:
    expectiles = (0.7, 0.9)
    together = IQL(OBSERVATION, ACTION, [1, 2], IQLConfig(flavour, expectile=expectiles, hidden=hidden))
    alone = [
        IQL(OBSERVATION, ACTION, [seed], IQLConfig(flavour, expectile=expectile, hidden=hidden))
        for seed, expectile in zip((1, 2), expectiles, strict=True)
    ]
    for step in range(3):
        batch, policy_batch = batch_of(step, 2), batch_of(9 + step, 2)
        together.update(batch, policy_batch, ())
        for run in (0, 1):
            alone[run].update(part(batch, run), part(policy_batch, run), ())
    for run in (0, 1):
        for net, state in together.export(run).items():
            for key, value in state.items():
                torch.testing.assert_close(value, alone[run].export(0)[net][key], rtol=0, atol=1e-6)


def test_state_dict_goes_on_to_the_same_bits() -> None:
    config = IQLConfig(hidden=SMALL, schedule_steps=4, dropout=0.1)
    first, second = IQL(OBSERVATION, ACTION, [1, 2], config), IQL(OBSERVATION, ACTION, [3, 4], config)
    noise = [first.noise(ROWS, torch.Generator().manual_seed(step)) for step in range(4)]
    for step in range(4):
        if step == 2:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        for algorithm in (first, second):
            algorithm.prepare()
            algorithm.update(batch_of(step, 2), None, noise[step])
    for name, state in first.parts().items():
        for key, value in state.state_dict().items():
            assert torch.equal(value, second.parts()[name].state_dict()[key]), (name, key)
    assert torch.equal(first.log_std, second.log_std)


def test_export_can_be_loaded_into_another_run() -> None:
    first, second = (IQL(OBSERVATION, ACTION, seeds, IQLConfig(hidden=SMALL)) for seeds in ([1, 2], [3]))
    first.log_std.normal_(generator=torch.Generator().manual_seed(0))
    states = copy.deepcopy(first.export(1))
    second.load(0, states)
    for net, state in second.export(0).items():
        assert state.keys() == states[net].keys()
        assert all(torch.equal(value, states[net][key]) for key, value in state.items())


def test_export_has_the_names_of_the_authors_case_study() -> None:
    names = {f"{net}.{key}" for net, state in IQL(3, 2, [0]).export(0).items() for key in state}
    leaves, heads = ("weight", "bias"), (0, 1)
    layers = {f"{layer}.{leaf}" for layer in ("l1", "l2", "l3") for leaf in leaves}
    want = {f"{net}.{head}.{x}" for net in ("critic", "target_critic") for head in heads for x in layers}
    want |= {f"value.{x}" for x in layers} | {f"actor.{x}".replace("l3", "mean") for x in layers} | {"actor.log_std"}
    assert names == want


def test_networks_start_orthogonal_with_zero_biases() -> None:
    for net, state in IQL(OBSERVATION, ACTION, [7], IQLConfig(hidden=SMALL)).export(0).items():
        for key, value in state.items():
            if value.ndim == 1:
                assert not value.any(), (net, key)
            else:
                product = value @ value.T if value.shape[0] <= value.shape[1] else value.T @ value
                torch.testing.assert_close(product, 2 * torch.eye(len(product)), rtol=0, atol=1e-5)


def test_policy_rate_falls_along_a_cosine_and_stays_zero() -> None:
    algorithm = IQL(OBSERVATION, ACTION, [0], IQLConfig(hidden=SMALL, schedule_steps=4))
    rates = []
    for _ in range(6):
        algorithm.prepare()
        before = algorithm.actor.flat.clone()
        algorithm.update(batch_of(0, 1), None, ())
        rates.append((algorithm.actor.flat - before).abs().max().item())
    assert rates[0] == pytest.approx(3e-4, rel=0.01)
    assert rates[0] > rates[1] > rates[2] > rates[3] > 0
    assert rates[4:] == [0, 0]


def test_dropout_leaves_corls_gaussian_policy_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    assert IQL(OBSERVATION, ACTION, [0], IQLConfig("corl", dropout=0.1)).noise(ROWS, generator) == ()
    drawn = IQL(OBSERVATION, ACTION, [0], IQLConfig("corl", dropout=0.1, deterministic=True)).noise(ROWS, generator)
    assert [x.shape for x in drawn] == [(1, ROWS, 256), (1, ROWS, 256)]


def test_actions_of_chosen_runs_are_their_own() -> None:
    algorithm = IQL(OBSERVATION, ACTION, [0, 1, 2], IQLConfig(hidden=SMALL))
    states = 100 * batch_of(0, 3).observations
    actions = algorithm.act(states)
    assert actions.abs().max() <= 1
    torch.testing.assert_close(algorithm.act(states[1:2], slice(1, 2)), actions[1:2])


def data_of(rewards: list[float], terminals: list[int]) -> Transitions:
    states = np.arange(2.0 * len(rewards)).reshape(-1, 2)
    return Transitions.from_arrays(states, states[:, :1] * 0, rewards, states + 2, terminals, np.zeros(len(rewards)))


def test_locomotion_rewards_scale_the_range_of_returns_to_1000() -> None:
    scaled = locomotion_rewards(data_of([1, 2, 5, 1], [0, 1, 0, 1]))
    np.testing.assert_allclose(scaled, np.array([1, 2, 5, 1]) * 1000 / 3, rtol=1e-6)
    assert scaled.dtype == np.float32


def test_equal_returns_cannot_scale_rewards() -> None:
    with pytest.raises(UserError, match="all episodes return 3, so that their range scales nothing: keep the rewards"):
        locomotion_rewards(data_of([1, 2, 3], [0, 1, 1]))


def test_antmaze_rewards_are_one_less() -> None:
    np.testing.assert_array_equal(antmaze_rewards(data_of([0, 1, 0], [0, 1, 0])), np.array([-1, 0, -1], np.float32))


@pytest.mark.parametrize(
    ("task", "flavour", "want"),
    [
        ("hopper-medium-v2", "oper", IQLConfig()),
        ("antmaze-large-play-v2", "oper", IQLConfig(expectile=0.9, temperature=10.0)),
        ("kitchen-mixed-v0", "oper", IQLConfig(temperature=0.5, dropout=0.1)),
        ("pen-human-v1", "oper", IQLConfig(temperature=0.5, dropout=0.1)),
        ("walker2d-medium-v2", "corl", IQLConfig("corl")),
        ("maze2d-large-v1", "corl", IQLConfig("corl")),
        ("antmaze-umaze-v2", "corl", IQLConfig("corl", expectile=0.9, temperature=10.0)),
        ("pen-human-v1", "corl", IQLConfig("corl", expectile=0.8, dropout=0.1)),
        ("hopper-medium-expert-v2", "corl", IQLConfig("corl", expectile=0.5, temperature=6.0)),
        ("hopper-medium-v2", "corl", IQLConfig("corl", deterministic=True, target_rate=0.001)),
    ],
)
def test_tasks_have_the_published_values(task: str, flavour: Any, want: IQLConfig) -> None:
    assert IQLConfig.of_task(task, flavour) == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flavour": "jax"}, "flavour is 'jax': give oper or corl"),
        ({"reweight_improve": True}, "reweight_improve is True and reweight_constraint False: .* give both or neither"),
        ({"expectile": (0.7, 1.0)}, r"expectile is \(0.7, 1.0\): give numbers between 0 and 1"),
        ({"dropout": 1.0}, r"dropout is 1.0: give a number in \[0, 1\)"),
        ({"schedule_steps": 0}, "schedule_steps is 0: give the number of updates of the run, or None"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        IQLConfig(**options)


def test_a_number_per_run_must_fit_the_runs() -> None:
    with pytest.raises(UserError, match="temperature has 2 values for 3 runs: give one, or one per run"):
        IQL(OBSERVATION, ACTION, [0, 1, 2], IQLConfig(temperature=(1.0, 3.0)))
