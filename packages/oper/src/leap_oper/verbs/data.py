"""Verbs that make, read and weigh data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from leap_shared.cli import Command, Context, Progress
from leap_shared.errors import UserError

if TYPE_CHECKING:
    from leap_oper.priorities import Priorities
    from leap_shared.offline import Transitions

__all__ = ["Convert", "DataCommand", "Generate", "GenerateMaze", "Inspect", "WeightsA", "WeightsR"]

HDF5 = (".hdf5", ".h5", ".hdf")


@dataclass(frozen=True, kw_only=True)
class DataCommand(Command):
    """Base of the verbs that read a data set."""

    data: Annotated[str, tyro.conf.Positional]
    """A .hdf5 or .npz file, a Minari folder or id, or the name of a D4RL task."""
    root: Path | None = None
    """Folder with D4RL's or Minari's files, where `data` is a name."""
    task: str | None = None
    """D4RL task of a .hdf5 file, for its time limit and its quirks, where the file's name does not tell."""
    compat: Literal["d4rl"] | None = None
    """Read a .hdf5 file row for row as D4RL's converter does."""
    split: Literal["terminal", "first_success", "timeout"] = "terminal"
    """What ends an episode of AntMaze."""
    next_obs: Literal["shift", "stored"] | None = None
    """Successors by shifting the observations, or as stored."""
    max_episode_steps: int | None = None
    """Time limit of a .hdf5 file without timeouts."""
    keys: tuple[str, ...] = ()
    """Of Dict observations in Minari data and in the environment, in the order in which they are joined."""

    def load(self) -> Transitions:
        """The transitions."""
        from leap_shared.offline.scores import tasks
        from leap_shared.offline.sources import load

        names = ("compat", "split", "next_obs", "max_episode_steps")
        given = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(DataCommand, name)}
        if Path(self.data).suffix in HDF5 or self.data in tasks():
            return load(self.data, self.root, **given, **({} if self.task is None else {"task": self.task}))
        if given:
            raise UserError(f"{', '.join(given)} are for .hdf5 files, and {self.data} is none: leave them out")
        minari = self.keys and Path(self.data).suffix != ".npz"
        return load(self.data, self.root, **({"keys": self.keys} if minari else {}))


@dataclass(frozen=True, kw_only=True)
class Convert(DataCommand):
    """Bring a data set, or the authors' weights, into another format.

    A .npy file with released weights becomes weights.npz; nothing in it is executed.

    Examples:
        leap-oper convert hopper-medium-v2.hdf5 --to npz --out data
        leap-oper convert nstep_nstep_nstep=1_hopper-medium-v2_1.npy --out weights
    """

    to: Literal["npz", "d4rl", "minari"] = "npz"
    """Format of the result."""
    name: str | None = None
    """Name of the result: a file's stem, or Minari's id (mujoco/hopper/medium-v0)."""

    def run(self, context: Context) -> object:
        """Convert and say where the result is."""
        from leap_oper.priorities import convert_released
        from leap_shared.offline.d4rl import write_d4rl
        from leap_shared.offline.minari import write_minari

        stem = self.name or Path(self.data).stem
        if Path(self.data).suffix == ".npy":
            target = context.out / f"{stem}.npz"
            convert_released(Path(self.data), target)
            return {"written": str(target)}
        dataset = self.load()
        if self.to == "npz":
            target = context.out / f"{stem}.npz"
            dataset.save(target, {"source": Path(self.data).name})
        elif self.to == "d4rl":
            target = context.out / f"{stem}.hdf5"
            fields = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
            arrays = {key: getattr(dataset, key) for key in fields}
            arrays["timeouts"] = dataset.ends & ~dataset.terminals
            write_d4rl(target, arrays, {"source": Path(self.data).name})
        else:
            if self.name is None:
                raise UserError("a Minari data set needs its id: give --name, as in mujoco/hopper/medium-v0")
            target = write_minari(self.name, dataset, root=context.out)
        return {"rows": len(dataset), "written": str(target)}


