"""The operators on a CPU: blocks of tokens that stay in the cache, few passes over each, buffers that are used again.

With t the features, u = t^p and r = ||u|| / ||t||, a focused vector is u / r. For queries 1 / r goes into the
denominator, u M / (u . mean of k + epsilon r), so only keys are divided by it. Tokens stay channels-last throughout:
heads are strided views, which batched products take as they are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from leap_flatten.ops.reference import raise_to, widest
from leap_shared.vision.bodies.grids import Number, Size, to_image

__all__ = ["Attention", "Block", "blocks", "forward", "layer", "scratch"]

BLOCK = 160_000  # numbers of one tensor in a block, per thread: the few tensors of a block fill a second-level cache
SAFE = 8e-7  # its sixth power is a normal float32: denormal ones take a hundred times as long, or are flushed to zero
SMALLEST_POWER = 1e-18  # beside a largest of 1; its square is a normal float32 too

Block = tuple[slice, slice]


def blocks(batch: int, tokens: int, channels: int) -> Iterator[Block]:
    """Slices of images and of their tokens: several whole small images, or a part of a large one."""
    limit = max(BLOCK * torch.get_num_threads() // channels, 64)
    images, parts = max(limit // max(tokens, 1), 1), max(-(-tokens // limit), 1)
    step = max(-(-tokens // parts), 1)
    for image in range(0, batch, images):
        for token in range(0, tokens, step):
            yield slice(image, min(image + images, batch)), slice(token, min(token + step, tokens))


_memory = threading.local()


def scratch(name: str, like: Tensor, shape: torch.Size) -> Tensor:
    """Contiguous memory of a block's size that this thread keeps, whose content the next call of that name overwrites.

    A fresh tensor for every step would cost more in page faults than the arithmetic takes.
    """
    kept = vars(_memory)
    found: Tensor | None = kept.get(key := f"{name} {like.dtype}")
    if found is None or found.numel() < shape.numel():
        with torch.inference_mode(mode=False):  # memory made in inference mode could not be written to outside
            found = kept[key] = torch.empty(shape.numel(), dtype=like.dtype)
    return found[: shape.numel()].view(shape)


class Attention:
    """One call: how inputs become powers of features, the sums over keys, and the queries' share of them."""

    def __init__(
        self, shape: torch.Size, gain: Tensor | None, floor: Tensor, num_heads: int, power: Number, epsilon: float
    ) -> None:
        wide = widest(floor.dtype)
        self.num_heads, self.power = num_heads, power
        self.batch, self.tokens, self.channels = shape
        # Attention does not change where features are multiplied by a number, and epsilon by its square.
        lowest = floor.amin().item() if floor.numel() else SAFE
        self.factor = 2.0 ** max(math.ceil(math.log2(SAFE / lowest)), 0) if 0 < lowest < math.inf else 1.0
        self.gain, self.floor = None if gain is None else gain.to(wide) * self.factor, floor.to(wide) * self.factor
        self.epsilon = epsilon * self.factor**2
        self.divides_by_peak = power not in (2, 3) or self.factor > 64 or lowest <= 0
        self.peak = self.floor.new_ones(())  # of each vector of the last block
        self.dim = self.channels // num_heads
        self.states = self.floor.new_zeros(self.batch, num_heads, self.dim, self.dim)  # k v^T
        self.means = self.floor.new_zeros(self.batch, self.channels)  # k

    def views(self, x: Tensor) -> list[Tensor]:
        """Tokens by head as 3-D views: of one image (heads, tokens, dim), of several one (images, tokens, dim) each."""
        if x.shape[0] == 1:
            return [x.reshape(-1, self.num_heads, self.dim).transpose(0, 1)]
        return [x[..., head * self.dim : (head + 1) * self.dim] for head in range(self.num_heads)]

    @staticmethod
    def parts(states: Tensor, images: slice) -> list[Tensor]:
        """States (or gradients for them) of a block's images, as `views` splits their tokens."""
        states = states[images]
        return [states[0]] if states.shape[0] == 1 else list(states.unbind(1))

    def taken(self, x: Tensor, block: Block, position: Tensor | None = None) -> Tensor:
        """A copy of a block to overwrite, of keys with their position."""
        part = x[block]
        copied = scratch("input", self.floor, part.shape)
        return copied.copy_(part) if position is None else torch.add(part, position[block[1]], out=copied)

    def powers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Powers u and ratios r of a block of inputs, which become features (over their `peak` where it divides)."""
        if self.gain is not None:
            torch.addcmul(self.floor, x, self.gain, out=x)
        elif self.factor > 1:
            x *= self.factor
        torch.maximum(x, self.floor, out=x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        if self.divides_by_peak:
            self.peak = x.amax(-1, keepdim=True)
            x /= self.peak
        powers = scratch("powers", x, x.shape)
        if self.power == 3:
            torch.pow(x, 3, out=powers)
        else:
            powers.copy_(raise_to(x, self.power))
        if self.divides_by_peak:
            powers.clamp_(min=SMALLEST_POWER)
        return powers, torch.linalg.vector_norm(powers, dim=-1, keepdim=True).div_(norm)

    def add(self, images: slice, keys: Tensor, values: Tensor) -> None:
        """Add a block of keys, with their position and overwritten here, and their values to the sums."""
        powers, ratio = self.powers(keys)
        powers *= ratio.reciprocal_()
        self.means[images] += powers.sum(1)
        for state, sharp, plain in zip(
            self.parts(self.states, images), self.views(powers), self.views(values), strict=True
        ):
            state.baddbmm_(sharp.transpose(1, 2), plain)

    def divide(self, count: int) -> None:
        """Turn the sums over keys into means, those of the keys apart by head: (batch, channels, heads)."""
        self.states /= max(count, 1)
        self.means /= max(count, 1)
        apart = self.means.new_zeros(self.batch, self.num_heads, self.dim, self.num_heads)
        apart.diagonal(dim1=1, dim2=3).copy_(self.means.view(self.batch, self.num_heads, self.dim).transpose(1, 2))
        self.apart = apart.view(self.batch, self.channels, self.num_heads)

    def apply(self, images: slice, queries: Tensor, out: Tensor) -> None:
        """Add to `out` what a block of queries, overwritten here, takes of the states."""
        powers, ratio = self.powers(queries)
        share = torch.bmm(powers, self.apart[images]).add_(ratio, alpha=self.epsilon).reciprocal_()
        powers.view(*share.shape, self.dim).mul_(share[..., None])
        for state, sharp, own in zip(self.parts(self.states, images), self.views(powers), self.views(out), strict=True):
            own.baddbmm_(sharp, state)

    def run(
        self,
        count: int,
        keys: Callable[[Block], tuple[Tensor, Tensor]],
        convolved: Callable[[], Tensor],
        queries: Callable[[Block], Tensor],
        finish: Callable[[Block, Tensor], object] | None = None,
    ) -> Tensor:
        """One pass over blocks of keys and values, the convolution of the values, one pass over blocks of queries."""
        for block in blocks(self.batch, count, self.channels):
            self.add(block[0], *keys(block))
        self.divide(count)
        out = convolved()
        for block in blocks(self.batch, self.tokens, self.channels):
            self.apply(block[0], queries(block), out[block])
            if finish is not None:
                finish(block, out[block])
        return out


def _convolved(value: Tensor, weight: Tensor | None, bias: Tensor | None, hw: Size, tokens: int) -> Tensor:
    """The depthwise convolution of the map, zeros for the tokens before it: what the attention is then added to."""
    batch, _, channels = value.shape
    if weight is None:
        return value.new_zeros(batch, tokens, channels)
    times, first = channels // weight.shape[0], tokens - hw[0] * hw[1]
    image = to_image(value[:, first:], hw)
    kernels, offsets = torch.cat([weight] * times), None if bias is None else torch.cat([bias] * times)
    out = F.conv2d(image, kernels, offsets, padding=weight.shape[2] // 2, groups=channels)
    out = out.permute(0, 2, 3, 1).reshape(batch, hw[0] * hw[1], channels).contiguous()
    return F.pad(out, (0, 0, first, 0)) if first else out


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    gain: Tensor | None,
    floor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    power: Number,
    epsilon: float,
    hw: Size,
) -> Tensor:
    """See `leap_flatten.ops.reference.forward`."""
    wide = widest(query.dtype)
    attention = Attention(query.shape, gain, floor, num_heads, power, epsilon)
    plain = value.to(wide)
    kernels, offsets = (None if x is None else x.to(wide) for x in (weight, bias))
    out = attention.run(
        key.shape[1],
        lambda block: (attention.taken(key, block, position), plain[block]),
        lambda: _convolved(plain, kernels, offsets, hw, query.shape[1]),
        lambda block: attention.taken(query, block),
    )
    return out.to(query.dtype)


def layer(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
    position: Tensor,
    gain: Tensor | None,
    floor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    power: Number,
    epsilon: float,
    hw: Size,
) -> Tensor:
    """See `leap_flatten.ops.reference.layer`: it projects block by block, while the input is in the cache."""
    attention = Attention(x.shape, gain, floor, num_heads, power, epsilon)
    x, tokens = x.contiguous(), x.shape[1]
    values = x.new_empty(x.shape)  # and, once they are convolved, what is returned

    def keys(block: Block) -> tuple[Tensor, Tensor]:
        given = x[block]
        key = _linear(given, key_weight, key_bias, scratch("input", given, given.shape))
        return key.add_(position[block[1]]), _linear(given, value_weight, value_bias, values[block])

    def queries(block: Block) -> Tensor:
        given = x[block]
        return _linear(given, query_weight, query_bias, scratch("input", given, given.shape))

    attention.run(
        tokens,
        keys,
        lambda: _convolved(values, weight, bias, hw, tokens),
        queries,
        lambda block, attended: _linear(attended, out_weight, out_bias, values[block]),
    )
    return values


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write x W^T + b into `out`, which is contiguous."""
    rows, target = x.view(-1, x.shape[2]), out.view(-1, out.shape[2])
    if bias is None:
        torch.mm(rows, weight.t(), out=target)
    else:
        torch.addmm(bias, rows, weight.t(), out=target)
    return out
