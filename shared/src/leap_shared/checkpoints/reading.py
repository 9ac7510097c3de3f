"""Read weights without running anything that a file asks for, and match them with a model by name."""

from __future__ import annotations

import contextlib
import difflib
import logging
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from leap_shared import files
from leap_shared.errors import UserError

__all__ = ["Report", "load_into", "read", "rename", "unwrap", "write_safetensors"]

log = logging.getLogger(__name__)

ENVELOPES = ("model", "state_dict", "model_state_dict", "module", "net")
EMA_ENVELOPES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
MAGIC = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"version https://git-lfs": "a git-lfs pointer: fetch the real file with `git lfs pull`",
    b"<!doctype": "an HTML page: the download probably failed",
    b"<html": "an HTML page: the download probably failed",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"\x93NUMPY": "a NumPy array: read it with `numpy.load`",
    b"\x89HDF": "an HDF5 file",
}
MEANINGLESS = ("Weights only load failed", "Unsupported operand")
LEGACY_HEAD_STEPS = 3  # of the pickle that torch files before 1.6 begin with: protocol, magic number, stop
SCALAR = np.float64(0).__reduce__()[0]  # rebuilds a NumPy number from its bytes
DTYPES: list[type] = [np.dtype, *(type(np.dtype(letter)) for letter in "?bhilqBHILQefd")]
PLAIN_DATA: list[Any] = [
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((kind, f"{kind.__module__}.{kind.__name__}") for kind in DTYPES),
]


class StandIn:
    """Takes the place of a foreign class or function: whatever it is called with, it makes an empty dictionary.

    torch's reader fills items and attributes into no other mapping than a true OrderedDict, hence not a subclass.
    """

    def __new__(cls, *_: object, **__: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]  # makes no StandIn
        """Make an empty dictionary."""
        return OrderedDict()


def read(
    path: Path | str,
    *,
    sha256: str | None = None,
    map_location: str | torch.device = "cpu",
    skip_foreign: bool = False,
) -> Any:
    """Content of a .safetensors or torch file; nothing in the file is ever executed.

    Args:
        path: the file.
        sha256: refuse the file unless its SHA-256 is this.
        map_location: where the tensors go.
        skip_foreign: put an inert dictionary in place of every object whose class is not plain data (a config, say),
            instead of refusing the file; its items and attributes (`vars`) are kept. What was skipped is logged.

    Raises:
        UserError: the file is missing, damaged, of another type, of another checksum, or needs code to be unpickled.
    """
    path = Path(path)
    head = _head(path)
    if sha256 is not None and (found := files.sha256(path)) != sha256.lower():
        raise UserError(f"{path} has the sha256 {found}, expected {sha256.lower()}: download it again")
    for magic, kind in MAGIC.items():
        if head.lower().startswith(magic.lower()):
            raise UserError(f"{path} is no checkpoint but {kind}")
    if zipfile.is_zipfile(path):
        _refuse_other_archive(path)
    elif head[8:9] != b"{":
        _refuse_bare_pickle(path, complete=head[:1] != b"\x80")
    if re.fullmatch(rb"[\t\n\r -~]+", head):
        raise UserError(f"{path} is no checkpoint but text: give the file that holds the weights")
    if head[8:9] == b"{":
        try:
            return load_file(path, device=str(map_location))
        except Exception as error:
            raise UserError(f"{path} is not a whole safetensors file: download it again ({error})") from error
    return _read_torch(path, map_location, skip_foreign)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}. Give the path of a file") from error
    if not head:
        raise UserError(f"{path} is empty: download it again")
    return head


def _refuse_other_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError):
        return  # damaged: torch says how
    if names and all(name.endswith(".npy") for name in names):
        raise UserError(f"{path} is no checkpoint but a NumPy archive: read it with `numpy.load`")
    if not any(name.endswith("data.pkl") for name in names):
        raise UserError(f"{path} is no checkpoint but a zip archive of other files: unpack it first")


def _refuse_bare_pickle(path: Path, complete: bool) -> None:
    """Refuse what `pickle.dump` wrote, with the code that it wants to run; its instructions are read, never followed.

    Torch files of before 1.6 begin with a pickled number, which asks for nothing. `complete` takes only a whole pickle
    for one, as what does not begin with a pickle's mark may be anything.
    """
    wanted: set[str] = set()
    texts: list[str] = []
    memo: dict[int, str] = {}
    whole, count = False, 0
    with contextlib.suppress(Exception), path.open("rb") as file:
        for code, argument, _ in pickletools.genops(file):
            count += 1
            if code.name in ("GLOBAL", "INST"):
                wanted.add(str(argument).replace(" ", "."))
            elif code.name == "STACK_GLOBAL":
                wanted.add(".".join(texts[-2:]))
            elif code.name == "MEMOIZE":
                memo[len(memo)] = texts[-1] if texts else ""
            elif "PUT" in code.name:
                memo[int(argument or 0)] = texts[-1] if texts else ""
            elif "GET" in code.name:
                texts.append(memo.get(int(argument or 0), ""))
            elif isinstance(argument, str):
                texts.append(argument)
        whole = True
    if not whole and complete:
        return
    if foreign := _untrusted(wanted):
        raise UserError(
            f"{path} is a bare pickle and can only be read by running code of {', '.join(foreign)}, which is "
            "refused: ask its author for a file of plain tensors"
        )
    if whole and count > LEGACY_HEAD_STEPS:
        raise UserError(f"{path} is a bare pickle and no torch file: save it again with torch.save")


