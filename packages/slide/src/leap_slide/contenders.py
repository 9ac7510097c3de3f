"""Attention between the projections as something to measure: ours and its peers', on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from leap_shared.bench import noise, placed
from leap_shared.vision.bodies.grids import Size
from leap_slide import peers
from leap_slide.attention import SlideAttention
from leap_slide.functional import slide_attention

__all__ = ["CORE", "GLOBAL", "MERGED", "OURS", "TWO_PATH", "UNFOLD", "WINDOWS", "Core", "Operands", "Shape"]

OURS = "slide attention"
TWO_PATH, MERGED, UNFOLD = "two convolution paths", "merged convolution", "fixed shifts by unfold"
WINDOWS, CORE = "7x7 windows (SDPA), cut and merged", "7x7 windows (SDPA), lying ready"
GLOBAL = "softmax over the map (SDPA)"
GLOBAL_TOKENS = 28 * 28  # more take many times as long as anything local
GPU_BATCH = 64


@dataclass(frozen=True)
class Shape:
    """One layer and its input.

    Attributes:
        batch: images on a CPU.
        kernel_size: k, odd.
        gpu_batch: images on a GPU.
        targets: least ratios to peers on one CPU thread, forward.
    """

    batch: int
    height: int
    width: int
    dim: int
    num_heads: int
    kernel_size: int
    gpu_batch: int = GPU_BATCH
    targets: Mapping[str, float] = field(default_factory=dict)

    @property
    def hw(self) -> Size:
        """Height and width of the map."""
        return self.height, self.width

    def images(self, device: torch.device) -> int:
        """How many images a device gets."""
        return self.gpu_batch if device.type == "cuda" else self.batch

    def title(self, device: torch.device) -> str:
        """The sizes, for people."""
        sizes = (self.images(device), *self.hw, self.dim)
        return f"{'x'.join(map(str, sizes))}, {self.num_heads} heads, k={self.kernel_size}"

    def layer(self, device: torch.device) -> SlideAttention:
        """A fresh layer on a device."""
        return placed(SlideAttention(self.dim, self.num_heads, self.kernel_size), device)

    def tokens(self, device: torch.device, seed: int) -> Tensor:
        """Input of the layer."""
        return noise(device, seed, self.images(device), self.height * self.width, self.dim)


class Core(NamedTuple):
    """One contender: what computes the attention, and the leaves that it has gradients for."""

    function: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]


class Operands:
    """Queries, keys and values of one shape, and what attends with them.

    Args:
        shape: of the layer and its input.
        device: where they lie.
        seed: of the input.
        channels_first: in memory, as the layer has them on a CPU; its peers, made of convolutions, get whole maps then.
            Otherwise last, a third each of one packed tensor, as a projection leaves them.
    """

    def __init__(self, shape: Shape, device: torch.device, seed: int, channels_first: bool = False) -> None:
        self.shape, self.layer, self.channels_first = shape, shape.layer(device), channels_first
        with torch.no_grad():
            maps = self.layer.projected(shape.tokens(device, seed), shape.hw)
            whole = [x.flatten(1, 2).contiguous().permute(0, 2, 3, 1) for x in maps]
            if not channels_first:
                whole = list(torch.cat([x.contiguous() for x in whole], 3).chunk(3, 3))
            table = self.layer.relative_position_bias_table
            assert table is not None  # noqa: S101 - for the type checker
            tables = (*self.layer.kernels()[0], table.reshape(shape.num_heads, -1))
        self.maps = [x.detach().requires_grad_() for x in maps]
        self.q, self.k, self.v = (x.detach().requires_grad_() for x in whole)
        self.weight, self.bias, self.rpb = (x.detach().clone().requires_grad_() for x in tables)

    @property
    def images(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (batch, height, width, channels)."""
        return self.q, self.k, self.v

    def ours(self) -> Core:
        """The layer's own call where channels are first, else the function with merged kernels."""
        if self.channels_first:
            return Core(partial(self.layer.attended, *self.maps), (*self.maps, *self._trained()))
        tables, (heads, side) = (self.weight, self.bias, self.rpb), (self.shape.num_heads, self.shape.kernel_size)
        function = partial(slide_attention, *self.images, *tables, num_heads=heads, kernel_size=side)
        return Core(function, (*self.images, *tables))

    def formulas(self) -> dict[str, Core]:
        """The paper's formula, and fixed shifts by unfold."""
        heads, side = self.shape.num_heads, self.shape.kernel_size
        kernels = (self.weight, self.bias)
        two_path = partial(peers.EagerAttention(self.layer).attended, *self.images)
        merged = partial(peers.merged, *self.images, kernels, self.rpb, heads)
        return {
            TWO_PATH: Core(two_path, (*self.images, *self._trained())),
            MERGED: Core(merged, (*self.images, *kernels, self.rpb)),
            UNFOLD: Core(partial(peers.unfold, *self.images, heads, side), self.images),
        }

    def softmax(self) -> dict[str, Core]:
        """Softmax attention in windows, with and without what it takes to have windows, and over small maps."""
        heads = self.shape.num_heads
        query, key, value = (
            peers.window_operands(x.detach(), heads).contiguous().requires_grad_() for x in self.images
        )
        found = {
            WINDOWS: Core(partial(peers.windowed, *self.images, heads), self.images),
            CORE: Core(partial(F.scaled_dot_product_attention, query, key, value), (query, key, value)),
        }
        if self.shape.height * self.shape.width <= GLOBAL_TOKENS:
            found[GLOBAL] = Core(partial(peers.global_softmax, *self.images, heads), self.images)
        return found

    def _trained(self) -> list[Tensor]:
        """Parameters between the projections that are trained."""
        inside = {"qkv", "proj"}
        named = self.layer.named_parameters()
        return [value for name, value in named if value.requires_grad and name.partition(".")[0] not in inside]
