"""`nox -s new -- NAME` gives a package that is complete and carries its own name everywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copyfile(ROOT / "LICENSE", tmp_path / "LICENSE")
    return tmp_path


def create(name: str, root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "new_package.py"), name, str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_new_package_has_the_same_rooms_as_the_finished_ones(root: Path) -> None:
    assert create("two-words", root).returncode == 0
    made = root / "packages" / "two-words"
    for room in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "src/leap_two_words/__init__.py",
                 "src/leap_two_words/cli.py", "src/leap_two_words/py.typed", "tests/conftest.py",
                 "tests/test_cli.py"):  # fmt: skip
        assert (made / room).is_file(), room


def test_no_placeholder_is_left_in_a_new_package(root: Path) -> None:
    create("two-words", root)
    made = list((root / "packages").rglob("*"))
    assert made
    for file in made:
        assert "@name@" not in str(file)
        assert "@module@" not in str(file)
        if file.is_file():
            assert "@name@" not in file.read_text()
            assert "@module@" not in file.read_text()


def test_an_existing_package_is_not_overwritten(root: Path) -> None:
    create("one", root)
    kept = root / "packages" / "one" / "README.md"
    kept.write_text("mine")
    again = create("one", root)
    assert again.returncode != 0
    assert "exists already" in again.stderr
    assert kept.read_text() == "mine"
