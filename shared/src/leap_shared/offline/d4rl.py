"""D4RL's HDF5 files: read with their quirks mended or kept, and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from numpy.typing import ArrayLike, NDArray

from leap_shared.errors import UserError, did_you_mean
from leap_shared.files import atomic_writer
from leap_shared.offline.scores import Reference, reference, tasks_of_file
from leap_shared.offline.transitions import (
    FIELDS,
    Transitions,
    checked,
    convert,
    counted_timeouts,
    different_rows,
    episode_ends,
)

__all__ = ["from_steps", "opened", "read_d4rl", "write_d4rl"]

Compat = Literal["d4rl"] | None
Split = Literal["terminal", "first_success", "timeout"]
Successors = Literal["shift", "stored"] | None
REQUIRED = ("observations", "actions", "rewards", "terminals")
FLAGS = ("terminals", "timeouts")
ANTMAZE, MAZE2D = "locomotion", "pointmaze"
TELEPORT = 2.0
BLOCK_ROWS = 1 << 16


def read_d4rl(
    path: Path | str,
    *,
    task: str | None = None,
    compat: Compat = None,
    split: Split = "terminal",
    next_obs: Successors = None,
    max_episode_steps: int | None = None,
    drop: bool = True,
    max_action: float = 1.0,
    progress: Callable[[int], object] | None = None,
) -> Transitions:
    """Transitions of a D4RL file; its keys may lie in any one group, or in numbered ones, which are joined.

    Args:
        path: the HDF5 file.
        task: name of D4RL's task, for its time limit and its quirks; None takes it from the file's name.
        compat: as in :func:`from_steps`, and so are `split`, `next_obs`, `max_episode_steps`, `drop`, `max_action`.
        split: see there.
        next_obs: see there.
        max_episode_steps: see there.
        drop: see there.
        max_action: see there.
        progress: called with the number of steps after each block of observations that was read.

    Raises:
        UserError: the file cannot be read, a key is missing, or :func:`from_steps` refuses its content; the message
            names file, key and row.
    """
    path = Path(path)
    _check_options(compat, split, next_obs)
    stored = next_obs == "stored" or (next_obs is None and compat is None)
    try:
        with opened(path) as file:
            steps = _read_steps(
                file, FIELDS if stored else [key for key in FIELDS if key != "next_observations"], progress
            )
        if task is None:
            ends = {"timeouts"} if compat else {"timeouts", "next_observations"}
            task = _task_of_file(path.name, needs_limit=max_episode_steps is None and not ends & set(steps))
        return from_steps(
            steps,
            task=task,
            compat=compat,
            split=split,
            next_obs=next_obs,
            max_episode_steps=max_episode_steps,
            drop=drop,
            max_action=max_action,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def from_steps(
    steps: Mapping[str, Any],
    *,
    task: str | None = None,
    compat: Compat = None,
    split: Split = "terminal",
    next_obs: Successors = None,
    max_episode_steps: int | None = None,
    drop: bool = True,
    max_action: float = 1.0,
) -> Transitions:
    """Transitions of raw steps in D4RL's layout: step i + 1 follows step i unless an episode ends between them.

    With ``compat="d4rl"`` the rows are those of D4RL's q-learning converter (:func:`convert`), the ones that published
    weights belong to. By default they differ:

    - Successors are the stored `next_observations`; no step is lost then.
    - Without them, the steps whose successor was not recorded are left out: the last one, and those at which time was
      up. A terminal step needs no successor and stays, also if time was up in it or it is the last.
    - Ends by time are marked in `timeouts` (in the step before, where the step itself is left out).
    - Without `timeouts` and successors, steps are counted up to the time limit, from 0 after every end; D4RL starts
      at 1 after a terminal, which cuts the next episode one step early. Adroit's cloned-v0 files mix episodes of 100
      and 200 steps, which counting cannot tell apart.
    - AntMaze: an ant that moves by more than 2 in one step was reset there, whatever `timeouts` say (wrong in v0).
    - Maze2d: one endless walk, whose `timeouts` mark new navigation goals. They (or the counted limit) end episodes,
      but the step's successor is known and stays. Rewards test the state before the step in the file, and the state
      after it here, as in the environment.

    Args:
        steps: arrays named observations, actions, rewards, terminals and, if known, timeouts and next_observations.
        task: D4RL's name of the task, which gives the time limit and says whether it is a maze.
        compat: "d4rl" follows D4RL's converter row by row.
        split: what ends an episode in AntMaze, where reaching the goal ends nothing in the recording. "terminal": each
            step at the goal, so that the later ones are episodes of one step; "first_success": the first one, and what
            follows until the next reset is left out; "timeout": only resets, terminals are cleared and the return
            counts the steps at the goal.
        next_obs: successors from "stored" ones or by "shift" of the observations; None: stored if there are any (with
            `compat` always shift, as D4RL does).
        max_episode_steps: time limit for steps without `timeouts`; None takes the task's.
        drop: False keeps the steps whose successor is unknown, with their own observation in its place (with `compat`:
            the next step's, D4RL's terminate_on_end).
        max_action: largest action allowed.

    Raises:
        UserError: an array is missing, or has a wrong shape or value; there are neither timeouts nor a time limit; an
            option is unknown or does not fit the task.
    """
    _check_options(compat, split, next_obs)
    found = None if task is None else reference(task)
    if split != "terminal" and (found is None or found.suite != ANTMAZE or compat is not None):
        raise UserError(
            f"split={split!r} is for AntMaze, where reaching the goal does not end the recording, without compat: "
            f"leave it out, or give its task (it is {task})"
        )
    if missing := [key for key in REQUIRED if key not in steps]:
        raise UserError(f"there is no {missing[0]!r}: {did_you_mean(missing[0], steps)}")
    shifted = next_obs == "shift" or (next_obs is None and compat is not None)
    if next_obs == "stored" and "next_observations" not in steps:
        raise UserError("next_obs is 'stored', but there are no next_observations: use next_obs='shift'")
    keys = [key for key in FIELDS if key in steps and not (shifted and key == "next_observations")]
    arrays = checked({key: steps[key] for key in keys}, max_action)
    if max_episode_steps is None and found is not None:
        max_episode_steps = found.max_episode_steps
    if compat is not None:
        return _as_d4rl(arrays, max_episode_steps, terminate_on_end=not drop)
    if found is not None and found.suite == MAZE2D and "next_observations" not in steps:
        arrays["rewards"] = np.append(arrays["rewards"][1:], arrays["rewards"][-1:])
    return _mended(arrays, found, split, max_episode_steps, drop)


def _check_options(compat: str | None, split: str, next_obs: str | None) -> None:
    for name, given, known in (
        ("compat", compat, (None, "d4rl")),
        ("split", split, ("terminal", "first_success", "timeout")),
        ("next_obs", next_obs, (None, "shift", "stored")),
    ):
        if given not in known:
            raise UserError(f"{name}={given!r} is unknown: use {', '.join(map(repr, known))}")


def _as_d4rl(arrays: dict[str, NDArray[Any]], max_episode_steps: int | None, *, terminate_on_end: bool) -> Transitions:
    def of(observations: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        return convert(
            observations,
            arrays["actions"],
            arrays["rewards"],
            arrays["terminals"],
            arrays.get("timeouts"),
            max_episode_steps=max_episode_steps,
            terminate_on_end=terminate_on_end,
        )

    rows = of(arrays["observations"])
    if (stored := arrays.get("next_observations")) is not None:
        rows["next_observations"] = of(stored)["observations"]
    return Transitions.from_checked(rows)


def _mended(
    arrays: dict[str, NDArray[Any]],
    found: Reference | None,
    split: Split,
    max_episode_steps: int | None,
    drop: bool,
) -> Transitions:
    """Rows whose successor is known, with the ends of episodes."""
    suite = found.suite if found is not None else None
    observations, terminals, stored = arrays["observations"], arrays["terminals"], arrays.get("next_observations")
    if "timeouts" in arrays:
        cut = arrays["timeouts"].copy()
    elif stored is not None:
        cut = episode_ends(observations, stored, terminals) & ~terminals
    else:
        cut = counted_timeouts(terminals, max_episode_steps, after_terminal=0)
    if suite == ANTMAZE:
        cut[:-1] |= np.linalg.norm(observations[1:, :2] - observations[:-1, :2], axis=1) > TELEPORT
    unknown = np.zeros(len(cut), bool) if stored is not None or suite == MAZE2D else cut.copy()
    unknown[-1] = stored is None
    if split == "timeout":
        terminals = np.zeros_like(terminals)
    keep = ~unknown | terminals if drop else np.ones(len(cut), bool)
    if split == "first_success":
        keep &= ~_after_success(terminals, cut)
    if not keep.any():
        raise UserError("no transition is left: each step is the last of its episode")
    next_kept = np.append(keep[1:], False)
    timeouts = cut.copy()
    timeouts[:-1] |= cut[1:] & ~next_kept[:-1]
    timeouts &= ~terminals
    if stored is None:
        jumps = np.flatnonzero(keep & (unknown | ~next_kept))
        successors = observations[np.where(unknown[jumps], jumps, jumps + 1)]
    else:
        differs = np.zeros(len(cut), bool)
        differs[different_rows(observations, stored)] = True
        jumps = np.flatnonzero(keep & (differs | ~next_kept))
        successors = stored[jumps]
    rows = {**arrays, "terminals": terminals, "timeouts": timeouts}
    columns = {key: rows[key] if keep.all() else rows[key][keep] for key in (*REQUIRED, "timeouts")}
    return Transitions(**columns, jump_rows=(np.cumsum(keep) - 1)[jumps], jump_observations=successors)


def _after_success(
    terminals: Bool[np.ndarray, " steps"], cut: Bool[np.ndarray, " steps"]
) -> Bool[np.ndarray, " steps"]:
    """Steps after the first terminal since the last cut."""
    before = np.cumsum(terminals) - terminals
    starts = np.append(0, np.flatnonzero(cut[:-1]) + 1)
    lengths = np.diff(np.append(starts, len(cut)))
    after: NDArray[np.bool_] = before > np.repeat(before[starts], lengths)
    return after


def _task_of_file(name: str, *, needs_limit: bool) -> str | None:
    """Task whose file this is; where several share it they must agree in the time limit, if that is needed."""
    found = tasks_of_file(name)
    if needs_limit and len({entry.max_episode_steps for entry in found}) > 1:
        limits = ", ".join(f"{entry.task} ({entry.max_episode_steps} steps)" for entry in found)
        raise UserError(f"the file has no timeouts and belongs to several tasks, {limits}: give task")
    return found[0].task if found else None


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The HDF5 file `path`, opened for reading; what h5py says of a damaged one becomes a UserError."""
    h5py = _h5py()
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError("there is no such file") from error
    except (OSError, RuntimeError) as error:
        raise UserError(f"the file cannot be read as HDF5, fetch it again ({error})") from error


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError('HDF5 files need h5py: pip install "leap-shared[rl]"') from error
    return h5py


