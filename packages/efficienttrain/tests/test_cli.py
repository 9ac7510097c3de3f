"""The command line: what each verb says and leaves behind, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from leap_efficienttrain import __version__
from leap_efficienttrain.cli import app
from leap_efficienttrain.curriculum import Curriculum

VERBS = ("list", "plan", "train", "search", "eval", "convert", "cache", "export-launch", "bench", "demo", "info")
SMALL = ("--batch", "8", "--base-size", "32", "--arithmetic", "continuous", "--workers", "0", "--device", "cpu")


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        app.main(arguments)
    return int(stopped.value.code or 0)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert call(*arguments, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert call(*arguments) == 2
    return capsys.readouterr().err


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """Two classes of JPEG files, for training and for validation."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for number in range(10):
                values = generator.integers(0, 128, (40, 48, 3)) + 127 * label
                Image.fromarray(values.astype(np.uint8)).save(folder / f"{number}.jpg")
    return str(tmp_path / "pictures")


def test_version_names_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert f"leap-efficienttrain {__version__}" in capsys.readouterr().out


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    words = capsys.readouterr().out.split()
    assert [verb for verb in VERBS if verb not in words] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(verb, "--help") == 0
    assert f"leap-efficienttrain {verb}" in capsys.readouterr().out


def test_plan_predicts_the_published_saving(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "swin.yaml"
    table = answer(capsys, "plan", "--model", "swin_tiny", "--epochs", "200", "--gpus", "8", "--yaml", str(target))
    assert table["speedup"] == pytest.approx(1.517, abs=1e-3)
    assert table["passes"] == 454
    assert len(table["stages"]) == 10
    assert Curriculum.from_yaml(target).plan().passes == 454


def test_plan_is_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "--model", "resnet50", "--images-per-second", "1000") == 0
    shown = capsys.readouterr()
    assert "demand" in shown.out
    assert "454 passes over the data" in shown.err
    assert "images/s" in shown.err


def test_plan_takes_released_curricula_for_models(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {model: [row["size"] for row in answer(capsys, "plan", "--model", model)["stages"]] for model in MODELS}
    assert sizes == MODELS


MODELS = {
    "deit_tiny": [96] * 2 + [160] * 4 + [192] * 2 + [224] * 2,
    "convnext_tiny": [160] * 6 + [224] * 4,
    "resnet18": [96] * 2 + [160] * 4 + [224] * 4,
}


def test_rates_follow_the_batch_unless_given(tmp_path: Path) -> None:
    for flags, rate in (([], 2.5e-4), (["--lr", "0.5"], 0.5)):
        target = tmp_path / "out.yaml"
        assert call("plan", "--model", "resnet18", "--batch", "256", "--yaml", str(target), *flags) == 0
        assert yaml.safe_load(target.read_text())["lr"]["base"] == pytest.approx(rate)


def test_list_has_the_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in answer(capsys, "list")}
    assert rows["swin_tiny"]["files"]["ET_pp_200ep_swinT.pth"] == 81.6
    assert call("list") == 0
    assert "CSWin_64_12211_tiny_224" in capsys.readouterr().out


def test_training_evaluation_and_conversion(capsys: pytest.CaptureFixture[str], pictures: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ("--model", "resnet10t", "--data", pictures, "--curriculum", "et:iccv", "--epochs", "2", *SMALL)
    more = ("--lr", "1e-3", "--ema", "0.9", "--no-mixup", "--amp", "no")
    done = answer(capsys, "train", *flags, *more, "--out", str(out))
    assert [row["size"] for row in done["stages"]] == [32] * 5
    assert done["scores"]["ema"]["images"] == 20
    assert (out / "curriculum.yaml").exists()
    evaluation = ("eval", str(out), "--data", pictures, "--workers", "0")
    rows = answer(capsys, *evaluation, "--sizes", "32", "64")
    assert [row["size"] for row in rows] == [32, 64]
    assert rows[0]["top1"] == pytest.approx(done["scores"]["weights"]["top1"])
    cropped = answer(capsys, *evaluation, "--crop", "fourier")
    assert cropped[0]["images"] == 20


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    names = {row["recipe"] for row in answer(capsys, "train", "--recipe", "list", "--data", "-")}
    assert {"deit_small", "swin_tiny_iccv", "vit_base_mae", "cswin_base_finetune_384"} <= names


def test_commands_are_exported(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export-launch", "--model", "swin_tiny", "--data", "imagenet", "--gpus", "8") == 0
    text = capsys.readouterr().out
    assert text.count("torchrun") == 10
    assert [f"{size}px" in text for size in (96, 160, 224)] == [True] * 3
    flags = ("--opt adamw", "--mixup 0.8", "--drop-path 0.2", "--clip-grad 5.0", "--amp-dtype float16")
    assert [flag for flag in flags if text.count(flag) != 10] == []


@pytest.mark.slow
def test_a_cache_is_built_and_trained_on(capsys: pytest.CaptureFixture[str], pictures: str, tmp_path: Path) -> None:
    target = tmp_path / "cache"
    assert answer(capsys, "cache", f"{pictures}/train", str(target), "--short-side", "32")["pictures"] == 20
    flags = ("--model", "resnet10t", "--data", str(target), "--curriculum", "constant", "--epochs", "1", *SMALL)
    assert answer(capsys, "train", *flags, "--lr", "1e-3", "--out", str(tmp_path / "run"))["scores"] == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the last stage trains at 16")  # which of two sizes is found is chance
def test_a_search_leaves_a_curriculum_to_train_by(
    capsys: pytest.CaptureFixture[str], pictures: str, tmp_path: Path
) -> None:
    flags = ("--model", "resnet10t", "--data", pictures, *SMALL, "--lr", "1e-3", "--out", str(tmp_path / "search"))
    searched = ("--sizes", "16", "32", "--stages", "2", "--budget", "2", "--fine-tune", "0.5")
    found = answer(capsys, "search", *flags, *searched)
    written = Curriculum.from_yaml(tmp_path / "search" / "curriculum.yaml")
    assert [stage.size for stage in written.stages] == [stage["size"] for stage in found]
    assert written.base_size == 32


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("plan", "--model", "swim_tiny"), "unknown"),
        (("plan", "--curriculum", "et+"), "preset 'et+' is unknown"),
        (("plan", "--curriculum", "none.yaml"), "cannot read the curriculum none.yaml"),
        (("plan", "--epochs", "5"), "nothing is left for stage"),
        (("train", "--data", "none"), "give --model"),
        (("train", "--data", "none", "--model", "resnet18"), "no pictures at none"),
        (("train", "--data", "none", "--recipe", "deit_smal"), "did you mean"),
        (("train", "--data", "none", "--recipe", "deit_small", "--model", "resnet18"), "leave one of them out"),
        (("search", "--data", "none", "--model", "resnet18", "--budget", "2"), "judges by validation pictures"),
        (("eval", "none.pth", "--data", "none"), "none.pth"),
        (("convert", "none.pth", "out.pth"), "none.pth"),
        (("bench", "crops"), "part 'crops' is unknown"),
        (("demo", "--quick", "--seeds", "3"), "leave out --seeds"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    error = complaint(capsys, *arguments, "--out", str(tmp_path / "out"), "--device", "cpu")
    assert text in error
    assert error.startswith("leap-efficienttrain: error:")
