"""Reports for people: a page with pictures, a Markdown table, and all numbers as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leap_oper import figures
from leap_oper.report import collect, summarise
from leap_shared.files import ensure_folder, write_json, write_text

__all__ = ["write_report"]


def write_report(folders: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """Write report.json, report.md and the page index.html with curves and histograms; return the rows of the table.

    Raises:
        UserError: there is nothing to report, or jinja2 or matplotlib is missing.
    """
    reports = collect(folders)
    rows = summarise(reports)
    ensure_folder(out)
    write_json(out / "report.json", {"rows": rows, "runs": [report.to_json() for report in reports]})
    write_text(out / "report.md", _markdown(rows))
    pictures = figures.report_figures(out, reports)
    figures.write_page(out / "index.html", "Scores", [_cells(row) for row in rows], pictures)
    return rows


COLUMNS = (
    "algorithm",
    "method",
    "task",
    "score",
    "seeds",
    "mean ± std",
    "IQM (95%)",
    "P(better than uniform)",
    "CORL last",
)


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row's numbers as text."""

    def interval(name: str, form: str) -> str:
        if row.get(name) is None:
            return "–"
        if row[f"{name} interval"] is None:
            return f"{row[name]:{form}} (one seed)"
        low, high = row[f"{name} interval"]
        return f"{row[name]:{form}} ({low:{form}} to {high:{form}})"

    corl = row.get("CORL last")
    values = [
        *(str(row[key]) for key in ("algorithm", "method", "task", "score")),
        str(row.get("seeds", "–")),
        f"{row['mean']:.1f}" + (f" ± {row['std']:.1f}" if "std" in row else ""),
        interval("iqm", ".1f"),
        interval("improvement", ".2f"),
        "–" if corl is None else f"{corl[0]:.1f} ± {corl[1]:.1f}",
    ]
    return dict(zip(COLUMNS, values, strict=True))


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(row).values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"
