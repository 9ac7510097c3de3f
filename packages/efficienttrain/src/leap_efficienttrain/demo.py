"""The paper's claim in small: accuracy and seconds with and without the curriculum, where it wins and where not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from leap_efficienttrain import figures
from leap_efficienttrain.arms import ARMS, COMPARISONS, MATCHED, METRIC, SECONDS, Problem, interval
from leap_efficienttrain.cost import gmac
from leap_efficienttrain.miniature import ConvNet, Recipe, accuracy, train
from leap_shared.bench import stamp
from leap_shared.cli import Context, Progress
from leap_shared.errors import UserError
from leap_shared.experiment import Experiment, Result
from leap_shared.experiment import run as run_arms
from leap_shared.files import ensure_folder
from leap_shared.vision.bodies.grids import Number

__all__ = ["CLAIM", "Settings", "run", "table"]

EPOCHS, WORK = "equivalent epochs", "forward 10^12 multiply-adds"
PER_PICTURE = "ms per picture at {size} px"
LEAST_SAVING = 5.0  # percent of the seconds

CLAIM = Experiment(
    name="efficienttrain",
    title="EfficientTrain++: small pictures and weak augmentation first",
    claim="With a third of the compute, training on small, little augmented pictures first is more accurate than "
    "training on large ones from the start.",
    baseline=ARMS["third"].title,
    method=ARMS["et third"].title,
    metric=METRIC,
    unit="%",
    smallest_effect=2.0,
    source="EfficientTrain++: Generalized Curriculum Learning for Efficient Visual Backbone Training",
)
PROTOCOL_NOTE = (
    "T is {epochs:g} epochs at {side} pixels; compute counts pixels. Every seed draws {drawn}; all arms share them. "
    "ET++ trains at {sizes} pixels for {shares} of its compute while the magnitude of augmentation rises from 0 to 9; "
    "ordinary training has {side} pixels and 9 throughout. All are tested at {side} pixels."
)
SECONDS_NOTE = (
    "Seconds are measured: the process's own processor time while it trains, with augmentation and down-sampling, "
    "without the test and the making of patches. Pictures are brought to a size once, by Lanczos, and augmented "
    "at that size."
)
SPEED_NOTE = (
    "{title}: a picture at {size} px has {work:.0%} of the operations of one at {side} px and takes {time:.0%} of its "
    "time."
)
RULES_NOTE = (
    "The least differences that matter are {effect:g} points of accuracy and {saving:g}% of the seconds. Each "
    "comparison is judged by itself. As accurate means: not worse by more than {effect:g} points."
)
SEEDS_NOTE = (
    "Pictures, sizes, epochs, network, seeds 0 to 5 and the least differences were set before any of these seeds ran, "
    "after trials with seeds from 1000 on."
)
SMOKE_NOTE = "This was --quick, a smoke test that everything runs: its sizes can support no conclusion."


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; the defaults are what the README reports.

    Raises:
        UserError: there are no seeds or no pictures.
    """

    seeds: tuple[int, ...] = tuple(range(6))
    problems: tuple[Problem, ...] = (Problem(), Problem("digits", 16, 2, 4))
    """The first one decides about the claim."""
    recipe: Recipe = field(default_factory=Recipe)
    smoke: bool = False
    """Whether this only shows that everything runs: too small to say anything about the claim."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise UserError("there are no seeds: give at least one")
        if not self.problems:
            raise UserError("there are no pictures: name at least one problem")

    @classmethod
    def quick(cls, seed: int = 0) -> Settings:
        """About ten seconds."""
        problems = (Problem(side=32, multiple=4, epochs=6, per_photograph=(6, 4)), Problem("digits", 16, 2, 0.5))
        return cls(seeds=(seed, seed + 1), problems=problems, recipe=Recipe(widths=(8, 16), batch=32), smoke=True)

    @classmethod
    def of(
        cls, data: str, validation: str, side: int = 96, epochs: Number = 4, seeds: Sequence[int] = range(6)
    ) -> Settings:
        """The same on the user's own pictures.

        Args:
            data: a folder of class folders, .tar shards, an .npz file, or hf:NAME.
            validation: the same for what is tested.
            side: full size in pixels.
            epochs: T.
            seeds: of weights and batches.
        """
        return cls(seeds=tuple(seeds), problems=(Problem("given", side, 16, epochs, data=data, validation=validation),))


def _outcome(
    seed: int, *, arm: str, problem: Problem, recipe: Recipe, device: torch.device, epochs: Number | None = None
) -> dict[str, float]:
    """Train one network and test it."""
    task = problem.load(seed)
    model = ConvNet(recipe.widths, len(task.classes), seed).to(device)
    curriculum = problem.curriculum(arm, recipe, epochs)
    work = {size: gmac(model, size) for size in {stage.size for stage in curriculum.stages}}
    spent = train(model, task.train, curriculum, recipe, seed, device)
    return {
        METRIC: accuracy(model, task.test, device),
        SECONDS: sum(seconds for seconds, _ in spent.values()),
        EPOCHS: float(curriculum.equivalent_epochs),
        WORK: sum(count * work[size] for size, (_, count) in spent.items()) / 1e3,
        **{PER_PICTURE.format(size=size): 1e3 * seconds / count for size, (seconds, count) in spent.items()},
    }


def _warm_up(problem: Problem, settings: Settings, device: torch.device) -> None:
    """A few updates at every size, so that nothing that is made once counts as an arm's."""
    task = problem.load(settings.seeds[0])
    few = type(task.train)(*(part[: settings.recipe.batch] for part in task.train))
    model = ConvNet(settings.recipe.widths, len(task.classes), 0).to(device)
    for arm in ("full", "et third"):
        train(model, few, problem.curriculum(arm, settings.recipe, 10), settings.recipe, 0, device)


