from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leap_shared.cli import Context
from leap_shared.errors import UserError
from leap_shared.experiment import Estimate, Experiment, Result, difference, join, mean, run, t_quantile

EXPERIMENT = Experiment(
    name="toy",
    title="A <toy> experiment",
    claim='Ours is "better" & faster.',
    baseline="plain",
    method="ours",
    metric="score",
    unit="points",
    smallest_effect=1.0,
    notes=("only a toy",),
    source="Nobody 2023",
)


def result(differences: list[float], baseline: float = 10.0, experiment: Experiment = EXPERIMENT) -> Result:
    plain = {seed: baseline + seed for seed in range(len(differences))}
    ours = {seed: plain[seed] + value for seed, value in enumerate(differences)}
    return Result.from_outcomes(experiment, {"plain": plain, "ours": ours})


@pytest.mark.parametrize(
    ("degrees", "confidence", "value"),
    [
        (1.0, 0.95, 12.706204736432095),
        (2.0, 0.95, 4.302652729911275),
        (4.0, 0.95, 2.7764451051977987),
        (9.0, 0.99, 3.2498355440153697),
        (30.0, 0.95, 2.0422724563012373),
        (1000.0, 0.95, 1.9623390808264078),
        (1e6, 0.95, 1.9599663),
        (1.0, 0.5, 1.0),
        (2.5, 0.9, 2.5582),
    ],
)
def test_t_quantile_agrees_with_the_tables(degrees: float, confidence: float, value: float) -> None:
    digits = len(str(value).partition(".")[2])
    assert t_quantile(degrees, confidence) == pytest.approx(value, rel=1e-7 if digits > 6 else 5e-4)


@pytest.mark.parametrize("paired", [True, False])
def test_interval_covers_the_truth_in_95_of_100_experiments(paired: bool) -> None:
    random = np.random.default_rng(0)
    experiments = 2000
    baseline, method = random.normal(0, 1, (experiments, 5)), random.normal(1, 1 if paired else 3, (experiments, 5))
    intervals = [
        difference(ours, theirs, paired=paired) for ours, theirs in zip(method.tolist(), baseline.tolist(), strict=True)
    ]
    covered = np.mean([interval.low < 1 < interval.high for interval in intervals])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / experiments)


def test_welch_interval_agrees_with_a_worked_example() -> None:
    # Variances 2.5 and 10 over five each: error sqrt(2.5), degrees 2.5^2 / (0.5^2/4 + 2^2/4) = 5.882.
    found = difference([2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0], paired=False)
    reach = t_quantile(6.25 / 1.0625) * math.sqrt(2.5)
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3 - reach, 3 + reach))


def test_pairing_removes_what_the_seeds_share() -> None:
    shared = [0.0, 100.0, 200.0]
    ours = [value + noise for value, noise in zip(shared, [1.0, 1.1, 0.9], strict=True)]
    assert difference(ours, shared, paired=True).low > 0 > difference(ours, shared, paired=False).low


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([3.0, 3.5, 2.5, 3.2], "reproduced"),
        ([0.1, -0.1, 0.2, -0.2], "not reproduced"),
        ([-3.0, -3.5, -2.5, -3.2], "not reproduced"),
        ([0.3, 0.31, 0.29, 0.3], "not reproduced"),
        ([5.0, -5.0, 4.0], "underpowered"),
        ([3.0], "underpowered"),
        ([2.0, 2.0, 2.0], "reproduced"),
        ([0.0, 0.0, 0.0], "not reproduced"),
        ([-2.0, -2.0], "not reproduced"),
    ],
)
def test_each_verdict_is_reached(differences: list[float], verdict: str) -> None:
    assert result(differences).verdict == verdict


@given(low=st.floats(-5, 5), width=st.floats(0, 5))
def test_verdict_of_a_metric_where_lower_is_better_is_the_mirror_image(low: float, width: float) -> None:
    mirrored = replace(EXPERIMENT, higher_is_better=False)
    there = EXPERIMENT.verdict(Estimate(low, low, low + width))
    assert there == mirrored.verdict(Estimate(-low, -low - width, -low))


def test_more_seeds_never_turn_no_effect_into_a_reproduction_by_rounding() -> None:
    tenths = [0.3 - 0.2, 0.4 - 0.3, 0.1] * 5
    facts = result([value - value for value in tenths]).to_json()
    assert facts["verdict"] == "not reproduced"
    assert facts["interval"] == [0, 0]


