"""Golden numbers: a folder with `cases.json`, a file of arrays a case, and schemas of the checkpoints that it fills."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Case", "assert_close", "cases", "digest", "read_json", "read_schema"]


@dataclass(frozen=True)
class Case:
    """One golden case: what `cases.json` says of it, what it says of all cases, and the arrays of its file."""

    folder: Path
    facts: Mapping[str, Any]
    header: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the case."""
        return str(self.facts["name"])

    @property
    def tolerance(self) -> float:
        """Bound of |a - b| / (1 + |b|), for cases that need no more than one number."""
        value = self.facts.get("tolerance", self.facts.get("tol"))
        if not isinstance(value, (int, float)):
            raise TypeError(f"the tolerance of {self.name} is no single number but {value!r}: read it from case.facts")
        return float(value)

    @cached_property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays of the case's file."""
        with np.load(self.folder / self.facts["file"], allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    @cached_property
    def schema(self) -> dict[str, Any]:
        """{name: (shape, dtype)} of the case's checkpoint, in a file or in place, nested where it holds several."""
        given = self.facts["schema"]
        return read_schema(self.folder / given) if isinstance(given, str) else _schema(given)

    def __getitem__(self, key: str) -> Any:
        """A fact of `cases.json`."""
        return self.facts[key]


def cases(folder: Path, prefix: str = "") -> list[Case]:
    """Cases of a golden folder whose names begin with `prefix`.

    Raises:
        AssertionError: there is none, so that a test over them cannot pass by finding nothing.
    """
    content = read_json(folder / "cases.json")
    header = {key: value for key, value in content.items() if key != "cases"} if isinstance(content, dict) else {}
    rows = content["cases"] if isinstance(content, dict) else content
    named = [{"name": row["case"], **row} if "case" in row else row for row in rows]
    found = [Case(folder, row, header) for row in named if row["name"].startswith(prefix)]
    assert found, f"{folder / 'cases.json'} has no case {prefix}*"  # noqa: S101 - this module serves tests
    return found


def read_json(path: Path) -> Any:
    """Content of a .json or .json.gz file."""
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def read_schema(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, dtype)} of a .json or .json.gz file."""
    return _schema(read_json(path))


def _schema(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _schema(entry) if isinstance(entry, Mapping) else (tuple(entry[0]), str(entry[1]))
        for name, entry in content.items()
    }


def digest(values: Any) -> NDArray[np.float64]:
    """Mean, population standard deviation and 64 evenly spread elements of the flattened values, in float64."""
    flat = _array(values).reshape(-1)
    chosen = flat[np.round(np.linspace(0, flat.size - 1, 64)).astype(np.int64)]
    return np.concatenate([[flat.mean(), flat.std()], chosen])


def assert_close(got: Any, want: Any, tolerance: float, label: str = "value") -> None:
    """Fail unless the shapes agree and |got - want| <= tolerance * (1 + |want|) everywhere; tensors are welcome.

    Raises:
        AssertionError: with the largest error and its place.
    """
    a, b = _array(got), _array(want)
    if a.shape != b.shape:
        raise AssertionError(f"{label} has shape {a.shape}, expected {b.shape}")
    with np.errstate(invalid="ignore"):  # equal infinities differ by NaN
        error = np.where(a == b, 0.0, np.nan_to_num(np.abs(a - b) / (1 + np.abs(b)), nan=np.inf))
    if error.size and error.max() > tolerance:
        worst = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
        values = f"{a[worst]} instead of {b[worst]}"
        raise AssertionError(f"{label} differs by {error[worst]:.3g} > {tolerance:g} at {worst}: {values}")


def _array(values: Any) -> NDArray[np.float64]:
    plain = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    return np.asarray(plain, dtype=np.float64)
