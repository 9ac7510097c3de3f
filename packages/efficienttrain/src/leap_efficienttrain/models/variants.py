"""The models of the released code: their names, costs and published accuracies; and how to build one for a size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.models import get_pretrained_cfg
from torch import nn

from leap_efficienttrain.models import cswin  # noqa: F401 - registers the names
from leap_shared.errors import UserError
from leap_shared.vision.optimisation import build_model

__all__ = ["VARIANTS", "Pretraining", "Result", "Variant", "create_model", "find"]


@dataclass(frozen=True)
class Result:
    """A published accuracy on ImageNet-1K, of a model that was trained on nothing else.

    Attributes:
        method: "baseline", "et:iccv" or "et++".
        epochs: of the training; of "et++", what their compute is worth at full size.
        top1: in percent.
        speedup: of the training, measured on RTX 3090s by the authors; None where they give none.
        source: "summary" (the tables that compare both methods), "2023" or "2024" (the papers' tables of budgets, whose
            baselines differ), or "checkpoint" (the released file).
    """

    method: str
    epochs: int
    top1: float
    speedup: float | None = None
    source: str = "summary"


@dataclass(frozen=True)
class Pretraining:
    """A published accuracy on ImageNet-1K after pre-training on ImageNet-22K.

    Attributes:
        method: "baseline", "et:iccv" or "et++", with "large batch" where the early stages had larger batches.
        top1: in percent, by the image size of the fine-tuning.
        gpu_days: of the pre-training, on RTX 3090s; None where none are given.
        file: name of the pre-trained weights, where they were released.
    """

    method: str
    top1: Mapping[int, float]
    gpu_days: float | None = None
    file: str | None = None


@dataclass(frozen=True)
class Variant:
    """Facts of one model.

    Attributes:
        name: in the released code.
        timm_name: under which timm knows it.
        short: what the released files call it; known for swinT and cswinB, the others by the same rule.
        parameters: with 1,000 classes, at 224 pixels.
        gmac: counted multiply-adds of one image, in 10^9, by its side in pixels: convolutions and matrix products.
        published_gmac: in 10^9, at 224 pixels; None where there is none.
        results: published accuracies.
        pretraining: published accuracies after pre-training on ImageNet-22K.
    """

    name: str
    timm_name: str
    short: str
    parameters: int
    gmac: Mapping[int, float]
    published_gmac: float | None = None
    results: tuple[Result, ...] = ()
    pretraining: tuple[Pretraining, ...] = ()

    @property
    def family(self) -> str:
        """One of resnet, convnext, deit, swin, cswin and caformer."""
        return re.split(r"\d*_|\d", self.name.lower())[0]

    @property
    def files(self) -> dict[str, float]:
        """Accuracy in percent of the released checkpoints, by file name."""
        released = [result for result in self.results if result.source == "checkpoint"]
        return {f"ET_pp_{result.epochs}ep_{self.short}.pth": result.top1 for result in released}


SIZES = (96, 128, 160, 192, 224, 384)
# top-1 of 300 epochs; (top-1, speed-up) of 300 epochs of "et:iccv" and of 200 of "et++"
SUMMARY: dict[str, tuple[float, tuple[float, float] | None, tuple[float, float]]] = {
    "resnet50": (78.8, (79.4, 1.44), (79.6, 1.45)),
    "convnextT": (82.1, (82.2, 1.49), (82.2, 1.49)),
    "convnextS": (83.1, (83.2, 1.50), (83.2, 1.52)),
    "convnextB": (83.8, (83.7, 1.48), (83.8, 1.49)),
    "deitT": (72.5, (73.3, 1.55), (73.7, 1.64)),
    "deitS": (80.3, (80.4, 1.51), (81.0, 1.60)),
    "swinT": (81.3, (81.4, 1.49), (81.6, 1.49)),
    "swinS": (83.1, (83.2, 1.50), (83.2, 1.51)),
    "swinB": (83.4, (83.6, 1.50), (83.6, 1.47)),
    "cswinT": (82.7, (82.8, 1.55), (82.9, 1.50)),
    "cswinS": (83.4, (83.6, 1.51), (83.6, 1.52)),
    "cswinB": (84.3, (84.3, 1.56), (84.3, 1.52)),
    "caformerS18": (83.5, None, (83.4, 1.59)),
    "caformerS36": (84.3, None, (84.3, 1.59)),
    "caformerM36": (84.9, None, (85.0, 1.58)),
}
# top-1 by epochs
BUDGETS: dict[tuple[str, str], dict[str, dict[int, float]]] = {
    ("2024", "et++"): {
        "deitT": {100: 72.4, 150: 73.3, 200: 73.7, 300: 74.4},
        "deitS": {100: 79.8, 150: 80.6, 200: 81.0, 300: 81.3},
        "swinT": {100: 80.9, 150: 81.4, 200: 81.6},
        "swinS": {100: 82.9, 150: 83.1, 200: 83.2},
        "swinB": {100: 83.3, 150: 83.5, 200: 83.6},
    },
    ("2024", "baseline"): {
        "deitT": {100: 68.3, 200: 71.5, 300: 72.5},
        "deitS": {100: 76.7, 200: 79.5, 300: 80.3},
        "swinT": {100: 79.0, 200: 80.8, 300: 81.3},
        "swinS": {100: 81.0, 200: 82.6, 300: 83.1},
        "swinB": {100: 81.8, 200: 83.3, 300: 83.4},
    },
    ("2023", "et:iccv"): {
        "deitT": {100: 68.1, 200: 71.8, 300: 73.3},
        "deitS": {100: 76.4, 200: 79.1, 300: 80.4},
        "swinT": {100: 78.5, 200: 80.6, 300: 81.4},
        "swinS": {100: 80.7, 200: 82.6, 300: 83.2},
        "swinB": {100: 81.1, 200: 83.2, 300: 83.6},
    },
    ("2023", "baseline"): {
        "deitT": {100: 65.8, 200: 70.5, 300: 72.5},
        "deitS": {100: 75.5, 200: 79.0, 300: 80.3},
        "swinT": {100: 78.4, 200: 80.6, 300: 81.3},
        "swinS": {100: 80.6, 200: 82.7, 300: 83.1},
        "swinB": {100: 80.7, 200: 83.2, 300: 83.4},
    },
    ("checkpoint", "et++"): {
        "resnet50": {200: 79.7},
        "convnextT": {200: 82.2},
        "convnextS": {200: 83.2},
        "convnextB": {200: 83.8},
        "deitT": {100: 72.5, 150: 73.4, 200: 73.8, 300: 74.4},
        "deitS": {100: 79.9, 150: 80.6, 200: 81.0, 300: 81.4},
        "swinT": {100: 80.9, 150: 81.4, 200: 81.6},
        "swinS": {100: 82.8, 150: 83.1, 200: 83.2},
        "swinB": {100: 83.3, 150: 83.5, 200: 83.6},
        "cswinT": {200: 82.9},
        "cswinS": {200: 83.6},
        "cswinB": {200: 84.3},
        "caformerS18": {200: 83.4},
        "caformerS36": {200: 84.3},
        "caformerM36": {200: 85.0},
    },
}
# method, top-1 at 224 and at 384, GPU-days
PRETRAINING: dict[str, list[tuple[str, float, float, float | None]]] = {
    "convnextB": [("baseline", 85.8, 86.7, 181.9), ("et:iccv", 85.8, 86.8, 122.4), ("et++", 85.9, 86.9, 122.3)],
    "convnextL": [("baseline", 86.4, 87.3, 375.8), ("et:iccv", 86.4, 87.3, 243.8), ("et++", 86.5, 87.3, 249.3)],
    "cswinB": [
        ("baseline", 86.0, 87.2, 126.9),
        ("et:iccv", 86.2, 87.4, 83.7),
        ("et++", 86.3, 87.4, 62.9),
        ("et++", 86.1, 87.1, 41.9),
        ("et++, large batch", 86.4, 87.4, None),
        ("et++, large batch", 86.0, 87.1, None),
    ],
    "cswinL": [
        ("baseline", 86.8, 87.9, 237.8),
        ("et:iccv", 86.9, 87.9, 155.8),
        ("et++", 87.0, 87.9, 119.0),
        ("et++", 86.8, 87.8, 79.3),
        ("et++, large batch", 87.1, 88.1, None),
        ("et++, large batch", 86.8, 87.8, None),
    ],
}
RELEASED_PRETRAINING: dict[tuple[str, float | None], str] = {
    ("cswinB", 62.9): "ET_pp_in22k_pre_trained_speedup2x_cswinB.pth"
}


def _results(short: str) -> tuple[Result, ...]:
    rows: list[Result] = []
    if short in SUMMARY:
        baseline, first, second = SUMMARY[short]
        rows = [Result("baseline", 300, baseline), Result("et++", 200, *second)]
        if first is not None:
            rows.insert(1, Result("et:iccv", 300, *first))
    budgets = [(*key, table.get(short, {})) for key, table in BUDGETS.items()]
    return (*rows, *(Result(method, t, top1, None, at) for at, method, row in budgets for t, top1 in row.items()))


def _pretraining(short: str) -> tuple[Pretraining, ...]:
    rows = PRETRAINING.get(short, [])
    return tuple(
        Pretraining(method, {224: low, 384: high}, days, RELEASED_PRETRAINING.get((short, days)))
        for method, low, high, days in rows
    )


def _variant(
    name: str, timm_name: str, short: str, parameters: int, gmac: tuple[float, ...], published: float | None
) -> Variant:
    costs = dict(zip(SIZES, gmac, strict=False))
    results = () if name.endswith("_384") else _results(short)
    return Variant(name, timm_name, short, parameters, costs, published, results, _pretraining(short))


TINY, SMALL, BASE, LARGE = "CSWin_64_12211_tiny", "CSWin_64_24322_small", "CSWin_96_24322_base", "CSWin_144_24322_large"
SWIN = "patch4_window7_224"
CSWIN_BASE_GMAC = (2.6615, 4.7596, 7.4912, 10.8802, 14.9553, 46.9637)
CSWIN_LARGE_GMAC = (5.9570, 10.6323, 16.6945, 24.1794, 33.1301, 101.8819)
ROWS: tuple[tuple[str, str, str, int, tuple[float, ...], float | None], ...] = (
    ("resnet50", "resnet50", "resnet50", 25_557_032, (0.7527, 1.3366, 2.0873, 3.0048, 4.0892, 12.0132), 4.1),
    ("convnext_tiny", "", "convnextT", 28_589_128, (0.8190, 1.4554, 2.2736, 3.2737, 4.4555, 13.0923), 4.5),
    ("convnext_small", "", "convnextS", 50_223_688, (1.5956, 2.8360, 4.4308, 6.3801, 8.6837, 25.5180), 8.7),
    ("convnext_base", "", "convnextB", 88_591_464, (2.8211, 5.0145, 7.8345, 11.2813, 15.3547, 45.1221), 15.4),
    ("convnext_large", "", "convnextL", 197_767_336, (6.3125, 11.2211, 17.5321, 25.2455, 34.3614, 100.9776), 34.4),
    ("deit_tiny_patch16_224", "", "deitT", 5_717_416, (0.2082, 0.3741, 0.5981, 0.8880, 1.2537), 1.3),
    ("deit_small_patch16_224", "", "deitS", 22_050_664, (0.8093, 1.4384, 2.2685, 3.3155, 4.5989), 4.6),
    ("swin_tiny", f"swin_tiny_{SWIN}", "swinT", 28_288_354, (0.8044, 1.4360, 2.2565, 3.2721, 4.4906), 4.5),
    ("swin_small", f"swin_small_{SWIN}", "swinS", 49_606_258, (1.5718, 2.8044, 4.4029, 6.3775, 8.7409), 8.7),
    ("swin_base", f"swin_base_{SWIN}", "swinB", 87_768_224, (2.7894, 4.9723, 7.7972, 11.2779, 15.4309), 15.4),
    (f"{TINY}_224", "", "cswinT", 22_320_552, (0.7586, 1.3601, 2.1477, 3.1316, 4.3242), 4.3),
    (f"{SMALL}_224", "", "cswinS", 34_643_304, (1.1922, 2.1381, 3.3770, 4.9248, 6.8007), 6.9),
    (f"{BASE}_224", "", "cswinB", 77_382_184, CSWIN_BASE_GMAC, 15.0),
    (f"{BASE}_384", "", "cswinB", 77_382_184, CSWIN_BASE_GMAC, 15.0),
    (f"{LARGE}_224", "", "cswinL", 173_262_664, CSWIN_LARGE_GMAC, 31.5),
    (f"{LARGE}_384", "", "cswinL", 173_262_664, CSWIN_LARGE_GMAC, 31.5),
    ("caformer_s18", "", "caformerS18", 26_341_656, (0.7226, 1.2928, 2.0398, 2.9736, 4.1069, 13.3661), 4.1),
    ("caformer_s36", "", "caformerS36", 39_297_102, (1.3992, 2.5061, 3.9562, 5.7698, 7.9716, 25.9843), 8.0),
    ("caformer_m36", "", "caformerM36", 56_204_878, (2.3540, 4.2073, 6.6224, 9.6236, 13.2406, 41.9773), 13.2),
)
VARIANTS: dict[str, Variant] = {row[0]: _variant(row[0], row[1] or row[0], *row[2:]) for row in ROWS}
ALIASES = {
    **{variant.timm_name: name for name, variant in VARIANTS.items()},
    **{f"cswin_{name.split('_')[3]}": name for name in VARIANTS if name.startswith("CSWin") and name.endswith("224")},
    **{f"deit_{size}": f"deit_{size}_patch16_224" for size in ("tiny", "small")},
}


def find(name: str) -> Variant | None:
    """The variant of an official name, timm's or a short one (deit_small, cswin_tiny); None for any other model."""
    return VARIANTS.get(ALIASES.get(name, name))


