"""A picture file as a model's input, and the figures that are drawn of what the model makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.functional import normalize, pil_to_tensor

from leap_shared.errors import UserError
from leap_shared.files import atomic_writer
from leap_shared.vision.bodies.grids import Number, Size

__all__ = ["INK", "WARNING", "load_picture", "new_figure", "plain_axes", "save_figure", "to_input"]

INK, WARNING, GRID = "#22262B", "#B3261E", "#E3E6EA"


def load_picture(path: Path, size: Size) -> Image.Image:
    """A picture in RGB at `size` (height, width): upright by its EXIF tag, its longer sides cut to fit the ratio.

    Raises:
        UserError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"cannot read the picture {path}: {error}. Give a .jpg, .png or what else Pillow reads"
        ) from error
    return ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BICUBIC)


def to_input(picture: Image.Image) -> Float[Tensor, "1 3 height width"]:
    """A picture as a batch of one, normalised by the mean and deviation of ImageNet."""
    image: Tensor = normalize(pil_to_tensor(picture) / 255, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return image[None]


def new_figure(width: Number, height: Number, title: str, warning: str = "") -> Any:
    """A matplotlib figure of `width` x `height` inches under a title, both red with a `warning` below it.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('pictures need matplotlib: pip install "leap-shared[report]"') from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle("\n".join(filter(None, (title, warning))), color=WARNING if warning else INK, fontsize=12)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as .png, atomically."""
    with atomic_writer(path) as file:
        figure.savefig(file, format="png", facecolor="white")


def plain_axes(axes: Any, title: str) -> None:
    """Give axes a title, a light grid, and no more lines than needed."""
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
