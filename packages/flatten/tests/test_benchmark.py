"""The benchmark: its peers compute what they are named for, its cases are those of the targets, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import leap_flatten as lf
from leap_flatten import benchmark
from leap_flatten.attention import Focused
from leap_flatten.benchmark import EAGER, FLOOR, GLOBAL, OURS, PARTS, WINDOWS, Contest, Settings, Shape
from leap_flatten.peers import EagerAttention, Floor, eager_copy
from leap_flatten.verbs.bench import Bench
from leap_shared.bench import Case, Row
from leap_shared.bench import models as contenders
from leap_shared.cli import App, Context
from leap_shared.errors import UserError

ROUNDING = 1e-10  # float64; the layer sums in another order
app = App("leap-flatten", "leap_flatten", (Bench,))
TINY = Settings.quick(shapes=(Shape(1, 4, 6, 8, 2, gpu_batch=3),), sides=(2, 32, 36))
sides = st.integers(1, 6)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("cpu", 0, tmp_path / "out", lambda path: None)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module: Any, seed: int = 0) -> Any:
    """The module in float64 and evaluation mode with every parameter random: scale and encoding are 0 at first."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return module.eval()


def cases(part: str, settings: Settings, context: Context) -> dict[str, Case]:
    return {case.name: case for case in PARTS[part](settings, context)}


def gradients(call: Callable[[Tensor], Tensor], x: Tensor, layer: nn.Module) -> list[Tensor]:
    x = x.clone().requires_grad_()
    parameters = list(layer.parameters())
    out = call(x)
    return list(torch.autograd.grad((out * noise(*out.shape, seed=3)).sum(), (x, *parameters)))


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING * float(expected.detach().abs().max()))


LAYERS = (lf.FocusedLinearAttention, lf.PVTFocusedLinearAttention, lf.CSWinFocusedLinearAttention)


