"""The paper's idea in small: digits by convolution, windows, fixed and learned shifts; memory and time over k."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from leap_shared.bench import Case, compare, infer, peak_allocation
from leap_shared.cli import Context, Progress
from leap_shared.errors import UserError, did_you_mean
from leap_shared.experiment import Estimate, Experiment, Result, difference
from leap_shared.experiment import run as run_arms
from leap_shared.files import ensure_folder
from leap_shared.vision.bodies import Block
from leap_shared.vision.digits import SIDE, accuracy, load, train
from leap_slide import figures, peers
from leap_slide.attention import SlideAttention
from leap_slide.contenders import Operands, Shape
from leap_slide.digits import ARMS, DigitsViT, Recipe
from leap_slide.functional import check_kernel_size

__all__ = ["Settings", "extra_maps", "growth", "merging_error", "run", "table"]

BASELINE, METHOD, METRIC = "windows", "slide", "test accuracy"
COMPARISONS = ((METHOD, BASELINE), (METHOD, "fixed"), ("fixed", BASELINE), (METHOD, "conv"))
KERNEL_SIZES = (3, 5, 7)
MAP_SIDE, MAP_DIM, MAP_HEADS = 56, 96, 3  # of Swin-T's first stage
OURS = "leap-slide"
MERGED, MERGED_DOUBLE = "merged - two paths, float32", "merged - two paths, float64"

CLAIM = Experiment(
    name="slide",
    title="Slide attention: local attention across window borders",
    claim="Slide attention classifies digits better than attention in windows that are not shifted.",
    baseline=ARMS[BASELINE].title,
    method=ARMS[METHOD].title,
    metric=METRIC,
    unit="%",
    smallest_effect=0.5,
    source="Slide-Transformer: Hierarchical Vision Transformer with Local Self-Attention",
)
PROTOCOL_NOTE = (
    "Every seed draws its own split into images to train on and to test, its weights and its batches; all arms share "
    "them, and the recipe. Fixed shifts are slide attention whose learned path is kept at zero; their bias is trained, "
    "as in the paper's fixed path. In windows a pixel sees {window}x{window}, in the other arms {k}x{k}."
)
SEEDS_NOTE = (
    "Ten seeds, 0 to 9, and 0.5 points as the least difference that matters (three of the 597 test images) were set "
    "before any of them ran, after one trial with seed 1000 had shown all arms between 96 and 98%. If differences vary "
    "by 1.2 points from seed to seed, ten resolve 0.9. Other processors round differently, which changes a run as much "
    "as another seed does."
)
SCALE_NOTE = (
    "The paper's top-1 accuracies on ImageNet with Swin-T are 81.3 (shifted windows) and 82.3 (slide attention in the "
    "first two stages). Digits of 8x8 pixels show the mechanism, not these sizes."
)
SMOKE_NOTE = "This was --quick, a smoke test that everything runs: its sizes can support no conclusion."


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; the defaults are what the README reports."""

    seeds: tuple[int, ...] = tuple(range(10))
    arms: tuple[str, ...] = tuple(ARMS)
    recipe: Recipe = field(default_factory=Recipe)
    kernel_sizes: tuple[int, ...] = KERNEL_SIZES
    """Of the attention whose memory and time are measured; nothing is where it is empty."""
    map_side: int = MAP_SIDE
    """Of the map that they are measured on."""
    rounds: int = 9
    smoke: bool = False
    """Whether this only shows that everything runs: too small to say anything about the claim."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise UserError("there are no seeds: give at least one")
        for arm in self.arms:
            if arm not in ARMS:
                raise UserError(f"unknown arm {arm!r}: {did_you_mean(arm, ARMS)}")
        if not {BASELINE, METHOD} <= set(self.arms):
            raise UserError(f"arms {', '.join(self.arms)}: the claim compares {METHOD} with {BASELINE}, name both")
        for kernel_size in self.kernel_sizes:
            check_kernel_size(kernel_size)
        if len(set(self.kernel_sizes)) == 1:
            raise UserError(f"one kernel size, {self.kernel_sizes[0]}, shows no growth: give two or more, or none")

    @classmethod
    def quick(cls, seed: int = 0) -> Settings:
        """About ten seconds."""
        sizes: dict[str, Any] = {"map_side": 32, "rounds": 2, "smoke": True}
        return cls(seeds=(seed, seed + 1), recipe=Recipe(epochs=1, batch_size=200, depth=1), **sizes)


def _outcome(arm: str, seed: int, settings: Settings, device: torch.device) -> dict[str, float]:
    """Train one model and test it."""
    digits = load(seed)
    model = DigitsViT(arm, settings.recipe, seed).to(device)
    loss = train(model, digits.train, settings.recipe, seed)
    errors = merging_error(model, digits.test.pixels) if arm == METHOD else {}
    return {METRIC: accuracy(model, digits.test), "training loss": loss, **errors}


@torch.no_grad()
def merging_error(model: DigitsViT, pixels: Float[Tensor, "images tokens 1"]) -> dict[str, float]:
    """How far the layers' merged operator is from two convolutions, the paper's formula, on the inputs they get.

    Returns:
        In float32 and in float64, the largest difference of a layer's outputs, relative to the largest of them.
    """
    x, hw = model.embed(pixels.to(model.pos_embed.device)) + model.pos_embed, (SIDE, SIDE)
    errors = dict.fromkeys((MERGED, MERGED_DOUBLE), 0.0)
    for block in model.blocks:
        given = cast("Block", block).norm1(x)
        for name, dtype in ((MERGED, torch.float32), (MERGED_DOUBLE, torch.float64)):
            layer = copy.deepcopy(cast("SlideAttention", block.attn)).to(dtype)
            expected = peers.EagerAttention(layer)(given.to(dtype), hw)
            layer.reparameterize()
            found = float((layer(given.to(dtype), hw) - expected).abs().max() / expected.abs().max())
            errors[name] = max(errors[name], found)
        x = block(x, hw)
    return errors


def _contenders(kernel_size: int, side: int) -> dict[str, Callable[[], Tensor]]:
    """The attention between projections of one image, by the names of the implementations, ours last."""
    shape = Shape(1, side, side, MAP_DIM, MAP_HEADS, kernel_size)
    operands = Operands(shape, torch.device("cpu"), seed=kernel_size)
    cores = {**operands.formulas(), OURS: operands.ours()}
    return {name: partial(infer, core.function) for name, core in cores.items()}


def extra_maps(call: Callable[[], Tensor], side: int) -> float:
    """Memory that a call takes at its peak besides its output, all scratch memory included, in feature maps."""
    return peak_allocation(lambda: (call(),), torch.device("cpu")) / (4 * MAP_DIM * side**2)


def growth(kernel_sizes: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    """How values grow with the slots k * k: by so many for each slot, and as which power of them (least squares)."""
    slots = np.array(kernel_sizes, dtype=np.float64) ** 2
    per_slot = np.polyfit(slots, values, 1)[0]
    return {"per slot": float(per_slot), "exponent": float(np.polyfit(np.log(slots), np.log(values), 1)[0])}


def _costs(settings: Settings, context: Context) -> dict[str, Any]:
    """Peak memory in feature maps and median times in milliseconds by implementation, and how they grow with k."""
    names = list(_contenders(settings.kernel_sizes[0], settings.map_side))
    memory: dict[str, list[float]] = {name: [] for name in names}

    def cases() -> Iterator[Case]:
        for kernel_size in settings.kernel_sizes:
            calls = _contenders(kernel_size, settings.map_side)
            for name, call in calls.items():
                memory[name].append(extra_maps(call, settings.map_side))
            yield Case(f"k = {kernel_size}", calls.pop(OURS), calls)

    clock = time.thread_time  # whose seconds are not those of other programs
    options: dict[str, Any] = {"threads": 1, "rounds": settings.rounds, "warmup": 1, "timer": clock}
    rows = compare(cases(), progress=context.progress, **options)
    times = {name: [row.peer_ms for row in rows if row.peer == name] for name in names[:-1]}
    times[OURS] = [row.ours_ms for row in rows if row.peer == names[0]]
    measured = {"memory_maps": memory, "ms": times}
    found: dict[str, Any] = {"kernel_sizes": list(settings.kernel_sizes), "map_side": settings.map_side, **measured}
    for quantity, by_name in measured.items():
        found[f"{quantity}_growth"] = {name: growth(settings.kernel_sizes, by_name[name]) for name in names}
    return found


def run(settings: Settings, context: Context) -> dict[str, Any]:
    """Run the experiment, write the section and its figures to `context.out`; killed, it goes on.

    Returns:
        The result as JSON values, with standard deviations, all differences between arms, and costs beside them.
    """
    out = context.out
    work = ensure_folder(out / ("work-quick" if settings.smoke else "work"))
    arms = {ARMS[arm].title: partial(_outcome, arm, settings=settings, device=context.device) for arm in settings.arms}
    runs: Progress[Any] = context.progress(description="train on digits", total=len(arms) * len(settings.seeds))
    result = run_arms(CLAIM, arms, settings.seeds, runs, work, asdict(settings.recipe))
    differences = _differences(result)
    judged = {f"{name}\n{CLAIM.verdict(found[1])}": found for name, found in differences.items()}
    path = figures.differences_figure(out / "differences.png", judged, CLAIM.smallest_effect, CLAIM.unit)
    caption = "One dot per seed; diamond and bar are the mean and its 95% interval; blue is the claim. "
    caption += "Dashed: the least difference that would matter. Each is judged by itself, by the claim's rule."
    pictures = [(path, caption, "Paired differences in test accuracy between the arms")]
    notes = [*((SMOKE_NOTE,) if settings.smoke else ())]
    notes.append(PROTOCOL_NOTE.format(window=settings.recipe.window, k=settings.recipe.kernel_size))
    notes += _findings(result, differences, settings)
    notes += [SCALE_NOTE, *((SEEDS_NOTE,) if settings == Settings() else ())]
    costs = _costs(settings, context) if settings.kernel_sizes else {}
    if costs:
        sizes = (costs["kernel_sizes"], costs["memory_maps"], costs["ms"])
        path = figures.costs_figure(out / "costs.png", *sizes)
        caption = f"One image of {_shape(settings.map_side)}, without gradient. Median processor time of interleaved "
        caption += (
            "rounds of one thread; what PyTorch's allocator hands out at its peak, without q, k, v and the output."
        )
        pictures.append((path, caption, "Memory and time of the attention over the size of the neighbourhood"))
        notes += (measured := _growths(costs))
        for note in measured:
            context.log(note)
    result = replace(result, experiment=replace(CLAIM, notes=tuple(notes)))
    result.write(out, figures=pictures)
    context.log(f"{result.verdict}; the report is {out / 'section.html'}")
    compared = [
        {"difference": name, "values": values, **_facts(estimate), "verdict": CLAIM.verdict(estimate)}
        for name, (values, estimate) in differences.items()
    ]
    return {**result.to_json(), "sd": _deviations(result), "differences": compared, "costs": costs}


def _differences(result: Result) -> dict[str, tuple[list[float], Estimate]]:
    """Of the arms that ran, those of the seeds and their mean; the claim's first."""
    found = {}
    for pair in COMPARISONS:
        titles = [ARMS[arm].title for arm in pair]
        if result.outcomes.keys() >= set(titles):
            ours, theirs = (result.values(title) for title in titles)
            values = [a - b for a, b in zip(ours, theirs, strict=True)]
            found[" - ".join(ARMS[arm].short for arm in pair)] = values, difference(ours, theirs, paired=True)
    return found


