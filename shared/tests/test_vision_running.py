"""Processes that a verb starts: what they are told, what they answer, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vision_training import write_pictures

from leap_shared.cli import App, Context
from leap_shared.vision import running
from leap_shared.vision.official import Official
from leap_shared.vision.recipes import Recipe

RANKS = "import json, os; r = os.environ['RANK']; r == '0' and print(json.dumps([r, os.environ['WORLD_SIZE']]))"
STARTS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which may be ignored where these tests run
from leap_shared.vision.running import start_processes
start_processes(2, ["-c", sys.argv[1]])
"""
WAITS = """
import os, pathlib, time
pathlib.Path(r"{folder}", str(os.getpid())).touch()
time.sleep(60)
"""


class Train(running.Training):
    """Train."""

    def run(self, context: Context) -> object:
        return self.train(context, Recipe("resnet10t", 4, 0.0), Official({}, {}, ""))


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        App("tool", "leap_shared", (Train,)).main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


@pytest.fixture
def command(tmp_path: Path) -> list[object]:
    data = write_pictures(tmp_path)
    return ["train", "--cfg", "resnet10t", "--data", data, "--device", "cpu", "--out", tmp_path / "run"]


def test_gpus_start_processes_that_repeat_the_command_and_shows_their_answer(
    command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Any] = []

    def start(*arguments: Any) -> Any:
        started.extend(arguments)
        return [{"weights": "weights", "top1": 50.0}]

    monkeypatch.setattr(running, "start_processes", start)
    assert call(*command, "--gpus", 2, "--json") == 0
    config = tmp_path / "run" / "config.yaml"
    main = "from test_vision_running.cli import main; main()"
    assert started == [2, ["-c", main, "train", "--config", str(config), "--json"]]
    assert "gpus: 2" in config.read_text()
    assert json.loads(capsys.readouterr().out) == [{"weights": "weights", "top1": 50.0}]


def test_processes_that_fail_end_the_command_with_their_code_and_leave_nothing(
    command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "start_processes", lambda *_: sys.exit(7))
    assert call(*command, "--gpus", 2) == 7
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("world", "flags", "message"),
    [
        (None, ("--gpus", 0), "--gpus 0: expected 1 or more"),
        (None, ("--gpus", 8), "--gpus 8, but this machine has 2: give 2 or less, or --device cpu"),
        ("2", ("--gpus", 8), "--gpus 8, but torchrun started 2 processes: leave torchrun away"),
        ("1", ("--gpus", 8), "--gpus 8, but torchrun started 1 processes"),
        (None, ("--gpus", 2, "--batch-size", -2), "batch_size=-2: expected a positive number"),
    ],
)
def test_processes_that_cannot_be_are_not_started(
    world: str | None,
    flags: tuple[object, ...],
    message: str,
    command: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(running, "start_processes", lambda *_: sys.exit(7))
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    command[command.index("--device") : command.index("--device") + 2] = []
    assert call(*command, *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_processes_know_their_rank_and_answer_in_json() -> None:
    assert running.start_processes(2, ["-c", RANKS]) == ["0", "2"]


@pytest.mark.slow
def test_the_code_of_processes_that_fail_is_passed_on() -> None:
    with pytest.raises(SystemExit) as stopped:
        running.start_processes(2, ["-c", "raise SystemExit(3)"])
    assert stopped.value.code == 1  # torchrun's own


@pytest.mark.slow
def test_an_interrupt_ends_all_processes(tmp_path: Path) -> None:
    code = WAITS.format(folder=tmp_path)
    starter = subprocess.Popen([sys.executable, "-c", STARTS, code], stderr=subprocess.DEVNULL)
    while len(names := [path.name for path in tmp_path.iterdir()]) < 2 and starter.poll() is None:
        time.sleep(0.05)
    starter.send_signal(signal.SIGINT)
    assert starter.wait(60) == 128 + signal.SIGINT
    for name in names:
        with pytest.raises(ProcessLookupError):
            os.kill(int(name), 0)
