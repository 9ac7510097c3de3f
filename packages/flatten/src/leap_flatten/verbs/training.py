"""Verbs that train and evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leap_shared.cli import Context
from leap_shared.vision.running import Evaluation, Training

__all__ = ["Eval", "Train"]


@dataclass(frozen=True, kw_only=True)
class Train(Training):
    """Train a variant by its recipe; killed, it goes on.

    Writes checkpoints/, metrics.jsonl, metrics.csv, tensorboard/, and in the end weights.safetensors, ema.safetensors
    and best.safetensors.

    Examples:
        leap-flatten train --cfg flatten_swin_tiny --data imagenet --amp bf16 --out runs/swin
        leap-flatten train --cfg flatten_cswin_tiny --data imagenet --ema --gpus 8
        leap-flatten train --cfg flatten_swin_base_384 --data imagenet --finetune flatten_swin_b.pth
    """

    decay_pos: bool = True
    """Decay scale, positional_encoding and pos_embed as the reference does."""
    denominator: Literal["mean", "sum"] = "mean"
    """Form of the attention: of the current release, or of the first one."""

    def run(self, context: Context) -> object:
        """Train, or go on; the last scores."""
        from leap_flatten import recipes
        from leap_flatten.checkpoints import OFFICIAL

        own = {"decay_pos": self.decay_pos, "denominator": self.denominator}
        return self.train(context, recipes.get(self.cfg), OFFICIAL, **own)


@dataclass(frozen=True, kw_only=True)
class Eval(Evaluation):
    """Score a checkpoint on validation pictures, beside the published figure.

    The published figures are those of the protocol "reference" and the denominator "sum". With --out, scores.json is
    written there.

    Examples:
        leap-flatten eval flatten_swin_tiny --checkpoint flatten_swin_t.pth --data imagenet
        leap-flatten eval flatten_swin_tiny --checkpoint flatten_swin_t.pth --data imagenet --denominator mean sum
    """

    denominator: tuple[Literal["mean", "sum"], ...] = ("mean",)
    """Form of the attention: of the current release, or of the first one; both give two rows each."""

    def run(self, context: Context) -> object:
        """Evaluate; one row per protocol and denominator."""
        from leap_flatten import recipes
        from leap_flatten.checkpoints import OFFICIAL
        from leap_flatten.models.variants import find

        recipe, published = recipes.get(self.name), find(self.name).published
        forms = [{"denominator": denominator} for denominator in self.denominator]
        return self.score(context, recipe, OFFICIAL, published, forms)