def test_identical_outcomes_are_flagged_as_showing_no_uncertainty() -> None:
    assert "no width" in result([2.0, 2.0, 2.0]).to_json()["notes"][-1]
    assert result([2.0, 2.5, 2.0]).to_json()["notes"] == ["only a toy"]


def test_one_seed_has_no_interval() -> None:
    facts = result([3.0]).to_json()
    assert facts["interval"] is None
    assert facts["estimate"] == 3.0
    assert mean([1.0]).high == math.inf


def test_json_holds_what_every_package_promises() -> None:
    facts = json.loads(json.dumps(result([3.0, 3.5, 2.5]).to_json(), allow_nan=False))
    assert {"claim", "baseline", "metric", "seeds", "estimate", "interval", "verdict", "arms"} <= set(facts)
    assert facts["seeds"] == [0, 1, 2]
    assert [arm["arm"] for arm in facts["arms"]] == ["plain", "ours"]


@pytest.mark.parametrize("effect", [0.0, -1.0, math.nan, math.inf])
def test_smallest_effect_must_be_positive(effect: float) -> None:
    with pytest.raises(UserError, match="least difference that matters"):
        replace(EXPERIMENT, smallest_effect=effect)


def test_method_and_baseline_must_differ() -> None:
    with pytest.raises(UserError, match="name two arms"):
        replace(EXPERIMENT, method="plain")


def test_missing_arm_is_refused_before_anything_runs() -> None:
    ran: list[int] = []
    with pytest.raises(UserError, match=r"no arm 'ours': did you mean our\?"):
        run(EXPERIMENT, {"plain": lambda seed: ran.append(seed) or 0.0, "our": lambda seed: 0.0}, range(3))
    assert ran == []


def test_no_seeds_are_refused() -> None:
    with pytest.raises(UserError, match="no outcomes of 'plain'"):
        run(EXPERIMENT, {"plain": float, "ours": float}, [])


def test_paired_arms_with_different_seeds_are_refused() -> None:
    with pytest.raises(UserError, match=r"only one of them has \[2\]"):
        Result.from_outcomes(EXPERIMENT, {"plain": {0: 1.0, 1: 1.0}, "ours": {0: 1.0, 1: 1.0, 2: 1.0}})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outcome_that_is_not_finite_is_refused_by_name_and_seed(bad: float) -> None:
    with pytest.raises(UserError, match=r"score of arm 'ours', seed 4, is"):
        run(EXPERIMENT, {"plain": float, "ours": lambda seed: bad if seed == 4 else 0.0}, range(6))


def test_outcome_without_the_metric_is_refused() -> None:
    with pytest.raises(UserError, match="gave speed but not the metric 'score'"):
        run(EXPERIMENT, {"plain": float, "ours": lambda seed: {"speed": 1.0}}, range(2))


def dying(at: int, ran: list[tuple[str, int]]) -> dict[str, Callable[[int], float]]:
    def arm(name: str, gain: float) -> Callable[[int], float]:
        def one(seed: int) -> float:
            if len(ran) == at:
                raise KeyboardInterrupt
            ran.append((name, seed))
            return seed + gain + 0.1 * (seed % 3)

        return one

    return {"plain": arm("plain", 0.0), "ours": arm("ours", 2.0)}


@pytest.mark.parametrize("killed_at", range(7))
def test_killed_experiment_goes_on_where_it_stopped(killed_at: int, tmp_path: Path) -> None:
    ran: list[tuple[str, int]] = []
    whole = run(EXPERIMENT, dying(-1, []), range(3))
    if killed_at < 6:
        with pytest.raises(KeyboardInterrupt):
            run(EXPERIMENT, dying(killed_at, ran), range(3), folder=tmp_path)
    resumed = run(EXPERIMENT, dying(-1, ran), range(3), folder=tmp_path)
    assert len(ran) == len(set(ran)) == 6
    assert resumed.to_json() == whole.to_json()


def test_more_seeds_extend_a_finished_experiment(tmp_path: Path) -> None:
    ran: list[tuple[str, int]] = []
    run(EXPERIMENT, dying(-1, ran), range(2), folder=tmp_path)
    assert run(EXPERIMENT, dying(-1, ran), range(4), folder=tmp_path).seeds == [0, 1, 2, 3]
    assert len(ran) == 8


