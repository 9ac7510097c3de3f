"""Minari data sets: read with h5py alone, written through minari."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leap_shared.errors import UserError, did_you_mean
from leap_shared.files import ensure_folder
from leap_shared.offline.d4rl import opened
from leap_shared.offline.transitions import Transitions, checked

__all__ = ["minari_ids", "read_minari", "write_minari"]

ROOT = "MINARI_DATASETS_PATH"
FILE = Path("data", "main_data.hdf5")
IDENTIFIER = re.compile(r"([\w-]{2,}(/[\w-]+)*/)?[\w-]+-v\d+")


def read_minari(
    id_or_path: Path | str,
    root: Path | str | None = None,
    *,
    keys: Sequence[str] | None = None,
    max_action: float = 1.0,
    progress: Callable[[int], object] | None = None,
) -> Transitions:
    """Transitions of a Minari data set: every recorded step, the last one of an episode with its true successor.

    An episode that stops without termination counts as cut by time.

    Args:
        id_or_path: "mujoco/hopper/expert-v0" (without version the newest), its folder, or its main_data.hdf5.
        root: folder of the data sets; None is the environment variable MINARI_DATASETS_PATH, or else Minari's own.
        keys: entries of Dict observations, in the order in which they are concatenated; "a/b" for nested ones.
        max_action: largest action allowed.
        progress: called with the number of steps after each episode.

    Raises:
        UserError: there is no such data set, its format is not HDF5, Dict observations come without `keys` or plain
            ones with them, or an array is damaged; the message names file, key, and row or episode.
    """
    path = _file(id_or_path, root)
    try:
        with opened(path) as file, np.errstate(over="ignore"):
            rows, final, successors = _read_episodes(file, keys, progress)
        return Transitions(**checked(rows, max_action), jump_rows=final, jump_observations=successors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def minari_ids(root: Path | str | None = None) -> list[str]:
    """Identifiers of the data sets in a folder (None as in :func:`read_minari`)."""
    folder = _folder(root)
    return sorted(path.parents[1].relative_to(folder).as_posix() for path in folder.glob(f"**/{FILE.as_posix()}"))


def _folder(root: Path | str | None) -> Path:
    return Path(root or os.environ.get(ROOT) or Path("~", ".minari", "datasets")).expanduser().resolve()


def _file(id_or_path: Path | str, root: Path | str | None) -> Path:
    given = Path(id_or_path).expanduser()
    for path in (given, given / FILE.name, given / FILE):
        if path.is_file():
            return path
    name, folder, known = str(id_or_path), _folder(root), minari_ids(root)
    versions = [entry for entry in known if name in (entry, entry.rpartition("-v")[0])]
    if versions:
        return folder / max(versions, key=lambda entry: int(entry.rpartition("-v")[2])) / FILE
    for path in (given, folder / given):
        if (path / "metadata.json").is_file() or (path / "data" / "metadata.json").is_file():
            raise UserError(f"{path} has no {FILE}: only Minari's format hdf5 is read")
    raise UserError(f"there is no Minari data set {name!r} in {folder}: {did_you_mean(name, known) or 'it is empty'}")


def _read_episodes(
    file: Any, keys: Sequence[str] | None, progress: Callable[[int], object] | None
) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64], NDArray[np.float32]]:
    """Arrays of all steps, the last row of each episode, and the observation after it."""
    found = [name for name in file if re.fullmatch(r"episode_\d+", name)]
    names = sorted(found, key=lambda name: int(name.removeprefix("episode_")))
    lengths = np.array([len(_array(file, f"{name}/rewards")) for name in names], np.int64)
    names, lengths = [name for name, length in zip(names, lengths, strict=True) if length], lengths[lengths > 0]
    if not names:
        raise UserError("there is no episode with steps: expected groups episode_0, episode_1, ...")
    columns = _observation_columns(file, f"{names[0]}/observations", keys)
    total, width = int(lengths.sum()), columns[-1][1].stop
    actions_shape = _matrix(_array(file, f"{names[0]}/actions"))[1]
    rows: dict[str, NDArray[Any]] = {
        "observations": np.empty((total, width), np.float32),
        "actions": np.empty((total, actions_shape), np.float32),
        "rewards": np.empty(total, np.float32),
        "terminals": np.empty(total, bool),
        "timeouts": np.empty(total, bool),
    }
    successors = np.empty((len(names), width), np.float32)
    final = np.cumsum(lengths) - 1
    for episode, (name, steps, last) in enumerate(zip(names, lengths.tolist(), final.tolist(), strict=True)):
        part = slice(last + 1 - steps, last + 1)
        for key, place in columns:
            states = _values(file, f"{name}/observations{key}", (steps + 1, place.stop - place.start))
            rows["observations"][part, place], successors[episode, place] = states[:-1], states[-1]
        rows["actions"][part] = _values(file, f"{name}/actions", (steps, actions_shape))
        for key, stored in (("rewards", "rewards"), ("terminals", "terminations"), ("timeouts", "truncations")):
            rows[key][part] = _values(file, f"{name}/{stored}", (steps, 1))[:, 0]
        if progress is not None:
            progress(steps)
    if not (finite := np.isfinite(successors).all(axis=1)).all():
        raise UserError(
            f"observations is NaN or infinite in float32 in the last state of {names[int(finite.argmin())]}"
        )
    rows["timeouts"][final] = True
    rows["timeouts"] &= ~rows["terminals"]
    return rows, final, successors


def _observation_columns(file: Any, place: str, keys: Sequence[str] | None) -> list[tuple[str, slice]]:
    """For each array of an observation its path below `place` and its columns."""
    if place not in file:
        raise UserError(f"there is no {place}")
    widths: dict[str, int] = {}
    if hasattr(file[place], "shape"):
        if keys is not None:
            raise UserError(f"keys are {list(keys)}, but the observations are one array: leave keys out")
        widths[""] = _matrix(file[place])[1]
    else:
        known: dict[str, int] = {}
        file[place].visititems(
            lambda key, item: known.update({key: _matrix(item)[1]} if hasattr(item, "shape") else {})
        )
        listed = ", ".join(f"{key} ({width} wide)" for key, width in known.items())
        if not keys:
            raise UserError(f"the observations are a Dict of {listed}: choose with keys which to concatenate, in order")
        for key in keys:
            if key not in known:
                raise UserError(f"the observations have no entry {key!r}, they are a Dict of {listed}")
            widths[f"/{key}"] = known[key]
    stops = np.cumsum(list(widths.values()))
    return [
        (key, slice(int(stop) - width, int(stop))) for (key, width), stop in zip(widths.items(), stops, strict=True)
    ]


def _array(file: Any, place: str) -> Any:
    try:
        array = file[place]  # looked up once: a file of many short episodes is all look-ups
    except KeyError as error:
        raise UserError(f"{place} is missing") from error
    if not hasattr(array, "dtype"):
        raise UserError(f"{place} is a Dict of {', '.join(array)}: expected an array")
    if array.dtype.kind not in "fiub":
        raise UserError(f"{place} holds {array.dtype}, expected numbers")
    return array


def _matrix(array: Any) -> tuple[int, int]:
    """Shape of an array as (rows, width)."""
    if array.ndim not in (1, 2):
        raise UserError(f"{array.name} has shape {array.shape}, expected (rows, width)")
    return len(array), array.shape[1] if array.ndim == 2 else 1


def _values(file: Any, place: str, shape: tuple[int, int]) -> NDArray[Any]:
    array = _array(file, place)
    if _matrix(array) != shape:
        raise UserError(f"{place} has shape {array.shape}, expected {shape}")
    values: NDArray[Any] = array[()].reshape(shape)
    return values


def write_minari(
    dataset_id: str,
    data: Transitions,
    environment: Any = None,
    *,
    root: Path | str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write transitions as a Minari data set, whole or not at all.

    Args:
        dataset_id: for example "mujoco/hopper/medium-replay-v0".
        data: episodes, cut where `data.ends` is.
        environment: gymnasium's id, spec or environment, to be stored as the place to evaluate in.
        root: as in :func:`read_minari`.
        metadata: keyword arguments of minari's `create_dataset_from_buffers`: author, author_email, algorithm_name,
            code_permalink, description, ref_min_score, ref_max_score, requirements.

    Returns:
        The folder of the data set.

    Raises:
        UserError: minari is missing, the identifier is malformed or taken, or the folder is not writable.
    """
    try:
        import gymnasium
        import minari
        from minari.data_collector import EpisodeBuffer
    except ImportError as error:
        raise UserError(f'writing Minari data needs {error.name}: pip install "leap-shared[minari]"') from error
    if not IDENTIFIER.fullmatch(dataset_id):
        raise UserError(f"{dataset_id!r} is no Minari identifier: expected name-v0 or namespace/name-v0")
    folder = ensure_folder(_folder(root))
    if (target := folder / dataset_id).exists():
        raise UserError(f"{target} exists: raise the version of the identifier, or remove it")
    following, stops = data.next_observations, np.flatnonzero(data.ends)
    episodes = []
    for number, (first, stop) in enumerate(zip(np.append(0, stops[:-1] + 1), stops, strict=True)):
        part = slice(first, stop + 1)
        terminations, truncations = data.terminals[part], np.zeros(stop + 1 - first, bool)
        truncations[-1] = not terminations[-1]
        observations = np.concatenate([data.observations[part], following[stop : stop + 1]])
        arrays = {"observations": observations, "actions": data.actions[part], "rewards": data.rewards[part]}
        episodes.append(EpisodeBuffer(id=number, **arrays, terminations=terminations, truncations=truncations))
    bound = np.float32(max(1.0, np.abs(data.actions).max()))
    spaces = {
        "observation_space": gymnasium.spaces.Box(-np.inf, np.inf, data.observations.shape[1:], np.float32),
        "action_space": gymnasium.spaces.Box(-bound, bound, data.actions.shape[1:], np.float32),
    }
    with (
        tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as temporary,
        _root(temporary),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # minari asks for each piece of metadata that is absent
        minari.create_dataset_from_buffers(dataset_id, episodes, environment, **spaces, **(metadata or {}))
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in Path(temporary).rglob("namespace_metadata.json"):
            if not (place := folder / path.relative_to(temporary)).exists():
                path.rename(place)
        Path(temporary, dataset_id).rename(target)
    return target


@contextmanager
def _root(folder: str) -> Iterator[None]:
    """Let minari write into `folder`: it takes its root from the environment alone."""
    former = os.environ.get(ROOT)
    os.environ[ROOT] = folder
    try:
        yield
    finally:
        if former is None:
            del os.environ[ROOT]
        else:
            os.environ[ROOT] = former
