"""Many small networks of one shape, run and trained as one: a leading axis on every weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor, nn

__all__ = ["StackedMLP"]


class StackedMLP(nn.Module):
    """`len(seeds)` independent ReLU networks; each starts with torch's default initialisation from its own seed.

    Args:
        widths: input, hidden and output widths.
        seeds: one per network.
    """

    def __init__(self, widths: Sequence[int], seeds: Sequence[int]) -> None:
        super().__init__()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(widths):
            bound = 1 / math.sqrt(fan_in)
            for parameters, rows in ((self.weights, fan_in), (self.biases, 1)):
                numbers = [torch.rand(rows, fan_out, generator=g) * 2 * bound - bound for g in generators]
                parameters.append(nn.Parameter(torch.stack(numbers)))

    def forward(
        self, inputs: Float[Tensor, "networks batch width"], networks: slice = slice(None)
    ) -> Float[Tensor, "networks batch output"]:
        """Each of the `networks` (all of them) on its own batch."""
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs = torch.baddbmm(bias[networks], inputs.relu() if index else inputs, weight[networks])
        return inputs

    def states(self) -> list[dict[str, Tensor]]:
        """Of each network {l1.weight, l1.bias, l2.weight, ...}, in the layout of `torch.nn.Linear`."""
        layers = list(enumerate(zip(self.weights, self.biases, strict=True), 1))
        return [
            {f"l{i}.{leaf}": t for i, (w, b) in layers for leaf, t in (("weight", w[n].T), ("bias", b[n, 0]))}
            for n in range(len(self.weights[0]))
        ]

    @torch.no_grad()
    def load_states(self, states: Sequence[Mapping[str, ArrayLike | Tensor]]) -> None:
        """Take over what :meth:`states` gives."""
        for own, given in zip(self.states(), states, strict=True):
            for key, value in own.items():
                value.copy_(torch.as_tensor(given[key]))