def _read_steps(
    file: Any, keys: list[str] | tuple[str, ...], progress: Callable[[int], object] | None
) -> dict[str, Any]:
    groups = _groups(file)
    steps = {}
    for key in keys:
        parts = [group[key] for group in groups if key in group]
        if 0 < len(parts) < len(groups):
            raise UserError(f"only {len(parts)} of its {len(groups)} groups have {key!r}: all or none must")
        if parts:
            steps[key] = _joined(key, parts, progress if key == "observations" else None)
    return steps


def _groups(file: Any) -> list[Any]:
    """The groups that hold observations: the root, one other, or numbered ones in their order."""
    if "episode_0" in file:
        raise UserError("this is a Minari file: use read_minari")
    names: list[str] = []
    parents: list[str] = []

    def visit(name: str, item: Any) -> None:
        parent, _, leaf = name.rpartition("/")
        names.append(name)
        if leaf == "observations" and not {"infos", "metadata"} & set(parent.split("/")):
            if not hasattr(item, "shape"):
                raise UserError(f"{name} are a Dict of {', '.join(item)}: concatenate the chosen ones into one array")
            parents.append(parent)

    file.visititems(visit)
    if "" in parents:
        return [file]
    if not parents:
        raise UserError(f"there is no 'observations': {did_you_mean('observations', names)}")
    numbers = [name.rpartition("/")[2] for name in parents]
    if len(parents) > 1 and (
        not all(map(str.isdigit, numbers)) or len({name.rpartition("/")[0] for name in parents}) > 1
    ):
        raise UserError(
            f"there are several data sets, in {', '.join(sorted(parents))}: give one of them a file of its own"
        )
    order = sorted(range(len(parents)), key=lambda i: int(numbers[i]) if len(parents) > 1 else 0)
    return [file[parents[i]] for i in order]


