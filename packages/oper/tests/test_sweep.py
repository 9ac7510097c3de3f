"""Sweeps: every combination once, finished ones kept, the same runs on Ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import walk

from leap_oper.sweep import Cell, cells, run_cell, run_sweep
from leap_shared.errors import UserError

SETTINGS: dict[str, Any] = {"seeds": (0, 1), "steps": 4, "every": 2, "device": "cpu", "value_steps": 3}


@pytest.fixture
def data(tmp_path: Path) -> str:
    walk(60).save(tmp_path / "walk.npz")
    return str(tmp_path / "walk.npz")


def test_a_sweep_is_every_combination(tmp_path: Path) -> None:
    made = cells(["a.npz", "b.npz"], ["bc", "iql"], ["uniform"], tmp_path)
    assert [(cell.data, cell.algorithm) for cell in made] == [
        ("a.npz", "bc"),
        ("a.npz", "iql"),
        ("b.npz", "bc"),
        ("b.npz", "iql"),
    ]
    assert len({cell.folder for cell in made}) == 4


@pytest.mark.parametrize("method", ["uniform", "oper-r", "oper-a"])
def test_a_cell_trains_by_its_method(method: str, data: str, tmp_path: Path) -> None:
    cell = Cell(data, "td3bc", method, tmp_path, **{**SETTINGS, "value_iterations": 2})
    report = run_cell(cell)
    assert cell.finished
    assert report["label"] == method
    assert len(report["priorities"]) == (method != "uniform")
    if method == "oper-a":
        assert report["priorities"][0]["std"] > 0


def test_finished_cells_are_not_run_again(data: str, tmp_path: Path) -> None:
    chosen = cells([data], ["bc"], ["uniform", "oper-r"], tmp_path, **SETTINGS)
    notes: list[str] = []
    run_sweep(chosen[:1], note=notes.append)
    before = (chosen[0].folder / "result.json").stat().st_mtime_ns
    assert run_sweep(chosen, note=notes.append) == [cell.folder for cell in chosen]
    assert (chosen[0].folder / "result.json").stat().st_mtime_ns == before
    assert notes[1] == "1 of 2 runs are finished already"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ray_gives_the_same_policies(data: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here = cells([data], ["bc"], ["oper-r"], tmp_path / "here", **SETTINGS)
    there = [dataclasses.replace(cell, out=tmp_path / "there") for cell in here]
    run_sweep(here, note=lambda text: None)
    wrong = dataclasses.replace(there[0], data=str(tmp_path / "none.npz"))
    with pytest.raises(UserError, match=r"1 of 2 runs failed, .*none\.npz"):
        run_sweep([wrong, *there], ray=True, note=lambda text: None)
    files = [(cell.folder / "policies.safetensors").read_bytes() for cell in (here[0], there[0])]
    assert files[0] == files[1]


def test_names_are_checked_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="algorithm 'td3' is unknown: did you mean td3bc"):
        cells(["a.npz"], ["td3"], ["uniform"], tmp_path)
    with pytest.raises(UserError, match="method 'oper' is unknown"):
        cells(["a.npz"], ["bc"], ["oper"], tmp_path)
    with pytest.raises(UserError, match="at least one data set"):
        cells([], ["bc"], ["uniform"], tmp_path)


def test_runs_that_fail_are_told_once_the_others_are_finished(data: str, tmp_path: Path) -> None:
    chosen = cells([str(tmp_path / "absent.npz"), data], ["bc"], ["uniform"], tmp_path, **SETTINGS)
    with pytest.raises(UserError, match=r"1 of 2 runs failed, .*absent\.npz"):
        run_sweep(chosen, note=lambda text: None)
    assert chosen[1].finished


def test_a_folder_of_other_settings_is_neither_finished_nor_overwritten(data: str, tmp_path: Path) -> None:
    cell = Cell(data, "bc", "uniform", tmp_path, **SETTINGS)
    run_cell(cell)
    longer = dataclasses.replace(cell, steps=6)
    assert cell.finished
    assert not longer.finished
    with pytest.raises(UserError, match="holds a run of other settings"):
        run_sweep([longer], note=lambda text: None)


def test_data_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would share a folder"):
        cells(["a/data.npz", "b/data.npz"], ["bc"], ["uniform"], tmp_path)


def test_seeds_of_a_cell_make_different_policies(data: str, tmp_path: Path) -> None:
    from leap_shared.offline.policies import Policies

    cell = Cell(data, "bc", "uniform", tmp_path, **SETTINGS)
    run_cell(cell)
    actions = Policies.load(cell.folder / "policies.safetensors").act(np.ones((2, 1, 2), np.float32))
    assert actions[0] != actions[1]
