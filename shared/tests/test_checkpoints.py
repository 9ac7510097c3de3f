"""Weights are read without running anything, and match a model by name or not at all."""

from __future__ import annotations

import argparse
import enum
import os
import pickle
import re
import subprocess
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

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


class Colour(enum.Enum):
    """A class whose instances are made by calling it."""

    RED = 1


def pickle_bomb(tmp_path: Path, kind: type, legacy: bool) -> Path:
    content = {"model": {"w": torch.ones(1)}, "config": kind(tmp_path / "boom")}
    torch.save(content, tmp_path / "bomb.pth", _use_new_zipfile_serialization=not legacy)
    return tmp_path / "bomb.pth"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("skip_foreign", [False, True])
def test_call_of_os_system_is_refused_in_both_modes(tmp_path: Path, legacy: bool, skip_foreign: bool) -> None:
    with pytest.raises(UserError, match=r"running code of (os|posix)\.system, which is refused") as refused:
        checkpoints.read(pickle_bomb(tmp_path, Bomb, legacy), skip_foreign=skip_foreign)
    assert ("pass skip_foreign" in str(refused.value)) is (not skip_foreign)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_call_of_another_function_is_refused_or_made_inert(tmp_path: Path, legacy: bool) -> None:
    path = pickle_bomb(tmp_path, Call, legacy)
    with pytest.raises(UserError, match=r"running code of \S+\.check_call, which is refused"):
        checkpoints.read(path)
    content = checkpoints.read(path, skip_foreign=True)
    assert content["config"] == {}
    assert content["model"]["w"] == 1
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("skip_foreign", [False, True])
def test_bare_pickle_is_refused_with_the_code_that_it_wants(tmp_path: Path, protocol: int, skip_foreign: bool) -> None:
    content = [Bomb(tmp_path / "boom"), Bomb(tmp_path / "boom"), Call(tmp_path / "boom"), OrderedDict(a=1)]
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(UserError, match=r"is a bare pickle .* code of \S+, \S+, which is refused") as refused:
        checkpoints.read(tmp_path / "bare.pth", skip_foreign=skip_foreign)
    assert re.search(r"(os|posix)\.system,", str(refused.value))
    assert ".check_call," in str(refused.value)
    assert not (tmp_path / "boom").exists()


def test_truncated_bare_pickle_is_refused_with_the_code_that_it_wants(tmp_path: Path) -> None:
    (tmp_path / "bare.pth").write_bytes(pickle.dumps([Bomb(tmp_path / "boom"), "x" * 1000])[:-500])
    with pytest.raises(UserError, match=r"is a bare pickle .* code of (os|posix)\.system, which is refused"):
        checkpoints.read(tmp_path / "bare.pth")


def test_bare_pickle_of_plain_data_is_told_from_a_torch_file(tmp_path: Path) -> None:
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"w": [1.0, 2.0]}))
    with pytest.raises(UserError, match=r"is a bare pickle and no torch file: save it again with torch\.save"):
        checkpoints.read(tmp_path / "bare.pth")


@given(st.integers(0), st.binary(max_size=60))
def test_safetensors_are_never_taken_for_a_pickle(length: int, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "w.safetensors")
        state = {"w" * (1 + length % 300): torch.tensor([*data], dtype=torch.uint8)}
        checkpoints.write_safetensors(path, state)
        assert same(checkpoints.read(path), state)


@pytest.mark.parametrize("legacy", [False, True])
def test_config_class_is_refused_by_name_or_left_out_on_request(
    tmp_path: Path, state: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture, legacy: bool
) -> None:
    config = Config(lr=0.1)
    config.extra = 1  # type: ignore[attr-defined]  # an attribute makes pickle call __setstate__
    args = argparse.Namespace(a=1, out=Path("runs"), colour=Colour.RED)
    content = {"config": config, "model": state, "args": args, "best": np.float64(81.5)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"running code of \S+\.Config, which is refused.*skip_foreign=True"):
        checkpoints.read(tmp_path / "w.pth")
    found = checkpoints.read(tmp_path / "w.pth", skip_foreign=True)
    assert same(found["model"], state)
    assert (type(found["config"]), found["config"]["lr"], vars(found["config"])["extra"]) == (OrderedDict, 0.1, 1)
    assert vars(found["args"])["a"] == 1
    assert found["best"] == 81.5
    assert all(name in caplog.text for name in ("argparse.Namespace", "Config", "Path", "Colour"))


def test_what_one_reading_skipped_is_refused_again_by_the_next(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "args": argparse.Namespace(a=1)}, tmp_path / "w.pth")
    before = set(torch.serialization.get_safe_globals())
    checkpoints.read(tmp_path / "w.pth", skip_foreign=True)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(UserError, match=r"argparse\.Namespace"):
        checkpoints.read(tmp_path / "w.pth")


