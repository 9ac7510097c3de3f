"""What every generation of data needs: live progress, checkpoints, files in both formats, and a manifest of them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata as installed
from pathlib import Path
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from leap_shared.checkpoints import CheckpointFolder, check_finite, write_safetensors
from leap_shared.errors import UserError
from leap_shared.files import sha256, write_json
from leap_shared.offline.d4rl import write_d4rl
from leap_shared.offline.minari import write_minari
from leap_shared.offline.transitions import FIELDS, Transitions

__all__ = ["FORMATS", "MANIFEST", "WORK", "DataFiles", "Meter", "Store", "check_formats", "finished", "silent"]

Format = Literal["d4rl", "minari"]
FORMATS: tuple[Format, ...] = get_args(Format)
MANIFEST, WORK = "manifest.json", "work"
REPORT_SECONDS = 1.0


def silent(_done: int, _text: str) -> None:
    """Progress that nobody asked for."""


def check_formats(formats: Sequence[str]) -> None:
    """Raise UserError where there is none, an unknown one, or one whose writer is not installed."""
    if not formats or not set(formats) <= set(FORMATS):
        raise UserError(f"formats are {', '.join(formats) or 'empty'}: choose from {', '.join(FORMATS)}")
    if "minari" in formats and importlib.util.find_spec("minari") is None:
        raise UserError('Minari files need minari: pip install "leap-shared[minari]", or leave out that format')


def finished(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest that lies in the folder, whose files are as it says; None where there is none.

    Raises:
        UserError: it is of other settings, or a file was changed.
    """
    path = out / MANIFEST
    if not path.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, files = manifest["settings"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it or give another folder") from error
    if different := [key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)]:
        names = ", ".join(sorted(different))
        raise UserError(f"{out} holds data of other settings (they differ in {names}): give another folder")
    for name, entry in files.items():
        if sha256(out / name) != entry["sha256"]:
            raise UserError(f"{out / name} is not what {MANIFEST} says: delete {MANIFEST} to make the files again")
    return manifest


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("leap-shared", "torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics"):
        with contextlib.suppress(installed.PackageNotFoundError):
            versions[name] = installed.version(name)
    return versions


class Meter:
    """Reports now and then how many steps were done, how fast, and how long the rest will take at most."""

    def __init__(
        self, phase: str, total: int, done: int, progress: Callable[[int, str], object], updates: int = 0
    ) -> None:
        self._phase, self._total, self._progress = phase, total, progress
        self._first, self._begin, self._first_updates = done, time.monotonic(), updates
        self._reported, self._time = 0, self._begin
        self.word = ""
        self.report(done, updates)

    def report(self, done: int, updates: int = 0, *, now: bool = True) -> None:
        """Tell that `done` steps and `updates` updates are done; unless `now`, only where a second has passed."""
        moment = time.monotonic()
        if not now and moment - self._time < REPORT_SECONDS:
            return
        text, seconds = f"{self._phase} {done}/{self._total}{self.word}", moment - self._begin
        if (new := done - self._first) and seconds:
            rate = f", {(updates - self._first_updates) / seconds:.0f} updates/s" if updates else ""
            text += f"{rate}, {new / seconds:.0f} steps/s, {(self._total - done) * seconds / new:.0f} s left"
        self._progress(done - self._reported, text)
        self._reported, self._time = done, moment


class _Settings:
    """Plain values that a checkpoint must agree with; saved first, so that nothing is restored where it does not."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def state_dict(self) -> dict[str, Any]:
        return self._values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if different := [key for key in self._values.keys() | state.keys() if self._values.get(key) != state.get(key)]:
            raise ValueError(f"they differ in {', '.join(sorted(different))}")


class Store:
    """Checkpoints of one part of a generation, which is not gone on with by a call of other settings.

    Raises:
        UserError: the folder is of other settings, or in use.
    """

    def __init__(self, path: Path, settings: dict[str, Any], objects: dict[str, Any]) -> None:
        self._folder = CheckpointFolder(path)
        self.objects = {"settings": _Settings(settings), **objects}
        self.save(self._folder.restore(self.objects) or 0)  # from here on the folder is this process's own

    def save(self, step: int) -> None:
        """Save the objects as they are."""
        self._folder.save(step, self.objects)

    def check_finite(self, loss: Any, step: int) -> None:
        """See `leap_shared.checkpoints.check_finite`."""
        check_finite(loss, step, self._folder)

    def close(self) -> None:
        """Let go of the folder."""
        self._folder.close()


class DataFiles:
    """Files of one generation in `out`, and what its manifest says of them.

    Args:
        out: folder.
        environment: name, which the files begin with.
        spec: gymnasium's, for Minari to remember.
        formats: some of `FORMATS`.
    """

    def __init__(self, out: Path, environment: str, spec: Any, formats: Sequence[str]) -> None:
        self.out, self.environment, self.spec, self.formats = out.resolve(), environment, spec, formats
        self.name = environment.replace("/", "-")
        self.entries: dict[str, dict[str, Any]] = {}

    def write(self, level: str, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Write one data set in every format; `metadata` goes into the HDF5 file."""
        data = Transitions.from_arrays(*(arrays[key] for key in FIELDS))
        summary = data.summary()
        said = {"rows": summary.rows, "episodes": summary.episodes, "returns": summary.returns}
        said |= {"lengths": summary.lengths}
        if "d4rl" in self.formats:
            path = self.out / f"{self.name}-{level}.hdf5"
            write_d4rl(path, arrays, {"environment": self.environment, "level": level, **metadata})
            self._note(path, {"level": level, "format": "d4rl", **said})
        if "minari" in self.formats:
            identifier, root = f"{self.name}/{level}-v0", self.out / "minari"
            shutil.rmtree(root / identifier, ignore_errors=True)  # of a call that was killed
            folder = write_minari(identifier, data, self.spec, root=root)
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                self._note(path, {"level": level, "format": "minari", **said})

    def write_policy(self, level: str, algorithm: str, policy: Mapping[str, Any]) -> None:
        """Write the weights `policy["policy"]`, with its step and return."""
        path = self.out / f"{self.name}-{level}-policy.safetensors"
        said = {"algorithm": algorithm, "step": policy["step"], "return": policy["return"]}
        text = json.dumps({"environment": self.environment, **said})  # several entries would have no fixed order
        write_safetensors(path, policy["policy"], {"policy": text})
        self._note(path, {"level": level, "format": "safetensors", **said})

    def finish(self, settings: Mapping[str, Any], result: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
        """Write the manifest, and unless `keep` remove the folder of the work."""
        manifest = {
            "settings": dict(settings),
            "environment": {"id": self.spec.id, "max_episode_steps": self.spec.max_episode_steps},
            "versions": _versions(),
            **result,
            "files": self.entries,
        }
        write_json(self.out / MANIFEST, manifest)
        if not keep:
            shutil.rmtree(self.out / WORK)
        return manifest

    def _note(self, path: Path, said: Mapping[str, Any]) -> None:
        name = path.relative_to(self.out).as_posix()
        self.entries[name] = {"sha256": sha256(path), "bytes": path.stat().st_size, **said}