def _read_torch(path: Path, map_location: str | torch.device, skip_foreign: bool) -> Any:
    foreign: list[str] = []
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN_DATA):
            warnings.filterwarnings("ignore", message=r"Detected pickle protocol|.*TorchScript archive")
            if skip_foreign:
                foreign = _foreign(path)
            with torch.serialization.safe_globals([(StandIn, name) for name in foreign]), path.open("rb") as file:
                content = torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        code = wanted[1] if wanted else ", ".join(foreign)
        if "torchscript" in str(error).lower():
            code = "TorchScript"
        if code:
            way = "" if foreign or not wanted else ", or pass skip_foreign=True to leave such objects out"
            raise UserError(
                f"{path} can only be read by running code of {code}, which is refused: "
                f"ask its author for a file of plain tensors{way}{_reason(error)}"
            ) from error
        raise UserError(f"{path} is not a whole torch file: download it again{_reason(error)}") from error
    if foreign:
        log.warning("%s: skipped the code of %s, kept its plain data", path, ", ".join(foreign))
    return content


def _foreign(path: Path) -> list[str]:
    """Classes and functions that a torch file asks for and torch does not trust."""
    if zipfile.is_zipfile(path):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    with path.open("rb") as file:  # before torch 1.6: four pickles (magic number, protocol, system, content), then data
        steps = [step for _ in range(4) for step in pickletools.genops(file)]
    return _untrusted({str(argument).replace(" ", ".") for code, argument, _ in steps if code.name == "GLOBAL"})


def _untrusted(names: Iterable[str]) -> list[str]:
    trusted = {name for _, name in PLAIN_DATA}
    return sorted(name for name in set(names) - trusted if not name.startswith(("torch.", "collections.")))


def _reason(error: Exception) -> str:
    """The telling sentence of torch's many lines, in brackets; nothing where there is none."""
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    text = re.sub(r"\[enforce fail at [^]]*\][\s.:]*", "", text).strip()
    sentence = next(iter(text.splitlines()), "").partition(". ")[0]
    telling = re.search(r"[a-z]{2,} +[a-z]{2,}", sentence) and not sentence.startswith(MEANINGLESS)
    return f" ({sentence})" if telling else ""


def unwrap(content: Any, *, ema: bool = False) -> dict[str, Tensor]:
    """The flat {name: tensor} inside the usual envelopes, without the prefixes of DataParallel and torch.compile.

    Args:
        content: what `read` gave.
        ema: take the exponential moving average instead of the weights.

    Raises:
        UserError: there is no state dict inside, or no moving average where one was asked for.
    """
    if ema:
        keys = [key for key in EMA_ENVELOPES if isinstance(content, Mapping) and _tensors(content.get(key))]
        if not keys:
            raise UserError(f"the checkpoint holds no moving average ({_entries(content)}): leave ema out")
        content = content[keys[0]]
    state = _tensors(content)
    if not state:
        raise UserError(f"the checkpoint holds no tensors ({_entries(content)}): expected a state dict")
    for prefix in WRAPPER_PREFIXES * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _tensors(content: Any, levels: int = 4) -> dict[str, Tensor]:
    """Tensors of the first envelope that holds some, however nested, or else of `content` itself."""
    if not isinstance(content, Mapping):
        return {}
    for key in ENVELOPES if levels else ():
        if inner := _tensors(content.get(key), levels - 1):
            return inner
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _entries(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"it is a {type(content).__name__}"
    names = [str(name) for name in content]
    return f"its entries: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "it is empty"


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
        """One clause per kind of misfit: how many, the first names, and the missing name nearest to an unexpected."""
        near = [(name, difflib.get_close_matches(name, self.missing, n=1)) for name in self.unexpected[:5]]
        guesses = [f"{name} (did you mean {found[0]}?)" if found else name for name, found in near]
        shapes = [f"{name} is {given} in the file, {own} in the model" for name, given, own in self.mis_shaped[:5]]
        clauses = (
            _clause("missing", self.missing[:5], len(self.missing)),
            _clause("unexpected", guesses, len(self.unexpected)),
            _clause("mis-shaped", shapes, len(self.mis_shaped)),
        )
        return "; ".join(clause for clause in clauses if clause) or "everything fits"


def _clause(kind: str, shown: Sequence[str], count: int) -> str:
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return f"{count} {kind}: {', '.join(shown)}{more}" if count else ""


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
    """Write tensors as safetensors, atomically; shared and strided ones are written out in full.

    Raises:
        UserError: the disk is full, or the folder is missing or not writable; the former file stays as it was.
    """
    whole = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    with files.atomic_writer(path) as file:
        file.write(save(whole, dict(metadata) if metadata else None))
