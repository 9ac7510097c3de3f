"""TD3+BC: the written gradients are those of the losses, runs do not touch each other, states go on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leap_shared.errors import UserError
from leap_shared.offline.algorithms import TD3BC, Batch, TD3BCConfig

OBSERVATION, ACTION, ROWS = 5, 2, 12
ROUNDING = 2e-6  # float32 gradients against float64 ones, relative to the largest


def batch(runs: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    states, after = torch.randn(2, runs, ROWS, OBSERVATION, generator=g)
    actions = torch.rand(runs, ROWS, ACTION, generator=g) * 2 - 1
    rewards, going, weights = torch.rand(3, runs, ROWS, generator=g)
    return Batch(states, actions, rewards, after, going.round(), 3 * weights)


def one(full: Batch, run: int) -> Batch:
    return Batch(*(part[run : run + 1] for part in full if part is not None))


def mlp(state: dict[str, Tensor], names: tuple[str, str, str], x: Tensor) -> Tensor:
    for name in names:
        x = F.linear(x if name == names[0] else x.relu(), state[f"{name}.weight"], state[f"{name}.bias"])
    return x


def double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().double().requires_grad_() for key, value in state.items()}


def gradients(algorithm: TD3BC, network: str) -> dict[str, Tensor]:
    """What the last step used, under the names of the authors."""
    stack = getattr(algorithm, network)
    kept = stack.flat.clone()
    stack.flat.copy_(stack.gradient)
    found = {key: value.clone() for key, value in algorithm.export(0)[network].items()}
    stack.flat.copy_(kept)
    return found


@pytest.mark.parametrize("clip", [0, 1, 2])
@pytest.mark.parametrize("reweight", [False, True])
def test_gradients_are_those_of_the_losses(clip: int, reweight: bool) -> None:
    flags = dict.fromkeys(("reweight_eval", "reweight_improve", "reweight_constraint"), reweight)
    config = TD3BCConfig(hidden=(16, 16), max_action=0.8, alpha=1.7, clip_constraint=clip, **flags)
    algorithm = TD3BC(OBSERVATION, ACTION, [3], config)
    algorithm.updates = 1  # the next update moves the actor too
    states = {name: double(state) for name, state in algorithm.export(0).items()}
    rows, noise = batch(1, 0), torch.randn(1, ROWS, ACTION, generator=torch.Generator().manual_seed(1))
    logs = algorithm.update(rows, None, [noise])
    s, a, r, after, going, w = (part[0].double() for part in rows if part is not None)
    weight = w if reweight else torch.ones_like(w)
    heads = (("l1", "l2", "l3"), ("l4", "l5", "l6"))
    ahead = (0.8 * mlp(states["actor_target"], heads[0], after).tanh() + (noise[0] * 0.16).clamp(-0.4, 0.4)).clamp(
        -0.8, 0.8
    )
    inputs = torch.cat([after, ahead], 1)
    goal = torch.minimum(*(mlp(states["critic_target"], head, inputs)[:, 0] for head in heads))
    goal = (r + 0.99 * going * goal).detach()
    values = [mlp(states["critic"], head, torch.cat([s, a], 1))[:, 0] for head in heads]
    loss = sum((weight * (value - goal) ** 2).mean() for value in values)
    loss.backward()
    for key, found in gradients(algorithm, "critic").items():
        want = states["critic"][key].grad
        assert (found - want).abs().max() <= ROUNDING * (1 + want.abs().max()), key
    assert logs["critic_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    critic = {key: value.detach().double() for key, value in algorithm.export(0)["critic"].items()}
    policy = 0.8 * mlp(states["actor"], heads[0], s).tanh()
    value = mlp(critic, heads[0], torch.cat([s, policy], 1))[:, 0]
    clipped = {0: w, 1: w.clamp(min=1), 2: torch.where(w < 1, w.sqrt(), w)}[clip] if reweight else weight
    scale = 1.7 / value.abs().mean().detach()
    constraint = (clipped[:, None] * (policy - a) ** 2).mean()
    (constraint - scale * (weight * value).mean()).backward()
    for key, found in gradients(algorithm, "actor").items():
        want = states["actor"][key].grad
        assert (found - want).abs().max() <= ROUNDING * (1 + want.abs().max()), key
    assert logs["constraint_loss"].item() == pytest.approx(constraint.item(), rel=1e-5)


def test_the_actor_and_the_targets_move_on_every_second_update() -> None:
    algorithm = TD3BC(OBSERVATION, ACTION, [0], TD3BCConfig(hidden=(8, 8)))
    before = {name: part.flat.clone() for name, part in (("actor", algorithm.actor), ("t", algorithm.critic_target))}
    assert not algorithm.wants_policy_batch()
    algorithm.update(batch(1, 0), None, algorithm.noise(ROWS, torch.Generator()))
    assert torch.equal(before["actor"], algorithm.actor.flat)
    assert torch.equal(before["t"], algorithm.critic_target.flat)
    assert algorithm.wants_policy_batch()
    algorithm.update(batch(1, 1), None, algorithm.noise(ROWS, torch.Generator()))
    assert not torch.equal(before["actor"], algorithm.actor.flat)
    assert not torch.equal(before["t"], algorithm.critic_target.flat)


@pytest.mark.parametrize("hidden", [(8, 8), (256, 256)])
def test_runs_of_one_program_are_single_runs_with_their_own_settings(hidden: tuple[int, ...]) -> None:
    alphas = (0.5, 2.5, 10.0)
    together = TD3BC(OBSERVATION, ACTION, [0, 1, 2], TD3BCConfig(hidden=hidden, alpha=alphas))
    apart = [TD3BC(OBSERVATION, ACTION, [n], TD3BCConfig(hidden=hidden, alpha=alphas[n])) for n in range(3)]
    for step in range(4):
        rows, policy = batch(3, 2 * step), batch(3, 2 * step + 1)
        noise = torch.randn(3, ROWS, ACTION, generator=torch.Generator().manual_seed(step))
        together.update(rows, policy, [noise])
        for n, single in enumerate(apart):
            single.update(one(rows, n), one(policy, n), [noise[n : n + 1]])
    for n, single in enumerate(apart):
        for name, state in single.export(0).items():
            for key, value in state.items():
                torch.testing.assert_close(together.export(n)[name][key], value, atol=1e-6, rtol=1e-5)


def test_a_saved_state_goes_on_to_the_same_bits() -> None:
    first, second = (TD3BC(OBSERVATION, ACTION, [4, 5], TD3BCConfig(hidden=(8, 8))) for _ in range(2))
    noise = [torch.zeros(2, ROWS, ACTION)]
    for step in range(3):
        first.update(batch(2, step), None, noise)
    second.load_state_dict(first.state_dict())
    for algorithm in (first, second):
        algorithm.update(batch(2, 9), None, noise)
    assert torch.equal(first.actor.flat, second.actor.flat)
    assert torch.equal(first.critic.flat, second.critic.flat)


def test_actions_stay_within_the_bounds() -> None:
    algorithm = TD3BC(OBSERVATION, ACTION, [0], TD3BCConfig(max_action=0.5))
    assert algorithm.act(100 * torch.randn(1, 50, OBSERVATION)).abs().max() <= 0.5


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="clip_constraint is 3: give 0, 1 or 2"):
        TD3BCConfig(clip_constraint=3)
    with pytest.raises(UserError, match="alpha has 2 values for 3 runs"):
        TD3BC(OBSERVATION, ACTION, [0, 1, 2], TD3BCConfig(alpha=(1.0, 2.0)))
    with pytest.raises(UserError, match="there are no seeds"):
        TD3BC(OBSERVATION, ACTION, [])