def _facts(estimate: Estimate) -> dict[str, Any]:
    interval = [estimate.low, estimate.high] if np.isfinite(estimate.low) else None
    return {"estimate": estimate.value, "interval": interval}


def _deviations(result: Result) -> dict[str, float | None]:
    """Standard deviation over the seeds, by arm."""
    values = {arm: result.values(arm) for arm in result.outcomes}
    return {arm: float(np.std(group, ddof=1)) if len(group) > 1 else None for arm, group in values.items()}


def _findings(
    result: Result, differences: Mapping[str, tuple[Sequence[float], Estimate]], settings: Settings
) -> list[str]:
    rest = list(differences.items())[1:]
    parts = [
        f"{name}: {estimate.value:+.2f} (95% interval {_interval(_facts(estimate)['interval'])}), "
        f"{CLAIM.verdict(estimate)}"
        for name, (_, estimate) in rest
    ]
    notes = [f"Judged by the claim's rule, each by itself: {'; '.join(parts)}."] if parts else []
    if len(result.seeds) > 1:
        spreads = ", ".join(f"{arm} {value:.2f}" for arm, value in _deviations(result).items())
        notes.append(f"Standard deviation over the seeds: {spreads}.")
    models = {ARMS[arm].title: DigitsViT(arm, settings.recipe, 0) for arm in settings.arms}
    counts = {arm: sum(p.numel() for p in model.parameters() if p.requires_grad) for arm, model in models.items()}
    notes.append(f"Trained parameters: {', '.join(f'{arm} {count:,}' for arm, count in counts.items())}.")
    runs = result.outcomes[CLAIM.method].values()
    errors = [max(values[name] for values in runs) for name in (MERGED, MERGED_DOUBLE)]
    exact = (
        "In the trained models of slide attention the merged operator differs from the two convolutions by at most "
        f"{errors[0]:.1e} of a layer's largest output in float32, and by {errors[1]:.1e} in float64."
    )
    return [*notes, exact]


