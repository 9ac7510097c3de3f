"""Search of a curriculum, on accuracy functions whose best curriculum is known."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.executors import SerialExecutor
from leap_efficienttrain.parts import fine_tune_after, part
from leap_efficienttrain.searching import Search, SearchResult, search
from leap_efficienttrain.stages import LearningRate, any_last_size
from leap_shared.errors import UserError

SIZES = (96, 128, 160, 192, 224)
NEEDS = (160, 128, 160, 192, 224)
ICCV = (160, 160, 160, 192, 224)
PLUS_PLUS = (96, 160, 160, 224, 224)


def sizes_of(curriculum: Curriculum) -> tuple[int, ...]:
    return tuple(stage.size for stage in curriculum.stages)


def needy(curriculum: Curriculum, from_checkpoint: str | None, needs: Sequence[int] = NEEDS) -> float:
    """Accuracy that falls where a stage is smaller than it needs to be."""
    assert from_checkpoint is None
    sizes = sizes_of(curriculum) if len(curriculum.stages) > 1 else sizes_of(curriculum) * len(needs)
    return 0.8 - sum(max(need - size, 0) for need, size in zip(needs, sizes, strict=True)) / 1e4


def stepwise(curriculum: Curriculum, from_checkpoint: str | None, best: Sequence[int] = PLUS_PLUS) -> tuple[float, str]:
    """Accuracy that falls with the distance of each stage from its best size; the checkpoint names what was trained."""
    trained = [*(from_checkpoint.split("-") if from_checkpoint else []), *map(str, sizes_of(curriculum))]
    return -sum(abs(int(size) - want) / 1e3 for size, want in zip(trained, best, strict=False)), "-".join(trained)


def where(curriculum: Curriculum, from_checkpoint: str | None) -> tuple[float, str]:
    """As `needy`, and says where it ran."""
    place = f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')} {torch.get_num_threads()}"
    return needy(curriculum, from_checkpoint), place


class Counted:
    """A train function that knows its calls, and fails in one of them."""

    def __init__(self, function: Callable[..., Any], fails_at: int | None = None) -> None:
        self.function, self.fails_at = function, fails_at
        self.calls: list[tuple[tuple[int, ...], str | None]] = []

    def __call__(self, curriculum: Curriculum, from_checkpoint: str | None) -> Any:
        self.calls.append((sizes_of(curriculum), from_checkpoint))
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        return self.function(curriculum, from_checkpoint)


METHODS: dict[str, Callable[..., Any]] = {
    "greedy": functools.partial(needy, needs=(96, 160, 224)),
    "sequential": functools.partial(stepwise, best=(96, 160, 224)),
}
both = pytest.mark.parametrize("method", METHODS)


def test_greedy_search_finds_what_each_stage_needs() -> None:
    curriculum = search(needy, sizes=SIZES, stages=5, method="greedy", budget=300)
    assert sizes_of(curriculum) == ICCV
    assert (curriculum.unit, curriculum.equivalent_epochs, curriculum.base_size) == ("epochs", 300, 224)
    assert [stage.randaug for stage in curriculum.stages] == [1, 3, 5, 7, 9]
    assert [stage.share for stage in curriculum.stages] == [0.2] * 5


def test_sequential_search_finds_the_best_size_of_each_stage() -> None:
    curriculum = search(stepwise, sizes=SIZES, stages=5, method="sequential", budget=200)
    assert sizes_of(curriculum) == PLUS_PLUS
    assert (curriculum.unit, curriculum.equivalent_epochs) == ("compute", 200)


@given(
    weights=st.lists(st.integers(0, 9), min_size=3, max_size=3), tolerance=st.integers(0, 40), workers=st.integers(1, 4)
)
@settings(deadline=None, max_examples=10)
def test_greedy_search_of_a_monotone_accuracy_is_the_brute_force_optimum(
    weights: list[int], tolerance: int, workers: int
) -> None:
    def accuracy(sizes: Sequence[int]) -> int:
        return sum(weight * SIZES.index(size) for weight, size in zip([*weights, 0], sizes, strict=True))

    def train(curriculum: Curriculum, from_checkpoint: str | None) -> int:
        assert from_checkpoint is None
        return accuracy((sizes_of(curriculum) * 4)[:4])

    ascending = itertools.combinations_with_replacement(SIZES, 3)
    least = accuracy([224] * 4) - tolerance
    passing = [(*sizes, 224) for sizes in ascending if accuracy([*sizes, 224]) >= least]
    best = min(passing, key=lambda sizes: sizes[::-1])
    with ThreadPoolExecutor(workers) as threads:
        found = search(train, stages=4, budget=10, tolerance=tolerance, workers=workers, runner=threads)
    assert sizes_of(found) == best


@given(scores=st.lists(st.integers(0, 5), min_size=39, max_size=39), workers=st.integers(1, 4))
@settings(deadline=None, max_examples=10)
def test_sequential_search_takes_the_best_size_after_those_before(scores: list[int], workers: int) -> None:
    sizes = (96, 160, 224)
    histories = [history for length in (1, 2, 3) for history in itertools.product(sizes, repeat=length)]
    table = dict(zip(histories, scores, strict=True))

    def train(curriculum: Curriculum, from_checkpoint: str | None) -> tuple[float, str]:
        before = json.loads(from_checkpoint) if from_checkpoint else []
        if curriculum.equivalent_epochs < 1:  # the fine-tuning, which tells how good the stages before are
            return table[tuple(before)], "unused"
        return 0, json.dumps([*before, *sizes_of(curriculum)])

    expected: list[int] = []
    for _ in range(3):
        expected.append(max(sizes, key=lambda size: (table[(*expected, size)], -size)))
    with ThreadPoolExecutor(workers) as threads:
        method: Any = {"method": "sequential", "workers": workers, "runner": threads}
        with any_last_size():
            found = search(train, sizes=sizes, stages=3, budget=10, **method)
    assert sizes_of(found) == tuple(expected)


def test_each_sequential_trial_starts_from_the_stages_that_were_chosen() -> None:
    train = Counted(stepwise)
    with any_last_size():
        search(train, sizes=(96, 160, 224), stages=3, method="sequential", budget=30)
    first = [((size,), None) for size in (96, 160, 224)]
    judged = [((224,), str(size)) for size in (96, 160, 224)]
    second = [((size,), "96") for size in (96, 160, 224)]
    third = [((size,), "96-160") for size in (96, 160, 224)]
    judgements = [[((224,), f"{before}{size}") for size in (96, 160, 224)] for before in ("96-", "96-160-")]
    assert train.calls == [*first, *judged, *second, *judgements[0], *third, *judgements[1]]


def test_size_that_is_as_good_within_the_tolerance_is_preferred_where_smaller() -> None:
    with pytest.warns(UserWarning, match="the last stage trains at 192 pixels, below the base size 224"):
        loose = search(stepwise, sizes=SIZES, method="sequential", budget=10, tolerance=0.0321)
    assert sizes_of(loose) == (96, 128, 128, 192, 192)


def test_greedy_search_makes_as_many_trials_as_it_says_where_every_smaller_size_fails() -> None:
    train = Counted(functools.partial(needy, needs=(224,) * 5))
    assert sizes_of(search(train, budget=10)) == (224,) * 5
    assert len(train.calls) == 1 + 4 * 4
    assert len(set(train.calls)) == len(train.calls)


@pytest.mark.parametrize("repeats", [1, 2])
def test_sequential_search_makes_as_many_trials_as_it_says(repeats: int) -> None:
    def train(curriculum: Curriculum, from_checkpoint: str | None, seed: int) -> tuple[float, str]:
        return stepwise(curriculum, from_checkpoint)

    result = Search(method="sequential", budget=10, repeats=repeats).run(train)
    assert len(result.outcomes) == 2 * 5 * 5 * repeats
    assert result.cost == pytest.approx(5 * 10 * (1 + 5 * 0.05) * repeats)


def test_given_target_spares_the_ordinary_training() -> None:
    train = Counted(needy)
    assert sizes_of(search(train, budget=10, target=0.8)) == ICCV
    assert all(len(sizes) == 5 for sizes, _ in train.calls)


def test_mean_over_seeds_decides() -> None:
    seen = []

    def train(curriculum: Curriculum, from_checkpoint: str | None, seed: int) -> float:
        seen.append(seed)
        return needy(curriculum, from_checkpoint) + (0.1 if seed == 5 else -0.1)

    result = Search(budget=10, repeats=2, seed=5).run(train)
    assert sizes_of(result.curriculum) == ICCV
    assert result.target == pytest.approx(0.8)
    assert seen[:4] == [5, 6, 5, 6]


def test_each_seed_goes_on_from_its_own_checkpoint() -> None:
    def train(curriculum: Curriculum, from_checkpoint: str | None, seed: int) -> tuple[float, str]:
        assert from_checkpoint in (None, f"of {seed}")
        return 0.5, f"of {seed}"

    with any_last_size():
        found = search(train, sizes=(96, 224), method="sequential", budget=10, repeats=3, stages=3)
    assert sizes_of(found) == (96, 96, 96)


@both
@given(fails_at=st.integers(1, 13), torn=st.booleans())
@settings(deadline=None, max_examples=8)
def test_search_that_was_killed_goes_on_where_it_stopped(
    tmp_path_factory: pytest.TempPathFactory, method: str, fails_at: int, torn: bool
) -> None:
    log = tmp_path_factory.mktemp("log") / "trials.jsonl"
    setting: Any = {"method": method, "budget": 10, "sizes": (96, 160, 224), "stages": 3}
    train = METHODS[method]
    whole, stopped, rest = Counted(train), Counted(train, fails_at), Counted(train)
    expected = Search(**setting).run(whole)
    killed = fails_at <= len(whole.calls)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            Search(**setting).run(stopped, log=log)
    else:
        Search(**setting).run(stopped, log=log)
    if torn:
        with log.open("ab") as file:
            file.write('{"key": "1a", "purpose": "é'.encode()[:-1])
    result = Search(**setting).run(rest, log=log)
    assert result.curriculum == expected.curriculum
    accuracies = [[outcome.accuracy for outcome in each.outcomes] for each in (result, expected)]
    assert accuracies[0] == accuracies[1]
    assert [*stopped.calls[: len(stopped.calls) - killed], *rest.calls] == whole.calls
    assert len(log.read_text().splitlines()) == 1 + len(whole.calls)


@both
def test_log_holds_the_curriculum_of_each_trial(tmp_path: Path, method: str) -> None:
    log = tmp_path / "new" / "trials.jsonl"
    result = Search(method=method, budget=10, sizes=(96, 160, 224), stages=3).run(METHODS[method], log=log)
    rows = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    parts = method == "sequential"
    with pytest.warns(UserWarning, match="the last stage trains") if parts else contextlib.nullcontext():
        read = [Curriculum.from_yaml(row["curriculum"]) for row in rows]
    assert read == [outcome.trial.curriculum for outcome in result.outcomes]


def test_log_serves_other_tolerances(tmp_path: Path) -> None:
    log = tmp_path / "trials.jsonl"
    search(needy, budget=10, log=log)
    train = Counted(needy)
    found = search(train, budget=10, log=log, tolerance=1)
    assert sizes_of(found) == (96, 96, 96, 96, 224)
    assert train.calls == []


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"sizes": (96, 224)}, r"sizes is \[96, 224\], was \[96, 128, 160, 192, 224\]"),
        ({"method": "sequential"}, "method is sequential, was greedy"),
        ({"stages": 4}, "stages is 4, was 5"),
        ({"budget": 20}, "budget is 20, was 10"),
        ({"batch": 512}, "batch is 512, was 4096"),
        ({"settings": {"model": "convnext"}}, "model is convnext, was deit"),
    ],
)
def test_log_of_another_search_is_refused(tmp_path: Path, changes: dict[str, Any], difference: str) -> None:
    log = tmp_path / "trials.jsonl"
    first: Any = {"budget": 10, "settings": {"model": "deit"}}
    search(needy, log=log, **first)
    before = log.read_bytes()
    with pytest.raises(UserError, match=f"trials of another search .*{difference}"):
        search(needy, log=log, **{**first, **changes})
    assert log.read_bytes() == before


@pytest.mark.parametrize("text", ["{}\n", "no json\n", '{"search": {}}\n{"key": 3}\n'])
def test_damaged_log_is_refused(tmp_path: Path, text: str) -> None:
    log = tmp_path / "trials.jsonl"
    log.write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        search(needy, budget=10, log=log)


def test_trials_that_ran_beside_a_failed_one_are_kept(tmp_path: Path) -> None:
    def train(curriculum: Curriculum, from_checkpoint: str | None) -> float:
        if sizes_of(curriculum)[0] == 96:
            raise OSError("no disk")
        return needy(curriculum, from_checkpoint)

    log = tmp_path / "trials.jsonl"
    with ThreadPoolExecutor(4) as threads, pytest.raises(RuntimeError, match="96, 96, 96, 96, 224, seed 0 failed"):
        search(train, budget=10, log=log, workers=4, runner=threads)
    sizes = [json.loads(line)["sizes"][0] for line in log.read_text().splitlines()[1:]]
    assert sorted(sizes) == [128, 160, 192, 224]


def test_failure_of_a_trial_that_turns_out_needless_does_not_matter() -> None:
    def train(curriculum: Curriculum, from_checkpoint: str | None) -> float:
        sizes = sizes_of(curriculum)
        if 96 < sizes[0] < 192 and sizes[1:] == (192, 224):
            raise OSError("no disk")
        return needy(curriculum, from_checkpoint, (96, 192, 224))

    with ThreadPoolExecutor(4) as threads:
        found = search(train, stages=3, budget=10, workers=4, runner=threads)
    assert sizes_of(found) == (96, 192, 224)


@pytest.fixture(scope="module")
def in_processes() -> SearchResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
        return Search(budget=10, sizes=(160, 192, 224)).run(where, workers=2)


@pytest.mark.slow
def test_search_over_processes_finds_the_same(in_processes: SearchResult) -> None:
    serial = Search(budget=10, sizes=(160, 192, 224)).run(where)
    assert in_processes.curriculum == serial.curriculum
    keys = [[outcome.trial.key for outcome in result.outcomes] for result in (in_processes, serial)]
    assert keys[0] == keys[1]


@pytest.mark.slow
def test_each_process_has_its_own_gpu_and_one_thread(in_processes: SearchResult) -> None:
    places = {str(outcome.checkpoint).split(" ", 1)[1] for outcome in in_processes.outcomes}
    assert places <= {"3 1", "7 1"}
    assert str(os.getpid()) not in {str(outcome.checkpoint).split(" ")[0] for outcome in in_processes.outcomes}


def test_function_that_other_processes_cannot_import_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot be sent to other processes .* top level of a module"):
        search(lambda curriculum, from_checkpoint: 0.5, budget=10, workers=2)


CLUSTER = """
import sys
import ray
from leap_efficienttrain.executors import RayExecutor
from leap_efficienttrain.searching import search
from test_searching import _fails, needy, sizes_of

