"""Programs that tests start: their output, their errors, and what they inherit."""

from __future__ import annotations

from pathlib import Path

import pytest

from leap_shared.testing.processes import run_python


def test_a_program_runs_in_its_folder_with_nothing_of_the_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "beside.py").write_text("WORD = 'found'")
    code = "import os, sys, beside; print(beside.WORD, 'pytest' in sys.modules, 'TRITON_INTERPRET' in os.environ)"
    assert run_python(code, tmp_path) == "found False False\n"


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ended with 1:(.|\n)*ValueError: of its own"):
        run_python("raise ValueError('of its own')", tmp_path)
