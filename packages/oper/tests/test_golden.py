"""The golden numbers: what the authors' programs computed on small data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import golden_adapter
import numpy as np
import pytest

from leap_shared.testing import fill, golden

FOLDER = Path(__file__).parent / "golden"
DATA = ("observations", "actions", "next_observations", "rewards", "terminals")
WIDTHS = ((256, None), (256, 256), (1, 256))

pytestmark = pytest.mark.golden


def cases(prefix: str) -> Any:
    return pytest.mark.parametrize("case", golden.cases(FOLDER, prefix), ids=lambda case: case.name)


def data_of(case: golden.Case) -> dict[str, Any]:
    return {key: case.arrays[f"in_{key}"] for key in DATA}


def value_state(case: golden.Case, net: str) -> dict[str, Any]:
    """The twin networks' parameters, filled under "<case>/<net>.<key>"."""
    width = case.arrays["in_observations"].shape[1]
    schema: dict[str, Any] = {}
    for layer, (fan_out, fan_in) in enumerate(WIDTHS * 2, 1):
        schema |= {f"l{layer}.weight": ((fan_out, fan_in or width), ""), f"l{layer}.bias": ((fan_out,), "")}
    return filled(case, schema, f"{net}.")


def numbered(case: golden.Case, stem: str) -> list[Any]:
    return [case.arrays[key] for key in sorted(case.arrays) if re.fullmatch(rf"in_{stem}\d+", key)]


def check(case: golden.Case, got: dict[str, Any]) -> None:
    """Every output of the case, at its tolerance; a mean of a digest may differ by the order of its summation."""
    assert set(case["outputs"]) <= set(got)
    for name in case["outputs"]:
        value = got[name].detach() if hasattr(got[name], "detach") else got[name]
        got_flat, want_flat = np.asarray(value).reshape(-1), case.arrays[name].reshape(-1)  # (rows, 1) is (rows,)
        golden.assert_close(got_flat, want_flat, max(case.tolerance, 1e-12), f"{case.name}: {name}")


@cases("dataset")
def test_conversion_of_raw_steps(case: golden.Case) -> None:
    got: dict[str, Any] = {}
    inputs = [case.arrays.get(f"in_{key}") for key in ("observations", "actions", "rewards", "terminals", "timeouts")]
    for on_end in (0, 1):
        data = golden_adapter.convert(*inputs, case["max_episode_steps"], bool(on_end))
        wide = ("observations", "actions", "next_observations")
        got |= {f"toe{on_end}_{key}_digest": golden.digest(data[key]) for key in wide}
        got |= {f"toe{on_end}_{key}": data[key] for key in ("rewards", "terminals")}
        got[f"toe{on_end}_n"] = len(data["rewards"])
    check(case, got)


@cases("returns")
def test_returns_and_normalisation(case: golden.Case) -> None:
    data = data_of(case)
    rewards, following = data["rewards"], data["next_observations"]
    end = golden_adapter.boundaries(data["observations"], following, data["terminals"])
    mean, std = golden_adapter.normalisation(data["observations"])
    got = {"dones_float": end, "norm_mean": mean, "norm_std": std}
    got["returns"] = golden_adapter.episode_returns(rewards, end)
    got["discounted_return_to_go"] = golden_adapter.return_to_go(rewards, end, case["gamma"])
    got["normalised_state_digest"] = golden.digest((data["observations"] - mean) / std)
    got["normalised_next_state_digest"] = golden.digest((following - mean) / std)
    for base in ("0.0", "0.2"):
        weights = golden_adapter.oper_r(rewards, end, float(base))
        got |= {f"oper_r_weights_base{base}": weights, f"oper_r_probs_base{base}": weights / len(weights)}
    for n in {int(found[1]) for name in case["outputs"] if (found := re.match(r"nstep(\d+)_", name))}:
        returns, done, states = golden_adapter.n_step(rewards, following, end, case["gamma"], n)
        got |= {f"nstep{n}_ret": returns, f"nstep{n}_done": done, f"nstep{n}_state_digest": golden.digest(states)}
        got[f"nstep{n}_state_normalised_digest"] = golden.digest((states - mean) / std)
    check(case, got)


@cases("adv")
def test_value_fitting(case: golden.Case) -> None:
    keys = ("n_step", "critic_type", "td_type", "adv_type", "schedule", "schedule_steps", "antmaze", "normalize")
    nets = {net: value_state(case, net) for net in ("value", "value_target")}
    fitted = golden_adapter.oper_a_fit(
        data_of(case), nets, case.arrays["in_indices"], **{key: case[key] for key in keys}
    )
    got = {f"{when}_{key}": fitted[when][key] for when in ("before", "after") for key in ("v", "q", "adv")}
    got |= {f"log_{key}": value for key, value in fitted["log"].items()}
    for net, state in fitted["nets"].items():
        got |= {f"{net}.{key}": golden.digest(value.detach()) for key, value in state.items()}
    check(case, got)


@cases("priority")
def test_weights_of_iterations(case: golden.Case) -> None:
    weights = golden_adapter.oper_a_weights(numbered(case, "adv"), case["scale"], case["std"], case["eps"])
    check(case, {f"weight{i}": w for i, w in enumerate(weights, 1)})


@cases("pipeline")
def test_whole_first_stage(case: golden.Case) -> None:
    keys = ("first_steps", "steps", "iterations", "batch", "n_step", "scale", "seed")
    facts = {key: case[key] for key in keys}
    ran = golden_adapter.oper_a_run(
        data_of(case), value_state(case, "value"), indices=case.arrays["indices"], std=2.0, eps=0.1, **facts
    )
    check(case, {f"weight{i}": w for i, w in enumerate(ran["weights"], 1)} | {"indices": ran["indices"]})


