"""What `leap-efficienttrain bench` measures: crops, down-sampling, pipelines and training steps, beside their peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from leap_efficienttrain import peers, pipelines
from leap_efficienttrain.cost import gmac
from leap_efficienttrain.models import create_model
from leap_efficienttrain.resampling import lanczos_resize, low_frequency_crop, prepare
from leap_shared.bench import (
    QUICK,
    BenchmarkSettings,
    Case,
    Row,
    dtype_on,
    file_name,
    infer,
    noise,
    training_step,
    write,
)
from leap_shared.cli import Context
from leap_shared.vision.data import isolated

__all__ = ["PARTS", "Crop", "Settings", "run"]

REFERENCE, BICUBIC, COMPOSER = "the authors' FFT", "bicubic, antialiased (torch)", "Composer's resize_batch"
PILLOW, FLOOR = "Pillow, picture by picture", "floor: one read and one write"
FEW_ROUNDS = 5  # where a call takes seconds
LOADER_TARGET, GPU_TARGET = 2.0, 5.0


@dataclass(frozen=True)
class Crop:
    """Pictures of a side that are cropped to others.

    Attributes:
        batch: pictures.
        side: of the pictures in pixels.
        sizes: to crop to, each with the least ratio to reach over the authors' FFT on a CPU.
    """

    batch: int
    side: int
    sizes: Mapping[int, float]


CROPS = (
    Crop(256, 224, {96: 1.5, 128: 1.0, 160: 1.0, 192: 1.0}),
    Crop(1024, 32, {16: 1.0, 24: 3.0}),
    Crop(256, 96, {64: 1.0}),
    Crop(256, 64, {48: 1.0}),
)
MODELS = ("deit_small", "swin_tiny", "convnext_tiny", "resnet50", "cswin_tiny")


@dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """What is measured, and how long; the defaults are what the README reports.

    Raises:
        UserError: a part is unknown, or a number is out of range.
    """

    threads: tuple[int, ...] = (1,)
    crops: tuple[Crop, ...] = CROPS
    sizes: tuple[int, ...] = (96, 160, 224)
    """Of the stages; the last is the full size."""
    models: tuple[str, ...] = MODELS
    pictures: int = 64
    """Of pipelines and down-sampling."""
    step_batch: int | None = None
    """Pictures of a training step: 8 on a CPU and 256 on a GPU unless given."""
    warmup: int = 2

    def __post_init__(self) -> None:
        self.check(PARTS)

    @classmethod
    def quick(cls, **changes: Any) -> Settings:
        """A trial of less than a minute."""
        sizes: dict[str, Any] = {"crops": (Crop(2, 32, {24: 3.0}),), "sizes": (32, 64), "models": ("resnet50",)}
        return cls(**{**sizes, "pictures": 2, "step_batch": 2, **QUICK, **changes})


def run(settings: Settings, context: Context) -> list[dict[str, Any]]:
    """Measure the parts; write a table, a picture and the machine's stamp for each, and return all rows.

    Raises:
        UserError: the device is neither a CPU nor a CUDA device.
    """
    counts = settings.thread_counts(context.device)
    gpu = context.device.type == "cuda"
    if not gpu:
        context.log("no GPU is used, so bfloat16, fused kernels and compiled steps are not measured")
    if not peers.has_composer():
        context.log(f"{COMPOSER} is not measured: mosaicml is not installed")
    rows: list[Row] = []
    for count in counts:
        for part in settings.parts or PARTS:
            few = FEW_ROUNDS if part == "step" and not gpu else None
            found = settings.measure(PARTS[part](settings, context), context, count, few)
            write(found, context.out, file_name(part, count, context.device), plot=True)
            rows += found
    return [row.to_json() for row in rows]


def _noise(context: Context, *shape: int) -> Tensor:
    return noise(context.device, context.seed, *shape).float()


def _pictures(settings: Settings, context: Context, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(context.seed)
    shape = (settings.pictures if context.device.type == "cpu" else 256, side, side, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(context.device)


def _floor(x: Tensor, out: Tensor) -> Tensor:
    """Read all of `x` and write all of `out`, which nothing that makes one of the other can avoid."""
    (x.flatten().view(torch.int64) if x.dtype == torch.uint8 else x).amax()
    return torch.full_like(out, 1.0)


def _crop(settings: Settings, context: Context) -> Iterator[Case]:
    """The low-frequency crop in float32: forward, and forward and backward."""
    gpu = context.device.type == "cuda"
    for crop in settings.crops:
        x = _noise(context, crop.batch, 3, crop.side, crop.side)
        for size, target in crop.sizes.items():
            calls: dict[str, Callable[[Tensor, int], Tensor]] = {
                REFERENCE: peers.reference_crop,
                BICUBIC: peers.interpolate_crop,
            }
            if peers.has_composer():
                calls[COMPOSER] = peers.composer_resize
            title = f"crop of {crop.batch} pictures, {crop.side} to {size}"
            others: dict[str, Callable[[], object]] = {
                name: partial(infer, call, x, size) for name, call in calls.items()
            }
            others[FLOOR] = partial(infer, _floor, x, x.new_empty(crop.batch, 3, size, size))
            wanted = {REFERENCE: GPU_TARGET if gpu else target}
            yield Case(title, partial(infer, low_frequency_crop, x, size), others, wanted)
            few = x if gpu else x[: max(crop.batch // 4, 1)]  # a training step takes several times as long
            leaf = few.clone().requires_grad_()
            steps = {name: training_step(partial(call, leaf, size), (leaf,)) for name, call in calls.items()}
            yield Case(
                f"forward and backward, crop of {len(few)} pictures, {crop.side} to {size}",
                training_step(partial(low_frequency_crop, leaf, size), (leaf,)),
                steps,
                {REFERENCE: GPU_TARGET if gpu else 1.0},
            )


def _pillow(pictures: Sequence[Image.Image], size: int) -> list[Image.Image]:
    return [picture.resize((size, size), Image.Resampling.LANCZOS) for picture in pictures]


def _lanczos(settings: Settings, context: Context) -> Iterator[Case]:
    """Down-sampling of uint8 batches by Lanczos, and from there to a normalised batch in one call."""
    side = settings.sizes[-1]
    images = _pictures(settings, context, side)
    pictures = [Image.fromarray(picture) for picture in np.asarray(images.cpu())]
    dtype = dtype_on(context.device)
    for size in settings.sizes[:-1]:
        title = f"{len(images)} pictures, {side} to {size}"
        ours = partial(infer, lanczos_resize, images, size)
        yield Case(f"Lanczos of {title}", ours, {PILLOW: partial(_pillow, pictures, size)}, dtype="uint8")
        methods: tuple[Literal["lanczos", "fourier"], ...] = ("lanczos", "fourier")
        for method in methods:
            fused = partial(infer, partial(prepare, images, size, method=method, dtype=dtype))
            out = torch.empty(len(images), 3, size, size, dtype=dtype, device=context.device)
            apart = partial(infer, _apart, images, size, method, dtype)
            others = {"step by step": apart, FLOOR: partial(infer, _floor, images, out)}
            name = str(dtype).removeprefix("torch.")
            yield Case(f"uint8 to normalised, {method}, {title}", fused, others, dtype=name)


def _apart(images: Tensor, size: int, method: str, dtype: torch.dtype) -> Tensor:
    """What `prepare` does, one operation after the other."""
    small = lanczos_resize(images, size) if method == "lanczos" else images
    mean = torch.tensor([0.485, 0.456, 0.406], device=images.device).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=images.device).view(3, 1, 1)
    normalised = (small.permute(0, 3, 1, 2).float() / 255 - mean) / std
    return (low_frequency_crop(normalised, size) if method == "fourier" else normalised).to(dtype)


def _isolated(function: Callable[[], object], seed: int) -> object:
    with isolated(seed):
        return function()


def _loader(settings: Settings, context: Context) -> Iterator[Case]:
    """From JPEG files to a normalised batch, on one thread: without RandAugment, and with it."""
    if context.device.type != "cpu":
        return
    files = pipelines.photographs(settings.pictures, seed=context.seed)
    for magnitude in (None, 9):
        for size in settings.sizes:
            calls = {name: pipelines.pipeline(name, size, magnitude) for name in pipelines.PIPELINES}
            timed = {name: partial(_isolated, partial(call, files), context.seed) for name, call in calls.items()}
            kind = "no RandAugment" if magnitude is None else f"RandAugment {magnitude}"
            target = {pipelines.REFERENCE: LOADER_TARGET} if size == settings.sizes[0] else None
            yield Case(f"{len(files)} JPEGs to {size} px, {kind}", timed.pop(pipelines.LOW), timed, target)


def _training_step(name: str, size: int, batch: int, context: Context) -> Callable[[], None]:
    model = create_model(name, size=size).to(context.device).train()
    images = _noise(context, batch, 3, size, size)
    gpu = context.device.type == "cuda"
    forward: Any = torch.compile(model.forward, dynamic=False) if gpu else model

    def loss() -> Tensor:
        with torch.autocast(context.device.type, torch.bfloat16, enabled=gpu):
            value: Tensor = forward(images).float().square().mean()
        return value

    return training_step(loss, list(model.parameters()))


def _step(settings: Settings, context: Context) -> Iterator[Case]:
    """Forward and backward pass of a model, at each size beside the full one."""
    *small, full = settings.sizes
    batch = settings.step_batch or (8 if context.device.type == "cpu" else 256)
    for name in settings.models:
        peer = {f"the same at {full} px": _training_step(name, full, batch, context)}
        for size in small:
            fewer = gmac(name, full) / gmac(name, size)
            title = f"{name}, {batch} pictures of {size} px, {fewer:.2f} times fewer operations"
            yield Case(title, _training_step(name, size, batch, context), peer)
        torch.compiler.reset()


PARTS: dict[str, Callable[[Settings, Context], Iterator[Case]]] = {
    "crop": _crop,
    "lanczos": _lanczos,
    "loader": _loader,
    "step": _step,
}
