"""Generated scenes of shapes with boxes, labels and masks, which detection and segmentation can be tried on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchvision.ops import masks_to_boxes

from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Size

__all__ = ["CLASSES", "Scene", "draw"]

CLASSES = ("background", "disc", "triangle", "box")
SMALLEST_SIDE = 16
VISIBLE_SHARE = 0.4  # of a shape that counts as an object: what others hide more of is not told from a fragment


class Scene(NamedTuple):
    """A picture and what is to be found on it."""

    image: Float[Tensor, "3 height width"]
    """Red, green and blue, 0 to 1."""
    boxes: Float[Tensor, "shapes 4"]
    """Left, top, right and bottom edge of the visible pixels."""
    labels: Int64[Tensor, " shapes"]
    """Index into `CLASSES`, 1 or more."""
    masks: Bool[Tensor, "shapes height width"]
    """Visible pixels of each shape; no two masks overlap."""
    classes: Int64[Tensor, "height width"]
    """Index into `CLASSES` of every pixel, slivers of hidden shapes included."""


def draw(size: Size, generator: torch.Generator, most: int = 4) -> Scene:
    """Anti-aliased discs, triangles and boxes, bright and a little turned, before one another on a textured background.

    Args:
        size: height and width in pixels.
        generator: the scene is a function of its state.
        most: shapes are between 1 and this many; fewer where others hide them.

    Raises:
        UserError: `size` or `most` is too small.
    """
    if min(size) < SMALLEST_SIDE or most < 1:
        expected = f"expected {SMALLEST_SIDE} pixels or more each way, and 1 shape or more"
        raise UserError(f"a scene of {size[0]}x{size[1]} pixels with up to {most} shapes: {expected}")
    count = int(torch.randint(1, most + 1, (), generator=generator))
    drawn = torch.randint(1, len(CLASSES), (count,), generator=generator)
    ground = 0.1 + 0.4 * torch.rand(3, 1, 1, generator=generator)
    image, owner = _texture(ground, size, generator), torch.zeros(size, dtype=torch.int64)
    areas = torch.empty(count)
    for index, label in enumerate(drawn.tolist()):
        coverage = (0.5 - _distance(label, size, generator)).clamp(0, 1)
        colour = 0.6 + 0.4 * torch.rand(3, 1, 1, generator=generator)
        image = image.lerp(_texture(colour, size, generator), coverage)
        owner[coverage > 0.5], areas[index] = index + 1, (coverage > 0.5).sum()
    masks = owner == torch.arange(1, count + 1)[:, None, None]
    seen = masks.sum((1, 2)) > VISIBLE_SHARE * areas
    boxes = masks_to_boxes(masks[seen]) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    return Scene(image, boxes, drawn[seen], masks[seen], F.pad(drawn, (1, 0))[owner])


def _texture(colour: Float[Tensor, "3 1 1"], size: Size, generator: torch.Generator) -> Float[Tensor, "3 height width"]:
    """A colour under smooth noise and a grating."""
    noise = F.interpolate(torch.randn(1, 3, 6, 6, generator=generator), size, mode="bicubic", align_corners=False)[0]
    angle, frequency, *strength = torch.rand(5, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    wave = torch.sin((0.2 + frequency) * (rows * torch.sin(math.pi * angle) + columns * torch.cos(math.pi * angle)))
    return (colour + 0.06 * noise + 0.08 * torch.stack(strength)[:, None, None] * wave).clamp(0, 1)


def _distance(label: int, size: Size, generator: torch.Generator) -> Float[Tensor, "height width"]:
    """Pixels' distance from the edge of a shape somewhere in the picture, negative inside.

    A disc is all points near its centre; triangles and boxes are what lies within each of their sides.
    """
    radius, turn, down, right, *sides = torch.rand(6, generator=generator).tolist()
    radius = min(size) * (0.14 + 0.14 * radius)
    rows = torch.arange(size[0])[:, None] + 0.5 - radius - down * (size[0] - 2 * radius)
    columns = torch.arange(size[1]) + 0.5 - radius - right * (size[1] - 2 * radius)
    distance = torch.full(size, -math.inf)
    if CLASSES[label] == "disc":
        return distance.maximum(torch.hypot(rows, columns) - 0.75 * radius)
    insides = [0.55] * 3 if CLASSES[label] == "triangle" else [0.45 + 0.25 * side for side in sides] * 2
    for index, inside in enumerate(insides):
        angle = 2 * math.pi * (0.1 * (turn - 0.5) + index / len(insides))
        distance = distance.maximum(math.sin(angle) * rows + math.cos(angle) * columns - radius * inside)
    return distance
