"""The authors' .npy files of weights: pickles of dictionaries of arrays, read without running anything in them."""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from leap_shared.errors import UserError

__all__ = ["MAGIC", "Released", "read_npy", "read_released"]

MAGIC = b"\x93NUMPY"
FILE_NAME = re.compile(r"(?P<td_type>[^_]+)_(?P<adv_type>[^_]+)_nstep=(?P<n_step>\d+)_.*_(?P<env>[^_]+)_(?P<seed>\d+)")
NUMBERS = re.compile(r"\?|[bhilqBHILQefd]|[biuf][1248]")
MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core._multiarray_umath")
NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")


class Released(NamedTuple):
    """What a file holds: "weights" or "advantages" per iteration, or "returns" (one line of them)."""

    kind: str
    values: Float64[np.ndarray, "lines rows"]
    meta: dict[str, Any]


class _Dtype:
    """Stands for a dtype of the file: a code such as f8 and a byte order."""

    def __init__(self, code: str) -> None:
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]
        if any(part is not None for part in state[2:5]):
            raise ValueError("arrays with fields or sub-arrays")

    @property
    def is_object(self) -> bool:
        return self._code in ("O", "O4", "O8")

    def dtype(self) -> np.dtype[Any]:
        if not NUMBERS.fullmatch(self._code) or self._order not in ("<", ">", "|", "="):
            raise ValueError(f"arrays of dtype {self._order}{self._code}")
        return np.dtype(self._order + self._code)


class _Array:
    """Stands for an array of the file, which is made once all of it is read and checked."""

    def __init__(
        self, dtype: _Dtype | None = None, raw: Any = None, shape: tuple[int, ...] = (), *, fortran: bool = False
    ) -> None:
        self._dtype, self._raw, self._shape, self._fortran = dtype, raw, shape, fortran

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._shape, self._dtype, self._fortran, self._raw = state[-4:]

    def array(self) -> NDArray[Any]:
        if not isinstance(self._dtype, _Dtype):
            raise ValueError("arrays without a dtype")
        if self._dtype.is_object:
            items = np.empty(len(self._raw), dtype=object)
            for i, item in enumerate(self._raw):
                items[i] = _plain(item)
            return items.reshape(self._shape)
        raw = self._raw.encode("latin1") if isinstance(self._raw, str) else self._raw
        dtype = self._dtype.dtype()
        flat = np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="))
        return flat.reshape(self._shape, order="F" if self._fortran else "C")