@pytest.mark.filterwarnings("ignore:eps=1.05 raises:UserWarning")
@cases("stage2")
def test_second_stage(case: golden.Case) -> None:
    together = golden_adapter.ensemble(numbered(case, "seed"), case["ensemble"])
    got: dict[str, Any] = {"ensemble": together}
    for variant in case["variants"]:
        given = {key: variant.get(key) for key in ("weight_func", "std", "eps", "eps_max", "branch")}
        probs = golden_adapter.stage2(together, **given, exp_lambd=variant.get("exp_lambd", 1.0))
        got |= {f"{variant['tag']}_probs": probs, f"{variant['tag']}_weights": probs * probs.size}
    check(case, got)


def filled(case: golden.Case, schema: dict[str, Any], prefix: str) -> dict[str, Any]:
    """One network's parameters, filled under "<case>/<prefix><key>"."""
    return {key: fill.parameter(f"{case.name}/{prefix}{key}", shape) for key, (shape, _) in schema.items()}


def with_targets(case: golden.Case, schemas: dict[str, Any]) -> dict[str, Any]:
    names = [f"{net}{suffix}" for net in schemas for suffix in ("", "_target")]
    return {name: filled(case, schemas[name.removesuffix("_target")], f"{name}.") for name in names}


def batches_of(case: golden.Case, stem: str = "batch") -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for name, value in case.arrays.items():
        if match := re.fullmatch(rf"in_{stem}(\d+)_(\w+)", name):
            found.setdefault(int(match[1]), {})[match[2]] = value
    return [found[number] for number in sorted(found)]


def digests(nets: dict[str, Any]) -> dict[str, Any]:
    parts = [(f"{net}.{key}", value) for net, state in nets.items() for key, value in state.items()]
    return {name: golden.digest(value) for name, value in parts}


@cases("td3bc")
def test_td3bc(case: golden.Case) -> None:
    flags = [f"reweight_{name}" for name in ("eval", "improve", "constraint")]
    given = {key: case[key] for key in ("two_sampler", *flags, "clip_constraint", "alpha", "max_action")}
    nets = with_targets(case, case.schema)
    ran = golden_adapter.td3bc(nets, batches_of(case), numbered(case, "noise"), **given)
    check(case, digests(ran["nets"]) | {f"log_{key}": value for key, value in ran["log"].items()})


@pytest.mark.parametrize(
    "case", [c for c in golden.cases(FOLDER, "bc_") if "topn" not in c.facts], ids=lambda c: c.name
)
def test_behaviour_cloning(case: golden.Case) -> None:
    probes = case.arrays["in_probe"], case.arrays["in_probe_a"]
    ran = golden_adapter.bc(filled(case, case.schema, "pi."), batches_of(case), case["dist"], *probes)
    check(case, digests(ran["nets"]) | ran["log"] | {key: ran[key] for key in ("probe_mean", "probe_logprob")})


@cases("bc_top")
def test_the_best_rows(case: golden.Case) -> None:
    states, after, rewards, done = (case.arrays[f"in_{key}"] for key in ("s", "sp", "r", "d"))
    end = golden_adapter.boundaries(states, after, done.reshape(-1))
    returns = golden_adapter.episode_returns(rewards.reshape(-1), end)
    kept = golden_adapter.top_rows(returns, case["topn"])
    got = {"dones_float": end, "returns": returns, "kept": len(kept), "kept_r": rewards.reshape(-1)[kept]}
    check(case, got)


@cases("sarsa")
def test_sarsa(case: golden.Case) -> None:
    nets = with_targets(case, {"q": case.schema})
    ran = golden_adapter.sarsa(nets, batches_of(case), case["double"])
    check(case, digests(ran["nets"]) | ran["log"])


@cases("onestep")
def test_weighted_imitation(case: golden.Case) -> None:
    nets = {net: filled(case, schema, f"{net}.") for net, schema in case.schema.items()}
    ran = golden_adapter.onestep(nets, batches_of(case), numbered(case, "sample"), case["temp"], case["dist"])
    check(case, digests({"pi": ran["nets"]["pi"]}) | ran["log"])


@cases("iql")
def test_iql(case: golden.Case) -> None:
    keys = ("expectile", "temperature", "reweight_eval", "reweight_improve", "actor_schedule_steps")
    given = {key: case[key] for key in keys} | {"probe": case.arrays["in_probe"]}
    state, uniform = filled(case, case.schema, ""), batches_of(case, "uniform") or None
    ran = golden_adapter.iql(state, batches_of(case), uniform, **given)
    got = {key: golden.digest(value) for key, value in ran["state"].items()}
    got |= {f"log_{key}": np.asarray(value) for key, value in ran["log"].items()}
    check(case, got | {"probe_mean_action": ran["probe_mean_action"]})


@cases("sampler")
def test_streams_of_indices(case: golden.Case) -> None:
    count, batch = case.arrays["prioritised"].shape
    prioritised = golden_adapter.sampler_stream(case.arrays["in_p"], batch, case["n_prefetch"], case["seed"], count)
    uniform = golden_adapter.uniform_stream(case["N"], batch, case["seed"], len(case.arrays["uniform"]))
    check(case, {"prioritised": prioritised, "uniform": np.asarray(uniform)})
