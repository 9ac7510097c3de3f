"""The verb that shows what a linear block attends to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from leap_shared.cli import Command, Context
from leap_shared.errors import UserError

__all__ = ["Visualize"]

MOST_QUERIES = 8


@dataclass(frozen=True, kw_only=True)
class Visualize(Command):
    """Draw what a linear block attends to in a picture, with and without its convolution, and the rank of both.

    Writes attention.png, spectrum.png and ranks.json.

    Examples:
        leap-flatten visualize flatten_swin_tiny cat.jpg --block 0.1 --checkpoint flatten_swin_t.pth --out runs/cat
        leap-flatten visualize flatten_pvt_v2_b0 cat.jpg --block 2.0 --img-size 256 384 --query 128,96 40,300
    """

    name: Annotated[str, tyro.conf.Positional]
    """Name of a variant, see leap-flatten list."""
    image: Annotated[Path, tyro.conf.Positional]
    """A picture of any size; its longer sides are cut to fit the model's ratio."""
    block: str = "0.1"
    """STAGE.BLOCK, both counted from 0."""
    checkpoint: Path | None = None
    """The authors' .pth or a .safetensors; without one the weights are random."""
    head: int = 0
    """Head of the block."""
    channel: int | Literal["mean"] = 0
    """Channel of the head, whose kernel is added; mean takes the mean of all its kernels."""
    query: tuple[str, ...] = ()
    """Points Y,X to look from, in pixels of the picture at the model's size; four of them where none is given."""
    img_size: tuple[int, ...] = ()
    """Height and width that the model is set to, or one number for both; its own where none is given."""

    def run(self, context: Context) -> object:
        """Run the model up to the block, and draw."""
        import torch

        from leap_flatten import visualize
        from leap_flatten.checkpoints import create_model
        from leap_shared.files import write_json

        if len(self.img_size) > 2:
            raise UserError(f"--img-size {' '.join(map(str, self.img_size))}: expected a height and a width")
        size: dict[str, Any] = {"img_size": (self.img_size * 2)[:2]} if self.img_size else {}
        torch.manual_seed(context.seed)
        model: Any = create_model(self.name, checkpoint=self.checkpoint, resize=True, **size).to(context.device).eval()
        height, width = model.img_size
        queries = self._pixels(height, width)
        picture = visualize.load_picture(self.image, (height, width))
        layer, x, hw = visualize.layer_input(model, visualize.to_input(picture).to(context.device), self.block)
        places = [(y * hw[0] // height, x * hw[1] // width) for y, x in queries]
        plain, convolved = (
            visualize.equivalent_attention(layer, x, self.head, self.channel, hw=hw, convolution=convolution)
            for convolution in (False, True)
        )
        warning = "" if self.checkpoint else "random weights, as no checkpoint is given"
        if warning:
            context.log(f"{warning}: the pictures show an untrained {self.name}")
        context.log(f"singular values of two matrices of {' x '.join(map(str, plain.matrix.shape))}")
        facts = {
            "model": self.name,
            "weights": str(self.checkpoint) if self.checkpoint else "random",
            "image": str(self.image),
            "image_size": [height, width],
            "block": self.block,
            "head": self.head,
            "channel": self.channel,
            "map": list(hw),
            "head_dim": layer.scale.numel() // layer.num_heads,
            "rank_tolerance": visualize.TOLERANCE,
            "rank_attention": plain.rank(),
            "rank_with_convolution": convolved.rank(),
            "full_rank": min(plain.matrix.shape),
            "queries": [f"{y},{x}" for y, x in queries],
            "query_tokens": [f"{row},{column}" for row, column in places],
        }
        title = f"{self.name}, block {self.block}, head {self.head}, channel {self.channel}"
        pair = (plain, convolved)
        visualize.draw_attention(context.out / "attention.png", picture, *pair, places, title, warning)
        visualize.draw_spectra(context.out / "spectrum.png", *pair, title, warning)
        write_json(context.out / "ranks.json", facts)
        return facts

    def _pixels(self, height: int, width: int) -> list[tuple[int, int]]:
        if len(self.query) > MOST_QUERIES:
            raise UserError(f"{len(self.query)} queries: a picture has room for {MOST_QUERIES}")
        found = [re.fullmatch(r"(\d+),(\d+)", text) for text in self.query]
        points = [(int(match[1]), int(match[2])) for match in found if match]
        if len(points) < len(found) or any(y >= height or x >= width for y, x in points):
            given = " ".join(self.query)
            raise UserError(f"--query {given}: expected points Y,X inside the {height}x{width} pixels of the model")
        return points or [(height * row // 4, width * column // 4) for row in (1, 3) for column in (1, 3)]
