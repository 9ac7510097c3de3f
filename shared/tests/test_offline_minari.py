"""Minari data sets: read without minari, every step with its true successor, and written through it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from test_offline_d4rl import recording

from leap_shared.errors import UserError
from leap_shared.offline import Transitions, from_steps, minari_ids, read_minari, write_minari

minari = pytest.mark.skipif(
    "not __import__('importlib.util').util.find_spec('minari')", reason="minari is not installed"
)


def episode(start: float, steps: int, **changes: Any) -> dict[str, Any]:
    """An episode that is terminated in its last step; its states are numbered from `start`."""
    last = np.arange(steps) == steps - 1
    return {
        "observations": np.repeat(np.arange(start, start + steps + 1)[:, None], 2, axis=1),
        "actions": np.zeros((steps, 1)),
        "rewards": np.ones(steps),
        "terminations": last,
        "truncations": np.zeros(steps, bool),
        **changes,
    }


def write(root: Path, episodes: list[dict[str, Any]], name: str = "maze/walk-v0") -> Path:
    path = root / name / "data" / "main_data.hdf5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for number, arrays in enumerate(episodes):
            for key, value in arrays.items():
                file[f"episode_{number}/{key}"] = value
    return path


def test_every_step_has_its_true_successor(tmp_path: Path) -> None:
    cut = episode(10, 2, terminations=np.zeros(2, bool), truncations=np.array([False, True]))
    write(tmp_path, [episode(0, 3), cut, episode(20, 1, terminations=np.zeros(1, bool))])
    data = read_minari("maze/walk-v0", tmp_path)
    np.testing.assert_array_equal(data.observations[:, 0], [0, 1, 2, 10, 11, 20])
    np.testing.assert_array_equal(data.next_observations[:, 0], [1, 2, 3, 11, 12, 21])
    assert data.terminals.tolist() == [False, False, True, False, False, False]
    assert data.timeouts.tolist() == [False, False, False, False, True, True]


def test_episodes_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write(tmp_path, [episode(10 * k, 2) for k in range(12)])
    assert read_minari("maze/walk-v0", tmp_path).observations[::2, 0].tolist() == [10.0 * k for k in range(12)]


def test_dict_entries_are_joined_in_the_given_order(tmp_path: Path) -> None:
    states = {"observation": np.ones((3, 4)), "desired_goal": np.zeros((3, 2)), "more/side": np.full((3, 1), 5.0)}
    given = episode(0, 2)
    del given["observations"]
    write(tmp_path, [given | {f"observations/{key}": value for key, value in states.items()}])
    data = read_minari("maze/walk-v0", tmp_path, keys=("desired_goal", "observation", "more/side"))
    assert data.observations[0].tolist() == [0, 0, 1, 1, 1, 1, 5]
    listed = r"desired_goal \(2 wide\), more/side \(1 wide\), observation \(4 wide\)"
    with pytest.raises(UserError, match=f"are a Dict of {listed}: choose with keys"):
        read_minari("maze/walk-v0", tmp_path)
    with pytest.raises(UserError, match=f"no entry 'goal', they are a Dict of {listed}"):
        read_minari("maze/walk-v0", tmp_path, keys=["goal"])


def test_newest_version_is_read_unless_one_is_named(tmp_path: Path) -> None:
    for version in (2, 10):
        write(tmp_path, [episode(version, 2)], f"maze/walk-v{version}")
    assert minari_ids(tmp_path) == ["maze/walk-v10", "maze/walk-v2"]
    assert read_minari("maze/walk", tmp_path).observations[0, 0] == 10
    assert read_minari("maze/walk-v2", tmp_path).observations[0, 0] == 2


def test_root_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path = write(tmp_path, [episode(0, 2)])
    for given in ("maze/walk-v0", path, path.parent, path.parents[1]):
        assert len(read_minari(given)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": np.zeros((2, 2))}, r"episode_1/observations has shape \(2, 2\), expected \(3, 2\)"),
        ({"observations": np.full((3, 2), np.nan)}, "observations is NaN or infinite"),
        ({"rewards": np.array([0, np.inf])}, "rewards is NaN or infinite in float32 at row 4"),
        ({"actions": np.full((2, 1), 2.0)}, "actions reach 2, .* in row 3"),
        ({"actions": np.array([b"up"] * 2)}, "episode_1/actions holds"),
        ({"rewards/step": np.ones(2), "rewards": None}, "episode_1/rewards is a Dict of step"),
        ({"rewards": np.ones((2, 2))}, r"episode_1/rewards has shape \(2, 2\), expected \(2, 1\)"),
    ],
)
def test_bad_episode_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    second = {key: value for key, value in episode(10, 2, **changes).items() if value is not None}
    write(tmp_path, [episode(0, 3), second])
    with pytest.raises(UserError, match=f"main_data.hdf5: .*{message}"):
        read_minari("maze/walk-v0", tmp_path)


def test_last_state_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    given = episode(0, 3)
    given["observations"] = np.append(given["observations"][:-1], [[np.inf, 0]], axis=0)
    write(tmp_path, [given])
    with pytest.raises(UserError, match="in the last state of episode_0"):
        read_minari("maze/walk-v0", tmp_path)


def test_missing_array_is_named(tmp_path: Path) -> None:
    given = episode(0, 3)
    del given["truncations"]
    write(tmp_path, [given])
    with pytest.raises(UserError, match="episode_0/truncations is missing"):
        read_minari("maze/walk-v0", tmp_path)


def test_keys_for_plain_observations_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [episode(0, 3)])
    with pytest.raises(UserError, match="observations are one array: leave keys out"):
        read_minari("maze/walk-v0", tmp_path, keys=["observation"])


def test_unknown_data_set_names_near_ones(tmp_path: Path) -> None:
    write(tmp_path, [episode(0, 2)])
    with pytest.raises(UserError, match=r"no Minari data set 'maze/wlk-v0' in .* did you mean maze/walk-v0"):
        read_minari("maze/wlk-v0", tmp_path)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "walk-v0" / "data").mkdir(parents=True)
    (tmp_path / "walk-v0" / "data" / "metadata.json").write_text(json.dumps({"data_format": "arrow"}))
    with pytest.raises(UserError, match="only Minari's format hdf5 is read"):
        read_minari("walk-v0", tmp_path)


def test_file_without_episodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no episode with steps"):
        read_minari(write(tmp_path, []))


def test_reading_imports_no_minari(tmp_path: Path) -> None:
    path = write(tmp_path, [episode(0, 2)])
    program = (
        "import sys; from leap_shared.offline import read_minari; "
        "assert len(read_minari(sys.argv[1])) == 2 and 'minari' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)


@minari
def test_written_set_is_read_back_here_and_by_minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import minari as library

    data = from_steps(recording([(3, False), (2, True), (4, False)]))
    before = os.environ.get("MINARI_DATASETS_PATH")
    folder = write_minari("maze/steps-v0", data, root=tmp_path, metadata={"author": "nobody"})
    assert os.environ.get("MINARI_DATASETS_PATH") == before
    assert folder == tmp_path / "maze" / "steps-v0"
    assert [path.name for path in tmp_path.iterdir()] == ["maze"]
    again = read_minari("maze/steps-v0", tmp_path)
    np.testing.assert_array_equal(again.packed(), data.packed())
    assert again.timeouts.tolist() == data.timeouts.tolist()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episodes = list(library.load_dataset("maze/steps-v0").iterate_episodes())
    assert [len(found.rewards) for found in episodes] == [3, 2, 4]
    np.testing.assert_array_equal(episodes[1].observations, [[4, 4], [5, 5], [6, 6]])


@minari
def test_written_set_knows_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import minari as library

    data = from_steps(recording([(3, False), (2, True)], width=4))
    write_minari("cart-v0", data, "CartPole-v1", root=tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert library.load_dataset("cart-v0").spec.env_spec.id == "CartPole-v1"


@minari
def test_written_set_brings_its_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import minari as library

    for version in (0, 1):
        write_minari(f"maze/deep/steps-v{version}", small(), root=tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert set(library.list_local_datasets()) == {"maze/deep/steps-v0", "maze/deep/steps-v1"}
    assert library.namespace.list_local_namespaces() == ["maze", "maze/deep"]


def small() -> Transitions:
    return from_steps(recording([(3, True)]))


@minari
def test_failed_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_minari("maze/steps-v0", small(), root=tmp_path, metadata={"flavour": 1})
    assert list(tmp_path.iterdir()) == []


@minari
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("steps", "'steps' is no Minari identifier"),
        ("../steps-v0", "no Minari identifier"),
        ("m/steps-v0", "no Minari"),
    ],
)
def test_malformed_identifier_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_minari(name, small(), root=tmp_path)


@minari
def test_data_set_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path, [], "maze/steps-v0")
    with pytest.raises(UserError, match="exists: raise the version"):
        write_minari("maze/steps-v0", small(), root=tmp_path)


def test_missing_minari_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(UserError, match=r'writing Minari data needs minari: pip install "leap-shared\[minari\]"'):
        write_minari("maze/steps-v0", small(), root=tmp_path)