@pytest.mark.parametrize("kind", LAYERS)
@examples(max_examples=15, deadline=None)
@given(sides, sides, st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 3, 4]), st.sampled_from([3, 5]))
def test_eager_formula_equals_the_layer(
    kind: Callable[..., Focused], height: int, width: int, heads: int, dim: int, power: int, kernel: int
) -> None:
    options = {"input_size": (height, width), "focusing_factor": power, "kernel_size": kernel}
    layer = filled(kind(heads * dim, heads, **options))
    shape = (2, height * width, heads * dim)
    x = noise(3, *shape) if kind is lf.CSWinFocusedLinearAttention else noise(*shape)
    assert_same(EagerAttention(layer)(x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_eager_formula_has_the_gradients_of_the_layer(kind: Callable[..., Focused]) -> None:
    layer = filled(kind(8, 2, input_size=(3, 5)))
    x = noise(3, 2, 15, 8) if kind is lf.CSWinFocusedLinearAttention else noise(2, 15, 8)
    theirs, ours = (gradients(call, x, layer) for call in (EagerAttention(layer), layer))
    for found, expected in zip(theirs, ours, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("name", ["flatten_swin_tiny", "flatten_pvt_tiny", "flatten_pvt_v2_b0", "flatten_cswin_tiny"])
def test_eager_copy_gives_the_logits_of_the_model(name: str) -> None:
    family = {"swin": {"embed_dim": 16}, "pvt": {}, "cswin": {"embed_dim": 16}}[name.split("_")[1]]
    sizes = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), **family}
    model = filled(timm.create_model(name, img_size=64, num_classes=5, **sizes))
    other = eager_copy(model)
    counts = [
        sum(isinstance(m, kind) for m in one.modules()) for one, kind in ((model, Focused), (other, EagerAttention))
    ]
    assert counts[0] == counts[1] > 0
    x = noise(2, 3, 64, 64)
    assert_same(other(x), model(x))


def test_floor_has_the_products_and_the_convolution_of_the_layer() -> None:
    layer = lf.FocusedLinearAttention(12, 3, (4, 5)).eval()
    x = noise(2, 20, 12).float()
    calls: tuple[Callable[[], object], ...] = (Floor(layer, x, (4, 5)), lambda: layer(x))
    counts = []
    with torch.inference_mode():
        for call in calls:
            with FlopCounterMode(display=False) as counter:
                call()
            counts.append(counter.get_total_flops())
    of_denominator = 2 * 2 * 20 * 12  # queries times the mean of the keys, a product with one vector a head
    assert counts[0] == counts[1] - of_denominator


def test_floor_convolves_the_values_that_it_sums() -> None:
    layer = filled(lf.FocusedLinearAttention(6, 2, (3, 4)))
    x = noise(2, 12, 6)
    packed, attended, convolved, projected = Floor(layer, x, (3, 4))()
    query, key, value = packed.reshape(2, 12, 3, 2, 3).permute(2, 0, 3, 1, 4)
    assert_same(attended, (query @ (key.transpose(2, 3) @ value)).reshape(4, 12, 3))
    image = value.transpose(2, 3).reshape(4, 3, 3, 4)
    assert_same(convolved.reshape(4, 3, 3, 4), layer.dwc(image))
    assert_same(projected, layer.proj(x))


def test_targets_of_the_issue_stand_at_their_sizes(context: Context) -> None:
    shapes = benchmark.SHAPES
    assert [(shape.batch, *shape.hw, shape.dim, shape.num_heads) for shape in shapes if shape.target == 1.8] == [
        (1, 56, 56, 96, 3)
    ]
    found = cases("modules", Settings(shapes=shapes[:1]), context)
    assert found["1x56x56x96, 3 heads"].target == {EAGER: 1.8}
    rivals = {(c.name, c.size): (c.rivals[0], c.target) for c in benchmark.CONTESTS if c.target is not None}
    expected = ("swin_tiny_patch4_window7_224", 1.0)
    assert rivals == {("flatten_swin_tiny", size): expected for size in (224, 384, 512)}


def test_a_layer_is_measured_beside_formula_softmax_windows_and_floor(context: Context) -> None:
    as_built, folded = cases("modules", TINY, context).values()
    assert set(as_built.peers) == {EAGER, FLOOR, GLOBAL, WINDOWS}
    assert set(folded.peers) == {EAGER, FLOOR}
    assert folded.name == f"{as_built.name}, folded"


def test_folded_layer_is_timed_folded_and_gives_the_same(context: Context) -> None:
    as_built, folded = cases("modules", TINY, context).values()
    calls: list[Any] = [case.ours for case in (as_built, folded)]
    assert [call.args[0].floor is not None for call in calls] == [False, True]
    torch.testing.assert_close(calls[1](), calls[0]())


def test_without_peers_formula_and_floor_remain(context: Context) -> None:
    settings = replace(TINY, peers=False, contests=(Contest("flatten_pvt_v2_b0", 32, ("pvt_v2_b0",), 1.0),))
    names = {part: {frozenset(case.peers) for case in PARTS[part](settings, context)} for part in PARTS}
    own = {frozenset({EAGER}), frozenset({EAGER, FLOOR})}
    assert all(found <= own for found in names.values())


def test_softmax_that_would_take_too_long_is_left_out_and_told(
    context: Context, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "SOFTMAX_LIMIT", 2 * 24 * 24 * 8 - 1)
    as_built = cases("modules", TINY, context)["1x4x6x8, 2 heads"]
    assert GLOBAL not in as_built.peers
    assert "is left out" in capsys.readouterr().err
    monkeypatch.setattr(benchmark, "SOFTMAX_LIMIT", 2 * 24 * 24 * 8)
    assert GLOBAL in cases("modules", TINY, context)["1x4x6x8, 2 heads"].peers


def test_gpu_is_measured_in_bfloat16_in_its_batches_and_compiled(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(benchmark, "_on_gpu", lambda context: True)
    monkeypatch.setattr(contenders, "on_gpu", lambda device: True)

    def remember(function: Callable[..., object], **_: Any) -> Callable[..., object]:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", remember)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    settings = replace(TINY, contests=(Contest("flatten_pvt_v2_b0", 32, ("pvt_v2_b0",), 1.0),))
    found = [case for part in ("modules", "operator", "models") for case in PARTS[part](settings, context)]
    assert {case.dtype for case in found} == {"bfloat16"}
    core = "between the projections, 3x4x6x8, 2 heads"
    targets = {core: 3.0, f"{core}, forward and backward": 2.0}
    assert {case.name: case.target for case in found if case.name in targets} == targets
    batches = [case.name for case in found if case.name.startswith("flatten")]
    assert batches == [f"flatten_pvt_v2_b0, {n}x32x32{rest}" for n in (1, 64) for rest in ("", ", folded")]
    assert len(compiled) == 2 * 4  # ours, folded, the rival and the formula, at both batch sizes


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, object]]:
    """Name, threads and target of every case that would be measured; rows get times that grow with the tokens."""
    found: list[tuple[str, int, object]] = []

    def compare(given: Iterable[Case], *, device: torch.device, threads: int, **_: Any) -> list[Row]:
        rows = []
        for case in given:
            found.append((case.name, threads, case.target))
            size = float(case.name.partition(" tokens")[0]) if "tokens" in case.name else 1.0
            for peer in case.peers:
                slower = size**2 if peer == GLOBAL else 3 * size
                numbers = (size, peer, slower, slower / size, (1.0, 2.0), None, None)
                memory = {"ours": None if peer == EAGER else 1.25, "peer": 2.5}
                rows.append(Row(case.name, str(device), threads, case.dtype, *numbers, {"peak_memory_mb": memory}))
        return rows

    monkeypatch.setattr("leap_shared.bench.settings.compare", compare)
    return found


