"""Data by name, by path, from d3rlpy and from environments."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_offline_minari
from test_offline_d4rl import flags, recording, walk, without, write

from leap_shared.errors import UserError
from leap_shared.offline import from_d3rlpy, from_env, from_steps, load


def test_task_is_loaded_from_its_file_with_its_quirks(tmp_path: Path) -> None:
    steps = without(walk(320), "timeouts")
    write(tmp_path / "door-v0_demos_clipped.hdf5", steps)
    assert 199 not in load("door-human-v0", tmp_path).rewards
    assert 199 in load("door-human-longhorizon-v0", tmp_path).rewards


def test_task_is_loaded_from_a_file_of_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write(tmp_path / "hopper-medium-replay-v2.hdf5", walk())
    assert len(load("hopper-medium-replay-v2")) == 7


def test_options_go_to_the_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", recording([(2, False), (3, True)]))
    assert [len(load(path)), len(load(path, compat="d4rl"))] == [5, 3]


def test_archive_and_minari_are_loaded(tmp_path: Path) -> None:
    data = from_steps(walk())
    data.save(tmp_path / "a.npz")
    assert load(tmp_path / "a.npz").fingerprint == data.fingerprint
    path = test_offline_minari.write(tmp_path, [test_offline_minari.episode(0, 3)])
    for name in ("maze/walk-v0", "maze/walk", path, path.parents[1]):
        assert len(load(name, tmp_path)) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hopper-medium-repaly-v2", "neither a file nor a known data set: did you mean hopper-medium-replay-v2"),
        ("hopper-medium-v2", "has no hopper_medium-v2.hdf5 or hopper-medium-v2.hdf5, the data of hopper-medium-v2"),
        ("none.hdf5", "none.hdf5: there is no such file"),
        ("none.npz", "cannot read transitions from none.npz"),
    ],
)
def test_absent_data_is_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(name, tmp_path)


def d3rlpy_episode(states: list[int], *, terminated: bool, **changes: Any) -> SimpleNamespace:
    steps = len(states)
    given = {
        "observations": np.array(states, np.float32)[:, None],
        "actions": np.zeros((steps, 1), np.float32),
        "rewards": np.ones((steps, 1), np.float32),
    }
    return SimpleNamespace(**{**given, **changes}, terminated=terminated)


def test_d3rlpy_episodes_lose_the_step_without_successor() -> None:
    episodes = [d3rlpy_episode([0, 1, 2], terminated=True), d3rlpy_episode([5, 6, 7], terminated=False)]
    data = from_d3rlpy(SimpleNamespace(episodes=episodes))
    assert data.observations[:, 0].tolist() == [0, 1, 2, 5, 6]
    assert data.next_observations[:, 0].tolist() == [1, 2, 2, 6, 7]
    assert np.flatnonzero(data.terminals).tolist() == [2]
    assert np.flatnonzero(data.timeouts).tolist() == [4]


@pytest.mark.filterwarnings("ignore")
def test_d3rlpy_data_set_has_the_transitions_of_d3rlpy() -> None:
    d3rlpy = pytest.importorskip("d3rlpy", exc_type=ImportError)
    steps = walk(9, terminals=flags(9, 2), timeouts=flags(9, 5, 8))
    columns = {key: np.float32(steps[key]) for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
    dataset = d3rlpy.dataset.MDPDataset(**columns, action_space=d3rlpy.ActionSpace.CONTINUOUS)
    data = from_d3rlpy(dataset)
    assert len(data) == dataset.transition_count
    assert data.rewards.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert np.flatnonzero(data.ends).tolist() == [2, 4, 6]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (object(), "object has no episodes"),
        (SimpleNamespace(episodes=[d3rlpy_episode([0], terminated=False)]), "no transition is left"),
        (
            SimpleNamespace(
                episodes=[d3rlpy_episode([0, 1], terminated=True, observations=(np.zeros(2), np.zeros(2)))]
            ),
            "episode 0 has observations of a tuple",
        ),
        (
            SimpleNamespace(episodes=[d3rlpy_episode([0, 1], terminated=True, actions=np.full((2, 1), 3.0))]),
            "actions reach 3",
        ),
    ],
)
def test_bad_d3rlpy_data_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_d3rlpy(dataset)


def test_environment_brings_data_and_time_limit() -> None:
    steps = without(walk(), "timeouts")
    environment = SimpleNamespace(get_dataset=lambda: steps, _max_episode_steps=4)
    assert from_env(environment).rewards.tolist() == [0, 1, 2, 4, 5, 6]
    spec = SimpleNamespace(id="antmaze-umaze-v2", max_episode_steps=3)
    named = SimpleNamespace(get_dataset=lambda: steps | {"terminals": flags(8, 0)}, spec=spec)
    assert not from_env(named, split="timeout").terminals.any()
    assert from_env(named, max_episode_steps=5).rewards.tolist() == [0, 1, 2, 3, 4, 6]


def test_environment_without_data_is_refused() -> None:
    with pytest.raises(UserError, match=r"object has no get_dataset\(\)"):
        from_env(object())
