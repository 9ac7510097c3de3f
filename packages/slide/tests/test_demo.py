"""The experiment on digits: its arms differ in nothing but what they are named for; its report says what ran."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leap_shared.cli import App
from leap_shared.errors import UserError
from leap_shared.vision.bodies import Site
from leap_shared.vision.digits import Part, load, train
from leap_slide import demo
from leap_slide.attention import SlideAttention
from leap_slide.contenders import MERGED, TWO_PATH, UNFOLD
from leap_slide.demo import Settings
from leap_slide.digits import ConvolutionMixer, DigitsViT, Recipe, WindowMixer, without_deformation
from leap_slide.ops import cpu
from leap_slide.verbs.results import Demo, Experiment

app = App("leap-slide", "leap_slide", (Demo, Experiment))
TINY = Recipe(epochs=1, batch_size=600, dim=8, num_heads=2, depth=1)
FEW = ("--epochs", "1", "--batch-size", "600", "--dim", "8", "--heads", "2", "--depth", "1")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        app.main([*arguments, "--device", "cpu"])
    return int(stopped.value.code or 0)


def reach(layer: Callable[[Tensor, tuple[int, int]], Tensor], row: int, column: int) -> set[tuple[int, int]]:
    """The pixels of an 8x8 map that the output at one of them depends on."""
    x = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x, (8, 8))[0, row * 8 + column].square().sum(), x)
    return {divmod(int(place), 8) for place in gradient[0].abs().sum(1).nonzero()}


def square(rows: range, columns: range) -> set[tuple[int, int]]:
    return {(row, column) for row in rows for column in columns}


def test_windows_do_not_see_across_their_borders() -> None:
    layer = WindowMixer(Site(0, 0, 8, 2, (8, 8)), 4)
    assert reach(layer, 3, 4) == square(range(4), range(4, 8))


def test_convolution_sees_the_pixels_around() -> None:
    assert reach(ConvolutionMixer(8, 3), 3, 4) == square(range(2, 5), range(3, 6))


def test_fixed_shifts_see_the_pixels_around_and_slide_those_around_them() -> None:
    layer = SlideAttention(8, 2)
    assert reach(without_deformation(layer), 3, 4) == square(range(2, 5), range(3, 6))


def test_fixed_shifts_are_local_attention_by_unfold() -> None:
    torch.manual_seed(0)
    layer = without_deformation(SlideAttention(8, 2, rel_pos_bias=False))
    x, bias = torch.randn(2, 64, 8), layer.dep_conv.bias
    assert bias is not None
    torch.nn.init.zeros_(bias)
    query, key, value = layer.qkv(x).reshape(2, 64, 2, 3, 4).permute(3, 0, 2, 4, 1).flatten(1, 2)
    key, value = (F.unfold(part.reshape(4, 4, 8, 8), 3, padding=1).reshape(4, 4, 9, 64) for part in (key, value))
    share = (query[:, :, None] * key).sum(1, keepdim=True).mul(0.5).softmax(2)
    expected = layer.proj((share * value).sum(2).reshape(2, 8, 64).transpose(1, 2))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_fixed_shifts_start_from_the_weights_of_slide() -> None:
    fixed, slide = (DigitsViT(name, TINY, 3).state_dict() for name in ("fixed", "slide"))
    assert fixed.keys() == slide.keys()
    for name, values in slide.items():
        assert torch.equal(values, fixed[name]) == (".dep_conv1." not in name)


def test_fixed_shifts_train_their_bias_and_nothing_of_the_learned_path() -> None:
    model = DigitsViT("fixed", TINY, 0)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    train(model, Part(*(x[:40] for x in load(0).train)), TINY, 0)
    after = model.state_dict()
    assert not any(values.any() for name, values in after.items() if ".dep_conv1." in name)
    assert torch.equal(before["blocks.0.attn.dep_conv.weight"], after["blocks.0.attn.dep_conv.weight"])
    assert not torch.equal(before["blocks.0.attn.dep_conv.bias"], after["blocks.0.attn.dep_conv.bias"])


@pytest.mark.parametrize("arm", ["conv", "windows", "fixed", "slide"])
def test_arms_train_about_as_many_parameters(arm: str) -> None:
    trained, expected = (
        sum(p.numel() for p in DigitsViT(name, Recipe(), 0).parameters() if p.requires_grad) for name in (arm, "slide")
    )
    assert trained == pytest.approx(expected, rel=0.06)


def test_merging_error_is_rounding_in_both_precisions() -> None:
    model = DigitsViT("slide", TINY, 0)
    train(model, load(0).train, TINY, 0)
    errors = demo.merging_error(model, load(0).test.pixels[:8])
    assert 0 < errors[demo.MERGED] < 1e-6
    assert 0 < errors[demo.MERGED_DOUBLE] < 1e-14
    assert "blocks.0.attn.dep_conv1.weight" in model.state_dict()


def test_merging_error_sees_a_path_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DigitsViT("slide", TINY, 0)
    monkeypatch.setattr(SlideAttention, "reparameterize", without_deformation)
    assert demo.merging_error(model, load(0).test.pixels[:8])[demo.MERGED] > 1e-3


def test_scratch_memory_counts_in_every_call() -> None:
    call = demo._contenders(3, 16)[demo.OURS]

    def kept() -> int:
        call()
        return sum(x.nbytes for x in vars(cpu._memory).values())

    with ThreadPoolExecutor(1) as fresh:
        scratch = fresh.submit(kept).result()
    call()
    assert scratch > 100_000
    assert demo.extra_maps(call, 16) >= scratch / (4 * 96 * 16 * 16)


def test_two_paths_hold_copies_for_every_slot_and_ours_does_not() -> None:
    maps = {name: demo.extra_maps(call, 16) for name, call in demo._contenders(5, 16).items()}
    assert maps[TWO_PATH] > 4 * 25
    assert maps[demo.OURS] < maps[UNFOLD] / 2


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_contenders_compute_the_same(kernel_size: int) -> None:
    calls = demo._contenders(kernel_size, 8)
    expected = calls[TWO_PATH]()
    for name in (MERGED, demo.OURS):
        torch.testing.assert_close(calls[name](), expected, atol=1e-5, rtol=1e-5)


@given(st.floats(0.5, 5.0), st.floats(0.5, 2.0))
def test_growth_finds_slope_and_exponent(factor: float, power: float) -> None:
    sizes = [3, 5, 7]
    straight = demo.growth(sizes, [10 + factor * k * k for k in sizes])
    curved = demo.growth(sizes, [factor * float(k * k) ** power for k in sizes])
    assert straight["per slot"] == pytest.approx(factor)
    assert curved["exponent"] == pytest.approx(power)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 3}, "window 3: expected a divisor of 8"),
        ({"window": 0}, "window 0: expected a divisor of 8"),
        ({"kernel_size": 4}, "kernel_size 4: expected an odd number"),
        ({"epochs": 0}, "epochs is 0: give 1 or more"),
    ],
)
def test_impossible_recipe_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": ()}, "there are no seeds"),
        ({"arms": ("conv", "slide")}, "the claim compares slide with windows, name both"),
        ({"arms": ("windows", "slide", "fixd")}, "unknown arm 'fixd'.*fixed"),
        ({"kernel_sizes": (3, 4)}, "kernel_size 4: expected an odd number"),
        ({"kernel_sizes": (3,)}, "one kernel size, 3, shows no growth"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--quick", "--seeds", "3"), "--quick has two seeds: leave out --seeds"),
        (("experiment", "--threads", "0"), "threads is 0: give 1 or more"),
        (("experiment", "--kernel-size", "2"), "kernel_size 2: expected an odd number"),
        (("experiment", "--window", "5"), "window 5: expected a divisor of 8"),
        (("experiment", "--seeds", "0"), "there are no seeds"),
    ],
)
def test_bad_flags_end_in_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--out", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def experiment(out: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    chosen = ("--arms", "windows", "slide", "--no-costs", *FEW)
    assert run("experiment", *chosen, "--json", "--out", str(out), *arguments) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_experiment_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = experiment(tmp_path, capsys, "--seeds", "1")
    trained = []

    def counted(model: DigitsViT, part: Any, recipe: Recipe, seed: int) -> float:
        trained.append(seed)
        return train(model, part, recipe, seed)

    monkeypatch.setattr(demo, "train", counted)
    both = experiment(tmp_path, capsys, "--seeds", "2")
    assert trained == [1, 1]
    assert [arm["values"][:1] for arm in both["arms"]] == [arm["values"] for arm in first["arms"]]
    assert set(first["sd"].values()) == {None}
    assert first["differences"][0]["interval"] is None
    assert both["costs"] == {}


def test_differences_of_all_arms_are_paired_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = experiment(tmp_path, capsys, "--seeds", "2", "--arms", "conv", "windows", "fixed", "slide")
    values = {arm["arm"]: arm["values"] for arm in found["arms"]}
    by_name = {facts["difference"]: facts for facts in found["differences"]}
    assert list(by_name) == ["slide - windows", "slide - fixed shifts", "fixed shifts - windows", "slide - convolution"]
    fixed, windows = values["local attention, fixed shifts"], values["window attention, no shift"]
    shown = by_name["fixed shifts - windows"]
    assert shown["values"] == [a - b for a, b in zip(fixed, windows, strict=True)]
    assert shown["estimate"] == pytest.approx(sum(shown["values"]) / 2)
    assert {facts["verdict"] for facts in by_name.values()} <= {"reproduced", "not reproduced", "underpowered"}
    assert by_name["slide - windows"]["interval"] == found["interval"]
    assert any("slide - fixed shifts: " in note for note in found["notes"])


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment(tmp_path, capsys, "--seeds", "1")
    arguments = ("--seeds", "1", "--window", "2", "--no-costs", "--out", str(tmp_path))
    assert run("experiment", *FEW, *arguments) == 2
    assert "holds outcomes of another run" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_demo_writes_its_section_and_repeats_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for name in ("first", "second"):
        assert run("demo", "--quick", "--json", "--out", str(tmp_path / name)) == 0
        results.append(json.loads(capsys.readouterr().out))
    costs = [result.pop("costs") for result in results]
    assert all(result["notes"].pop().startswith(f"Time at k = 3, 5, 7: {TWO_PATH}") for result in results)
    assert results[0] == results[1]
    assert costs[0]["memory_maps"] == costs[1]["memory_maps"]
    assert costs[0]["ms"].keys() == costs[0]["memory_maps"].keys()
    assert [arm["seeds"] for arm in results[0]["arms"]] == [[0, 1]] * 4
    figures = ("differences.png", "costs.png", "arms.png")
    assert all((tmp_path / "first" / name).stat().st_size > 10_000 for name in figures)
    section = (tmp_path / "first" / "section.html").read_text(encoding="utf-8")
    assert "smoke test" in section
    assert section.count("data:image/png") == 3


def test_table_ends_with_differences_and_their_verdicts() -> None:
    arms = [{"arm": name, "estimate": 90.0, "interval": None} for name in "ab"]
    compared = {"difference": "b - a", "values": [3.0, 3.5], "estimate": 3.25, "interval": [1.0, 5.5]}
    facts = {"arms": arms, "sd": {"a": None, "b": 1.0}, "differences": [{**compared, "verdict": "reproduced"}]}
    rows = demo.table(facts)
    assert rows[0] == {"arm": "a", "test accuracy": "90.00", "95% interval": "unknown", "sd": "unknown", "verdict": ""}
    last = {"arm": "b - a", "test accuracy": "+3.25", "95% interval": "1.00 to 5.50", "sd": "0.35"}
    assert rows[-1] == last | {"verdict": "reproduced"}
