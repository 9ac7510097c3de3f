"""Published curricula, and others to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.released import (
    ALIASES,
    CONVNEXT,
    DEIT,
    DEIT_REPLAY,
    ICCV_MAGNITUDES,
    ICCV_SIZES,
    LARGE,
    RECIPES,
    SWIN_REPLAY,
    recipe_of,
)
from leap_efficienttrain.stages import LearningRate, Stage
from leap_shared.errors import UserError, did_you_mean
from leap_shared.vision.bodies.grids import Number

__all__ = ["PRESETS", "make"]

Replay = tuple[tuple[int, int], ...]


def _plus_plus(sizes: tuple[int, ...], replay: Replay = (), **options: Any) -> Curriculum:
    """Ten stages of equal compute; the magnitude is the stage's number."""
    times = replay or ((1, 0),) * len(sizes)
    stages = tuple(
        Stage(1 / len(sizes), size, index, 1 if size > 160 else 2, replay=again, buffer=buffer)
        for index, (size, (again, buffer)) in enumerate(zip(sizes, times, strict=True))
    )
    return Curriculum(stages, 200, drop_path_reference=200, **options)


def _iccv() -> Curriculum:
    pairs = zip(ICCV_SIZES, ICCV_MAGNITUDES, strict=True)
    stages = tuple(Stage(0.2, size, magnitude, 1 if size > 192 else 2) for size, magnitude in pairs)
    return Curriculum(stages, 300, unit="epochs", downsample="fourier", name="et:iccv")


def _progressive_v2() -> Curriculum:
    """Four stages of equal epochs in which size and magnitude grow together, after EfficientNetV2."""
    pairs = zip((96, 128, 192, 224), (3, 5, 7, 9), strict=True)
    return Curriculum(tuple(Stage(0.25, *pair) for pair in pairs), unit="epochs", name="progressive_v2")


def _fixres() -> Curriculum:
    """Small pictures for nine tenths of the epochs, the full size for the rest, as in FixRes."""
    return Curriculum((Stage(0.9, 160), Stage(0.1, 224)), unit="epochs", name="fixres")


def _budgeted() -> Curriculum:
    """Full size, and a rate that falls in a line to the end of whatever budget there is."""
    return Curriculum.constant(300, lr=LearningRate(kind="linear", final=0), name="budgeted")


PRESETS: dict[str, Callable[[], Curriculum]] = {
    "et++": lambda: _plus_plus(LARGE, name="et++"),
    "et++:deit": lambda: _plus_plus(DEIT, lr=LearningRate(warmup_share=0.2), name="et++:deit"),
    "et++:convnext": lambda: _plus_plus(CONVNEXT, name="et++:convnext"),
    "et:iccv": _iccv,
    "progressive_v2": _progressive_v2,
    "fixres": _fixres,
    "budgeted": _budgeted,
    "constant": Curriculum.constant,
}
REPLAY: dict[str, Replay] = {"et++": SWIN_REPLAY, "et++:deit": DEIT_REPLAY}


def make(name: str, epochs: Number | None, base_size: Any, *, replay: bool = False, **changes: Any) -> Curriculum:
    """See `Curriculum.preset`."""
    known, curve = name, REPLAY.get(name, ())
    models = {f"et++:{model}": model for model in (*RECIPES, *ALIASES)}
    if name in models:
        recipe = recipe_of(models[name])
        known = {LARGE: "et++", DEIT: "et++:deit", CONVNEXT: "et++:convnext"}[recipe.sizes]
        curve = recipe.replay
    if known not in PRESETS:
        near = did_you_mean(name, [*PRESETS, *models] if name.startswith("et++:") else PRESETS)
        raise UserError(f"preset {name!r} is unknown: {near}")
    if not isinstance(base_size, int):
        advice = "a curriculum has square pictures; other ones: Flexible.set_size((height, width)) in your loop"
        raise UserError(f"base_size {base_size}: expected one whole number, for {advice}")
    curriculum = PRESETS[known]()
    if isinstance(changes.get("lr"), str):
        changes["lr"] = replace(curriculum.lr, rule=changes["lr"])
    if base_size != curriculum.base_size:
        curriculum = curriculum.scaled(base_size, 16 if known == "et++:deit" else 32)
    if replay:
        if not curve:
            raise UserError(f"no replay buffer was released for {name}: {', '.join(REPLAY)} have one")
        pairs = zip(curriculum.stages, curve, strict=True)
        stages = tuple(replace(stage, replay=times, buffer=buffer) for stage, (times, buffer) in pairs)
        curriculum = replace(curriculum, stages=stages)
    if unknown := changes.keys() - {entry.name for entry in fields(Curriculum)}:
        odd = min(unknown)
        raise UserError(f"unknown field {odd!r}: {did_you_mean(odd, [entry.name for entry in fields(Curriculum)])}")
    return replace(curriculum, **changes, equivalent_epochs=curriculum.equivalent_epochs if epochs is None else epochs)
