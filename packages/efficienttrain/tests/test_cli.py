"""The command line says what is installed."""

from __future__ import annotations

import pytest

from leap_efficienttrain import __version__
from leap_efficienttrain.cli import app


def test_version_names_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        app.main(["--version"])
    assert not stopped.value.code
    assert f"leap-efficienttrain {__version__}" in capsys.readouterr().out
