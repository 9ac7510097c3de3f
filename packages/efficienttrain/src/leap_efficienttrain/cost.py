"""What a training will cost: operations of a model by input size, and of a plan as a whole."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from leap_efficienttrain.models import create_model
from leap_efficienttrain.plan import Plan
from leap_efficienttrain.sizes import flexible
from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number

__all__ = ["Prediction", "StageCost", "gmac", "predict", "step_seconds"]


def gmac(model: str | nn.Module, size: int) -> float:
    """Multiply-adds in 10^9 of one square picture: convolutions and matrix products. No weights are made.

    Args:
        model: an official name or one of timm's, or a model, which stays as it is.
        size: side in pixels.

    Raises:
        UserError: the model is unknown or cannot take the size.
    """
    if isinstance(model, str):
        return _named_gmac(model, size)
    twin = copy.deepcopy(model).to("meta")
    flexible(twin).set_size(size)
    return _counted(twin, size)


@functools.lru_cache(maxsize=256)
def _named_gmac(name: str, size: int) -> float:
    with torch.device("meta"):
        return _counted(create_model(name, size=size), size)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _counted(model: nn.Module, size: int) -> float:
    picture = torch.empty(1, getattr(model, "in_chans", 3), size, size, device="meta")
    # the counter knows matrix products, not every fused attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.eval()(picture)
    return float(counter.get_total_flops()) / 2 / 1e9


def step_seconds(model: str, size: int, batch: int, device: torch.device, repeats: int = 3) -> float:
    """Median time of a training step with AdamW: on a CPU in float32, on a GPU in bfloat16.

    Args:
        model: an official name or one of timm's.
        size: side of the pictures in pixels.
        batch: pictures.
        device: where.
        repeats: timed steps, after one that is not.
    """
    network = create_model(model, size=size).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters())
    pictures = torch.rand(batch, getattr(network, "in_chans", 3), size, size, device=device)
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = network(pictures).float().square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@dataclass(frozen=True)
class StageCost:
    """One stage of a prediction.

    Attributes:
        stage, size, randaug, replay: of the curriculum.
        batch: training pictures per update, as micro-batch x accumulation x processes.
        passes: over the decoded data.
        updates: of the weights.
        gmac: of one picture, forward.
        share: of the training's operations.
        demand: decoded pictures per second that the loader must deliver, over those of the ordinary training; or
            absolute, where the speed of that was given. It follows from the operations, or from `seconds`.
        seconds: of one picture, where they were measured.
    """

    stage: int
    size: int
    randaug: Number
    replay: int
    batch: str
    passes: Number
    updates: int
    gmac: float
    share: float
    demand: float
    seconds: float | None = None


@dataclass(frozen=True)
class Prediction:
    """What a training will cost beside an ordinary one at the base size. Printed, it is a table.

    Attributes:
        stages: a row for each.
        model: its name.
        passes: over the decoded data.
        updates: of the weights.
        exa_mac: operations of all forward passes, in 10^18 multiply-adds; training takes about three times as many.
        baseline_epochs: of the ordinary training.
        speedup: operations of the ordinary training over these.
        measured_speedup: the same in seconds, where they were measured.
        demand: the largest of the stages' demands.
        absolute: whether demands are pictures per second, not ratios.
    """

    stages: tuple[StageCost, ...]
    model: str
    passes: Number
    updates: int
    exa_mac: float
    baseline_epochs: Number
    speedup: float
    demand: float
    absolute: bool
    measured_speedup: float | None = None

    def __str__(self) -> str:
        """The table, and a line below it."""
        unit = "images/s" if self.absolute else "x loader"
        head = ("stage", "size", "randaug", "replay", "batch", "passes", "updates", "GMAC", "share", unit)
        rows = [
            (
                *(str(row.stage), str(row.size), f"{row.randaug:g}", str(row.replay), row.batch, f"{row.passes:.4g}"),
                *(str(row.updates), f"{row.gmac:.3f}", f"{row.share:.1%}", f"{row.demand:.4g}"),
            )
            for row in self.stages
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        total = (
            f"{self.passes:.4g} passes over the data, {self.updates} updates, {self.exa_mac:.4g} x 10^18 multiply-adds"
        )
        ordinary = f"{self.baseline_epochs:g} epochs at full size"
        need = f"{self.demand:,.0f} images/s" if self.absolute else f"{self.demand:.3g} times the images/s of these"
        lines.append(f"{self.model}: {total}, {self.speedup:.3f}x less than {ordinary}; the loader must deliver {need}")
        if self.measured_speedup is not None:
            lines.append(f"by the steps timed on this machine, {self.measured_speedup:.3f}x faster than {ordinary}")
        return "\n".join(lines)


def predict(
    plan: Plan,
    model: str | nn.Module,
    baseline_epochs: Number = 300,
    images_per_second: Number | None = None,
    seconds: Mapping[int, float] | None = None,
) -> Prediction:
    """See `Curriculum.table`. Without `seconds` speeds follow from operations: what does not shrink is not seen."""
    if baseline_epochs <= 0 or (images_per_second is not None and images_per_second <= 0):
        given = f"baseline_epochs {baseline_epochs}, images_per_second {images_per_second}"
        raise UserError(f"{given}: expected positive numbers")
    samples = plan.samples
    if samples is None:
        raise UserError("a prediction needs the number of pictures: give samples")
    full = gmac(model, plan.curriculum.base_size)
    costs = {size: gmac(model, size) for size in {leg.stage.size for leg in plan.legs}}
    speeds = {size: full / cost for size, cost in costs.items()}
    measured = None
    if seconds:
        base = seconds[plan.curriculum.base_size]
        speeds = {size: base / value for size, value in seconds.items()}
        measured = (
            baseline_epochs * base / sum(leg.passes * leg.stage.replay * seconds[leg.stage.size] for leg in plan.legs)
        )
    trained = [leg.passes * leg.stage.replay * samples * costs[leg.stage.size] for leg in plan.legs]
    rows = tuple(
        StageCost(
            stage=leg.index + 1,
            size=leg.stage.size,
            randaug=leg.stage.randaug,
            replay=leg.stage.replay,
            batch=f"{leg.micro_batch * leg.stage.replay} x {leg.accumulate} x {leg.world}",
            passes=leg.passes,
            updates=leg.updates or 0,
            gmac=costs[leg.stage.size],
            share=spent / sum(trained),
            demand=speeds[leg.stage.size] / leg.stage.replay * (images_per_second or 1),
            seconds=seconds[leg.stage.size] if seconds else None,
        )
        for leg, spent in zip(plan.legs, trained, strict=True)
    )
    return Prediction(
        stages=rows,
        model=model if isinstance(model, str) else type(model).__name__,
        passes=plan.passes,
        updates=plan.updates,
        exa_mac=sum(trained) / 1e9,
        baseline_epochs=baseline_epochs,
        speedup=baseline_epochs * samples * full / sum(trained),
        demand=max(row.demand for row in rows),
        absolute=images_per_second is not None,
        measured_speedup=measured,
    )
