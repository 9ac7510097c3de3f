"""Settings of benchmarks: what is refused, and what of them reaches a measurement."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_shared.bench import QUICK, BenchmarkSettings, Case, Row, file_name
from leap_shared.cli import Context
from leap_shared.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CASE = Case("sum", lambda: None, {"other": lambda: None}, target=2.0)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("cpu", 3, tmp_path / "out", lambda path: None)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of every comparison, with the targets of its cases."""
    found: list[dict[str, Any]] = []

    def compare(cases: Any, **options: Any) -> list[Row]:
        found.append({"targets": [case.target for case in cases], **options})
        return []

    monkeypatch.setattr("leap_shared.bench.settings.compare", compare)
    return found


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"parts": ("crops",)}, "part 'crops' is unknown: did you mean"),
        ({"rounds": 1}, "rounds 1: expected 2 or more"),
        ({"threads": ()}, "threads none: expected numbers of 1 or more, or 0 for all"),
        ({"threads": (2, -1)}, "threads 2, -1: expected"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        BenchmarkSettings(**options).check(("crop", "loader"))


def test_numbers_of_threads_are_measured_once_and_one_of_them_on_a_gpu() -> None:
    settings = BenchmarkSettings(threads=(7, 0, torch.get_num_threads()))
    assert settings.thread_counts(CPU) == [7, torch.get_num_threads()]
    assert settings.thread_counts(GPU) == [7]
    with pytest.raises(UserError, match="device meta cannot be timed: give --device cpu or cuda"):
        settings.thread_counts(torch.device("meta"))


def test_a_measurement_gets_rounds_warm_up_seed_and_the_clock_of_its_threads(
    context: Context, seen: list[dict[str, Any]]
) -> None:
    settings = BenchmarkSettings(rounds=9, warmup=4, min_seconds=0.5)
    settings.measure([CASE], context, 1)
    settings.measure([CASE], context, 2, few=3)
    names = ("rounds", "warmup", "min_seconds", "seed", "threads", "timer")
    assert [tuple(one[name] for name in names) for one in seen] == [
        (9, 4, 0.5, 3, 1, time.thread_time),
        (3, 1, 0.5, 3, 2, time.perf_counter),
    ]
    BenchmarkSettings(rounds=2).measure([CASE], context, 1, few=3)
    assert seen[-1]["rounds"] == 2


def test_targets_hold_for_real_sizes_and_one_thread(context: Context, seen: list[dict[str, Any]]) -> None:
    BenchmarkSettings().measure([CASE], context, 1)
    BenchmarkSettings().measure([CASE], context, 2)
    BenchmarkSettings(**QUICK).measure([CASE], context, 1)
    assert [one["targets"] for one in seen] == [[2.0], [None], [None]]


def test_files_of_several_threads_have_names_of_their_own() -> None:
    assert [file_name("crop", count, CPU) for count in (1, 2)] == ["crop", "crop-2-threads"]
    assert file_name("crop", 2, GPU) == "crop"
