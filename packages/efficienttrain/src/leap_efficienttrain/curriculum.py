"""The curriculum: training in stages of input size, augmentation and batch, each with its share of the compute.

EfficientTrain (Wang et al., ICCV 2023) and EfficientTrain++ (TPAMI 2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from leap_efficienttrain.cost import Prediction, predict
from leap_efficienttrain.documents import read, write
from leap_efficienttrain.plan import Plan, State, make_plan
from leap_efficienttrain.stages import CurriculumFields, Stage
from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number

__all__ = ["Curriculum"]


@dataclass(frozen=True)
class Curriculum(CurriculumFields):
    """A training of `equivalent_epochs` times an epoch's compute at full size, in stages.

    Raises:
        UserError: the stages do not fit together; says how.

    Warns:
        UserWarning: the last stage is below the base size.
    """

    @classmethod
    def preset(cls, name: str, epochs: Number | None = None, base_size: Any = 224, **changes: Any) -> Curriculum:
        """A published curriculum, or one to compare with; see `leap_efficienttrain.presets`.

        Args:
            name: et++, et++:deit, et++:convnext, et:iccv, progressive_v2, fixres, budgeted or constant; et++: takes
                any model with a released script too, as et++:deit_small.
            epochs: T, see `Curriculum`; the preset's where none is given.
            base_size: full size; the sizes of the stages grow with it, to multiples of 32 (et++:deit: 16).
            **changes: `replay=True` for the released replay buffers, and fields of `Curriculum` such as `batch`; `lr`
                may be a rule alone, "continuous" or "reference".

        Raises:
            UserError: there is no such preset, or a value is impossible.
        """
        from leap_efficienttrain import presets

        return presets.make(name, epochs, base_size, **changes)

    @classmethod
    def constant(cls, epochs: Number = 300, base_size: int = 224, magnitude: Number = 9, **changes: Any) -> Curriculum:
        """Ordinary training: one size, one magnitude."""
        return cls((Stage(1, base_size, magnitude),), epochs, base_size, **{"name": "constant", **changes})

    @classmethod
    def from_yaml(cls, source: str | Path, epochs: Number | None = None, **changes: Any) -> Curriculum:
        """Read a YAML file, or its text, with other values for some fields.

        Raises:
            UserError: the file cannot be read, or a key, type or value is wrong.
        """
        given = changes if epochs is None else {**changes, "equivalent_epochs": epochs}
        return cls(**read(source, given))

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The curriculum as YAML, which `from_yaml` reads back; written to `path` where one is given."""
        return write(self, path)

    def differences(self, other: Curriculum) -> list[str]:
        """What another curriculum has otherwise, in words; nothing where both train alike."""
        odd = []
        for name in (entry.name for entry in fields(self) if entry.name not in ("name", "stages", "micro_batch")):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                odd.append(f"{name} is {mine}, was {theirs}")
        if len(self.stages) != len(other.stages):
            return [*odd, f"it has {len(self.stages)} stages, had {len(other.stages)}"]
        for number, pair in enumerate(zip(self.stages, other.stages, strict=True), 1):
            for entry in fields(Stage):
                mine, theirs = (getattr(stage, entry.name) for stage in pair)
                if mine != theirs and entry.name != "micro_batch_scale":
                    odd.append(f"stage {number}: {entry.name} is {mine}, was {theirs}")
        return odd

    def scaled(self, base_size: int, multiple: int = 32) -> Curriculum:
        """The same for pictures of another full size: sizes in proportion, to the nearest multiple of `multiple`.

        Raises:
            UserError: `base_size` is not a multiple itself.
        """
        if base_size % multiple:
            near = max(multiple, round(base_size / multiple) * multiple)
            raise UserError(f"base size {base_size} is not a multiple of {multiple}: take {near}")

        def fitted(size: int) -> int:
            return min(base_size, max(multiple, round(size * base_size / self.base_size / multiple) * multiple))

        stages = tuple(replace(stage, size=fitted(stage.size)) for stage in self.stages)
        return replace(self, stages=stages, base_size=base_size)

    def drop_path(self, rate: Number) -> float:
        """A recipe's drop-path rate for this length of training."""
        return rate * (1 if self.drop_path_reference is None else self.equivalent_epochs / self.drop_path_reference)

    def plan(self, samples: int | None = None, world: int = 1) -> Plan:
        """The curriculum on a data set: passes, updates and batches of each stage, and the state at every update.

        Args:
            samples: pictures of the training set; without it there are passes, but neither updates nor rates.
            world: processes that share each update.

        Raises:
            UserError: the batch does not divide into whole micro-batches, replay meets accumulation, or a stage has
                nothing to do.
        """
        return make_plan(self, samples, world)

    def epochs(self, samples: int | None = None, world: int = 1, start: int = 0) -> Iterator[State]:
        """The state of each pass over the data, or part of one where a stage ends in it, from pass `start` on."""
        yield from self.plan(samples, world).states[start:]

    def table(
        self,
        model: str | nn.Module,
        *,
        samples: int = 1_281_167,
        world: int = 1,
        baseline_epochs: Number = 300,
        images_per_second: Number | None = None,
        seconds: Mapping[int, float] | None = None,
    ) -> Prediction:
        """What the training will cost, before anything runs; printed, it is a table.

        Args:
            model: timm's name or an official one, or a model.
            samples: pictures of the training set; ImageNet-1K's unless given.
            world: processes.
            baseline_epochs: epochs of the ordinary training that it is compared with.
            images_per_second: of the ordinary training at the base size; the loader's demand is then absolute.
            seconds: measured for one picture, by size, to predict time beside operations; see `cost.step_seconds`.

        Raises:
            UserError: the model cannot take a size.
        """
        return predict(self.plan(samples, world), model, baseline_epochs, images_per_second, seconds)
