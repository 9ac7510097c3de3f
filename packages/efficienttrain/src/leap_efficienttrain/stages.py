"""A curriculum's fields: which input size, augmentation and batch each share of the training has."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number

__all__ = ["CurriculumFields", "LearningRate", "Stage", "any_last_size"]


@contextlib.contextmanager
def any_last_size() -> Iterator[None]:
    """Do not warn of a last stage below the base size: of parts of a training, and where that was warned of before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the last stage trains", UserWarning)
        yield


def _require(owner: object, expected: str, holds: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not (isinstance(value, (int, float)) and holds(value)):
            raise UserError(f"{name} {value!r}: expected {expected}")


def _whole(value: Number) -> bool:
    return value == int(value) and value >= 1


@dataclass(frozen=True)
class Stage:
    """One stage of a curriculum.

    Raises:
        UserError: a number is impossible.
    """

    share: Number
    """Of the compute, or of the epochs, as the curriculum's unit says; all shares add up to 1."""
    size: int
    """Side of the pictures in pixels."""
    randaug: Number = 9
    """Magnitude of RandAugment, 0 to 10. At 0 its operations still act: those that have no magnitude, and others."""
    micro_batch_scale: Number = 1
    """Pictures per forward pass, as a multiple of the curriculum's `micro_batch`."""
    batch_scale: Number = 1
    """Pictures per update, as a multiple of the curriculum's `batch`: large batches early, a rule of ours."""
    replay: int = 1
    """Training pictures for each decoded one, see `ReplayBuffer`."""
    buffer: int = 0
    """Batches that the replay buffer holds."""

    def __post_init__(self) -> None:
        _require(self, "a number above 0, at most 1", lambda value: 0 < value <= 1, "share")
        _require(self, "a whole number, 1 or more", _whole, "size", "replay")
        _require(self, "a number from 0 to 10", lambda value: 0 <= value <= 10, "randaug")
        _require(self, "a positive number", lambda value: 0 < value < math.inf, "micro_batch_scale", "batch_scale")
        _require(self, "a whole number, 0 or more", lambda value: value == int(value) and value >= 0, "buffer")
        if self.replay > 1 and not self.buffer:
            raise UserError(f"replay {self.replay} without a buffer: set buffer to the batches that it holds")


@dataclass(frozen=True)
class LearningRate:
    """The learning rate over the whole training.

    Raises:
        UserError: a number is impossible, or `kind` goes with the other rule only.
    """

    rule: Literal["continuous", "reference"] = "continuous"
    """continuous: one curve over the progress of the whole training. reference: each stage's part of a curve over
    epochs of its own size, with a warm-up of as many of these, which jumps where the size changes, as the authors'."""
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    base: Number = 4e-3
    """The largest rate, for the curriculum's `batch`."""
    final: Number = 1e-6
    warmup_epochs: Number = 20
    """continuous: equivalent epochs, at most a fifth of them. reference: epochs of the stage's own size, over its
    replay."""
    warmup_share: Number | None = None
    """Warm-up as a share of all epochs, in place of `warmup_epochs`."""
    scaling: Literal["sqrt", "linear", "none"] = "sqrt"
    """How the rate follows a stage's `batch_scale`."""

    def __post_init__(self) -> None:
        for name, known in (
            ("rule", ("continuous", "reference")),
            ("kind", ("cosine", "linear", "constant")),
            ("scaling", ("sqrt", "linear", "none")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} {getattr(self, name)!r}: expected {', '.join(known)}")
        _require(self, "a positive number", lambda value: 0 < value < math.inf, "base")
        _require(self, "0 or more", lambda value: 0 <= value < math.inf, "final", "warmup_epochs")
        _require(self, "a share of 0 or more, below 1", lambda value: 0 <= value < 1, "warmup_share")
        if self.rule == "reference" and self.kind != "cosine":
            raise UserError(f"kind {self.kind} with rule reference: the released rule is a cosine, take continuous")

    def of_batch(self, scale: Number) -> float:
        """The largest rate for a batch of `scale` times the curriculum's."""
        return self.base * {"sqrt": math.sqrt(scale), "linear": scale, "none": 1}[self.scaling]


@dataclass(frozen=True)
class CurriculumFields:
    """The data of a `Curriculum`."""

    stages: tuple[Stage, ...]
    equivalent_epochs: Number = 300
    """T: the training costs as much as so many epochs at the base size (unit compute), or has so many (epochs)."""
    base_size: int = 224
    unit: Literal["compute", "epochs"] = "compute"
    """What the stages' shares are shares of."""
    arithmetic: Literal["reference", "continuous"] = "reference"
    """reference: whole passes over the data, rounded as the released scripts do; continuous: exact to the update."""
    downsample: Literal["lanczos", "fourier", "area", "bicubic"] = "lanczos"
    """How pictures become smaller: lanczos as EfficientTrain++, fourier as EfficientTrain (low-frequency crop)."""
    batch: int = 4096
    """Pictures per update, over all processes."""
    micro_batch: int | None = None
    """Pictures per process and forward pass at `micro_batch_scale` 1; all of a process's share where not given."""
    lr: LearningRate = field(default_factory=LearningRate)
    drop_path_reference: Number | None = None
    """Equivalent epochs for which a recipe's drop-path rate holds; it grows in proportion. None: as given."""
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.lr, LearningRate):
            raise UserError(f"lr {self.lr!r}: expected a LearningRate")
        if not self.stages:
            raise UserError("a curriculum without stages: give one or more")
        known = {
            "unit": ("compute", "epochs"),
            "arithmetic": ("reference", "continuous"),
            "downsample": ("lanczos", "fourier", "area", "bicubic"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UserError(f"{name} {getattr(self, name)!r}: expected {', '.join(values)}")
        _require(self, "a positive number", lambda value: 0 < value < math.inf, "equivalent_epochs")
        _require(self, "a positive number", lambda value: 0 < value < math.inf, "drop_path_reference")
        _require(self, "a whole number, 1 or more", _whole, "base_size", "batch", "micro_batch")
        total = math.fsum(stage.share for stage in self.stages)
        if abs(total - 1) > 1e-6:
            raise UserError(f"the shares of the stages add up to {total:g}: expected 1")
        large = [str(stage.size) for stage in self.stages if stage.size > self.base_size]
        if large:
            raise UserError(f"size {', '.join(large)} is above the base size {self.base_size}: lower it or raise that")
        if self.stages[-1].size < self.base_size:
            text = f"the last stage trains at {self.stages[-1].size} pixels, below the base size {self.base_size}"
            warnings.warn(f"{text}: what is tested at the base size was never trained there", stacklevel=4)
