"""The forward operator on a CPU: strips of maps, channels first, so that a tap is an offset into flat memory.

A strip's keys lie in scratch memory as (dim, maps, rows + 2r, width + 2r), zeros around them. Flattened behind `dim`,
pixel p of the query meets tap (row, column) at p + row * (width + 2r) + column: products with the kernels become
(slots x dim)(dim x pixels) ones on contiguous numbers, for many small maps and heads at once. Places that are no pixel
have a zero query, and nobody reads their output.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from leap_slide.ops.reference import inside, side_of, widest

__all__ = ["Kernels", "Plan", "Strip", "Tables", "add_scores", "chosen", "forward", "mix", "put"]
__all__ += ["scratch", "shares"]

AROUND = ("key", "value")  # memory that taps reach around
NUMBERS = 165_000  # a strip's pixels times channels and twice slots, a thread: what is in use fits a second-level cache
PART = 0.56  # of a feature map's numbers, at the most: all memory of a backward pass is then below four maps
LEAST = 100_000  # smaller strips cost more in calls than memory is worth

_memory = threading.local()


def scratch(name: str, like: Tensor, *shape: int) -> Tensor:
    """Contiguous memory that this thread keeps, whose content the next call of that name overwrites.

    A fresh tensor for every step would cost more in page faults than the arithmetic takes.
    """
    kept, count = vars(_memory), math.prod(shape)
    found: Tensor | None = kept.get(key := f"{name} {like.dtype}")
    if found is None or found.numel() < count:
        with torch.inference_mode(mode=False):  # memory made in inference mode could not be written to outside
            found = kept[key] = torch.empty(count, dtype=like.dtype)
    return found[:count].view(shape)


def chosen(x: Tensor, maps: slice) -> Tensor:
    """Some of the batch * heads maps of `x`, as one dimension: a view where they are of one image."""
    heads = x.shape[1]
    first, last = maps.start // heads, -(-maps.stop // heads)
    images = x[first] if last - first == 1 else x[first:last].flatten(0, 1)
    return images[maps.start - first * heads : maps.stop - first * heads]


def put(out: Tensor, maps: slice, rows: slice, values: Tensor, add: bool = False) -> None:
    """Write `values` (maps, channels, rows, width) to some of the batch * heads maps of `out`, or add them."""
    heads, done = out.shape[1], 0
    while done < len(values):
        image, head = divmod(maps.start + done, heads)
        count = min(heads - head, len(values) - done)
        target, part = out[image, head : head + count, :, rows], values[done : done + count]
        target.add_(part) if add else target.copy_(part)
        done += count


def _share(total: int, most: int) -> int:
    """Size of equal parts of `most` or fewer."""
    return max(-(-total // max(-(-total // most), 1)), 1)


class Kernels:
    """Weights and biases of keys or of values, as products want them."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        by_tap = weight.to(dtype).permute(2, 0, 1).contiguous()
        self.to_dim = by_tap.unbind(0)  # (dim, slots) of every tap
        self.to_slots = by_tap.transpose(1, 2).contiguous().unbind(0)
        self.bias = bias.to(dtype).contiguous()