def test_outcomes_of_other_settings_are_refused_and_kept(tmp_path: Path) -> None:
    run(EXPERIMENT, dying(-1, []), range(2), folder=tmp_path, settings={"steps": 1})
    kept = (tmp_path / "outcomes.jsonl").read_bytes()
    with pytest.raises(UserError, match="outcomes of another run"):
        run(EXPERIMENT, dying(-1, []), range(2), folder=tmp_path, settings={"steps": 2})
    assert (tmp_path / "outcomes.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    "content", ["", "not json\n", '{"experiment": "toy", "metric": "score", "settings": {}}\n[1]\n']
)
def test_damaged_outcomes_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "outcomes.jsonl").write_text(content)
    with pytest.raises(UserError, match="outcomes"):
        run(EXPERIMENT, dying(-1, []), range(2), folder=tmp_path)


def test_progress_counts_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Context("cpu", 0, Path("o"), lambda folder: None).progress(description="toy", total=6)
    run(EXPERIMENT, dying(-1, []), range(3), progress=progress)
    assert "toy: 6/6 ours, seed 2: 4.2" in capsys.readouterr().err


class Page(HTMLParser):
    """Collects what a page would fetch, and checks that every element is closed."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.names: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.names.add(tag)
        self.images += [values] if tag == "img" else []
        self.fetched += [
            str(value) for name, value in attrs if name in ("src", "href") and not str(value).startswith(("data:", "#"))
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def report(tmp_path: Path) -> str:
    figure = tmp_path / "maze.svg"
    figure.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    others = {"random": dict.fromkeys(range(3), -4.0)}
    first = result([3.0, 3.5, 2.5])
    first = Result.from_outcomes(
        EXPERIMENT,
        {**{arm: {s: v["score"] for s, v in runs.items()} for arm, runs in first.outcomes.items()}, **others},
    )
    folders = [first.write(tmp_path / "a", [(figure, "The <maze>", 'a "maze"')], command="leap-toy demo --seed <1>")]
    unknown = replace(EXPERIMENT, name="second one", paired=False, higher_is_better=False, unit="")
    folders.append(result([5.0, -5.0], experiment=unknown).write(tmp_path / "b"))
    folders.append(result([5.0], experiment=replace(EXPERIMENT, name="third")).write(tmp_path / "c"))
    return join(folders, tmp_path / "report").read_text(encoding="utf-8")


def test_report_is_one_well_formed_file_that_fetches_nothing_and_runs_nothing(report: str) -> None:
    page = Page(report)
    assert page.open == []
    assert page.fetched == []
    assert "script" not in page.names
    assert "url(" not in report


def test_report_embeds_every_figure_with_its_description(report: str) -> None:
    images = Page(report).images
    assert [str(image["src"]).partition(";")[0] for image in images] == [
        "data:image/png",
        "data:image/svg+xml",
        "data:image/png",
        "data:image/png",
    ]
    assert all(image["alt"] for image in images)
    assert images[1]["alt"] == 'a "maze"'


def test_report_escapes_what_it_is_given(report: str) -> None:
    assert "A &lt;toy&gt; experiment" in report
    assert "<toy>" not in report
    assert "--seed &lt;1&gt;" in report


def test_report_says_claim_verdict_numbers_caveats_source_and_command(report: str) -> None:
    text = re.sub(r"<[^>]+>|data:[^\"]+", " ", report)
    for words in ("better", "reproduced", "underpowered", "+3.0 points", "only a toy", "Nobody 2023", "leap-toy demo"):
        assert words in text


def test_summary_links_reach_their_sections(report: str) -> None:
    links = re.findall(r'href="#([^"]+)"', report)
    assert links == ["toy", "second-one", "third"]
    assert all(f'<section id="{link}"' in report for link in links)


def test_section_json_is_the_result_with_command_and_machine(tmp_path: Path) -> None:
    found = result([3.0, 3.5, 2.5])
    facts = json.loads((found.write(tmp_path, command="x") / "section.json").read_text())
    assert {name: facts[name] for name in found.to_json()} == json.loads(json.dumps(found.to_json()))
    assert facts["command"] == "x"
    assert facts["stamp"]


def test_figure_that_is_missing_or_no_image_is_refused(tmp_path: Path) -> None:
    for name, message in [("gone.png", "cannot read the figure"), ("notes.txt", "is no image by its name")]:
        with pytest.raises(UserError, match=message):
            result([3.0, 3.5]).write(tmp_path / "a", [(tmp_path / name, "", "")])


def test_folder_without_a_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no section of a report"):
        join([tmp_path], tmp_path / "report")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib.figure"])
def test_missing_extra_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=r"leap-shared\[report\]"):
        result([3.0, 3.5]).write(tmp_path)
