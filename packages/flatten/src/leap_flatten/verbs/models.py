"""Verbs about the variants, and the files of their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from leap_shared.cli import Command, Context
from leap_shared.cli.output import installation
from leap_shared.vision.running import Converting

__all__ = ["Convert", "Info", "List"]


@dataclass(frozen=True, kw_only=True)
class List(Command):
    """List the variants: parameters, cost of one picture in 10^9 multiply-adds, published accuracy.

    Examples:
        leap-flatten list
        leap-flatten list --json
    """

    def run(self, context: Context) -> object:  # noqa: ARG002 - the interface of every verb
        """One row per variant."""
        from leap_flatten.models.variants import VARIANTS

        return [{k: v for k, v in vars(variant).items() if k != "logged"} for variant in VARIANTS.values()]


@dataclass(frozen=True, kw_only=True)
class Info(Command):
    """Tell about one variant: its stages and their attention, recipe, weights; without a name, what is installed.

    Examples:
        leap-flatten info
        leap-flatten info flatten_swin_tiny
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Name of a variant, see leap-flatten list."""

    def run(self, context: Context) -> object:  # noqa: ARG002 - the interface of every verb
        """Build the variant without memory, and describe it."""
        if self.name is None:
            return installation("leap_flatten")
        import timm
        import torch

        from leap_flatten import recipes
        from leap_flatten.models.variants import find

        variant, recipe = find(self.name), recipes.get(self.name)
        with torch.device("meta"):
            model = timm.create_model(self.name)
        top1, top5 = variant.published
        epochs = f"{recipe.epochs} + {recipe.cooldown_epochs} epochs, {recipe.batch} pictures per update"
        return {
            "name": variant.name,
            "parameters": variant.parameters,
            "gmac": variant.gmac,
            "top1": top1,
            "top5": top5,
            "image_size": variant.image_size,
            "note": variant.note,
            "family": type(model).__name__,
            **{f"stage {number}": facts for number, facts in enumerate(_stages(model), 1)},
            "recipe": f"{epochs}: leap-flatten train --cfg {self.name}",
            "weights": "released by the authors" if variant.released else "none released",
        }


def _stages(model: Any) -> list[dict[str, object]]:
    """Blocks, channels, heads, tokens and attention of each stage; the blocks of a variant's stage are alike."""
    from leap_flatten.models import FlattenDeiT

    if isinstance(model, FlattenDeiT):
        layer: Any = model.blocks[0].attn
        return [_stage(len(model.blocks), model.num_features, layer.num_heads, layer.grid, "linear")]
    found = []
    for number, facts in enumerate(model.feature_info):
        sites = [site for site in model.sites if site.stage == number]
        attention = "linear" if sites[0].plugged else _softmax(model.get_submodule(facts["module"])[0])
        found.append(_stage(len(sites), sites[0].dim, sites[0].num_heads, sites[0].input_size, attention))
    return found


def _stage(blocks: int, channels: int, heads: int, tokens: tuple[int, int], attention: str) -> dict[str, object]:
    size = "x".join(map(str, tokens))
    return {"blocks": blocks, "channels": channels, "heads": heads, "tokens": size, "attention": attention}


def _softmax(block: Any) -> str:
    from leap_shared.vision.bodies import SwinBlock

    if isinstance(block, SwinBlock):
        return f"softmax in windows of {block.window}x{block.window}"
    return f"softmax in stripes of {block.split}" if len(block.attns) > 1 else "softmax"


@dataclass(frozen=True, kw_only=True)
class Convert(Converting):
    """Bring weights into another file: .safetensors, or .pth in the authors' envelope; bit by bit, and verified.

    Nothing in the file that is read is executed.

    Examples:
        leap-flatten convert flatten_swin_t.pth flatten_swin_t.safetensors
        leap-flatten convert flatten_cswin_t.pth ema.safetensors --ema
        leap-flatten convert ema.safetensors ema.pth
    """

    def run(self, context: Context) -> object:  # noqa: ARG002 - the interface of every verb
        """Convert, and say whose weights they are."""
        from leap_flatten.convert import convert

        return convert(self.source, self.target, self.ema, self.verify)
