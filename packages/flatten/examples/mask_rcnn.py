"""Mask R-CNN of torchvision on the feature pyramid of any FLatten model, trained from scratch on generated scenes.

    OMP_NUM_THREADS=1 python examples/mask_rcnn.py --model flatten_pvt_v2_b0 --size 64 --steps 500

took 3.3 minutes of one CPU thread with torch 2.15 (800 steps: 5.4 minutes, AP50 94.5) and printed

    step   83  loss 1.48
    step  166  loss 1.07
    step  249  loss 0.97
    step  332  loss 0.85
    step  415  loss 0.78
    step  498  loss 0.68
    AP50 of boxes on 100 held-out scenes: 91.0
    wrote mask_rcnn.png

Losses are means since the line before. Sizes need not be multiples of 32; `--checkpoint` starts from published weights.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scenes import CLASSES, Scene, draw
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

import leap_flatten as lf
from leap_shared.errors import UserError
from leap_shared.files import atomic_writer

COLOURS = {1: "red", 2: "lime", 3: "blue"}
Found = dict[str, Tensor]


class Pyramid(nn.Module):
    """Maps of one width at strides 4, 8, 16, 32 and 64, under the names that torchvision looks for."""

    def __init__(self, features: Any, channels: int) -> None:
        super().__init__()
        strides = features.feature_info.reduction()
        if strides != [4, 8, 16, 32]:
            raise UserError(f"a backbone with features at strides {strides}: take a Swin, PVT, PVTv2 or CSWin model")
        self.features, self.out_channels = features, channels
        self.fpn = FeaturePyramidNetwork(features.feature_info.channels(), channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images whose sides are multiples of 32, as torchvision pads them."""
        maps: dict[str, Tensor] = self.fpn(OrderedDict(zip("0123", self.features(images), strict=True)))
        return maps


def detector(features: Any, shorter_side: int, channels: int = 64) -> MaskRCNN:
    """The detector; its heads are narrower and its anchors smaller than the defaults, which are for photographs.

    torchvision scales every image to `shorter_side`, normalises it, and pads the batch to multiples of 32. Its pooling
    guesses the strides from the first batch: below 68 pixels it can be wrong there unless sides are multiples of 32.
    """
    return MaskRCNN(
        Pyramid(features, channels),
        min_size=shorter_side,
        max_size=2 * shorter_side,
        rpn_pre_nms_top_n_train=500,
        rpn_post_nms_top_n_train=200,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 5),
        box_head=TwoMLPHead(channels * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, len(CLASSES)),
        box_batch_size_per_image=64,
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, len(CLASSES)),
    )


def target(scene: Scene, device: str = "cpu") -> Found:
    """What torchvision's detectors learn from."""
    found = {"boxes": scene.boxes, "labels": scene.labels, "masks": scene.masks.to(torch.uint8)}
    return {name: value.to(device) for name, value in found.items()}


def average_precision(found: Sequence[Found], scenes: Sequence[Scene], threshold: float = 0.5) -> float:
    """Area under precision over recall in percent, mean of the classes that the scenes show (AP50 by default).

    In falling order of scores, a box is right if it overlaps a shape of its class that no box before it has taken.
    """
    areas = []
    for label in range(1, len(CLASSES)):
        scores, right, count = [], [], 0
        for boxes, scene in zip(found, scenes, strict=True):
            mine, truth = boxes["labels"] == label, scene.boxes[scene.labels == label]
            overlap, count = box_iou(boxes["boxes"][mine], truth), count + len(truth)
            for row in overlap if len(truth) else overlap.new_zeros(len(overlap), 1):  # torchvision sorts by score
                best = row.argmax()
                right.append(bool(row[best] >= threshold))
                if right[-1]:
                    overlap[:, best] = 0
            scores.append(boxes["scores"][mine])
        hits = torch.tensor(right, dtype=torch.float64)[torch.cat(scores).argsort(descending=True)]
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        envelope = precision.flip(0).cummax(0).values.flip(0)  # the best at this recall or a higher one
        if count:
            areas.append(100 * float(envelope @ hits) / count)
    return sum(areas) / len(areas)


def picture(scene: Scene, found: Found) -> Tensor:
    """The scene with what was found on it with a score over 0.5."""
    sure = found["scores"] > 0.5
    labels = found["labels"][sure].tolist()
    if not labels:
        return scene.image
    colours: list[Any] = [COLOURS[label] for label in labels]
    image = draw_segmentation_masks(scene.image, found["masks"][sure, 0] > 0.5, alpha=0.5, colors=colours)
    boxed: Tensor = draw_bounding_boxes(image, found["boxes"][sure], colors=colours)
    return boxed


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, judge and draw; returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flatten_pvt_v2_b0")
    parser.add_argument("--checkpoint", help="weights to start from")
    parser.add_argument("--size", type=int, default=64, help="height of the scenes in pixels; the width is 4/3 of it")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=100, help="scenes to judge by")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("mask_rcnn.png"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    size = (options.size, options.size * 4 // 3)
    padded = [-(-side // 32) * 32 for side in size]  # tables are made for this size, and resampled for others
    features = lf.create_model(
        options.model, checkpoint=options.checkpoint, resize=True, features_only=True, img_size=padded
    )
    model = detector(features, options.size).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps)
    generator, losses, every = torch.Generator().manual_seed(0), [], max(1, options.steps // 6)
    for step in range(1, options.steps + 1):
        scenes = [draw(size, generator) for _ in range(options.batch)]
        images = [scene.image.to(options.device) for scene in scenes]
        loss = sum(model(images, [target(scene, options.device) for scene in scenes]).values())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % every == 0:
            print(f"step {step:4d}  loss {sum(losses[-every:]) / every:.2f}")

    model.eval()
    generator = torch.Generator().manual_seed(1)
    scenes, found = [draw(size, generator) for _ in range(options.held_out)], []
    with torch.no_grad():
        for scene in scenes:
            found += [{k: v.cpu() for k, v in result.items()} for result in model([scene.image.to(options.device)])]
    print(f"AP50 of boxes on {len(scenes)} held-out scenes: {average_precision(found, scenes):.1f}")
    grid = make_grid([picture(*pair) for pair in zip(scenes[:12], found[:12], strict=True)], nrow=4)
    with atomic_writer(options.out) as file:
        to_pil_image(grid).save(file, "PNG")
    print(f"wrote {options.out}")
    return losses


if __name__ == "__main__":
    main()
