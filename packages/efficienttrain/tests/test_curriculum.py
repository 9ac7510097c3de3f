"""Curricula as data: presets, YAML, stages on a data set, what is refused."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.presets import PRESETS
from leap_efficienttrain.released import stage_table
from leap_efficienttrain.stages import LearningRate, Stage
from leap_shared.errors import UserError

IMAGENET = 1_281_167
RELEASED = {"et++": "swin_tiny", "et++:deit": "deit_small", "et++:convnext": "convnext_tiny", "et:iccv": "swin_tiny"}


@pytest.mark.parametrize("epochs", [100, 200, 300, 450])
@pytest.mark.parametrize("preset", RELEASED)
def test_reference_arithmetic_runs_the_passes_of_the_released_scripts(preset, epochs):
    plan = Curriculum.preset(preset, epochs).plan(IMAGENET, 8)
    rows = stage_table(RELEASED[preset], epochs, "R1" if preset == "et:iccv" else "R2")
    assert [leg.passes for leg in plan.legs] == [row["epochs_run"] for row in rows]
    assert [leg.start_epoch for leg in plan.legs] == [row["start_epoch"] for row in rows]


@pytest.mark.parametrize(("preset", "passes"), [("et++", 454), ("et++:deit", 469), ("et++:convnext", 315)])
def test_the_passes_at_200_epochs_are_the_published_ones(preset, passes):
    assert Curriculum.preset(preset, epochs=200).plan().passes == passes


@pytest.mark.parametrize(
    ("name", "passes"), [("et++:deit_small", 228), ("et++:resnet50", 213), ("et++:swin_tiny", 345)]
)
def test_replay_decodes_as_few_passes_as_published(name, passes):
    plan = Curriculum.preset(name, 200, replay=True).plan(IMAGENET, 8)
    assert plan.passes == pytest.approx(passes, abs=1)
    assert all(leg.batch == 4096 for leg in plan.legs)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_yaml(preset, tmp_path):
    curriculum = Curriculum.preset(preset)
    curriculum.to_yaml(tmp_path / "curriculum.yaml")
    assert Curriculum.from_yaml(tmp_path / "curriculum.yaml") == curriculum
    assert Curriculum.from_yaml(curriculum.to_yaml()) == curriculum


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_ends_at_its_base_size(preset):
    assert Curriculum.preset(preset, base_size=448).stages[-1].size == 448


def test_a_whole_curriculum_survives_yaml():
    stages = (Stage(0.25, 16, 2.5, 2, 2, 2, 8), Stage(0.75, 32))
    lr = LearningRate("continuous", "linear", 0.1, 0.01, 3, 0.1, "linear")
    curriculum = Curriculum(stages, 7.5, 32, "epochs", "continuous", "area", 64, 16, lr, 100, "mine")
    assert Curriculum.from_yaml(curriculum.to_yaml()) == curriculum
    assert Curriculum.from_yaml(curriculum.to_yaml(), epochs=9, batch=32) == replace(
        curriculum, equivalent_epochs=9, batch=32
    )


THREE = (Stage(0.5, 96, 0, 2), Stage(0.25, 160, 4), Stage(0.25, 224, 9))


def small(stages=THREE, **changes):
    return Curriculum(stages, **{"equivalent_epochs": 6, "batch": 64, "arithmetic": "continuous", **changes})


def test_continuous_arithmetic_spends_each_stage_its_share_of_the_compute():
    plan = small().plan(10_000)
    compute = [leg.updates * leg.stage.size**2 for leg in plan.legs]
    shares = [spent / sum(compute) for spent in compute]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=2e-3)
    assert sum(compute) / 224**2 == pytest.approx(6 * (10_000 // 64), rel=2e-3)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([8, 12, 16, 20, 24]), min_size=1, max_size=5),
    weights=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    samples=st.integers(40, 500),
    world=st.sampled_from([1, 2, 4]),
    epochs=st.floats(5, 40),
    unit=st.sampled_from(["compute", "epochs"]),
)
def test_states_tile_the_training(sizes, weights, samples, world, epochs, unit):
    sizes, weights = [*sorted(sizes), 24], [*weights[: len(sizes)], 3]
    stages = tuple(Stage(weight / sum(weights), size) for weight, size in zip(weights, sizes, strict=True))
    curriculum = Curriculum(stages, epochs, 24, unit, "continuous", batch=8)
    plan = curriculum.plan(samples, world)
    assert sum(state.steps for state in plan.states) == plan.updates
    update, progress = 0, 0.0
    for state in plan.states:
        assert state.first_update == update
        assert plan.at(update) is state
        assert plan.at(update + state.steps - 1) is state
        assert state.progress == pytest.approx(progress, abs=1e-9)
        assert 0 < state.steps <= state.leg.steps_per_epoch
        update, progress = update + state.steps, state.progress_at(state.steps)
    assert progress == pytest.approx(1)


@pytest.mark.parametrize("rule", ["continuous", "reference"])
def test_rates_do_not_depend_on_whether_the_size_of_the_data_was_given(rule):
    curriculum = Curriculum.preset("et++", 100, lr=LearningRate(rule=rule))
    known, unknown = (list(curriculum.epochs(samples, 8)) for samples in (IMAGENET, None))
    for one, other in list(zip(known, unknown, strict=True))[::20]:
        assert one.lr(3) == pytest.approx(other.lr(3, steps=IMAGENET // 4096))
    with pytest.raises(UserError, match="give samples to epochs"):
        unknown[0].lr(3)


def test_the_reference_rate_jumps_where_the_size_changes_and_the_continuous_does_not():
    jumps = {}
    for rule in ("reference", "continuous"):
        plan = Curriculum.preset("et++", 200, lr=LearningRate(rule=rule)).plan(IMAGENET, 8)
        jumps[rule] = [
            (plan.lr(leg.first_update - 1), plan.lr(leg.first_update)) for leg in (plan.legs[2], plan.legs[6])
        ]
    assert [f"{rate:.3g}" for pair in jumps["reference"] for rate in pair] == [
        *("0.00367", "0.00376"),
        *("0.00152", "0.00165"),
    ]
    assert all(math.isclose(*pair, rel_tol=1e-3) for pair in jumps["continuous"])


def test_the_rate_follows_the_batch_by_its_root():
    stages = (Stage(0.5, 112, batch_scale=4), Stage(0.5, 224))
    curriculum = Curriculum(stages, 100, batch=256, lr=LearningRate(kind="constant", warmup_epochs=0, base=1e-3))
    plan = curriculum.plan(10_000)
    assert plan.lr(5) == 2e-3
    assert plan.lr(plan.updates - 1) == 1e-3
    assert [leg.batch for leg in plan.legs] == [1024, 256]


def test_the_warm_up_takes_a_fifth_at_the_most():
    plan = small(lr=LearningRate(base=1.0)).plan(10_000)
    largest = max(range(plan.updates), key=plan.lr)
    assert plan.at(largest).progress_at(largest - plan.at(largest).first_update) == pytest.approx(0.2, abs=2e-3)


def test_micro_batches_follow_the_stage_and_make_up_the_batch():
    plan = small(micro_batch=8).plan(1000, world=2)
    assert [(leg.micro_batch, leg.accumulate) for leg in plan.legs] == [(16, 2), (8, 4), (8, 4)]


def test_drop_path_grows_with_the_length_of_the_training():
    assert Curriculum.preset("et++", 100).drop_path(0.2) == 0.1
    assert Curriculum.preset("et:iccv", 100).drop_path(0.2) == 0.2


def test_training_can_begin_at_any_pass():
    curriculum = Curriculum.preset("et++", 100)
    whole = list(curriculum.epochs(IMAGENET, 8))
    assert list(curriculum.epochs(IMAGENET, 8, start=117)) == whole[117:]


def test_a_rule_alone_is_a_learning_rate():
    assert Curriculum.preset("et++", lr="reference").lr == LearningRate("reference")


def test_progress_is_known_without_the_size_of_the_data():
    bare, full = (list(Curriculum.preset("et++").epochs(*given)) for given in ((), (IMAGENET, 8)))
    assert [state.progress for state in bare] == pytest.approx([state.progress for state in full])


def test_policies_have_timms_names():
    state = next(iter(small().epochs()))
    assert (state.randaug, state.size, state.magnitude) == ("rand-m0-mstd0.5-inc1", 96, 0)


def test_sizes_grow_with_the_base_size_to_what_the_model_takes():
    assert [stage.size for stage in Curriculum.preset("et++", base_size=384).stages[::4]] == [160, 288, 384]
    assert Curriculum.preset("et++:deit", base_size=336).stages[0].size == 144
    with pytest.raises(UserError, match="base size 230 is not a multiple of 32: take 224"):
        Curriculum.preset("et++", base_size=230)


def test_differences_name_what_another_curriculum_has():
    other = Curriculum.preset("et++", 100)
    assert other.differences(replace(other, name="same", micro_batch=7)) == []
    odd = other.differences(Curriculum.preset("et++:deit", 200))
    assert "equivalent_epochs is 100, was 200" in odd
    assert "stage 7: size is 224, was 192" in odd
    assert small().differences(other)[-1] == "it has 3 stages, had 10"


def test_a_last_stage_below_the_base_size_is_warned_of():
    with pytest.warns(UserWarning, match="below the base size 224"):
        Curriculum((Stage(1, 160),))


def test_no_preset_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in PRESETS:
            Curriculum.preset(name)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Curriculum(()), "without stages"),
        (lambda: Curriculum((Stage(0.5, 224),)), "add up to 0.5: expected 1"),
        (lambda: Curriculum((Stage(0.5, 256), Stage(0.5, 224))), "size 256 is above the base size 224"),
        (lambda: Stage(0, 224), "share 0"),
        (lambda: Stage(1, 0), "size 0"),
        (lambda: Stage(1, 224, 11), "randaug 11: expected a number from 0 to 10"),
        (lambda: Stage(1, 224, replay=2), "without a buffer"),
        (lambda: small(equivalent_epochs=0), "equivalent_epochs 0"),
        (lambda: LearningRate("reference", "linear"), "the released rule is a cosine"),
        (lambda: LearningRate(warmup_share=1), "warmup_share 1"),
        (lambda: Curriculum.preset("et+"), "known|did you mean"),
        (lambda: Curriculum.preset("et++:swin_huge"), "did you mean"),
        (lambda: Curriculum.preset("et++", epoch=5), "unknown field 'epoch'"),
        (lambda: Curriculum.preset("et++", base_size=(224, 160)), "expected one whole number"),
        (lambda: Curriculum.preset("et:iccv", replay=True), "no replay buffer was released"),
    ],
)
def test_impossible_curricula_are_refused(make, text):
    with pytest.raises(UserError, match=text):
        make()


def test_words_that_a_field_does_not_know_are_refused():
    for field in ("unit", "arithmetic", "downsample"):
        with pytest.raises((UserError, TypeCheckError), match="steps"):
            small(**{field: "steps"})
    for field in ("rule", "kind", "scaling"):
        with pytest.raises((UserError, TypeCheckError), match="mine"):
            LearningRate(**{field: "mine"})


@pytest.mark.parametrize(
    ("curriculum", "samples", "world", "text"),
    [
        (Curriculum.preset("et++", 6, batch=64), 1000, 1, r"nothing is left for stage 8 \(224 pixels\).*continuous"),
        (small(), 10, 1, "a batch of 64 x 1 x 1 is more than the 10 pictures"),
        (small(), 1000, 3, "does not divide by 3 processes"),
        (small(micro_batch=24), 1000, 1, "micro-batches of 48 on 1 processes do not make up a batch of 64.*of 32"),
        (small(stages=(Stage(1, 224, replay=2, buffer=4),), micro_batch=32), 1000, 1, "replay takes one"),
        (small(stages=(Stage(1, 224, replay=4, buffer=4),), batch=2), 1000, 1, "no fresh pictures"),
        (small(), 0, 1, "expected 1 or more"),
    ],
)
def test_plans_that_cannot_be_trained_are_refused(curriculum, samples, world, text):
    with pytest.raises(UserError, match=text):
        curriculum.plan(samples, world)


DOCUMENT = """
base_size: 224
unit: compute
stages:
- {share: 0.5, size: 112, randaug: 0}
- {share: 0.5, size: 224, randaug: 9}
lr: {rule: reference}
drop_path: {reference: 200}
"""


def test_a_document_written_by_hand_is_read():
    curriculum = Curriculum.from_yaml(DOCUMENT, epochs=50)
    assert curriculum.lr.rule == "reference"
    assert curriculum.drop_path(0.4) == 0.1
    assert [leg.passes for leg in curriculum.plan().legs] == [100, 25]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("unit:", "units:", "unknown key 'units': did you mean unit"),
        ("size: 112", "sise: 112", "stage 1: unknown key 'sise'"),
        ("share: 0.5, size: 224", "size: 224", "stage 2: share missing"),
        ("randaug: 9", "randaug: nine", "stage 2: randaug is 'nine': expected a number"),
        ("randaug: 9", "randaug: [9]", r"stage 2: randaug is \[9\]: expected a number"),
        ("{rule: reference}", "5", "lr is 5"),
        ("{reference: 200}", "200", r"expected \{reference: EPOCHS\}"),
        ("base_size: 224", "base_size: big", "base_size is 'big': expected a whole number"),
        ("stages:\n", "stages: 4\nx:\n", "unknown key 'x'|stages is 4"),
        ("\nbase_size: 224", "\n- 5", "is no YAML"),
    ],
)
def test_documents_that_are_wrong_say_where(old, new, text):
    assert old in DOCUMENT
    with pytest.raises(UserError, match=text):
        Curriculum.from_yaml(DOCUMENT.replace(old, new))


def test_a_missing_document_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the curriculum .*none\.yaml"):
        Curriculum.from_yaml(tmp_path / "none.yaml")
