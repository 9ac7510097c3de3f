"""A run that was killed, at any moment, ends with the bits of the run that was left alone."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from leap_shared import files
from leap_shared.checkpoints import CheckpointFolder, check_finite
from leap_shared.errors import UserError

SCRIPT = Path(__file__).with_name("training_to_kill.py")


def trained(folder: Path, kills: int, seed: int = 0) -> list[str]:
    folder.mkdir()
    command = [sys.executable, str(SCRIPT), str(folder), str(kills), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_training_killed_at_20_random_moments_loses_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("LEAP_KILL_SEED", random.SystemRandom().randrange(10**6)))
    _, _, alone = trained(tmp_path / "alone", 0)
    killed, resumed_from, result = trained(tmp_path / "killed", 20, seed)
    assert int(killed) == 20
    assert resumed_from != "None"
    assert result == alone, f"repeat with LEAP_KILL_SEED={seed}"
    leftovers = list((tmp_path / "killed").glob(f".*{files.TEMPORARY_SUFFIX}"))
    assert not leftovers


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_disk_that_fails_while_saving_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    store = CheckpointFolder(tmp_path)
    kept = store.save(1, {"weights": torch.arange(4.0)})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[moment], full)
        with pytest.raises(UserError, match="No space left"):
            store.save(2, {"weights": torch.zeros(4)})
    objects: dict[str, Any] = {"weights": torch.zeros(4)}
    assert store.restore(objects) == 1
    assert store.latest() == kept
    assert torch.equal(objects["weights"], torch.arange(4.0))
    assert not list(tmp_path.glob(f".*{files.TEMPORARY_SUFFIX}"))


def test_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointFolder(tmp_path)
    store.save(1, {"x": torch.ones(1000)})
    newest = store.save(2, {"x": torch.ones(1000) * 2})
    for damage in (lambda data: data[: len(data) // 2], lambda data: data[:900] + b"\x01" + data[901:]):
        newest.write_bytes(damage(newest.read_bytes()))
        objects: dict[str, Any] = {"x": torch.zeros(1000)}
        with caplog.at_level(logging.WARNING):
            assert store.restore(objects) == 1
        assert "damaged" in caplog.text
        assert objects["x"].eq(1).all()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path, keep=3)
    for step in range(1, 8):
        store.save(step, {"step": step})
    assert sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("step-*")) == [5, 6, 7]


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    objects: dict[str, Any] = {"torch": torch.Generator().manual_seed(3), "numpy": np.random.default_rng(3)}
    store = CheckpointFolder(tmp_path)

    def draws() -> list[float]:
        legacy = np.random.random()  # noqa: NPY002 - the global generator is part of the promise
        own = [float(torch.rand((), generator=objects["torch"])), float(objects["numpy"].random())]
        return [random.random(), float(legacy), float(torch.rand(())), *own]

    store.save(1, objects)
    store.restore(objects)
    wanted = draws()
    assert draws() != wanted
    assert store.restore(objects) == 1
    assert draws() == wanted


def test_plain_values_and_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    values = {"a": [1, (2.5, None)], 3: "x", "n": np.arange(3, dtype=np.uint32), "b": True, "f": np.float64(0.1)}
    objects: dict[str, Any] = {"values": values}
    store = CheckpointFolder(tmp_path)
    store.save(1, objects)
    objects = {"values": None}
    store.restore(objects)
    back = objects["values"]
    assert back["a"] == [1, (2.5, None)]
    assert back[3] == "x"
    assert back["n"].dtype == np.uint32
    assert back["n"].tolist() == [0, 1, 2]
    assert back["b"] is True
    assert back["f"] == 0.1


def test_object_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"state\.f is a function"):
        CheckpointFolder(tmp_path).save(1, {"state": {"f": trained}})


def test_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path)
    store.save(1, {"model": nn.Linear(3, 2)})
    with pytest.raises(UserError, match="differ in ema"):
        store.restore({"model": nn.Linear(3, 2), "ema": None})
    with pytest.raises(UserError, match=r"model in .* does not fit"):
        store.restore({"model": nn.Linear(4, 2)})


def test_empty_folder_restores_nothing(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "absent").restore({}) is None


def hold(folder: Path, ready: Any, done: Any) -> None:
    CheckpointFolder(folder).save(1, {})
    ready.set()
    done.wait(30)


def test_two_runs_cannot_save_into_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(UserError, match="another run saves"):
            CheckpointFolder(tmp_path).save(2, {})
    finally:
        done.set()
        other.join()
    CheckpointFolder(tmp_path).save(2, {})


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_nan_loss_stops_with_the_step_and_the_last_good_checkpoint(tmp_path: Path, loss: float | torch.Tensor) -> None:
    store = CheckpointFolder(tmp_path)
    check_finite(0.5, 6, store)
    with pytest.raises(UserError, match="at step 7, no checkpoint"):
        check_finite(loss, 7, store)
    kept = store.save(5, {})
    with pytest.raises(UserError, match=f"at step 7, the last good checkpoint is .*{kept.name}"):
        check_finite(loss, 7, store)
    assert store.latest() == kept