@dataclass(frozen=True, kw_only=True)
class Inspect(DataCommand):
    """Say what a data set holds: rows, episodes, returns, lengths, how many were cut, largest action.

    Examples:
        leap-oper inspect hopper-medium-replay-v2.hdf5
    """

    def run(self, context: Context) -> object:  # noqa: ARG002 - the interface of every verb
        """Read and describe."""
        dataset = self.load()
        return {**vars(dataset.summary()), "fingerprint": dataset.fingerprint[:16]}


@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Train SAC or TD3 in a gymnasium environment and record D4RL's levels of data; killed, it goes on.

    Examples:
        leap-oper generate --env InvertedDoublePendulum-v5 --level medium-replay --target-score 3000 --out data/idp
        leap-oper generate --env Hopper-v5 --level medium medium-replay --steps 200000 --target-score 1200
    """

    env: str
    """Gymnasium's name of the environment."""
    level: tuple[Literal["random", "medium", "medium-replay", "expert", "medium-expert", "full-replay"], ...] = (
        "medium",
    )
    """Which data sets, all of one training."""
    algorithm: Literal["sac", "td3"] = "sac"
    """Learner."""
    steps: int = 1_000_000
    """Steps of the training."""
    rows: int = 1_000_000
    """Rows of random, medium and expert, and of each half of medium-expert."""
    target_score: float | None = None
    """Return of the evaluation that makes a policy medium; a third of --expert-score where it is not given."""
    expert_score: float | None = None
    """Return of an expert; D4RL's where it is known."""
    num_envs: int = 4
    """Environments side by side."""
    updates_per_step: float = 1.0
    """Updates of the learner for each step of one environment."""
    evaluate_every: int = 2000
    """Steps between evaluations."""
    formats: tuple[Literal["d4rl", "minari"], ...] = ("d4rl", "minari")
    """Formats to write."""
    keep: bool = False
    """Keep the training's work folder."""
    threads: int = 1
    """Threads of PyTorch."""

    def run(self, context: Context) -> object:
        """Generate; the manifest."""
        import torch

        from leap_shared.offline.generation import generate_mujoco

        torch.set_num_threads(self.threads)
        names = ["algorithm", "steps", "rows", "target_score", "expert_score", "num_envs", "updates_per_step"]
        names += ["evaluate_every", "formats", "keep", "seed"]
        bar: Progress[Any] = context.progress(description=f"{self.env}: steps")
        manifest = generate_mujoco(
            self.env,
            self.level,
            context.out,
            progress=lambda count, text: bar.advance(count, text=text),
            **{name: getattr(self, name) for name in names},
        )
        return manifest if self.json else manifest["files"]


@dataclass(frozen=True, kw_only=True)
class GenerateMaze(Command):
    """Record the PointMaze controller: some episodes head for the goal, the others wander from cell to cell.

    Examples:
        leap-oper generate-maze --episodes 120 --goal-fraction 0.3 --out data/maze
    """

    episodes: int = 120
    """Episodes."""
    episode_steps: int = 300
    """Steps of each."""
    goal_fraction: float = 0.3
    """Part of the episodes that head for the goal."""
    noise: float = 0.5
    """Standard deviation of the noise on the actions."""
    walk: bool = False
    """D4RL's way instead: one endless walk with a new goal after each success, as .hdf5 and Minari with a manifest."""
    rows: int = 1_000_000
    """Of the walk."""
    formats: tuple[Literal["d4rl", "minari"], ...] = ("d4rl",)
    """Of the walk."""

    def run(self, context: Context) -> object:
        """Simulate and write maze.npz, or the walk's files."""
        from leap_shared.offline import PointMaze, generate

        if self.walk:
            from leap_shared.offline.generation import generate_point_maze

            steps: Progress[Any] = context.progress(description="steps", total=self.rows)
            manifest = generate_point_maze(
                context.out,
                rows=self.rows,
                seed=self.seed,
                formats=self.formats,
                progress=lambda count, text: steps.advance(count, text=text),
            )
            return manifest if self.json else manifest["files"]
        maze = PointMaze(self.episodes, self.episode_steps, self.goal_fraction, self.noise)
        bar: Progress[Any] = context.progress(description="episodes", total=self.episodes)
        dataset = generate(maze, self.seed, context.out / "maze.npz", bar.advance)
        return {"rows": len(dataset), "written": str(context.out / "maze.npz")}


