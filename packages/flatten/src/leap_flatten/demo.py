"""The paper's idea in small: real digits, softmax and linear attention with and without focus and convolution."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leap_flatten import figures
from leap_flatten.attention import FocusedLinearAttention
from leap_flatten.digits import ARMS, DigitsViT, Recipe, SoftmaxAttention, accuracy, load, spectra, train
from leap_flatten.visualize import TOLERANCE
from leap_shared.bench import Case, compare
from leap_shared.cli import Context, Progress
from leap_shared.errors import UserError, did_you_mean
from leap_shared.experiment import Experiment, Result, difference
from leap_shared.experiment import run as run_arms
from leap_shared.files import ensure_folder, write_json

__all__ = ["Settings", "run", "slope", "table"]

BASELINE, METHOD, METRIC = "linear", "focus-dwc", "test accuracy"
STATES = ("trained", "random")
SIDES = (8, 12, 16, 24, 32, 48, 64, 96, 128)
FITTED_FROM = 1024  # tokens; below, the time of a call is what it costs to start its operators
LATENCY_DIM, LATENCY_HEADS = 96, 3  # of Swin-T's first stage

CLAIM = Experiment(
    name="flatten",
    title="Focused linear attention: focus and rank restoration",
    claim="With the focus and the depthwise convolution, ReLU-linear attention classifies digits better than without.",
    baseline=ARMS[BASELINE].title,
    method=ARMS[METHOD].title,
    metric=METRIC,
    unit="%",
    smallest_effect=1.0,
    source="FLatten Transformer: Vision Transformer using Focused Linear Attention",
)
PROTOCOL_NOTE = (
    "Every seed draws its own split into images to train on and to test, its weights and its batches; all arms share "
    "them. The linear arms are one layer: p = 1 is no focus, kernels kept at zero are no convolution, and all of them "
    "have the learned scale and the positional encoding of the keys."
)
SCALE_NOTE = (
    "The paper's top-1 accuracies with DeiT-T on ImageNet are 70.5 (linear), 71.8 (with focus), 74.1 (with focus and "
    "convolution), 72.2 (softmax). Digits of 8x8 pixels show the order and the mechanism, not these sizes."
)
SEEDS_NOTE = (
    "Eight seeds are the default because a first run with five, 0 to 4, was underpowered: +1.5 (95% interval -0.0 to "
    "3.0). With eight others, 8 to 15, the same recipe gave +0.9 (-0.3 to 2.0), and all sixteen +1.1 (0.5 to 1.8). "
    "Other processors round differently, which changes a run as much as another seed does."
)
SMOKE_NOTE = "This was --quick, a smoke test that everything runs: its sizes can support no conclusion."


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; the defaults are what the README reports."""

    seeds: tuple[int, ...] = tuple(range(8))
    """Eight resolve about one point, for the difference between two arms varies by 1.2 from seed to seed."""
    arms: tuple[str, ...] = ("softmax", "linear", "focus", "focus-dwc")
    recipe: Recipe = field(default_factory=Recipe)
    rank_images: int = 8
    """Test images whose attention matrices are decomposed, in every block and head."""
    sides: tuple[int, ...] = SIDES
    """Of the square maps that the layers are timed on; none are timed where it is empty."""
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

    @classmethod
    def quick(cls, seed: int = 0) -> Settings:
        """About ten seconds."""
        sizes: dict[str, Any] = {"rank_images": 2, "sides": (8, 32, 48), "rounds": 2, "smoke": True}
        return cls(seeds=(seed, seed + 1), recipe=Recipe(epochs=1, batch_size=100, depth=1), **sizes)


def _outcome(arm: str, seed: int, settings: Settings, work: Path, device: torch.device) -> dict[str, float]:
    """Train one model; its spectra go to a file."""
    digits = load(seed)
    model = DigitsViT(arm, settings.recipe, seed).to(device)
    images = digits.test.pixels[: settings.rank_images]
    random = spectra(model, images)
    loss = train(model, digits.train, settings.recipe, seed)
    values = dict(zip(STATES, (spectra(model, images), random), strict=True))
    write_json(_spectra_path(work, arm, seed), {state: v.quantile(0.5, 0).tolist() for state, v in values.items()})
    ranks = {f"rank, {state}": float((v > TOLERANCE).sum(1).double().mean()) for state, v in values.items()}
    return {METRIC: accuracy(model, digits.test), "training loss": loss, **ranks}


def _spectra_path(work: Path, arm: str, seed: int) -> Path:
    return work / f"{arm}-{seed}.json"


def _read_spectra(work: Path, arm: str, seed: int) -> dict[str, list[float]]:
    path = _spectra_path(work, arm, seed)
    try:
        found: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: delete {work / 'outcomes.jsonl'} to train again") from error
    return found


def _cases(settings: Settings) -> Iterator[Case]:
    """The layer beside softmax attention of the same width, on one image."""
    for side in settings.sides:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, side * side, LATENCY_DIM, generator=generator)
        linear = FocusedLinearAttention(LATENCY_DIM, LATENCY_HEADS, (side, side))
        ours, theirs = (partial(_infer, layer, x) for layer in (linear, SoftmaxAttention(LATENCY_DIM, LATENCY_HEADS)))
        yield Case(f"{side * side} tokens", ours, {"softmax attention": theirs})


