"""What a recipe is, and how one is read from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import nn

from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.models import create_model, find
from leap_shared.errors import UserError, did_you_mean
from leap_shared.vision.bodies.grids import Number
from leap_shared.vision.config import AugmentationConfig, OptimiserConfig

__all__ = ["Figure", "Recipe", "TrainSettings", "pretraining_figures", "read", "training_figures"]


@dataclass(frozen=True)
class Figure:
    """A published accuracy on ImageNet-1K.

    Attributes:
        method: "baseline", "et:iccv" or "et++", with more words where it needs them.
        top1: in percent, by the image size.
        epochs: of the training, in equivalent ones for "et++"; None where none are given.
        speedup: over the baseline; None where none is given.
        measure: what the speed-up is of.
    """

    method: str
    top1: Mapping[int, float]
    epochs: Number | None = None
    speedup: float | None = None
    measure: str = ""


@dataclass(frozen=True)
class TrainSettings:
    """What a training needs beside its curriculum.

    Attributes:
        amp: mixed precision.
        drop_path: rate for the length that the curriculum's `drop_path_reference` names.
        optimiser: its rate is the curriculum's.
        augmentation: RandAugment's magnitude is the curriculum's.
        model_options: of the model, such as `global_pool`.
        masked: options of `MaskedAutoencoder`, for masked pre-training; None for a classifier.
        starts_from: the recipe whose weights it starts from, without those of the head where it has other classes.
    """

    amp: Literal["no", "bf16", "fp16"] = "no"
    drop_path: Number = 0
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model_options: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    masked: Mapping[str, int | float | str] | None = None
    starts_from: str = ""

    def __post_init__(self) -> None:
        if self.amp not in ("no", "bf16", "fp16"):
            raise UserError(f"amp {self.amp!r}: expected no, bf16 or fp16")


@dataclass(frozen=True)
class Recipe:
    """A whole training.

    Attributes:
        name: of the recipe.
        model: official or timm's name.
        curriculum: stages, batches and learning rate.
        train: all else.
        source: where the settings come from.
        figures: published accuracies with this training and its baseline.
    """

    name: str
    model: str
    curriculum: Curriculum
    train: TrainSettings
    source: str
    figures: tuple[Figure, ...] = ()

    @property
    def timm_name(self) -> str:
        """The model in timm's registry."""
        variant = find(self.model)
        return variant.timm_name if variant else self.model

    @property
    def drop_path(self) -> float:
        """Drop-path rate for this curriculum's length."""
        return self.curriculum.drop_path(self.train.drop_path)

    @property
    def model_options(self) -> dict[str, bool | int | float | str]:
        """All options of the model."""
        rate = {"drop_path_rate": self.drop_path} if self.train.drop_path else {}
        return {**rate, **self.train.model_options}

    def build(self, num_classes: int = 1000) -> nn.Module:
        """The model with new weights, for pictures of the base size; a `MaskedAutoencoder` for masked pre-training."""
        masked, size = self.train.masked, self.curriculum.base_size
        classes = num_classes if masked is None else 0
        model = create_model(self.model, size=size, num_classes=classes, **self.model_options)
        if masked is None:
            return model
        from leap_efficienttrain.mae import MaskedAutoencoder

        options: dict[str, Any] = dict(masked)
        return MaskedAutoencoder(model, **options)

    def changed(self, epochs: Number | None = None, base_size: int | None = None, **changes: Any) -> Recipe:
        """The same with another length or full size, or other fields of its curriculum."""
        curriculum = self.curriculum
        if base_size not in (None, curriculum.base_size):
            curriculum = curriculum.scaled(base_size, 16 if "patch16" in self.timm_name else 32)
        if unknown := changes.keys() - {entry.name for entry in fields(Curriculum)}:
            odd = min(unknown)
            raise UserError(f"unknown field {odd!r}: {did_you_mean(odd, [entry.name for entry in fields(Curriculum)])}")
        changes |= {} if epochs is None else {"equivalent_epochs": epochs}
        return replace(self, curriculum=replace(curriculum, **changes)) if changes or base_size else self


def training_figures(model: str, method: str, epochs: Number) -> tuple[Figure, ...]:
    """Published accuracies of a model that was trained on ImageNet-1K alone: the baseline's, and the method's."""
    variant = find(model)
    if variant is None:
        return ()
    summary = [row for row in variant.results if row.source == "summary" and row.method == "baseline"]
    own = [row for row in variant.results if row.method == method and row.epochs == epochs]
    return tuple(
        Figure(row.method, {224: row.top1}, row.epochs, row.speedup, "time on RTX 3090s" if row.speedup else "")
        for row in (*summary, *own[:1])
    )


