"""The scenes, and the pages in examples/: detection, segmentation, and attention in other transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scenes import CLASSES, Scene, draw
from torch import Tensor, nn

import leap_flatten as lf
from leap_shared.errors import UserError

FOLDER = Path(__file__).parents[1] / "examples"
FOUR = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
BACKBONES: dict[str, dict[str, Any]] = {
    "flatten_swin_tiny": {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
    "flatten_pvt_tiny": {"embed_dims": (8, 16, 16, 32), **FOUR},
    "flatten_pvt_v2_b0": {"embed_dims": (8, 16, 16, 32), **FOUR},
    "flatten_cswin_tiny": {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "depths": (1, 1, 1, 1)},
}

FEW = ["--size", "48", "--steps", "8", "--batch", "2", "--held-out", "2", "--out"]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mask_rcnn, segmentation, own_vit = map(example, ("mask_rcnn", "segmentation", "own_vit"))


def backbone(name: str, img_size: Any = 64) -> nn.Module:
    torch.manual_seed(0)
    return lf.create_model(name, features_only=True, img_size=img_size, **BACKBONES[name])


def first_convolution(model: nn.Module) -> Tensor:
    return next(module.weight for module in model.modules() if isinstance(module, nn.Conv2d))


def falls(losses: list[float], count: int) -> bool:
    """Whether the mean of the last losses is below that of the first by a tenth of it."""
    return sum(losses[-count:]) < 0.9 * sum(losses[:count])


def scene_of(boxes: list[list[float]], labels: list[int]) -> Scene:
    empty = torch.zeros(len(labels), 32, 32, dtype=torch.bool)
    image, classes = torch.zeros(3, 32, 32), torch.zeros(32, 32, dtype=torch.int64)
    return Scene(image, torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64), empty, classes)


def found(boxes: list[list[float]], labels: list[int], scores: list[float]) -> dict[str, Tensor]:
    numbers = torch.tensor(labels, dtype=torch.int64), torch.tensor(scores)
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": numbers[0], "scores": numbers[1]}


LEFT, RIGHT = [0.0, 0.0, 8.0, 8.0], [16.0, 16.0, 30.0, 30.0]

scenes = st.builds(
    lambda height, width, seed, most: draw((height, width), torch.Generator().manual_seed(seed), most),
    *(st.integers(16, 48), st.integers(16, 48), st.integers(0, 10_000), st.integers(1, 6)),
)


@given(scenes)
def test_boxes_are_the_edges_of_the_masks(scene: Scene) -> None:
    for mask, box in zip(scene.masks, scene.boxes, strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@given(scenes)
def test_masks_are_apart_and_show_their_label(scene: Scene) -> None:
    assert scene.masks.sum(0).max() == 1
    for mask, label in zip(scene.masks, scene.labels, strict=True):
        assert (scene.classes[mask] == label).all()


@given(scenes)
def test_a_scene_has_colours_in_range_and_a_shape(scene: Scene) -> None:
    assert 0 <= scene.image.min() <= scene.image.max() <= 1
    assert len(scene.labels) > 0


@pytest.mark.parametrize(("label", "low", "high"), [(1, 0.70, 0.86), (2, 0.35, 0.56), (3, 0.56, 1.0)])
def test_labels_name_what_is_drawn(label: int, low: float, high: float) -> None:
    """A disc fills pi/4 of its box, a triangle about half, a box turned by up to 18 degrees more."""
    generator = torch.Generator().manual_seed(0)
    drawn = [scene for scene in (draw((96, 96), generator, most=1) for _ in range(40)) if scene.labels[0] == label]
    sizes = [scene.boxes[0, 2:] - scene.boxes[0, :2] for scene in drawn]
    shares = [float(scene.masks[0].sum() / size.prod()) for scene, size in zip(drawn, sizes, strict=True)]
    assert len(shares) > 5
    assert low < min(shares) <= max(shares) <= high


def test_scenes_follow_from_the_generator() -> None:
    first, again, other = (draw((32, 32), torch.Generator().manual_seed(seed)).image for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("size", "most"), [((15, 64), 4), ((64, 15), 4), ((64, 64), 0)])
def test_scenes_that_are_too_small_are_refused(size: tuple[int, int], most: int) -> None:
    with pytest.raises(UserError, match=rf"{size[0]}x{size[1]} pixels with up to {most} shapes: expected 16 pixels"):
        draw(size, torch.Generator(), most)


def test_mask_rcnn_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert falls(mask_rcnn.main([*FEW, str(tmp_path / "out.png")]), 3)
    assert "AP50 of boxes on 2 held-out scenes" in capsys.readouterr().out
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.height == 48 + 2 * 2  # a row of scenes in frames of 2 pixels


@pytest.mark.parametrize("name", BACKBONES)
def test_mask_rcnn_trains_every_family(name: str) -> None:
    model, drawn = mask_rcnn.detector(backbone(name), 64, 16), draw((64, 80), torch.Generator().manual_seed(0))
    losses = model([drawn.image], [mask_rcnn.target(drawn)])
    assert set(losses) >= {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    assert 0 < first_convolution(model).grad.abs().max() < float("inf")


def test_mask_rcnn_finds_in_images_of_several_sizes_at_once() -> None:
    model = mask_rcnn.detector(backbone("flatten_pvt_v2_b0"), 64, 16).eval()
    with torch.no_grad():
        results = model([torch.rand(3, 50, 71), torch.rand(3, 90, 40)])
    for result, size in zip(results, ((50, 71), (90, 40)), strict=True):
        assert result["masks"].shape == (len(result["boxes"]), 1, *size)
        assert result["boxes"][:, 2::2].max() <= size[1]
        assert set(result["labels"].tolist()) <= set(range(1, len(CLASSES)))


def test_targets_are_what_the_scene_shows() -> None:
    drawn = draw((32, 48), torch.Generator().manual_seed(1))
    target = mask_rcnn.target(drawn)
    assert torch.equal(target["boxes"], drawn.boxes)
    assert torch.equal(target["labels"], drawn.labels)
    assert torch.equal(target["masks"].bool(), drawn.masks)


@pytest.mark.parametrize(
    ("boxes", "labels", "scores", "precision"),
    [
        ([LEFT, RIGHT], [1, 1], [0.9, 0.8], 100.0),
        ([LEFT], [1], [0.9], 50.0),  # one of two missed
        ([LEFT, LEFT, RIGHT], [1, 1, 1], [0.9, 0.8, 0.7], 50.0 + 50.0 * 2 / 3),  # a second box on one shape is wrong
        ([RIGHT, LEFT], [2, 1], [0.9, 0.8], 50.0),  # another class does not count
        ([], [], [], 0.0),
    ],
)
def test_average_precision_of_two_shapes(
    boxes: list[list[float]], labels: list[int], scores: list[float], precision: float
) -> None:
    result = mask_rcnn.average_precision([found(boxes, labels, scores)], [scene_of([LEFT, RIGHT], [1, 1])])
    assert result == pytest.approx(precision)


def test_average_precision_ranks_scores_across_scenes() -> None:
    results = [found([RIGHT], [1], [0.9]), found([LEFT], [1], [0.5])]  # the surest box is wrong
    assert mask_rcnn.average_precision(results, [scene_of([LEFT], [1])] * 2) == pytest.approx(25.0)


def test_average_precision_counts_boxes_on_scenes_without_their_class() -> None:
    results = [found([LEFT], [1], [0.9]), found([LEFT], [1], [0.5])]
    assert mask_rcnn.average_precision(results, [scene_of([], []), scene_of([LEFT], [1])]) == pytest.approx(50.0)


def test_average_precision_is_the_mean_of_the_classes_that_are_there() -> None:
    result = mask_rcnn.average_precision([found([LEFT], [1], [0.9])], [scene_of([LEFT, RIGHT], [1, 2])])
    assert result == pytest.approx(50.0)


def test_segmentation_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert falls(segmentation.main([*FEW, str(tmp_path / "out.png")]), 3)
    assert "mIoU on 2 held-out scenes" in capsys.readouterr().out
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (2 * 64 + 3 * 2, 3 * 48 + 4 * 2)  # three rows of two, in frames


@pytest.mark.parametrize("name", BACKBONES)
def test_segmentation_trains_every_family(name: str) -> None:
    model = segmentation.SemanticFPN(backbone(name), len(CLASSES), 16)
    drawn = draw((64, 80), torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(model(drawn.image[None]), drawn.classes[None]).backward()
    assert 0 < first_convolution(model).grad.abs().max() < float("inf")


@settings(max_examples=8)
@given(st.integers(1, 70), st.integers(1, 70))
def test_every_pixel_of_any_size_gets_logits(height: int, width: int) -> None:
    model = segmentation.SemanticFPN(backbone("flatten_pvt_v2_b0"), len(CLASSES), 16)
    with torch.no_grad():
        assert model(torch.rand(1, 3, height, width)).shape == (1, len(CLASSES), height, width)


def test_intersection_over_union_of_each_class() -> None:
    truth, guess = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 2]])
    shares = segmentation.intersections_over_unions(guess, truth)
    torch.testing.assert_close(shares[:3], torch.tensor([50.0, 100 / 3, 0.0], dtype=torch.float64))
    assert shares[3].isnan()


@pytest.mark.parametrize("head", [mask_rcnn.Pyramid, segmentation.SemanticFPN])
def test_backbones_of_one_stride_are_refused(head: type[nn.Module]) -> None:
    features = lf.create_model("flatten_deit_tiny", features_only=True, img_size=32, embed_dim=12)
    with pytest.raises(UserError, match=r"strides \[16, 16, 16, 16\]: take a Swin"):
        head(features, 16)


def test_every_transformer_of_the_digits_learns(capsys: pytest.CaptureFixture[str]) -> None:
    losses = own_vit.main(["--digits", "64", "--epochs", "24"])
    assert capsys.readouterr().out.count("of 1733 test digits") == len(own_vit.MODELS) == 4
    assert all(values[-1] < values[0] for name, values in losses.items() if "focused" in name)


def test_linear_attention_replaces_that_of_timm_in_every_block() -> None:
    model = own_vit.timm_vit_focused()
    assert all(type(block.attn) is lf.FocusedLinearAttention for block in model.blocks)
    model(torch.rand(2, 1, 8, 8)).sum().backward()
    assert all(block.attn.positional_encoding.grad[:, 0].abs().max() > 0 for block in model.blocks)  # the class token


@pytest.mark.parametrize("mask", [{"attn_mask": torch.zeros(64, 64)}, {"is_causal": True}])
def test_masks_that_timm_could_pass_are_refused(mask: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="linear attention sums its keys once for all queries"):
        lf.FocusedLinearAttention(8, 2, (8, 8))(torch.rand(1, 64, 8), **mask)
