"""What `leap-flatten bench` measures: layers, training, whole models and growth with the tokens, beside their peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from leap_flatten.attention import FocusedLinearAttention
from leap_flatten.convert import fuse_for_inference
from leap_flatten.demo import slope
from leap_flatten.digits import SoftmaxAttention
from leap_flatten.peers import EagerAttention, Floor, eager_copy
from leap_shared.bench import (
    QUICK,
    BenchmarkSettings,
    Case,
    Row,
    dtype_on,
    file_name,
    infer,
    memory_table,
    model_call,
    noise,
    placed,
    training_step,
    write,
)
from leap_shared.cli import Context
from leap_shared.files import atomic_writer, write_text
from leap_shared.vision.bodies.grids import Size
from leap_shared.vision.windows import WindowedAttention

__all__ = ["PARTS", "Contest", "Settings", "Shape", "run"]

EAGER = "eager formula"
FLOOR = "floor: products and convolution alone"
GLOBAL, WINDOWS = "softmax over the map (SDPA)", "softmax in 7x7 windows (timm)"
TWIN = "the same body with softmax"
OURS = "focused linear attention"
SOFTMAX_LIMIT = 1e11  # multiply-adds of a global softmax on a CPU; more would take many seconds a call
GPU_BATCH = 64


@dataclass(frozen=True)
class Shape:
    """One layer and its input.

    Attributes:
        batch: images on a CPU.
        gpu_batch: images on a GPU.
        target: least ratio to the eager formula on one CPU thread.
    """

    batch: int
    height: int
    width: int
    dim: int
    num_heads: int
    gpu_batch: int = GPU_BATCH
    target: float | None = None

    @property
    def hw(self) -> Size:
        """Height and width of the map."""
        return self.height, self.width


@dataclass(frozen=True)
class Contest:
    """A variant and the models of timm that it is measured beside.

    Attributes:
        size: side of the images in pixels.
        rivals: names in timm; the first is the one that folded weights are measured beside too.
        target: least ratio to the first rival on one CPU thread, and on a GPU.
        twin: whether to measure the same body with softmax in every stage, where timm has none.
    """

    name: str
    size: int
    rivals: tuple[str, ...] = ()
    target: float | None = None
    twin: bool = False


# timm's Swin keeps windows of 7x7 at every size, as ours in its softmax stages; both pad maps that these do not tile.
SWIN, SMALL = "swin_tiny_patch4_window7_224", "efficientvit_b1"
SHAPES = (
    Shape(1, 56, 56, 96, 3, target=1.8),
    Shape(1, 28, 28, 192, 6),
    Shape(8, 14, 14, 384, 12),
    Shape(1, 14, 14, 320, 5),
    Shape(1, 96, 96, 128, 4, gpu_batch=16),
    Shape(2, 200, 320, 96, 3, gpu_batch=2),
)
CONTESTS = (
    Contest("flatten_swin_tiny", 224, (SWIN, SMALL), 1.0),
    Contest("flatten_swin_tiny", 384, (SWIN, SMALL), 1.0),
    Contest("flatten_swin_tiny", 512, (SWIN, SMALL), 1.0),
    Contest("flatten_pvt_v2_b1", 224, ("pvt_v2_b1", SMALL)),
    Contest("flatten_pvt_tiny", 224, (), twin=True),
    Contest("flatten_cswin_tiny", 224, (), twin=True),
    Contest("flatten_swin_base_384", 384, ("swin_base_patch4_window12_384",)),
)


@dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """What is measured, and how long; the defaults are what the README reports.

    Raises:
        UserError: a part is unknown, or a number is out of range.
    """

    peers: bool = True
    """Whether to measure beside softmax attention and timm's models, not the eager formula and the floor alone."""
    shapes: tuple[Shape, ...] = SHAPES
    contests: tuple[Contest, ...] = CONTESTS
    sides: tuple[int, ...] = (8, 16, 32, 48, 64, 96, 128)
    """Of the square maps over which the growth is measured; at least two of 32 or more."""

    def __post_init__(self) -> None:
        self.check(PARTS)

    @classmethod
    def quick(cls, **changes: Any) -> Settings:
        """A trial of less than a minute."""
        contests = tuple(replace(c, size=64) for c in CONTESTS if c.size == 224)
        sizes: dict[str, Any] = {"shapes": (Shape(1, 8, 8, 32, 2, 2),), "contests": contests, "sides": (8, 32, 48)}
        return cls(**{**sizes, **QUICK, **changes})


