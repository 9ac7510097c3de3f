"""Weights are read without running anything, and match a model by name or not at all."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from leap_shared import checkpoints, files
from leap_shared.errors import UserError


class Config(dict[str, object]):
    """A config class that readers must neither need nor run."""

    def __setstate__(self, state: object) -> None:
        raise AssertionError("the config was executed")


class Bomb:
    """Pickles to a call of os.system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


class Call:
    """Pickles to a call of a function in a module that torch does not block by itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[list[str]]]:
        return subprocess.check_call, (["touch", str(self.path)],)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3).to(torch.bfloat16)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_of_both_formats_are_read(tmp_path: Path, state: dict[str, torch.Tensor], legacy: bool) -> None:
    torch.save(OrderedDict(state), tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert same(checkpoints.read(tmp_path / "w.pth"), state)


def test_safetensors_round_trip_keeps_every_bit_and_copes_with_shared_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    state = {"base": base, "shared": base, "strided": base.t(), "half": base[:, ::2].to(torch.float16)}
    checkpoints.write_safetensors(tmp_path / "w.safetensors", state, {"source": "test"})
    assert same(checkpoints.read(tmp_path / "w.safetensors"), state)


def test_pickle_bomb_is_refused_and_never_goes_off(tmp_path: Path) -> None:
    for name, bomb in (("system", Bomb(tmp_path / "boom")), ("check_call", Call(tmp_path / "boom"))):
        torch.save({"model": {"w": torch.zeros(1)}, "config": bomb}, tmp_path / name)
        with pytest.raises(UserError, match="refused"):
            checkpoints.read(tmp_path / name)
        with pytest.raises(UserError):
            checkpoints.read(tmp_path / name, skip_foreign=True)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(UserError):
        checkpoints.read(tmp_path / "bare.pth")
    assert not (tmp_path / "boom").exists()


def test_config_class_is_refused_by_name_or_left_out_on_request(
    tmp_path: Path, state: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(lr=0.1)
    config.extra = 1  # type: ignore[attr-defined]  # an attribute makes pickle call __setstate__
    torch.save(
        {"model": state, "config": config, "args": argparse.Namespace(a=1), "best": np.float64(81.5)},
        tmp_path / "w.pth",
    )
    with pytest.raises(UserError, match=r"running code of .*(Config|Namespace).* refused.*skip_foreign"):
        checkpoints.read(tmp_path / "w.pth")
    content = checkpoints.read(tmp_path / "w.pth", skip_foreign=True)
    assert same(content["model"], state)
    assert content["config"]["lr"] == 0.1
    assert type(content["config"]) is not Config
    assert content["best"] == 81.5
    assert "argparse.Namespace" in caplog.text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x89PNG\r\n\x1a\n0000", "PNG picture"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"", "is empty"),
        (b"not a checkpoint at all", "not a whole torch file"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        checkpoints.read(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_file_is_one_clear_error(tmp_path: Path, state: dict[str, torch.Tensor], suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        checkpoints.write_safetensors(path, state)
    data = path.read_bytes()
    for size in (10, len(data) // 2, len(data) - 5):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="not a whole"):
            checkpoints.read(path)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        checkpoints.read(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="Is a directory"):
        checkpoints.read(tmp_path)


def test_wrong_checksum_is_refused_before_reading(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "w.pth")
    good = files.sha256(tmp_path / "w.pth")
    assert same(checkpoints.read(tmp_path / "w.pth", sha256=good.upper()), state)
    with pytest.raises(UserError, match=f"sha256 {good}, expected {'0' * 64}"):
        checkpoints.read(tmp_path / "w.pth", sha256="0" * 64)


def test_envelopes_and_wrapper_prefixes_are_taken_off(state: dict[str, torch.Tensor]) -> None:
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    average = {name: value + 1 for name, value in state.items()}
    content = {"epoch": 3, "state_dict": {"model": wrapped}, "model_ema": {"state_dict": average}}
    assert same(checkpoints.unwrap(content), state)
    assert same(checkpoints.unwrap(content, ema=True), average)
    assert same(checkpoints.unwrap(state), state)
    with pytest.raises(UserError, match="no moving average"):
        checkpoints.unwrap({"model": state}, ema=True)
    with pytest.raises(UserError, match="its entries: epoch"):
        checkpoints.unwrap({"epoch": 3})


def test_rename_refuses_to_merge_two_entries() -> None:
    state = {"x.1.w": torch.zeros(1), "x.2.w": torch.ones(1)}
    assert list(checkpoints.rename(state, [(r"^x\.(\d)", r"layers.\1"), ("w$", "weight")])) == [
        "layers.1.weight",
        "layers.2.weight",
    ]
    with pytest.raises(UserError, match=r"'x\.1\.w' and 'x\.2\.w' would both be renamed to 'x\.w'"):
        checkpoints.rename(state, [(r"\.\d", "")])


@given(st.dictionaries(st.text("ab.", min_size=1, max_size=6), st.just(torch.zeros(1)), max_size=8))
def test_rename_with_an_empty_table_changes_nothing(state: dict[str, torch.Tensor]) -> None:
    assert checkpoints.rename(state, []) == state


def test_strict_loading_names_every_misfit_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {
        "0.weight": torch.zeros(3, 5),
        "0.bias": torch.zeros(3),
        "1.wieght": torch.zeros(3),
        "1.bias": torch.zeros(3),
    }
    with pytest.raises(UserError) as refused:
        checkpoints.load_into(model, state)
    for part in (
        "1 missing: 1.weight",
        "unexpected 1.wieght: did you mean 1.weight?",
        "0.weight is (3, 5) in the file",
    ):
        assert part in str(refused.value)
    assert same(dict(model.state_dict()), before)
    report = checkpoints.load_into(model, state, strict=False)
    assert report.missing == ("1.weight",)
    assert report.unexpected == ("1.wieght",)
    assert report.mis_shaped == (("0.weight", (3, 5), (3, 4)),)
    assert torch.equal(model[0].bias, torch.zeros(3))
    assert torch.equal(model[0].weight, before["0.weight"])


def test_fitting_state_is_loaded_whole() -> None:
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    report = checkpoints.load_into(one, other.state_dict())
    assert report.fits
    assert str(report) == "everything fits"
    assert same(dict(one.state_dict()), dict(other.state_dict()))
