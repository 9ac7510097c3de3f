"""The backward operator on a CPU, strip by strip as the forward one.

A pixel's gradient for the keys and values of its neighbours is added to flat memory at their taps' offsets; strips that
share rows add up in the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leap_slide.ops.cpu import Kernels, Plan, Strip, Tables, add_scores, put, scratch, shares
from leap_slide.ops.reference import widest

__all__ = ["gradients"]


class _Sums:
    """Gradients of one call for kernels and biases of keys, or of values, summed over strips."""

    def __init__(self, kernels: Kernels) -> None:
        slots, dim = kernels.to_slots[0].shape
        self.kernels, self.bias = kernels, kernels.bias.new_zeros(slots, dim)
        self.weight = kernels.bias.new_zeros(len(kernels.to_slots), slots, dim)

    def add(self, plan: Plan, source: Tensor, other: Tensor, share: Tensor, sent: Tensor, taken: Tensor | None) -> None:
        """Add a strip's, where `source` meets the taps of `other` weighted by `share`.

        Args:
            plan: of the call.
            source: scaled queries, or gradients of the output, (dim, pixels).
            other: keys or values, flat.
            share: gradients of the logits, or shares, (slots, pixels).
            sent: flat gradient of `other`, added to.
            taken: gradient of `source`, added to where it is wanted.
        """
        self.bias.addmm_(share, source.t())
        pixels, product = source.shape[1], scratch("product", source, *source.shape)
        for tap, offset in enumerate(plan.offsets):
            neighbours = slice(offset, offset + pixels)
            torch.mul(source, other[:, neighbours], out=product)
            self.weight[tap].addmm_(share, product.t())
            torch.mm(self.kernels.to_dim[tap], share, out=product)
            sent[:, neighbours].addcmul_(source, product)
            if taken is not None:
                taken.addcmul_(product, other[:, neighbours])


def _add_to_maps(plan: Plan, flat: Tensor, out: Tensor, strip: Strip) -> None:
    (shown, place), columns = plan.rows_around(strip), plan.columns("key")
    shape = (strip.count, strip.height + 2 * plan.radius, plan.row)
    image = flat[:, : shape[0] * shape[1] * shape[2]].view(-1, *shape)
    put(out, strip.maps, shown, image[:, :, place, columns].transpose(0, 1), add=True)


def gradients(
    gradient: Tensor,
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
) -> tuple[Tensor, ...]:
    """See `leap_slide.ops.slide_attention_backward`."""
    plan = Plan(query, key_weight, padded)
    numbers = (plan.batch * plan.heads, scale, on_logits, masked, widest(query.dtype))
    tables = Tables(key_weight, key_bias, value_weight, value_bias, position, *numbers)
    wide = tables.key.bias
    of_query = torch.empty_like(query)
    of_key, of_value = (torch.zeros_like(x, dtype=wide.dtype) for x in (key, value))
    keys_sums = _Sums(tables.key)
    values_sums = keys_sums if tables.value is tables.key else _Sums(tables.value)
    of_position = wide.new_zeros(0 if tables.position is None else tables.position.shape)  # (slots, maps)
    for strip in plan.strips():
        q, k = plan.spread("query", query, wide, strip, scale), plan.around("key", key, wide, strip)
        g, v = plan.spread("gradient", gradient, wide, strip), plan.around("value", value, wide, strip)
        plain = shares(plan, tables, strip, q, k)
        of_share = torch.mm(tables.value.bias.t(), g, out=scratch("of_share", wide, *plain.shape))
        add_scores(g, v, tables.value, plan, of_share)
        share = plain
        if keep is not None:
            dropped = plan.spread("keep", keep, wide, strip)
            of_share *= dropped
            share = torch.mul(plain, dropped, out=scratch("share", wide, *plain.shape))
        sent = scratch("sent", wide, *v.shape).zero_()
        values_sums.add(plan, g, v, share, sent, None)
        _add_to_maps(plan, sent, of_value, strip)
        of_share -= torch.mul(plain, of_share, out=scratch("of_logits", wide, *plain.shape)).sum(0)
        of_logits = of_share.mul_(plain)
        sent.zero_()
        taken = torch.mm(tables.key.bias, of_logits, out=scratch("taken", wide, *q.shape))
        keys_sums.add(plan, q, k, of_logits, sent, taken)
        _add_to_maps(plan, sent, of_key, strip)
        if tables.position is not None:
            apart = of_logits.view(len(of_logits), strip.count, -1)
            if on_logits:
                added = apart.sum(2)
            else:
                added = torch.einsum("imp,mp->im", apart, q.sum(0).view(strip.count, -1))
                taken += torch.einsum("imp,im->mp", apart, tables.position[:, strip.maps]).flatten()
            of_position[:, strip.maps] += added
        taken *= scale
        put(of_query, strip.maps, strip.rows, plan.gathered(taken, strip))
    found = [keys_sums.weight.permute(2, 1, 0).contiguous(), keys_sums.bias.t().contiguous()]
    if values_sums is keys_sums:
        found += [wide.new_zeros(0), wide.new_zeros(0)]
    else:
        found += [values_sums.weight.permute(2, 1, 0).contiguous(), values_sums.bias.t().contiguous()]
    if tables.position is not None:
        of_position = of_position.view(len(of_position), plan.batch, plan.heads).sum(1).t().contiguous()
    return of_query, of_key.to(key.dtype), of_value.to(value.dtype), *found, of_position
