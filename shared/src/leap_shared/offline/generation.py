"""Data sets made by simulation: SAC or TD3 on any gymnasium task with vector actions, and a walker in PointMaze.

The recipes are D4RL's (Fu et al. 2020, section 5 and appendix). Scores on newer versions of its tasks are in the
reference range of D4RL but not comparable with published ones: the simulations differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leap_shared.errors import UserError, did_you_mean
from leap_shared.files import ensure_folder
from leap_shared.offline.online import SAC, TD3, Learner, SACConfig, TD3Config
from leap_shared.offline.point_maze import ENVIRONMENT, REACHED, PointMaze, Walker
from leap_shared.offline.production import FORMATS, WORK, DataFiles, Meter, Store, check_formats, finished, silent
from leap_shared.offline.recording import Recording, derived_seed, described
from leap_shared.offline.scores import reference, tasks
from leap_shared.offline.simulation import run_episodes

__all__ = ["FORMATS", "LEVELS", "generate_mujoco", "generate_point_maze"]

Row = dict[str, int | float]
Arrays = dict[str, NDArray[Any]]
LEVELS = ("random", "medium", "medium-replay", "expert", "medium-expert", "full-replay")
MEDIUM, FINAL = {"medium", "medium-replay", "medium-expert"}, {"expert", "medium-expert", "full-replay"}
MEDIUM_SHARE = 1 / 3
"""Of the expert's score."""
MOST_ROWS = 2_000_000
"""Of medium-expert."""
SAVE_EVERY_ROWS = 50_000
NOTE = "returns on this version of the environment are not comparable with published D4RL scores"
TRAINING, EVALUATION, RANDOM, MEDIUM_SAMPLES, FINAL_SAMPLES = range(5)  # uses of the seed


