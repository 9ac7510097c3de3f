"""Generated data sets: recipes, keys, manifests, and generations that were killed; in real simulation."""

from __future__ import annotations

import json
import logging
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from generation_to_kill import ENVIRONMENT, TINY
from numpy.typing import NDArray

from leap_shared.checkpoints import read
from leap_shared.errors import UserError
from leap_shared.files import sha256
from leap_shared.offline import generation, production
from leap_shared.offline.d4rl import read_d4rl
from leap_shared.offline.generation import LEVELS, generate_mujoco, generate_point_maze
from leap_shared.offline.minari import read_minari
from leap_shared.offline.online import SAC, TD3Config
from leap_shared.offline.point_maze import PointMaze
from leap_shared.offline.recording import Recording

KEYS = {
    *("observations", "actions", "rewards", "terminals", "timeouts", "next_observations"),
    *("infos/qpos", "infos/qvel", "infos/action_log_probs"),
}


class Countdown(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Ends at step 4 by itself; with `forgetful` its observations are random numbers that no seed brings back."""

    observation_space = gymnasium.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-3, 3, (1,), np.float32)

    def __init__(self, forgetful: bool = False) -> None:
        self.forgetful, self.steps = forgetful, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._observation(), float(action[0]), self.steps == 4, False, {}

    def _observation(self) -> NDArray[np.float32]:
        state = np.random.default_rng().random() if self.forgetful else self.steps
        return np.array([state], np.float32)


class Unbounded(Countdown):
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)


@pytest.fixture(autouse=True)
def environments() -> Iterator[None]:
    gymnasium.register("LeapCountdown-v0", Countdown, max_episode_steps=4)
    gymnasium.register("LeapUnbounded-v0", Unbounded)
    yield
    for name in ("LeapCountdown-v0", "LeapUnbounded-v0"):
        del gymnasium.registry[name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("all")
    settings = {**TINY, "level": LEVELS, "formats": ("d4rl", "minari")}
    return out, generate_mujoco(ENVIRONMENT, out=out, **settings)


def arrays(out: Path, level: str, environment: str = ENVIRONMENT) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    with h5py.File(out / f"{environment}-{level}.hdf5") as file:
        file.visititems(lambda key, item: found.update({key: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return {key: value for key, value in found.items() if not key.startswith("metadata")}


def sums(manifest: dict[str, Any]) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def test_manifest_sums_are_those_of_all_files(made: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = made
    assert json.loads((out / "manifest.json").read_text()) == manifest
    for name, entry in manifest["files"].items():
        assert sha256(out / name) == entry["sha256"]
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files - set(manifest["files"]) <= {"manifest.json", "minari/InvertedPendulum-v5/namespace_metadata.json"}


@pytest.mark.parametrize("level", LEVELS)
def test_both_formats_read_back_as_the_manifest_says(made: tuple[Path, dict[str, Any]], level: str) -> None:
    out, manifest = made
    said = manifest["files"][f"{ENVIRONMENT}-{level}.hdf5"]
    for data in (
        read_d4rl(out / f"{ENVIRONMENT}-{level}.hdf5"),
        read_minari(f"{ENVIRONMENT}/{level}-v0", out / "minari"),
    ):
        summary = data.summary()
        assert (summary.rows, summary.episodes) == (said["rows"], said["episodes"])
        assert summary.returns == pytest.approx(said["returns"])
    assert arrays(out, level).keys() == KEYS


@pytest.mark.parametrize("level", LEVELS)
def test_rows_of_an_episode_follow_each_other(made: tuple[Path, dict[str, Any]], level: str) -> None:
    data = arrays(made[0], level)
    ends = data["terminals"] | data["timeouts"]
    assert ends[-1]
    np.testing.assert_array_equal(data["next_observations"][:-1][~ends[:-1]], data["observations"][1:][~ends[:-1]])


def test_positions_and_scaled_actions_replay_the_steps(made: tuple[Path, dict[str, Any]]) -> None:
    data = arrays(made[0], "expert")
    assert data["infos/qpos"].dtype == np.float64
    with gymnasium.make(ENVIRONMENT) as environment:
        environment.reset()
        single: Any = environment.unwrapped
        for row in range(0, 60, 7):
            single.set_state(data["infos/qpos"][row], data["infos/qvel"][row])
            following = environment.step(3 * data["actions"][row])[0]
            np.testing.assert_allclose(following, data["next_observations"][row], atol=1e-4)


def test_densities_are_those_of_the_policy_beside_the_data(made: tuple[Path, dict[str, Any]]) -> None:
    out, data = made[0], arrays(made[0], "medium")
    learner = SAC(4, 1, TINY["config"])
    learner.load_policy(read(out / f"{ENVIRONMENT}-medium-policy.safetensors"))
    outputs = learner.actor(torch.from_numpy(data["observations"])[None])[0].double()
    actions = torch.from_numpy(data["actions"]).double()
    normal = torch.distributions.Normal(outputs[:, :1], outputs[:, 1:].exp())
    wanted = (normal.log_prob(actions.atanh()) - torch.log(1 - actions**2))[:, 0]
    np.testing.assert_allclose(data["infos/action_log_probs"], wanted.numpy(), atol=1e-3)


def test_random_actions_are_uniform(made: tuple[Path, dict[str, Any]]) -> None:
    data = arrays(made[0], "random")
    assert data["infos/action_log_probs"] == pytest.approx(-math.log(2))
    assert abs(data["actions"].mean()) < 0.3
    assert np.abs(data["actions"]).max() > 0.9


def test_medium_replay_is_the_training_until_the_target(made: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = made
    reached = next(row for row in manifest["evaluations"] if row["return"] >= 1.0)
    part, whole = arrays(out, "medium-replay"), arrays(out, "full-replay")
    assert len(part["rewards"]) == reached["step"] == 60
    assert len(whole["rewards"]) == manifest["steps"] == 240
    known = {row.tobytes() for row in whole["observations"]}
    assert all(row.tobytes() in known for row in part["observations"])


def test_medium_expert_is_whole_medium_episodes_then_expert(made: tuple[Path, dict[str, Any]]) -> None:
    out, _ = made
    medium, expert, both = (arrays(out, level) for level in ("medium", "expert", "medium-expert"))
    count = len(both["rewards"]) - len(expert["rewards"])
    assert 40 < count < 60
    assert both["terminals"][count - 1]
    assert not (both["timeouts"] & ~both["terminals"])[:count].any()
    for key in KEYS:
        np.testing.assert_array_equal(both[key][count:], expert[key])
    known = {row.tobytes() for row in medium["observations"]}
    assert all(row.tobytes() in known for row in both["observations"][:count])


def test_updates_per_step_are_kept_for_fractions_too(tmp_path: Path) -> None:
    settings = {**TINY, "level": "full-replay", "updates_per_step": 0.25}
    assert generate_mujoco(ENVIRONMENT, out=tmp_path, **settings)["updates"] == (240 - 30) // 4


def test_time_limit_counts_even_where_the_task_ends(tmp_path: Path) -> None:
    settings = {**TINY, "level": "random", "rows": 24}
    generate_mujoco("LeapCountdown-v0", out=tmp_path, **settings)
    data = arrays(tmp_path, "random", "LeapCountdown-v0")
    assert np.flatnonzero(data["terminals"]).tolist() == [3, 7, 11, 15, 19, 23]
    np.testing.assert_array_equal(data["terminals"], data["timeouts"])
    assert data["rewards"] == pytest.approx(3 * data["actions"][:, 0])
    assert "infos/qpos" not in data


def test_recording_ends_as_a_timeout(tmp_path: Path) -> None:
    generate_mujoco("LeapCountdown-v0", out=tmp_path, **{**TINY, "level": "random", "rows": 18})
    data = arrays(tmp_path, "random", "LeapCountdown-v0")
    assert np.flatnonzero(data["terminals"]).tolist() == [3, 7, 11]
    assert np.flatnonzero(data["timeouts"]).tolist() == [3, 7, 11, 13, 15, 17]


def test_td3_has_no_densities(tmp_path: Path) -> None:
    config = TD3Config(hidden=(8,), batch_size=8)
    settings = {**TINY, "level": "expert", "algorithm": "td3", "config": config}
    generate_mujoco(ENVIRONMENT, out=tmp_path, **settings)
    assert arrays(tmp_path, "expert").keys() == KEYS - {"infos/action_log_probs"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return generate_mujoco(ENVIRONMENT, out=tmp_path_factory.mktemp("whole"), **TINY)


class StoppedError(Exception):
    pass


def stop_at(moment: int) -> Callable[[int, str], None]:
    """Progress that raises when it is called for the `moment`-th time."""
    left = [moment]

    def progress(_done: int, _text: str) -> None:
        left[0] -= 1
        if not left[0]:
            raise StoppedError

    return progress


@pytest.mark.parametrize("moments", [(1, 30), (45,), (75, 1, 2), (90, 12)])
def test_interrupted_generation_ends_with_the_same_bits(
    undisturbed: dict[str, Any], moments: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(production, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(generation, "SAVE_EVERY_ROWS", 15)

    for moment in moments:
        with pytest.raises(StoppedError):
            generate_mujoco(ENVIRONMENT, out=tmp_path, progress=stop_at(moment), **TINY)
        assert not (tmp_path / "manifest.json").exists()
    again = generate_mujoco(ENVIRONMENT, out=tmp_path, **TINY)
    assert sums(again) == sums(undisturbed)
    assert again["evaluations"] == undisturbed["evaluations"]


def test_killed_process_goes_on_to_the_same_bits(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    script = Path(__file__).with_name("generation_to_kill.py")
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("training 150/240")
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    words: list[str] = []
    again = generate_mujoco(ENVIRONMENT, out=tmp_path, progress=lambda _, text: words.append(text), **TINY)
    assert words[0].startswith("training 120/240")
    assert sums(again) == sums(undisturbed)


def test_dict_observations_are_joined_by_their_keys(tmp_path: Path) -> None:
    options = {"keys": ["observation", "desired_goal"]}
    settings = {**TINY, "level": "random", "rows": 9, "options": options}
    generate_mujoco("PointMaze_Medium-v3", out=tmp_path, **settings)
    data = arrays(tmp_path, "random", "PointMaze_Medium-v3")
    assert data["observations"].shape == (9, 6)
    assert data["infos/qpos"] == pytest.approx(data["observations"][:, :2], abs=1e-6)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("walk")
    return out, generate_point_maze(out, rows=1500, formats=("d4rl", "minari"), seed=3)


def test_walk_reaches_one_goal_after_the_other(walk: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = walk
    data = arrays(out, "walk", "PointMaze_Medium-v3")
    ends = np.flatnonzero(data["timeouts"])
    assert len(ends) == manifest["goals"] > 5
    reached = np.linalg.norm(data["next_observations"][ends[:-1], :2] - data["infos/goal"][ends[:-1]], axis=1)
    assert reached.max() < 0.1
    assert not data["terminals"].any()
    changes = np.flatnonzero((np.diff(data["infos/goal"], axis=0) != 0).any(axis=1))
    np.testing.assert_array_equal(changes, ends[:-1])


def test_walk_is_one_trajectory_relabelled_for_the_goal(walk: tuple[Path, dict[str, Any]]) -> None:
    data, maze = arrays(walk[0], "walk", "PointMaze_Medium-v3"), PointMaze()
    np.testing.assert_array_equal(data["next_observations"][:-1], data["observations"][1:])
    near = np.linalg.norm(data["next_observations"][:, :2] - maze.goal_position, axis=1) <= 0.45
    np.testing.assert_array_equal(data["rewards"], near)
    assert not any(maze.walls[maze.cell(position)] for position in data["observations"][:, :2])


def test_walk_reads_back_from_both_formats(walk: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = walk
    said = manifest["files"]["PointMaze_Medium-v3-walk.hdf5"]
    for data in (
        read_d4rl(out / "PointMaze_Medium-v3-walk.hdf5"),
        read_minari("PointMaze_Medium-v3/walk-v0", out / "minari"),
    ):
        assert (len(data), data.summary().episodes) == (said["rows"], said["episodes"]) == (1500, manifest["goals"])


def test_interrupted_walk_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(production, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(generation, "SAVE_EVERY_ROWS", 40)
    settings: dict[str, Any] = {"rows": 400, "maze": PointMaze(noise=0.5), "formats": ("d4rl",)}
    whole = generate_point_maze(tmp_path / "whole", **settings)
    for moment in (150, 170):
        with pytest.raises(StoppedError):
            generate_point_maze(tmp_path / "cut", progress=stop_at(moment), **settings)
    assert sums(generate_point_maze(tmp_path / "cut", **settings)) == sums(whole)


def test_walk_of_no_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows=1, seed=0: give at least 2 rows"):
        generate_point_maze(tmp_path, rows=1)
    with pytest.raises(UserError, match="formats are rlds"):
        generate_point_maze(tmp_path, formats=("rlds",))


def test_finished_generation_is_not_made_again(made: tuple[Path, dict[str, Any]]) -> None:
    def progress(_done: int, text: str) -> None:
        raise AssertionError(text)

    settings = {**TINY, "level": LEVELS, "formats": ("d4rl", "minari")}
    assert generate_mujoco(ENVIRONMENT, out=made[0], progress=progress, **settings) == made[1]


def test_folder_of_other_settings_is_refused(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"other settings \(they differ in formats, levels, seed\): give another"):
        generate_mujoco(ENVIRONMENT, out=made[0], **TINY, seed=1)
    with pytest.raises(UserError, match="not the target"):
        generate_mujoco(ENVIRONMENT, out=tmp_path, **{**TINY, "target_score": 1e6})
    before = sha256(tmp_path / "work" / "training" / "steps.f4")
    with pytest.raises(UserError, match="run of other settings: they differ in seed"):
        generate_mujoco(ENVIRONMENT, out=tmp_path, **TINY, seed=1)
    assert sha256(tmp_path / "work" / "training" / "steps.f4") == before


def test_changed_file_is_noticed(tmp_path: Path) -> None:
    settings = {**TINY, "level": "random"}
    generate_mujoco(ENVIRONMENT, out=tmp_path, **settings)
    (tmp_path / f"{ENVIRONMENT}-random.hdf5").write_bytes(b"")
    with pytest.raises(UserError, match=r"is not what manifest\.json says"):
        generate_mujoco(ENVIRONMENT, out=tmp_path, **settings)


def test_target_out_of_reach_keeps_the_training_for_more_steps(tmp_path: Path) -> None:
    settings = {**TINY, "level": "medium-replay", "target_score": 1e6, "steps": 120}
    with pytest.raises(UserError, match=r"reached a return of \d.*not the target of 1e\+06, in 120 steps.*more steps"):
        generate_mujoco(ENVIRONMENT, out=tmp_path, **settings)
    assert not (tmp_path / "manifest.json").exists()
    words: list[str] = []
    more = {**settings, "steps": 240}
    with pytest.raises(UserError, match="in 240 steps"):
        generate_mujoco(ENVIRONMENT, out=tmp_path, progress=lambda _, text: words.append(text), **more)
    assert words[0].startswith("training 120/240")
    manifest = generate_mujoco(ENVIRONMENT, out=tmp_path, **{**more, "target_score": 1.0})
    assert manifest["files"][f"{ENVIRONMENT}-medium-replay.hdf5"]["rows"] == 240


def test_environment_that_cannot_be_brought_back_is_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def recording() -> Recording:
        return Recording(tmp_path / "steps", "LeapCountdown-v0", 2, 12, 0, {"forgetful": True})

    first, actions = recording(), np.zeros((2, 1), np.float32)
    for _ in range(3):
        first.step(actions, np.zeros(2, np.float32))
    second = recording()
    with caplog.at_level(logging.WARNING):
        second.load_state_dict(first.state_dict())
    assert "2 of 2 environments cannot be brought back" in caplog.text
    for _ in range(3):
        second.step(actions, np.zeros(2, np.float32))
    assert np.flatnonzero(second.arrays()["timeouts"]).tolist() == [2, 5, 8, 11]
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("environment", "wrong", "message"),
    [
        ("InvertedPendulun-v5", {}, "'InvertedPendulun-v5' is unknown: did you mean .*InvertedPendulum"),
        ("CartPole-v1", {}, "only vectors of real numbers"),
        ("LeapUnbounded-v0", {}, "actions without bounds"),
        (ENVIRONMENT, {"level": "medum"}, "level 'medum' is unknown: did you mean medium"),
        (ENVIRONMENT, {"level": []}, "no level is given"),
        (ENVIRONMENT, {"algorithm": "ppo", "config": None}, "algorithm 'ppo' is unknown: use sac or td3"),
        (ENVIRONMENT, {"algorithm": "td3"}, "config is a SACConfig: td3 takes a TD3Config"),
        (ENVIRONMENT, {"formats": ("rlds",)}, "formats are rlds: choose from d4rl, minari"),
        (ENVIRONMENT, {"formats": ()}, "formats are empty"),
        (ENVIRONMENT, {"steps": 0}, "steps=0, rows=60"),
        (ENVIRONMENT, {"num_envs": 0}, "the rest above 0"),
        (ENVIRONMENT, {"updates_per_step": 0.0}, "updates_per_step=0.0"),
        (ENVIRONMENT, {"seed": -1}, "a seed >= 0"),
        (ENVIRONMENT, {"options": {"reset_noise_scale": object()}}, "give JSON's types"),
        (ENVIRONMENT, {"target_score": math.nan}, "give target_score"),
        ("LeapCountdown-v0", {"target_score": None}, "no target for LeapCountdown-v0: give target_score"),
        ("Pendulum-v1", {"target_score": None, "expert_score": -150.0}, "no target for Pendulum-v1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    environment: str, wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        generate_mujoco(environment, out=tmp_path / "out", **{**TINY, **wrong})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "expert", "wanted"),
    [("Hopper-v5", None, 3234.3 / 3), ("InvertedDoublePendulum-v5", None, 9100 / 3), ("Hopper-v5", 900.0, 300.0)],
)
def test_medium_is_a_third_of_the_expert(environment: str, expert: float | None, wanted: float) -> None:
    assert generation._target(environment, gymnasium.spec(environment), None, expert) == pytest.approx(wanted)


def test_a_relative_folder_holds_both_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = generate_mujoco("Pendulum-v1", "random", "here", rows=250, num_envs=1)
    assert all((tmp_path / "here" / name).exists() for name in manifest["files"])


def test_a_format_whose_writer_is_missing_is_refused_before_anything_is_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"leap-shared\[minari\].*or leave out that format"):
        generate_mujoco("Pendulum-v1", "random", tmp_path / "out")
    assert not (tmp_path / "out").exists()
