"""Checkpoints of a run: everything that the next step depends on, whole on disk, and restored to the same bits."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leap_shared import files
from leap_shared.errors import UserError

__all__ = ["CheckpointFolder", "check_finite"]

log = logging.getLogger(__name__)
NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")
ARRAY, GLOBAL_RNG = "__ndarray__", "__rng__"
REMEDY = "lower the learning rate or clip the gradients"


class CheckpointFolder:
    """The newest `keep` checkpoints of one run.

    Each is a torch file that ``torch.load(..., weights_only=True)`` reads; its name carries its step and checksum.
    A run killed at any moment, also while saving, resumes from the newest whole one. One process saves into a folder
    at a time.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        if keep < 1:
            raise UserError(f"keep={keep}: at least one checkpoint must be kept")
        self.path = Path(path)
        self.keep = keep
        self._lock: int | None = None

    def save(self, step: int, objects: Mapping[str, Any]) -> Path:
        """Save the state after `step` steps; older checkpoints go once this one is safe.

        Args:
            step: steps done.
            objects: by name, whatever has a `state_dict`, generators of torch or NumPy, tensors and plain values. The
                global generators of Python, NumPy, torch and CUDA are always saved too.

        Raises:
            UserError: the disk is full, the folder is not writable or in use or holds a later step, or an object cannot
                be saved or has a tensor that is not finite (arrays and plain numbers may be anything).
        """
        if self._lock is None:
            self._open()
        later = [path for path in self._newest_first() if _step(path) > step]
        for path in later:
            if _whole(path):
                raise UserError(f"{path} is later than step {step}: restore it first, or give another --out")
        buffer = io.BytesIO()
        content = {name: _capture(value, name) for name, value in objects.items()}
        for name, value in _tensors(content):
            if not _is_finite(value):
                raise UserError(f"{name} is not finite at step {step}, {self.last_good()}: {REMEDY}")
        torch.save({"step": step, "objects": content, GLOBAL_RNG: _encode(_global_rng(), GLOBAL_RNG)}, buffer)
        payload = buffer.getbuffer()
        target = self.path / f"step-{step:012d}-{hashlib.sha256(payload).hexdigest()[:16]}.pt"
        with files.atomic_writer(target) as file:
            file.write(payload)
        older = [path for path in self._newest_first() if path != target and path not in later]
        for path in [*older[self.keep - 1 :], *later]:  # the later ones are damaged
            path.unlink(missing_ok=True)
        return target

    def latest(self) -> Path | None:
        """The newest checkpoint whose checksum is right; None where there is none."""
        for path in self._newest_first():
            if _whole(path):
                return path
            log.warning("%s is damaged: going back to the checkpoint before it", path)
        return None

    def last_good(self) -> str:
        """Clause for a complaint: where a run that has gone wrong can be taken up again."""
        last = self.latest()
        return f"the last good checkpoint is {last}" if last else "no checkpoint was saved before it"

    def restore(self, objects: MutableMapping[str, Any]) -> int | None:
        """Put everything back as it was saved and return the step; None where there is no checkpoint.

        Objects are restored in place; plain values are replaced in `objects`.

        Raises:
            UserError: the checkpoint was made with other objects.
        """
        path = self.latest()
        if path is None:
            return None
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["objects"].keys() != objects.keys():
            names = sorted(saved["objects"].keys() ^ objects.keys())
            raise UserError(
                f"{path} was saved by a run of other settings (they differ in {', '.join(names)}): use them"
            )
        for name, value in saved["objects"].items():
            objects[name] = _restore(objects[name], _decode(value), f"{name} in {path}")
        _set_global_rng(_decode(saved[GLOBAL_RNG]))
        return int(saved["step"])

    def close(self) -> None:
        """Let another process save here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _newest_first(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        found = [path for path in self.path.iterdir() if NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)

    def _open(self) -> None:
        """Take the folder for this process and sweep out what killed processes left half-written."""
        files.ensure_folder(self.path)
        with contextlib.suppress(ImportError):  # Windows has no fcntl: there two runs must not share a folder
            import fcntl

            lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR)
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    os.close(lock)
                    raise UserError(f"another run saves its checkpoints in {self.path}: give another --out") from error
                log.warning("%s cannot be locked: do not let two runs save there", self.path)
            self._lock = lock
        for leftover in self.path.glob(f".step-*{files.TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _whole(path: Path) -> bool:
    return files.sha256(path).startswith(path.stem.rpartition("-")[2])


def check_finite(loss: float | Tensor, step: int, folder: CheckpointFolder | None = None) -> None:
    """Stop a run whose loss is NaN or infinite.

    Raises:
        UserError: naming the step, and the last good checkpoint where there is one.
    """
    value = float(loss.detach() if isinstance(loss, Tensor) else loss)
    if math.isfinite(value):
        return
    kept = f", {folder.last_good()}" if folder is not None else ""
    raise UserError(f"the loss is {value} at step {step}{kept}: {REMEDY}")


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of encoded objects by their dotted names; not those that stand for arrays."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}[{index}]")
    elif isinstance(value, dict) and ARRAY not in value:
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))


def _is_finite(value: Tensor) -> bool:
    if not (value.is_floating_point() or value.is_complex()) or value.layout is not torch.strided:
        return True
    wide = value.float() if value.itemsize == 1 else value  # torch has no isfinite for eight bits
    return bool(wide.isfinite().all())


def _capture(value: Any, name: str) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return _encode(value.bit_generator.state, name)
    return _encode(value.state_dict() if hasattr(value, "state_dict") else value, name)


def _restore(own: Any, saved: Any, name: str) -> Any:
    """Restore `own` in place, or return what takes its place."""
    try:
        if isinstance(own, torch.Generator):
            own.set_state(saved)
        elif isinstance(own, np.random.Generator):
            own.bit_generator.state = saved
        elif hasattr(own, "load_state_dict"):
            own.load_state_dict(saved)
        elif isinstance(own, Tensor):
            if not isinstance(saved, Tensor) or (own.shape, own.dtype) != (saved.shape, saved.dtype):
                raise ValueError(f"expected {own.dtype} of shape {tuple(own.shape)}")
            with torch.no_grad():
                own.copy_(saved)
        else:
            return saved
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name} does not fit this run of other settings: {' '.join(str(error).split())}") from error
    return own


def _encode(value: Any, name: str) -> Any:
    """`value` in the types that torch loads without unpickling code."""
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        unsigned = value.dtype.kind == "u" and value.dtype.itemsize > 1
        plain = value.view(f"i{value.dtype.itemsize}") if unsigned else value
        if value.dtype.kind in "biufc":
            return {ARRAY: torch.from_numpy(plain.copy()), "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        return {_encode(key, name): _encode(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        kind = list if isinstance(value, list) else tuple
        return kind([_encode(item, f"{name}[{i}]") for i, item in enumerate(value)])
    raise UserError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: give its state as plain data")


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if ARRAY in value:
            return value[ARRAY].numpy().view(value["dtype"])
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_decode(item) for item in value])
    return value


def _global_rng() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    legacy = np.random.get_state()  # noqa: NPY002 - other people's code draws from it
    return {"python": random.getstate(), "numpy": legacy, "torch": torch.get_rng_state(), "cuda": cuda}


def _set_global_rng(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002 - other people's code draws from it
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) != (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        log.warning("this machine has another number of GPUs: their random numbers start anew")
    elif states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