@dataclass(frozen=True)
class _Settings:
    """What the rows depend on, beside how long a training goes on."""

    environment: str
    options: Mapping[str, Any]
    algorithm: str
    config: SACConfig | TD3Config
    num_envs: int
    updates_per_step: float
    random_steps: int
    evaluate_every: int
    evaluation_episodes: int
    seed: int

    def __post_init__(self) -> None:
        counts = self.num_envs, self.evaluate_every, self.evaluation_episodes
        if min(counts) < 1 or self.seed < 0 or self.random_steps < 1 or not 0 < self.updates_per_step < math.inf:
            raise UserError(
                f"num_envs, evaluate_every, evaluation_episodes={counts}, random_steps={self.random_steps}, "
                f"updates_per_step={self.updates_per_step}, seed={self.seed}: expected a seed >= 0, the rest above 0"
            )

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `make_environment`; JSON has made a list of the keys."""
        return {**self.options, **({"keys": tuple(self.options["keys"])} if "keys" in self.options else {})}

    def learner(self, recording: Recording) -> Learner:
        """A new learner for the recorded environments."""
        kind: Any = {"sac": SAC, "td3": TD3}[self.algorithm]
        made: Learner = kind(recording.observation, recording.action, self.config, self.seed)
        return made

    def recording(self, path: Path, rows: int, use: int) -> Recording:
        """A recording in the file at `path`, from the seeds of one `use`."""
        seed = derived_seed(self.seed, use)
        return Recording(path, self.environment, self.num_envs, rows, seed, self.arguments)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = asdict(self)
        return {**values, "config": {**values["config"], "hidden": list(self.config.hidden)}}


def generate_mujoco(
    env: str,
    level: str | Sequence[str],
    out: Path | str,
    *,
    algorithm: str = "sac",
    config: SACConfig | TD3Config | None = None,
    steps: int = 1_000_000,
    rows: int = 1_000_000,
    target_score: float | None = None,
    expert_score: float | None = None,
    num_envs: int = 4,
    updates_per_step: float = 1.0,
    random_steps: int = 1000,
    evaluate_every: int = 2000,
    evaluation_episodes: int = 10,
    seed: int = 0,
    formats: Sequence[str] = FORMATS,
    keep: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, str], object] | None = None,
) -> dict[str, Any]:
    """Make D4RL's data sets of one task; of several levels from one training, as D4RL's own are.

    random: uniform actions. medium: sampled actions of the policy whose evaluation first reaches the target.
    medium-replay: all steps of the training until then. expert: sampled actions of the policy after `steps`.
    medium-expert: both, the first cut after its last complete episodes, at most 2M rows. full-replay: all steps of the
    training. Recorded are the steps of `num_envs` environments, episode after episode in the order of their starts.

    A call that was killed at any moment goes on when it is made again; on the same machine and with an environment
    whose randomness comes from its seed the files get the same bits. The state of the environments is brought back by
    stepping their running episodes again with the recorded actions; where that does not give the recorded observation,
    the episode is cut there (as a timeout) and a new one starts from a seed of its own.

    Written into `out`: NAME-LEVEL.hdf5, minari/NAME/LEVEL-v0, NAME-LEVEL-policy.safetensors (l1.weight, ... of the
    actor; SAC: μ and log σ, of which tanh μ is the deterministic action), and last of all manifest.json.

    Args:
        env: name of a gymnasium environment whose observations and actions are vectors; actions are stored in [-1, 1].
        level: one of `LEVELS`, or several.
        out: folder.
        algorithm: "sac" or "td3" (whose clipped noise has no density: no infos/action_log_probs).
        config: hyperparameters of the algorithm; None is its paper's.
        steps: steps of the training, of all environments together; may be raised in a later call.
        rows: of random, medium and expert, and of each half of medium-expert.
        target_score: return that the deterministic policy must reach in evaluation to be medium.
        expert_score: of which the target is a third; None is D4RL's reference, or the environment's reward threshold.
        num_envs: environments stepped side by side.
        updates_per_step: of the learner, for each step of one environment.
        random_steps: with uniform actions and without updates, at the beginning.
        evaluate_every: steps.
        evaluation_episodes: of each evaluation, always from the same seeds.
        seed: of everything.
        formats: "d4rl", "minari" or both.
        keep: leave the folder `out`/work with the training.
        options: keyword arguments of `gymnasium.make`, and `keys` for Dict observations.
        progress: called with the number of steps done since the last call and a word on them.

    Returns:
        The manifest: environment, settings, versions, evaluations, and the files with SHA-256, episodes and returns.

    Raises:
        UserError: an argument is wrong; the target was not reached in `steps` (the training stays in `out`/work); or
            `out` holds something else.
    """
    levels = _levels(level)
    check_formats(formats)
    if min(steps, rows) < 2:
        raise UserError(f"steps={steps}, rows={rows}: give at least 2 of each")
    settings = _Settings(
        environment=env,
        options=_json(options or {}),
        algorithm=algorithm,
        config=_config(algorithm, config),
        num_envs=num_envs,
        updates_per_step=updates_per_step,
        random_steps=random_steps,
        evaluate_every=evaluate_every,
        evaluation_episodes=evaluation_episodes,
        seed=seed,
    )
    spec = described(env, settings.arguments)[2]
    target = _target(env, spec, target_score, expert_score) if MEDIUM & set(levels) else None
    out = ensure_folder(Path(out))
    wanted = {"levels": levels, "steps": steps, "rows": rows, "target_score": target, "formats": list(formats)}
    wanted |= settings.plain()
    if (manifest := finished(out, wanted)) is not None:
        return manifest
    files = DataFiles(out, env, spec, formats)
    result = _Job(settings, files, levels, steps, rows, target, progress or silent).run()
    return files.finish(wanted, {**result, "note": NOTE}, keep=keep)


def _json(options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(json.dumps(dict(options)))
    except TypeError as error:
        raise UserError(
            f"options of the environment cannot be kept in the manifest ({error}): give JSON's types"
        ) from error
    return values


def _levels(level: str | Sequence[str]) -> list[str]:
    levels = [level] if isinstance(level, str) else list(level)
    if not levels:
        raise UserError(f"no level is given: choose from {', '.join(LEVELS)}")
    for name in levels:
        if name not in LEVELS:
            raise UserError(f"level {name!r} is unknown: {did_you_mean(name, LEVELS)}")
    return [name for name in LEVELS if name in levels]


def _config(algorithm: str, config: SACConfig | TD3Config | None) -> SACConfig | TD3Config:
    kinds: dict[str, type[SACConfig | TD3Config]] = {"sac": SACConfig, "td3": TD3Config}
    if algorithm not in kinds:
        raise UserError(f"algorithm {algorithm!r} is unknown: use {' or '.join(kinds)}")
    if config is not None and not isinstance(config, kinds[algorithm]):
        raise UserError(f"config is a {type(config).__name__}: {algorithm} takes a {kinds[algorithm].__name__}")
    return config or kinds[algorithm]()


def _target(name: str, spec: Any, target: float | None, expert: float | None) -> float:
    """Return from which on a policy is medium."""
    if target is None and expert is None:
        task = f"{name.rpartition('-v')[0].lower()}-expert-v2"
        expert = reference(task).max_score if task in tasks() else spec.reward_threshold
    if target is None and expert is not None and expert > 0:
        target = MEDIUM_SHARE * expert
    if target is None or not math.isfinite(target):
        raise UserError(
            f"a third of the expert's score ({expert}) is no target for {name}: give target_score, the return at which "
            "a policy is medium"
        )
    return target


class _Training:
    """A learner with its steps and evaluations, which goes on where it was killed."""

    def __init__(self, settings: _Settings, folder: Path, steps: int, progress: Callable[[int, str], object]) -> None:
        self.settings, self.steps, self.progress = settings, steps, progress
        self.recording = settings.recording(ensure_folder(folder) / "steps.f4", steps, TRAINING)
        self.learner = settings.learner(self.recording)
        self.generator = torch.Generator().manual_seed(derived_seed(settings.seed, TRAINING))
        objects: dict[str, Any] = {"learner": self.learner, "recording": self.recording, "generator": self.generator}
        self._store = Store(folder, settings.plain(), objects | {"history": [], "medium": None})

    @property
    def history(self) -> list[Row]:
        """Evaluations: {step, updates, return, return_std}."""
        history: list[Row] = self._store.objects["history"]
        return history

    def medium(self, target: float) -> dict[str, Any]:
        """{target, step, return, policy} where an evaluation first reached `target`.

        Raises:
            UserError: no evaluation did.
        """
        found: dict[str, Any] | None = self._store.objects["medium"]
        if found is not None and found["target"] == target:
            return found
        self._run(target)
        best = max((row["return"] for row in self.history), default=-math.inf)
        if not self.history or self.history[-1]["return"] < target:
            raise UserError(
                f"{self.settings.environment} reached a return of {best:.6g}, not the target of {target:.6g}, in "
                f"{len(self.recording)} steps: repeat the call with more steps or a lower target_score, and it goes on "
                "from what it has"
            )
        last = self.history[-1]
        policy = {name: value.clone() for name, value in self.learner.export_policy().items()}
        found = {"target": target, "step": last["step"], "return": last["return"], "policy": policy}
        self._store.objects["medium"] = found
        self._store.save(len(self.recording))
        return found

    def final(self) -> dict[str, Any]:
        """{step, return, policy} after all steps."""
        self._run(None)
        last = self.history[-1]
        return {"step": last["step"], "return": last["return"], "policy": self.learner.export_policy()}

    def close(self) -> None:
        """Close the environments, let go of the folder."""
        self.recording.close()
        self._store.close()

    def _run(self, target: float | None) -> None:
        """Train to the last step, or until an evaluation reaches the target."""
        recording, every = self.recording, self.settings.evaluate_every
        meter = Meter("training", self.steps, len(recording), self.progress, self.learner.updates)
        while (done := len(recording)) < self.steps:
            if target is not None and self.history and self.history[-1]["return"] >= target:
                break
            stop = min(done + every - done % every, self.steps)
            logs: dict[str, Any] = {}
            while len(recording) < stop:
                logs = self._round() or logs
                meter.report(len(recording), self.learner.updates, now=False)
            self._store.check_finite(sum(logs.values(), start=torch.zeros(())).sum(), len(recording))
            self.history.append(self._evaluated())
            self._store.save(len(recording))
            meter.word = f", return {self.history[-1]['return']:.6g}"
            meter.word += "" if target is None else f" of {target:.6g}"
        meter.report(len(recording), self.learner.updates)

    def _round(self) -> dict[str, Any]:
        settings, recording, learner = self.settings, self.recording, self.learner
        if len(recording) < settings.random_steps:
            actions, log_probs = _uniform(recording, self.generator)
        else:
            actions, log_probs = learner.explore(torch.from_numpy(recording.observations), self.generator)
        recording.step(actions.numpy(), log_probs.numpy())
        due = int((len(recording) - settings.random_steps) * settings.updates_per_step) - learner.updates
        logs: dict[str, Any] = {}
        if due > 0:
            batches = recording.drawn(due, settings.config.batch_size, self.generator)
            for batch, noise in zip(batches, learner.noise(due, self.generator), strict=True):
                logs = learner.update(batch, noise)
        return logs

    def _evaluated(self) -> Row:
        """Returns of the deterministic policy, from the same starts each time."""
        settings = self.settings

        def act(observations: NDArray[np.float32]) -> NDArray[np.float32]:
            actions: NDArray[np.float32] = self.learner.act(torch.from_numpy(observations[0]))[None].numpy()
            return actions

        seed = derived_seed(settings.seed, EVALUATION)
        returns = run_episodes(act, settings.environment, 1, settings.evaluation_episodes, seed, **settings.arguments)
        counts = {"step": len(self.recording), "updates": self.learner.updates}
        return {**counts, "return": float(returns.mean()), "return_std": float(returns.std())}


def _uniform(recording: Recording, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = recording.num_envs, recording.action
    density = -recording.action * math.log(2)
    return torch.rand(shape, generator=generator) * 2 - 1, torch.full(shape[:1], density)


class _Job:
    """All levels of one call: what they need is made once, and written level by level."""

    def __init__(
        self,
        settings: _Settings,
        files: DataFiles,
        levels: Sequence[str],
        steps: int,
        rows: int,
        target: float | None,
        progress: Callable[[int, str], object],
    ) -> None:
        self.settings, self.files, self.levels, self.steps, self.rows = settings, files, levels, steps, rows
        self.target, self.progress, self.work = target, progress, files.out / WORK

    def run(self) -> dict[str, Any]:
        """Make and write everything; what the manifest says of the training."""
        result: dict[str, Any] = {}
        if "random" in self.levels:
            self._write("random", self._sampled("random", None, RANDOM).arrays(limit=self.rows))
        if set(self.levels) & (MEDIUM | FINAL):
            training = _Training(self.settings, self.work / "training", self.steps, self.progress)
            try:
                self._write_trained(training)
            finally:
                training.close()
            result = {"steps": len(training.recording), "updates": training.learner.updates}
            result["evaluations"] = training.history
        return result

    def _write(self, level: str, arrays: Arrays) -> None:
        algorithm = "uniform" if level == "random" else self.settings.algorithm
        self.files.write(level, arrays, {"algorithm": algorithm, "seed": self.settings.seed})

    def _write_trained(self, training: _Training) -> None:
        levels, samples = set(self.levels), dict[str, Recording]()
        if self.target is not None:
            medium = training.medium(self.target)
            self.files.write_policy("medium", self.settings.algorithm, medium)
            if "medium-replay" in levels:
                self._write("medium-replay", training.recording.arrays(int(medium["step"])))
            if levels & {"medium", "medium-expert"}:
                samples["medium"] = self._sampled("medium", medium, MEDIUM_SAMPLES)
        if levels & FINAL:
            final = training.final()
            self.files.write_policy("expert", self.settings.algorithm, final)
            if "full-replay" in levels:
                self._write("full-replay", training.recording.arrays())
            if levels & {"expert", "medium-expert"}:
                samples["expert"] = self._sampled("expert", final, FINAL_SAMPLES)
        for level, recording in samples.items():
            if level in levels:
                self._write(level, recording.arrays(limit=self.rows))
        if "medium-expert" in levels:
            first = samples["medium"].arrays(limit=self.rows, whole=True)
            second = samples["expert"].arrays(limit=min(self.rows, MOST_ROWS - len(first["rewards"])))
            self._write("medium-expert", {key: np.concatenate([first[key], second[key]]) for key in first})

    def _sampled(self, name: str, policy: Mapping[str, Any] | None, use: int) -> Recording:
        """Steps with a policy's sampled actions, or with uniform ones."""
        settings, rows = self.settings, self.rows
        folder = ensure_folder(self.work / (f"{name}-{policy['step']}" if policy else name))
        recording = settings.recording(folder / "steps.f4", rows, use)
        learner, generator = (
            settings.learner(recording),
            torch.Generator().manual_seed(derived_seed(settings.seed, use)),
        )
        if policy is not None:
            learner.load_policy(policy["policy"])
        store = Store(folder, settings.plain(), {"recording": recording, "generator": generator})
        meter = Meter(f"{name} samples", rows, len(recording), self.progress)
        try:
            while len(recording) < rows:
                if policy is None:
                    actions, log_probs = _uniform(recording, generator)
                else:
                    actions, log_probs = learner.explore(torch.from_numpy(recording.observations), generator)
                recording.step(actions.numpy(), log_probs.numpy())
                meter.report(len(recording), now=False)
                if len(recording) // SAVE_EVERY_ROWS > (len(recording) - recording.num_envs) // SAVE_EVERY_ROWS:
                    store.save(len(recording))
            store.save(len(recording))
            meter.report(len(recording))
        finally:
            recording.close()
            store.close()
        return recording


