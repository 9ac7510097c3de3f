"""Read weights without running anything that a file asks for, and match them with a model by name."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from leap_shared import files
from leap_shared.errors import UserError, did_you_mean

__all__ = ["Report", "load_into", "read", "rename", "unwrap", "write_safetensors"]

log = logging.getLogger(__name__)

ENVELOPES = ("model", "state_dict", "model_state_dict", "module", "net")
EMA_ENVELOPES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
MAGIC = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"version https://git-lfs": "a git-lfs pointer: fetch the real file with `git lfs pull`",
    b"<!DOCTYPE": "an HTML page: the download probably failed",
    b"<html": "an HTML page: the download probably failed",
    b"\x1f\x8b": "a gzip archive: unpack it first",
}


SCALAR = np.float64(0).__reduce__()[0]  # rebuilds a NumPy number from its bytes
PLAIN_DATA = [
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(letter)) for letter in "?bhilqBHILQefd"),
]


def read(path: Path | str, *, sha256: str | None = None, device: str = "cpu", skip_foreign: bool = False) -> Any:
    """Content of a .safetensors or torch file; nothing in the file is ever executed.

    Args:
        path: the file.
        sha256: refuse the file unless its SHA-256 is this.
        device: where the tensors go.
        skip_foreign: put an inert dictionary in place of every object whose class is not plain data (a config, say),
            instead of refusing the file.

    Raises:
        UserError: the file is missing, damaged, of another type, of another checksum, or needs code to be unpickled.
    """
    path = Path(path)
    head = _head(path)
    if sha256 is not None and (found := files.sha256(path)) != sha256.lower():
        raise UserError(f"{path} has the sha256 {found}, expected {sha256.lower()}: download it again")
    if path.suffix == ".safetensors":
        try:
            return load_file(path, device=device)
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}): download it again") from error
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            raise UserError(f"{path} is no checkpoint but {kind}")
    return _read_torch(path, device, skip_foreign)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    if not head:
        raise UserError(f"{path} is empty: download it again")
    return head


def _read_torch(path: Path, device: str, skip_foreign: bool) -> Any:
    allowed: list[Any] = list(PLAIN_DATA)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            if skip_foreign and zipfile.is_zipfile(path):
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                torch.serialization.add_safe_globals([(OrderedDict, name) for name in names])
                if names:
                    log.warning("%s: only the plain data of %s is read, no code", path, ", ".join(sorted(names)))
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path} can only be read by running code of {wanted[1].rstrip('.')}, which is refused: ask its author "
                "for a file of plain tensors, or pass skip_foreign=True to read the tensors and leave such objects out"
            ) from error
        raise UserError(f"{path} is not a whole torch file: download it again ({_first_line(error)})") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a whole torch file: download it again ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def unwrap(content: Any, *, ema: bool = False) -> dict[str, Tensor]:
    """The flat {name: tensor} inside the usual envelopes, without the prefixes of DataParallel and torch.compile.

    Args:
        content: what `read` gave.
        ema: take the exponential moving average instead of the weights.

    Raises:
        UserError: there is no state dict inside, or no moving average where one was asked for.
    """
    if ema:
        keys = [key for key in EMA_ENVELOPES if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
        if not keys:
            raise UserError(f"the checkpoint holds no moving average ({_entries(content)}): leave ema out")
        content = content[keys[0]]
    while isinstance(content, Mapping):
        inner = [key for key in ENVELOPES if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = content[inner[0]]
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        raise UserError(f"the checkpoint holds no tensors ({_entries(content)}): expected a state dict")
    for prefix in WRAPPER_PREFIXES * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _entries(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"it is a {type(content).__name__}"
    return f"its entries: {_some(content)}" if content else "it is empty"


def rename(state: Mapping[str, Tensor], table: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Rename entries by an ordered table of (regular expression, replacement); every row is applied to every name.

    Raises:
        UserError: two entries would get the same name.
    """
    rows = [(re.compile(pattern), replacement) for pattern, replacement in table]
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for old, value in state.items():
        name = old
        for pattern, replacement in rows:
            name = pattern.sub(replacement, name)
        if name in renamed:
            raise UserError(f"{origin[name]!r} and {old!r} would both be renamed to {name!r}: mend the table")
        renamed[name], origin[name] = value, old
    return renamed


@dataclass(frozen=True)
class Report:
    """How a state dict fits a model: names that one of them lacks, and (name, in the file, in the model) shapes."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mis_shaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def fits(self) -> bool:
        """Whether every entry has its place."""
        return not (self.missing or self.unexpected or self.mis_shaped)

    def __str__(self) -> str:
        """One line per kind of misfit."""
        lines = []
        if self.missing:
            lines.append(f"{len(self.missing)} missing: {_some(self.missing)}")
        near = {name: did_you_mean(name, self.missing) for name in self.unexpected[:5]}
        lines += [f"unexpected {name}: {text}".rstrip(": ") for name, text in near.items()]
        if len(self.unexpected) > 5:
            lines.append(f"{len(self.unexpected)} unexpected in all")
        lines += [f"{name} is {given} in the file, {own} in the model" for name, given, own in self.mis_shaped[:5]]
        if len(self.mis_shaped) > 5:
            lines.append(f"{len(self.mis_shaped)} mis-shaped in all")
        return "; ".join(lines) or "everything fits"


def _some(names: Iterable[Any], limit: int = 5) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> Report:
    """Load what fits by name and shape, and report the rest.

    Raises:
        UserError: `strict` and something does not fit; then the model is left as it was.
    """
    own = model.state_dict()
    report = Report(
        missing=tuple(name for name in own if name not in state),
        unexpected=tuple(name for name in state if name not in own),
        mis_shaped=tuple(
            (name, tuple(value.shape), tuple(own[name].shape))
            for name, value in state.items()
            if name in own and value.shape != own[name].shape
        ),
    )
    if strict and not report.fits:
        raise UserError(f"the checkpoint does not fit {type(model).__name__}: {report}")
    wrong = {name for name, _, _ in report.mis_shaped}
    model.load_state_dict({k: v for k, v in state.items() if k in own and k not in wrong}, strict=False)
    return report


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically; shared and strided ones are written out in full."""
    whole = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    with files.atomic_writer(path) as file:
        file.write(save(whole, dict(metadata) if metadata else None))
