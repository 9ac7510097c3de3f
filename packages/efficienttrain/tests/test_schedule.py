"""The released arithmetic: epochs, resuming, rates, stage tables."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leap_efficienttrain import released
from leap_efficienttrain.schedule import (
    continuous_rate,
    lr_schedule,
    reference_rate,
    resume_epoch,
    stage_boundary,
    stage_epochs,
)
from leap_shared.errors import UserError

TABLES = json.loads((Path(__file__).parent / "golden" / "stages.json").read_text())


def test_the_ratio_of_areas_is_one_division():
    assert stage_epochs(100, 224, 160) == 196
    assert int(100 * (224 / 160) ** 2) == 195  # what squaring the ratio of sides would give


def test_halves_are_rounded_to_even_on_resume():
    assert resume_epoch(217, 96, 160) == 78
    assert resume_epoch(1, 96, 96, 1, 2) == 0
    assert resume_epoch(3, 96, 96, 1, 2) == 2


@given(total=st.integers(1, 2000), shares=st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_stages_end_in_order_and_the_last_at_the_end(total, shares):
    parts = [share / sum(shares) for share in shares]
    ends = [stage_boundary(total, parts, index) for index in range(len(parts))]
    assert ends == sorted(ends)
    assert ends[-1] == total


def test_the_warm_up_reaches_the_largest_rate_and_the_cosine_starts_there():
    rates = lr_schedule(4e-3, 1e-6, 10, 7, 2)
    assert rates[0] == 0
    assert rates[13] == rates[14] == 4e-3
    assert rates[-1] > 1e-6


def test_warm_up_steps_take_the_place_of_epochs_even_of_none():
    assert np.array_equal(lr_schedule(1.0, 0.0, 4, 5, 0, 10), lr_schedule(1.0, 0.0, 4, 5, 2))
    assert lr_schedule(1.0, 0.0, 4, 5)[0] == 1.0


def test_a_warm_up_of_one_iteration_is_a_rate_of_zero():
    assert lr_schedule(1.0, 0.0, 3, 1, 1)[:2].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("numbers", [(1.0, 0.0, -1, 5), (1.0, 0.0, 5, 0), (1.0, 0.0, 5, 5, -1), (1.0, 0.0, 2, 5, 3)])
def test_impossible_schedules_are_refused(numbers):
    with pytest.raises(UserError, match=r"expected|longer than"):
        lr_schedule(*numbers)


@given(steps=st.integers(2, 400), warmup=st.integers(0, 100))
def test_single_rates_are_those_of_the_whole_schedule(steps, warmup):
    warmup = min(warmup, steps)
    whole = reference_rate(np.arange(steps, dtype=np.float64), 4e-3, 1e-6, steps, warmup)
    some = np.arange(0, steps, 7, dtype=np.float64)
    assert np.array_equal(reference_rate(some, 4e-3, 1e-6, steps, warmup), whole[some.astype(int)])


@given(progress=st.floats(0, 1), warmup=st.floats(0, 0.5), kind=st.sampled_from(["cosine", "linear", "constant"]))
def test_continuous_rates_stay_between_their_ends(progress, warmup, kind):
    assert 0 <= continuous_rate(progress, warmup, 1.0, 0.1, kind) <= 1.0 + 1e-12


def test_continuous_rates_end_at_the_last_rate():
    assert continuous_rate(1.0, 0.1, 1.0, 0.25, "cosine") == 0.25
    assert continuous_rate(1.0, 0.1, 1.0, 0.25, "linear") == 0.25
    assert math.isclose(continuous_rate(0.55, 0.1, 1.0, 0.0, "cosine"), 0.5)


@pytest.mark.golden
@pytest.mark.parametrize("key", TABLES)
def test_stage_tables_are_those_of_the_released_scripts(key):
    recipe, epochs = key.split("@")
    release = "R1" if recipe.startswith("iccv") else "R2"
    rows = released.stage_table(TABLES[key][0]["model"], int(epochs), release, "wReplay" in recipe)
    assert len(rows) == len(TABLES[key])
    for row, want in zip(rows, TABLES[key], strict=True):
        for name in want.keys() & row.keys():
            assert row[name] == pytest.approx(want[name], abs=1e-12), name


def test_a_stage_without_epochs_leaves_the_older_checkpoint_to_the_next():
    rows = released.stage_table("swin_tiny", 6)
    assert [row["epochs_run"] for row in rows if row["input_size"] == 224] == [1, 0, 1, 1]
    assert [row["start_epoch"] for row in rows if row["input_size"] == 224] == [3, 4, 4, 5]


def test_cswin_base_of_the_second_release_trains_with_lamb():
    (row, *_) = released.stage_table("cswin_base", 200)
    assert (row["opt"], row["lr"], row["opt_eps"], row["weight_decay"]) == ("lamb", 8e-3, 1e-6, 0.10)
    assert released.stage_table("cswin_base", 300, "R1")[0]["lr"] == 4e-3


@pytest.mark.parametrize("name", released.ALIASES)
def test_short_names_are_of_the_same_family(name):
    recipe = released.recipe_of(name)
    assert recipe.model.lower().startswith(name.split("_")[0])
    assert name.split("_")[1] in recipe.model


def test_replay_divides_batches_and_epochs():
    rows = released.stage_table("resnet50", 200, "R2", True)
    assert [row["batch_size"] for row in rows] == [128] * 2 + [256] * 4 + [512] * 4
    assert sum(row["epochs_run"] for row in rows) == 213


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("swim_tiny", 200), "did you mean"),
        (("swin_tiny", 0), "positive"),
        (("swin_small", 200, "R2", True), "no R2 script with a replay buffer"),
        (("swin_tiny", 200, "R1", True), "no R1 script with a replay buffer"),
    ],
)
def test_scripts_that_were_not_released_are_refused(arguments, text):
    with pytest.raises(UserError, match=text):
        released.stage_table(*arguments)