def _shape(side: int) -> str:
    return f"{side}x{side} pixels, {MAP_DIM} channels and {MAP_HEADS} heads"


def _growths(costs: Mapping[str, Any]) -> list[str]:
    sizes = costs["kernel_sizes"]
    found = []
    for quantity, what, unit in (
        ("memory_maps", "Memory besides q, k, v and the output", "maps"),
        ("ms", "Time", "ms"),
    ):
        parts = []
        for name, values in costs[quantity].items():
            grown = costs[f"{quantity}_growth"][name]
            rate, power = grown["per slot"], grown["exponent"]
            shown = ", ".join(f"{value:.1f}" for value in values)
            parts.append(f"{name} {shown} {unit}, {rate:.2g} {unit} for each slot, as (k²)^{power:.2f}")
        found.append(f"{what} at k = {', '.join(map(str, sizes))}: {'; '.join(parts)}.")
    return found


def table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `run` returned as rows for people: the arms, then the differences with their verdicts, the claim's first."""
    rows = []
    for facts in result["arms"]:
        deviation = result["sd"][facts["arm"]]
        row = {"arm": facts["arm"], METRIC: f"{facts['estimate']:.2f}", "95% interval": _interval(facts["interval"])}
        rows.append(row | {"sd": "unknown" if deviation is None else f"{deviation:.2f}", "verdict": ""})
    for facts in result["differences"]:
        row = {"arm": facts["difference"], METRIC: f"{facts['estimate']:+.2f}"}
        spread = float(np.std(facts["values"], ddof=1)) if len(facts["values"]) > 1 else None
        row |= {"95% interval": _interval(facts["interval"]), "sd": "unknown" if spread is None else f"{spread:.2f}"}
        rows.append(row | {"verdict": facts["verdict"]})
    return rows


def _interval(interval: Sequence[float] | None) -> str:
    return "unknown" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
