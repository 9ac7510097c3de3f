"""The arms of the experiment on digits: a tiny vision transformer of which they share all but how pixels meet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from leap_shared.errors import UserError
from leap_shared.vision import digits
from leap_shared.vision.bodies import AttentionFactory, Site, WindowAttention
from leap_shared.vision.bodies.grids import Size, Tokens, merge, partition, to_image, to_map, to_tokens
from leap_shared.vision.digits import SIDE
from leap_slide.attention import SlideAttention
from leap_slide.functional import check_kernel_size

__all__ = ["ARMS", "Arm", "ConvolutionMixer", "DigitsViT", "Recipe", "WindowMixer", "without_deformation"]


@dataclass(frozen=True)
class Recipe(digits.Recipe):
    """Sizes and training of the transformer; the same for all arms and seeds."""

    kernel_size: int = 3
    """k of the arms that see k x k pixels around each."""
    window: int = 4
    """Side of the windows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel_size(self.kernel_size)
        if self.window < 1 or SIDE % self.window:
            raise UserError(f"window {self.window}: expected a divisor of {SIDE}, the side of the images")


class ConvolutionMixer(nn.Module):
    """Depthwise convolution between projections, which have as many weights as those of attention."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 2 * dim)
        self.dwc = nn.Conv2d(2 * dim, 2 * dim, kernel_size, padding=kernel_size // 2, groups=2 * dim)
        self.proj = nn.Linear(2 * dim, dim)

    def forward(self, x: Tokens, hw: Size) -> Tokens:
        """Tokens to tokens of the same shape."""
        out: Tensor = self.proj(to_tokens(self.dwc(to_image(self.expand(x), hw))))
        return out


class WindowMixer(nn.Module):
    """Swin's attention in windows that are never shifted.

    Args:
        site: place of the block; its `input_size` is the whole map.
        window: side, a divisor of the map's sides.
    """

    def __init__(self, site: Site, window: int) -> None:
        super().__init__()
        self.window = (window, window)
        self.attn = WindowAttention(replace(site, input_size=self.window))

    def forward(self, x: Tokens, hw: Size) -> Tokens:
        """Tokens to tokens of the same shape."""
        windows = self.attn(partition(to_map(x, hw), self.window), self.window)
        return merge(windows, self.window, hw).flatten(1, 2)


def without_deformation(layer: SlideAttention) -> SlideAttention:
    """Keep the learned path of a layer at zero: what is left is the fixed one, plain shifts with a trainable bias."""
    for parameter in layer.dep_conv1.parameters():
        nn.init.zeros_(parameter.requires_grad_(False))
    return layer


class Arm(NamedTuple):
    """One way in which pixels meet others."""

    title: str
    short: str
    """For axes and notes."""


ARMS = {
    "conv": Arm("depthwise convolution", "convolution"),
    "windows": Arm("window attention, no shift", "windows"),
    "fixed": Arm("local attention, fixed shifts", "fixed shifts"),
    "slide": Arm("slide attention", "slide"),
}


def _mixer(arm: str, recipe: Recipe) -> AttentionFactory:
    def make(site: Site) -> nn.Module:
        if arm == "conv":
            return ConvolutionMixer(site.dim, recipe.kernel_size)
        if arm == "windows":
            return WindowMixer(site, recipe.window)
        layer = SlideAttention(site.dim, site.num_heads, recipe.kernel_size)
        return without_deformation(layer) if arm == "fixed" else layer

    return make


class DigitsViT(digits.DigitsViT):
    """The transformer of an arm.

    Args:
        arm: key of `ARMS`.
        recipe: its sizes.
        seed: of the weights, which are equal in the arms fixed and slide but for what the former lacks.
    """

    def __init__(self, arm: str, recipe: Recipe, seed: int) -> None:
        super().__init__(_mixer(arm, recipe), recipe, seed)
