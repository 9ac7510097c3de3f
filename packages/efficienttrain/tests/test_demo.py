"""The demonstration: arms differ in what they are named for, seconds are training's, verdicts follow their rules."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leap_efficienttrain import demo, miniature
from leap_efficienttrain.arms import ARMS, COMPARISONS, MATCHED, METRIC, SECONDS, Comparison, Problem
from leap_efficienttrain.demo import CLAIM, Settings
from leap_efficienttrain.miniature import ConvNet, Recipe, accuracy, augment, train
from leap_efficienttrain.tasks import Pictures
from leap_shared.cli import Context
from leap_shared.errors import UserError

CPU = torch.device("cpu")
TINY = Recipe(widths=(4, 8), batch=20)
DIGITS = Problem("digits", 16, 2, 0.5)


def context(out: Path) -> Context:
    return Context("cpu", 0, out, lambda _: None)


def pictures(count: int, side: int = 16, seed: int = 0) -> Pictures:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    return Pictures(images, torch.arange(count) % 3)


def test_sizes_of_the_arms_are_the_preset_in_proportion() -> None:
    sizes = [stage.size for stage in Problem().curriculum("et third", TINY).stages]
    assert sizes == [48] * 2 + [64] * 4 + [96] * 4


@pytest.mark.parametrize(
    ("arm", "sizes", "magnitudes"),
    [
        ("third", {16}, {9}),
        ("et third", {6, 12, 16}, set(range(10))),
        ("sizes third", {6, 12, 16}, {9}),
        ("magnitudes third", {16}, set(range(10))),
    ],
)
def test_arms_change_what_they_are_named_for(arm: str, sizes: set[int], magnitudes: set[int]) -> None:
    curriculum = DIGITS.curriculum(arm, TINY)
    assert {stage.size for stage in curriculum.stages} == sizes
    assert {stage.randaug for stage in curriculum.stages} == magnitudes
    assert curriculum.equivalent_epochs == pytest.approx(DIGITS.epochs / 3)
    assert (curriculum.base_size, curriculum.batch, curriculum.lr.base) == (16, 20, TINY.learning_rate)


@pytest.mark.parametrize(("problem", "count"), [*zip(Settings().problems, (1224, 1200), strict=True)])
def test_arms_of_a_third_go_through_about_as_many_pixels(problem: Problem, count: int) -> None:
    pixels = {}
    for arm in ("third", "et third", "sizes third", "magnitudes third"):
        states = problem.curriculum(arm, Recipe()).plan(count).states
        pixels[arm] = sum((state.steps or 0) * state.size**2 for state in states)
    assert [pixels[arm] / pixels["third"] for arm in pixels] == pytest.approx([1] * 4, rel=0.04)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(4, 20), st.integers(0, 10))
def test_augmentation_keeps_the_shape_and_the_range(count: int, side: int, magnitude: int) -> None:
    x = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(side))
    found = augment(x, magnitude, torch.Generator().manual_seed(count))
    assert found.shape == x.shape
    assert float(found.min()) >= float(x.min()) - 1e-5
    assert float(found.max()) <= float(x.max()) + 1e-5


def test_augmentation_grows_with_its_magnitude_from_none_at_0() -> None:
    line = torch.linspace(-1, 1, 32)
    x = (line[None] * line[:, None]).expand(64, 3, 32, 32).contiguous()
    moved = [float((augment(x, m, torch.Generator().manual_seed(0)) - x).abs().mean()) for m in (0, 3, 9)]
    assert moved[0] == 0
    assert moved[0] < moved[1] < moved[2]


def test_augmentation_repeats_for_a_generator() -> None:
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    first, again, other = (augment(x, 9, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_learns_what_colours_tell() -> None:
    images = torch.zeros(60, 16, 16, 3, dtype=torch.uint8)
    labels = torch.arange(60) % 3
    images[torch.arange(60), :, :, labels] = 200
    model = ConvNet((8, 16), 3, 0)
    coloured = Pictures(images, labels)
    train(model, coloured, DIGITS.curriculum("et third", TINY, 12), TINY, 0, CPU)
    assert accuracy(model, coloured, CPU) == 100


def test_training_goes_through_the_plan_s_pictures_at_each_size() -> None:
    curriculum = DIGITS.curriculum("et third", TINY, 7)
    spent = train(ConvNet((4, 8), 3, 0), pictures(60), curriculum, TINY, 0, CPU)
    expected: dict[int, int] = {}
    for leg in curriculum.plan(60).legs:
        expected[leg.stage.size] = expected.get(leg.stage.size, 0) + (leg.updates or 0) * leg.batch
    assert {size: count for size, (_, count) in spent.items()} == expected


def test_training_sees_pictures_of_the_stage_s_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(x: torch.Tensor, magnitude: float, generator: torch.Generator) -> torch.Tensor:
        seen.append((x.shape[2], magnitude))
        return augment(x, magnitude, generator)

    monkeypatch.setattr(miniature, "augment", noted)
    curriculum = DIGITS.curriculum("et third", TINY, 10)
    train(ConvNet((4, 8), 3, 0), pictures(20), curriculum, TINY, 0, CPU)
    assert list(dict.fromkeys(seen)) == [(stage.size, stage.randaug) for stage in curriculum.stages]


def test_a_seed_repeats_the_weights_bit_by_bit() -> None:
    found = []
    for seed in (0, 0, 1):
        model = ConvNet((4, 8), 3, seed)
        train(model, pictures(40), DIGITS.curriculum("third", TINY, 2), TINY, seed, CPU)
        found.append(model[-1].weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widths": ()}, r"widths \(\), batch 32: expected"),
        ({"batch": 0}, "batch 0: expected"),
        ({"learning_rate": 0}, "learning_rate 0"),
        ({"label_smoothing": 1}, "label_smoothing 1"),
    ],
)
def test_impossible_recipe_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"side": 98}, "base size 98 is not a multiple of 16"),
        ({"epochs": 0}, "epochs is 0"),
        ({"kind": "given", "data": "pictures"}, "give both, or none"),
        ({"data": "pictures", "validation": "others"}, "give both, or none"),
        ({"kind": "given"}, "give both, or none"),
    ],
)
def test_impossible_problem_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Problem(**values)


def test_experiment_without_seeds_or_pictures_is_refused() -> None:
    with pytest.raises(UserError, match="there are no seeds"):
        Settings(seeds=())
    with pytest.raises(UserError, match="there are no pictures"):
        Settings(problems=())


def outcomes(ours: list[float], theirs: list[float], quantity: str = METRIC) -> dict[str, dict[int, dict[str, float]]]:
    rows = {"et third": ours, "third": theirs}
    return {ARMS[arm].title: {seed: {quantity: x} for seed, x in enumerate(values)} for arm, values in rows.items()}


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.1, 0.2, 0.3), "reproduced"),
        ((-0.4, -0.5, -0.6), "reproduced"),
        ((-3.0, -3.1, -3.2), "not reproduced"),
        ((-4.0, 0.0, 4.0), "underpowered"),
        ((5.0,), "underpowered"),
    ],
)
def test_as_accurate_allows_a_loss_below_the_least_difference(differences: tuple[float, ...], verdict: str) -> None:
    found = outcomes([90 + x for x in differences], [90.0] * len(differences))
    facts = Comparison("et third", "third", "as accurate").judge(CLAIM, found, 5)
    assert facts["verdict"] == verdict
    assert facts["estimate"] == pytest.approx(sum(differences) / len(differences))


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ((6.6, 6.7, 6.8), "reproduced"),
        ((9.8, 9.9, 9.85), "not reproduced"),
        ((13.0, 12.0, 14.0), "not reproduced"),
        ((5.0, 9.0, 12.0), "underpowered"),
    ],
)
def test_faster_means_saved_seconds_seed_by_seed(ours: tuple[float, ...], verdict: str) -> None:
    facts = Comparison("et third", "third", "faster").judge(CLAIM, outcomes(list(ours), [10.0] * 3, SECONDS), 5)
    assert facts["verdict"] == verdict
    assert facts["values"] == pytest.approx([100 * (1 - seconds / 10) for seconds in ours])


def test_more_accurate_is_judged_by_the_experiment_s_rule() -> None:
    rule = Comparison("et third", "third", "more accurate")
    found = [outcomes([90 + x, 90 + x + 0.1, 90 + x + 0.2], [90.0] * 3) for x in (2.0, 0.1, -5.0)]
    assert [rule.judge(CLAIM, each, 5)["verdict"] for each in found] == [
        "reproduced",
        "not reproduced",
        "not reproduced",
    ]


def measured(seconds: dict[str, float]) -> Any:
    """A stand-in for training: its seconds and accuracies follow from the arm, and it notes the epochs it was given."""
    calls: list[tuple[str, int, float | None]] = []

    def outcome(seed: int, *, arm: str, problem: Problem, epochs: float | None = None, **_: Any) -> dict[str, float]:
        calls.append((arm, seed, epochs))
        used = seconds.get(arm, 1.0)
        rates = {f"ms per picture at {size} px": float(size) for size in (6, 12, 16)}
        return {METRIC: 50.0 + len(arm) + seed % 3, SECONDS: used + seed, demo.WORK: 1.0, **rates}

    return outcome, calls


def test_baseline_of_equal_seconds_is_given_epochs_by_the_seed_s_own_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, calls = measured({"full": 8.0, "et two thirds": 6.0})
    monkeypatch.setattr(demo, "_outcome", outcome)
    demo.run(Settings(seeds=(0, 2), problems=(DIGITS,), recipe=TINY), context(tmp_path))
    matched = {seed: epochs for arm, seed, epochs in calls if arm == MATCHED}
    assert matched == {0: pytest.approx(0.5 * 6 / 8), 2: pytest.approx(0.5 * 8 / 10)}
    assert [arm for arm, seed, _ in calls if seed == 0] == list(ARMS)


def test_killed_demo_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, calls = measured({})
    problems = (DIGITS, replace(DIGITS, epochs=1))

    def broken(seed: int, *, arm: str, **options: Any) -> dict[str, float]:
        if arm == MATCHED and seed == 1:
            raise KeyboardInterrupt
        found: dict[str, float] = outcome(seed, arm=arm, **options)
        return found

    monkeypatch.setattr(demo, "_outcome", broken)
    given_settings = Settings(seeds=(0, 1), problems=problems, recipe=TINY)
    with pytest.raises(KeyboardInterrupt):
        demo.run(given_settings, context(tmp_path))
    done = len(calls)
    monkeypatch.setattr(demo, "_outcome", outcome)
    found = demo.run(given_settings, context(tmp_path))
    assert done == 2 * len(ARMS) - 1
    assert [arm for arm, *_ in calls[done:]] == [MATCHED, *ARMS, *ARMS]
    assert [len(row[METRIC]["values"]) for task in found["tasks"] for row in task["arms"]] == [2] * 2 * len(ARMS)


@pytest.mark.slow
def test_quick_demo_writes_its_section_figure_and_table(tmp_path: Path) -> None:
    result = demo.run(Settings.quick(3), context(tmp_path))
    assert [row["arm"] for row in result["arms"]] == [arm.title for arm in ARMS.values()]
    assert [task["task"] for task in result["tasks"]] == ["photographs, 32 px", "digits, 16 px"]
    for task in result["tasks"]:
        assert all(min(row[SECONDS]["values"]) > 0 for row in task["arms"])
        assert task["costs"][-1]["operations"] == task["costs"][-1]["time"] == 1
        assert task["costs"][0]["operations"] < 0.25
    assert (tmp_path / "curriculum.png").stat().st_size > 10_000
    section = (tmp_path / "section.html").read_text(encoding="utf-8")
    assert "smoke test" in section
    assert section.count("data:image/png") == 2
    assert json.loads((tmp_path / "section.json").read_text(encoding="utf-8"))["verdict"] == result["verdict"]
    rows = demo.table(result)
    assert len(rows) == 2 * (len(ARMS) + len(COMPARISONS))
    assert {row["verdict"] for row in rows} <= {"", "reproduced", "not reproduced", "underpowered"}


def test_accuracies_repeat_with_the_seed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"arm": "et third", "problem": DIGITS, "recipe": TINY, "device": CPU}
    first, again = (demo._outcome(4, **options) for _ in range(2))
    assert first[METRIC] == again[METRIC]
    assert first[demo.WORK] == again[demo.WORK]
    assert all(math.isfinite(value) for value in first.values())


def test_own_pictures_take_the_place_of_those_that_ship(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    names = []
    for name, count in (("train", 40), ("test", 12)):
        images = generator.integers(256, size=(count, 20, 20, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(count) % 4)
        names.append(str(tmp_path / f"{name}.npz"))
    chosen = replace(Settings.of(*names, side=48, epochs=15, seeds=(0,)), recipe=TINY)
    result = demo.run(chosen, context(tmp_path / "out"))
    (task,) = result["tasks"]
    assert task["kind"] == "given"
    assert [row["seeds"] for row in result["arms"]] == [[0]] * len(ARMS)
    assert task["comparisons"][0]["interval"] is None
