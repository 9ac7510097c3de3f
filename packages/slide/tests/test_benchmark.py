"""The benchmark: its cases are those of the targets, contenders compute the same, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_shared.bench import Case, Row
from leap_shared.bench import models as shared_models
from leap_shared.cli import App, Context
from leap_shared.errors import UserError
from leap_slide import benchmark, memory, peers
from leap_slide.benchmark import CONV, FLEX, FLOOR, MEMORY, NATTEN, PARTS, TWIN, WINDOW_LAYER, Contest, Settings
from leap_slide.contenders import CORE, GLOBAL, MERGED, OURS, TWO_PATH, UNFOLD, WINDOWS, Operands, Shape
from leap_slide.verbs.bench import Bench

CPU = torch.device("cpu")
FORMULAS = {TWO_PATH, MERGED, UNFOLD}
app = App("leap-slide", "leap_slide", (Bench,))
SMALL = Shape(1, 4, 6, 8, 2, 3, gpu_batch=3)
TINY = Settings.quick(shapes=(SMALL,), trained=(SMALL,), neighborhoods=(SMALL,), memory=SMALL, contests=())
TITLE = "1x4x6x8, 2 heads, k=3"


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("cpu", 0, tmp_path / "out", lambda path: None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Everything believes in a GPU; what would be compiled for it is collected."""
    compiled: list[object] = []
    monkeypatch.setattr(benchmark, "_on_gpu", lambda context: True)
    monkeypatch.setattr(shared_models, "on_gpu", lambda device: True)
    monkeypatch.setattr(Shape, "images", lambda self, device: self.gpu_batch)

    def remember(function: Callable[..., object], **_: Any) -> Callable[..., object]:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", remember)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(benchmark, "_absent", lambda settings, context: {NATTEN: "", FLEX: ""})
    return compiled


def cases(part: str, settings: Settings, context: Context) -> dict[str, Case]:
    return {case.name: case for case in PARTS[part](settings, context)}


@pytest.mark.parametrize("first", [False, True])
def test_ours_and_the_formula_get_the_same_numbers(first: bool) -> None:
    operands = Operands(SMALL, CPU, 0, channels_first=first)
    ours = operands.ours().function()
    if first:
        ours = ours.flatten(1, 2).permute(0, 2, 3, 1)
    for name in (TWO_PATH, MERGED):
        torch.testing.assert_close(operands.formulas()[name].function(), ours)


@pytest.mark.parametrize("first", [False, True])
def test_operands_lie_as_they_are_said_to(first: bool) -> None:
    operands = Operands(SMALL, CPU, 0, channels_first=first)
    for x in operands.images:
        assert x.permute(0, 3, 1, 2).is_contiguous() == first
        assert x.stride(2) == (1 if first else 3 * SMALL.dim)
    assert all(x.stride(4) == 1 for x in operands.maps)


@pytest.mark.parametrize("first", [False, True])
def test_every_contender_has_gradients_for_all_of_its_inputs(first: bool) -> None:
    operands = Operands(SMALL, CPU, 0, channels_first=first)
    for core in (operands.ours(), *operands.formulas().values(), *operands.softmax().values()):
        out = core.function()
        found = torch.autograd.grad(out, core.inputs, torch.randn_like(out))
        assert all(gradient.isfinite().all() and gradient.any() for gradient in found)


def test_the_global_softmax_is_for_small_maps() -> None:
    sizes = {side: Operands(Shape(1, side, side, 4, 1, 3), CPU, 0).softmax().keys() for side in (28, 29)}
    assert sizes == {28: {WINDOWS, CORE, GLOBAL}, 29: {WINDOWS, CORE}}


