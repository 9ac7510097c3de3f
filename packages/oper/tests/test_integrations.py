"""Adapters draw by the priorities, hand out the data set's own rows, and work with the real libraries."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning
from data import walk
from numpy.typing import NDArray

from leap_oper import Priorities, integrations, oper_r
from leap_oper.integrations import corl
from leap_shared.errors import UserError
from leap_shared.offline import Transitions, from_d3rlpy

CHI_SQUARE_TOP = 163.6  # 99.99% quantile for 99 degrees of freedom
DRAWS, BATCH = 100_000, 500


def labelled(*, row_weights: Any = None) -> tuple[Transitions, Priorities]:
    """Ten episodes of ten rows, every other ending in a terminal, whose rewards are the row numbers; random weights."""
    base = walk(10, 10)
    terminals = base.timeouts & (np.arange(100) % 20 == 19)
    data = Transitions.from_arrays(
        base.observations, base.actions, np.arange(100), base.next_observations, terminals, base.timeouts & ~terminals
    )
    weights = np.random.default_rng(1).pareto(2.0, 100) if row_weights is None else row_weights
    return data, Priorities(weights, {"fingerprint": data.fingerprint})


def later_half() -> tuple[Transitions, Priorities]:
    return labelled(row_weights=np.repeat([0.0, 1.0], 50))


def d4rl_rows(data: Transitions) -> dict[str, NDArray[Any]]:
    return {key: getattr(data, key).copy() for key in corl.KEYS}


def assert_drawn_by(probs: NDArray[np.float64], rewards: list[Any]) -> None:
    seen = np.bincount(np.concatenate([np.asarray(part).reshape(-1) for part in rewards]).astype(int), minlength=100)
    expected = seen.sum() * probs
    assert np.sum((seen - expected) ** 2 / expected) < CHI_SQUARE_TOP


@pytest.fixture
def d3() -> Any:
    library = pytest.importorskip("d3rlpy")
    with warnings.catch_warnings():  # jaxtyping checks the dataclass of d3rlpy that the adapter derives from
        warnings.filterwarnings("ignore", category=BeartypeDecorHintPep585DeprecationWarning)
        return SimpleNamespace(library=library, adapter=import_module("leap_oper.integrations.d3rlpy"))


@pytest.fixture
def rl() -> Any:
    library = pytest.importorskip("torchrl.data")
    return SimpleNamespace(library=library, adapter=import_module("leap_oper.integrations.torchrl"))


def corl_buffer(data: Transitions, **options: Any) -> corl.ReplayBuffer:
    buffer = corl.ReplayBuffer(2, 1, 1000, **options)
    buffer.load_d4rl_dataset(d4rl_rows(data))
    return buffer


def test_importing_the_package_imports_no_other_library() -> None:
    code = "import sys, leap_oper.integrations; print({'d3rlpy', 'torchrl'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_unknown_adapter_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'rllib'"):
        _ = integrations.rllib


@pytest.mark.parametrize("name", ["d3rlpy", "torchrl"])
def test_missing_library_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"leap_oper.integrations.{name}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delitem(vars(integrations), name, raising=False)
    for known in [known for known in sys.modules if known.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf'{name} cannot be imported.*pip install "leap-oper\[{name}\]"'):
        getattr(integrations, name)


def test_d3rlpy_batches_follow_the_priorities(d3: Any) -> None:
    data, priorities = labelled()
    source = d3.adapter.dataset(data, priorities)
    assert_drawn_by(priorities.probs, [source.sample_transition_batch(BATCH).rewards for _ in range(DRAWS // BATCH)])


def test_d3rlpy_batches_hold_the_rows_of_the_data(d3: Any) -> None:
    data, priorities = labelled()
    batch = d3.adapter.dataset(data, priorities).sample_transition_batch(BATCH)
    rows = batch.rewards[:, 0].astype(int)
    going = ~data.terminals[rows]
    np.testing.assert_array_equal(batch.observations, data.observations[rows])
    np.testing.assert_array_equal(batch.actions, data.actions[rows])
    np.testing.assert_array_equal(batch.next_observations[going], data.next_observations[rows][going])
    np.testing.assert_array_equal(batch.terminals[:, 0], ~going)
    inside = ~data.ends[rows]
    np.testing.assert_array_equal(batch.next_actions[inside], data.actions[rows[inside] + 1])


def test_d3rlpy_batches_are_what_d3rlpy_makes_of_the_same_transitions(d3: Any) -> None:
    batch = d3.adapter.dataset(*labelled()).sample_transition_batch(BATCH)
    own = d3.library.dataset.TransitionMiniBatch.from_transitions(batch.transitions)
    assert {True, False} == {*(batch.terminals[:, 0] > 0)}
    for key in ("observations", "actions", "rewards", "next_observations", "next_actions", "terminals", "intervals"):
        np.testing.assert_array_equal(getattr(batch, key), getattr(own, key), key)


def test_d3rlpy_episodes_are_the_data(d3: Any) -> None:
    data, priorities = labelled()
    source = d3.adapter.dataset(data, priorities)
    again = from_d3rlpy(source)
    assert source.size() == 10
    assert source.transition_count == sum(len(episode) for episode in source.episodes) == 100
    for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
        np.testing.assert_array_equal(getattr(again, key), getattr(data, key), key)
    going = ~data.terminals  # d3rlpy keeps no state after a terminal
    np.testing.assert_array_equal(again.next_observations[going], data.next_observations[going])


def test_d3rlpy_reads_what_was_dumped(d3: Any, tmp_path: Path) -> None:
    source = d3.adapter.dataset(*labelled())
    with (tmp_path / "dump.h5").open("w+b") as file:
        source.dump(file)
        again = d3.library.dataset.ReplayBuffer.load(file, d3.library.dataset.InfiniteBuffer())
    assert again.transition_count == 100
    for own, other in zip(source.episodes, again.episodes, strict=True):
        np.testing.assert_array_equal(own.observations, other.observations)
        assert own.transition_count == other.transition_count


def test_d3rlpy_evaluates_an_episode_of_one_window_cut_by_time(d3: Any) -> None:
    data = walk(2, 1024)
    source = d3.adapter.dataset(data, oper_r(data))
    algorithm = d3.library.algos.TD3PlusBCConfig().create()
    algorithm.build_with_dataset(source)
    assert np.isfinite(d3.library.metrics.TDErrorEvaluator()(algorithm, source))


def test_d3rlpy_uniform_twin_ignores_the_weights(d3: Any) -> None:
    source = d3.adapter.dataset(*later_half())
    assert source.sample_transition_batch(BATCH).rewards.min() >= 50
    assert_drawn_by(np.full(100, 0.01), [source.uniform().sample_transition_batch(DRAWS).rewards])


def test_d3rlpy_picker_of_several_steps_keeps_its_intervals(d3: Any) -> None:
    data, priorities = labelled()
    picker = d3.library.dataset.MultiStepTransitionPicker(n_steps=3, gamma=0.5)
    rows = d3.adapter.dataset(data, priorities, 7).sample_transition_batch(BATCH).rewards[:, 0]
    batch = d3.adapter.dataset(data, priorities, 7, transition_picker=picker).sample_transition_batch(BATCH)
    steps = np.minimum(3, 10 - rows % 10)
    np.testing.assert_array_equal(batch.intervals[:, 0], steps)
    sums = sum(np.where(steps > k, 0.5**k * (rows + k), 0) for k in range(3))
    np.testing.assert_allclose(batch.rewards[:, 0], sums)


def test_d3rlpy_trajectories_end_in_drawn_rows(d3: Any) -> None:
    source = d3.adapter.dataset(*later_half())
    batch = source.sample_trajectory_batch(50, 5)
    assert batch.rewards[:, -1].min() >= 50


def test_d3rlpy_draws_depend_on_the_seed_alone(d3: Any) -> None:
    draws = [d3.adapter.dataset(*labelled(), seed).draw(BATCH) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def test_d3rlpy_clone_does_what_the_drawn_rows_do(d3: Any) -> None:
    random = np.random.default_rng(0)
    good = np.arange(400) % 2 == 0
    actions = np.where(good, 0.8, -0.8)[:, None]
    states = random.standard_normal((401, 2))
    data = Transitions.from_arrays(states[:-1], actions, np.zeros(400), states[1:], np.zeros(400), np.ones(400))
    algorithm = d3.library.algos.BCConfig(learning_rate=1e-2, batch_size=32).create()
    fit(d3, algorithm, d3.adapter.dataset(data, Priorities(good.astype(float))), 60)
    assert algorithm.predict(data.observations[:20]).min() > 0.5


def fit(d3: Any, algorithm: Any, source: Any, updates: int, **options: Any) -> list[tuple[int, dict[str, float]]]:
    quiet = {"show_progress": False, "logger_adapter": d3.library.logging.NoopAdapterFactory()}
    result: list[Any] = algorithm.fit(source, n_steps=updates, n_steps_per_epoch=updates, **quiet, **options)
    return result


@pytest.mark.parametrize("name", ["TD3PlusBC", "IQL", "CQL", "AWAC"])
def test_d3rlpy_algorithms_fit_with_scalers_and_evaluators(name: str, d3: Any) -> None:
    preprocessing = d3.library.preprocessing
    config = getattr(d3.library.algos, f"{name}Config")(
        batch_size=16,
        observation_scaler=preprocessing.StandardObservationScaler(),
        action_scaler=preprocessing.MinMaxActionScaler(minimum=-1.0, maximum=1.0),
        reward_scaler=preprocessing.ReturnBasedRewardScaler(),
    )
    data, priorities = labelled()
    algorithm = config.create()
    evaluators = {"error": d3.library.metrics.TDErrorEvaluator()}
    ((_, metrics),) = fit(d3, algorithm, d3.adapter.dataset(data, priorities), 3, evaluators=evaluators)
    assert np.isfinite([*metrics.values()]).all()
    np.testing.assert_allclose(config.observation_scaler.mean, data.observations.mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("name", ["TD3PlusBC", "IQL"])
def test_decoupled_d3rlpy_actor_alone_sees_prioritised_rows(
    name: str, d3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = d3.adapter.dataset(*later_half())
    algorithm = getattr(d3.library.algos, f"{name}Config")(batch_size=64).create()
    uniform = d3.adapter.decouple(algorithm, source)
    seen: dict[str, list[float]] = {"actor": [], "critic": []}
    for part, rewards in seen.items():
        inner = getattr(algorithm.impl, f"compute_{part}_loss")

        def spy(batch: Any, other: Any, inner: Any = inner, rewards: list[float] = rewards) -> Any:
            rewards.extend(batch.rewards.flatten().tolist())
            return inner(batch, other)

        monkeypatch.setattr(algorithm.impl, f"compute_{part}_loss", spy)
    fit(d3, algorithm, uniform, 6)
    assert min(seen["actor"]) >= 50
    assert min(seen["critic"]) < 10


def test_decoupling_scales_the_actors_batch_as_the_critics(d3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = labelled()
    scaler = d3.library.preprocessing.StandardObservationScaler()
    algorithm = d3.library.algos.TD3PlusBCConfig(batch_size=4000, observation_scaler=scaler).create()
    uniform = d3.adapter.decouple(algorithm, d3.adapter.dataset(data, Priorities(np.ones(100))))
    means, inner = [], algorithm.impl.compute_actor_loss

    def spy(batch: Any, action: Any) -> Any:
        means.append(batch.observations.mean(dim=0))
        return inner(batch, action)

    monkeypatch.setattr(algorithm.impl, "compute_actor_loss", spy)
    fit(d3, algorithm, uniform, 2)
    np.testing.assert_allclose(means[0], 0, atol=0.1)


def test_decoupling_twice_takes_the_latter(d3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = d3.adapter.dataset(*labelled()), d3.adapter.dataset(*labelled())
    algorithm = d3.library.algos.TD3PlusBCConfig(batch_size=16).create()
    d3.adapter.decouple(algorithm, first)
    uniform = d3.adapter.decouple(algorithm, second)
    monkeypatch.setattr(first, "sample_transition_batch", lambda _: pytest.fail("the former data set was asked"))
    fit(d3, algorithm, uniform, 2)


@pytest.mark.parametrize("name", ["CQL", "BC"])
def test_decoupling_refuses_what_d3rlpy_does_not_split(name: str, d3: Any) -> None:
    algorithm = getattr(d3.library.algos, f"{name}Config")().create()
    with pytest.raises(UserError, match=f"{name} cannot be decoupled in d3rlpy, only TD3PlusBC and IQL"):
        d3.adapter.decouple(algorithm, d3.adapter.dataset(*labelled()))


def test_d3rlpy_data_set_refuses_to_grow(d3: Any) -> None:
    source = d3.adapter.dataset(*labelled())
    with pytest.raises(UserError, match="priorities are those of a fixed data set"):
        source.append_episode(source.episodes[0])


def test_d3rlpy_refuses_weights_of_other_data(d3: Any) -> None:
    with pytest.raises(UserError, match="made for other data"):
        d3.adapter.dataset(walk(seed=1), oper_r(walk()))


def test_torchrl_batches_follow_the_priorities(rl: Any) -> None:
    data, priorities = labelled()
    buffer = rl.adapter.replay_buffer(data, priorities, 100)
    assert_drawn_by(priorities.probs, [buffer.sample()["next", "reward"] for _ in range(DRAWS // 100)])


def test_torchrl_batches_hold_the_rows_of_their_indices(rl: Any) -> None:
    data, priorities = labelled()
    batch = rl.adapter.replay_buffer(data, priorities, 64).sample()
    rows = batch["index"].numpy()
    assert batch.batch_size == torch.Size([64])
    np.testing.assert_array_equal(batch["observation"], data.observations[rows])
    np.testing.assert_array_equal(batch["action"], data.actions[rows])
    following = {
        "observation": data.next_observations[rows],
        "reward": data.rewards[rows, None],
        "done": data.ends[rows, None],
        "terminated": data.terminals[rows, None],
        "truncated": data.timeouts[rows, None],
    }
    for key, expected in following.items():
        np.testing.assert_array_equal(batch["next", key], expected, key)
    np.testing.assert_allclose(batch["_weight"], priorities.weights[rows], rtol=1e-6)


def test_torchrl_losses_do_not_count_the_weights_again(rl: Any) -> None:
    batch = rl.adapter.replay_buffer(*labelled(), 64).sample()
    assert "_weight" in batch.keys()  # noqa: SIM118 - a tensordict is no dict
    assert "priority_weight" not in batch.keys()  # noqa: SIM118


def test_torchrl_sampler_serves_a_storage_of_the_user(rl: Any) -> None:
    data, priorities = later_half()
    storage = rl.library.LazyTensorStorage(100)
    buffer = rl.library.TensorDictReplayBuffer(storage=storage, sampler=rl.adapter.sampler(priorities), batch_size=256)
    buffer.extend(rl.adapter.storage(data).get(range(100)))
    assert buffer.sample()["next", "reward"].min() >= 50


def test_torchrl_uniform_sampler_ignores_the_weights(rl: Any) -> None:
    data, priorities = later_half()
    sampler = rl.adapter.sampler(priorities, uniform=True)
    buffer = rl.library.TensorDictReplayBuffer(storage=rl.adapter.storage(data), sampler=sampler, batch_size=DRAWS)
    assert_drawn_by(np.full(100, 0.01), [buffer.sample()["next", "reward"]])


def test_torchrl_buffer_goes_on_from_its_state(rl: Any) -> None:
    first, second = (rl.adapter.replay_buffer(*labelled(), 64, seed=seed) for seed in (1, 2))
    first.sample()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.sample()["index"], second.sample()["index"])


def test_torchrl_sampler_goes_on_from_its_files(rl: Any, tmp_path: Path) -> None:
    first, second = (rl.adapter.replay_buffer(*labelled(), 64, seed=seed) for seed in (1, 2))
    first.sample()
    first.dumps(tmp_path)
    second.loads(tmp_path)
    assert torch.equal(first.sample()["index"], second.sample()["index"])


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_torchrl_sampler_names_a_folder_without_its_state(content: bytes | None, rl: Any, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "leap_oper_sampler.npz").write_bytes(content)
    with pytest.raises(UserError, match="holds no state of this sampler"):
        rl.adapter.sampler(labelled()[1]).loads(tmp_path)


def test_torchrl_sampler_draws_from_the_buffers_generator(rl: Any) -> None:
    data, priorities = labelled()
    draws = []
    for seed in (3, 4):
        sampler, generator = rl.adapter.sampler(priorities, seed), torch.Generator().manual_seed(5)
        options = {"storage": rl.adapter.storage(data), "sampler": sampler, "generator": generator}
        draws.append(rl.library.TensorDictReplayBuffer(**options, batch_size=64).sample()["index"])
    assert torch.equal(*draws)


def test_torchrl_buffer_refuses_to_grow(rl: Any) -> None:
    buffer = rl.adapter.replay_buffer(*labelled(), 64)
    with pytest.raises(RuntimeError, match="doesn't allow writing"):
        buffer.extend(buffer.sample())


def test_torchrl_buffer_warns_of_batches_larger_than_the_data(rl: Any) -> None:
    with pytest.warns(UserWarning, match="100 rows are fewer than a batch of 256"):
        buffer = rl.adapter.replay_buffer(*labelled())
    assert len(buffer.sample()) == 256


def test_torchrl_refuses_weights_of_other_data(rl: Any) -> None:
    with pytest.raises(UserError, match="made for other data"):
        rl.adapter.replay_buffer(walk(seed=1), oper_r(walk()))


def test_torchrl_sampler_refuses_a_storage_of_another_length(rl: Any) -> None:
    storage, sampler = rl.adapter.storage(walk()), rl.adapter.sampler(labelled()[1])
    with pytest.raises(UserError, match="there are 100 weights for 60 rows"):
        sampler.sample(storage, 8)


def test_corl_batches_follow_the_priorities() -> None:
    data, priorities = labelled()
    buffer = corl_buffer(data, priorities=priorities, seed=0)
    assert_drawn_by(priorities.probs, [buffer.sample(1000)[2] for _ in range(100)])


def test_corl_batches_hold_the_rows_of_the_data() -> None:
    data, priorities = labelled()
    states, actions, rewards, after, dones = corl_buffer(data, priorities=priorities).sample(BATCH)
    rows = rewards[:, 0].long().numpy()
    assert rewards.shape == dones.shape == (BATCH, 1)
    np.testing.assert_array_equal(states, data.observations[rows])
    np.testing.assert_array_equal(actions, data.actions[rows])
    np.testing.assert_array_equal(after, data.next_observations[rows])
    np.testing.assert_array_equal(dones[:, 0], data.terminals[rows])


def test_corl_buffer_without_priorities_is_uniform() -> None:
    assert_drawn_by(np.full(100, 0.01), [corl_buffer(labelled()[0], seed=0).sample(DRAWS)[2]])


def test_corl_critics_batches_can_be_uniform() -> None:
    data, priorities = later_half()
    buffer = corl_buffer(data, priorities=priorities)
    assert buffer.sample(BATCH)[2].min() >= 50
    assert_drawn_by(np.full(100, 0.01), [buffer.sample(DRAWS, uniform=True)[2]])


def test_corl_weights_belong_to_uniform_rows() -> None:
    data, priorities = labelled()
    (_, _, rewards, _, _), weights = corl_buffer(data, priorities=priorities, seed=0).sample_weighted(DRAWS)
    assert weights.shape == (DRAWS, 1)
    np.testing.assert_allclose(weights[:, 0], priorities.weights[rewards[:, 0].long().numpy()], rtol=1e-6)
    assert_drawn_by(np.full(100, 0.01), [rewards])


def test_corl_buffer_follows_the_scripts_seed() -> None:
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(corl_buffer(labelled()[0]).sample(64)[2])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_corl_buffer_takes_changed_states_and_rewards_of_the_same_rows() -> None:
    data, priorities = labelled()
    changed = d4rl_rows(data)
    changed["observations"] /= 2
    changed["rewards"] -= 1
    changed["actions"] = changed["actions"].clip(-1 + 1e-5, 1 - 1e-5)
    buffer = corl.ReplayBuffer(2, 1, 100, priorities=priorities, dataset=data)
    buffer.load_d4rl_dataset(changed)
    assert len(buffer) == 100


def test_corl_buffer_refuses_changed_rows_without_the_data_as_it_was() -> None:
    data, priorities = labelled()
    buffer = corl.ReplayBuffer(2, 1, 100, priorities=priorities)
    with pytest.raises(UserError, match=r"made for other data.*give dataset="):
        buffer.load_d4rl_dataset({**d4rl_rows(data), "rewards": data.rewards - 1})


def test_corl_buffer_refuses_rows_that_are_not_those_of_its_data() -> None:
    data, priorities = labelled()
    buffer = corl.ReplayBuffer(2, 1, 100, priorities=priorities, dataset=data)
    with pytest.raises(UserError, match="100 rows are not those of dataset, 100 with other actions"):
        buffer.load_d4rl_dataset({**d4rl_rows(data), "actions": data.actions[::-1]})


def test_corl_buffer_refuses_weights_of_other_data() -> None:
    with pytest.raises(UserError, match="made for other data"):
        corl.ReplayBuffer(2, 1, 100, priorities=oper_r(walk()), dataset=walk(seed=1))


def test_corl_buffer_refuses_more_rows_than_it_was_made_for() -> None:
    with pytest.raises(UserError, match="100 rows do not fit buffer_size=99"):
        corl.ReplayBuffer(2, 1, 99).load_d4rl_dataset(d4rl_rows(labelled()[0]))


def test_corl_buffer_refuses_other_widths() -> None:
    with pytest.raises(UserError, match=r"widths \(2, 1\), the buffer was made for \[3, 1\]"):
        corl.ReplayBuffer(3, 1, 100).load_d4rl_dataset(d4rl_rows(labelled()[0]))


def test_corl_buffer_refuses_a_second_load() -> None:
    buffer = corl_buffer(labelled()[0])
    with pytest.raises(UserError, match="load into a new one"):
        buffer.load_d4rl_dataset(d4rl_rows(labelled()[0]))


def test_corl_buffer_names_a_missing_key() -> None:
    rows = d4rl_rows(labelled()[0])
    rows["terminal"] = rows.pop("terminals")
    with pytest.raises(UserError, match="no 'terminals': did you mean terminal"):
        corl.ReplayBuffer(2, 1, 100).load_d4rl_dataset(rows)


def test_corl_buffer_refuses_to_sample_before_a_load() -> None:
    with pytest.raises(UserError, match="call load_d4rl_dataset first"):
        corl.ReplayBuffer(2, 1, 100).sample(8)


def test_corl_buffer_refuses_to_grow() -> None:
    with pytest.raises(NotImplementedError, match="nothing can be added"):
        corl_buffer(labelled()[0]).add_transition()