def pretraining_figures(model: str, method: str, row: int) -> tuple[Figure, ...]:
    """Published accuracies of a model that was pre-trained on ImageNet-22K: the baseline's, and one of the method's."""
    variant = find(model)
    rows = variant.pretraining if variant else ()
    baseline = next((entry for entry in rows if entry.method == "baseline"), None)
    own = [entry for entry in rows if entry.method == method]
    if baseline is None or row >= len(own):
        raise UserError(f"{model} has no published row {row} of {method} after pre-training on ImageNet-22K")
    chosen, days = own[row], baseline.gpu_days
    speedup = days / chosen.gpu_days if days and chosen.gpu_days else None
    measure = f"{chosen.gpu_days} GPU-days of pre-training on RTX 3090s" if chosen.gpu_days else ""
    return (
        Figure("baseline", baseline.top1, None, None, f"{days} GPU-days of pre-training on RTX 3090s"),
        Figure(chosen.method, chosen.top1, None, speedup, measure),
    )


def read(path: Path, name: str = "") -> dict[str, Recipe]:
    """The recipes of a YAML file, one for each of its models, by name: the model's, and the file's behind it.

    Its keys are `source` (text), `models` (by short name: what is other for this one, and `model`, its official name or
    timm's), `curriculum` (as `Curriculum.from_yaml` reads it, or `preset` and what is other than there), `train`
    (fields of `TrainSettings`), and `published` (a list of `Figure`, or `method` and `row` of the tables after
    pre-training on ImageNet-22K).

    Args:
        path: of the file.
        name: behind the model's; the file's own unless given.

    Raises:
        UserError: it cannot be read, or a key, type or value is wrong.
    """
    where = path.name
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or not isinstance(document.get("models"), dict):
        raise UserError(f"{where} is no recipe: expected the keys source, models, curriculum and train")
    shared = {key: value for key, value in document.items() if key != "models"}
    recipes = (
        _recipe(f"{short}_{name or path.stem}", short, _merged(shared, own or {}), where)
        for short, own in document["models"].items()
    )
    return {recipe.name: recipe for recipe in recipes}


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings, the second before the first, at every depth."""
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return merged


def _recipe(name: str, short: str, values: dict[str, Any], where: str) -> Recipe:
    keys = ("source", "model", "curriculum", "train", "published")
    for key in values:
        if key not in keys:
            raise UserError(f"{where}, {short}: unknown key {key!r}: {did_you_mean(str(key), keys)}")
    model, published = values.get("model", short), values.get("published", [])
    if isinstance(published, dict):
        if published.keys() != {"method", "row"}:
            raise UserError(f"{where}, {short}: published is {published}: expected method and row, or a list")
        figures = pretraining_figures(model, **published)
    else:
        figures = tuple(_made(Figure, row, f"{where}, {short}, published") for row in published)
    return Recipe(
        name=name,
        model=model,
        curriculum=_curriculum(values.get("curriculum"), f"{where}, {short}, curriculum"),
        train=_made(TrainSettings, values.get("train", {}), f"{where}, {short}, train"),
        source=str(values.get("source", "")),
        figures=figures,
    )


def _curriculum(values: object, where: str) -> Curriculum:
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r}: expected stages and more, or a preset and what is other than there")
    given = {key: value for key, value in values.items() if key != "preset"}
    if "preset" in values:
        start = yaml.safe_load(Curriculum.preset(values["preset"]).to_yaml())
        given = _merged(start, given)
    try:
        return Curriculum.from_yaml(yaml.safe_dump(_without_nulls(given), sort_keys=False))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """A null in a curriculum takes away what its preset says."""
    kept = {key: value for key, value in values.items() if value is not None}
    return {key: _without_nulls(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _made(kind: type[Any], values: object, where: str) -> Any:
    """A dataclass from what YAML holds: lists become tuples, mappings the dataclass that is the field's default."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r}: expected `key: value` pairs")
    known = {entry.name: entry.default_factory for entry in fields(kind)}
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}: {did_you_mean(str(key), known)}")
        factory = known[key]
        if factory in (OptimiserConfig, AugmentationConfig):
            made[key] = _made(factory, value, f"{where}: {key}")
        else:
            made[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**made)
    except (TypeError, UserError) as error:
        raise UserError(f"{where}: {error}") from error
