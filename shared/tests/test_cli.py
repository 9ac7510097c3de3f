from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from leap_shared.cli import App, Command, Context, config, context, output, resolve_device
from leap_shared.errors import UserError


class Mode(enum.Enum):
    FAST = "f"
    SLOW = "s"


@dataclass(frozen=True)
class Optimiser:
    lr: float = 1e-3
    """Learning rate."""
    name: str = "adam"


@dataclass(frozen=True)
class Train(Command):
    """Train a model on one file.

    It prints on stdout what libraries print.

    Examples:
        leap-test train data.h5 --steps 3
    """

    data: tyro.conf.Positional[Path]
    """The data file."""
    steps: int = 2
    """How many steps."""
    optimiser: Optimiser = Optimiser(name="sgd")
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[str, float] = ("a", 0.5)
    mode: Mode = Mode.FAST
    kind: Literal["on", "off", "3"] = "on"
    limit: float | None = None
    weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"steps {self.steps} is negative: give 0 or more")

    def run(self, context: Context) -> object:
        print("noise of a library")
        subprocess.run([sys.executable, "-c", "print('noise of a child')"], check=True)
        for _ in context.progress(range(self.steps), description="train"):
            pass
        return [{"lr": self.optimiser.lr, "loss": float("nan"), "score": np.float32(2), "where": self.data}]


@dataclass(frozen=True)
class WeightsReturn(Command):
    """Print weights by return."""

    verb = "weights r"

    def run(self, context: Context) -> object:
        return {"out": context.out, "device": context.device, "tensor": torch.tensor([1.0, float("inf")])}


@dataclass(frozen=True)
class Fail(Command):
    """Fail in a chosen way."""

    how: str = "bug"

    def run(self, context: Context) -> object:
        raise {"bug": RuntimeError("a bug"), "user": UserError("line one\nline two"), "stop": KeyboardInterrupt()}[
            self.how
        ]


@dataclass(frozen=True)
class Flood(Command):
    """Print more than a pipe holds."""

    def run(self, context: Context) -> object:
        for number in range(100_000):
            print(number)
        return None


app = App(name="leap-test", package="leap_shared", commands=(Train, WeightsReturn, Fail, Flood))


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        app.main(list(arguments))
    return int(stop.value.code or 0)


