"""Trainers: what is drawn and weighed where, what resumes, what the report says, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import walk

from leap_oper import Priorities, Trainer, oper_r
from leap_oper.pages import write_report
from leap_oper.report import Report, collect, corl_scores, summarise
from leap_shared.errors import UserError
from leap_shared.offline.policies import Policies
from leap_shared.testing.operators import without_type_checks

SMALL: dict[str, Any] = {"steps": 6, "every": 3, "seeds": (0, 1), "batch_size": 16, "hidden": (8, 8), "device": "cpu"}
ALGORITHMS = ("bc", "td3bc", "onestep", "cql", "iql")


def small(name: str) -> dict[str, Any]:
    more = {"cql": {"critic_hidden": (8, 8), "samples": 2}, "onestep": {"samples": 2}}
    return SMALL | more.get(name, {})


def last_rows(data: Any, count: int) -> Priorities:
    """Only the last `count` rows can be drawn."""
    weights = np.zeros(len(data))
    weights[-count:] = 1
    return Priorities(weights, {"method": "last", "fingerprint": data.fingerprint})


def seen(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """The critic's and the policy's batches of a training."""
    batches: list[tuple[Any, Any]] = []
    update = trainer.algorithm.update

    def spy(batch: Any, policy: Any, noise: Any) -> Any:
        batches.append((batch, policy))
        return update(batch, policy, noise)

    monkeypatch.setattr(trainer.algorithm, "update", spy)
    trainer.train()
    return batches


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains_all_seeds_and_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    data = walk(10)
    whole = Trainer(name, data, priorities=oper_r(data), decouple=True, **small(name))
    whole.train()
    half = Trainer(name, data, priorities=oper_r(data), decouple=True, out=tmp_path, **small(name))

    def stop(count: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half.train(progress=stop)
    rest = Trainer(name, data, priorities=oper_r(data), decouple=True, out=tmp_path, **small(name))
    rest.train()
    for run in (0, 1):
        for net, state in whole.algorithm.export(run).items():
            for key, value in state.items():
                assert torch.equal(value, rest.algorithm.export(run)[net][key]), f"{net}.{key}"
    states = np.zeros((2, 4, data.observations.shape[1]), np.float32)
    loaded = Policies.load(tmp_path / "policies.safetensors")
    np.testing.assert_allclose(loaded.act(states), rest.policies.act(states), atol=1e-6)


def test_decoupled_training_prioritises_the_policys_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = walk(10)
    weights = last_rows(data, 5)
    rare = set(data.observations[-5:, 0].tolist())
    trainer = Trainer("td3bc", data, priorities=weights, decouple=True, normalise=False, **SMALL)
    for step, (critic, policy) in enumerate(seen(trainer, monkeypatch)):
        assert not set(critic.observations[..., 0].flatten().tolist()) <= rare
        assert (policy is None) == (step % 2 == 0)
        assert policy is None or set(policy.observations[..., 0].flatten().tolist()) <= rare


def test_plain_resampling_prioritises_every_term(monkeypatch: pytest.MonkeyPatch) -> None:
    data = walk(10)
    rare = set(data.observations[-5:, 0].tolist())
    trainer = Trainer("td3bc", data, priorities=last_rows(data, 5), normalise=False, **SMALL)
    for critic, policy in seen(trainer, monkeypatch):
        assert set(critic.observations[..., 0].flatten().tolist()) <= rare
        assert policy is None
        assert (critic.weights == 1).all()


@pytest.mark.parametrize("decouple", [False, True])
def test_reweighting_draws_uniformly_and_weighs_the_losses(decouple: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = walk(10)
    weights = oper_r(data)
    by_state = dict(zip(data.observations[:, 0].tolist(), weights.weights.tolist(), strict=True))
    options = {"mode": "reweight", "decouple": decouple, "normalise": False}
    trainer = Trainer("td3bc", data, priorities=weights, **SMALL, **options)
    config = trainer.algorithm.config
    assert (config.reweight_eval, config.reweight_improve, config.reweight_constraint) == (not decouple, True, True)
    for critic, policy in seen(trainer, monkeypatch):
        wanted = [[by_state[x] for x in row] for row in critic.observations[..., 0].tolist()]
        np.testing.assert_allclose(critic.weights, wanted, rtol=1e-6)
        assert policy is None


def test_rows_without_a_next_action_are_never_drawn_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    data = walk(10)
    following = dict(zip(data.observations[:-1, 0].tolist(), data.actions[1:, 0].tolist(), strict=True))
    cut = set(data.observations[data.ends & ~data.terminals, 0].tolist())
    trainer = Trainer("onestep", data, normalise=False, **small("onestep"))
    for batch, _ in seen(trainer, monkeypatch):
        states, actions = batch.observations[..., 0].flatten().tolist(), batch.next_actions[..., 0].flatten().tolist()
        assert not cut & set(states)
        going = batch.not_terminal.flatten().tolist()
        assert all(following[s] == a for s, a, goes in zip(states, actions, going, strict=True) if goes)


def test_seeds_may_have_their_own_data_priorities_and_settings() -> None:
    sets = [walk(10), walk(12)]
    trainer = Trainer("td3bc", sets, priorities=[None, oper_r(sets[1])], **(SMALL | {"alpha": (1.0, 4.0)}))
    trainer.train()
    assert trainer.label == "oper_r and uniform resample"


def test_lengths_follow_from_the_steps() -> None:
    data = walk(10)
    assert Trainer("iql", data, **SMALL).algorithm.config.schedule_steps == 6
    phases = Trainer("onestep", data, **(small("onestep") | {"steps": 260})).algorithm.config
    assert (phases.behaviour_updates, phases.q_updates, phases.policy_updates) == (50, 200, 10)


def test_evaluations_in_simulation_are_told_by_the_report(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    import leap_oper as lo

    states = generator.normal(size=(60, 3))
    data = lo.from_arrays(states, generator.uniform(-1, 1, (60, 1)), np.ones(60), states, np.zeros(60))
    trainer = Trainer("bc", data, environment="Pendulum-v1", episodes=2, out=tmp_path, **SMALL)
    trainer.train()
    report = Report.read(tmp_path)
    assert report == trainer.report()
    assert report.updates == [3, 6]
    assert report.unit == "return"
    assert (report.final < 0).all()
    assert f"mean {report.final.mean():.1f}" in str(report)


def test_the_evaluation_may_be_your_own() -> None:
    trainer = Trainer("bc", walk(10), evaluate=lambda t: {"returns": [1.0, float(t.algorithm.updates)]}, **SMALL)
    trainer.train()
    assert trainer.report().returns == [[1.0, 3.0], [1.0, 6.0]]


def report(label: str, task: str, final: list[float], algorithm: str = "td3bc") -> Report:
    seeds = list(range(len(final)))
    return Report(algorithm, label, task, seeds, [1, 2], [[0.0] * len(final), final])


def test_scores_are_normalised_where_the_task_is_known() -> None:
    known = report("uniform", "hopper-medium-v2", [-20.272305, 3234.3])
    assert known.unit == "D4RL"
    np.testing.assert_allclose(known.curve[-1], [0, 100], atol=0.01)
    assert report("uniform", "Hopper-v5", [0.0]).unit == "v5, D4RL reference range"


def test_the_final_score_is_the_mean_of_the_last_ten_evaluations() -> None:
    curve = [[float(k)] for k in range(20)]
    assert Report("bc", "uniform", "", [0], list(range(20)), curve).final == pytest.approx([14.5])


def test_methods_are_compared_with_uniform_sampling_on_the_same_tasks() -> None:
    runs = [report("uniform", "hopper-medium-v2", [0.0, 100.0]), report("oper-r", "hopper-medium-v2", [1000.0, 1100.0])]
    rows = {row["method"]: row for row in summarise(runs)}
    assert rows["uniform"]["improvement"] is None
    assert rows["oper-r"]["improvement"] == 1.0
    assert rows["oper-r"]["CORL last"] == list(corl_scores("hopper-medium-v2", "td3bc")["last"])


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    one = report("uniform", "", [3.0])
    assert "one seed: no interval" in str(one)
    (tmp_path / "result.json").write_text(json.dumps(one.to_json()))
    assert write_report([tmp_path], tmp_path / "out")[0]["iqm interval"] is None
    assert "1.5 (one seed)" in (tmp_path / "out" / "report.md").read_text()


def test_several_tasks_get_a_row_of_their_own() -> None:
    runs = [report("uniform", task, [100.0, 200.0]) for task in ("hopper-medium-v2", "walker2d-medium-v2")]
    assert [row["task"] for row in summarise(runs)] == ["hopper-medium-v2", "walker2d-medium-v2", "2 tasks"]


def test_scores_from_other_environments_stand_beside_no_published_ones() -> None:
    known = Report("td3bc", "uniform", "hopper-medium-v2", [0], [1], [[100.0]], environment="Hopper-v5")
    assert known.unit == "Hopper-v5, D4RL reference range"
    assert "CORL last" not in summarise([known])[0]


def test_corls_scores_stand_beside_ours_where_the_task_is_the_same() -> None:
    assert corl_scores("halfcheetah-medium-v2", "bc")["last"] == (42.40, 0.19)
    assert corl_scores("Hopper-v5", "td3bc") == {}
    assert corl_scores("halfcheetah-medium-v2", "onestep") == {}


def test_a_report_of_folders_is_one_page_with_pictures(tmp_path: Path) -> None:
    for number, label in enumerate(("uniform", "oper-r")):
        folder = tmp_path / "runs" / str(number)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(report(label, "x<y>", [1.0, 2.0]).to_json()))
    rows = write_report([tmp_path / "runs"], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert len(rows) == 2
    assert "x&lt;y&gt;" in page
    assert page.count("data:image/png") == 1
    assert "| td3bc | oper-r | x<y> |" in (tmp_path / "out" / "report.md").read_text()


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no result\.json in"):
        collect([tmp_path])
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="is no result of a training run"):
        collect([tmp_path])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": "td3"}, "algorithm 'td3' is unknown: did you mean td3bc"),
        ({"mode": "both"}, "mode 'both' is unknown"),
        ({"sampler": "reference"}, "sampler 'reference' is unknown: known: alias, cdf"),
        ({"alhpa": 1.0}, "has no field 'alhpa': did you mean alpha"),
        ({"reweight_eval": True}, "resample and reweight exclude each other"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"environment": "Hoper-v5"}, "did you mean Hopper"),
        ({"environment": "Pendulum-v1"}, r"widths \(3, 1\), the data \(2, 1\)"),
        ({"task": "hoper-medium-v2"}, "did you mean hopper-medium-v2"),
        ({"seeds": ()}, "give at least 1 of each"),
        ({"priorities": Priorities(np.ones(7))}, "7 weights for 300 rows"),
        ({"priorities": [None]}, "1 priorities for 2 seeds"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], words: str) -> None:
    data = walk(30)
    options = {"algorithm": "td3bc", "priorities": oper_r(data), **SMALL, **changes}
    with pytest.raises(UserError, match=words):
        Trainer(options.pop("algorithm"), data, **options)


@pytest.mark.parametrize("changes", [{"normalise": True}, {"rewards": lambda data: data.rewards - 1}])
def test_a_run_is_not_continued_on_other_rewards_or_states(changes: dict[str, Any], tmp_path: Path) -> None:
    Trainer("bc", walk(10), out=tmp_path, **SMALL).train()
    with pytest.raises(UserError, match="another run"):
        Trainer("bc", walk(10), out=tmp_path, **SMALL, **changes).train()


def test_weights_of_one_seed_can_weigh_the_losses() -> None:
    data = walk(10)
    one = Priorities(oper_r(data).weights[None], {"fingerprint": data.fingerprint})
    Trainer("td3bc", data, priorities=one, mode="reweight", **SMALL).train()


def test_a_batch_larger_than_the_data_warns() -> None:
    with pytest.warns(UserWarning, match="a batch of 200 is drawn from 100 rows"):
        Trainer("bc", walk(10), **(SMALL | {"batch_size": 200}))


def test_a_run_is_not_started_anew_over_another(tmp_path: Path) -> None:
    Trainer("bc", walk(10), out=tmp_path, **SMALL).train()
    with pytest.raises(UserError, match="holds a run already"):
        Trainer("bc", walk(10), out=tmp_path, **SMALL).train(resume=False)
    with pytest.raises(UserError, match="another run"):
        Trainer("bc", walk(10), out=tmp_path, **(SMALL | {"learning_rate": 1.0})).train()


@pytest.mark.slow
def test_a_compiled_update_trains_as_the_written_one_does() -> None:
    """Fused operations round otherwise: float32 after six updates."""
    data = walk(10)
    plain = Trainer("td3bc", data, priorities=oper_r(data), decouple=True, **SMALL)
    fused = Trainer("td3bc", data, priorities=oper_r(data), decouple=True, compile=True, **SMALL)
    plain.train()
    with without_type_checks():
        fused.train()
    for net, state in plain.algorithm.export(0).items():
        for key, value in state.items():
            torch.testing.assert_close(fused.algorithm.export(0)[net][key], value, atol=1e-5, rtol=1e-4)
