"""The command line: variants, what is installed, conversion, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import drawn, model

from leap_flatten import VARIANTS, __version__, create_model
from leap_flatten.cli import app

VERBS = ("list", "info", "eval", "train", "convert", "bench", "visualize", "experiment", "demo")
SMALLEST = "flatten_pvt_v2_b0"


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        app.main(arguments)
    return int(stopped.value.code or 0)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert call(*arguments, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_version_names_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert f"leap-flatten {__version__}" in capsys.readouterr().out


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    words = capsys.readouterr().out.split()
    assert [verb for verb in VERBS if verb not in words] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(verb, "--help") == 0
    assert f"leap-flatten {verb}" in capsys.readouterr().out


def test_list_has_a_row_for_every_variant(capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, "list")
    assert [row["name"] for row in rows] == list(VARIANTS)
    assert {row["name"]: row["parameters"] for row in rows} == {name: v.parameters for name, v in VARIANTS.items()}
    assert list(rows[0]) == ["name", "parameters", "gmac", "top1", "image_size", "note", "released"]


def test_list_is_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list") == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if " flatten_swin_base_384 " in line)
    assert all(text in row for text in ("91433928", "46.38", "85", "384"))


def test_info_describes_the_stages_of_a_variant(capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "info", "flatten_swin_base_384")
    assert (told["parameters"], told["top1"], told["family"]) == (91_433_928, 85.0, "FlattenSwin")
    linear = {"blocks": 2, "channels": 256, "heads": 8, "tokens": "48x48", "attention": "linear"}
    windows = "softmax in windows of 12x12"
    softmax = {"blocks": 18, "channels": 512, "heads": 16, "tokens": "24x24", "attention": windows}
    assert (told["stage 2"], told["stage 3"]) == (linear, softmax)
    assert told["weights"] == "released by the authors"
    assert told["recipe"] == "30 + 0 epochs, 256 pictures per update: leap-flatten train --cfg flatten_swin_base_384"


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("flatten_pvt_tiny", ["linear"] * 4),
        ("flatten_cswin_tiny", ["linear", "linear", "softmax in stripes of 7", "softmax"]),
        ("flatten_deit_tiny", ["linear"]),
    ],
)
def test_info_knows_every_family(name: str, attention: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "info", name)
    assert [facts["attention"] for key, facts in told.items() if key.startswith("stage ")] == attention


def test_info_without_a_name_says_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "info")
    assert told["leap-flatten"] == __version__
    assert told["torch"] == torch.__version__.partition("+")[0]
    assert "cpu" in told["backends"]


def test_the_seven_released_files_are_marked() -> None:
    swin = {"flatten_swin_tiny", "flatten_swin_small", "flatten_swin_base", "flatten_swin_base_384"}
    others = {"flatten_pvt_tiny", "flatten_pvt_v2_b0", "flatten_cswin_tiny"}
    assert {name for name, variant in VARIANTS.items() if variant.released} == swin | others


def test_convert_tells_whose_weights_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = drawn(create_model(SMALLEST)).state_dict()
    average = {name: value + 1 for name, value in state.items()}
    torch.save({"model": state, "state_dict_ema": average}, tmp_path / "a.pth")
    source, target = str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors")
    told = answer(capsys, "convert", source, target, "--ema")
    assert (told["variant"], told["verified"], told["written"]) == (SMALLEST, "tensors and logits", target)
    assert len(told["sha256"]) == 64
    found = create_model(SMALLEST, checkpoint=target).state_dict()
    assert torch.equal(found["norm1.bias"], average["norm1.bias"])


def test_convert_can_leave_out_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(model("deit").state_dict(), tmp_path / "a.pth")
    told = answer(capsys, "convert", str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), "--no-verify")
    assert (told["variant"], told["verified"]) == (None, "nothing")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("info", "flatten_swin_tinny"), "did you mean flatten_swin_tiny"),
        (("convert", "a.pth", "b.onnx"), "b.onnx ends in .onnx: expected .pth or .safetensors"),
        (("convert", "absent.pth", "b.safetensors"), "cannot read the checkpoint absent.pth"),
        (("convert", "a.pth"), "required"),
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