def described(priorities: Priorities, path: Path) -> dict[str, object]:
    """What is said of weights that were written."""
    return {
        "rows": len(priorities),
        "weight std": priorities.std,
        "largest weight": float(priorities.weights.max()),
        "effective sample size": priorities.effective_sample_size,
        "written": str(path),
    }


@dataclass(frozen=True, kw_only=True)
class WeightsR(DataCommand):
    """Priorities from returns (OPER-R) of a data set; writes weights.npz.

    Examples:
        leap-oper weights r data.npz --out runs/weights
        leap-oper weights r antmaze-umaze-v2 --base-prob 0.2 --out runs/weights
    """

    verb: ClassVar[str] = "weights r"

    base_prob: float = 0.0
    """Added to each episode's share before normalising; 0 never draws the worst episodes."""
    variant: Literal["return", "inverse", "reward"] = "return"
    """What is preferred: high returns, low returns, or each row's own reward."""

    def run(self, context: Context) -> object:
        """Compute and save the weights."""
        from leap_oper.priorities import oper_r

        dataset = self.load()
        priorities = oper_r(dataset, self.base_prob, self.variant)
        priorities.save(context.out / "weights.npz")
        return {"episodes": int(dataset.ends.sum()), **described(priorities, context.out / "weights.npz")}


@dataclass(frozen=True, kw_only=True)
class WeightsA(DataCommand):
    """Priorities from advantages (OPER-A), all seeds in one program; killed, it goes on; writes weights.npz.

    The file keeps the weights of every iteration and seed; `train --iteration` chooses.

    Examples:
        leap-oper weights a hopper-medium-replay-v2 --iters 5 --steps 1000000 --seeds 1 2 3 --out runs/weights
    """

    verb: ClassVar[str] = "weights a"

    iters: int = 5
    """Iterations."""
    steps: int = 1_000_000
    """Updates of each."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One value network each; weights are averaged over them when they are used."""
    n_step: int = 1
    """Rewards summed before the bootstrap."""
    critic_type: Literal["doublev", "v", "vq"] = "doublev"
    """Twin values, one value, or a value with twin Q."""
    td_type: Literal["nstep", "mc"] = "nstep"
    """Targets: n-step, or returns to go."""
    adv_type: Literal["nstep", "gae", "mc"] = "nstep"
    """Advantages: of the targets, generalised, or returns to go."""
    antmaze: bool = False
    """Subtract 1 from every reward."""
    schedule: Literal["cosine", "linear", "none"] = "cosine"
    """Learning rate within an iteration."""
    threads: int = 1
    """Threads of PyTorch."""

    def run(self, context: Context) -> object:
        """Fit, weigh and save."""
        import torch

        from leap_oper.advantages import oper_a

        torch.set_num_threads(self.threads)
        names = ("iters", "steps", "seeds", "n_step", "critic_type", "td_type", "adv_type", "antmaze", "schedule")
        bar: Progress[Any] = context.progress(description="OPER-A: updates", total=self.iters * self.steps)
        priorities = oper_a(
            self.load(),
            device=str(context.device),
            out=context.out / "checkpoints",
            progress=bar.advance,
            **{name: getattr(self, name) for name in names},
        )
        priorities.save(context.out / "weights.npz")
        return described(priorities.at(self.iters).ensemble("mean"), context.out / "weights.npz")