def test_every_number_of_threads_is_measured_once(context: Context, seen: list[Any]) -> None:
    all_of_them = torch.get_num_threads()
    benchmark.run(replace(TINY, parts=("operator",), threads=(all_of_them, 7, 0)), context)
    assert [threads for _, threads, _ in seen] == [all_of_them] * 2 + [7] * 2


def test_targets_hold_for_one_thread_and_real_sizes(context: Context, seen: list[Any]) -> None:
    shape = replace(TINY.shapes[0], target=1.8)
    settings = replace(TINY, parts=("modules",), shapes=(shape,), threads=(1, 2))
    benchmark.run(replace(settings, smoke=False), context)
    benchmark.run(replace(settings, threads=(1,)), context)
    assert [target for *_, target in seen] == [{EAGER: 1.8}] * 2 + [None] * 4


def test_run_writes_table_stamp_and_pictures_for_parts_and_threads(context: Context, seen: list[Any]) -> None:
    benchmark.run(replace(TINY, parts=("tokens", "training"), threads=(1, 2)), context)
    results = ("tokens", "tokens-2-threads", "training", "training-2-threads")
    expected = {f"{name}.{suffix}" for name in results for suffix in ("json", "md", "png")}
    figures = {"tokens-growth.png", "tokens-2-threads-growth.png"}
    assert {path.name for path in context.out.iterdir()} == {*expected, *figures, "memory.md"}
    stored = json.loads((context.out / "training-2-threads.json").read_text())
    assert {(row["case"], row["threads"]) for row in stored["rows"]} == {
        ("forward and backward, 1x4x6x8, 2 heads", 2),
    }


def test_growth_is_the_exponent_of_the_times(
    context: Context, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.run(replace(TINY, parts=("tokens",), threads=(1,)), context)
    told = capsys.readouterr().err
    assert [f"{name}: grows as N^{power}" in told for name, power in ((OURS, "1.00"), (GLOBAL, "2.00"))] == [True] * 2


def test_memory_is_told_by_contender(context: Context, seen: list[Any]) -> None:
    benchmark.run(replace(TINY, parts=("training",), peers=False, threads=(1,)), context)
    case = "forward and backward, 1x4x6x8, 2 heads | cpu | 1"
    lines = (context.out / "memory.md").read_text().splitlines()
    assert lines[-2:] == [f"| {case} | unknown | {EAGER} | 2.5 |", f"| {case} | 1.2 | {FLOOR} | 2.5 |"]


def test_unmeasurable_device_is_refused(context: Context) -> None:
    vars(context)["device"] = torch.device("mps")
    with pytest.raises(UserError, match="device mps cannot be timed: give --device cpu or cuda"):
        benchmark.run(TINY, context)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--parts", "module"), "part 'module' is unknown: did you mean modules"),
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
    flags = ("--quick", "--parts", "operator", "--threads", "1", "--device", "cpu", "--json")
    with pytest.raises(SystemExit) as stopped:
        app.main(["bench", *flags, "--out", str(tmp_path / "out")])
    assert not stopped.value.code
    rows = json.loads(capsys.readouterr().out)
    assert [(row["peer"], row["threads"], row["target"]) for row in rows] == [(EAGER, 1, None)] * 2


@pytest.mark.slow
def test_quick_measures_every_part(context: Context) -> None:
    rows = benchmark.run(Settings.quick(threads=(1,)), context)
    assert {path.stem for path in context.out.glob("*.json")} == set(PARTS)
    assert all(row["ours_ms"] > 0 for row in rows)


@pytest.mark.gpu
def test_quick_measures_every_part_on_a_gpu(tmp_path: Path) -> None:
    context = Context("cuda", 0, tmp_path / "out", lambda path: None)
    rows = benchmark.run(Settings.quick(), context)
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert {path.stem for path in context.out.glob("*.json")} == set(PARTS)
