"""What differs between one model at two input sizes, and how to bring it into a model that is being trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leap_efficienttrain.tables import find_resampling, grids_of
from leap_shared.errors import UserError

__all__ = ["Carry", "Change", "change_between", "graft"]

Carry = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Values by the names of resized parameters -> the same at the new size; linear, and not all names have to be there."""

_INTERNAL = set(vars(nn.Module()))


@dataclass(frozen=True)
class Change:
    """The difference between two sizes of a model.

    Attributes:
        shapes: names of the parameters that have another shape, with the old one.
        carry: the linear map of these parameters.
        values: path of the module, name, and new value of each buffer and attribute that depends on the size.
    """

    shapes: dict[str, torch.Size]
    carry: Carry
    values: tuple[tuple[str, str, Any], ...]


def change_between(old: nn.Module, new: nn.Module, resized: Callable[[nn.Module], nn.Module] | None = None) -> Change:
    """Compare a model at two sizes.

    Args:
        old: a model at its present size; of its weights nothing is used but the shapes.
        new: the same at the other size.
        resized: makes a copy at the new size of a model like `old`, for a model that knows its own map; None means the
            bilinear map of tables.

    Raises:
        UserError: they differ in more than tables, buffers and attributes.
    """
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    if list(before) != list(after) or [*dict(old.named_modules())] != [*dict(new.named_modules())]:
        raise UserError(f"{type(old).__name__} has other layers or parameters at another input size: train it at one")
    shapes = {name: p.shape for name, p in before.items() if p.shape != after[name].shape}
    carry = _bilinear(old, new, shapes, after) if resized is None else _by_model(old, resized)
    return Change(shapes, carry, tuple(_values(old, new)))


def _bilinear(old: nn.Module, new: nn.Module, shapes: dict[str, torch.Size], after: dict[str, nn.Parameter]) -> Carry:
    maps = {}
    for name, shape in shapes.items():
        owner = name.rpartition(".")[0]
        places = zip(grids_of(old.get_submodule(owner), old), grids_of(new.get_submodule(owner), new), strict=True)
        found = find_resampling(name, tuple(shape), tuple(after[name].shape), places)
        if found is None:
            raise UserError(
                f"{name} of {type(old).__name__} has shape {tuple(shape)} at one input size and "
                f"{tuple(after[name].shape)} at another, which is no table of places: train this model at one size"
            )
        maps[name] = found
    return lambda values: {name: maps[name](value) for name, value in values.items()}


def _by_model(old: nn.Module, resized: Callable[[nn.Module], nn.Module]) -> Carry:
    def carry(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        carrier = copy.deepcopy(old)
        for name, value in values.items():
            carrier.get_parameter(name).data = value.detach().clone()
        moved = resized(carrier)
        found = {name: moved.get_parameter(name).detach() for name in values}
        known = {name: value for name, value in values.items() if not value.is_meta}
        positive = {name for name, value in known.items() if (value >= 0).all()}  # bicubic maps would undershoot
        return {name: value.clamp(min=0) if name in positive else value for name, value in found.items()}

    return carry


def _values(old: nn.Module, new: nn.Module) -> Iterator[tuple[str, str, Any]]:
    for (path, here), there in zip(old.named_modules(), new.modules(), strict=True):
        for name, value in {**vars(there), **there._buffers}.items():
            usable = isinstance(value, Tensor) or _is_plain(value)
            if name not in _INTERNAL and usable and not _same(getattr(here, name, None), value):
                yield path, name, value


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        without_values = one.is_meta or other.is_meta
        return one.shape == other.shape and (without_values or torch.equal(one, other.to(one)))
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def graft(network: nn.Module, path: str, change: Change) -> None:
    """Give a network, whose part `path` was compared, the buffers and attributes of the new size."""
    part = network.get_submodule(path)
    reference = next(part.parameters())
    for place, name, value in change.values:
        module = part.get_submodule(place)
        like = getattr(module, name, None)
        setattr(module, name, _placed(value, like if isinstance(like, Tensor) else reference))
    for name in change.shapes:
        owner = part.get_submodule(name.rpartition(".")[0])
        for attribute, value in vars(owner).items():
            if attribute.endswith("_cache") and isinstance(value, dict):
                value.clear()  # timm keeps the biases of evaluation there


def _placed(value: Any, like: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    dtype = like.dtype if value.is_floating_point() else value.dtype
    return value.detach().to(like.device, dtype, copy=True)
