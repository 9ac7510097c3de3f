"""What `leap-slide bench` measures: the attention, layers, training, whole models and memory, beside their peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import timm
import torch
from torch import nn

from leap_shared.bench import (
    QUICK,
    BenchmarkSettings,
    Case,
    Row,
    copy_with,
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
from leap_shared.files import write_text
from leap_shared.vision.windows import WindowedAttention
from leap_slide import memory, peers
from leap_slide.attention import SlideAttention
from leap_slide.contenders import GPU_BATCH, MERGED, TWO_PATH, UNFOLD, Core, Operands, Shape

__all__ = ["MEMORY", "PARTS", "Contest", "Settings", "run"]

FLOOR = "floor: matrix products alone"
WINDOW_LAYER = "attention in 7x7 windows (timm)"
NATTEN, FLEX = "natten (na2d)", "FlexAttention, compiled"
TWIN, CONV = "the same body with softmax", "the same model, backend='conv'"
MEMORY = "memory"
GPU_TARGETS = {MERGED: 5.0}
FEW_ROUNDS = 3  # where a call may take seconds


@dataclass(frozen=True)
class Contest:
    """A variant and what it is measured beside.

    Attributes:
        size: side of the images in pixels.
        rival: name in timm.
        twin: whether to measure the same body with softmax in every stage, where timm has none.
    """

    name: str
    size: int = 224
    rival: str | None = None
    twin: bool = False


SWIN = "swin_tiny_patch4_window7_224"
SHAPES = (
    Shape(1, 56, 56, 96, 3, 3, targets={TWO_PATH: 2.3, UNFOLD: 1.2}),
    Shape(1, 28, 28, 192, 6, 3),
    Shape(1, 56, 56, 96, 3, 5, gpu_batch=1, targets={TWO_PATH: 5.0, UNFOLD: 1.2}),
    Shape(4, 56, 56, 128, 4, 7, gpu_batch=16),
    Shape(2, 200, 320, 96, 3, 3, gpu_batch=2),
)
CONTESTS = (
    Contest("slide_swin_tiny", rival=SWIN),
    Contest("slide_swin_tiny_w7", rival=SWIN),
    Contest("slide_pvt_tiny", twin=True),
)


@dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """What is measured, and how long; the defaults are what the README reports.

    Raises:
        UserError: a part is unknown, or a number is out of range.
    """

    peers: bool = True
    """Whether to measure beside softmax attention, natten and timm's models, not forms of the same formula alone."""
    flex: bool = False
    """Whether to compile FlexAttention on a CPU too, which takes a C++ compiler."""
    shapes: tuple[Shape, ...] = SHAPES
    trained: tuple[Shape, ...] = SHAPES[:3]
    """Shapes whose training is measured on a CPU, where the others would take most of an hour."""
    neighborhoods: tuple[Shape, ...] = SHAPES[:2]
    """Shapes of the comparison with natten and FlexAttention on a CPU, where natten takes up to seconds a call."""
    contests: tuple[Contest, ...] = CONTESTS
    memory: Shape = SHAPES[0]
    """Shape whose memory is counted, over kernel sizes."""
    kernel_sizes: tuple[int, ...] = (3, 5, 7)

    def __post_init__(self) -> None:
        self.check((*PARTS, MEMORY))

    @classmethod
    def quick(cls, **changes: Any) -> Settings:
        """A trial of less than a minute."""
        small = Shape(1, 8, 9, 32, 2, 3, 2)
        sizes: dict[str, Any] = {"shapes": (small,), "trained": (small,), "neighborhoods": (small,), "memory": small}
        sizes["contests"] = tuple(replace(contest, size=64) for contest in CONTESTS[1:])
        return cls(**{**sizes, **QUICK, **changes})


def run(settings: Settings, context: Context) -> list[dict[str, Any]]:
    """Measure the parts; write a table, a picture and the machine's stamp for each, and return all rows.

    Raises:
        UserError: the device is neither a CPU nor a CUDA device.
    """
    counts = settings.thread_counts(context.device)
    if not _on_gpu(context):
        context.log(f"no GPU is used, so bfloat16, batches of {GPU_BATCH} and compiled models are not measured")
    timed: list[Row] = []
    found: list[dict[str, Any]] = []
    for count in counts:
        for part in settings.parts or (*PARTS, MEMORY):
            name = file_name(part, count, context.device)
            if part == MEMORY:
                found += _memory(settings, context, count, name)
            else:
                apart = part == "neighborhood"
                few = FEW_ROUNDS if apart and not _on_gpu(context) else None
                rows = settings.measure(PARTS[part](settings, context), context, count, few)
                absent = _absent(settings, context) if apart else {}
                for peer, reason in absent.items():
                    context.log(f"{peer} is not measured: {reason}")
                write(rows, context.out, name, plot=True, absent=absent)
                timed += rows
    if timed:
        write_text(context.out / "resident.md", memory_table(timed))
    return [row.to_json() for row in timed] + found


