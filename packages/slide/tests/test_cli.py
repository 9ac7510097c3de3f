"""The command line: variants, what is installed, conversion, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import drawn, model

from leap_slide import __version__
from leap_slide.checkpoints import create_model
from leap_slide.cli import app
from leap_slide.models.variants import VARIANTS

VERBS = ("list", "info", "eval", "train", "reparam", "convert", "export", "visualize", "bench", "experiment", "demo")
SMALLEST = "slide_pvt_tiny"


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        app.main(arguments)
    return int(stopped.value.code or 0)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert call(*arguments, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_version_names_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert f"leap-slide {__version__}" in capsys.readouterr().out


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    words = capsys.readouterr().out.split()
    assert [verb for verb in VERBS if verb not in words] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(verb, "--help") == 0
    assert f"leap-slide {verb}" in capsys.readouterr().out


def test_list_has_a_row_for_every_variant(capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, "list")
    assert [row["name"] for row in rows] == list(VARIANTS)
    assert {row["name"]: row["parameters"] for row in rows} == {name: v.parameters for name, v in VARIANTS.items()}
    columns = ["name", "parameters", "gmac", "published_parameters", "published_gmac", "top1", "note", "image_size"]
    assert list(rows[0]) == columns


def test_list_is_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list") == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if " slide_swin_base_w7 " in line or line.startswith("slide_swin_base_w7 "))
    assert all(text in row for text in ("87787424", "15.5", "84.2", "gives the paper's FLOPs"))


def test_info_describes_the_stages_of_a_variant(capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "info", "slide_swin_tiny_w7")
    assert (told["parameters"], told["top1"], told["family"]) == (28_308_514, 82.3, "SlideSwin")
    slide = {"blocks": 2, "channels": 192, "heads": 6, "tokens": "28x28", "attention": "slide 3x3"}
    windows = "softmax in windows of 7x7"
    softmax = {"blocks": 6, "channels": 384, "heads": 12, "tokens": "14x14", "attention": windows}
    assert (told["stage 2"], told["stage 3"]) == (slide, softmax)
    assert told["recipe"].endswith(": leap-slide train --cfg slide_swin_tiny_w7")
    assert told["weights"].startswith("none published")


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("slide_swin_tiny", ["softmax", "softmax"]),
        ("slide_pvt_v2_b1", ["softmax to keys reduced by 2", "softmax"]),
        ("slide_cswin_tiny", ["softmax in stripes of 7", "softmax"]),
        ("slide_nat_mini", ["neighbourhood 7x7", "neighbourhood 7x7"]),
    ],
)
def test_info_knows_every_family(name: str, attention: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "info", name)
    found = [told[f"stage {stage}"]["attention"] for stage in range(1, 5)]
    assert found == ["slide 3x3", "slide 3x3", *attention]


def test_info_without_a_name_says_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "info")
    assert told["leap-slide"] == __version__
    assert told["torch"] == torch.__version__.partition("+")[0]
    assert "cpu" in told["backends"]


def test_reparam_and_convert_tell_whose_weights_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = drawn(create_model(SMALLEST)).state_dict()
    average = {name: value * 2 if name == "norm.bias" else value for name, value in state.items()}
    torch.save({"model": state, "state_dict_ema": average}, tmp_path / "a.pth")
    source, target, again = (str(tmp_path / name) for name in ("a.pth", "deploy.safetensors", "deploy.pth"))
    told = answer(capsys, "reparam", source, target, "--ema")
    assert (told["variant"], told["verified"], told["written"]) == (SMALLEST, "tensors and logits", target)
    told = answer(capsys, "convert", target, again)
    assert (told["variant"], told["verified"], told["written"]) == (SMALLEST, "tensors and logits", again)
    found = create_model(SMALLEST, checkpoint=again).state_dict()
    assert torch.equal(found["norm.bias"], average["norm.bias"])


@pytest.mark.parametrize("verb", ["convert", "reparam"])
def test_the_check_can_be_left_out(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(model("swin").state_dict(), tmp_path / "a.pth")
    told = answer(capsys, verb, str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), "--no-verify")
    assert (told["variant"], told["verified"]) == (None, "nothing")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("info", "slide_swin_tinny"), "did you mean slide_swin_tiny"),
        (("convert", "a.pth", "b.onnx"), "b.onnx ends in .onnx: expected .pth or .safetensors"),
        (("reparam", "absent.pth", "b.safetensors"), "cannot read the checkpoint absent.pth"),
        (("reparam", "a.pth"), "required"),
        (("lst",), "did you mean list"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