def _measure(
    problem: Problem,
    experiment: Experiment,
    settings: Settings,
    device: torch.device,
    progress: Progress[Any],
    work: Path,
) -> Result:
    """All arms, seed by seed; what the arm with equal seconds trains follows from the others' seconds."""
    options: dict[str, Any] = {"problem": problem, "recipe": settings.recipe, "device": device}
    arms = {ARMS[arm].title: partial(_outcome, arm=arm, **options) for arm in ARMS if arm != MATCHED}
    known = asdict(problem) | asdict(settings.recipe) | {"device": device.type}
    _warm_up(problem, settings, device)
    outcomes: dict[str, dict[int, Mapping[str, float]]] = {}
    for seed in settings.seeds:
        done = run_arms(experiment, arms, [seed], progress, work, known).outcomes
        whole, ours = (done[ARMS[arm].title][seed][SECONDS] for arm in ("full", "et two thirds"))
        matched = partial(_outcome, arm=MATCHED, epochs=float(problem.epochs) * ours / whole, **options)
        done = run_arms(experiment, {**arms, ARMS[MATCHED].title: matched}, [seed], None, work, known).outcomes
        progress.advance(1, text=f"{ARMS[MATCHED].title}, seed {seed}: {done[ARMS[MATCHED].title][seed][METRIC]:.4g}")
        for arm, by_seed in done.items():
            outcomes.setdefault(arm, {}).update(by_seed)
    return Result.from_outcomes(experiment, outcomes)


def run(settings: Settings, context: Context) -> dict[str, Any]:
    """Run the experiment, write the section and its figure to `context.out`; killed, it goes on.

    Returns:
        The result as JSON values; `tasks` has arms, comparisons with their verdicts, and costs, for all pictures.
    """
    out = context.out
    total = len(settings.problems) * len(settings.seeds) * len(ARMS)
    progress: Progress[Any] = context.progress(description="train", total=total)
    results, found = [], []
    for number, problem in enumerate(settings.problems):
        experiment = CLAIM if not number else replace(CLAIM, name=f"{CLAIM.name}-{problem.kind}")
        work = ensure_folder(out / ("work-quick" if settings.smoke else "work") / f"{number + 1}-{problem.kind}")
        results.append(_measure(problem, experiment, settings, context.device, progress, work))
        found.append(_facts(problem, results[-1], settings))
    path = figures.figure(out / "curriculum.png", found)
    caption = (
        "Left: accuracy over measured seconds; a faint dot per seed, the mean with its 95% intervals. Middle: "
        "differences, seed by seed. Right: time of a picture beside its operations, both in parts of one at full size."
    )
    notes = (*((SMOKE_NOTE,) if settings.smoke else ()), *_notes(found, settings))
    result = replace(results[0], experiment=replace(CLAIM, notes=notes))
    result.write(out, figures=[(path, caption, "Accuracy, seconds and operations of the arms")])
    for task in found:
        for facts in task["comparisons"]:
            context.log(f"{task['task']}: {facts['comparison']}: {facts['verdict']} ({facts['rule']})")
    context.log(f"{result.verdict}; the report is {out / 'section.html'}")
    return {**result.to_json(), "tasks": found, "stamp": stamp()}


