"""The examples run, stop and go on; several processes train what one does."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
SHORT = ["--epochs", "0.3"]
"""Eight updates at 16 pixels, four at 24 and two at 32; timm's loop needs whole passes, of 20."""
SAME = {"rtol": 0.0, "atol": 2e-3}  # AdamW moves a weight by the rate, 2e-3, whatever rounding did to its gradient


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Examples import their pictures; Accelerate keeps its state per process."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    sys.modules.pop("digits", None)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def main_of(name: str) -> Callable[[list[str]], float]:
    found: Any = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return found


@pytest.mark.parametrize(
    ("name", "epochs"),
    [
        ("plain_loop", "0.3"),
        ("accelerate_train", "0.3"),
        ("hf_trainer", "0.3"),
        ("lightning_train", "0.3"),
        ("timm_train", "2.5"),
    ],
)
def test_an_example_stops_and_goes_on(name: str, epochs: str, tmp_path: Path, capsys: Any) -> None:
    main, out = main_of(name), ["--epochs", epochs, "--out", str(tmp_path / "run")]
    main([*out, "--stop", "9"])
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    assert 0 < main(out) <= 100
    assert "accuracy on held-out digits" in capsys.readouterr().out


def torchrun(name: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = [*command, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(run, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_of_torchrun_train_what_one_does(tmp_path: Path) -> None:
    main_of("ddp_torchrun")([*SHORT, "--out", str(tmp_path)])
    torchrun("ddp_torchrun", *SHORT, "--out", str(tmp_path))
    names = ("0-of-1", "0-of-2", "1-of-2")
    alone, first, second = (torch.load(tmp_path / f"weights-{name}.pt", weights_only=True) for name in names)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, **SAME)


def test_two_processes_of_accelerate_train_what_one_does(tmp_path: Path) -> None:
    main_of("accelerate_train")([*SHORT, "--out", str(tmp_path / "one")])
    torchrun("accelerate_train", *SHORT, "--out", str(tmp_path / "two"))
    alone, shared = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, **SAME)