def test_file_that_no_stand_in_can_serve_names_the_code_it_wants(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "choices": {Colour.RED}}, tmp_path / "w.pth")  # the stand-in has no hash
    with pytest.raises(UserError, match=r"code of \S+\.Colour, which is refused.* \(unhashable"):
        checkpoints.read(tmp_path / "w.pth", skip_foreign=True)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x89PNG\r\n\x1a\n0000", "PNG picture"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"", "is empty"),
        (b"epoch 1\nepoch 2\n", "is no checkpoint but text"),
        (b'{"model": {"weights": {}}}', "is no checkpoint but text"),
        (b"\x93NUMPY\x01\x00", r"NumPy array: read it with `numpy\.load`"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\xff\xfe\x00", "is not a whole torch file: download it again$"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        checkpoints.read(tmp_path / "w.pth")


def test_other_archives_are_named_for_what_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("notes.txt", "hello")
    for name, complaint in (("a.npz", "a NumPy archive"), ("a.zip", "a zip archive of other files")):
        with pytest.raises(UserError, match=f"is no checkpoint but {complaint}"):
            checkpoints.read(tmp_path / name)


def sample_files() -> dict[str, bytes]:
    """One small checkpoint in each format."""
    state = {"a.weight": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.bfloat16)}
    content = {"model": state, "args": argparse.Namespace(lr=0.1), "best": np.float64(3)}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, name) for name in ("zip.pth", "legacy.pth", "w.safetensors")}
        torch.save(content, paths["zip.pth"])
        torch.save(content, paths["legacy.pth"], _use_new_zipfile_serialization=False)
        checkpoints.write_safetensors(paths["w.safetensors"], state)
        return {name: path.read_bytes() for name, path in paths.items()}


SAMPLES = sample_files()


@pytest.mark.parametrize("name", SAMPLES)
def test_truncated_file_is_one_clear_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for size in (1, 10, len(SAMPLES[name]) // 2, len(SAMPLES[name]) - 5):
        path.write_bytes(SAMPLES[name][:size])
        with pytest.raises(UserError) as refused:
            checkpoints.read(path)
        assert "\n" not in str(refused.value)


@given(st.sampled_from(sorted(SAMPLES)), st.integers(0), st.binary(max_size=8), st.integers(0, 8), st.booleans())
def test_damaged_file_is_read_or_refused_in_one_line(
    name: str, place: int, inserted: bytes, removed: int, skip_foreign: bool
) -> None:
    data = SAMPLES[name]
    place %= len(data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "w")
        path.write_bytes(data[:place] + inserted + data[place + removed :])
        complaint = ""
        try:
            checkpoints.read(path, skip_foreign=skip_foreign)
        except UserError as error:
            complaint = str(error)
        assert "\n" not in complaint


def test_torchscript_program_is_refused_as_such(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(SAMPLES["zip.pth"])
    with zipfile.ZipFile(path, "a") as archive:  # torch knows a program by this entry
        archive.writestr(archive.namelist()[0].replace("data.pkl", "constants.pkl"), b"")
    for skip_foreign in (False, True):
        with pytest.raises(UserError, match="running code of TorchScript, which is refused"):
            checkpoints.read(path, skip_foreign=skip_foreign)


def test_format_is_told_by_the_content_and_not_by_the_name(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(SAMPLES["w.safetensors"])
    (tmp_path / "w.safetensors").write_bytes(SAMPLES["zip.pth"])
    assert checkpoints.read(tmp_path / "w.bin").keys() == {"a.weight", "b"}
    assert checkpoints.read(tmp_path / "w.safetensors", skip_foreign=True)["best"] == 3


def test_tensors_go_where_map_location_says(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "w.pth")
    assert checkpoints.read(tmp_path / "w.pth", map_location="meta")["a.bias"].device.type == "meta"


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
    with pytest.raises(UserError, match="it is a list"):
        checkpoints.unwrap([state])


def test_envelope_without_tensors_is_passed_over_for_one_that_has_them(state: dict[str, torch.Tensor]) -> None:
    assert same(checkpoints.unwrap({"model": {"name": "swin"}, "state_dict": state}), state)


def test_envelope_that_holds_itself_ends(state: dict[str, torch.Tensor]) -> None:
    content: dict[str, Any] = {"w": state["a.bias"]}
    content["model"] = content
    assert same(checkpoints.unwrap(content), {"w": state["a.bias"]})


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


@given(st.lists(st.text("ab.", min_size=1, max_size=6), max_size=8, unique=True), st.text("ab.", max_size=3))
def test_rename_keeps_every_entry_or_names_two_that_meet(names: list[str], removed: str) -> None:
    state = {name: torch.tensor(index) for index, name in enumerate(names)}
    wanted = [name.replace(removed, "") if removed else name for name in names]
    table = [(re.escape(removed), "")]
    if len(set(wanted)) == len(wanted):
        assert {name: int(value) for name, value in checkpoints.rename(state, table).items()} == {
            name: index for index, name in enumerate(wanted)
        }
    else:
        with pytest.raises(UserError, match="would both be renamed"):
            checkpoints.rename(state, table)


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
        "1 unexpected: 1.wieght (did you mean 1.weight?)",
        "1 mis-shaped: 0.weight is (3, 5) in the file, (3, 4) in the model",
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


def test_many_misfits_are_counted_and_not_all_listed() -> None:
    names = tuple(f"layers.{index}.weight" for index in range(300))
    shapes = tuple((name, (1,), (2,)) for name in names)
    text = str(checkpoints.Report(missing=names, unexpected=("zzz",) * 300, mis_shaped=shapes))
    assert len(text) < 600
    assert "300 missing: layers.0.weight" in text
    assert text.count("and 295 more") == 3