def _facts(problem: Problem, result: Result, settings: Settings) -> dict[str, Any]:
    """What was measured on one problem."""
    outcomes, rows = result.outcomes, []
    for arm, by_seed in outcomes.items():
        values = {name: [by_seed[seed][name] for seed in sorted(by_seed)] for name in (METRIC, SECONDS, WORK)}
        rows.append({"arm": arm, **{name: {"values": each, **interval(each)} for name, each in values.items()}})
    et = problem.curriculum("et third", settings.recipe)
    sizes = sorted({stage.size for stage in et.stages})
    model = ConvNet(settings.recipe.widths, len(problem.load(settings.seeds[0]).classes), 0)
    times = {size: _pooled(outcomes, PER_PICTURE.format(size=size)) for size in sizes}
    full = problem.side
    costs = [
        {
            "size": size,
            "ms_per_picture": times[size],
            "time": times[size] / times[full],
            "operations": gmac(model, size) / gmac(model, full),
        }
        for size in sizes
    ]
    judged = [each.judge(result.experiment, outcomes, LEAST_SAVING) for each in COMPARISONS]
    return {"task": problem.title, **asdict(problem), "arms": rows, "comparisons": judged, "costs": costs}


def _pooled(outcomes: Mapping[str, Mapping[int, Mapping[str, float]]], name: str) -> float:
    """Mean over the seeds of the two arms that train at all sizes with all magnitudes."""
    rows = [outcomes[ARMS[arm].title] for arm in ("et two thirds", "et third")]
    values = [by_seed[seed][name] for by_seed in rows for seed in by_seed]
    return sum(values) / len(values)


def _notes(found: Sequence[Mapping[str, Any]], settings: Settings) -> list[str]:
    notes = []
    for task, problem in zip(found, settings.problems, strict=True):
        stages = problem.curriculum("et third", settings.recipe).stages
        sizes = list(dict.fromkeys(stage.size for stage in stages))
        shares = [sum(stage.share for stage in stages if stage.size == size) for size in sizes]
        drawn = "weights and batches"
        if problem.kind != "given":
            drawn = f"the pictures to train on and to test, {drawn}"
        facts = {"epochs": problem.epochs, "side": problem.side, "sizes": _listed(map(str, sizes)), "drawn": drawn}
        claims = [f"{_sentence(each)}." for each in task["comparisons"]]
        notes.append(f"{task['task']}. " + PROTOCOL_NOTE.format(**facts, shares=_listed(f"{x:.0%}" for x in shares)))
        notes.append(f"{task['task']}. " + " ".join(claims))
        smallest = task["costs"][0]
        speed = {"work": smallest["operations"], "time": smallest["time"], "size": smallest["size"]}
        notes.append(SPEED_NOTE.format(title=task["task"], side=problem.side, **speed))
    rules = RULES_NOTE.format(effect=CLAIM.smallest_effect, saving=LEAST_SAVING)
    return [*notes, SECONDS_NOTE, rules, *((SEEDS_NOTE,) if settings == Settings() else ())]


def _sentence(facts: Mapping[str, Any]) -> str:
    claim = f"{facts['claim'][0].upper()}{facts['claim'][1:]}" if facts["claim"] else f"Beside it, {facts['rule']}"
    return f"{claim}: {facts['comparison']} {_change(facts)}, {facts['verdict']}"


def _listed(parts: Any) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else str(last)


def _change(facts: Mapping[str, Any]) -> str:
    unit = "% of the seconds saved" if facts["rule"] == "faster" else " points"
    return f"{facts['estimate']:+.2f}{unit} ({_interval(facts, signed=True)})"


def _interval(facts: Mapping[str, Any], *, signed: bool = False) -> str:
    if facts["interval"] is None:
        return "unknown"
    low, high = (f"{value:{'+' if signed else ''}.2f}" for value in facts["interval"])
    return f"{low} to {high}"


def table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `run` returned as rows for people: the arms of each task, then the comparisons with their verdicts."""
    rows = []
    for task in result["tasks"]:
        for arm in task["arms"]:
            row = {"pictures": task["task"], "arm": arm["arm"]}
            for name in (METRIC, SECONDS):
                row[name] = f"{arm[name]['estimate']:.2f} ({_interval(arm[name])})"
            rows.append({**row, "10^12 MAC": f"{arm[WORK]['estimate']:.3g}", "verdict": ""})
        for facts in task["comparisons"]:
            row = {"pictures": task["task"], "arm": f"{facts['comparison']}: {facts['rule']}"}
            shown = f"{facts['estimate']:+.2f} ({_interval(facts, signed=True)})"
            row |= (
                {METRIC: "", SECONDS: f"{shown} % saved"} if facts["rule"] == "faster" else {METRIC: shown, SECONDS: ""}
            )
            rows.append({**row, "10^12 MAC": "", "verdict": facts["verdict"]})
    return rows