def command_line(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", "import test_cli; test_cli.app.main()", *arguments]
    return subprocess.run(line, cwd=Path(__file__).parent, text=True, capture_output=True, check=False, **options)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_version_is_printed_without_importing_torch() -> None:
    code = "import sys\nfrom leap_shared.cli import App\ntry: App('leap-x', 'leap_shared', ()).main(['--version'])\n"
    code += "except SystemExit as stop: sys.exit('torch' in sys.modules or stop.code)"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.startswith("leap-x 0.")
    assert "(leap-shared 0." in done.stdout
    assert "torch 2." in done.stdout


@pytest.mark.parametrize("arguments", [(), ("--help",), ("train", "--help")])
def test_help_shows_the_examples(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 0
    assert "leap-test train data.h5 --steps 3" in capsys.readouterr().out


def test_verb_group_lists_its_verbs_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("weights") == 0
    listed = capsys.readouterr().out
    assert "weights r  Print weights by return." in listed
    assert "train" not in listed


@pytest.mark.parametrize("given", [("trian",), ("weights", "x"), ("--device", "cpu")])
def test_unknown_verb_names_the_known_ones(given: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("leap-test: error: unknown verb")
    assert "train" in error or "weights r" in error
    assert error.endswith("(see leap-test --help)\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "data", "--stps", "3"), ("Unrecognized options: --stps", "--steps INT")),
        (("train",), ("Missing", "PATH")),
        (("train", "data", "--steps", "x"), ("--steps", "'x'")),
        (("train", "data", "--kind", "z"), ("'z'", "--kind", "'on'")),
        (("weights", "r", "--out"), ("Missing value", "--out")),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_wrong_flags_are_told_in_one_line(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    columns: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("leap-test: error: ")
    assert error.count("\n") == 1
    assert not set("│╭╮╰╯─\x1b") & set(error)
    assert all(word in error for word in words)


def test_users_error_is_one_line_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("fail", "--how", "user") == 2
    assert capsys.readouterr().err == "leap-test: error: line one line two\n"


def test_users_error_of_a_field_check_is_one_line_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "data", "--steps", "-1") == 2
    assert capsys.readouterr().err == "leap-test: error: steps -1 is negative: give 0 or more\n"


def test_negative_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "data", "--seed", "-1") == 2
    assert "seed -1" in capsys.readouterr().err


def test_interrupt_exits_130_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("fail", "--how", "stop") == 130
    assert capsys.readouterr().err == "leap-test: interrupted\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        app.main(["fail"])


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipe_ends_quietly(unbuffered: str) -> None:
    line = [sys.executable, "-c", "import test_cli; test_cli.app.main()", "flood"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    here = Path(__file__).parent
    with subprocess.Popen(line, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


def test_broken_pipe_elsewhere_is_not_taken_for_stdout() -> None:
    assert not output.drop_closed_stdout()


def test_json_is_all_that_stdout_gets(tmp_path: Path) -> None:
    done = command_line("train", "data.h5", "--json", "--out", str(tmp_path))
    assert json.loads(done.stdout) == [{"lr": 0.001, "loss": None, "score": 2.0, "where": "data.h5"}]
    assert {"noise of a library", "noise of a child", "train: 2/2 (0 s)"} <= set(done.stderr.splitlines())


def test_rows_are_printed_as_a_table_that_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit([{"case": "x" * 300, "met": True}, {"case": "[bold]y", "ratio": 1 / 3}], as_json=False)
    table = capsys.readouterr().out
    assert "x" * 300 in table
    assert "[bold]y" in table
    assert "0.3333" in table
    assert "yes" in table


def test_table_leaves_the_mappings_in_its_rows_to_json(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"case": "a", "details": {"rounds": 30}}]
    output.emit(rows, as_json=False)
    table = capsys.readouterr().out
    assert "case" in table
    assert "details" not in table
    assert "30" not in table
    output.emit(rows, as_json=True)
    assert json.loads(capsys.readouterr().out) == rows


def test_mapping_is_printed_as_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("weights", "r", "--device", "cpu") == 0
    assert capsys.readouterr().out.splitlines() == ["out     runs/weights/r", "device  cpu", "tensor  1, -"]


def test_nothing_is_printed_for_none(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit(None, as_json=False)
    assert capsys.readouterr().out == ""


def test_only_rank_zero_writes_the_result(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert call("weights", "r", "--json") == 0
    assert capsys.readouterr() == ("", "")


def test_info_says_versions_extras_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__.partition("+")[0]
    assert "cpu" in facts["devices"]
    assert "leap-shared[report]" in facts


def test_extra_with_a_missing_distribution_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = {
        "leap-x": ['leap-shared[report]; extra == "demo"', 'nothing-like-it>=2; extra == "demo"', "torch"],
        "leap-shared": ['jinja2; extra == "report"', 'not_there; extra == "report"'],
    }
    monkeypatch.setattr(output.metadata, "requires", requirements.__getitem__)
    assert output.missing("leap-x", "demo") == ["not_there", "nothing-like-it"]


def test_unknown_device_is_refused_before_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "data", "--device", "cuda:99") == 2
    shown = capsys.readouterr()
    assert "device 'cuda:99' is not available" in shown.err
    assert "cpu" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("text", ["gpu", "cpu:1", "cuda:", "", "CPU"])
def test_text_that_is_no_device_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="use auto or one of"):
        resolve_device(text)


def test_auto_is_a_device_that_exists() -> None:
    assert torch.zeros(1, device=resolve_device("auto")).item() == 0


@pytest.mark.parametrize("explicit", [True, False])
def test_out_that_cannot_be_a_folder_is_refused(
    explicit: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file")
    assert call("weights", "r", *(["--out", "runs/x"] if explicit else [])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "runs" in error


def test_written_config_repeats_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ("train", "data", "--optimiser.lr", "1e-5", "--sizes", "7", "--out", "o", "--json", "--seed", "3")
    assert call(*first) == 0
    written = (tmp_path / "o/config.yaml").read_text()
    result = capsys.readouterr().out
    assert call("train", "--config", "o/config.yaml", "--json") == 0
    assert (capsys.readouterr().out, (tmp_path / "o/config.yaml").read_text()) == (result, written)


def test_flags_win_over_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("data: here\noptimiser:\n  lr: 1e-4\nsteps: 5\n")
    assert call("train", "--config=c.yaml", "--steps", "0", "--json", "there") == 0
    shown = capsys.readouterr()
    row = json.loads(shown.out)[0]
    assert (row["lr"], row["where"]) == (1e-4, "there")
    assert "train: 0/0" in shown.err


def test_partial_config_keeps_the_other_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("verb: train\noptimiser: {lr: 2}\n")
    assert load(tmp_path / "c.yaml").optimiser == Optimiser(lr=2.0, name="sgd")


def test_required_field_missing_from_config_and_flags_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("steps: 5\n")
    assert call("train", "--config", "c.yaml") == 2
    assert "required" in capsys.readouterr().err.lower()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nstep: 2", "line 2: unknown key 'step': did you mean steps?"),
        ("optimiser:\n  larning: 2", "line 2: unknown key 'optimiser.larning'"),
        ("steps: many", "line 1: steps is 'many' (str), expected int"),
        ("steps: 1.5", "steps is 1.5 (float), expected int"),
        ("steps: true", "steps is True (bool), expected int"),
        ("optimiser: {lr: x}", "optimiser.lr is 'x' (str), expected float"),
        ("optimiser: 3", "optimiser is 3 (int), expected Optimiser"),
        ("sizes: [1, b]", "sizes is [1, 'b'] (list), expected tuple[int, ...]"),
        ("pair: [a]", "pair is ['a'] (list), expected tuple[str, float]"),
        ("mode: QUICK", "mode is 'QUICK' (str), expected one of FAST, SLOW"),
        ("kind: 3", "kind is 3 (int), expected one of 'on', 'off', '3'"),
        ("weights: {a: b}", "weights is {'a': 'b'} (dict), expected dict[str, float] | None"),
        ("steps: 1\nsteps: 2", "line 2: key 'steps' is given twice"),
        ("verb: demo", "is a config of `demo`, not of `train`"),
        ("- 1", "holds no `key: value` lines"),
        ("a: [", "cannot read the config"),
        ("data: !!python/object/apply:os.system ['touch hacked']", "cannot read the config"),
        ("data: 2020-99-99", "cannot read the config"),
        ("data: a\x00b", "cannot read the config"),
    ],
)
def test_bad_config_is_refused_in_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert call("train", "data", "--config", "c.yaml") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_unreadable_config_is_refused(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "c.yaml").write_bytes(content)
    assert call("train", "data", "--config", "c.yaml") == 2
    assert "cannot read the config c.yaml" in capsys.readouterr().err


def load(path: Path) -> Train:
    loaded = config.load(path, Train, "train")
    assert isinstance(loaded, Train)
    return loaded


floats = st.floats(allow_nan=False)
text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]))
trains = st.builds(
    Train,
    data=st.sampled_from([Path("a/b c"), Path("1e-4"), Path("null"), Path("on")]),
    steps=st.integers(0),
    optimiser=st.builds(
        Optimiser,
        lr=floats,
        name=text | st.sampled_from(["1e-4", "1E5", ".5e3", "no", "~", "1:30", "=", "2020-01-01", "a\x85b"]),
    ),
    sizes=st.lists(st.integers()).map(tuple),
    pair=st.tuples(text, floats),
    mode=st.sampled_from(Mode),
    kind=st.sampled_from(["on", "off", "3"]),
    limit=st.none() | floats,
    weights=st.none() | st.dictionaries(text, floats),
    out=st.none() | st.just(Path("o")),
    seed=st.integers(0, 2**40),
)


@settings(deadline=None, max_examples=150)
@given(train=trains)
def test_config_round_trip_gives_an_equal_command(train: Train, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(config.dump(train, "train"), encoding="utf-8")
    assert load(path) == train


@given(number=st.floats(1e-30, 1e30))
def test_scientific_notation_is_read_as_a_float(number: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "number.yaml"
    path.write_text(f"limit: {number:.17e}")
    assert load(path).limit == number


def test_json_flag_and_config_path_are_not_written() -> None:
    written = config.dump(replace(Train(data=Path("d")), json=True, config=Path("c")), "train")
    assert "json" not in written
    assert "config" not in written


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()]


def make_context() -> Context:
    return Context("cpu", 0, Path("o"), lambda folder: None)


def test_plain_progress_writes_the_first_and_the_last_line_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(make_context().progress(range(1000), description="step")) == list(range(1000))
    assert lines_of(capsys) == ["step: 0/1000", "step: 1000/1000"]


def test_plain_progress_writes_a_line_each_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(context.time, "monotonic", lambda: float(next(clock)))
    handle = make_context().progress(description="run", total=9)
    for number in range(9):
        handle.advance(1, text=f"seed {number}")
    shown = lines_of(capsys)
    assert shown[0] == "run: 0/9"
    assert shown[-1] == "run: 9/9 seed 8"
    assert 3 < len(shown) < 9


def test_last_line_of_progress_is_written_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(context.time, "monotonic", lambda: float(next(clock)))
    run = make_context()
    assert list(run.progress(range(2), description="step")) == [0, 1]
    run.close()
    assert lines_of(capsys) == ["step: 0/2", "step: 1/2", "step: 2/2"]


def test_progress_without_total_is_ended_by_the_end_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_context()
    run.progress(description="read").advance(3)
    run.close()
    assert lines_of(capsys) == ["read: 0", "read: 3"]


def test_log_line_is_never_wrapped_nor_styled(capsys: pytest.CaptureFixture[str]) -> None:
    make_context().log("[red] " + "x" * 500)
    assert capsys.readouterr().err == "[red] " + "x" * 500 + "\n"


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    run = make_context()
    for _ in run.progress(range(3), description="outer"):
        handle = run.progress(description="inner", total=2)
        handle.advance(2, text="[seed]")
    run.close()
    shown = capsys.readouterr().err
    assert "\x1b[" in shown
    assert "outer" in shown
    assert "3/3" in shown
    assert "[seed]" in shown


def test_a_refused_run_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert call("fail", "--how", "user", "--out", "new") == 2
    assert call("fail", "--how", "user", "--out", "mine") == 2
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "mine" / "config.yaml").exists()
