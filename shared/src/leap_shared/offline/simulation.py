"""Policies run in gymnasium environments: all runs and episodes side by side."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64
from numpy.typing import NDArray

from leap_shared.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

__all__ = ["Act", "make_environment", "registered", "run_episodes"]

MAZE = "PointMaze_Medium-v3"  # one of the robotics environments

Act = Callable[[Float32[np.ndarray, "runs episodes observation"]], Float32[np.ndarray, "runs episodes action"]]


def registered() -> Any:
    """The module gymnasium with the robotics environments in its registry, where they are installed.

    Their package writes a notice about unrelated hands, which is dropped.

    Raises:
        UserError: gymnasium is missing.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise UserError('simulation needs gymnasium: pip install "leap-shared[rl]"') from error
    with contextlib.suppress(ImportError):  # MuJoCo appends its warnings to a file in the working directory otherwise
        import mujoco

        mujoco.set_mju_user_warning(log.debug)
    with contextlib.suppress(ImportError):
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            import gymnasium_robotics
        if MAZE not in gymnasium.registry:
            gymnasium.register_envs(gymnasium_robotics)
    return gymnasium


def make_environment(name: str, keys: tuple[str, ...] = (), **options: Any) -> Any:
    """A gymnasium environment with flat observations; of Dict observations the `keys` are joined in that order.

    Raises:
        UserError: gymnasium is missing, the name is unknown, observations or actions are not vectors, or keys lack.
    """
    gymnasium = registered()
    try:
        environment = gymnasium.make(name, **options)
    except gymnasium.error.NameNotFound as error:
        raise UserError(f"environment {name!r} is unknown: {did_you_mean(name, gymnasium.registry)}") from error
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise UserError(f"environment {name!r} cannot be made: {' '.join(str(error).split())}") from error
    spaces = gymnasium.spaces
    if isinstance(environment.observation_space, spaces.Dict):
        known = list(environment.observation_space.spaces)
        if not keys or not set(keys) <= set(known):
            raise UserError(
                f"observations of {name} have the keys {', '.join(known)}: choose which are joined, in order"
            )
        shapes: list[Any] = [environment.observation_space[key].shape for key in keys]
        width = sum(math.prod(shape) for shape in shapes)
        flat = spaces.Box(-np.inf, np.inf, (width,), np.float64)
        environment = gymnasium.wrappers.TransformObservation(environment, partial(_joined, keys), flat)
    boxes = [environment.observation_space, environment.action_space]
    if not all(isinstance(space, spaces.Box) and len(space.shape) == 1 for space in boxes):
        raise UserError(f"{name} has the spaces {boxes[0]} and {boxes[1]}: only vectors of real numbers are offered")
    return environment


def _joined(keys: tuple[str, ...], observation: dict[str, NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([np.ravel(observation[key]) for key in keys])


def run_episodes(
    act: Act, environment: str | Callable[[], Any], runs: int, episodes: int, seed: int = 0, **options: Any
) -> Float64[np.ndarray, "runs episodes"]:
    """Undiscounted returns; actions in [-1, 1] are brought to the range of the environment.

    Args:
        act: actions of every run for its own observations.
        environment: name, with `options` of `make_environment`, or what makes one.
        runs: number of policies.
        episodes: of each run; episode k starts from `seed` + k in every run.
        seed: of the first episode.
        options: see `environment`.

    Raises:
        UserError: there are no episodes, or the environment cannot be made.
    """
    if runs < 1 or episodes < 1:
        raise UserError(f"runs={runs}, episodes={episodes}: give at least one of both")
    make = partial(make_environment, environment, **options) if isinstance(environment, str) else environment
    make().close()  # says in plain words what is wrong
    environments: Any = registered().vector.SyncVectorEnv([make] * (runs * episodes))
    low, high = environments.single_action_space.low, environments.single_action_space.high
    returns, running = np.zeros(runs * episodes), np.ones(runs * episodes, bool)
    try:
        states, _ = environments.reset(seed=[seed + k for k in range(episodes)] * runs)
        while running.any():
            actions = act(states.astype(np.float32).reshape(runs, episodes, -1)).reshape(runs * episodes, -1)
            states, rewards, terminals, truncations, _ = environments.step(
                low + (actions.clip(-1, 1) + 1) / 2 * (high - low)
            )
            returns += np.where(running, rewards, 0.0)
            running &= ~(terminals | truncations)
    finally:
        environments.close()
    table: NDArray[np.float64] = returns.reshape(runs, episodes)
    return table