def generate_point_maze(
    out: Path | str,
    *,
    rows: int = 1_000_000,
    maze: PointMaze | None = None,
    seed: int = 0,
    formats: Sequence[str] = FORMATS,
    keep: bool = False,
    progress: Callable[[int, str], object] | None = None,
) -> dict[str, Any]:
    """Make data as D4RL's maze2d: one walk from one random goal to the next by `Walker`, relabelled for one goal.

    Rewards are 1 where the state after the step is within 0.45 of the maze's goal, as the environment has it; nothing
    is terminal. Timeouts mark the steps that reached a goal of the walk, infos/goal is where it leads to.

    A call that was killed goes on when it is made again, to the same bits: the walk is stepped again from its start
    with the recorded actions.

    Written into `out`: PointMaze_Medium-v3-walk.hdf5, minari/PointMaze_Medium-v3/walk-v0, and last manifest.json.

    Args:
        out: folder.
        rows: steps of the walk.
        maze: gives the goal of the rewards and the noise on the actions; None is D4RL's, without noise.
        seed: of everything.
        formats: "d4rl", "minari" or both.
        keep: leave the folder `out`/work.
        progress: called with the number of steps done since the last call and a word on them.

    Returns:
        The manifest, as of `generate_mujoco`.

    Raises:
        UserError: an argument is wrong, gymnasium-robotics is missing, or `out` holds something else.
    """
    check_formats(formats)
    if rows < 2 or seed < 0:
        raise UserError(f"rows={rows}, seed={seed}: give at least 2 rows and a seed >= 0")
    maze = maze or PointMaze(noise=0.0)
    options = {"keys": ("observation",), "continuing_task": True, "reset_target": False, "max_episode_steps": rows + 1}
    spec, out = described(ENVIRONMENT, options)[2], ensure_folder(Path(out))
    settings: dict[str, Any] = {"environment": ENVIRONMENT, "rows": rows, "seed": seed}
    settings |= {"goal": list(maze.goal), "noise": maze.noise}
    wanted = {**settings, "formats": list(formats)}
    if (manifest := finished(out, wanted)) is not None:
        return manifest
    folder = ensure_folder(out / WORK)
    recording = Recording(folder / "steps.f4", ENVIRONMENT, 1, rows, derived_seed(seed, TRAINING), options)
    random = np.random.default_rng(derived_seed(seed, RANDOM))
    walker = Walker(maze, random)
    objects: dict[str, Any] = {"recording": recording, "random": random, "walker": walker, "goals": []}
    store = Store(folder, settings, objects)
    goals: list[list[float]] = store.objects["goals"]
    meter = Meter("walk", rows, len(recording), progress or silent)
    try:
        while (done := len(recording)) < rows:
            action, arrived = walker.act(recording.observations[0])
            if arrived or not done:
                goals.append([done, *walker.goal])
            recording.step(action[None], np.full(1, np.nan, np.float32))
            meter.report(done + 1, now=False)
            if (done + 1) % SAVE_EVERY_ROWS == 0:
                store.save(done + 1)
        store.save(rows)
        meter.report(rows)
        arrays = recording.arrays()
    finally:
        recording.close()
        store.close()
    distance = np.linalg.norm(arrays["next_observations"][:, :2] - maze.goal_position, axis=1)
    arrays["rewards"] = (distance <= REACHED).astype(np.float32)
    changes = np.array(goals)
    starts = changes[:, 0].astype(int)
    arrays["timeouts"][starts[1:] - 1] = True
    arrays["infos/goal"] = changes[:, 1:][np.searchsorted(starts, np.arange(rows), side="right") - 1]
    files = DataFiles(out, ENVIRONMENT, spec, formats)
    files.write("walk", arrays, {"seed": seed, "noise": maze.noise})
    return files.finish(wanted, {"goals": len(goals)}, keep=keep)