def test_targets_of_the_issue_stand_at_their_sizes() -> None:
    found = {(*shape.hw, shape.dim, shape.kernel_size): shape.targets for shape in benchmark.SHAPES if shape.targets}
    assert found == {
        (56, 56, 96, 3): {TWO_PATH: 2.3, UNFOLD: 1.2},
        (56, 56, 96, 5): {TWO_PATH: 5.0, UNFOLD: 1.2},
    }
    assert [shape.gpu_batch for shape in benchmark.SHAPES] == [64, 64, 1, 16, 2]


def test_the_operator_is_measured_in_both_layouts_beside_formulas_and_softmax(context: Context) -> None:
    shape = replace(SMALL, targets={TWO_PATH: 2.3})
    found = cases("operator", replace(TINY, shapes=(shape,)), context)
    assert set(found) == {f"{TITLE}, channels last", f"{TITLE}, in the layer (channels first)"}
    for case in found.values():
        assert case.target == {TWO_PATH: 2.3}
        assert set(case.peers) == {*FORMULAS, WINDOWS, CORE, GLOBAL}


def test_layers_are_measured_beside_formula_windows_and_floor(context: Context) -> None:
    case = cases("modules", TINY, context)[TITLE]
    assert set(case.peers) == {TWO_PATH, WINDOW_LAYER, FLOOR}


def test_training_is_measured_between_projections_and_with_them(context: Context) -> None:
    found = cases("training", TINY, context)
    assert set(found[f"forward and backward, layer, {TITLE}"].peers) == {TWO_PATH, WINDOW_LAYER}
    assert set(found[f"forward and backward, {TITLE}, channels last"].peers) == {*FORMULAS, WINDOWS, CORE, GLOBAL}


def test_a_model_is_measured_beside_its_rival_its_formula_and_its_convolutions(context: Context) -> None:
    contests = (Contest("slide_pvt_tiny", 32, rival="swin_tiny_patch4_window7_224", twin=True),)
    found = cases("models", replace(TINY, contests=contests), context)
    assert set(found) == {"slide_pvt_tiny, 1x32x32", "slide_pvt_tiny, 1x32x32, reparameterized"}
    plain, merged = (found[f"slide_pvt_tiny, 1x32x32{rest}"] for rest in ("", ", reparameterized"))
    assert set(plain.peers) == {"swin_tiny_patch4_window7_224", TWIN, TWO_PATH, CONV}
    calls: list[Any] = [plain.ours, merged.ours, plain.peers[TWO_PATH], plain.peers[CONV]]
    expected = calls[0]()
    for call in calls[1:]:
        torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-4)
    assert set(merged.peers) == {"swin_tiny_patch4_window7_224"}


def test_without_peers_forms_of_the_formula_remain(context: Context) -> None:
    contests = (Contest("slide_pvt_tiny", 32, rival="swin_tiny_patch4_window7_224", twin=True),)
    settings = replace(TINY, peers=False, contests=contests)
    names = {name for part in PARTS for case in PARTS[part](settings, context) for name in case.peers}
    assert names == {*FORMULAS, FLOOR, CONV}


def test_a_gpu_is_measured_in_bfloat16_in_its_batches_and_compiled(context: Context, gpu: list[object]) -> None:
    contests = (Contest("slide_pvt_tiny", 32),)
    found = [
        case
        for part in ("operator", "training", "models")
        for case in PARTS[part](replace(TINY, contests=contests), context)
    ]
    assert {case.dtype for case in found} == {"bfloat16"}
    core = "3x4x6x8, 2 heads, k=3, channels last"
    targets = {case.name: case.target for case in found if case.target is not None}
    assert targets == {name: {MERGED: 5.0} for name in (core, f"forward and backward, {core}")}
    names = [case.name for case in found if case.name.startswith("slide")]
    assert names == [f"slide_pvt_tiny, {n}x32x32{rest}" for n in (1, 64) for rest in ("", ", reparameterized")]
    assert len(gpu) == 2 * 4  # ours, with one path, by the formula and by convolutions, at both batch sizes


