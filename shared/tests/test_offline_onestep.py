"""One-step: the phases follow each other, their gradients are those of the losses, states go on."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.offline.algorithms.base import Batch
from leap_shared.offline.algorithms.onestep import OneStep, OneStepConfig

OBSERVATION, ACTION, ROWS, SAMPLES = 5, 2, 12, 4
ROUNDING = 2e-6  # float32 gradients against float64 ones, relative to the largest
TINY = {"hidden": (8, 8), "samples": SAMPLES}
PHASES = {"behaviour_updates": 3, "q_updates": 4, "policy_updates": 2}


def batch(runs: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    states, after = torch.randn(2, runs, ROWS, OBSERVATION, generator=g)
    actions, next_actions = torch.rand(2, runs, ROWS, ACTION, generator=g) * 2.2 - 1.1
    rewards, going, weights = torch.rand(3, runs, ROWS, generator=g)
    return Batch(states, actions, rewards, after, going.round(), 3 * weights, next_actions)


def one(full: Batch, run: int) -> Batch:
    return Batch(*(None if part is None else part[run : run + 1] for part in full))


def normals(runs: int, seed: int) -> Tensor:
    return torch.randn(runs, SAMPLES, ROWS, ACTION, generator=torch.Generator().manual_seed(seed))


def double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().double().requires_grad_() for key, value in state.items()}


def mlp(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    for layer, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        x = torch.nn.functional.linear(x.relu() if layer else x, weight, bias)
    return x


def heads(state: dict[str, Tensor], *inputs: Tensor) -> list[Tensor]:
    stems = sorted({key.split(".")[0] for key in state})
    groups = [[value for key, value in state.items() if key.startswith(f"{stem}.")] for stem in stems]
    return [mlp(group, torch.cat(inputs, -1))[..., 0] for group in groups]


def least(state: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    return torch.stack(heads(state, *inputs)).amin(0)


def density(outputs: Tensor, actions: Tensor, truncated: bool = False) -> Tensor:
    mean, spread = outputs.tanh().chunk(2, -1)
    normal = torch.distributions.Normal(mean, (-5 + 0.5 * 5 * (spread + 1)).exp())
    value = normal.log_prob(actions)
    if truncated:
        value = value - (normal.cdf(torch.ones_like(mean)) - normal.cdf(-torch.ones_like(mean))).log()
    return value.sum(-1)


def check_gradients(algorithm: OneStep, network: str, state: dict[str, Tensor]) -> None:
    stack = getattr(algorithm, network)
    stack.flat.copy_(stack.gradient)
    for key, found in algorithm.export(0)[network].items():
        want = state[key].grad
        assert want is not None
        assert (found - want).abs().max() <= ROUNDING * (1 + want.abs().max()), key


@pytest.mark.parametrize("reweight", [False, True])
def test_behaviour_gradients_are_those_of_the_likelihood(reweight: bool) -> None:
    algorithm, rows = (
        OneStep(OBSERVATION, ACTION, [3], OneStepConfig(hidden=(16, 16), reweight_eval=reweight)),
        batch(1, 0),
    )
    state = double(algorithm.export(0)["beta"])
    logs = algorithm.update_behaviour(rows)
    likelihood = density(mlp(list(state.values()), rows.observations[0].double()), rows.actions[0].double())
    loss = -(rows.weights[0] * likelihood if reweight else likelihood).mean()
    loss.backward()
    assert logs["behaviour_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.equal(algorithm.pi.flat, algorithm.beta.flat)
    check_gradients(algorithm, "beta", state)


@pytest.mark.parametrize("reweight", [False, True])
@pytest.mark.parametrize(("twins", "compat"), [(False, False), (False, True), (True, False), (True, True)])
def test_q_gradients_are_those_of_the_loss(twins: bool, compat: bool, reweight: bool) -> None:
    config = OneStepConfig(hidden=(16, 16), double=twins, compat=compat, reweight_eval=reweight)
    algorithm, rows = OneStep(OBSERVATION, ACTION, [3], config), batch(1, 0)
    algorithm.q_target.flat.add_(0.1)
    states = {name: double(algorithm.export(0)[name]) for name in ("q", "q_target")}
    logs = algorithm.update_q(rows, follow=False)
    s, a, r, after, going, w, ap = (part[0].double() for part in rows if part is not None)
    ahead = least(states["q" if twins and compat else "q_target"], after, ap).detach()
    errors = [value - (r + 0.99 * going * ahead) for value in heads(states["q"], s, a)]
    loss = torch.stack([(w * error**2 if reweight else error**2).mean() for error in errors]).sum()
    loss.backward()
    assert logs["q_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    check_gradients(algorithm, "q", states["q"])


@pytest.mark.parametrize("reweight", [False, True])
@pytest.mark.parametrize("policy", ["normal", "truncated"])
@pytest.mark.parametrize(("twins", "compat"), [(False, False), (True, False), (True, True)])
def test_policy_gradients_are_those_of_the_weighted_imitation(
    twins: bool, compat: bool, policy: str, reweight: bool
) -> None:
    options = {"double": twins, "compat": compat, "policy": policy, "reweight_improve": reweight}
    config = OneStepConfig(hidden=(16, 16), temperature=3.0, largest_weight=1.5, **options)
    algorithm, rows, samples = OneStep(OBSERVATION, ACTION, [3], config), batch(1, 0), normals(1, 1)
    algorithm.q.flat.mul_(3)  # so that some weights reach their bound
    algorithm.q_target.flat.copy_(algorithm.q.flat).mul_(1.1)
    states = {name: double(state) for name, state in algorithm.export(0).items()}
    logs = algorithm.update_policy(rows, samples)
    s, a, w = rows.observations[0].double(), rows.actions[0].double(), rows.weights[0].double()
    q = states["q_target" if twins and compat else "q"]
    baseline = torch.stack([least(q, s, sample.double()) for sample in samples[0]]).mean(0)
    advantage = least(q, s, a) - baseline
    weights = (3.0 * advantage).exp().clamp(0, 1.5).detach()
    assert (weights == 1.5).any()
    assert (weights < 1.5).any()
    outputs = mlp(list(states["pi"].values()), s)
    likelihood = density(outputs, a.clamp(-1 + 1e-4, 1 - 1e-4), policy == "truncated")
    loss = -((weights * w if reweight else weights) * likelihood).mean()
    loss.backward()
    assert logs["policy_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert logs["advantage"].item() == pytest.approx(advantage.mean().item(), rel=1e-4)
    check_gradients(algorithm, "pi", states["pi"])


def test_phases_follow_each_other_and_only_theirs_moves() -> None:
    algorithm = OneStep(OBSERVATION, ACTION, [0], OneStepConfig(**TINY, **PHASES))
    moves = {"behaviour": {"beta", "pi"}, "q": {"q"}, "policy": {"pi"}}
    seen = []
    for step in range(9):
        phase, left = algorithm.phase, algorithm.same_for()
        seen.append((phase, left if left < sys.maxsize else None))
        before = {name: getattr(algorithm, name).flat.clone() for name in ("beta", "pi", "q")}
        noise = algorithm.noise(ROWS, torch.Generator().manual_seed(step))
        assert bool(noise) == algorithm.wants_policy_batch() == (phase == "policy")
        algorithm.update(batch(1, step), None, noise)
        moved = {name for name, flat in before.items() if not torch.equal(flat, getattr(algorithm, name).flat)}
        assert moved == moves[phase]
    wanted = (
        [("behaviour", left) for left in (3, 2, 1)] + [("q", left) for left in (4, 3, 2, 1)] + [("policy", None)] * 2
    )
    assert seen == wanted
    assert OneStepConfig(**PHASES).updates == 9


def test_the_target_moves_after_every_second_update_of_its_phase() -> None:
    algorithm, moved = OneStep(OBSERVATION, ACTION, [0], OneStepConfig(**TINY, **PHASES)), []
    for step in range(7):
        before = algorithm.q_target.flat.clone()
        algorithm.update(batch(1, step), None, ())
        moved.append(not torch.equal(before, algorithm.q_target.flat))
    assert moved == [False] * 4 + [True, False, True]


def test_only_the_policy_phase_takes_the_policy_batch() -> None:
    first, second = (OneStep(OBSERVATION, ACTION, [0], OneStepConfig(**TINY, **PHASES)) for _ in range(2))
    for step in range(9):
        noise = first.noise(ROWS, torch.Generator().manual_seed(step))
        first.update(batch(1, 2 * step), batch(1, 2 * step + 1), noise)
        second.update(batch(1, 2 * step + (step >= 7)), None, noise)
    for name in ("beta", "q", "pi"):
        assert torch.equal(getattr(first, name).flat, getattr(second, name).flat)


def test_samples_are_those_of_the_behaviour_policy() -> None:
    algorithm, rows = OneStep(OBSERVATION, ACTION, [0, 1], OneStepConfig(**TINY)), batch(2, 0)
    noise = 3 * normals(2, 0)
    samples = algorithm.samples(rows.observations, noise)
    mean, spread = mlp(list(algorithm.export(1)["beta"].values()), rows.observations[1]).tanh().chunk(2, -1)
    torch.testing.assert_close(samples[1], mean + noise[1] * (-5 + 2.5 * (spread + 1)).exp())


@pytest.mark.parametrize(("hidden", "twins"), [((8, 8), False), ((8, 8), True), ((256, 256), True)])
def test_runs_of_one_program_are_single_runs_with_their_own_settings(hidden: tuple[int, ...], twins: bool) -> None:
    options = {"hidden": hidden, "samples": SAMPLES, "double": twins, **PHASES}
    temperatures = (0.5, 1.0, 3.0)
    together = OneStep(OBSERVATION, ACTION, [0, 1, 2], OneStepConfig(temperature=temperatures, **options))
    apart = [OneStep(OBSERVATION, ACTION, [n], OneStepConfig(temperature=temperatures[n], **options)) for n in range(3)]
    for step in range(9):
        rows, noise = batch(3, step), normals(3, step)
        together.update(rows, None, [noise])
        for n, single in enumerate(apart):
            single.update(one(rows, n), None, [noise[n : n + 1]])
    for n, single in enumerate(apart):
        for name, state in single.export(0).items():
            for key, value in state.items():
                torch.testing.assert_close(together.export(n)[name][key], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cut", [2, 5, 8])
def test_a_saved_state_goes_on_to_the_same_bits(cut: int) -> None:
    first, second = (OneStep(OBSERVATION, ACTION, [4, 5], OneStepConfig(**TINY, **PHASES)) for _ in range(2))
    for step in range(cut):
        first.update(batch(2, step), None, [normals(2, step)])
    second.load_state_dict(first.state_dict())
    for algorithm in (first, second):
        for step in range(cut, 10):
            algorithm.update(batch(2, step), None, [normals(2, step)])
    for name in ("beta", "q", "q_target", "pi"):
        assert torch.equal(getattr(first, name).flat, getattr(second, name).flat)


@pytest.mark.parametrize(
    ("twins", "stems"), [(False, ("net.net",)), (True, ("net1.net", "net2.net"))], ids=["single", "twins"]
)
def test_exported_names_are_the_authors_and_load_elsewhere(twins: bool, stems: tuple[str, ...]) -> None:
    first, second = (
        OneStep(OBSERVATION, ACTION, seeds, OneStepConfig(double=twins, **TINY)) for seeds in ([1, 2], [3])
    )
    states = first.export(1)
    leaves = [f"{layer}.{leaf}" for layer in (1, 3, 5) for leaf in ("weight", "bias")]
    assert list(states["q_target"]) == list(states["q"]) == [f"{stem}.{leaf}" for stem in stems for leaf in leaves]
    assert list(states["pi"]) == list(states["beta"]) == [f"net.net.{leaf}" for leaf in leaves]
    second.load(0, states)
    for name, state in second.export(0).items():
        for key, value in state.items():
            assert torch.equal(value, states[name][key])


@pytest.mark.parametrize("policy", ["normal", "truncated"])
def test_actions_are_the_means_of_the_policy(policy: str) -> None:
    algorithm = OneStep(OBSERVATION, ACTION, [0, 1], OneStepConfig(policy=policy, **TINY))
    states = torch.randn(2, 3, OBSERVATION, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(-1, 1, 4001)[:, None].expand(-1, ACTION)
    outputs = mlp(list(algorithm.export(1)["pi"].values()), states[1])
    for row, action in zip(outputs, algorithm.act(states[1:], slice(1, 2))[0], strict=True):
        mean, spread = row.tanh().chunk(2)
        p = torch.distributions.Normal(mean, (2.5 * spread - 2.5).exp()).log_prob(grid).exp()
        want = (p * grid).sum(0) / p.sum(0) if policy == "truncated" else mean
        torch.testing.assert_close(action, want, atol=1e-3, rtol=0)


def test_a_batch_without_next_actions_is_refused() -> None:
    algorithm = OneStep(OBSERVATION, ACTION, [0], OneStepConfig(**TINY))
    with pytest.raises(UserError, match="the batch has no next_actions: make it by Rows"):
        algorithm.update_q(batch(1, 0)._replace(next_actions=None), follow=True)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="policy 'deterministic' is unknown: give normal or truncated"):
        OneStepConfig(policy="deterministic")
    with pytest.raises(UserError, match="q_updates is -1: give a number of updates, or 0"):
        OneStepConfig(q_updates=-1)
    with pytest.raises(UserError, match="samples is 0: give at least 1"):
        OneStepConfig(samples=0)
    with pytest.raises(UserError, match="temperature has 2 values for 3 runs"):
        OneStep(OBSERVATION, ACTION, [0, 1, 2], OneStepConfig(temperature=(1.0, 2.0), **TINY))