class Tables:
    """What all strips of a call share: kernels of keys and values, and what is added to logits."""

    def __init__(
        self,
        key_weight: Tensor,
        key_bias: Tensor,
        value_weight: Tensor | None,
        value_bias: Tensor | None,
        position: Tensor | None,
        maps: int,
        scale: float,
        on_logits: bool,
        masked: bool,
        wide: torch.dtype,
    ) -> None:
        self.key = self.value = Kernels(key_weight, key_bias, wide)
        if value_weight is not None and value_bias is not None:
            self.value = Kernels(value_weight, value_bias, wide)
        self.position = None
        if position is not None:  # (slots, maps)
            self.position = position.to(wide).t().repeat(1, maps // max(len(position), 1))
        self.scale, self.on_logits, self.masked = scale, on_logits, masked


@dataclass(frozen=True)
class Strip:
    """Some of the batch * heads maps, and some of their rows."""

    maps: slice
    rows: slice

    @property
    def count(self) -> int:
        """How many maps."""
        return int(self.maps.stop - self.maps.start)

    @property
    def height(self) -> int:
        """How many rows."""
        return int(self.rows.stop - self.rows.start)


class Plan:
    """Sizes of one call: how maps are cut into strips, and where taps are in them."""

    def __init__(self, query: Tensor, weight: Tensor, padded: bool) -> None:
        self.batch, self.heads, self.dim, self.height, self.width = query.shape
        self.side, self.padded = side_of(weight), padded
        self.radius = self.side // 2
        self.row = self.width + 2 * self.radius
        taps = range(self.side)
        self.offsets = [row * self.row + column for row in taps for column in taps]
        self._kept: dict[str, object] = {}

    def strips(self) -> Iterator[Strip]:
        """Several whole small maps, or some rows of a large one."""
        total, numbers = self.batch * self.heads, self.dim + 2 * self.side**2  # those of a pixel that memory is for
        most = int(PART * total * self.height * self.width * self.dim)
        limit = min(NUMBERS * torch.get_num_threads(), max(most, LEAST)) // numbers
        rows = max(limit // self.row, 1)
        step, maps = _share(self.height, rows), _share(total, max(rows // (self.height + 2 * self.radius), 1))
        for first in range(0, total, maps):
            for row in range(0, self.height, step):
                yield Strip(slice(first, min(first + maps, total)), slice(row, min(row + step, self.height)))

    def pixels(self, strip: Strip) -> int:
        """Flat length of a strip's queries."""
        return self.row * (strip.height if strip.count == 1 else strip.count * (strip.height + 2 * self.radius))

    def memory(self, name: str, x: Tensor, channels: int, strip: Strip, shown: slice) -> tuple[Tensor, Tensor]:
        """Scratch memory of a strip: (channels, maps, rows + 2r, width + 2r), and flat behind the channels.

        All but the rows `shown` and their columns is zero. Strips of one shape that write no more than these into
        memory of this name find the zeros of the strip before.
        """
        shape = (strip.count, strip.height + 2 * self.radius, self.row)
        places, columns = math.prod(shape), self.columns(name)
        flat = scratch(name, x, channels, places + 2 * self.radius * (self.row + 1))  # taps reach behind the end
        image = flat[:, :places].view(channels, *shape)
        if self._kept.get(name) != (shape, shown):
            self._kept[name] = shape, shown
            flat[:, places:] = 0
            image[:, :, : shown.start] = 0
            image[:, :, shown.stop :] = 0
            image[..., : columns.start] = 0
            image[..., columns.stop :] = 0
        return image[:, :, shown, columns], flat

    def rows_around(self, strip: Strip) -> tuple[slice, slice]:
        """The rows of a map that a strip's taps reach, and where in the strip's memory they are."""
        first, last = strip.rows.start, strip.rows.stop + 2 * self.radius
        if self.padded:
            return slice(first, last), slice(0, last - first)
        shown = slice(max(first - self.radius, 0), min(last - self.radius, self.height))
        above = shown.start + self.radius - first
        return shown, slice(above, above + shown.stop - shown.start)

    def columns(self, name: str) -> slice:
        """Where in a row of memory the columns of keys and values are, or those of pixels."""
        if name not in AROUND:
            return slice(0, self.width)
        return slice(0, self.row) if self.padded else slice(self.radius, self.radius + self.width)

    def around(self, name: str, x: Tensor, wide: Tensor, strip: Strip) -> Tensor:
        """A strip of keys or values and what is around it, flat, in the dtype of `wide`."""
        shown, place = self.rows_around(strip)
        target, flat = self.memory(name, wide, self.dim, strip, place)
        target.copy_(chosen(x, strip.maps)[:, :, shown].transpose(0, 1))
        return flat

    def spread(self, name: str, x: Tensor, wide: Tensor, strip: Strip, scale: float = 1.0) -> Tensor:
        """A strip of queries, or of anything else by pixel, flat; zeros in places that are no pixel."""
        target, flat = self.memory(name, wide, x.shape[2], strip, slice(0, strip.height))
        part = chosen(x, strip.maps)[:, :, strip.rows].transpose(0, 1)
        if scale == 1.0:
            target.copy_(part)
        elif part.dtype == target.dtype:
            torch.mul(part, scale, out=target)
        else:
            target.copy_(part).mul_(scale)
        return flat[:, : self.pixels(strip)]

    def gathered(self, flat: Tensor, strip: Strip) -> Tensor:
        """The pixels of flat memory: (maps, channels, rows, width)."""
        step = (strip.height + 2 * self.radius) * self.row
        shape = (strip.count, flat.shape[0], strip.height, self.width)
        return flat.as_strided(shape, (step, flat.stride(0), self.row, 1))


def add_scores(query: Tensor, key: Tensor, kernels: Kernels, plan: Plan, logits: Tensor) -> None:
    """Add to logits (slots, pixels) the products of flat queries and keys at every tap."""
    product = scratch("product", query, *query.shape)
    for weight, offset in zip(kernels.to_slots, plan.offsets, strict=True):
        torch.mul(query, key[:, offset : offset + query.shape[1]], out=product)
        logits.addmm_(weight, product)


def shares(plan: Plan, tables: Tables, strip: Strip, query: Tensor, key: Tensor) -> Tensor:
    """Softmax's shares of a strip, (slots, pixels); the flat query is scaled."""
    slots, pixels = tables.key.bias.shape[1], query.shape[1]
    logits = torch.mm(tables.key.bias.t(), query, out=scratch("logits", query, slots, pixels))
    add_scores(query, key, tables.key, plan, logits)
    if tables.position is not None:
        position, apart = tables.position[:, strip.maps, None], logits.view(slots, strip.count, -1)
        if tables.on_logits:
            apart += position
        else:
            apart.addcmul_(position, query.sum(0).view(strip.count, -1))
    if tables.masked:
        visible = inside((plan.height, plan.width), plan.side, query.device)[:, strip.rows]
        target, flat = plan.memory("mask", query, slots, strip, slice(0, strip.height))
        target.zero_().masked_fill_(~visible[:, None], -math.inf)
        logits += flat[:, :pixels]
    return torch.softmax(logits, 0, out=scratch("shares", logits, slots, pixels))


def mix(share: Tensor, value: Tensor, kernels: Kernels, plan: Plan, out: Tensor) -> None:
    """Write to flat `out` what shares take of the values at every tap."""
    torch.mm(kernels.bias, share, out=out)
    product = scratch("product", out, *out.shape)
    for weight, offset in zip(kernels.to_dim, plan.offsets, strict=True):
        out.addcmul_(torch.mm(weight, share, out=product), value[:, offset : offset + share.shape[1]])


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    position: Tensor | None,
    keep: Tensor | None,
    scale: float,
    on_logits: bool,
    masked: bool,
    padded: bool,
) -> Tensor:
    """See `leap_slide.ops.slide_attention`."""
    plan = Plan(query, key_weight, padded)
    numbers = (plan.batch * plan.heads, scale, on_logits, masked, widest(query.dtype))
    tables = Tables(key_weight, key_bias, value_weight, value_bias, position, *numbers)
    wide = tables.key.bias
    out = torch.empty_like(query)
    for strip in plan.strips():
        flat = plan.spread("query", query, wide, strip, scale)
        share = shares(plan, tables, strip, flat, plan.around("key", key, wide, strip))
        if keep is not None:
            share *= plan.spread("keep", keep, wide, strip)
        mixed = scratch("mixed", wide, plan.dim, flat.shape[1])
        mix(share, plan.around("value", value, wide, strip), tables.value, plan, mixed)
        put(out, strip.maps, strip.rows, plan.gathered(mixed, strip))
    return out