def create_model(name: str, *, size: int = 224, num_classes: int = 1000, **options: Any) -> nn.Module:
    """A model with new weights for square images of `size` pixels.

    Args:
        name: one of `VARIANTS`, or any that timm knows.
        size: side in pixels. Swin's windows are size / 32 tokens wide, as in the released code.
        num_classes: of the head; 0 for none.
        **options: of timm, as `drop_path_rate` or `in_chans`.

    Raises:
        UserError: the name, the size or an option is impossible.
    """
    variant = find(name)
    known = variant.timm_name if variant else name
    multiple = _multiple(known)
    if size < multiple or size % multiple:
        below = size // multiple * multiple
        near = " or ".join(str(side) for side in (below, below + multiple) if side)
        raise UserError(f"image size {size}: {name} takes multiples of {multiple}, such as {near}")
    config = get_pretrained_cfg(known)
    sized: dict[str, Any] = {"img_size": size} if config is not None and config.fixed_input_size else {}
    if known.startswith("swin_"):
        sized["window_size"] = size // 32
    return build_model(known, {**sized, "num_classes": num_classes, **options})


def _multiple(name: str) -> int:
    """What the side of an image must be a multiple of: strides of all stages, or of the patches; 1 for any size."""
    if name.startswith(("swin_", "CSWin_", "cswin_")):
        return 32
    patch = re.search(r"^(?:deit|vit).*_patch(\d+)_", name)
    return int(patch[1]) if patch else 1
