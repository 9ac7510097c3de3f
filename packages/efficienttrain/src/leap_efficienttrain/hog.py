"""Histograms of oriented gradients (Dalal and Triggs 2005), batched, as a target of masked pre-training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from leap_shared.errors import UserError

__all__ = ["BINS", "CELL", "draw_histograms", "oriented_gradients"]

BINS, CELL, EPSILON = 9, 8, 1e-5


@torch.no_grad()
def oriented_gradients(
    images: Float[Tensor, "batch channels height width"],
    bins: int = BINS,
    cell: int = CELL,
    *,
    soft: bool = True,
    normalise: bool = True,
) -> Float[Tensor, "batch channels rows columns bins"]:
    """Histograms of the gradients' directions, modulo pi, in each cell of each channel, weighted by their magnitudes.

    Gradients are central differences, and 0 across the picture's border. MaskFeat (Wei et al. 2022) predicts these of
    masked patches. No gradient flows back to the images.

    Args:
        images: of any scale.
        bins: directions between 0 (columns grow brighter) and pi.
        cell: side of a cell in pixels.
        soft: share a gradient between the two bins whose centres are next to its direction, in proportion; else it
            counts for the bin that it falls into, as in `skimage.feature.hog`.
        normalise: divide each histogram by sqrt(|h|^2 + 1e-10), so that contrast does not matter; else it is the mean
            over the cell's pixels.

    Returns:
        Histograms in float32, or float64 for such images.

    Raises:
        UserError: height or width is not a multiple of `cell`.
    """
    batch, channels, height, width = images.shape
    if height % cell or width % cell:
        raise UserError(f"images of {height}x{width} pixels do not divide into cells of {cell}x{cell}: resize them")
    images = images if images.dtype == torch.float64 else images.float()
    down = F.pad(images[..., 2:, :] - images[..., :-2, :], (0, 0, 1, 1))
    right = F.pad(images[..., 2:] - images[..., :-2], (1, 1))
    angle = (torch.atan2(down, right) * (bins / math.pi))[:, :, None]
    bin_number = torch.arange(bins, device=images.device, dtype=images.dtype)[:, None, None]
    if soft:  # in place: one tensor of `bins` times the images' size is enough
        share = (angle - (bin_number + 0.5 - bins / 2)).remainder_(bins).sub_(bins / 2).abs_().neg_().add_(1)
        share = share.clamp_(min=0).mul_(torch.hypot(down, right)[:, :, None])
    else:
        share = (angle.floor() % bins == bin_number) * torch.hypot(down, right)[:, :, None]
    cells = share.view(batch, channels, bins, height // cell, cell, width // cell, cell).mean((4, 6))
    if normalise:
        cells = cells / (cells.square().sum(2, keepdim=True) + EPSILON**2).sqrt()
    return cells.permute(0, 1, 3, 4, 2)


def draw_histograms(
    histograms: Float[Tensor, "batch channels rows columns bins"], cell: int = CELL
) -> Float[Tensor, "batch channels height width"]:
    """Pictures of histograms: in each cell a line along the edge of each direction, as bright as its bin, 0 to 1."""
    bins, device = histograms.shape[-1], histograms.device
    angle = (torch.arange(bins, device=device) + 0.5) * (math.pi / bins)
    place = torch.arange(cell, device=device) - (cell - 1) / 2
    across = place * angle.cos()[:, None, None] + place[:, None] * angle.sin()[:, None, None]
    lines = (1 - across.abs()).clamp(min=0).to(histograms.dtype)
    drawn = torch.einsum("bcijk,kyx->bciyjx", histograms.clamp(min=0), lines).flatten(4, 5).flatten(2, 3)
    return drawn / drawn.amax((1, 2, 3), keepdim=True).clamp(min=EPSILON)