def run(settings: Settings, context: Context) -> list[dict[str, Any]]:
    """Measure the parts; write a table, a picture and the machine's stamp for each, and return all rows.

    Raises:
        UserError: the device is neither a CPU nor a CUDA device.
    """
    counts = settings.thread_counts(context.device)
    if not _on_gpu(context):
        context.log(f"no GPU is used, so bfloat16, batches of {GPU_BATCH} and compiled models are not measured")
    measured: list[Row] = []
    for count in counts:
        for part in settings.parts or PARTS:
            rows = settings.measure(PARTS[part](settings, context), context, count)
            name = file_name(part, count, context.device)
            write(rows, context.out, name, plot=True)
            if part == "tokens":
                _write_growth(context.out / f"{name}-growth.png", rows, settings, context)
            measured += rows
    write_text(context.out / "memory.md", memory_table(measured))
    return [row.to_json() for row in measured]


def _on_gpu(context: Context) -> bool:
    return context.device.type == "cuda"


def _random(context: Context, *shape: int) -> Tensor:
    return noise(context.device, context.seed, *shape)


def _case(title: str, ours: Any, peers: Mapping[str, Any], target: Any, context: Context) -> Case:
    return Case(title, ours, peers, target, str(dtype_on(context.device)).removeprefix("torch."))


def _batch(shape: Shape, context: Context) -> int:
    return shape.gpu_batch if _on_gpu(context) else shape.batch


def _title(shape: Shape, context: Context) -> str:
    sizes = (_batch(shape, context), *shape.hw, shape.dim)
    return f"{'x'.join(map(str, sizes))}, {shape.num_heads} heads"


def _layer_and_input(shape: Shape, context: Context) -> tuple[Any, Tensor]:
    layer = placed(FocusedLinearAttention(shape.dim, shape.num_heads, shape.hw), context.device)
    return layer, _random(context, _batch(shape, context), shape.height * shape.width, shape.dim)


def _softmax(shape: Shape, context: Context) -> dict[str, nn.Module]:
    """Softmax attention over the whole map, where that takes seconds at most."""
    products = 2 * _batch(shape, context) * (shape.height * shape.width) ** 2 * shape.dim
    if not _on_gpu(context) and products > SOFTMAX_LIMIT:
        context.log(f"{_title(shape, context)}: {GLOBAL} would take {products:.1e} multiply-adds, it is left out")
        return {}
    return {GLOBAL: placed(SoftmaxAttention(shape.dim, shape.num_heads), context.device)}


def _windows(shape: Shape, context: Context) -> dict[str, nn.Module]:
    return {WINDOWS: placed(WindowedAttention(shape.dim, shape.num_heads), context.device)}


def _modules(settings: Settings, context: Context) -> Iterator[Case]:
    """Layers in inference, as built and with their scale folded."""
    for shape in settings.shapes:
        layer, x = _layer_and_input(shape, context)
        own = {
            EAGER: partial(infer, EagerAttention(layer), x, shape.hw),
            FLOOR: partial(infer, Floor(layer, x, shape.hw)),
        }
        others = {**_softmax(shape, context), **_windows(shape, context)} if settings.peers else {}
        peers = {**own, **{name: partial(infer, other, x, shape.hw) for name, other in others.items()}}
        target = None if shape.target is None or _on_gpu(context) else {EAGER: shape.target}
        title, folded = _title(shape, context), fuse_for_inference(layer)
        yield _case(title, partial(infer, layer, x, shape.hw), peers, target, context)
        yield _case(f"{title}, folded", partial(infer, folded, x, shape.hw), own, target, context)


def _between(layer: Any, packed: Tensor, hw: Size) -> Tensor:
    out: Tensor = layer.attend(*packed.chunk(3, 2), hw)
    return out


def _operator(settings: Settings, context: Context) -> Iterator[Case]:
    """What lies between the projections, forward, and forward and backward."""
    forward, both = (3.0, 2.0) if _on_gpu(context) else (None, None)
    for shape in settings.shapes:
        layer, x = _layer_and_input(shape, context)
        packed = layer.qkv(x).detach().requires_grad_()
        inputs = (packed, layer.positional_encoding, layer.scale, *layer.dwc.parameters())
        eager, title = EagerAttention(layer), f"between the projections, {_title(shape, context)}"
        ours, theirs = (partial(infer, _between, one, packed, shape.hw) for one in (layer, eager))
        yield _case(title, ours, {EAGER: theirs}, forward, context)
        step, rival = (training_step(partial(_between, one, packed, shape.hw), inputs) for one in (layer, eager))
        yield _case(f"{title}, forward and backward", step, {EAGER: rival}, both, context)


