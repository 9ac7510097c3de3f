"""Golden numbers: a folder with `cases.json`, one .npz a case, and schemas of the checkpoints that it fills."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Case", "assert_close", "cases", "digest", "read_schema"]


@dataclass(frozen=True)
class Case:
    """One golden case: what `cases.json` says of it, and the arrays of its file."""

    folder: Path
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the case."""
        return str(self.facts["name"])

    @property
    def tolerance(self) -> float:
        """Bound of |a - b| / (1 + |b|)."""
        return float(self.facts["tolerance"])

    @cached_property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays of the case's file."""
        with np.load(self.folder / self.facts["file"], allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def __getitem__(self, key: str) -> Any:
        """A fact of `cases.json`."""
        return self.facts[key]


def cases(folder: Path, prefix: str = "") -> list[Case]:
    """Cases of a golden folder whose names begin with `prefix`.

    Raises:
        AssertionError: there is none, so that a test over them cannot pass by finding nothing.
    """
    content = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    rows = content["cases"] if isinstance(content, dict) else content
    if isinstance(rows, dict):
        rows = [{"name": name, **facts} for name, facts in rows.items()]
    found = [Case(folder, row) for row in rows if row["name"].startswith(prefix)]
    assert found, f"{folder / 'cases.json'} has no case {prefix}*"  # noqa: S101 - this module serves tests
    return found


def read_schema(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, dtype)} of a .schema.json or .schema.json.gz file."""
    data = path.read_bytes()
    content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    return {name: (tuple(shape), str(dtype)) for name, (shape, dtype) in content.items()}


def digest(values: ArrayLike) -> NDArray[np.float64]:
    """Mean, population standard deviation and 64 evenly spread elements of the flattened values."""
    flat = np.asarray(values, dtype=np.float64).reshape(-1)
    chosen = flat[np.round(np.linspace(0, flat.size - 1, 64)).astype(np.int64)]
    return np.concatenate([[flat.mean(), flat.std()], chosen])


def assert_close(got: ArrayLike, want: ArrayLike, tolerance: float, label: str = "") -> None:
    """Fail unless |got - want| <= tolerance * (1 + |want|) everywhere.

    Raises:
        AssertionError: with the largest error and its place.
    """
    a, b = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    if a.size != b.size:
        raise AssertionError(f"{label} has shape {a.shape}, expected {b.shape}")
    error = np.abs(a.reshape(-1) - b.reshape(-1)) / (1 + np.abs(b.reshape(-1)))
    worst = int(np.argmax(np.nan_to_num(error, nan=np.inf))) if error.size else 0
    if error.size and not error[worst] <= tolerance:
        values = f"{a.flat[worst]} instead of {b.flat[worst]}"
        raise AssertionError(f"{label} differs by {error[worst]:.3g} > {tolerance:g} at {worst}: {values}")
