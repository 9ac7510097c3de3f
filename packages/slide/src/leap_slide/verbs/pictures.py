"""The verbs that bring a model elsewhere: into a file for other runtimes, and onto a picture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from leap_shared.cli import Command, Context
from leap_shared.errors import UserError

__all__ = ["Export", "Visualize"]

MOST_QUERIES = 6


def _size(numbers: tuple[int, ...]) -> tuple[int, int] | None:
    """Height and width of one number or two; None where there is none."""
    if len(numbers) > 2:
        raise UserError(f"--img-size {' '.join(map(str, numbers))}: expected a height and a width")
    return (numbers[0], numbers[-1]) if numbers else None


def _model(context: Context, name: str, checkpoint: Path | None, size: tuple[int, int] | None) -> Any:
    """The variant in eval mode, with the weights of a file or random ones, which are logged."""
    import torch

    from leap_slide.checkpoints import create_model

    torch.manual_seed(context.seed)
    options: dict[str, Any] = {"img_size": size} if size else {}
    model = create_model(name, checkpoint=checkpoint, resize=True, **options).eval()
    if checkpoint is None:
        context.log(f"no checkpoint is given: the weights of this {name} are random")
    return model


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a model for other runtimes: .onnx, checked and compared, or an .mlpackage of Core ML.

    Examples:
        leap-slide export slide_swin_tiny swin.onnx --checkpoint swin.safetensors
        leap-slide export slide_pvt_tiny pvt.onnx --checkpoint pvt.pth --backend gemm --img-size 256 384
        leap-slide export slide_swin_tiny_w7 swin.mlpackage --checkpoint swin.safetensors
    """

    name: Annotated[str, tyro.conf.Positional]
    """Name of a variant, see leap-slide list."""
    target: Annotated[Path, tyro.conf.Positional]
    """What to write: .onnx, or .mlpackage (needs coremltools)."""
    checkpoint: Path | None = None
    """A .pth in the authors' layout or a .safetensors; without one the weights are random."""
    backend: Literal["conv", "gemm"] = "conv"
    """Depthwise convolutions with k * k copies of keys and values, or one tap at a time; Core ML takes conv."""
    img_size: tuple[int, ...] = ()
    """Height and width that the model is set to, or one number for both; its own where none is given."""
    opset: int = 18
    """Version of ONNX's operators."""
    dynamic_batch: bool = True
    """Take batches of any size; else, and for Core ML, of one image."""
    check: bool = True
    """Check the .onnx and, where onnxruntime is installed, compare its logits with the model's."""
    merge: bool = True
    """Make one path of the two first."""

    def run(self, context: Context) -> object:
        """Build the model, and write it."""
        from leap_slide import export

        coreml = self.target.suffix == ".mlpackage"
        if coreml and self.backend != "conv":
            raise UserError("--backend gemm: Core ML takes conv")
        model = _model(context, self.name, self.checkpoint, _size(self.img_size))
        if coreml:
            done = export.export_coreml(model, self.target, reparameterize=self.merge)
        else:
            options = (self.backend, None, self.opset, self.dynamic_batch, self.check, self.merge)
            done = export.export_onnx(model, self.target, *options)
        return {
            "model": self.name,
            "weights": str(self.checkpoint) if self.checkpoint else "random",
            "file": str(done.path),
            "opset": done.opset,
            "image_size": list(model.img_size),
            "operators": dict(done.operators),
            "largest_difference": done.difference,
        }


@dataclass(frozen=True, kw_only=True)
class Visualize(Command):
    """Draw what a block with slide attention looks at in a picture: its effective kernels, how wide, and where to.

    Writes local_attention.png and local_attention.json.

    Examples:
        leap-slide visualize slide_swin_tiny cat.jpg --block 0 --checkpoint swin.safetensors --out runs/cat
        leap-slide visualize slide_pvt_v2_b1 cat.jpg --block 1.0 --img-size 256 384 --query 128,96 40,300
    """

    name: Annotated[str, tyro.conf.Positional]
    """Name of a variant, see leap-slide list."""
    image: Annotated[Path, tyro.conf.Positional]
    """A picture of any size; its longer sides are cut to fit the model's ratio."""
    block: str = "0"
    """Number among the blocks with slide attention, or STAGE.BLOCK; counted from 0."""
    checkpoint: Path | None = None
    """A .pth in the authors' layout or a .safetensors; without one the weights are random."""
    query: tuple[str, ...] = ()
    """Points Y,X to look from, in pixels of the picture at the model's size; four of them where none is given."""
    img_size: tuple[int, ...] = ()
    """Height and width that the model is set to, or one number for both; its own where none is given."""

    def run(self, context: Context) -> object:
        """Run the model, and draw."""
        from leap_shared.files import write_json
        from leap_slide import visualize

        model = _model(context, self.name, self.checkpoint, _size(self.img_size)).to(context.device)
        height, width = model.img_size
        queries = self._pixels(height, width)
        picture = visualize.load_picture(self.image, (height, width))
        block = int(self.block) if self.block.isdecimal() else self.block
        found = visualize.local_attention(model, visualize.to_input(picture).to(context.device), block)
        hw = found.hw
        places = [(y * hw[0] // height, x * hw[1] // width) for y, x in queries]
        facts = {
            "model": self.name,
            "weights": str(self.checkpoint) if self.checkpoint else "random",
            "image": str(self.image),
            "image_size": [height, width],
            "block": found.block,
            "map": list(hw),
            "heads": len(found.weights),
            "kernel_size": found.kernel.shape[1],
            "mean_entropy": found.entropy.mean((1, 2)).tolist(),
            "mean_offset": found.offset.mean((2, 3)).tolist(),
            "mean_kernel": found.mean_kernel.tolist(),
            "queries": [f"{y},{x}" for y, x in queries],
            "query_tokens": [f"{row},{column}" for row, column in places],
        }
        warning = "" if self.checkpoint else "random weights, as no checkpoint is given"
        title = f"{self.name}, block {found.block}"
        path = context.out / "local_attention.png"
        visualize.draw_local_attention(path, picture, found, places, title, warning)
        write_json(context.out / "local_attention.json", facts)
        return {key: value for key, value in facts.items() if key != "mean_kernel"}

    def _pixels(self, height: int, width: int) -> list[tuple[int, int]]:
        if len(self.query) > MOST_QUERIES:
            raise UserError(f"{len(self.query)} queries: a picture has room for {MOST_QUERIES}")
        found = [re.fullmatch(r"(\d+),(\d+)", text) for text in self.query]
        points = [(int(match[1]), int(match[2])) for match in found if match]
        if len(points) < len(found) or any(y >= height or x >= width for y, x in points):
            given = " ".join(self.query)
            raise UserError(f"--query {given}: expected points Y,X inside the {height}x{width} pixels of the model")
        return points or [(height * row // 4, width * column // 4) for row in (1, 3) for column in (1, 3)]