def _training(settings: Settings, context: Context) -> Iterator[Case]:
    """Layers forward and backward, with gradients for the input and the parameters."""
    for shape in settings.shapes:
        layer, x = _layer_and_input(shape, context)
        x.requires_grad_()
        contenders = {EAGER: EagerAttention(layer), **(_windows(shape, context) if settings.peers else {})}
        peers = {
            name: training_step(partial(one, x, shape.hw), (x, *one.parameters())) for name, one in contenders.items()
        }
        floor = Floor(layer, x, shape.hw)
        peers[FLOOR] = training_step(floor, (x, *floor.operands, *layer.parameters()))
        ours = training_step(partial(layer, x, shape.hw), (x, *layer.parameters()))
        yield _case(f"forward and backward, {_title(shape, context)}", ours, peers, None, context)


def _model(name: str, size: int, context: Context, **options: Any) -> nn.Module:
    if name.startswith(("flatten", "swin")):  # the others take any size, and no argument for it
        options["img_size"] = size
    model: nn.Module = timm.create_model(name, **options)
    return placed(model, context.device)


def _models(settings: Settings, context: Context) -> Iterator[Case]:
    """Whole models in inference; on a GPU all of them are compiled, ours and the others."""
    for contest in settings.contests:
        model = _model(contest.name, contest.size, context)
        peers = {name: _model(name, contest.size, context) for name in contest.rivals if settings.peers}
        if contest.twin and settings.peers:
            peers[TWIN] = _model(contest.name, contest.size, context, attn_type="SSSS")
        peers[EAGER] = eager_copy(model)
        first = next(iter(peers))
        target = None if contest.target is None or first == EAGER else {first: contest.target}
        folded = fuse_for_inference(model)
        for batch in (1, GPU_BATCH) if _on_gpu(context) else (1,):
            images = _random(context, batch, 3, contest.size, contest.size)
            calls = {name: model_call(peer, images) for name, peer in peers.items()}
            title = f"{contest.name}, {batch}x{contest.size}x{contest.size}"
            yield _case(title, model_call(model, images), calls, target, context)
            yield _case(f"{title}, folded", model_call(folded, images), {first: calls[first]}, target, context)
            if _on_gpu(context):
                torch.compiler.reset()  # one forward method is compiled for few models; the next would run uncompiled


def _tokens_of(side: int) -> str:
    return f"{side * side} tokens, 96, 3 heads"


def _tokens(settings: Settings, context: Context) -> Iterator[Case]:
    """One image through the layer of Swin-T's first stage, over more and more tokens."""
    for side in settings.sides:
        shape = Shape(1, side, side, 96, 3, 1)
        layer, x = _layer_and_input(shape, context)
        contenders = {EAGER: EagerAttention(layer), **(_softmax(shape, context) if settings.peers else {})}
        peers = {name: partial(infer, one, x, shape.hw) for name, one in contenders.items()}
        yield _case(_tokens_of(side), partial(infer, layer, x, shape.hw), peers, None, context)


def _write_growth(path: Path, rows: Sequence[Row], settings: Settings, context: Context) -> None:
    """Draw time and memory over tokens, both logarithmic, and tell how the time grows."""
    counts = {_tokens_of(side): side * side for side in settings.sides}
    lines: dict[str, dict[int, tuple[float, float]]] = {}
    for row in rows:
        memory = {who: value or nan for who, value in row.details["peak_memory_mb"].items()}
        lines.setdefault(OURS, {})[counts[row.case]] = row.ours_ms, memory["ours"]
        lines.setdefault(row.peer, {})[counts[row.case]] = row.peer_ms, memory["peer"]
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in lines.items():
        times, memories = zip(*points.values(), strict=True)
        label = f"{name}: grows as N^{slope(list(points), times):.2f}"
        context.log(label)
        left.plot(list(points), times, "o-", label=label)
        right.plot(list(points), memories, "o-", label=name)
    shown = [side * side for side in settings.sides if side & (side - 1) == 0]
    for axes, unit in ((left, "milliseconds"), (right, "memory of a call at its peak, MB")):
        axes.set_xscale("log", base=4)
        axes.set_yscale("log")
        axes.set_xticks(shown, [f"{count:,}" for count in shown])
        axes.set_xlabel("tokens N")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
    left.legend(fontsize="small", frameon=False)
    with atomic_writer(path) as file:
        figure.savefig(file, format="png")


PARTS: dict[str, Callable[[Settings, Context], Iterator[Case]]] = {
    "modules": _modules,
    "operator": _operator,
    "training": _training,
    "models": _models,
    "tokens": _tokens,
}
