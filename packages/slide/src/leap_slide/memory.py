"""How much memory attention takes besides its operands and results, by the kernel's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from leap_shared.bench import infer, peak_allocation, stamp
from leap_shared.files import atomic_writer, ensure_folder, write_json, write_text
from leap_slide.contenders import OURS, Core, Operands, Shape

__all__ = ["BACKWARD", "FORWARD", "LIMIT", "Held", "draw", "measure", "write"]

FORWARD, BACKWARD = "forward", "forward and backward"
FIRST = f"{OURS}, channels first"
LIMIT = 4.0  # maps that ours may take, whatever k
NOTE = (
    "What PyTorch's allocator hands out for one call at its peak, besides queries, keys, values, the output and "
    "gradients, in feature maps (batch x channels x height x width numbers). Buffers that an operator keeps for later "
    "calls are counted; what a library below PyTorch takes for itself is not."
)


class Held(NamedTuple):
    """One contender's memory at its peak, in feature maps."""

    case: str
    kernel_size: int
    passes: str
    contender: str
    maps: float
    target: float | None

    @property
    def met(self) -> bool | None:
        """Whether the target is met, where there is one."""
        return None if self.target is None else self.maps <= self.target


def measure(shape: Shape, device: torch.device, seed: int, kernel_sizes: Sequence[int] = (3, 5, 7)) -> Iterator[Held]:
    """Count what ours and its peers allocate, forward, and forward and backward.

    Args:
        shape: of the layer; its kernel size is not used.
        device: a CPU or a CUDA device.
        seed: of the input.
        kernel_sizes: odd.
    """
    for side in kernel_sizes:
        sized = replace(shape, kernel_size=side)
        plain = Operands(sized, device, seed)
        cores = {OURS: plain.ours(), **plain.formulas()}
        if device.type == "cpu":
            cores[FIRST] = Operands(sized, device, seed, channels_first=True).ours()
        size = plain.q.numel() * plain.q.element_size()
        for name, core in cores.items():
            for passes, call in ((FORWARD, _forward), (BACKWARD, _backward)):
                maps = peak_allocation(call(core), device) / size
                target = LIMIT if name in (OURS, FIRST) else None
                yield Held(shape.title(device).rpartition(",")[0], side, passes, name, maps, target)


def _forward(core: Core) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (infer(core.function),)


def _backward(core: Core) -> Callable[[], tuple[Tensor, ...]]:
    with torch.no_grad():
        gradient = torch.ones_like(core.function())

    def call() -> tuple[Tensor, ...]:
        out = core.function()
        return out, *torch.autograd.grad(out, core.inputs, gradient)

    return call


def write(rows: Sequence[Held], folder: Path, name: str) -> list[dict[str, Any]]:
    """Write stamp and rows as JSON, a table as Markdown, and a picture; return the rows as they are stored."""
    folder, machine = ensure_folder(folder), stamp()
    stored = [{**row._asdict(), "met": row.met} for row in rows]
    write_json(folder / f"{name}.json", {"stamp": machine, "rows": stored})
    lines = [
        NOTE,
        "",
        "| case | k | pass | contender | maps | at most | met |",
        "| --- | --: | --- | --- | --: | --: | --- |",
    ]
    for row in rows:
        target, met = "" if row.target is None else f"{row.target:g}", {None: "", True: "yes", False: "no"}[row.met]
        lines.append(
            f"| {row.case} | {row.kernel_size} | {row.passes} | {row.contender} | {row.maps:.1f} | {target} | {met} |"
        )
    facts = "".join(f"- {key}: {value}\n" for key, value in machine.items())
    write_text(folder / f"{name}.md", "\n".join(lines) + f"\n\n{facts}")
    with atomic_writer(folder / f"{name}.png") as file:
        draw(rows).savefig(file, format="png")
    return stored


def draw(rows: Sequence[Held]) -> Figure:
    """Maps over k, forward on the left, with the backward pass on the right."""
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    sides = sorted({row.kernel_size for row in rows})
    for axes, passes in zip(figure.subplots(1, 2, sharey=True), (FORWARD, BACKWARD), strict=True):
        shown = [row for row in rows if row.passes == passes]
        for name in dict.fromkeys(row.contender for row in shown):
            points = {row.kernel_size: row.maps for row in shown if row.contender == name}
            axes.plot(list(points), list(points.values()), "o-", label=name)
        axes.axhline(LIMIT, color="0.6", linestyle="--", linewidth=1)
        axes.set_yscale("log")
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.set_title(passes, fontsize="medium")
        axes.set_xlabel("kernel size k")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("memory besides operands and results, feature maps")
    figure.axes[0].legend(fontsize="small", frameon=False)
    return figure
