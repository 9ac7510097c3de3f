"""Change the input size of a model in the middle of its training: parameters, optimiser and moving averages together.

timm's own `set_input_size` replaces parameters, so that an optimiser silently goes on training the old ones, and leaves
its moments and the moving average of the weights behind. Here every parameter stays the same object and takes its state
along, by the linear maps of EfficientTrain++ (Wang et al. 2024).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from leap_efficienttrain.changes import Change, change_between, graft
from leap_efficienttrain.families import How, family_of, multiple_of, rebuilt_pair, resized_pair, size_of
from leap_efficienttrain.tables import ImageSize, Size, as_size, shown
from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import replace_data

__all__ = ["Flexible", "flexible"]

_PROBES = (96, 128)
_OTHERWISE = "train it at one size, or give flexible rebuild=, a function that makes the model for a size"
_STRENGTH: tuple[How, ...] = ("any size", "in place", "resample")


class _Part:
    """A model, or part of one, whose parameters or buffers depend on the input size."""

    def __init__(self, path: str, module: nn.Module, rebuild: Callable[[Any], nn.Module] | None = None) -> None:
        self.path, self.module, self.rebuild = path, module, rebuild
        self.family = family_of(module)
        self.multiple = multiple_of(module, self.family)

    def change(self, old: Size, new: Size) -> Change:
        """What differs between the two sizes."""
        build = self.rebuild
        if build is not None:
            fresh = rebuilt_pair(self.module, lambda size: build(size[0] if size[0] == size[1] else size), old, new)
            return change_between(*fresh)
        pair = resized_pair(self.module, self.family, old, new)
        if self.family is None:
            return change_between(*pair, lambda model: resized_pair(model, None, old, new)[1])
        return change_between(*pair)


class Flexible:
    """A model, its optimisers and its moving averages, which change their input size together; see `flexible`.

    Attributes:
        model: without wrappers.
        family: of timm, or "own model".
        how: "any size" (nothing depends on the size), "in place" or "resample" (weights tied to one grid move, too).
        requires: height and width must be multiples of it.
        changed: whether the last `set_size` gave a parameter another shape: wrap with DistributedDataParallel again.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Any],
        averages: Sequence[nn.Module],
        parts: Sequence[_Part],
        size: Size | None,
    ) -> None:
        self.model, self.changed = model, False
        self._optimizers, self._averages, self._parts, self._size = optimizers, averages, parts, size
        whole = family_of(model)
        families = [part.family for part in parts] or [whole]
        self.family = " + ".join(dict.fromkeys(family.name if family else "own model" for family in families))
        kinds = [part.family.how if part.family else "in place" for part in parts]
        self.how: How = max(kinds, key=_STRENGTH.index, default="any size")
        self.requires = math.lcm(*(part.multiple for part in parts))
        self._check()

    @property
    def size(self) -> ImageSize | None:
        """Input size in pixels, (height, width) unless square; None as long as nothing tells it."""
        return self._size if self._size is None or self._size[0] != self._size[1] else self._size[0]

    def nearest(self, size: ImageSize) -> tuple[ImageSize, ...]:
        """Valid input sizes next to `size`: itself, or the one below, if there is one, and the one above."""
        sides = as_size(size)
        below = tuple(side // self.requires * self.requires for side in sides)
        above = tuple(-(-side // self.requires) * self.requires for side in sides)
        found = dict.fromkeys(each for each in (below, above) if all(each))
        return tuple(each[0] if each[0] == each[1] else (each[0], each[1]) for each in found)

    def set_size(self, size: ImageSize) -> bool:
        """Take pictures of another size from now on; returns `changed`. Nothing happens if it is the present size.

        Parameters keep their identity, those of another shape lose their gradient. The optimisers' states of the shape
        of their parameter (moments, momentum) and the moving averages go through the same linear map as the weights;
        step counters stay. Where it fails, nothing has changed.

        Args:
            size: in pixels, or (height, width).

        Raises:
            UserError: the model does not take the size, or an optimiser no longer holds its parameters.
        """
        new = as_size(size)
        if any(side % self.requires for side in new):
            nearest = " and ".join(shown(as_size(each)) for each in self.nearest(size))
            raise UserError(
                f"input size {shown(new)} is not a multiple of {self.requires}, which {type(self.model).__name__} "
                f"(family {self.family}) needs: the nearest valid sizes are {nearest}"
            )
        self._check()
        self.changed = False
        old, self._size = self._size, new
        if old == new or old is None or not self._parts:
            return False
        try:
            self.changed = self._move([part.change(old, new) for part in self._parts])
        except BaseException:
            self._size = old
            raise
        return self.changed

    def _move(self, changes: Sequence[Change]) -> bool:
        moved: list[tuple[nn.Parameter, Tensor]] = []
        states: list[tuple[dict[str, Any], str, Tensor]] = []
        for part, change in zip(self._parts, changes, strict=True):
            for network in (self.model, *self._averages):
                inside = network.get_submodule(part.path)
                resized = {name: inside.get_parameter(name) for name in change.shapes}
                moved += [(resized[name], value) for name, value in change.carry(resized).items()]
            trained = {name: part.module.get_parameter(name) for name in change.shapes}
            for optimizer in self._optimizers:
                states += _moved_states(optimizer, trained, change)
        for parameter, values in moved:
            replace_data(parameter, values)
        for state, key, values in states:
            state[key] = values
        for part, change in zip(self._parts, changes, strict=True):
            for network in (self.model, *self._averages):
                graft(network, part.path, change)
        return bool(moved)

    def _check(self) -> None:
        held = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
        foreign = held - {id(p) for p in self.model.parameters()}
        if foreign and missing:
            raise UserError(
                f"the optimizer does not hold {', '.join(missing[:3])} of the model, but {len(foreign)} tensors that "
                "are not the model's: it is stale after set_input_size, or belongs to another model; make the optimizer"
                " after the last set_input_size, and change sizes by Flexible.set_size alone"
            )


def _moved_states(
    optimizer: Any, parameters: dict[str, nn.Parameter], change: Change
) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """State, key and new value of all tensors in an optimiser's state that have the shape of their parameter."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}
        if any(value.shape != parameter.shape for value in tensors.values()):
            del optimizer.state[parameter]
            warnings.warn(
                f"{type(optimizer).__name__} keeps a factored state of {name}, which has no counterpart at another "
                "input size: it starts anew",
                stacklevel=4,
            )
            continue
        for key, value in tensors.items():
            kinds.setdefault(key, {})[name] = value
    for key, values in kinds.items():
        for name, value in change.carry(values).items():
            yield optimizer.state[parameters[name]], key, value


def flexible(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ema: nn.Module | Sequence[nn.Module] | None = None,
    *,
    allow_resample: bool = False,
    size: ImageSize | None = None,
    rebuild: Callable[[Any], nn.Module] | None = None,
) -> Flexible:
    """Plan how a model changes its input size while it is trained.

    Args:
        model: of timm, with such a model inside, with a `set_input_size` of its own, or one that takes every size;
            compiled or wrapped by DistributedDataParallel, too.
        optimizer: holds the model's parameters; its moments go along.
        ema: moving averages of the weights: timm's ModelEma, torch's AveragedModel, or copies of the model.
        allow_resample: also families whose weights are tied to one grid (LeViT, PiT, EfficientFormerV2).
        size: present input size in pixels, where the model does not tell it.
        rebuild: makes the model for an input size, where nothing else can; of its weights only shapes are used.

    Raises:
        UserError: the model cannot change its size, the optimiser holds other parameters, or a moving average is of
            another model.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=96)
        >>> flex = flexible(model, optimizer=torch.optim.AdamW(model.parameters()))
        >>> flex.set_size(160), model.pos_embed.shape
        (True, torch.Size([1, 101, 192]))
    """
    network = _unwrapped(model)
    parts = [_Part("", network, rebuild)] if rebuild else list(_parts(network))
    for part in parts:
        _check_allowed(part, allow_resample)
    if not parts and family_of(network) is None:
        _probe(network)
    told = as_size(size) if size is not None else next((size_of(part.module) for part in parts), size_of(network))
    if parts and told is None:
        raise UserError(f"{type(network).__name__} does not tell its input size: give flexible size=, in pixels")
    averages = [_average(each, network) for each in _several(ema)]
    optimizers = [getattr(each, "_base_optimizer", each) for each in _several(optimizer)]  # timm's Lookahead
    return Flexible(network, optimizers, averages, parts, told)


def _several(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _unwrapped(model: nn.Module) -> nn.Module:
    wrapped = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    inner = getattr(model, "module" if wrapped else "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _average(ema: nn.Module, model: nn.Module) -> nn.Module:
    network = _unwrapped(ema)
    inner = getattr(network, "module", None)
    if type(network) is not type(model) and isinstance(inner, nn.Module):
        network = _unwrapped(inner)
    shapes, own = ({name: p.shape for name, p in each.named_parameters()} for each in (network, model))
    if shapes != own:
        name = min(shapes.items() ^ own.items())[0]
        raise UserError(
            f"the moving average ({type(network).__name__}) differs from the model ({type(model).__name__}), first in "
            f"{name}: make it as a copy of the model at its present size"
        )
    return network


def _parts(module: nn.Module, path: str = "") -> Iterator[_Part]:
    family = family_of(module)
    if family is not None and family.how == "any size":
        return
    if family is not None or callable(getattr(module, "set_input_size", None)):
        yield _Part(path, module)
        return
    for name, child in module.named_children():
        yield from _parts(child, f"{path}.{name}" if path else name)


def _check_allowed(part: _Part, allow_resample: bool) -> None:
    family, name = part.family, type(part.module).__name__
    if family is not None and family.how == "refused":
        raise UserError(f"{name} (family {family.name}) cannot change its input size: {family.reason}; {_OTHERWISE}")
    if family is not None and family.how == "resample" and not allow_resample:
        raise UserError(
            f"{name} (family {family.name}) is tied to its input size: {family.reason}; allow_resample=True resamples "
            "these weights, at a loss, or train it at one size"
        )


def _probe(model: nn.Module) -> None:
    """Raise UserError unless a picture of two sizes goes through the model; nothing in it changes."""
    found: Any = (part.in_channels for part in model.modules() if hasattr(part, "in_channels"))
    channels = int(next(found, 3))
    reference = next(model.parameters(), torch.empty(0))
    modes = [(part, part.training) for part in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng([reference.device] if reference.is_cuda else []):
            for side in _PROBES:
                picture = torch.zeros(1, channels, side, side, device=reference.device, dtype=reference.dtype)
                functional_call(model, buffers, (picture,))
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} is no family of timm that is known to take several input sizes, has no "
            f"set_input_size, and fails at {side} pixels ({str(error).splitlines()[0]}): {_OTHERWISE}"
        ) from error
    finally:
        for part, training in modes:
            part.training = training