def _plain(value: Any, made: dict[int, Any] | None = None) -> Any:
    """`value` with arrays and NumPy scalars in the place of what stands for them; what is shared is made once."""
    made = {} if made is None else made
    if id(value) in made:
        return made[id(value)]
    found = value
    if isinstance(value, _Array):
        array = value.array()
        found = array if array.ndim else array[()]
    elif isinstance(value, dict):
        found = {_plain(key, made): _plain(item, made) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        found = type(value)(_plain(item, made) for item in value)
    made[id(value)] = found
    return found


def _allowed() -> dict[str, Any]:
    """What a file may name. Made anew for each file, since a pickle can set attributes of the functions it gets."""

    def dtype(code: str, *_: object) -> _Dtype:
        return _Dtype(code)

    def reconstruct(*_: object) -> _Array:
        return _Array()

    def scalar(kind: _Dtype, raw: Any) -> _Array:
        return _Array(kind, raw)

    def from_buffer(raw: Any, kind: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
        return _Array(kind, raw, shape, fortran=order == "F")

    def encode(text: str, *_: object) -> bytes:  # how bytes are written for Python 2
        return text.encode("latin1")

    def no_bytes() -> bytes:
        return b""

    names: dict[str, Any] = {"numpy.ndarray": "ndarray", "numpy.dtype": dtype, "_codecs.encode": encode}
    for module in MULTIARRAY:
        names |= {f"{module}._reconstruct": reconstruct, f"{module}.scalar": scalar}
    names |= {f"{module}._frombuffer": from_buffer for module in NUMERIC}
    for module in ("builtins", "__builtin__"):
        names |= {f"{module}.set": set, f"{module}.frozenset": frozenset, f"{module}.bytes": no_bytes}
    return names | {"collections.OrderedDict": OrderedDict}


class _Unpickler(pickle.Unpickler):
    """Builds plain containers, numbers, texts and what stands for arrays; refuses every other name."""

    def __init__(self, file: IO[bytes], refuse: Callable[[str], UserError]) -> None:
        super().__init__(file, encoding="latin1")  # the only one in which Python 2 wrote arrays
        self._names, self._refuse = _allowed(), refuse

    def find_class(self, module: str, name: str) -> Any:
        """Stand-in for a global of the file."""
        if f"{module}.{name}" not in self._names:
            raise self._refuse(f"{module}.{name}")
        return self._names[f"{module}.{name}"]


def read_npy(path: Path) -> Any:
    """Content of an .npy file: an array, or the plain containers, numbers and arrays that were pickled into one.

    No global of the file is ever imported or called: dtypes and arrays are rebuilt from their bytes, as NumPy 1 and 2
    and Python 2 and 3 name them, and only if they hold numbers.

    Raises:
        UserError: the file cannot be read, is damaged, or names anything else.
    """
    path = Path(path)

    def refuse(name: str) -> UserError:
        return UserError(f"{path} can only be read by running {name}, which is refused: ask for a file of plain arrays")

    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Reading `.npy` or `.npz` file required additional header")
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            _, _, dtype = read_header[version](file)
            if not dtype.hasobject:
                file.seek(0)
                return np.load(file, allow_pickle=False)
            content = _plain(_Unpickler(file, refuse).load())
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Give the path of a file that you may read") from error
    except Exception as error:
        raise UserError(f"{path} is not a whole .npy file of numbers: {' '.join(str(error).split())}") from error
    return content.item() if isinstance(content, np.ndarray) and content.size == 1 else content


def _line(value: Any, path: Path, name: str) -> NDArray[np.float64]:
    if not isinstance(value, np.ndarray):
        raise UserError(f"{path}: {name} is a {type(value).__name__}, expected an array of numbers (rows, 1)")
    array: NDArray[Any] = value
    if array.dtype.kind not in "fiu" or not array.size or array.size != array.shape[0]:
        raise UserError(f"{path}: {name} has shape {array.shape} and dtype {array.dtype}, expected numbers (rows, 1)")
    return array.reshape(-1).astype(np.float64)


def read_released(path: Path) -> Released:
    """Weights of the iterations {"iter": K, 1: (rows, 1), ...}, older advantages {step: {"adv": ...}}, or returns.

    Raises:
        UserError: as :func:`read_npy`, or the file holds none of these.
    """
    path = Path(path)
    content = read_npy(path)
    meta: dict[str, Any] = {"source": path.name}
    if isinstance(content, np.ndarray) and content.ndim:
        return Released("returns", _line(content, path, "the array")[None], meta)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dictionary of weights or an array")
    if named := FILE_NAME.fullmatch(path.stem):
        facts = named.groupdict()
        meta |= {"seeds": [int(facts.pop("seed"))], "n_step": int(facts.pop("n_step")), **facts}
    old = [key for key, value in content.items() if isinstance(value, dict) and "adv" in value]
    if old:
        return Released("advantages", _line(content[max(old)]["adv"], path, "adv")[None], meta)
    lines: list[NDArray[np.float64]] = []
    while len(lines) + 1 in content:
        lines.append(_line(content[len(lines) + 1], path, f"iteration {len(lines) + 1}"))
    if not lines or len({len(line) for line in lines}) > 1:
        raise UserError(
            f"{path} has the keys {', '.join(map(repr, content))} with {[len(line) for line in lines]} rows, "
            "expected weights of equal length under 1, 2, ..."
        )
    settings = {"first_steps": "first_eval_steps", "steps": "eval_steps"}
    meta |= {ours: int(content[theirs]) for ours, theirs in settings.items() if theirs in content}
    return Released("weights", np.stack(lines), meta)
