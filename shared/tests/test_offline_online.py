"""SAC and TD3: gradients against autograd of the losses as written, densities, and states that go on as they were."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.offline.networks import StackedMLP
from leap_shared.offline.online import SAC, TD3, Experience, Learner, SACConfig, TD3Config

OBSERVATION, ACTION, ROWS = 3, 2, 7
SMALL = {"hidden": (8, 8), "batch_size": ROWS, "learning_rate": 1e-2}
TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}  # float32 against the same losses in float64


def experience(seed: int = 0, rows: int = ROWS) -> Experience:
    generator = torch.Generator().manual_seed(seed)
    observations, following = torch.randn((2, rows, OBSERVATION), generator=generator)
    actions = torch.rand((rows, ACTION), generator=generator) * 2 - 1
    rewards = torch.randn(rows, generator=generator)
    not_terminal = (torch.rand(rows, generator=generator) > 0.3).float()
    return Experience(observations, actions, rewards, not_terminal, following)


def noise_of(learner: Learner, seed: int = 1) -> Tensor:
    return learner.noise(1, torch.Generator().manual_seed(seed))[0]


def sac(seed: int = 0, **numbers: Any) -> SAC:
    return SAC(OBSERVATION, ACTION, SACConfig(**{**SMALL, **numbers}), seed)


def td3(seed: int = 0, **numbers: Any) -> TD3:
    return TD3(OBSERVATION, ACTION, TD3Config(**{**SMALL, **numbers}), seed)


def trained(learner: Learner, updates: int = 5) -> Learner:
    for number in range(updates):
        learner.update(experience(number), noise_of(learner, number))
    return learner


class Plain:
    """The networks of a stack in float64, layer by layer, for autograd."""

    def __init__(self, network: StackedMLP) -> None:
        self.flat = network.flat.double().requires_grad_()
        self.parts = network._views(self.flat)

    def __call__(self, inputs: Tensor, number: int = 0) -> Tensor:
        weights, biases = self.parts[::2], self.parts[1::2]
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            inputs = torch.relu(inputs @ weight[number] + bias[number])
        return inputs @ weights[-1][number] + biases[-1][number]

    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        inputs = torch.cat([observations, actions], -1)
        return torch.stack([self(inputs, number)[:, 0] for number in (0, 1)])


def tanh_gaussian(outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    deviation = outputs[:, ACTION:].clamp(-20, 2).exp()
    before = outputs[:, :ACTION] + deviation * noise
    density = -0.5 * noise**2 - deviation.log() - 0.5 * math.log(2 * math.pi) - torch.log(1 - before.tanh() ** 2)
    return before.tanh(), density.sum(-1)


@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["deviation free", "deviation clipped"])
def test_gradients_of_sac_are_those_of_its_losses(shift: float) -> None:
    learner = sac()
    trained(learner)
    learner.actor.layers(0)[-1][1][ACTION] += shift
    before, noise = copy.deepcopy(learner), noise_of(learner)
    learner.update(experience(20), noise)

    batch, noise = Experience(*(part.double() for part in experience(20))), noise.double()
    alpha = before.log_temperature.double().exp()
    actor, critic = Plain(before.actor), Plain(before.critic)
    after, after_log_prob = tanh_gaussian(actor(batch.next_observations), noise[ROWS:])
    ahead = Plain(before.critic_target).values(batch.next_observations, after).amin(0) - alpha * after_log_prob
    goal = (batch.rewards + 0.99 * batch.not_terminal * ahead).detach()
    critic_loss = (critic.values(batch.observations, batch.actions) - goal).square().mean(1).sum()
    torch.testing.assert_close(
        learner.critic.gradient.double(), torch.autograd.grad(critic_loss, critic.flat)[0], **TOLERANCE
    )
    action, log_prob = tanh_gaussian(actor(batch.observations), noise[:ROWS])
    values = Plain(learner.critic).values(batch.observations, action).amin(0)  # after the step of the critics
    actor_loss = (alpha * log_prob - values).mean()
    torch.testing.assert_close(
        learner.actor.gradient.double(), torch.autograd.grad(actor_loss, actor.flat)[0], **TOLERANCE
    )
    wanted = -(log_prob.mean() - ACTION).detach().float()
    torch.testing.assert_close(learner.temperature_gradient[0], wanted, **TOLERANCE)


def test_gradients_of_td3_are_those_of_its_losses() -> None:
    learner = td3(policy_noise=0.5, noise_clip=0.3)
    trained(learner)
    assert learner.updates % 2 == 1
    before, noise = copy.deepcopy(learner), noise_of(learner)
    learner.update(experience(20), noise)

    batch, noise = Experience(*(part.double() for part in experience(20))), noise.double()
    actor, critic = Plain(before.actor), Plain(before.critic)
    after = Plain(before.actor_target)(batch.next_observations).tanh() + (0.5 * noise).clamp(-0.3, 0.3)
    ahead = Plain(before.critic_target).values(batch.next_observations, after.clamp(-1, 1)).amin(0)
    goal = (batch.rewards + 0.99 * batch.not_terminal * ahead).detach()
    critic_loss = (critic.values(batch.observations, batch.actions) - goal).square().mean(1).sum()
    torch.testing.assert_close(
        learner.critic.gradient.double(), torch.autograd.grad(critic_loss, critic.flat)[0], **TOLERANCE
    )
    loss = -Plain(learner.critic).values(batch.observations, actor(batch.observations).tanh())[0].mean()
    torch.testing.assert_close(learner.actor.gradient.double(), torch.autograd.grad(loss, actor.flat)[0], **TOLERANCE)


@pytest.mark.parametrize("made", [sac, td3])
def test_targets_follow_at_the_given_rate(made: Callable[..., Learner]) -> None:
    learner = trained(made(target_rate=0.25), 1)
    before = learner.critic_target.flat.clone()
    learner.update(experience(9), noise_of(learner))
    torch.testing.assert_close(learner.critic_target.flat, before + 0.25 * (learner.critic.flat - before))


def test_td3_moves_its_actor_at_every_third_update_where_told_so() -> None:
    learner, moved = td3(policy_delay=3), []
    for number in range(6):
        before = learner.actor.flat.clone()
        learner.update(experience(number), noise_of(learner, number))
        moved.append(not torch.equal(before, learner.actor.flat))
    assert moved == [False, False, True, False, False, True]


def test_temperature_falls_only_where_the_entropy_is_above_its_target() -> None:
    high, low = sac(target_entropy=-50.0), sac(target_entropy=50.0)
    for learner in (high, low):
        learner.update(experience(), noise_of(learner))
    assert high.log_temperature.item() < 0 < low.log_temperature.item()


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), seed=st.integers(0, 1000))
def test_densities_of_sac_are_those_of_the_squashed_gaussian(rows: int, seed: int) -> None:
    learner, generator = sac(seed), torch.Generator().manual_seed(seed)
    observations = torch.randn((rows, OBSERVATION), generator=generator)
    actions, log_probs = learner.explore(observations, generator)
    outputs = Plain(learner.actor)(observations.double()).detach()
    before = torch.atanh(actions.double())
    _, wanted = tanh_gaussian(outputs, (before - outputs[:, :ACTION]) / outputs[:, ACTION:].exp())
    torch.testing.assert_close(log_probs.double(), wanted, rtol=1e-3, atol=1e-3)  # atanh of float32 near the bounds


def test_exploration_noise_of_td3_has_its_deviation_and_stays_in_bounds() -> None:
    learner = td3(exploration_noise=0.2)
    observations = torch.zeros((20_000, OBSERVATION))
    actions, log_probs = learner.explore(observations, torch.Generator().manual_seed(0))
    assert actions.abs().max() <= 1
    assert abs((actions - learner.act(observations)).std().item() - 0.2) < 0.01
    assert log_probs.isnan().all()


@pytest.mark.parametrize("made", [sac, td3])
def test_restored_learner_goes_on_to_the_same_bits(made: Callable[..., Learner]) -> None:
    first, second = trained(made(0), 3), made(1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for number in range(4):
        logs = [learner.update(experience(number), noise_of(learner, number)) for learner in (first, second)]
    assert logs[0].keys() == logs[1].keys()
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("made", [sac, td3])
def test_exported_policy_acts_alike_elsewhere(made: Callable[..., Learner]) -> None:
    first, second = trained(made(0)), made(1)
    second.load_policy(first.export_policy())
    observations = experience().observations
    assert torch.equal(first.act(observations), second.act(observations))
    assert first.export_policy()["l1.weight"].shape == (8, OBSERVATION)


def test_sac_finds_the_better_actions() -> None:
    learner = sac(hidden=(32, 32), batch_size=64, learning_rate=3e-3, target_entropy=-8.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        actions = torch.rand((64, ACTION), generator=generator) * 2 - 1
        rewards = -10 * (actions - 0.5).square().sum(-1)
        states = torch.randn((64, OBSERVATION), generator=generator)
        learner.update(Experience(states, actions, rewards, torch.zeros(64), states), learner.noise(1, generator)[0])
    distance = (learner.act(torch.randn((50, OBSERVATION), generator=generator)) - 0.5).abs().mean()
    assert distance < 0.25  # 0.5 without training


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (SACConfig, {"hidden": ()}, "at least one hidden layer"),
        (SACConfig, {"batch_size": 0}, "batch_size of at least 1"),
        (SACConfig, {"discount": 1.0}, r"discount in \[0, 1\)"),
        (TD3Config, {"target_rate": 0.0}, r"target_rate in \(0, 1\]"),
        (TD3Config, {"learning_rate": -1.0}, "learning_rate > 0"),
        (TD3Config, {"policy_delay": 0}, "policy_delay >= 1"),
        (TD3Config, {"noise_clip": -0.1}, "noise >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(config: Callable[..., Any], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**wrong)