def test_peers_that_are_not_here_are_told_with_their_reason(
    context: Context, monkeypatch: pytest.MonkeyPatch, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "has_natten", lambda: False)
    benchmark.run(replace(TINY, parts=("neighborhood",), threads=(1,)), context)
    told, text = capsys.readouterr().err, (context.out / "neighborhood.md").read_text()
    for name, reason in ((NATTEN, "not installed: pip install natten"), (FLEX, "not asked for on a CPU: --flex")):
        assert f"{name} is not measured: {reason}" in told
        assert f"| {name} | {reason} |" in text


def test_natten_and_flex_are_measured_where_they_run(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_absent", lambda settings, context: {})
    monkeypatch.setattr(peers, "flex", lambda *args: lambda q, k, v: q)
    (case,) = cases("neighborhood", TINY, context).values()
    assert set(case.peers) == {UNFOLD, NATTEN, FLEX}


def test_flex_that_cannot_be_compiled_is_left_out_with_its_reason(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Callable[..., Any]:
        raise RuntimeError("no C++ compiler\nand so on")

    monkeypatch.setattr(peers, "flex", broken)
    benchmark._refusal_of_flex.cache_clear()
    reasons = benchmark._absent(replace(TINY, flex=True), context)
    benchmark._refusal_of_flex.cache_clear()
    assert reasons[FLEX] == "compiling it fails: no C++ compiler"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, object, int]]:
    """Name, threads, target and rounds of every case that would be measured."""
    found: list[tuple[str, int, object, int]] = []

    def compare(given: Iterable[Case], *, threads: int, rounds: int, **_: Any) -> list[Row]:
        rows = []
        for case in given:
            found.append((case.name, threads, case.target, rounds))
            memory = {"peak_memory_mb": {"ours": 1.25, "peer": 2.5}}
            numbers = (2.0, (1.0, 3.0), None, None, memory)
            rows += [Row(case.name, "cpu", threads, case.dtype, 1.0, peer, 2.0, *numbers) for peer in case.peers]
        return rows

    monkeypatch.setattr("leap_shared.bench.settings.compare", compare)
    return found


def test_every_number_of_threads_is_measured_once(context: Context, seen: list[Any]) -> None:
    all_of_them = torch.get_num_threads()
    benchmark.run(replace(TINY, parts=("modules",), threads=(all_of_them, 7, 0)), context)
    assert [threads for _, threads, *_ in seen] == [all_of_them, 7]


def test_targets_hold_for_one_thread_and_real_sizes(context: Context, seen: list[Any]) -> None:
    settings = replace(TINY, parts=("operator",), shapes=(replace(SMALL, targets={TWO_PATH: 2.3}),))
    benchmark.run(replace(settings, threads=(1, 2), smoke=False), context)
    benchmark.run(replace(settings, threads=(1,)), context)
    assert [target for _, _, target, _ in seen] == [{TWO_PATH: 2.3}] * 2 + [None] * 4


def test_neighbourhoods_are_measured_in_few_rounds_on_a_cpu(context: Context, seen: list[Any]) -> None:
    benchmark.run(replace(TINY, parts=("modules", "neighborhood"), threads=(1,), rounds=9), context)
    assert [rounds for *_, rounds in seen] == [9, 3]


def test_run_writes_table_stamp_and_picture_of_parts_and_threads(context: Context, seen: list[Any]) -> None:
    rows = benchmark.run(replace(TINY, parts=("modules", MEMORY), threads=(1, 2), kernel_sizes=(3,)), context)
    results = ("modules", "modules-2-threads", "memory", "memory-2-threads")
    expected = {f"{name}.{suffix}" for name in results for suffix in ("json", "md", "png")}
    assert {path.name for path in context.out.iterdir()} == {*expected, "resident.md"}
    stored = [json.loads((context.out / f"{name}.json").read_text()) for name in results]
    assert rows == [row for one in stored for row in one["rows"]]
    assert stored[3]["stamp"]["threads"] == "2"


