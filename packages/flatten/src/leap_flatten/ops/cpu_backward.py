"""Gradients on a CPU, block by block as in `cpu.py`: the inputs are focused again, and nothing else is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leap_flatten.ops.cpu import Attention, blocks, scratch
from leap_flatten.ops.reference import depthwise_gradients, raise_to, widest
from leap_shared.vision.bodies.grids import Number, Size

__all__ = ["gradients"]


class _Backward(Attention):
    """The sums of a forward pass, and those that the gradient makes over queries and over all features."""

    def __init__(
        self, shape: torch.Size, gain: Tensor | None, floor: Tensor, num_heads: int, power: Number, epsilon: float
    ) -> None:
        super().__init__(shape, gain, floor, num_heads, power, epsilon)
        self.of_states, self.of_means = torch.zeros_like(self.states), torch.zeros_like(self.means)
        self.of_gain = floor.new_zeros(0) if self.gain is None else torch.zeros_like(self.gain)
        self.of_floor = torch.zeros_like(self.floor)

    def focused(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Focused vectors of a block of inputs, which become features, and the ratios r."""
        powers, ratio = self.powers(x)
        return powers.mul_(ratio.reciprocal()), ratio

    def query_block(self, images: slice, query: Tensor, gradient: Tensor, out: Tensor) -> None:
        """Gradient for a block of queries into `out`; adds what the block says of states and means."""
        sharp, ratio = self.focused(query)
        apart = self.apart[images]
        share = torch.bmm(sharp, apart).add_(self.epsilon).reciprocal_()
        outer, of_sharp, work = (scratch(name, query, query.shape) for name in ("outer", "of_sharp", "work"))
        by_head = (*share.shape, self.dim)
        torch.mul(gradient.reshape(by_head), share[..., None], out=outer.view(by_head))
        parts = (self.views(sharp), self.views(outer), self.views(of_sharp))
        for state, of_state, own, its_outer, its_own in zip(
            self.parts(self.states, images), self.parts(self.of_states, images), *parts, strict=True
        ):
            its_own.baddbmm_(its_outer, state.transpose(1, 2), beta=0)
            of_state.baddbmm_(own.transpose(1, 2), its_outer)
        of_share = torch.mul(sharp, of_sharp, out=work).view(by_head).sum(-1).mul_(share).neg_()
        of_sharp.baddbmm_(of_share, apart.transpose(1, 2))
        of_mean = torch.bmm(of_share.transpose(1, 2), sharp).view(-1, self.num_heads, *by_head[2:])
        self.of_means[images] += of_mean.diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)
        self._of_input(query, sharp, of_sharp, ratio, out)

    def key_block(self, images: slice, key: Tensor, value: Tensor, out: Tensor, of_value: Tensor) -> None:
        """Gradient for a block of keys into `out`, and for their values added to `of_value`."""
        sharp, ratio = self.focused(key)
        of_sharp = scratch("of_sharp", key, key.shape)
        states = self.parts(self.of_states, images)
        parts = (self.views(sharp), self.views(value), self.views(of_sharp), self.views(of_value))
        for of_state, own, its_value, its_own, its_of_value in zip(states, *parts, strict=True):
            its_own.baddbmm_(its_value, of_state.transpose(1, 2), beta=0)
            its_of_value.baddbmm_(own, of_state)
        of_sharp += self.of_means[images][:, None]
        self._of_input(key, sharp, of_sharp, ratio, out)

    def _of_input(self, x: Tensor, sharp: Tensor, of_sharp: Tensor, ratio: Tensor, out: Tensor) -> None:
        """Gradient from that for focused vectors; overwrites all that it is given.

        With t the features and f focused, d t = a t + (d f - a f) p t^(p-1) / r, where a = (f . d f) / ||t||^2.
        """
        work = scratch("work", x, x.shape)
        slope = torch.mul(x, x, out=work) if self.power == 3 else work.copy_(raise_to(x, self.power - 1))
        slope *= self.power / (ratio * self.peak)
        floor = self.floor
        if self.divides_by_peak:
            x *= self.peak
            floor = floor * (1 + 1e-6)  # the division and this product round
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        along = torch.mul(sharp, of_sharp, out=out).sum(-1, keepdim=True).div_(square)
        of_features = of_sharp.sub_(sharp.mul_(along)).mul_(slope).addcmul_(x, along)
        total = of_features.sum((0, 1))
        above = torch.gt(x, floor, out=work)
        if self.gain is None:
            torch.mul(of_features, above, out=out).mul_(self.factor)
            self.of_floor += total * self.factor - out.sum((0, 1))
            return
        of_gain = torch.mul(of_features, x, out=sharp).sum((0, 1)) - total * self.floor
        self.of_gain += of_gain * (self.factor / self.gain)
        self.of_floor += total * self.factor
        torch.mul(of_features.mul_(self.gain), above, out=out)


def gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    gain: Tensor | None,
    floor: Tensor,
    weight: Tensor | None,
    num_heads: int,
    power: Number,
    epsilon: float,
    hw: Size,
) -> tuple[Tensor, ...]:
    """See `leap_flatten.ops.reference.gradients`."""
    wide, given = widest(query.dtype), (query, key, value)
    backward = _Backward(query.shape, gain, floor, num_heads, power, epsilon)
    plain, outer = value.to(wide), gradient.to(wide)
    batch, count, channels = key.shape

    for block in blocks(batch, count, channels):
        backward.add(block[0], backward.taken(key, block, position), plain[block])
    backward.divide(count)
    of_query, of_key = (outer.new_empty(x.shape) for x in (query, key))
    for block in blocks(batch, query.shape[1], channels):
        backward.query_block(block[0], backward.taken(query, block), outer[block], of_query[block])
    backward.of_states /= max(count, 1)
    backward.of_means /= max(count, 1)
    of_weight = of_bias = floor.new_zeros(0, dtype=wide)
    if weight is None:
        of_value = torch.zeros_like(plain, memory_format=torch.contiguous_format)
    else:
        first = count - hw[0] * hw[1]
        of_map, of_weight, of_bias = depthwise_gradients(outer[:, first:], plain[:, first:], weight.to(wide), hw)
        of_value = F.pad(of_map, (0, 0, first, 0)).contiguous()
    for block in blocks(batch, count, channels):
        keys = backward.taken(key, block, position)
        backward.key_block(block[0], keys, plain[block], of_key[block], of_value[block])
    of_inputs = (x.to(like.dtype) for x, like in zip((of_query, of_key, of_value), given, strict=True))
    return (*of_inputs, backward.of_gain, backward.of_floor, of_weight, of_bias)
