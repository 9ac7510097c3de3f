"""The commands of the package, and the demo in small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data import walk

from leap_oper import Priorities, __version__
from leap_oper.bandit import bandit, iterations
from leap_oper.cli import app


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        app.main(list(arguments))
    return int(stopped.value.code or 0)


def test_version_names_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert f"leap-oper {__version__}" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(5))
def test_bandit_meets_the_published_mean_rewards(seed: int) -> None:
    for row in iterations(bandit(seed)):
        assert row.mean_reward == pytest.approx(row.published_mean_reward, rel=0.03)


def test_weights_command_writes_priorities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = walk()
    data.save(tmp_path / "data.npz")
    out = tmp_path / "out"
    assert run("weights", "r", str(tmp_path / "data.npz"), "--base-prob", "0.2", "--out", str(out), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    weights = Priorities.load(out / "weights.npz", data)
    assert report["episodes"] == 6
    assert report["weight std"] == pytest.approx(weights.std, rel=1e-5)


def test_bad_data_ends_in_one_line_and_nothing_half_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {key: getattr(walk(), key) for key in ("observations", "actions", "rewards", "next_observations")}
    np.savez(tmp_path / "data.npz", terminals=np.full(60, 0.5), **arrays)
    assert run("weights", "r", str(tmp_path / "data.npz"), "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "terminals must be 0 or 1, row 0 is neither" in error
    assert not (tmp_path / "out" / "weights.npz").exists()


@pytest.mark.slow
def test_quick_demo_writes_its_section_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for _ in range(2):
        assert run("demo", "--quick", "--json", "--device", "cpu", "--out", str(tmp_path)) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]
    assert {"claim", "baseline", "metric", "seeds", "estimate", "interval", "verdict"} <= results[0].keys()
    assert results[0]["control"]["name"] == "oper-control"
    assert len(results[0]["bandit"]) == 5
    pictures = ["maze.png", "priorities.png", "curves.png", "control-maze.png", "bandit.png", "arms.png"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in pictures)
    assert "smoke" in (tmp_path / "section.html").read_text(encoding="utf-8")