def _joined(key: str, parts: list[Any], progress: Callable[[int], object] | None) -> NDArray[Any]:
    """One array of the rows of all parts: flags as they are, numbers as float32, converted while they are read."""
    first = parts[0]
    for part in parts:
        if not hasattr(part, "shape") or part.dtype.kind not in "fiub" or not part.shape:
            raise UserError(f"{part.name} is no array of numbers ({getattr(part, 'dtype', 'a group')})")
        if part.shape[1:] != first.shape[1:]:
            raise UserError(f"{part.name} has rows of shape {part.shape[1:]} and {first.name} of {first.shape[1:]}")
    rows = sum(len(part) for part in parts)
    array = np.empty((rows, *first.shape[1:]), first.dtype if key in FLAGS else np.float32)
    start = 0
    for part in parts:
        chunk = part.chunks[0] if part.chunks else 1
        block = -(-BLOCK_ROWS // chunk) * chunk
        for low in range(0, len(part), block):
            high = min(low + block, len(part))
            part.read_direct(array[start + low : start + high], np.s_[low:high])
            if progress is not None:
                progress(high - low)
        start += len(part)
    return array


def write_d4rl(
    path: Path | str,
    arrays: Mapping[str, ArrayLike],
    metadata: Mapping[str, Any] | None = None,
    *,
    compression: Literal["gzip", "lzf"] | None = "gzip",
) -> None:
    """Write raw steps as an HDF5 file in D4RL's layout, atomically.

    Args:
        path: the file.
        arrays: observations, actions, rewards, terminals and any others of as many rows, such as timeouts,
            next_observations or "infos/qpos".
        metadata: numbers, texts or arrays, which go to the group "metadata".
        compression: of the arrays; "gzip" as in D4RL's files.

    Raises:
        UserError: an array is missing, has a wrong shape or number of rows, or a value that is not finite; the file
            cannot be written.
    """
    h5py, path = _h5py(), Path(path)
    if missing := [key for key in REQUIRED if key not in arrays]:
        raise UserError(f"{path}: there is no {missing[0]!r}: {did_you_mean(missing[0], arrays)}")
    try:
        content = checked({key: arrays[key] for key in FIELDS if key in arrays}, max_action=np.inf)
        content |= {key: _checked_extra(key, value) for key, value in arrays.items() if key not in content}
        rows = len(content["observations"])
        for key, array in content.items():
            if len(array) != rows:
                raise UserError(f"{key} has {len(array)} rows and observations has {rows}: what is no row is metadata")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    with atomic_writer(path, "w+b") as target, h5py.File(target, "w") as file:
        for key, array in content.items():
            file.create_dataset(key, data=array, compression=compression)
        for key, value in (metadata or {}).items():
            file[f"metadata/{key}"] = value


def _checked_extra(key: str, value: ArrayLike) -> NDArray[Any]:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" or not array.ndim:
        raise UserError(f"{key} holds {array.dtype} of shape {array.shape}, expected one row of numbers per step")
    if not (finite := np.isfinite(array).reshape(len(array), -1).all(axis=1)).all():
        raise UserError(f"{key} is NaN or infinite at row {int(finite.argmin())}")
    return array
