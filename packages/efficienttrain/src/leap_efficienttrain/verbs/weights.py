"""Verbs about files: weights, their scores, caches of pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from leap_shared.cli import Command, Context
from leap_shared.errors import UserError

__all__ = ["Cache", "Convert", "Eval"]


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Make timm's file of a released checkpoint, or the other way round; bit by bit, and read again.

    Examples:
        leap-efficienttrain convert ET_pp_200ep_swinT.pth swinT.safetensors
        leap-efficienttrain convert runs/swin swinT.pth --to official --which ema
    """

    source: Annotated[Path, tyro.conf.Positional]
    """A released .pth, a .pth or .safetensors with timm's names, or the folder of a training."""
    target: Annotated[Path, tyro.conf.Positional]
    """File to write, .pth or .safetensors."""
    to: Literal["timm", "official"] = "timm"
    """Whose names the new file has."""
    which: Literal["model", "ema"] = "model"
    """The weights, or their moving average."""

    def run(self, context: Context) -> object:  # noqa: ARG002 - the interface of every verb
        """Convert; what was written."""
        from leap_efficienttrain.checkpoints import convert

        return asdict(convert(self.source, self.target, self.to, which=self.which))


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Score a checkpoint on validation pictures, beside the published figure.

    Pictures are resized to size / 0.875 and cropped, from 384 pixels on resized to a square, as the authors do.

    Examples:
        leap-efficienttrain eval ET_pp_200ep_swinT.pth --data imagenet
        leap-efficienttrain eval runs/swin --which ema --data imagenet --sizes 96 160 224
        leap-efficienttrain eval weights.safetensors --model resnet50 --data imagenet
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A released .pth, a .pth or .safetensors with timm's names, or the folder of a training."""
    data: str
    """Folder with val/, or of a folder of pictures per class; .tar shards, an .npz file or hf:NAME."""
    model: str | None = None
    """Official name, or one of timm's; found in the file or the folder where none is given."""
    which: Literal["model", "ema"] = "model"
    """The weights, or their moving average."""
    sizes: tuple[int, ...] = ()
    """Sides of the pictures in pixels, a row for each; the checkpoint's where none is given."""
    crop: Literal["centre", "fourier"] = "centre"
    """fourier: prepare pictures at full size, 224, and crop their spectrum, as EfficientTrain of 2023 does."""
    batch_size: int = 64
    """Pictures per forward pass."""
    workers: int = 4
    """Processes that read pictures."""
    amp: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""

    def run(self, context: Context) -> object:
        """Score; one row per size."""
        from leap_efficienttrain.evaluation import score
        from leap_shared.vision.running import VALIDATION, data_part

        if self.batch_size < 1 or self.workers < 0:
            given = f"batch_size {self.batch_size}, workers {self.workers}"
            raise UserError(f"{given}: expected a positive number, and 0 or more")
        where = data_part(self.data, *VALIDATION)
        if where is None:
            raise UserError(f"{self.data} has no folder {', '.join(VALIDATION)}: give that of the pictures")
        return score(
            self.checkpoint,
            where,
            model=self.model,
            which=self.which,
            sizes=self.sizes,
            fourier=self.crop == "fourier",
            batch_size=self.batch_size,
            workers=self.workers,
            amp=self.amp,
            device=context.device,
            reporter=context,
        )


@dataclass(frozen=True, kw_only=True)
class Cache(Command):
    """Decode a data set once, at a low size, for the stages that need no more; goes on where it was killed.

    Examples:
        leap-efficienttrain cache imagenet/train imagenet-128 --short-side 128
        leap-efficienttrain train --data imagenet-128 --model resnet50 --base-size 96 --curriculum constant
    """

    source: Annotated[str, tyro.conf.Positional]
    """Folder of a folder of pictures per class, .tar shards, an .npz file or hf:NAME."""
    target: Annotated[Path, tyro.conf.Positional]
    """Folder to write."""
    short_side: int = 128
    """Shorter side of the stored pictures in pixels."""

    def run(self, context: Context) -> object:
        """Decode; what was written."""
        from leap_efficienttrain.cache import build_cache
        from leap_shared.vision import open_source

        source = build_cache(open_source(self.source), self.target, self.short_side, reporter=context)
        written = sum(path.stat().st_size for path in self.target.iterdir() if path.is_file())
        return {"written": str(self.target), "pictures": len(source), "short_side": self.short_side, "bytes": written}
