"""The command line says what is installed."""

from __future__ import annotations

import pytest

from leap_slide import __version__
from leap_slide.cli import app


def test_version_names_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        app.main(["--version"])
    assert not stopped.value.code
    assert f"leap-slide {__version__}" in capsys.readouterr().out