def test_memory_grows_with_the_kernel_where_copies_are_made_alone() -> None:
    rows = list(memory.measure(Shape(1, 32, 32, 32, 1, 3), CPU, 0, (3, 5)))
    found = {(row.contender, row.passes, row.kernel_size): row.maps for row in rows}
    for name in FORMULAS:
        for passes in (memory.FORWARD, memory.BACKWARD):
            assert found[name, passes, 3] > 2 * 9
            assert found[name, passes, 5] > 2 * 25
    assert found[OURS, memory.FORWARD, 5] < 25


def test_memory_counts_copies_of_keys_and_values() -> None:
    shape = Shape(1, 16, 16, 16, 1, 3)
    found = {(r.contender, r.passes): r.maps for r in memory.measure(shape, CPU, 0, (3,))}
    slots = 9 / shape.dim  # of a map, of one head
    copies = 2 * 9 + 9  # and their products with the values, besides scaled queries and logits
    assert found[UNFOLD, memory.FORWARD] == pytest.approx(copies + 2 * slots, abs=1.5)


def test_only_ours_has_a_limit_of_memory_and_misses_it_above() -> None:
    held = memory.Held("toy", 3, memory.FORWARD, OURS, 4.1, memory.LIMIT)
    assert [held.met, held._replace(maps=4.0).met, held._replace(target=None).met] == [False, True, None]
    rows = memory.measure(SMALL, CPU, 0, (3,))
    assert {row.contender for row in rows if row.target == 4.0} == {OURS, memory.FIRST}


def test_table_of_memory_says_whether_the_limit_is_met(tmp_path: Path) -> None:
    rows = [
        memory.Held("toy", 3, memory.FORWARD, OURS, 3.25, 4.0),
        memory.Held("toy", 3, memory.BACKWARD, UNFOLD, 20.0, None),
    ]
    memory.write(rows, tmp_path, "memory")
    lines = (tmp_path / "memory.md").read_text().splitlines()
    assert f"| toy | 3 | forward | {OURS} | 3.2 | 4 | yes |" in lines
    assert f"| toy | 3 | forward and backward | {UNFOLD} | 20.0 |  |  |" in lines
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_unmeasurable_device_is_refused(context: Context) -> None:
    vars(context)["device"] = torch.device("mps")
    with pytest.raises(UserError, match="device mps cannot be timed: give --device cpu or cuda"):
        benchmark.run(TINY, context)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--parts", "operators"), "part 'operators' is unknown: did you mean operator"),
        (("--threads", "1", "-1"), "threads 1, -1: expected numbers of 1 or more, or 0 for all"),
        (("--threads",), "threads none: expected numbers of 1 or more"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        app.main(["bench", *arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_verb_measures_the_parts_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--quick", "--parts", "modules", "--threads", "1", "--no-peers", "--device", "cpu", "--json")
    with pytest.raises(SystemExit) as stopped:
        app.main(["bench", *flags, "--out", str(tmp_path / "out")])
    assert not stopped.value.code
    rows = json.loads(capsys.readouterr().out)
    assert [(row["peer"], row["threads"], row["target"]) for row in rows] == [(TWO_PATH, 1, None), (FLOOR, 1, None)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:flex_attention called")  # of natten's CPU path
def test_quick_measures_every_part(context: Context) -> None:
    rows = benchmark.run(Settings.quick(threads=(1,)), context)
    assert {path.stem for path in context.out.glob("*.json")} == {*PARTS, MEMORY}
    assert all(row["ours_ms"] > 0 for row in rows if "ours_ms" in row)


@pytest.mark.gpu
def test_quick_measures_every_part_on_a_gpu(tmp_path: Path) -> None:
    context = Context("cuda", 0, tmp_path / "out", lambda path: None)
    rows = benchmark.run(Settings.quick(), context)
    assert {row["dtype"] for row in rows if "dtype" in row} == {"bfloat16"}
    assert {path.stem for path in context.out.glob("*.json")} == {*PARTS, MEMORY}
