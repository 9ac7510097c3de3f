"""The arms of the experiment on digits: a tiny vision transformer of which they share all but the attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from leap_flatten.attention import FocusedLinearAttention
from leap_flatten.functional import check_focus
from leap_flatten.visualize import equivalent_attention
from leap_shared.vision import digits
from leap_shared.vision.bodies import Block
from leap_shared.vision.bodies.grids import Number, Size, Tokens
from leap_shared.vision.digits import SIDE, Digits, Part, accuracy, load, train

__all__ = ["ARMS", "Arm", "Digits", "DigitsViT", "Part", "Recipe", "SoftmaxAttention", "accuracy", "load", "spectra"]
__all__ += ["train"]


class Arm(NamedTuple):
    """One kind of attention: softmax, or linear with the focus and the convolution or without."""

    title: str
    linear: bool = True
    focused: bool = False
    convolved: bool = False


ARMS = {
    "softmax": Arm("softmax", linear=False),
    "linear": Arm("ReLU-linear"),
    "focus": Arm("focus", focused=True),
    "focus-dwc": Arm("focus + DWC", focused=True, convolved=True),
    "dwc": Arm("ReLU-linear + DWC", convolved=True),
}


@dataclass(frozen=True)
class Recipe(digits.Recipe):
    """Sizes and training of the transformer; the same for all arms and seeds."""

    focusing_factor: Number = 3
    kernel_size: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_focus(self.focusing_factor, self.kernel_size, "mean")


class SoftmaxAttention(nn.Module):
    """Multi-head softmax self-attention, in the layout of `FocusedLinearAttention`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, tokens, dim / heads) each."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def forward(self, x: Tokens, hw: Size | None = None) -> Tokens:  # noqa: ARG002 - as other attention is called
        """Tokens to tokens of the same shape."""
        out: Tensor = self.proj(F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2))
        return out

    def matrices(self, x: Tokens) -> Float[Tensor, "batch heads tokens tokens"]:
        """What the values of each head are multiplied by."""
        query, key, _ = self.heads(x)
        return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1)


def _attention(arm: Arm, recipe: Recipe) -> nn.Module:
    """Linear arms are one layer with one initialisation: p = 1 is no focus, kernels kept at zero no convolution."""
    if not arm.linear:
        return SoftmaxAttention(recipe.dim, recipe.num_heads)
    power = recipe.focusing_factor if arm.focused else 1
    sizes = (recipe.dim, recipe.num_heads, (SIDE, SIDE))
    layer = FocusedLinearAttention(*sizes, focusing_factor=power, kernel_size=recipe.kernel_size)
    if not arm.convolved:
        for parameter in layer.dwc.parameters():
            nn.init.zeros_(parameter.requires_grad_(False))
    return layer


class DigitsViT(digits.DigitsViT):
    """The transformer with the attention of an arm.

    Args:
        arm: key of `ARMS`.
        recipe: its sizes.
        seed: of the weights, which are equal in all linear arms but for what an arm lacks.
    """

    def __init__(self, arm: str, recipe: Recipe, seed: int) -> None:
        super().__init__(lambda _: _attention(ARMS[arm], recipe), recipe, seed)


@torch.no_grad()
def spectra(model: DigitsViT, pixels: Float[Tensor, "images tokens 1"]) -> Float[Tensor, "maps tokens"]:
    """Singular values of M_eq, relative to the largest, for every block, image and head (channel 0)."""
    inputs: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
        inputs.append((module, given[0]))

    handles = [cast("Block", block).attn.register_forward_pre_hook(keep) for block in model.blocks]
    model(pixels.to(model.pos_embed.device))
    for handle in handles:
        handle.remove()
    matrices = [matrix for layer, x in inputs for matrix in _matrices(layer, x)]
    values: Tensor = torch.linalg.svdvals(torch.stack(matrices).cpu())
    return values / values[:, :1]


def _matrices(layer: nn.Module, x: Tokens) -> list[Tensor]:
    if isinstance(layer, SoftmaxAttention):
        return list(layer.matrices(x).flatten(0, 1))
    heads = range(cast("FocusedLinearAttention", layer).num_heads)
    return [equivalent_attention(layer, image, head).matrix for image in torch.split(x, 1) for head in heads]