def _infer(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return layer(x)


def slope(tokens: Sequence[int], milliseconds: Sequence[float]) -> float:
    """Exponent of the time's growth: least squares in log-log over two or more sizes of 1024 tokens and above."""
    x, y = np.log([pair for pair in zip(tokens, milliseconds, strict=True) if pair[0] >= FITTED_FROM]).T
    return float(np.polyfit(x, y, 1)[0])


def _latency(settings: Settings, context: Context) -> dict[str, Any]:
    """Medians by number of tokens, and how they grow."""
    bars, clock = context.progress, time.thread_time  # whose seconds are not those of other programs
    rows = compare(_cases(settings), threads=1, rounds=settings.rounds, warmup=1, progress=bars, timer=clock)
    tokens = [side * side for side in settings.sides]
    times = {"focused linear attention": [row.ours_ms for row in rows], rows[0].peer: [row.peer_ms for row in rows]}
    return {"tokens": tokens, "ms": times, "slopes": {name: slope(tokens, ms) for name, ms in times.items()}}


def run(settings: Settings, context: Context) -> dict[str, Any]:
    """Run the experiment, write the section and its figures to `context.out`; killed, it goes on.

    Returns:
        The result as JSON values, with standard deviations, ranks and times beside them.
    """
    out = context.out
    work = ensure_folder(out / ("work-quick" if settings.smoke else "work"))
    titles = {arm: ARMS[arm].title for arm in settings.arms}
    arms = {
        title: partial(_outcome, arm, settings=settings, work=work, device=context.device)
        for arm, title in titles.items()
    }
    runs: Progress[Any] = context.progress(description="train on digits", total=len(arms) * len(settings.seeds))
    facts = {**asdict(settings.recipe), "rank_images": settings.rank_images}
    result = run_arms(CLAIM, arms, settings.seeds, runs, work, facts)
    ranks = {
        title: {
            state: [values[f"rank, {state}"] for _, values in sorted(result.outcomes[title].items())]
            for state in STATES
        }
        for title in titles.values()
    }
    shown = {
        title: _median([_read_spectra(work, arm, seed) for seed in settings.seeds]) for arm, title in titles.items()
    }
    head_dim = settings.recipe.dim // settings.recipe.num_heads
    rank = figures.rank_figure(out / "rank.png", shown, ranks, head_dim)
    caption = (
        f"Median over blocks, heads, {settings.rank_images} test images and seeds, channel 0; numerical rank at "
        f"{TOLERANCE:g} of the largest singular value."
    )
    pictures = [(rank, caption, "Singular values and rank of the attention of each arm")]
    notes = [*((SMOKE_NOTE,) if settings.smoke else ()), PROTOCOL_NOTE, *_findings(result, ranks), SCALE_NOTE]
    if settings.recipe == Recipe():
        notes.append(SEEDS_NOTE)
    latency = _latency(settings, context) if settings.sides else {}
    if latency:
        path = figures.latency_figure(out / "latency.png", latency["tokens"], latency["ms"], latency["slopes"])
        pictures.append(
            (path, "Median processor time of interleaved rounds; N is the number of tokens.", "Time over tokens")
        )
        notes.append(_growth(latency))
    result = replace(result, experiment=replace(CLAIM, notes=tuple(notes)))
    result.write(out, figures=pictures)
    context.log(f"{result.verdict}; the report is {out / 'section.html'}")
    return {**result.to_json(), "sd": _deviations(result), "ranks": ranks, "latency": latency}


def _median(spectra_of_seeds: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    return {state: np.median([one[state] for one in spectra_of_seeds], axis=0).tolist() for state in STATES}


def _deviations(result: Result) -> dict[str, float | None]:
    """Standard deviation over the seeds, by arm."""
    values = {arm: result.values(arm) for arm in result.outcomes}
    return {arm: float(np.std(group, ddof=1)) if len(group) > 1 else None for arm, group in values.items()}


def _findings(result: Result, ranks: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    notes = []
    method = result.values(CLAIM.method)
    for arm in result.outcomes:
        if arm not in (CLAIM.method, CLAIM.baseline):
            found = difference(method, result.values(arm), paired=True)
            interval = _interval([found.low, found.high] if len(method) > 1 else None)
            notes.append(f"{CLAIM.method} - {arm}: {found.value:+.1f} (95% interval {interval}).")
    if len(method) > 1:
        spreads = ", ".join(f"{arm} {value:.1f}" for arm, value in _deviations(result).items())
        notes.append(f"Standard deviation over the seeds: {spreads}.")
    means = (f"{arm} {np.mean(r['trained']):.1f} (random {np.mean(r['random']):.1f})" for arm, r in ranks.items())
    return [*notes, f"Mean rank of the attention matrix after training: {', '.join(means)}."]


def _growth(latency: Mapping[str, Any]) -> str:
    growth = ", ".join(f"{name} as N^{value:.2f}" for name, value in latency["slopes"].items())
    first, last = latency["tokens"][0], latency["tokens"][-1]
    times = ", ".join(f"{name} {ms[-1]:.1f} ms" for name, ms in latency["ms"].items())
    return (
        f"Time of one layer ({LATENCY_DIM} channels, {LATENCY_HEADS} heads, one image, one thread) over N = {first} to "
        f"{last} tokens grows, fitted over N >= {FITTED_FROM}: {growth}. At {last}: {times}."
    )


def table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `run` returned as rows for people: the arms, then the difference."""
    rows = []
    for facts in result["arms"]:
        arm = facts["arm"]
        rank = {f"rank, {state}": f"{np.mean(result['ranks'][arm][state]):.1f}" for state in STATES}
        deviation = result["sd"][arm]
        rows.append({"arm": arm, METRIC: f"{facts['estimate']:.1f}", "95% interval": _interval(facts["interval"])})
        rows[-1] |= {"sd": "unknown" if deviation is None else f"{deviation:.1f}", **rank}
    verdict = {"arm": f"{result['method']} - {result['baseline']}: {result['verdict']}"}
    return [*rows, verdict | {METRIC: f"{result['estimate']:+.1f}", "95% interval": _interval(result["interval"])}]


def _interval(interval: Sequence[float] | None) -> str:
    return "unknown" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"
