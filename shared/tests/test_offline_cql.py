"""CQL's update against plain autograd of its losses, and its runs against each other."""

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
from leap_shared.offline.algorithms import cql
from leap_shared.offline.algorithms.base import Batch
from leap_shared.offline.algorithms.cql import CQL, CQLConfig, cql_antmaze_rewards

OBSERVATION, ACTION, ROWS = 4, 2, 12
SMALL, LARGE = (16, 8, 8), (256, 256, 16)
SCALARS = {"actor": ("log_std_multiplier", "log_std_offset"), "scalars": ("log_alpha", "log_alpha_prime")}


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def config_of(hidden: tuple[int, ...] = SMALL, **options: Any) -> CQLConfig:
    return CQLConfig(**{"hidden": hidden, "critic_hidden": hidden, "samples": 3, **options})


def batch_of(seed: int, runs: int, rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(runs, rows, *shape, generator=generator)

    states, after, actions = normal(OBSERVATION), normal(OBSERVATION), normal(ACTION).clamp(-1, 1)
    return Batch(states, actions, normal(), after, (normal() > -1).to(states.dtype), normal().exp())


def part(batch: Batch | None, run: int) -> Batch | None:
    return None if batch is None else Batch(*(None if x is None else x[run : run + 1] for x in batch))


def perturb(algorithm: CQL) -> None:
    """Leave the initial values, at which last layers are nearly 0 and targets equal the critics."""
    generator = torch.Generator().manual_seed(0)
    for network in (algorithm.actor, algorithm.critic, algorithm.critic_target):
        network.flat.add_(0.2 * torch.randn(network.flat.shape, generator=generator))
    algorithm.scalars.add_(0.3 * torch.randn(algorithm.scalars.shape, generator=generator))


class Plain:
    """One run of CQL with autograd and `torch.optim.Adam`, written from the equations."""

    def __init__(self, states: dict[str, dict[str, Tensor]], config: CQLConfig) -> None:
        self.config = config
        self.nets = {net: {k: x.clone().requires_grad_() for k, x in state.items()} for net, state in states.items()}
        scalars = self.nets["scalars"]
        rates = (config.policy_learning_rate, config.critic_learning_rate)
        groups = (
            ([*self.nets["actor"].values(), scalars["log_alpha"]], rates[0]),
            (list(self.nets["critic"].values()), rates[1]),
            ([scalars["log_alpha_prime"]], rates[1]),
        )
        self.optimizers = [torch.optim.Adam(parameters, rate) for parameters, rate in groups]

    def mlp(self, net: str, x: Tensor, prefix: str = "") -> Tensor:
        state = self.nets[net]
        layers = sorted(
            {key.removeprefix(prefix)[:2] for key in state if key.startswith(prefix + "l") and "std" not in key}
        )
        layers = [layer for layer in layers if f"{prefix}{layer}.weight" in state]
        for layer in layers:
            x = x @ state[f"{prefix}{layer}.weight"].T + state[f"{prefix}{layer}.bias"]
            x = x if layer == layers[-1] else x.relu()
        return x

    def sample(self, states: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.mlp("actor", states)[:, :, None].chunk(2, -1)
        log_std = raw * self.nets["actor"]["log_std_multiplier"] + self.nets["actor"]["log_std_offset"]
        std = log_std.clamp(-20, 2).exp()
        before = mean + std * noise
        normal = torch.distributions.Normal(mean, std)
        return before.tanh(), (normal.log_prob(before) - torch.log(1 - before.tanh() ** 2)).sum(-1)

    def q(self, net: str, states: Tensor, actions: Tensor) -> Tensor:
        pairs = torch.cat([states[:, :, None].expand(-1, -1, actions.shape[2], -1), actions], -1)
        return torch.stack([self.mlp(net, pairs, f"{head}.")[..., 0] for head in (0, 1)])

    def update(self, batch: Batch, policy_batch: Batch | None, noise: tuple[Tensor, ...]) -> dict[str, float]:
        config, data = self.config, batch if policy_batch is None else policy_batch
        ones = torch.ones_like(data.rewards)
        temperature = self.nets["scalars"]["log_alpha"].exp()

        actions, log_prob = (x[:, :, 0] for x in self.sample(data.observations, noise[0]))
        entropy = config.target_entropy if config.target_entropy is not None else -ACTION
        alpha_loss = -(self.nets["scalars"]["log_alpha"] * (log_prob + entropy).detach()).mean()
        improve = data.weights if config.reweight_improve else ones
        policy_q = self.q("critic", data.observations, actions[:, :, None])[..., 0].amin(0)
        policy_loss = (improve * (temperature.detach() * log_prob - policy_q)).mean()

        with torch.no_grad():
            after, _ = self.sample(batch.next_observations, noise[3])
            ahead = self.q("target_critic", batch.next_observations, after).amin(0).amax(-1)
            goal = batch.rewards + config.discount * batch.not_terminal * ahead
            here, here_density = self.sample(data.observations, noise[1])
            following, following_density = self.sample(data.next_observations, noise[2])
        evaluate = batch.weights if config.reweight_eval else torch.ones_like(batch.rewards)
        values = self.q("critic", batch.observations, batch.actions[:, :, None])[..., 0]
        td_loss = (evaluate * (values - goal) ** 2).mean((1, 2)).sum()
        scores = torch.cat(
            [
                self.q("critic", data.observations, noise[4]) - math.log(0.5**ACTION),
                self.q("critic", data.observations, following) - following_density,
                self.q("critic", data.observations, here) - here_density,
            ],
            -1,
        )
        total = config.temperature * torch.logsumexp(scores / config.temperature, -1)
        gap = total - self.q("critic", data.observations, data.actions[:, :, None])[..., 0]
        low = -math.inf if config.gap_min is None else config.gap_min
        high = math.inf if config.gap_max is None else config.gap_max
        weights = data.weights if config.reweight_constraint else ones
        gaps = (weights * gap.clamp(low, high)).mean((1, 2))
        conservative = config.alpha * gaps
        multiplier_loss = torch.zeros(())
        if config.target_gap is not None:
            multiplier = self.nets["scalars"]["log_alpha_prime"].exp().clamp(0, 1e6)
            multiplier_loss = -0.5 * (config.alpha * multiplier * (gaps.detach() - config.target_gap)).sum()
            conservative = config.alpha * multiplier.detach() * (gaps - config.target_gap)

        losses = (policy_loss + alpha_loss, td_loss + conservative.sum(), multiplier_loss)
        pairs = [
            (optimizer, loss) for optimizer, loss in zip(self.optimizers, losses, strict=True) if loss.requires_grad
        ]
        for optimizer, loss in pairs:
            parameters = optimizer.param_groups[0]["params"]
            grads = torch.autograd.grad(loss, parameters, retain_graph=True)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
        for optimizer, _ in pairs:
            optimizer.step()
        with torch.no_grad():
            for key, target in self.nets["target_critic"].items():
                target.lerp_(self.nets["critic"][key], config.target_rate)
        return {"td_loss": td_loss.item(), "gap": gaps.mean().item(), "actor_loss": policy_loss.item()}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reweighted": {"reweight_eval": True, "reweight_improve": True, "reweight_constraint": True},
    "gap reweighted": {"reweight_constraint": True},
    "lagrange": {"target_gap": 0.75},
    "clipped": {"gap_min": 1.0, "gap_max": 2.0, "temperature": 0.5},
    "antmaze": {"target_gap": 0.75, "gap_min": -200.0, "max_target_backup": True, "alpha": 5.0, "target_entropy": -1.0},
}


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("hidden", [SMALL, LARGE])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("_float64")
def test_update_follows_autograd_of_the_losses(
    variant: str, hidden: tuple[int, ...], decoupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cql, "BLOCK_ROWS", 50)  # five states of ten actions in a block, and a smaller last block
    config = config_of(hidden, discount=0.5, **VARIANTS[variant])
    algorithm = CQL(OBSERVATION, ACTION, [3, 5], config)
    perturb(algorithm)
    plain = [Plain(algorithm.export(run), config) for run in (0, 1)]
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        batch, policy_batch = batch_of(step, 2), batch_of(9 + step, 2) if decoupled else None
        noise = algorithm.noise(ROWS, generator)
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
    config, batch = config_of(discount=0.5, target_gap=0.75, reweight_constraint=True), batch_of(0, 1)
    algorithm = CQL(OBSERVATION, ACTION, [3], config)
    perturb(algorithm)
    plain = Plain(algorithm.export(0), config)
    noise = algorithm.noise(ROWS, torch.Generator().manual_seed(0))
    algorithm.update(batch, None, noise)
    plain.update(batch, None, noise)
    for network in (algorithm.actor, algorithm.critic):
        network.flat.copy_(network.gradient)
    algorithm.scalars.copy_(algorithm.scalar_gradient)
    algorithm.log_multiplier.copy_(algorithm.multiplier_gradient)
    for net in ("actor", "critic", "scalars"):
        for key, found in algorithm.export(0)[net].items():
            torch.testing.assert_close(found, plain.nets[net][key].grad, rtol=1e-6, atol=1e-9)


def test_decoupled_critic_regresses_on_its_own_batch_alone() -> None:
    """With no gap, the critics do not depend on the policy's batch."""
    results = []
    for seed in (5, 6):
        algorithm = CQL(OBSERVATION, ACTION, [0], config_of(alpha=0.0))
        algorithm.update(batch_of(0, 1), batch_of(seed, 1), algorithm.noise(ROWS, torch.Generator().manual_seed(0)))
        results.append(algorithm)
    assert torch.equal(results[0].critic.flat, results[1].critic.flat)
    assert not torch.equal(results[0].actor.flat, results[1].actor.flat)


@pytest.mark.parametrize("hidden", [SMALL, LARGE])
def test_batched_runs_equal_single_runs(hidden: tuple[int, ...]) -> None:
    alphas, gaps = (5.0, 1.0), (0.5, 2.0)
    together = CQL(OBSERVATION, ACTION, [1, 2], config_of(hidden, alpha=alphas, target_gap=gaps))
    alone = [
        CQL(OBSERVATION, ACTION, [seed], config_of(hidden, alpha=alpha, target_gap=gap))
        for seed, alpha, gap in zip((1, 2), alphas, gaps, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        batch, policy_batch, noise = batch_of(step, 2), batch_of(9 + step, 2), together.noise(ROWS, generator)
        together.update(batch, policy_batch, noise)
        for run in (0, 1):
            chosen = tuple(x[run : run + 1] for x in noise)
            alone[run].update(part(batch, run), part(policy_batch, run), chosen)
    for run in (0, 1):
        for net, state in together.export(run).items():
            for key, value in state.items():
                torch.testing.assert_close(value, alone[run].export(0)[net][key], rtol=0, atol=2e-6)


def test_state_dict_goes_on_to_the_same_bits() -> None:
    config = config_of(target_gap=0.5)
    first, second = CQL(OBSERVATION, ACTION, [1, 2], config), CQL(OBSERVATION, ACTION, [3, 4], config)
    noise = [first.noise(ROWS, torch.Generator().manual_seed(step)) for step in range(4)]
    for step in range(4):
        if step == 2:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        for algorithm in (first, second):
            algorithm.update(batch_of(step, 2), None, noise[step])
    for name, state in first.parts().items():
        for key, value in state.state_dict().items():
            assert torch.equal(value, second.parts()[name].state_dict()[key]), (name, key)
    assert torch.equal(first.scalars, second.scalars)
    assert torch.equal(first.log_multiplier, second.log_multiplier)


def test_export_can_be_loaded_into_another_run() -> None:
    first, second = (CQL(OBSERVATION, ACTION, seeds, config_of()) for seeds in ([1, 2], [3]))
    perturb(first)
    states = copy.deepcopy(first.export(1))
    second.load(0, states)
    for net, state in second.export(0).items():
        assert state.keys() == states[net].keys()
        assert all(torch.equal(value, states[net][key]) for key, value in state.items())


def test_scalars_start_at_corls_values() -> None:
    states = CQL(OBSERVATION, ACTION, [0], config_of()).export(0)
    found = {key: states[net][key].item() for net, keys in SCALARS.items() for key in keys}
    assert found == {"log_std_multiplier": 1, "log_std_offset": -1, "log_alpha": 0, "log_alpha_prime": 1}


def test_critics_start_orthogonal_and_the_policy_never() -> None:
    states = CQL(OBSERVATION, ACTION, [0], config_of((16, 16))).export(0)
    for layer, gain in (("0.l2", 2**0.5), ("0.l3", 1e-2)):
        weight = states["critic"][f"{layer}.weight"]
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), rtol=0, atol=1e-5)
        assert not states["critic"][f"{layer}.bias"].any()
    bound = 1e-2 * (6 / (16 + 2 * ACTION)) ** 0.5
    assert 0.8 * bound < states["actor"]["l3.weight"].abs().max() <= bound
    assert not states["actor"]["l3.bias"].any()
    assert states["actor"]["l2.weight"].abs().max() <= 0.25
    assert states["actor"]["l2.bias"].any()


def test_without_orthogonal_init_critics_start_like_the_policy() -> None:
    states = CQL(OBSERVATION, ACTION, [0], config_of((16, 16), orthogonal_init=False)).export(0)
    assert states["critic"]["0.l2.weight"].abs().max() <= 0.25
    assert states["critic"]["0.l2.bias"].any()
    assert states["critic"]["0.l3.weight"].abs().max() <= 1e-2 * (6 / 17) ** 0.5


def test_uniform_actions_fill_the_box() -> None:
    *_, uniform = CQL(OBSERVATION, ACTION, [0], config_of()).noise(1000, torch.Generator().manual_seed(0))
    assert uniform.shape == (1, 1000, 3, ACTION)
    assert uniform.abs().max() <= 1
    assert uniform.min() < -0.99
    assert uniform.max() > 0.99


def test_actions_of_chosen_runs_are_their_own() -> None:
    algorithm = CQL(OBSERVATION, ACTION, [0, 1, 2], config_of())
    perturb(algorithm)
    states = batch_of(0, 3).observations
    actions = algorithm.act(states)
    assert actions.abs().max() <= 1
    torch.testing.assert_close(algorithm.act(states[1:2], slice(1, 2)), actions[1:2])


def test_antmaze_rewards_are_ten_fold_less_five() -> None:
    states = np.arange(6.0).reshape(-1, 2)
    data = Transitions.from_arrays(states, states[:, :1] * 0, [0, 1, 0], states + 2, [0, 1, 0], np.zeros(3))
    np.testing.assert_array_equal(cql_antmaze_rewards(data), np.array([-5, 5, -5], np.float32))


@pytest.mark.parametrize(
    ("task", "want"),
    [
        ("walker2d-medium-v2", CQLConfig()),
        ("maze2d-large-v1", CQLConfig(target_gap=5.0)),
        ("door-human-v1", CQLConfig(alpha=1.0, policy_learning_rate=1e-4)),
        (
            "antmaze-umaze-v2",
            CQLConfig(
                alpha=5.0,
                target_gap=0.8,
                gap_min=-200.0,
                max_target_backup=True,
                policy_learning_rate=1e-4,
                critic_hidden=(256,) * 5,
            ),
        ),
    ],
)
def test_tasks_have_corls_values(task: str, want: CQLConfig) -> None:
    assert CQLConfig.of_task(task) == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0: give at least 1"),
        ({"policy_learning_rate": 0.0}, "policy_learning_rate is 0.0: give a positive number"),
        ({"critic_learning_rate": -1.0}, "critic_learning_rate is -1.0: give a positive number"),
        ({"temperature": (1.0, 0.0)}, r"temperature is \(1.0, 0.0\): give positive numbers"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CQLConfig(**options)


def test_a_number_per_run_must_fit_the_runs() -> None:
    with pytest.raises(UserError, match="target_gap has 2 values for 3 runs: give one, or one per run"):
        CQL(OBSERVATION, ACTION, [0, 1, 2], config_of(target_gap=(1.0, 3.0)))
