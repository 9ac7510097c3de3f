"""PointMaze data from a waypoint controller, and policies run in the same maze (MuJoCo, by gymnasium-robotics)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32
from numpy.typing import NDArray

from leap_shared.errors import UserError
from leap_shared.offline.simulation import registered
from leap_shared.offline.transitions import Transitions

__all__ = ["ENVIRONMENT", "REACHED", "Evaluation", "PointMaze", "Walker", "evaluate", "generate"]

Cell = tuple[int, int]
Policy = Callable[[NDArray[np.float32]], NDArray[np.float32]]
ENVIRONMENT = "PointMaze_Medium-v3"
REACHED = 0.45
POSITION_GAIN, VELOCITY_GAIN = 10.0, 1.0
WAYPOINT_REACHED, JITTER = 0.1, 0.2


@dataclass(frozen=True)
class PointMaze:
    """The task (a fixed far goal in the medium maze, continuing, reward 1 within 0.45 of it) and its data set.

    An episode follows the shortest way to the goal, or else from random cell to random cell. Observations are x, y and
    their velocities; cells are (row, column).
    """

    episodes: int = 120
    episode_steps: int = 300
    goal_fraction: float = 0.3
    """Part of the episodes that head for the goal; the others visit random cells."""
    noise: float = 0.5
    """Standard deviation of the noise on the controller's actions, which lie in [-1, 1]."""
    start: Cell = (1, 1)
    goal: Cell = (6, 6)

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.episode_steps < 2 or not 0 <= self.goal_fraction <= 1 or self.noise < 0:
            raise UserError(
                f"{self}: expected episodes >= 1, episode_steps >= 2, goal_fraction in [0, 1] and noise >= 0"
            )

    @property
    def walls(self) -> Bool[np.ndarray, "rows columns"]:
        """Where the walls are."""
        return _walls()

    @cached_property
    def free_cells(self) -> list[Cell]:
        """Cells without a wall."""
        return [(int(row), int(column)) for row, column in np.argwhere(~_walls())]

    @cached_property
    def goal_position(self) -> Float[np.ndarray, " xy"]:
        """The goal's x and y: the middle of its cell."""
        return self.centre(self.goal)

    @staticmethod
    def centre(cell: Cell) -> Float[np.ndarray, " xy"]:
        """Position of a cell's middle."""
        rows, columns = _walls().shape
        return np.array([cell[1] + 0.5 - columns / 2, rows / 2 - cell[0] - 0.5])

    @staticmethod
    def cell(position: NDArray[Any]) -> Cell:
        """Cell that a position lies in."""
        rows, columns = _walls().shape
        return int(np.floor(rows / 2 - position[1])), int(np.floor(position[0] + columns / 2))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Episodes of one policy: return, whether the goal was reached, and the way taken."""

    returns: Float[np.ndarray, " episodes"]
    success: Bool[np.ndarray, " episodes"]
    paths: Float32[np.ndarray, "episodes positions 2"]


def _gymnasium() -> Any:
    gymnasium = registered()
    if ENVIRONMENT not in gymnasium.registry:
        raise UserError('PointMaze needs gymnasium_robotics: pip install "leap-shared[rl]"')
    return gymnasium


def _make(gymnasium: Any, maze: PointMaze) -> Any:
    return gymnasium.make(ENVIRONMENT, max_episode_steps=maze.episode_steps + 1, reset_target=False)


def _cells(maze: PointMaze) -> dict[str, NDArray[np.int64]]:
    return {"goal_cell": np.array(maze.goal), "reset_cell": np.array(maze.start)}


@cache
def _walls() -> NDArray[np.bool_]:
    _gymnasium()
    from gymnasium_robotics.envs.maze.maps import MEDIUM_MAZE

    walls: NDArray[np.bool_] = np.array(MEDIUM_MAZE) == 1
    return walls


def _next_cells(target: Cell) -> dict[Cell, Cell]:
    """For every free cell the next one on a shortest way to `target`, by breadth-first search."""
    walls = _walls()
    following, queue = {target: target}, deque([target])
    while queue:
        row, column = here = queue.popleft()
        for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if not walls[cell] and cell not in following:
                following[cell] = here
                queue.append(cell)
    return following


class _Controller:
    """Walks to a target cell, waypoint by waypoint, by proportional and derivative gains with noise on top."""

    def __init__(self, maze: PointMaze, random: np.random.Generator) -> None:
        self.maze, self.random = maze, random
        self.ways = {cell: _next_cells(cell) for cell in maze.free_cells}
        self.centres = {cell: maze.centre(cell) for cell in maze.free_cells}
        self.target = maze.goal
        self.stays = True

    def begin(self, *, to_goal: bool) -> None:
        """Start an episode that heads for the goal and stays, or that visits one random cell after the other."""
        self.stays = to_goal
        self.target = self.maze.goal if to_goal else self._random_cell()

    def act(self, observation: NDArray[np.float64]) -> NDArray[np.float64]:
        """Action for one observation (x, y, and velocities)."""
        position, velocity = observation[:2], observation[2:]
        if not self.stays and np.hypot(*(position - self.centres[self.target])) < REACHED:
            self.target = self._random_cell()
        waypoint = self.centres[self.ways[self.target][self.maze.cell(position)]]
        action = np.clip(POSITION_GAIN * (waypoint - position) - VELOCITY_GAIN * velocity, -1, 1)
        return np.clip(action + self.maze.noise * self.random.standard_normal(2), -1, 1)

    def _random_cell(self) -> Cell:
        return self.maze.free_cells[self.random.integers(len(self.maze.free_cells))]


class Walker:
    """D4RL's controller for its maze2d data: from one random goal to the next on shortest ways, for ever.

    The waypoints on the way are cells' middles minus U[0, 0.2) in both coordinates; a waypoint within 0.1 is reached.

    Args:
        maze: its cells, and the deviation of the noise on the actions.
        random: draws goals, waypoints and noise.
    """

    def __init__(self, maze: PointMaze, random: np.random.Generator) -> None:
        self.maze, self.random = maze, random
        self._waypoints: list[list[float]] = []

    @property
    def goal(self) -> list[float]:
        """Position that is headed for."""
        return self._waypoints[-1]

    def act(self, observation: NDArray[Any]) -> tuple[NDArray[np.float32], bool]:
        """Action for one observation, and whether the goal was reached there (then it heads for a new one)."""
        position, velocity = observation[:2], observation[2:]
        while len(self._waypoints) > 1 and np.hypot(*(position - self._waypoints[0])) < WAYPOINT_REACHED:
            self._waypoints.pop(0)
        arrived = len(self._waypoints) == 1 and bool(np.hypot(*(position - self.goal)) < WAYPOINT_REACHED)
        if arrived or not self._waypoints:
            self._plan(self.maze.cell(position))
        wanted = POSITION_GAIN * (np.asarray(self._waypoints[0]) - position) - VELOCITY_GAIN * velocity
        action = np.clip(wanted, -1, 1) + self.maze.noise * self.random.standard_normal(2)
        return np.clip(action, -1, 1).astype(np.float32), arrived

    def _plan(self, cell: Cell) -> None:
        others = [free for free in self.maze.free_cells if free != cell]
        target = others[self.random.integers(len(others))]
        following, way = _next_cells(target), [cell]
        while way[-1] != target:
            way.append(following[way[-1]])
        jitter = self.random.uniform(0, JITTER, (len(way) - 2, 2))
        between = [self.maze.centre(step) - shift for step, shift in zip(way[1:-1], jitter, strict=True)]
        self._waypoints = [point.tolist() for point in (*between, self.maze.centre(target))]

    def state_dict(self) -> dict[str, Any]:
        """Waypoints that are left."""
        return {"waypoints": self._waypoints}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        self._waypoints = state["waypoints"]


def generate(
    maze: PointMaze, seed: int, path: Path | None = None, progress: Callable[[int], object] | None = None
) -> Transitions:
    """Simulate the data set of one seed (about 12,000 steps/s), or read it from `path` if it was made before.

    Args:
        maze: the task and the mixture of behaviours.
        seed: the same seed gives the same rows.
        path: .npz file to keep the set in, written at once when all is simulated.
        progress: called with 1 after each episode.

    Raises:
        UserError: gymnasium-robotics is missing, or `path` holds another set.
    """
    meta = {"environment": ENVIRONMENT, "seed": seed, **asdict(maze)}
    if path is not None and path.exists():
        data, found = Transitions.load(path)
        if found != {key: list(value) if isinstance(value, tuple) else value for key, value in meta.items()}:
            raise UserError(f"{path} holds another data set ({found}): delete it or give another folder")
        if progress is not None:
            progress(maze.episodes)
        return data
    random = np.random.default_rng(seed)
    controller = _Controller(maze, random)
    to_goal = random.permutation(maze.episodes) < round(maze.goal_fraction * maze.episodes)
    shape = (maze.episodes, maze.episode_steps)
    states, actions = np.empty((*shape, 4), np.float32), np.empty((*shape, 2), np.float32)
    following = np.empty_like(states)
    environment = _make(_gymnasium(), maze)
    try:
        for episode in range(maze.episodes):
            observation = environment.reset(seed=seed if episode == 0 else None, options=_cells(maze))[0]["observation"]
            controller.begin(to_goal=bool(to_goal[episode]))
            for step in range(maze.episode_steps):
                actions[episode, step] = controller.act(observation)
                states[episode, step] = observation
                observation = environment.step(actions[episode, step])[0]["observation"]
                following[episode, step] = observation
            if progress is not None:
                progress(1)
    finally:
        environment.close()
    timeouts = np.zeros(shape, bool)
    timeouts[:, -1] = True
    data = Transitions.from_arrays(
        states.reshape(-1, 4),
        actions.reshape(-1, 2),
        _rewards(maze, following).reshape(-1),
        following.reshape(-1, 4),
        np.zeros(timeouts.size, bool),
        timeouts.reshape(-1),
    )
    if path is not None:
        data.save(path, meta)
    return data


def _rewards(maze: PointMaze, states: NDArray[np.float32]) -> NDArray[np.float32]:
    near: NDArray[np.bool_] = np.linalg.norm(states[..., :2] - maze.goal_position, axis=-1) <= REACHED
    return near.astype(np.float32)


def evaluate(
    policies: Sequence[Policy], maze: PointMaze, seeds: Sequence[int], progress: Callable[[int], object] | None = None
) -> list[Evaluation]:
    """Run each policy from the maze's start, one episode per seed, side by side; equal seeds start equally.

    Args:
        policies: each maps observations (episodes, 4) to actions (episodes, 2), which are clipped to [-1, 1].
        maze: gives the start, the goal and the length of an episode.
        seeds: of the episodes' starts.
        progress: called with 1 after each policy.

    Raises:
        UserError: gymnasium-robotics is missing, or there are no seeds.
    """
    if not seeds:
        raise UserError("there are no evaluation episodes: give at least one seed")
    gymnasium = _gymnasium()
    environments = gymnasium.vector.SyncVectorEnv([partial(_make, gymnasium, maze)] * len(seeds))
    evaluations = []
    try:
        for policy in policies:
            states = [environments.reset(seed=list(seeds), options=_cells(maze))[0]["observation"].astype(np.float32)]
            for _ in range(maze.episode_steps):
                actions = np.clip(policy(states[-1]), -1, 1)
                states.append(environments.step(actions)[0]["observation"].astype(np.float32))
            rewards = np.stack([_rewards(maze, state) for state in states[1:]])
            paths = np.stack([state[:, :2] for state in states], axis=1)
            evaluations.append(Evaluation(rewards.sum(axis=0, dtype=np.float64), rewards.max(axis=0) > 0, paths))
            if progress is not None:
                progress(1)
    finally:
        environments.close()
    return evaluations
