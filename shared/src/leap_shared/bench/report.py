"""What a measurement leaves behind: the machine's stamp, JSON, a table and a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from leap_shared import files
from leap_shared.bench.compare import Row
from leap_shared.errors import UserError

__all__ = ["memory_table", "stamp", "table", "write"]

MEMORY_NOTE = (
    "What one call adds to the memory at its peak, in 10^6 bytes: on a GPU what PyTorch hands out; on a CPU the growth "
    "of the resident set, in which buffers that are kept from call to call do not show."
)


def stamp() -> dict[str, str]:
    """Machine, versions and commit, without names of hosts, users or folders.

    `commit` has a + where tracked files are changed, and is absent where this module is in no git checkout.
    """
    machine = {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "memory": _memory(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": _version("triton"),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    commit = _commit(Path(__file__))
    return {**machine, "commit": commit} if commit else machine


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _memory() -> str:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return "unknown"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit(file: Path) -> str | None:
    """Commit of the checkout that tracks `file`; a checkout around it that does not is some other project's."""
    if (git := shutil.which("git")) is None:
        return None

    def ask(*arguments: str) -> str | None:
        command = [git, *arguments]
        done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False)  # noqa: S603  fixed
        return done.stdout.strip() if done.returncode == 0 else None

    tracked = ask("ls-files", "--error-unmatch", file.name)
    commit = ask("rev-parse", "--short=12", "HEAD") if tracked else None
    return commit and commit + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "")


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| case | device | threads | dtype | ours, ms | peer | peer, ms | ratio (95% interval) | target | met |",
        "| --- | --- | --: | --- | --: | --- | --: | --: | --: | --- |",
    ]
    for row in rows:
        low, high = row.interval
        target = "" if row.target is None else f"{row.target:g}"
        met = {None: "", True: "yes", False: "no"}[row.met]
        lines.append(
            f"| {row.case} | {row.device} | {row.threads} | {row.dtype} | {row.ours_ms:.4g} | {row.peer} "
            f"| {row.peer_ms:.4g} | {row.ratio:.2f} ({low:.2f} to {high:.2f}) | {target} | {met} |"
        )
    return "\n".join(lines) + "\n"


def memory_table(rows: Sequence[Row]) -> str:
    """What one call adds to the memory at its peak, as a Markdown table."""
    lines = [
        MEMORY_NOTE,
        "",
        "| case | device | threads | ours, MB | peer | peer, MB |",
        "| --- | --- | --: | --: | --- | --: |",
    ]
    for row in rows:
        ours, peer = (
            "unknown" if (value := row.details["peak_memory_mb"][who]) is None else f"{value:.1f}"
            for who in ("ours", "peer")
        )
        lines.append(f"| {row.case} | {row.device} | {row.threads} | {ours} | {row.peer} | {peer} |")
    return "\n".join(lines) + "\n"


def write(
    rows: Sequence[Row], folder: Path, name: str, *, plot: bool = False, absent: Mapping[str, str] | None = None
) -> list[Path]:
    """Write `name`.json (stamp and rows), `name`.md (table) and, where a plot is asked for, `name`.png; return them.

    Args:
        rows: what was measured.
        folder: made where it is missing.
        name: of the files.
        plot: whether to draw the ratios.
        absent: peers that could not be measured, and why; each has a row in the table.

    Raises:
        UserError: the folder cannot be written to, there is nothing to write, or matplotlib is missing for the plot.
    """
    if not rows:
        raise UserError(f"no rows to write under {name!r}: measure at least one case")
    folder = files.ensure_folder(Path(folder))
    data, text, picture = (folder / f"{name}.{suffix}" for suffix in ("json", "md", "png"))
    if plot:
        _plot(rows, picture)
    machine = {**stamp(), "threads": ", ".join(sorted({str(row.threads) for row in rows}))}
    told = {"absent": dict(absent)} if absent else {}
    files.write_json(data, {"stamp": machine, "rows": [row.to_json() for row in rows], **told})
    facts = "".join(f"- {key}: {value}\n" for key, value in machine.items())
    missing = "".join(f"|  |  |  |  |  | {peer} | {reason} |  |  |  |\n" for peer, reason in (absent or {}).items())
    files.write_text(text, f"{table(rows)}{missing}\n{facts}")
    return [data, text, picture] if plot else [data, text]


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Ratios with their intervals on a logarithmic axis; right of the line at 1 ours is faster."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('a plot needs matplotlib: pip install "leap-shared[report]", or leave plot out') from error
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    heights = np.arange(len(rows))[::-1]
    ratios = np.array([row.ratio for row in rows])
    spread = np.abs(np.array([row.interval for row in rows]).T - ratios)
    targets = [np.nan if row.target is None else row.target for row in rows]
    axes.axvline(1, color="0.6", linewidth=1)
    axes.errorbar(ratios, heights, xerr=spread, fmt="o", capsize=3, label="ratio, 95% interval")
    axes.plot(targets, heights, "|", markersize=14, color="tab:red", label="target")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(heights, [f"{row.case}, {row.peer}" for row in rows], fontsize="small")
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("time of the peer / time of ours")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small")
    with files.atomic_writer(path) as file:
        figure.savefig(file, format="png", dpi=150)
