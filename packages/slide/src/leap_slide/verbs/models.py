"""Verbs about the variants, and the files of their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from leap_shared.cli import Command, Context
from leap_shared.cli.output import installation
from leap_shared.vision.running import Converting

__all__ = ["Convert", "Info", "List", "Reparam"]


@dataclass(frozen=True, kw_only=True)
class List(Command):
    """List the variants: parameters and cost of one picture in 10^9 multiply-adds, counted and published; accuracy.

    Nobody has published weights of any of them.

    Examples:
        leap-slide list
        leap-slide list --json
    """

    def run(self, context: Context) -> object:  # noqa: ARG002 - the interface of every verb
        """One row per variant."""
        from leap_slide.models.variants import VARIANTS

        return [vars(variant) for variant in VARIANTS.values()]


@dataclass(frozen=True, kw_only=True)
class Info(Command):
    """Tell about one variant: its stages and their attention, recipe, weights; without a name, what is installed.

    Examples:
        leap-slide info
        leap-slide info slide_swin_tiny
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Name of a variant, see leap-slide list."""

    def run(self, context: Context) -> object:  # noqa: ARG002 - the interface of every verb
        """Build the variant without memory, and describe it."""
        if self.name is None:
            return installation("leap_slide")
        import timm
        import torch

        from leap_slide import recipes
        from leap_slide.models.variants import find

        variant, recipe = find(self.name), recipes.get(self.name)
        with torch.device("meta"):
            model = timm.create_model(self.name)
        epochs = f"{recipe.epochs} + {recipe.cooldown_epochs} epochs, {recipe.batch} pictures per update"
        return {
            **vars(variant),
            "family": type(model).__name__,
            **{f"stage {number}": facts for number, facts in enumerate(_stages(model), 1)},
            "recipe": f"{epochs}: leap-slide train --cfg {self.name}",
            "weights": "none published: train, or start from Swin or PVT with leap_slide.convert.from_swin",
        }


def _stages(model: Any) -> list[dict[str, object]]:
    """Blocks, channels, heads, tokens and attention of each stage; the blocks of a stage are alike."""
    found: list[dict[str, object]] = []
    for number, facts in enumerate(model.feature_info):
        sites = [site for site in model.sites if site.stage == number]
        block, first = model.get_submodule(facts["module"])[0], sites[0]
        size = "x".join(map(str, first.input_size))
        place = {"blocks": len(sites), "channels": first.dim, "heads": first.num_heads, "tokens": size}
        found.append({**place, "attention": _attention(block, min(first.input_size))})
    return found


def _attention(block: Any, side: int) -> str:
    from leap_shared.vision.bodies import CSWinBlock, SwinBlock
    from leap_slide.attention import SlideAttention
    from leap_slide.models import NeighborhoodAttention

    attention = getattr(block, "attn", None)
    if isinstance(attention, SlideAttention):
        return f"slide {attention.kernel_size}x{attention.kernel_size}"
    if isinstance(attention, NeighborhoodAttention):
        return f"neighbourhood {attention.kernel_size}x{attention.kernel_size}"
    if isinstance(block, SwinBlock) and (block.window or side) < side:
        return f"softmax in windows of {block.window}x{block.window}"
    if isinstance(block, CSWinBlock) and len(block.attns) > 1:
        return f"softmax in stripes of {block.split}"
    ratio = getattr(attention, "sr_ratio", 1)
    return f"softmax to keys reduced by {ratio}" if ratio > 1 else "softmax"


@dataclass(frozen=True, kw_only=True)
class Reparam(Converting):
    """Make one convolution of the two paths in a file of trained weights, which cannot be undone: a deploy file.

    Examples:
        leap-slide reparam runs/swin/best.safetensors deploy.safetensors
        leap-slide reparam ckpt_epoch_299.pth deploy.safetensors --ema
    """

    def run(self, context: Context) -> object:  # noqa: ARG002 - the interface of every verb
        """Merge, and say whose weights they are."""
        from leap_slide.convert import reparameterize_file

        return reparameterize_file(self.source, self.target, self.ema, self.verify)


@dataclass(frozen=True, kw_only=True)
class Convert(Converting):
    """Bring weights into another file: .safetensors, or .pth in the authors' envelope; bit by bit, and verified.

    Nothing in the file that is read is executed.

    Examples:
        leap-slide convert ckpt_epoch_299.pth slide_swin_t.safetensors
        leap-slide convert ckpt_epoch_299.pth ema.safetensors --ema
        leap-slide convert ema.safetensors ema.pth
    """

    def run(self, context: Context) -> object:  # noqa: ARG002 - the interface of every verb
        """Convert, and say whose weights they are."""
        from leap_slide.convert import convert

        return convert(self.source, self.target, self.ema, self.verify)