try:
    ray.init(num_cpus=2, include_dashboard=False)
except Exception as error:
    sys.exit(f"Ray does not start here: {error}")
kind = {"budget": 10, "sizes": (160, 192, 224)}
print("sizes", sizes_of(search(lambda curriculum, start: needy(curriculum, start), runner="ray", workers=2, **kind)))
print("open", ray.is_initialized())
try:
    search(_fails, runner=RayExecutor(num_cpus=0.5), **kind)
except RuntimeError as error:
    print("error", str(error).splitlines()[0])
"""


@pytest.mark.slow
def test_search_over_a_cluster_finds_the_same() -> None:
    pytest.importorskip("ray")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", CLUSTER]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    if "Ray does not start here" in run.stderr:  # it gives a busy machine half a minute
        pytest.skip(run.stderr[-300:])
    assert run.returncode == 0, run.stderr
    facts = dict(
        line.split(" ", 1) for line in run.stdout.splitlines() if line.split(" ")[0] in ("sizes", "open", "error")
    )
    assert facts["sizes"] == str(ICCV)
    assert facts["open"] == "True"
    assert facts["error"].startswith("trial baseline: sizes 224, seed 0 failed: ")


def _fails(curriculum: Curriculum, from_checkpoint: str | None) -> float:
    raise OSError("no disk")


class StandIn:
    """What `RayExecutor` uses of Ray, in this process."""

    def __init__(self, **resources: float) -> None:
        self.resources, self.asked, self.open = resources, [{}], False

    def is_initialized(self) -> bool:
        return self.open

    def init(self) -> None:
        self.open = True

    def shutdown(self) -> None:
        self.open = False

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, function: Callable[..., Any]) -> Any:
        def options(**asked: float) -> Any:
            self.asked.append(asked)
            return SimpleNamespace(remote=lambda *args: SimpleNamespace(future=lambda: done(*args)))

        def done(*args: Any) -> Any:
            assert self.open
            return SerialExecutor().submit(function, *args)

        return SimpleNamespace(options=options)


@pytest.mark.parametrize(("resources", "asked"), [({"CPU": 8.0}, {"num_cpus": 1}), ({"GPU": 2.0}, {"num_gpus": 1})])
def test_trial_on_a_cluster_asks_for_a_gpu_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], asked: dict[str, int]
) -> None:
    ray = StandIn(**resources)
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert sizes_of(search(needy, budget=10, runner="ray", workers=3)) == ICCV
    assert ray.asked[-1] == asked
    assert not ray.open


def test_session_of_ray_that_was_open_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = StandIn()
    monkeypatch.setitem(sys.modules, "ray", ray)
    ray.init()
    search(needy, budget=10, runner="ray")
    assert ray.open


def test_cluster_without_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'leap-efficienttrain\[ray\]'"):
        search(needy, budget=10, runner="ray")


def _dies(curriculum: Curriculum, from_checkpoint: str | None) -> float:
    os._exit(3)


@pytest.mark.slow
def test_process_that_dies_is_explained() -> None:
    with pytest.raises(RuntimeError, match="the process of trial baseline: sizes 224, seed 0 ended: out of memory"):
        search(_dies, budget=10, runner="processes")


def test_failed_trial_is_named() -> None:
    with pytest.raises(RuntimeError, match="trial baseline: sizes 224, seed 0 failed: OSError: no disk") as caught:
        search(_fails, budget=10)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("result", [math.nan, math.inf, None, "good", (math.nan, "path")])
def test_accuracy_that_is_no_finite_number_is_refused(result: Any) -> None:
    with pytest.raises(UserError, match=r"trial baseline: sizes 224, seed 0 returned .*expected a finite accuracy"):
        search(lambda curriculum, from_checkpoint: result, budget=10)


def test_accuracy_may_be_a_tensor() -> None:
    found = search(lambda curriculum, from_checkpoint: torch.tensor(needy(curriculum, None)).double(), budget=10)
    assert sizes_of(found) == ICCV


def test_sequential_search_without_checkpoints_is_refused() -> None:
    with pytest.raises(UserError, match=r"stage 1: sizes 96, seed 0 returned no checkpoint"):
        search(lambda curriculum, from_checkpoint: 0.5, method="sequential", budget=10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (128, 96, 224)}, "sizes 128, 96, 224: expected ascending order"),
        ({"sizes": (96, 96, 224)}, "each once"),
        ({"sizes": (0, 224)}, "whole numbers of pixels above 0"),
        ({"sizes": ()}, "one or more"),
        ({"sizes": (224,)}, "one or more below the base size 224"),
        ({"base_size": 192}, "none above the base size 192"),
        ({"stages": 0}, "stages 0: expected 1 or more"),
        ({"budget": 0}, "budget 0: expected epochs at the base size, above 0"),
        ({"budget": math.inf}, "budget inf"),
        ({"tolerance": -1}, "tolerance -1: expected an accuracy, 0 or more"),
        ({"target": math.nan}, "target nan"),
        ({"repeats": 0}, "repeats 0: expected 1 or more"),
        ({"repeats": 2}, "without a parameter seed"),
        ({"fine_tune": 0}, "fine_tune 0: expected a share"),
        ({"magnitudes": (1, 9)}, "2 magnitudes for 5 stages"),
        ({"magnitudes": (1, 9, 9, 9, 11)}, "randaug 11: expected a number from 0 to 10"),
        ({"method": "gredy"}, "method 'gredy' is unknown: did you mean greedy?"),
        ({"runner": "rai"}, "runner 'rai' is unknown: did you mean ray?"),
        ({"runner": "serial", "workers": 2}, "runner serial has one worker, not 2"),
        ({"workers": 0}, "workers 0: expected 1 or more"),
        ({"tolerence": 1}, "no field 'tolerence'"),
        ({"unit": "epochs"}, "no field 'unit'"),
    ],
)
def test_impossible_search_is_refused_before_any_trial(changes: dict[str, Any], message: str) -> None:
    train = Counted(needy)
    with pytest.raises(UserError, match=re.escape(message)):
        search(train, **{"budget": 10, **changes})
    assert train.calls == []


def test_train_function_of_other_parameters_is_refused() -> None:
    with pytest.raises(UserError, match=r"a train function \(curriculum\) cannot be called .* expected train"):
        search(lambda curriculum: 0.5, budget=10)


def test_curriculum_of_one_stage_needs_no_trial() -> None:
    train = Counted(needy)
    assert sizes_of(search(train, stages=1, budget=10)) == (224,)
    assert train.calls == []


def test_base_size_may_be_above_the_candidates() -> None:
    found = search(
        functools.partial(needy, needs=(160, 192, 256)), sizes=(128, 160, 192), base_size=256, stages=3, budget=9
    )
    assert sizes_of(found) == (160, 192, 256)


def test_fields_of_the_curriculum_reach_every_trial() -> None:
    lr = LearningRate(base=1e-3)
    result = Search(budget=10, changes={"batch": 64, "lr": lr, "downsample": "area"}).run(needy)
    for curriculum in (result.curriculum, *(outcome.trial.curriculum for outcome in result.outcomes)):
        assert (curriculum.batch, curriculum.lr, curriculum.downsample) == (64, lr, "area")


def test_every_trial_is_shown() -> None:
    class Reporter:
        def __init__(self) -> None:
            self.texts: list[str] = []

        def progress(self, *, description: str) -> Reporter:
            self.texts.append(description)
            return self

        def advance(self, n: int, *, text: str) -> None:
            self.texts.append(text)

        def end(self) -> None:
            self.texts.append("end")

    reporter = Reporter()
    search(functools.partial(needy, needs=(96, 224)), budget=10, stages=2, sizes=(96, 224), reporter=reporter)
    trials = ["baseline: sizes 224, seed 0: 0.8", "stage 1: sizes 96, 224, seed 0: 0.8"]
    assert reporter.texts == ["trials", *trials, "end"]


def test_result_prints_its_trials_and_their_cost() -> None:
    result = Search(budget=10, stages=2, sizes=(112, 224)).run(functools.partial(needy, needs=(112, 224)))
    assert result.cost == pytest.approx(10 + 10 * (0.25 + 1) / 2)
    last = str(result).splitlines()[-1]
    assert last.startswith("sizes 112, 224, found in 2 trials of 16.25 epochs at 224 pixels")


WHOLE = Curriculum.preset("et++", epochs=100, arithmetic="continuous", batch=100)


@pytest.mark.parametrize("lr", [LearningRate(), LearningRate(warmup_share=0.05), LearningRate(kind="linear", final=0)])
def test_parts_of_a_training_follow_its_learning_rate(lr: LearningRate) -> None:
    whole = Search(budget=100, stages=5, method="sequential", changes={"lr": lr, "batch": 100}).curriculum(96, 96, 160)
    plan, update = whole.plan(10_000), 0
    for index in range(5):
        alone = part(whole, index).plan(10_000)
        assert alone.updates == plan.legs[index].updates
        rates = torch.tensor([[plan.lr(update + step), alone.lr(step)] for step in range(0, alone.updates, 50)])
        assert (rates[:, 0] - rates[:, 1]).abs().max() < 0.04 * lr.base
        update += alone.updates


def test_parts_cost_what_their_stages_cost() -> None:
    parts = [part(WHOLE, index) for index in range(10)]
    assert sum(alone.equivalent_epochs for alone in parts) == pytest.approx(100)
    assert [alone.plan(10_000).updates for alone in parts] == [leg.updates for leg in WHOLE.plan(10_000).legs]


def test_parts_keep_the_drop_path_rate_of_the_whole() -> None:
    assert part(WHOLE, 3).drop_path(0.2) == pytest.approx(WHOLE.drop_path(0.2))
    assert fine_tune_after(WHOLE, 3, 0.01).drop_path(0.2) == pytest.approx(WHOLE.drop_path(0.2))


def test_fine_tuning_falls_from_the_rate_of_its_stage_to_the_last_one() -> None:
    plan, short = WHOLE.plan(10_000), fine_tune_after(WHOLE, 4, 0.05)
    tuned = short.plan(10_000)
    assert sizes_of(short) == (224,)
    assert short.equivalent_epochs == pytest.approx(5)
    assert tuned.lr(0) == pytest.approx(plan.lr(plan.legs[5].first_update), rel=1e-2)
    assert tuned.lr(tuned.updates - 1) == pytest.approx(WHOLE.lr.final, abs=1e-5)


def test_fine_tuning_after_a_training_that_ends_at_rate_zero_has_a_rate() -> None:
    whole = Search(budget=100, stages=2, method="sequential", changes={"lr": LearningRate(kind="linear", final=0)})
    short = fine_tune_after(whole.curriculum(96), 1, 0.05)
    assert 0 < short.lr.base < 1e-8
    assert short.lr.final == 0


def test_example_finds_a_curriculum_and_goes_on_from_its_log(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "examples" / "search_curriculum.py"
    example: dict[str, Any] = runpy.run_path(str(path))
    few = ["--stages", "2", "--epochs", "1", "--repeats", "1", "--sizes", "6", "8", "--out", str(tmp_path)]
    with any_last_size():
        found = example["main"](few)
        assert sizes_of(found)[0] in (6, 8)
        assert Curriculum.from_yaml(tmp_path / "curriculum.yaml") == found
        checkpoints = len(list((tmp_path / "checkpoints").iterdir()))
        assert checkpoints == 8
        assert example["main"](few) == found
        assert len(list((tmp_path / "checkpoints").iterdir())) == checkpoints
