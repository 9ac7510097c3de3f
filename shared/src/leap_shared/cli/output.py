"""What a command line prints: results, versions and the state of the installation."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["drop_closed_stdout", "emit", "installation", "missing", "plain", "stdout_to_stderr", "version_line"]


def plain(value: Any, *, finite: bool = True) -> Any:
    """The value in JSON's types: tensors and arrays become numbers and lists, NaN and infinity null (if `finite`)."""
    if hasattr(value, "to_json"):
        return plain(value.to_json(), finite=finite)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name), finite=finite) for field in fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        keys = [key if isinstance(key, (str, int)) else str(key) for key in map(plain, value)]
        return {key: plain(item, finite=finite) for key, item in zip(keys, value.values(), strict=True)}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, finite=finite) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), finite=finite)
    if isinstance(value, float):
        return value if math.isfinite(value) or not finite else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def emit(result: object, *, as_json: bool) -> None:
    """Print what a verb returned on stdout; a table of rows leaves mappings inside them to `as_json`."""
    values = plain(result)
    if as_json:
        sys.stdout.write(json.dumps(values, indent=2, allow_nan=False) + "\n")
    elif isinstance(values, list) and values and all(isinstance(row, dict) for row in values):
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
        flat = [{key: value for key, value in row.items() if not isinstance(value, dict)} for row in values]
        table = Table(*dict.fromkeys(key for row in flat for key in row), header_style="bold")
        for row in flat:
            table.add_row(*(Text(_text(row.get(str(column.header), ""))) for column in table.columns))
        with console.capture() as captured:
            console.print(table)
        sys.stdout.write(captured.get())
    elif isinstance(values, dict):
        width = max(map(len, values), default=0)
        sys.stdout.writelines(f"{key:{width}}  {_text(value)}\n" for key, value in values.items())
    elif values is not None:
        sys.stdout.write(f"{_text(values)}\n")


def _text(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send everything written to stdout, by libraries and child processes too, to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def drop_closed_stdout() -> bool:
    """Whether it is stdout whose reader has gone; if so, nothing more will be written to it."""
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"\n")  # an unbuffered stdout has nothing left to flush
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "missing"


def version_line(name: str, package: str) -> str:
    """``leap-oper 0.1.0 (leap-shared 0.1.0, torch 2.6.0)``, from the installed metadata alone."""
    own, shared, torch = map(_version, (package.replace("_", "-"), "leap-shared", "torch"))
    return f"{name} {own} (leap-shared {shared}, torch {torch})"


def missing(distribution: str, extra: str) -> list[str]:
    """Distributions that `extra` of `distribution` asks for and that are not installed."""
    found = []
    for requirement in metadata.requires(distribution) or []:
        name, _, marker = requirement.partition(";")
        match = re.match(r"\s*([\w.-]+)\s*(?:\[([^]]*)\])?", name)
        if match and re.search(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]", marker):
            found += [match[1]] if _version(match[1]) == "missing" else []
            for inner in filter(None, (match[2] or "").split(",")):
                found += missing(match[1], inner.strip()) if _version(match[1]) != "missing" else []
    return found


def installation(package: str) -> dict[str, object]:
    """Versions, extras, devices and operator backends: what `info` prints."""
    from leap_shared.devices import available_devices

    own = package.replace("_", "-")
    rows: dict[str, object] = {name: _version(name) for name in dict.fromkeys((own, "leap-shared", "torch", "numpy"))}
    rows |= {"python": platform.python_version(), "platform": platform.platform(), "devices": available_devices()}
    for distribution in dict.fromkeys((own, "leap-shared")):
        if _version(distribution) == "missing":
            continue
        for extra in metadata.metadata(distribution).get_all("Provides-Extra") or []:
            absent = missing(distribution, extra)
            rows[f"{distribution}[{extra}]"] = f"missing {', '.join(absent)}" if absent else "present"
    try:
        from leap_shared.ops import backends
    except ImportError:
        return rows
    return rows | {"backends": backends()}
