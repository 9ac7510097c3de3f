"""Tables with one row per place or per offset, and the linear maps that take them to another input size.

Section 3.4 of EfficientTrain++ (Wang et al. 2024) changes the input size between stages of one training. What depends
on the size in a vision transformer are position embeddings and relative biases; both are resampled bilinearly, and so
are the moments of the optimiser and the moving average of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from leap_shared.errors import UserError

__all__ = ["ImageSize", "Resampling", "Size", "as_size", "find_resampling", "grids_of", "scaled_window", "shown"]
__all__ += ["transfer_state"]

Size = tuple[int, int]
ImageSize = int | tuple[int, int]

_COMPUTED = ("relative_position_index", "attn_mask")
_POSITIONS = ("pos_embed", "absolute_pos_embed")
_GRIDS = ("window_size", "block_size", "resolution", "grid_size", "tokens_spatial_shape")
_MOST_PREFIX_TOKENS = 16


def as_size(size: ImageSize) -> Size:
    """Height and width in pixels of `size`, one number for squares.

    Raises:
        UserError: `size` is not one or two positive integers.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or any(isinstance(side, bool) or side < 1 for side in sides):
        raise UserError(f"input size {size}: expected a positive number of pixels, or (height, width)")
    return sides


def shown(size: Size) -> str:
    """The size as it is printed: 224, or 224x160."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def scaled_window(window: int, old: int, new: int) -> int:
    """Side of Swin's windows at another input size: size // 32, or where it was not that before, in proportion."""
    return max(new // 32 if window == old // 32 else window * new // old, 1)


@dataclass(frozen=True)
class Resampling:
    """Bilinear map of a table from one grid to another: align_corners False, no antialias, in float32 or float64.

    Attributes:
        dim: first dimension of the places.
        dims: how many dimensions they take: 1 where the grid is flattened, row-major, else 2.
        old, new: rows and columns of the grid.
        before, after: rows of class and register tokens, which are kept, in front of the places and behind them.
        shape: of the new table.
    """

    dim: int
    dims: int
    old: Size
    new: Size
    before: int
    after: int
    shape: tuple[int, ...]

    def __call__(self, table: Float[Tensor, "*old_shape"]) -> Float[Tensor, "*new_shape"]:
        """The table at the new size, in the same dtype; non-negative tables stay so."""
        lead, trail = (math.prod(part) for part in (table.shape[: self.dim], table.shape[self.dim + self.dims :]))
        rows = table.reshape(lead, -1, trail)
        last = self.before + math.prod(self.old)
        before, places, after = rows[:, : self.before], rows[:, self.before : last], rows[:, last:]
        exact = places if places.dtype == torch.float64 else places.float()
        image = exact.transpose(1, 2).reshape(lead, trail, *self.old)
        image = F.interpolate(image, self.new, mode="bilinear", align_corners=False)
        places = image.flatten(2).transpose(1, 2).to(table.dtype)
        return torch.cat([before, places, after], dim=1).reshape(self.shape)


def find_resampling(
    name: str, old: tuple[int, ...], new: tuple[int, ...], grids: Iterable[tuple[Size, Size]] = ()
) -> Resampling | None:
    """The map between two shapes of a table, or None where the shapes do not tell it.

    Args:
        name: of the parameter, which tells relative biases (extra rows behind the offsets) from positions (in front).
        old: shape of the table.
        new: its shape at the other size.
        grids: pairs of old and new grid that are tried before a square one.
    """
    of_layer = name.endswith((".weight", ".bias")) and "position" not in name  # rows of a layer are no places
    if of_layer or len(old) != len(new):
        return None
    relative = "relative_position" in name
    changed = [dim for dim, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    if len(changed) == 2 and changed[1] == changed[0] + 1:
        dim = changed[0]
        return Resampling(dim, 2, (old[dim], old[dim + 1]), (new[dim], new[dim + 1]), 0, 0, new)
    if len(changed) != 1:
        return None
    dim = changed[0]
    apart = len(old) == 4 or (relative and len(old) == 3)
    for here, there in [*grids, *([] if apart else _squares(old[dim], new[dim]))]:
        extra = old[dim] - math.prod(here)
        if extra >= 0 and extra == new[dim] - math.prod(there):
            return Resampling(dim, 1, here, there, 0 if relative else extra, extra if relative else 0, new)
    return Resampling(dim, 1, (old[dim], 1), (new[dim], 1), 0, 0, new) if apart else None


def _squares(old: int, new: int) -> Iterator[tuple[Size, Size]]:
    """Square grids that leave the same number of extra rows at both sizes."""
    for extra in range(min(old, new, _MOST_PREFIX_TOKENS + 1)):
        sides = math.isqrt(old - extra), math.isqrt(new - extra)
        if sides[0] ** 2 == old - extra and sides[1] ** 2 == new - extra:
            yield (sides[0], sides[0]), (sides[1], sides[1])


def grids_of(owner: nn.Module, model: nn.Module) -> list[Size]:
    """Grids that a parameter of `owner` may have rows for, in an order that does not depend on the size."""
    found: list[Size] = []
    for place in (owner, getattr(model, "patch_embed", None), model):
        for attribute in _GRIDS:
            value = getattr(place, attribute, 0)
            height, width = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
            if isinstance(height, int) and isinstance(width, int):
                found += [(2 * height - 1, 2 * width - 1), (height, width)]
    return found


def transfer_state(
    state: Mapping[str, Tensor], from_size: ImageSize, to_size: ImageSize, *, patch_size: int | None = None
) -> dict[str, Tensor]:
    """A named state at another input size: weights, their moving average, or a moment of the optimiser.

    Position embeddings (`pos_embed`) and relative biases (`relative_position_bias_table`) of DeiT, ViT, BEiT and Swin
    are resampled, by the official names or timm's; index tables and masks are left out, for models compute them;
    everything else is passed on. Swin's window becomes size // 32.

    Args:
        state: name to tensor.
        from_size: input size of `state`, in pixels or as (height, width).
        to_size: input size of the result.
        patch_size: side of the patches, where `state` does not hold `patch_embed.proj.weight`; None means 16.

    Raises:
        UserError: a table does not belong to `from_size`.
    """
    old, new = as_size(from_size), as_size(to_size)
    found = {name: value for name, value in state.items() if not name.endswith(_COMPUTED)}
    if old == new:
        return found
    kernel = state.get("patch_embed.proj.weight")
    patch = patch_size or (16 if kernel is None else kernel.shape[-1])
    for name, value in found.items():
        leaf = name.rpartition(".")[2]
        if leaf in _POSITIONS:
            grids = (old[0] // patch, old[1] // patch), (new[0] // patch, new[1] // patch)
            found[name] = _moved(name, value, 1, grids, old)
        elif leaf == "relative_position_bias_table" and value.ndim == 2:
            found[name] = _moved(name, value, 0, _offsets(value.shape[0], old, new), old)
    return found


def _offsets(rows: int, old: Size, new: Size) -> tuple[Size, Size]:
    """Grids of the offsets inside a window at both sizes; (0, 0) where there is no such window."""
    sides = [math.isqrt(rows - extra) for extra in (0, 3) if rows > extra]
    side = next((side for side in sides if side**2 in (rows, rows - 3)), 0)
    if side % 2 == 0 or old[0] != old[1]:
        return (0, 0), (0, 0)
    height, width = (
        2 * scaled_window((side + 1) // 2, before, after) - 1 for before, after in zip(old, new, strict=True)
    )
    return (side, side), (height, width)


def _moved(name: str, table: Tensor, dim: int, grids: tuple[Size, Size], size: Size) -> Tensor:
    extra = table.shape[dim] - math.prod(grids[0])
    if not 0 <= extra <= _MOST_PREFIX_TOKENS or not all(math.prod(grid) for grid in grids):
        raise UserError(
            f"{name} of shape {tuple(table.shape)} does not belong to input size {shown(size)}: expected rows for a "
            f"grid and at most {_MOST_PREFIX_TOKENS} tokens, so give the size that the state has"
        )
    shape = [*table.shape]
    shape[dim] = extra + math.prod(grids[1])
    before = extra if dim else 0
    return Resampling(dim, 1, *grids, before, extra - before, tuple(shape))(table)
