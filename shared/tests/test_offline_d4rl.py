"""D4RL files: every layout is read, quirks are mended or kept, what is wrong is named with file, key and row."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leap_shared.errors import UserError
from leap_shared.offline import Transitions, convert, from_steps, read_d4rl, write_d4rl

EPISODES = st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=2, max_size=8)
UMAZE = "antmaze-umaze-v2"


def recording(episodes: list[tuple[int, bool]], width: int = 2) -> dict[str, np.ndarray]:
    """Raw steps of episodes (length, whether a terminal ends it); every state is a number of its own."""
    columns: dict[str, list[Any]] = {"observations": [], "next_observations": [], "terminals": [], "timeouts": []}
    state = 0
    for length, dies in episodes:
        for step in range(length):
            columns["observations"].append([state] * width)
            columns["next_observations"].append([state + 1] * width)
            columns["terminals"].append(dies and step == length - 1)
            columns["timeouts"].append(not dies and step == length - 1)
            state += 1
        state += 1
    arrays = {key: np.array(values) for key, values in columns.items()}
    rows = len(arrays["terminals"])
    wide = {key: arrays[key].astype(np.float32) for key in ("observations", "next_observations")}
    return {**arrays, **wide, "actions": np.zeros((rows, 1)), "rewards": np.arange(rows, dtype=np.float64)}


def walk(rows: int = 8, **changes: Any) -> dict[str, Any]:
    """One recording without successors: states 0, 1, 2, ... and no end."""
    states = np.arange(rows, dtype=np.float32)[:, None] * 0.1 * np.ones(3, np.float32)
    given = {"observations": states, "actions": np.zeros((rows, 1)), "rewards": np.arange(rows, dtype=np.float32)}
    flags = {"terminals": np.zeros(rows, bool), "timeouts": np.zeros(rows, bool)}
    return {**given, **flags, **changes}


def flags(rows: int, *marked: int) -> np.ndarray:
    return np.isin(np.arange(rows), marked)


def without(steps: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in steps.items() if key not in keys}


def kept(data: Transitions) -> list[int]:
    """Which steps became rows, where rewards are their numbers."""
    return [int(reward) for reward in data.rewards]


def write(path: Path, arrays: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return path


@given(EPISODES)
def test_stored_successors_lose_no_step(episodes: list[tuple[int, bool]]) -> None:
    steps = recording(episodes)
    data = from_steps(steps)
    assert kept(data) == list(range(len(steps["rewards"])))
    np.testing.assert_array_equal(data.next_observations, steps["next_observations"])
    assert data.timeouts.tolist() == steps["timeouts"].tolist()
    assert data.ends.tolist() == (steps["timeouts"] | steps["terminals"]).tolist()


@given(EPISODES)
def test_shifted_successors_lose_only_steps_whose_successor_is_unknown(episodes: list[tuple[int, bool]]) -> None:
    steps = recording([*episodes, (2, True)])
    data = from_steps(steps, next_obs="shift")
    assert kept(data) == np.flatnonzero(~steps["timeouts"]).tolist()
    going = ~data.terminals
    np.testing.assert_array_equal(data.next_observations[going], data.observations[going] + 1)
    lengths = [length - (not dies) for length, dies in episodes if length > 1 or dies]
    assert np.diff(np.flatnonzero(data.ends), prepend=-1).tolist() == [*lengths, 2]
    assert not (data.terminals & data.timeouts).any()


def test_unknown_successors_can_be_kept_with_their_own_observation() -> None:
    steps = recording([(2, False), (3, False)])
    data = from_steps(steps, next_obs="shift", drop=False)
    assert kept(data) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(data.next_observations[[1, 4]], data.observations[[1, 4]])
    assert np.flatnonzero(data.timeouts).tolist() == [1, 4]


def test_terminal_step_at_the_time_limit_stays() -> None:
    data = from_steps(walk(terminals=flags(8, 3), timeouts=flags(8, 3, 5)))
    assert kept(data) == [0, 1, 2, 3, 4, 6]
    assert np.flatnonzero(data.timeouts).tolist() == [4]


def test_terminal_in_the_last_step_stays() -> None:
    assert kept(from_steps(walk(4, terminals=flags(4, 3)))) == [0, 1, 2, 3]


def test_steps_without_timeouts_are_counted_from_zero_after_a_terminal() -> None:
    steps = without(walk(9, terminals=flags(9, 1)), "timeouts")
    assert kept(from_steps(steps, max_episode_steps=4)) == [0, 1, 2, 3, 4, 6, 7]
    assert kept(from_steps(steps, max_episode_steps=4, compat="d4rl")) == [0, 1, 2, 3, 5, 6, 7]


def test_stored_successors_end_episodes_where_timeouts_are_absent() -> None:
    steps = recording([(3, False), (2, True), (3, False)])
    data = from_steps(without(steps, "timeouts"))
    assert np.flatnonzero(data.timeouts).tolist() == [2, 7]
    assert np.flatnonzero(data.ends).tolist() == [2, 4, 7]


@given(EPISODES, st.booleans(), st.booleans())
def test_compat_has_the_rows_of_the_converter(episodes: list[tuple[int, bool]], timed: bool, drop: bool) -> None:
    steps = recording([(3, True), *episodes])
    steps = steps if timed else without(steps, "timeouts")
    data = from_steps(steps, compat="d4rl", max_episode_steps=4, drop=drop)
    columns = {key: np.float32(steps[key]) for key in ("observations", "actions", "rewards")}
    columns |= {key: steps[key] for key in ("terminals", "timeouts") if key in steps}
    want = convert(**columns, max_episode_steps=4, terminate_on_end=not drop)
    for key, array in want.items():
        np.testing.assert_array_equal(getattr(data, key), array)
    assert not data.timeouts.any()


def test_compat_takes_stored_successors_only_when_asked() -> None:
    steps = recording([(2, True), (3, False)])
    assert from_steps(steps, compat="d4rl").next_observations[1, 0] == 3
    stored = from_steps(steps, compat="d4rl", next_obs="stored")
    assert stored.next_observations[1, 0] == 2
    assert len(stored) == 4


def test_antmaze_reset_is_seen_where_timeouts_miss_it() -> None:
    steps = walk()
    steps["observations"][4:] += 20
    data = from_steps(steps, task="antmaze-umaze-v0")
    assert kept(data) == [0, 1, 2, 4, 5, 6]
    assert np.flatnonzero(data.ends).tolist() == [2, 5]
    assert kept(from_steps(steps)) == list(range(7))


@pytest.mark.parametrize(
    ("split", "rows", "ends", "terminals"),
    [
        ("terminal", [0, 1, 2, 3, 4, 6, 7, 8], [2, 3, 4, 6, 7], [2, 3, 6]),
        ("first_success", [0, 1, 2, 6, 7], [2, 4], [2, 4]),
        ("timeout", [0, 1, 2, 3, 4, 6, 7, 8], [4, 7], []),
    ],
)
def test_antmaze_is_split_as_told(split: Any, rows: list[int], ends: list[int], terminals: list[int]) -> None:
    steps = walk(10, terminals=flags(10, 2, 3, 7), timeouts=flags(10, 5))
    data = from_steps(steps, task=UMAZE, split=split)
    assert kept(data) == rows
    assert np.flatnonzero(data.ends).tolist() == ends
    assert np.flatnonzero(data.terminals).tolist() == terminals


def test_maze2d_goal_switch_ends_an_episode_and_keeps_the_step() -> None:
    steps = walk(timeouts=flags(8, 3))
    data = from_steps(steps, task="maze2d-umaze-v1")
    assert len(data) == 7
    np.testing.assert_array_equal(data.next_observations, steps["observations"][1:])
    assert np.flatnonzero(data.ends).tolist() == [3, 6]


def test_maze2d_reward_tests_the_state_after_the_step() -> None:
    assert kept(from_steps(walk(), task="maze2d-umaze-v1")) == [1, 2, 3, 4, 5, 6, 7]
    assert kept(from_steps(walk(), task="maze2d-umaze-v1", compat="d4rl")) == [0, 1, 2, 3, 4, 5, 6]


def test_written_file_is_read_back(tmp_path: Path) -> None:
    steps = recording([(2, True), (3, False)])
    given = {**steps, "infos/qpos": np.ones((5, 7))}
    write_d4rl(tmp_path / "a.hdf5", given, {"algorithm": "SAC", "seed": 3, "policy/weight": np.zeros((2, 2))})
    data = read_d4rl(tmp_path / "a.hdf5")
    np.testing.assert_array_equal(data.next_observations, steps["next_observations"])
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert file["infos/qpos"].shape == (5, 7)
        assert file["metadata/algorithm"].asstr()[()] == "SAC"
        assert [file["observations"].dtype, file["terminals"].dtype] == [np.float32, bool]


def test_writing_leaves_no_file_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_d4rl(tmp_path / "a.hdf5", walk(), {"policy": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"infos/qpos": np.zeros((3, 2))}, "infos/qpos has 3 rows and observations has 8"),
        ({"infos/qpos": np.array([0, 0, np.inf, 0, 0, 0, 0, 0])}, "infos/qpos is NaN or infinite at row 2"),
        ({"infos/name": np.array(["a"] * 8)}, "infos/name holds <U1"),
        ({"rewards": np.full(8, np.nan)}, "a.hdf5: rewards is NaN"),
    ],
)
def test_bad_arrays_are_not_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_d4rl(tmp_path / "a.hdf5", walk(**changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["", "data/train/"])
@pytest.mark.parametrize("flag", [np.bool_, np.float32, np.float64, np.uint8])
def test_keys_are_found_at_any_depth_in_any_type(tmp_path: Path, place: str, flag: type) -> None:
    steps = recording([(2, True), (3, False)])
    wide = {key: steps[key].astype(np.float64) for key in ("observations", "actions", "next_observations")}
    narrow: dict[str, Any] = {key: steps[key][:, None].astype(flag) for key in ("terminals", "timeouts")}
    given = {**wide, **narrow, "rewards": steps["rewards"][:, None], "infos/observations": np.zeros(3)}
    data = read_d4rl(write(tmp_path / "a.hdf5", {place + key: value for key, value in given.items()}))
    want = from_steps(steps)
    np.testing.assert_array_equal(data.packed(), want.packed())
    assert data.ends.tolist() == want.ends.tolist()


def test_virtual_chunks_are_joined_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    steps = recording([(12, False), (11, True)])
    parts = {
        f"virtual/{k}/{key}": values[2 * k : 2 * k + 2]
        for key, values in steps.items()
        for k in range(len(values) // 2 + 1)
    }
    assert len(read_d4rl(write(tmp_path / "a.hdf5", parts), next_obs="shift")) == 22


def test_time_limit_comes_from_the_name_of_the_file(tmp_path: Path) -> None:
    steps = without(walk(420), "timeouts")
    steps["observations"] = np.zeros((420, 60))
    data = read_d4rl(write(tmp_path / "mini_kitchen_microwave_kettle_light_slider-v0.hdf5", steps))
    assert 279 not in kept(data)
    assert len(data) == 418


def test_file_of_tasks_with_other_limits_needs_the_task(tmp_path: Path) -> None:
    path = write(tmp_path / "door-v0_demos_clipped.hdf5", without(walk(420), "timeouts"))
    with pytest.raises(UserError, match=r"door-human-longhorizon-v0 \(300 steps\), door-human-v0 \(200 steps\): give"):
        read_d4rl(path)
    assert 199 not in kept(read_d4rl(path, task="door-human-v0"))
    assert 199 in kept(read_d4rl(path, task="door-human-longhorizon-v0"))


def test_progress_counts_all_steps(tmp_path: Path) -> None:
    seen: list[int] = []
    read_d4rl(write(tmp_path / "a.hdf5", walk(70_000)), progress=seen.append)
    assert sum(seen) == 70_000
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda steps: steps.update(rewards=np.ones((8, 2))), r"rewards has shape \(8, 2\), expected \(rows,\)"),
        (lambda steps: steps.update(rewards=np.ones(5)), "rewards has 5 rows and observations has 8"),
        (lambda steps: steps["observations"].__setitem__(5, np.nan), "observations is NaN or infinite .* at row 5"),
        (lambda steps: steps.update(rewards=np.full(8, 1e300)), "rewards is NaN or infinite in float32 at row 0"),
        (lambda steps: steps.update(terminals=np.full(8, 0.5)), "terminals must be 0 or 1, row 0 is neither"),
        (lambda steps: steps.update(timeouts=np.arange(8.0)), "timeouts must be 0 or 1, row 2 is neither"),
        (lambda steps: steps["actions"].__setitem__(3, 1.7), r"actions reach 1.7, outside \[-1, 1\], in row 3"),
        (lambda steps: steps.pop("timeouts"), "no timeouts: give max_episode_steps"),
        (lambda steps: steps.pop("rewards"), "there is no 'rewards'"),
        (lambda steps: steps.update(rewards=np.array([b"a"] * 8)), "/rewards is no array of numbers"),
        (lambda steps: steps.pop("observations"), "there is no 'observations'"),
        (
            lambda steps: steps.update({"observations/goal": steps.pop("observations"), "observations/place": [1]}),
            "observations are a Dict of goal, place: concatenate",
        ),
        (
            lambda steps: [
                steps.update({f"{k}/{key}": steps[key] for k in "ab"}) or steps.pop(key) for key in [*steps]
            ],
            "several data sets, in a, b",
        ),
        (lambda steps: steps.update({"episode_0/rewards": [1]}), "this is a Minari file: use read_minari"),
        (lambda steps: steps.update(timeouts=np.ones(8)), "no transition is left"),
    ],
)
def test_bad_file_is_refused_by_name(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    steps = walk()
    change(steps)
    path = write(tmp_path / "some.hdf5", steps)
    with pytest.raises(UserError, match=f"some.hdf5: .*{message}"):
        read_d4rl(path)


def test_chunk_that_lacks_a_key_is_refused(tmp_path: Path) -> None:
    parts = {f"virtual/{k}/{key}": values for key, values in walk().items() for k in range(2)}
    del parts["virtual/1/timeouts"]
    with pytest.raises(UserError, match="only 1 of its 2 groups have 'timeouts'"):
        read_d4rl(write(tmp_path / "a.hdf5", parts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "timeout"}, "split='timeout' is for AntMaze"),
        ({"split": "first_success", "task": "hopper-medium-v2"}, "give its task .it is hopper-medium-v2"),
        ({"split": "timeout", "task": UMAZE, "compat": "d4rl"}, "without compat"),
        ({"split": "goal"}, "split='goal' is unknown: use 'terminal', 'first_success', 'timeout'"),
        ({"compat": "d5rl"}, "compat='d5rl' is unknown"),
        ({"next_obs": "own"}, "next_obs='own' is unknown"),
        ({"next_obs": "stored"}, "there are no next_observations"),
        ({"task": "hoper-medium-v2"}, "D4RL has no task 'hoper-medium-v2': did you mean hopper-medium-v2"),
    ],
)
def test_options_that_fit_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inspect.unwrap(from_steps)(walk(), **options)  # without the checks of types in tests, as users run it


@pytest.mark.parametrize("content", [b"", b"no hdf5", b"\x89HDF\r\n\x1a\n cut short"])
def test_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.hdf5").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as HDF5"):
        read_d4rl(tmp_path / "a.hdf5")


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.hdf5: there is no such file"):
        read_d4rl(tmp_path / "none.hdf5")


def test_larger_actions_are_read_when_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", walk(actions=np.full((8, 1), -2.0)))
    assert read_d4rl(path, max_action=2.0).summary().max_action == 2.0


def test_missing_h5py_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r'need h5py: pip install "leap-shared\[rl\]"'):
        read_d4rl(tmp_path / "a.hdf5")
