"""The command line: every verb on small data, exit codes, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import walk

from leap_oper import Priorities, __version__
from leap_oper.cli import app
from leap_shared.offline import Transitions, read_d4rl


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    walk(60).save(tmp_path / "walk.npz")
    return tmp_path


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        app.main(arguments)
    return int(stopped.value.code or 0)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert call(*arguments, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


TRAIN = ("--steps", "4", "--every", "2", "--seeds", "2", "--batch-size", "8", "--hidden", "8", "8", "--device", "cpu")


def test_version_names_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert f"leap-oper {__version__}" in capsys.readouterr().out


def test_inspect_describes_the_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "inspect", "walk.npz")
    assert (told["rows"], told["episodes"], told["truncated_fraction"]) == (600, 60, 1.0)


def test_convert_keeps_every_transition_in_every_format(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("minari")
    before = walk(60)
    answer(capsys, "convert", "walk.npz", "--to", "d4rl", "--out", "a")
    answer(capsys, "convert", "a/walk.hdf5", "--to", "minari", "--name", "test/walk-v0", "--out", "b")
    answer(capsys, "convert", "b/test/walk-v0", "--out", "c", "--name", "back")
    for found in (read_d4rl(here / "a/walk.hdf5"), Transitions.load(here / "c/back.npz")[0]):
        for key in ("observations", "actions", "rewards", "next_observations", "terminals", "ends"):
            np.testing.assert_array_equal(getattr(found, key), getattr(before, key))


def test_a_minari_set_needs_its_id(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("convert", "walk.npz", "--to", "minari") == 2
    assert "give --name" in capsys.readouterr().err


def test_weights_of_returns_are_written_and_described(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "weights", "r", "walk.npz", "--base-prob", "0.2", "--out", "w")
    found = Priorities.load(here / "w/weights.npz", walk(60))
    assert told["weight std"] == pytest.approx(found.std, rel=1e-6)


def test_weights_of_advantages_train_every_algorithm_that_is_asked_for(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(capsys, "weights", "a", "walk.npz", "--iters", "2", "--steps", "3", "--seeds", "1", "2", "--out", "w")
    assert Priorities.load(here / "w/weights.npz").weights.shape == (2, 2, 600)
    options = ("--weights", "w/weights.npz", "--iteration", "1", "--std", "2.0", "--decouple", *TRAIN)
    for name in ("bc", "td3bc"):
        report = answer(capsys, "train", name, "walk.npz", *options, "--out", f"runs/{name}")
        assert report["seeds"] == [0, 1]
        assert (here / f"runs/{name}/policies.safetensors").exists()


def test_hyperparameters_are_flags_and_a_config_repeats_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("walk.npz", *TRAIN, "--alpha", "1.0", "4.0", "--out", "one")
    answer(capsys, "train", "td3bc", *options)
    answer(capsys, "train", "td3bc", "--config", "one/config.yaml", "--out", "two")
    files = [(here / folder / "policies.safetensors").read_bytes() for folder in ("one", "two")]
    assert files[0] == files[1]
    assert b'"alpha": [1.0, 4.0]'.replace(b'"', b'\\"') in files[0]


def test_the_best_rows_alone_can_be_cloned(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(capsys, "train", "bc", "walk.npz", *TRAIN, "--top", "25", "--out", "top")


def test_policies_are_evaluated_and_runs_reported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    states = generator.normal(size=(40, 3))
    pendulum = states, generator.uniform(-1, 1, (40, 1)), np.ones(40), states, np.zeros(40)
    Transitions.from_arrays(*pendulum).save(here / "p.npz")
    options = ("--env", "Pendulum-v1", "--episodes", "1", *TRAIN)
    answer(capsys, "train", "bc", "p.npz", *options, "--out", "runs/bc")
    rows = answer(capsys, "eval", "runs/bc", "--env", "Pendulum-v1", "--episodes", "2")
    assert [row["seed"] for row in rows] == [0, 1]
    assert all(row["return"] < 0 for row in rows)
    told = answer(capsys, "report", "runs", "--out", "page")
    assert (told[0]["task"], told[0]["score"]) == ("p", "return")
    assert (here / "page/index.html").exists()


def test_a_sweep_runs_and_reports(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--algorithms", "bc", "--methods", "uniform", "oper-r", "--steps", "2", "--every", "1", "--seeds", "2")
    assert answer(capsys, "sweep", "--data", "walk.npz", *options, "--device", "cpu", "--out", "s") == []
    assert len(list((here / "s").rglob("result.json"))) == 2


def test_a_policy_cloned_from_the_maze_is_evaluated_in_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(capsys, "generate-maze", "--episodes", "2", "--episode-steps", "20", "--out", "m")
    options = ("--env", "PointMaze_Medium-v3", "--keys", "observation", "--episodes", "1", *TRAIN)
    told = answer(capsys, "train", "bc", "m/maze.npz", *options, "--out", "runs/bc")
    assert [len(returns) for returns in told["returns"]] == [2, 2]


def test_the_authors_hyperparameters_are_a_flag(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(capsys, "train", "iql", "walk.npz", *TRAIN, "--preset", "antmaze-umaze-v2", "--out", "x")
    assert b'\\"expectile\\": 0.9' in (here / "x/policies.safetensors").read_bytes()


def test_the_maze_can_be_walked_without_end(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "generate-maze", "--walk", "--rows", "300", "--out", "w")
    assert any(name.endswith(".hdf5") for name in told["files"])


def test_the_maze_generator_writes_transitions(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(capsys, "generate-maze", "--episodes", "2", "--episode-steps", "20", "--out", "m")
    assert len(Transitions.load(here / "m/maze.npz")[0]) == 40


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "absent.npz"), "absent.npz"),
        (("inspect", "hoper-medium-v2"), "did you mean hopper-medium-v2"),
        (("weights", "r", "walk.npz", "--base-prob", "-1"), "base_prob=-1.0"),
        (("weights", "a", "walk.npz", "--iters", "0"), "iters=0"),
        (("train", "td3bc", "walk.npz", "--weights", "walk.npz"), "holds no priorities"),
        (("train", "td3bc", "walk.npz", "--reweight-eval"), "exclude each other"),
        (("train", "bc", "walk.npz", "--env", "Hoper-v5", *TRAIN), "did you mean Hopper"),
        (("train", "bc", "walk.npz", "--env", "Pendulum-v1", *TRAIN), "widths (3, 1), the data (2, 1)"),
        (("train", "bc", "walk.npz", "--task", "hoper-medium-v2"), "did you mean hopper-medium-v2"),
        (("train", "bc", "walk.npz", "--std", "2"), "give --weights too"),
        (("train", "bc", "walk.npz", "--preset", "hopper-medium-v2"), "has no values by task"),
        (("train", "bc", "walk.npz", "--split", "timeout"), "split are for .hdf5 files"),
        (("report", "nowhere"), "no result.json"),
        (("bench", "--only", "trainer"), "part 'trainer' is unknown: did you mean trainers"),
        (("demo", "--quick", "--full"), "--quick has two seeds"),
        (("sweep", "--data", "walk.npz", "--algorithms", "td3"), "algorithm 'td3' is unknown"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1]
    assert lines[-1].startswith("leap-oper: error:")


def test_weights_of_other_data_are_refused_before_training(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    walk(60, seed=9).save(here / "other.npz")
    answer(capsys, "weights", "r", "other.npz", "--out", "w")
    assert call("train", "td3bc", "walk.npz", "--weights", "w/weights.npz", "--out", "x") == 2
    assert "made for other data" in capsys.readouterr().err
    assert not (here / "x/checkpoints").exists()
