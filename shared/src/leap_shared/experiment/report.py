"""The figure, the section of one experiment and the page that joins them."""

from __future__ import annotations

import base64
import io
import json
import math
import mimetypes
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leap_shared.errors import UserError
from leap_shared.files import atomic_writer, ensure_folder, write_json, write_text

__all__ = ["data_uri", "join", "write"]

BASELINE, METHOD, OTHER, INK = "#E69F00", "#0072B2", "#8A8F98", "#22262B"  # Okabe and Ito: safe for every colour vision


def write(
    facts: Mapping[str, Any],
    outcomes: Mapping[str, Mapping[int, Mapping[str, float]]],
    folder: Path,
    figures: Sequence[tuple[Path, str, str]] = (),
    command: str | None = None,
) -> Path:
    """Write `section.json`, `section.html` and `arms.png` into `folder` and return it.

    Args:
        facts: what :meth:`Result.to_json` gives.
        outcomes: the outcome of every arm and seed, for the table.
        folder: made where it does not exist.
        figures: further images as (path, caption, alternative text).
        command: what reproduces the result; the running command line where None.
    """
    from leap_shared.bench import stamp

    ensure_folder(folder)
    with atomic_writer(folder / "arms.png") as file:
        file.write(_figure(facts))
    caption = "One dot per seed; diamond and bar are the mean and its 95% interval. "
    caption += "Dashed: the least difference that would matter."
    images = [(folder / "arms.png", caption, f"{facts['metric']} of each arm, and the difference"), *figures]
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if command is None else command
    facts = {**facts, "command": command, "stamp": stamp()}
    write_json(folder / "section.json", facts)
    embedded = [{"uri": data_uri(path), "caption": text, "alt": alt} for path, text, alt in images]
    html = _template("section.html").render(facts=facts, outcomes=outcomes, figures=embedded, anchor=_anchor(facts))
    write_text(folder / "section.html", html)
    return folder


def join(folders: Sequence[Path], out: Path, title: str = "What the papers claim, and what we measured") -> Path:
    """Join the sections that :meth:`Result.write` left in `folders` into `out`/index.html, one file without links.

    Raises:
        UserError: a folder holds no section.
    """
    sections = []
    for folder in folders:
        try:
            facts = json.loads((folder / "section.json").read_text(encoding="utf-8"))
            html = (folder / "section.html").read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} holds no section of a report ({error.filename} is missing): run its demo"
            ) from error
        sections.append({"facts": facts, "html": html, "anchor": _anchor(facts)})
    ensure_folder(out)
    write_text(out / "index.html", _template("page.html").render(title=title, sections=sections))
    return out / "index.html"


def _anchor(facts: Mapping[str, Any]) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in facts["name"].lower())


def data_uri(path: Path) -> str:
    """An image as text that a page can hold.

    Raises:
        UserError: it is no image by its name, or cannot be read.
    """
    kind = mimetypes.guess_type(path.name)[0] or ""
    if not kind.startswith("image/"):
        raise UserError(f"{path} is no image by its name: give a .png, .jpg, .gif, .webp or .svg")
    try:
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise UserError(f"cannot read the figure {path}: {error.strerror}") from error


def _template(name: str) -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise UserError('a report needs jinja2: pip install "leap-shared[report]"') from error
    loader = jinja2.PackageLoader("leap_shared.experiment")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "scale": _scale}
    return environment.get_template(name)


def _number(value: float, scale: float, signed: bool = False) -> str:
    digits = max(0, 1 - math.floor(math.log10(scale)))
    return f"{value:{'+' if signed else ''},.{digits}f}".replace("-", "−")


def _scale(facts: Mapping[str, Any]) -> float:
    """Width of the interval: numbers are shown to its second digit."""
    low, high = facts["interval"] or (0, 0)
    return float(max(high - low, facts["smallest_effect"] / 100))


def _figure(facts: Mapping[str, Any]) -> bytes:
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise UserError('a report needs matplotlib: pip install "leap-shared[report]"') from error

    arms = sorted(facts["arms"], key=lambda row: (row["arm"] == facts["method"], row["arm"] == facts["baseline"]))
    figure = Figure(figsize=(7, 2 + 0.62 * len(arms)), dpi=160, layout=ConstrainedLayoutEngine(hspace=0.08))
    above, below = figure.subplots(2, 1, height_ratios=(len(arms) + 0.4, 1.1))
    colours = {facts["baseline"]: BASELINE, facts["method"]: METHOD}
    for height, row in enumerate(arms):
        colour = colours.get(row["arm"], OTHER)
        _interval(above, row, height, colour)
        above.plot(row["values"], [height + 0.25] * len(row["values"]), "o", color=colour, alpha=0.5, ms=6, mew=0)
    above.set_yticks(range(len(arms)), [row["arm"] for row in arms])
    above.set_ylim(-0.4, len(arms) - 0.5)
    unit = f" ({facts['unit']})" if facts["unit"] else ""
    sign, better = (1, "higher") if facts["higher_is_better"] else (-1, "lower")
    above.set_title(f"{facts['metric']}{unit}: {better} is better", loc="left", color=INK, fontsize=12, wrap=True)
    _interval(below, facts, 0, METHOD)
    below.axvline(0, color=INK, lw=1)
    below.axvline(sign * facts["smallest_effect"], color=INK, lw=1, ls="--")
    below.set_yticks([0], ["difference"])
    below.set_ylim(-1, 1)
    below.set_title(f"{facts['method']} − {facts['baseline']}{unit}", loc="left", color=INK, fontsize=12, wrap=True)
    for axes in (above, below):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(colors=INK, left=False, labelsize=11)
        axes.grid(axis="x", color="#E3E6EA", lw=0.8)
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _interval(axes: Any, row: Mapping[str, Any], height: int, colour: str) -> None:
    if row["interval"] is not None:
        axes.plot(row["interval"], [height, height], color=colour, lw=3, solid_capstyle="round")
    axes.plot(row["estimate"], height, "D", color=colour, mec="white", mew=1.2, ms=9)
