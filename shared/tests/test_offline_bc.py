"""Behaviour cloning: the densities are densities, the written gradients are those of the losses, states go on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.offline.algorithms.base import Batch
from leap_shared.offline.algorithms.bc import BC, BCConfig, gaussian, log_likelihood, mean_action

OBSERVATION, ACTION, ROWS = 5, 2, 12
ROUNDING = 2e-6  # float32 gradients against float64 ones, relative to the largest
POLICIES = ("normal", "truncated", "deterministic")


def batch(runs: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    states, after = torch.randn(2, runs, ROWS, OBSERVATION, generator=g)
    actions = torch.rand(runs, ROWS, ACTION, generator=g) * 2 - 1
    rewards, going, weights = torch.rand(3, runs, ROWS, generator=g)
    return Batch(states, actions, rewards, after, going.round(), 3 * weights)


def one(full: Batch, run: int) -> Batch:
    return Batch(*(part[run : run + 1] for part in full if part is not None))


def double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().double().requires_grad_() for key, value in state.items()}


def mlp(state: dict[str, Tensor], x: Tensor) -> Tensor:
    parts = list(state.values())
    for layer, (weight, bias) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        x = torch.nn.functional.linear(x.relu() if layer else x, weight, bias)
    return x


def density(outputs: Tensor, actions: Tensor, truncated: bool) -> Tensor:
    """Log density as torch.distributions has it, of outputs (mean, spread) before their bounds."""
    mean, spread = outputs.tanh().chunk(2, -1)
    normal = torch.distributions.Normal(mean, (-5 + 0.5 * 5 * (spread + 1)).exp())
    value = normal.log_prob(actions)
    if truncated:
        value = value - (normal.cdf(torch.ones_like(mean)) - normal.cdf(-torch.ones_like(mean))).log()
    return value.sum(-1)


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.floats(0.1, 8.0),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_likelihood_and_its_gradient_are_the_distributions(
    rows: int, width: int, reach: float, truncated: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    outputs = (reach * torch.randn(rows, 2 * width, generator=g, dtype=torch.float64)).requires_grad_()
    actions = torch.rand(rows, width, generator=g, dtype=torch.float64) * 2 - 1
    want = density(outputs, actions, truncated)
    (slope,) = torch.autograd.grad(want.sum(), outputs)
    found, gradient = log_likelihood(outputs.detach(), actions, truncated=truncated)
    torch.testing.assert_close(found, want.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-6 * (1 + slope.abs().max().item()))


@pytest.mark.parametrize("spread", [-2.0, 0.0, 1.0, 5.0])
@pytest.mark.parametrize("location", [-4.0, 0.3, 2.0])
def test_truncated_density_integrates_to_one_and_has_the_mean_that_is_acted(location: float, spread: float) -> None:
    outputs = torch.tensor([location, spread], dtype=torch.float64)
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[:, None]
    p = log_likelihood(outputs.expand(len(grid), 2), grid, truncated=True)[0].exp()
    assert torch.trapezoid(p, grid[:, 0]).item() == pytest.approx(1, abs=1e-5)
    mean = torch.trapezoid(p * grid[:, 0], grid[:, 0]).item()
    assert mean_action(outputs, "truncated").item() == pytest.approx(mean, abs=1e-5)


def test_log_deviation_stays_between_its_bounds() -> None:
    mean, log_std = gaussian(torch.tensor([[-50.0, 0.0, 50.0, -50.0, 0.0, 50.0]]))
    assert mean.tolist() == [[-1.0, 0.0, 1.0]]
    assert log_std.tolist() == [[-5.0, -2.5, 0.0]]


@pytest.mark.parametrize("extreme", [-60.0, 60.0])
def test_truncated_likelihood_is_finite_in_float32_at_the_edge_of_the_bounds(extreme: float) -> None:
    outputs = torch.tensor([[extreme, -60.0]])
    for part in (*log_likelihood(outputs, torch.tensor([[-1.0]]), truncated=True), mean_action(outputs, "truncated")):
        assert part.isfinite().all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("reweight", [False, True])
def test_gradients_are_those_of_the_loss(policy: str, reweight: bool) -> None:
    algorithm = BC(OBSERVATION, ACTION, [3], BCConfig(hidden=(16, 16), policy=policy, reweight=reweight))
    state, rows = double(algorithm.export(0)["pi"]), batch(1, 0)
    logs = algorithm.update(rows, None, ())
    s, a, w = rows.observations[0].double(), rows.actions[0].double(), rows.weights[0].double()
    outputs = mlp(state, s)
    if policy == "deterministic":
        each = (outputs.tanh() - a).square().mean(-1)
    else:
        each = -density(outputs, a, policy == "truncated")
    loss = (w * each if reweight else each).mean()
    loss.backward()
    algorithm.policy.flat.copy_(algorithm.policy.gradient)
    for key, found in algorithm.export(0)["pi"].items():
        want = state[key].grad
        assert (found - want).abs().max() <= ROUNDING * (1 + want.abs().max()), key
    assert logs["loss"].item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("hidden", [(8, 8), (256, 256)])
def test_runs_of_one_program_are_single_runs(policy: str, hidden: tuple[int, ...]) -> None:
    config = BCConfig(hidden=hidden, policy=policy, reweight=True)
    together, apart = (
        BC(OBSERVATION, ACTION, [0, 1, 2], config),
        [BC(OBSERVATION, ACTION, [n], config) for n in range(3)],
    )
    for step in range(3):
        rows = batch(3, step)
        together.update(rows, None, ())
        for n, single in enumerate(apart):
            single.update(one(rows, n), None, ())
    for n, single in enumerate(apart):
        for key, value in single.export(0)["pi"].items():
            torch.testing.assert_close(together.export(n)["pi"][key], value, atol=1e-6, rtol=1e-5)


def test_only_the_policy_batch_is_cloned_where_there_is_one() -> None:
    first, second = (BC(OBSERVATION, ACTION, [0], BCConfig(hidden=(8, 8))) for _ in range(2))
    first.update(batch(1, 0), batch(1, 1), ())
    second.update(batch(1, 1), None, ())
    assert torch.equal(first.policy.flat, second.policy.flat)


def test_a_saved_state_goes_on_to_the_same_bits() -> None:
    first, second = (BC(OBSERVATION, ACTION, [4, 5], BCConfig(hidden=(8, 8), policy="truncated")) for _ in range(2))
    for step in range(3):
        first.update(batch(2, step), None, ())
    second.load_state_dict(first.state_dict())
    for algorithm in (first, second):
        algorithm.update(batch(2, 9), None, ())
    assert second.updates == 4
    assert torch.equal(first.policy.flat, second.policy.flat)


@pytest.mark.parametrize(
    ("policy", "names", "outputs"),
    [("normal", ("net.net.1", "net.net.3", "net.net.5"), 2 * ACTION), ("deterministic", ("l1", "l2", "l3"), ACTION)],
)
def test_exported_names_and_shapes_are_the_authors(policy: str, names: tuple[str, ...], outputs: int) -> None:
    algorithm = BC(OBSERVATION, ACTION, [0, 1], BCConfig(hidden=(8, 7), policy=policy))
    state = algorithm.export(1)["pi"]
    widths = (OBSERVATION, 8, 7, outputs)
    shapes = {f"{name}.weight": (widths[n + 1], widths[n]) for n, name in enumerate(names)}
    assert {key: tuple(value.shape) for key, value in state.items() if "weight" in key} == shapes
    assert set(state) == {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")}


@pytest.mark.parametrize("policy", POLICIES)
def test_an_exported_run_acts_the_same_where_it_is_loaded(policy: str) -> None:
    first, second = (BC(OBSERVATION, ACTION, seeds, BCConfig(hidden=(8,), policy=policy)) for seeds in ([1, 2], [3]))
    second.load(0, {name: {k: v.numpy() for k, v in state.items()} for name, state in first.export(1).items()})
    states = torch.randn(2, 4, OBSERVATION, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(second.act(states[1:]), first.act(states)[1:])
    torch.testing.assert_close(first.act(states[1:], slice(1, 2)), first.act(states)[1:])


@pytest.mark.parametrize("policy", ["normal", "truncated"])
def test_log_prob_is_the_density_of_the_chosen_runs(policy: str) -> None:
    algorithm, rows = BC(OBSERVATION, ACTION, [0, 1], BCConfig(hidden=(8, 8), policy=policy)), batch(2, 0)
    outputs = mlp(algorithm.export(1)["pi"], rows.observations[1])
    want = density(outputs, rows.actions[1], policy == "truncated")
    found = algorithm.log_prob(rows.observations[1:], rows.actions[1:], slice(1, 2))
    torch.testing.assert_close(found[0], want, rtol=1e-5, atol=1e-5)


def test_cloning_finds_the_mean_and_the_deviation_of_the_data() -> None:
    algorithm = BC(1, 1, [0, 1], BCConfig(hidden=(32,), learning_rate=1e-2))
    states, ones = torch.ones(2, 2, 1), torch.ones(2, 2)
    actions = torch.tensor([[0.1], [0.5]]).expand(2, -1, -1)
    for _ in range(600):
        algorithm.update(Batch(states, actions, ones, states, ones, ones), None, ())
    likelihood = algorithm.log_prob(states, torch.full_like(states, 0.3))
    torch.testing.assert_close(algorithm.act(states), torch.full((2, 2, 1), 0.3), atol=1e-3, rtol=0)
    best = -math.log(0.2 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(likelihood, torch.full((2, 2), best), atol=1e-3, rtol=0)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UserError, match="policy 'truncate' is unknown: did you mean truncated"):
        BCConfig(policy="truncate")


def test_a_deterministic_policy_has_no_density() -> None:
    algorithm, rows = BC(OBSERVATION, ACTION, [0], BCConfig(hidden=(8,), policy="deterministic")), batch(1, 0)
    with pytest.raises(UserError, match="a deterministic policy has no density: train with policy='normal'"):
        algorithm.log_prob(rows.observations, rows.actions)
