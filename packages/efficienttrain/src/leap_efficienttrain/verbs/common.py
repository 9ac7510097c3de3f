"""Flags that several verbs share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leap_shared.cli import Command
from leap_shared.errors import UserError

__all__ = ["CurriculumFlags"]


@dataclass(frozen=True, kw_only=True)
class CurriculumFlags(Command):
    """Base of the verbs that take a curriculum."""

    curriculum: str | None = None
    """et++, et++:deit, et++:convnext, et:iccv, progressive_v2, fixres, budgeted, constant, or a YAML file; where none
    is given, the released one for the model, or et++."""
    epochs: float | None = None
    """Equivalent epochs at full size; the curriculum's where none is given."""
    base_size: int | None = None
    """Full size in pixels; the curriculum's where none is given."""
    batch: int | None = None
    """Pictures per update, over all processes."""
    micro_batch: int | None = None
    """Pictures per process and forward pass at full size; small sizes take more where the curriculum says so."""
    lr: float | None = None
    """Largest learning rate, for the batch; where only --batch is given, the curriculum's in proportion."""
    replay: bool = False
    """Take the preset with its replay buffers."""
    arithmetic: str | None = None
    """reference: whole passes over the data, as the released scripts; continuous: exact to the update."""

    def chosen(self, model: str | None, default: Any = None, **changes: Any) -> Any:
        """The `Curriculum` that the flags describe.

        Args:
            model: whose released curriculum is taken where none is named.
            default: taken in place of that.
            **changes: more of its fields.
        """
        from leap_efficienttrain.curriculum import Curriculum
        from leap_efficienttrain.released import ALIASES, RECIPES

        name = self.curriculum
        given: dict[str, Any] = {"micro_batch": self.micro_batch, "arithmetic": self.arithmetic, **changes}
        given = {key: value for key, value in given.items() if value is not None}
        if name is not None and Path(name).suffix in (".yaml", ".yml"):
            if self.replay:
                raise UserError(f"--replay goes with presets, and {name} is a file: set replay and buffer there")
            found = Curriculum.from_yaml(name, self.epochs, **given)
        elif name is None and default is not None and not self.replay:
            found = replace(default, **given, equivalent_epochs=self.epochs or default.equivalent_epochs)
        else:
            released = f"et++:{model}" if model in RECIPES or model in ALIASES else "et++"
            found = Curriculum.preset(name or released, self.epochs, replay=self.replay, **given)
        if self.base_size is not None and self.base_size != found.base_size:
            small = self.base_size % 32 and self.base_size % 16 == 0
            found = found.scaled(self.base_size, 16 if small else 32)
        batch = found.batch if self.batch is None else self.batch
        rate = found.lr.base * batch / found.batch if self.lr is None else self.lr
        return replace(found, batch=batch, lr=replace(found.lr, base=rate))
