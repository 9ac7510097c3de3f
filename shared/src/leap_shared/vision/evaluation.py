"""Top-1, top-5 and loss over all pictures, each counted once whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from leap_shared.errors import UserError
from leap_shared.vision.data import batches

__all__ = ["evaluate"]

Predict = Callable[[nn.Module, Tensor], Tensor | Mapping[str, Tensor]]


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Iterable[Any], *, amp: torch.dtype | None = None, predict: Predict | None = None
) -> dict[str, float]:
    """Score a classifier in evaluation mode, where it is, and leave its mode as it was.

    Args:
        model: maps images (batch x 3 x height x width) to logits (batch x classes).
        loader: batches of images and labels; each of several processes gives its own share (`evaluation_loader`).
        amp: dtype of autocast, e.g. torch.bfloat16.
        predict: logits from model and images; a mapping scores several outputs, as ``NAME/top1`` and so on.

    Returns:
        `top1` and `top5` in percent, `loss` (mean cross-entropy) and `images` (their number), over all processes.

    Raises:
        UserError: there are no pictures, or one cannot be read.
    """
    device = next(model.parameters()).device
    totals: dict[str, Tensor] = {}
    training = model.training
    model.eval()
    try:
        for images, labels in batches(loader):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                output: Any = (predict or nn.Module.__call__)(model, images.to(device, non_blocking=True))
            for name, logits in (output if isinstance(output, Mapping) else {"": output}).items():
                totals[name] = totals.get(name, 0) + _count(logits.float(), labels.to(device, non_blocking=True))
    finally:
        model.train(training)
    shares = [totals]
    if distributed.is_available() and distributed.is_initialized():
        shares *= distributed.get_world_size()
        distributed.all_gather_object(shares, {name: total.cpu() for name, total in totals.items()})
    results: dict[str, float] = {}
    for name in dict.fromkeys(name for share in shares for name in share):
        sums = torch.stack([share[name] for share in shares if name in share]).sum(0)
        top1, top5, loss, images = sums.tolist()
        scores = {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images, "images": images}
        results |= {f"{name}/{key}" if name else key: value for key, value in scores.items()}
    if not results:
        raise UserError("there are no pictures to evaluate: give some")
    return results


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """Right in first place, right in the first five, sum of losses, pictures."""
    right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([right[:, 0].sum(), right.sum(), loss, labels.new_tensor(len(labels))]).double()