def _memory(settings: Settings, context: Context, count: int, name: str) -> list[dict[str, Any]]:
    """Memory over kernel sizes, with as many threads as are asked for: buffers may grow with them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        rows = list(memory.measure(settings.memory, context.device, context.seed, settings.kernel_sizes))
        if settings.smoke:
            rows = [row._replace(target=None) for row in rows]
        return memory.write(rows, context.out, name)
    finally:
        torch.set_num_threads(before)


def _on_gpu(context: Context) -> bool:
    return context.device.type == "cuda"


def _case(title: str, ours: Any, peers: Mapping[str, Any], target: Any, context: Context) -> Case:
    wanted = {name: ratio for name, ratio in (target or {}).items() if name in peers}
    return Case(title, ours, peers, wanted or None, str(dtype_on(context.device)).removeprefix("torch."))


def _both(core: Core) -> Callable[[], object]:
    return training_step(core.function, core.inputs)


def _inference(core: Core) -> Callable[[], object]:
    return partial(infer, core.function)


def _cores(
    shapes: tuple[Shape, ...], settings: Settings, context: Context
) -> Iterator[tuple[Shape, str, Core, dict[str, Core]]]:
    """Every shape with its title, ours and the peers: channels last, and on a CPU as the layer has them there."""
    for shape in shapes:
        for first in (False,) if _on_gpu(context) else (False, True):
            operands = Operands(shape, context.device, context.seed, first)
            others = {**operands.formulas(), **(operands.softmax() if settings.peers else {})}
            layout = "in the layer (channels first)" if first else "channels last"
            yield shape, f"{shape.title(context.device)}, {layout}", operands.ours(), others


def _operator(settings: Settings, context: Context) -> Iterator[Case]:
    """What lies between the projections, in inference."""
    for shape, title, ours, others in _cores(settings.shapes, settings, context):
        target = GPU_TARGETS if _on_gpu(context) else shape.targets
        calls = {name: _inference(core) for name, core in others.items()}
        yield _case(title, _inference(ours), calls, target, context)


def _layers(shape: Shape, settings: Settings, context: Context) -> tuple[SlideAttention, dict[str, nn.Module]]:
    layer = shape.layer(context.device)
    others: dict[str, nn.Module] = {TWO_PATH: peers.EagerAttention(layer)}
    if settings.peers:
        others[WINDOW_LAYER] = placed(WindowedAttention(shape.dim, shape.num_heads), context.device)
    return layer, others


def _modules(settings: Settings, context: Context) -> Iterator[Case]:
    """Layers with their projections, in inference."""
    for shape in settings.shapes:
        layer, others = _layers(shape, settings, context)
        x = shape.tokens(context.device, context.seed)
        calls = {name: partial(infer, other, x, shape.hw) for name, other in others.items()}
        calls[FLOOR] = partial(infer, peers.Floor(layer, x, shape.hw))
        yield _case(shape.title(context.device), partial(infer, layer, x, shape.hw), calls, None, context)


def _training(settings: Settings, context: Context) -> Iterator[Case]:
    """Forward and backward: between the projections, and whole layers with gradients for input and parameters."""
    shapes = settings.shapes if _on_gpu(context) else settings.trained
    for _, title, ours, others in _cores(shapes, settings, context):
        calls = {name: _both(core) for name, core in others.items()}
        target = GPU_TARGETS if _on_gpu(context) else None
        yield _case(f"forward and backward, {title}", _both(ours), calls, target, context)
    for shape in shapes:
        layer, modules = _layers(shape, settings, context)
        x = shape.tokens(context.device, context.seed).requires_grad_()

        def step(one: nn.Module, x: torch.Tensor = x, shape: Shape = shape) -> Callable[[], object]:
            trained = [parameter for parameter in one.parameters() if parameter.requires_grad]
            return training_step(partial(one, x, shape.hw), (x, *trained))

        calls = {name: step(other) for name, other in modules.items()}
        yield _case(f"forward and backward, layer, {shape.title(context.device)}", step(layer), calls, None, context)


def _model(name: str, size: int, context: Context, **options: Any) -> nn.Module:
    model: nn.Module = timm.create_model(name, img_size=size, **options)
    return placed(model, context.device)


def _with_conv(layer: SlideAttention) -> nn.Module:
    layer.backend = "conv"
    return layer


def _with_one_path(layer: SlideAttention) -> nn.Module:
    layer.reparameterize()
    return layer


def _models(settings: Settings, context: Context) -> Iterator[Case]:
    """Whole models in inference, as built and with one path; on a GPU all are compiled, ours and the others."""
    for contest in settings.contests:
        model = _model(contest.name, contest.size, context)
        others: dict[str, nn.Module] = {}
        if settings.peers and contest.rival is not None:
            others[contest.rival] = _model(contest.rival, contest.size, context)
        if settings.peers and contest.twin:
            others[TWIN] = _model(contest.name, contest.size, context, num_slide_stages=0)
        others[TWO_PATH] = copy_with(model, SlideAttention, peers.EagerAttention)
        others[CONV] = copy_with(model, SlideAttention, _with_conv)
        first = next(iter(others))
        merged = copy_with(model, SlideAttention, _with_one_path)
        for batch in (1, GPU_BATCH) if _on_gpu(context) else (1,):
            images = noise(context.device, context.seed, batch, 3, contest.size, contest.size)
            calls = {name: model_call(other, images) for name, other in others.items()}
            title = f"{contest.name}, {batch}x{contest.size}x{contest.size}"
            yield _case(title, model_call(model, images), calls, None, context)
            alone = {first: calls[first]}
            yield _case(f"{title}, reparameterized", model_call(merged, images), alone, None, context)
            if _on_gpu(context):
                torch.compiler.reset()  # see `model_call`


@cache
def _refusal_of_flex(device: torch.device) -> str | None:
    """Why FlexAttention cannot be compiled here; None where it can."""
    x = noise(device, 0, 1, 8, 8, 32)
    try:
        infer(peers.flex((8, 8), 2, 3, device), x, x, x)
    except (RuntimeError, OSError) as error:
        return f"compiling it fails: {str(error).strip().splitlines()[0]}"
    return None


def _absent(settings: Settings, context: Context) -> dict[str, str]:
    """The other implementations of neighbourhoods that cannot be measured, and why."""
    reasons = {NATTEN: None if peers.has_natten() else "not installed: pip install natten"}
    if _on_gpu(context) or settings.flex:
        reasons[FLEX] = _refusal_of_flex(context.device)
    else:
        reasons[FLEX] = "not asked for on a CPU: --flex"
    return {name: reason for name, reason in reasons.items() if reason is not None and settings.peers}


def _neighborhood(settings: Settings, context: Context) -> Iterator[Case]:
    """Beside natten and FlexAttention, whose shifts are fixed: forward, on a GPU also forward and backward."""
    device = context.device
    for shape in settings.shapes if _on_gpu(context) else settings.neighborhoods:
        operands = Operands(shape, device, context.seed)
        images, heads, side = operands.images, shape.num_heads, shape.kernel_size
        if not _on_gpu(context):  # FlexAttention, on which natten's CPU path is built, refuses leaves there
            images = (images[0].detach(), images[1].detach(), images[2].detach())
        others = {UNFOLD: operands.formulas()[UNFOLD]}
        if settings.peers:
            absent = _absent(settings, context)
            if NATTEN not in absent:
                others[NATTEN] = Core(partial(peers.neighborhood, *images, heads, side), images)
            if FLEX not in absent:
                others[FLEX] = Core(partial(peers.flex(shape.hw, heads, side, device), *images), images)
        title, ours = f"neighbourhood, {shape.title(device)}", operands.ours()
        calls = {name: _inference(core) for name, core in others.items()}
        yield _case(title, _inference(ours), calls, None, context)
        if _on_gpu(context):
            steps = {name: _both(core) for name, core in others.items()}
            yield _case(f"{title}, forward and backward", _both(ours), steps, None, context)


PARTS: dict[str, Callable[[Settings, Context], Iterator[Case]]] = {
    "operator": _operator,
    "modules": _modules,
    "training": _training,
    "models": _models,
    "neighborhood": _neighborhood,
}
