"""The experiment on digits: its arms differ in nothing but what they are named for; its report says what ran."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leap_flatten import demo, digits
from leap_flatten.attention import FocusedLinearAttention
from leap_flatten.demo import Settings
from leap_flatten.digits import DigitsViT, Recipe, SoftmaxAttention
from leap_flatten.verbs.results import Demo, Experiment
from leap_shared.cli import App
from leap_shared.errors import UserError

app = App("leap-flatten", "leap_flatten", (Demo, Experiment))
TINY = Recipe(epochs=1, batch_size=300, dim=8, num_heads=2, depth=1)
FEW = ("--epochs", "1", "--batch-size", "600", "--dim", "8", "--heads", "2", "--depth", "1")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        app.main([*arguments, "--device", "cpu"])
    return int(stopped.value.code or 0)


def test_split_parts_all_images_and_differs_by_seed() -> None:
    first, again, other = (digits.load(seed) for seed in (0, 0, 1))
    assert (len(first.train.labels), len(first.test.labels)) == (1200, 597)
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert not torch.equal(first.train.labels, other.train.labels)
    rows = [{tuple(image.tolist()) for part in split for image in part.pixels[..., 0]} for split in (first, other)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("arm", ["focus", "focus-dwc", "dwc"])
def test_linear_arms_start_from_the_same_weights(arm: str) -> None:
    plain, other = (DigitsViT(name, TINY, 3).state_dict() for name in ("linear", arm))
    assert plain.keys() == other.keys()
    for name, values in plain.items():
        assert torch.equal(values, other[name]) == (".dwc." not in name or arm == "focus")


def test_relu_linear_arm_is_plain_normalised_linear_attention() -> None:
    layer = DigitsViT("linear", TINY, 0).blocks[0].attn
    assert isinstance(layer, FocusedLinearAttention)
    x = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(1))
    query, key, value = layer.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    query, key = ((part.relu() + 1e-6) / np.log(2) for part in (query, key))
    weights = query @ key.mT / 64
    expected = layer.proj((weights @ value / (weights.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_convolution_stays_off_in_training_where_the_arm_has_none() -> None:
    model = DigitsViT("focus", TINY, 0)
    digits.train(model, digits.load(0).train, TINY, 0)
    assert not any(values.any() for name, values in model.state_dict().items() if ".dwc." in name)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.sampled_from([(4, 1), (6, 2), (12, 3)]), st.integers(1, 9), st.integers(0, 99))
def test_softmax_matrices_are_what_the_layer_applies(
    batch: int, sizes: tuple[int, int], tokens: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, x = SoftmaxAttention(*sizes), torch.randn(batch, tokens, sizes[0])
    attended = layer.matrices(x) @ layer.heads(x)[2]
    torch.testing.assert_close(layer(x), layer.proj(attended.transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-4)


def test_same_seed_trains_to_the_same_numbers() -> None:
    part = digits.load(0).train
    losses, weights = [], []
    for _ in range(2):
        model = DigitsViT("focus-dwc", TINY, 5)
        losses.append(digits.train(model, part, TINY, 5))
        weights.append(model.head.weight.detach())
    assert losses[0] == losses[1]
    assert torch.equal(*weights)


def test_training_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    digits.train(DigitsViT("softmax", TINY, 0), digits.load(0).train, TINY, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_training_lowers_the_loss() -> None:
    part, recipe = digits.load(0).train, Recipe(epochs=4, depth=1)
    model = DigitsViT("focus-dwc", recipe, 0)
    assert digits.train(model, part, recipe, 0) < 0.7 * np.log(10)


@pytest.mark.parametrize(("arm", "bounded"), [("linear", True), ("focus", True), ("focus-dwc", False), ("dwc", False)])
def test_only_the_convolution_lifts_the_rank_above_the_heads_dim(arm: str, bounded: bool) -> None:
    recipe = replace(TINY, dim=16, depth=2)
    found = digits.spectra(DigitsViT(arm, recipe, 0), digits.load(0).test.pixels[:2])
    assert found.shape == (2 * 2 * 2, 64)
    ranks = (found > 1e-3).sum(1)
    assert (ranks <= 8).all() == bounded
    assert (ranks > 56).all() != bounded


@given(st.floats(0.5, 2.5), st.floats(0.1, 10.0))
def test_slope_is_the_exponent_from_1024_tokens_on(power: float, factor: float) -> None:
    tokens = [64, 1024, 4096, 16384]
    times = [factor * count**power for count in tokens]
    assert demo.slope(tokens, [1e9, *times[1:]]) == pytest.approx(power)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs is 0: give 1 or more"),
        ({"batch_size": 0}, "batch_size is 0: give 1 or more"),
        ({"dim": 30}, "30 channels and 4 heads: the channels must be a multiple of the heads"),
        ({"learning_rate": 0.0}, "give a rate above 0"),
        ({"weight_decay": -0.1}, "a decay of 0 or more"),
        ({"focusing_factor": 0}, "focusing_factor 0: expected a number above 0"),
        ({"kernel_size": 4}, "kernel_size 4: expected an odd number"),
    ],
)
def test_impossible_recipe_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": ()}, "there are no seeds"),
        ({"arms": ("softmax", "focus-dwc")}, "the claim compares focus-dwc with linear, name both"),
        ({"arms": ("linear", "focus-dwc", "focs")}, "unknown arm 'focs'.*focus"),
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
    chosen = ("--arms", "linear", "focus-dwc", "--no-latency", *FEW)
    assert run("experiment", *chosen, "--json", "--out", str(out), *arguments) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_experiment_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = experiment(tmp_path, capsys, "--seeds", "1")
    trained = []

    def train(model: DigitsViT, part: digits.Part, recipe: Recipe, seed: int) -> float:
        trained.append(seed)
        return digits.train(model, part, recipe, seed)

    monkeypatch.setattr(demo, "train", train)
    both = experiment(tmp_path, capsys, "--seeds", "2")
    assert trained == [1, 1]
    assert [arm["values"][:1] for arm in both["arms"]] == [arm["values"] for arm in first["arms"]]
    assert first["sd"] == {"ReLU-linear": None, "focus + DWC": None}
    assert both["latency"] == {}


def test_lost_spectra_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment(tmp_path, capsys, "--seeds", "1")
    (tmp_path / "work" / "linear-0.json").unlink()
    assert run("experiment", *FEW, "--seeds", "1", "--arms", "linear", "focus-dwc", "--out", str(tmp_path)) == 2
    assert "delete" in capsys.readouterr().err


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment(tmp_path, capsys, "--seeds", "1")
    assert run("experiment", *FEW, "--seeds", "1", "--p", "4", "--out", str(tmp_path)) == 2
    assert "holds outcomes of another run" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_demo_writes_its_section_and_repeats_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for name in ("first", "second"):
        assert run("demo", "--quick", "--json", "--out", str(tmp_path / name)) == 0
        results.append(json.loads(capsys.readouterr().out))
    latencies = [result.pop("latency") for result in results]
    assert all("grows, fitted over" in result["notes"].pop() for result in results)
    assert results[0] == results[1]
    assert {"claim", "baseline", "metric", "seeds", "estimate", "interval", "verdict", "sd"} <= results[0].keys()
    assert [arm["arm"] for arm in results[0]["arms"]] == ["softmax", "ReLU-linear", "focus", "focus + DWC"]
    assert results[0]["ranks"]["ReLU-linear"]["trained"] == [8.0, 8.0]
    assert latencies[0]["tokens"] == [64, 1024, 2304]
    assert latencies[0]["slopes"].keys() == latencies[0]["ms"].keys()
    assert all((tmp_path / "first" / name).stat().st_size > 10_000 for name in ("rank.png", "latency.png", "arms.png"))
    section = (tmp_path / "first" / "section.html").read_text(encoding="utf-8")
    assert "smoke test" in section
    assert section.count("data:image/png") == 3


def test_table_ends_with_the_verdict() -> None:
    arm = {"estimate": 90.0, "interval": None}
    facts = {
        "arms": [{"arm": "a", **arm}, {"arm": "b", **arm}],
        "method": "b",
        "baseline": "a",
        "verdict": "reproduced",
    }
    ranks = {name: {"trained": [8.0], "random": [7.0]} for name in "ab"}
    rows = demo.table({**facts, "estimate": 3.25, "interval": [1.0, 5.5], "sd": {"a": None, "b": 1.0}, "ranks": ranks})
    assert rows[0]["sd"] == "unknown"
    assert rows[-1] == {"arm": "b - a: reproduced", "test accuracy": "+3.2", "95% interval": "1.0 to 5.5"}
