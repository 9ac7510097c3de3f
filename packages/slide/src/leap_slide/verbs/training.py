"""Verbs that train and evaluate."""

from __future__ import annotations

from dataclasses import dataclass

from leap_shared.cli import Context
from leap_shared.vision.running import Evaluation, Training

__all__ = ["Eval", "Train"]


@dataclass(frozen=True, kw_only=True)
class Train(Training):
    """Train a variant by its recipe, both paths of slide attention; killed, it goes on.

    Writes checkpoints/, metrics.jsonl, metrics.csv, tensorboard/, and in the end weights.safetensors, ema.safetensors
    and best.safetensors, which leap-slide reparam brings into the form with one path.

    Examples:
        leap-slide train --cfg slide_swin_tiny --data imagenet --gpus 8
        leap-slide train --cfg slide_swin_tiny_w7 --data imagenet --ema --amp bf16 --out runs/swin
        leap-slide train --cfg slide_swin_base --data imagenet --img-size 384 --finetune runs/swin/best.safetensors
    """

    def run(self, context: Context) -> object:
        """Train, or go on; the last scores."""
        from leap_slide import recipes
        from leap_slide.checkpoints import OFFICIAL

        return self.train(context, recipes.get(self.cfg), OFFICIAL)


@dataclass(frozen=True, kw_only=True)
class Eval(Evaluation):
    """Score a checkpoint on validation pictures, beside the published figure.

    The published figures are the paper's, at the protocol "reference". Those of Swin are of the paper's models, whose
    operation counts are those of slide_swin_*_w7; what slide_swin_*, the released configurations, reach was not
    published. No weights were published at all. With --out, scores.json is written there.

    Examples:
        leap-slide eval slide_swin_tiny_w7 --checkpoint runs/swin/best.safetensors --data imagenet
        leap-slide eval slide_swin_tiny --checkpoint ckpt_epoch_299.pth --ema --data imagenet --protocol reference timm
    """

    def run(self, context: Context) -> object:
        """Evaluate; one row per protocol."""
        from leap_slide import recipes
        from leap_slide.checkpoints import OFFICIAL
        from leap_slide.models.variants import find

        recipe, variant = recipes.get(self.name), find(self.name)
        if variant.note:
            context.log(f"{self.name}: {variant.note}")
        return self.score(context, recipe, OFFICIAL, (variant.top1, None))
