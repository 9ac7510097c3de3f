"""`nox -s release_check` names every way in which a release can disagree with itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "release_check.py"
CHANGELOG = """# Changelog

## [Unreleased]

## [0.1.2] - 2026-01-31

### Added

- A thing.

## [0.1.0] - 2026-01-01

- Old.
"""


def write_package(folder: Path, dependencies: str) -> None:
    module = folder / "src" / f"leap_{folder.name}"
    module.mkdir(parents=True)
    (module / "__init__.py").write_text('"""A package."""\n\n__version__ = "0.1.2"\n')
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "leap-{folder.name}"\ndescription = "A package"\ndependencies = {dependencies}\n'
    )
    (folder / "CHANGELOG.md").write_text(CHANGELOG)
    (folder / "LICENSE").write_text("the licence\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    shutil.copy(TOOL, tmp_path / "tools")
    (tmp_path / "LICENSE").write_text("the licence\n")
    write_package(tmp_path / "shared", "[]")
    write_package(tmp_path / "packages" / "one", '["leap-shared[vision]>=0.1,<0.2"]')
    return tmp_path


def check(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tools" / TOOL.name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("arguments", [(), ("all",), ("leap-one-v0.1.2",), ("leap-shared-v0.1.2",)])
def test_a_tree_that_agrees_passes(root: Path, arguments: tuple[str, ...]) -> None:
    result = check(root, *arguments)
    assert result.returncode == 0, result.stderr
    assert "all agree" in result.stdout


def test_notes_are_the_section_of_the_tagged_version_alone(root: Path) -> None:
    assert check(root, "leap-one-v0.1.2", "--notes").stdout == "### Added\n\n- A thing.\n"


@pytest.mark.parametrize("tag", ["leap-one-0.1.2", "leap-two-v0.1.2", "v0.1.2", "leap-one-v"])
def test_a_tag_of_no_known_package_is_refused(root: Path, tag: str) -> None:
    result = check(root, tag)
    assert result.returncode == 1
    assert "leap-shared, leap-one" in result.stderr


def test_a_tag_that_is_not_the_version_is_refused(root: Path) -> None:
    result = check(root, "leap-one-v0.1.3")
    assert result.returncode == 1
    assert "the tag says 0.1.3, __version__ says 0.1.2" in result.stderr


TOMORROW = (date.today() + timedelta(days=2)).isoformat()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("src/leap_one/__init__.py", "__version__", "version", "no line '__version__"),
        ("src/leap_one/__init__.py", "0.1.2", "0.1.3", "no section for 0.1.3"),
        ("CHANGELOG.md", CHANGELOG, "# Changelog", "no section for 0.1.2"),
        ("CHANGELOG.md", "2026-01-31", "January", "YYYY-MM-DD"),
        ("CHANGELOG.md", " - 2026-01-31", "", "YYYY-MM-DD"),
        ("CHANGELOG.md", "2026-01-31", TOMORROW, "in the future"),
        ("CHANGELOG.md", "### Added\n\n- A thing.\n", "", "says nothing under 0.1.2"),
        ("pyproject.toml", '"A package"', '" "', "no description"),
        ("pyproject.toml", '"leap-one"', '"leap-two"', "names 'leap-two'"),
        ("pyproject.toml", ">=0.1,<0.2", ">=0.2,<0.3", "leaves out the current leap-shared 0.1.2"),
        ("pyproject.toml", ">=0.1,<0.2", ">=0.1", "without an upper bound"),
        ("pyproject.toml", "leap-shared[vision]>=0.1,<0.2", "numpy", "does not depend on leap-shared"),
        ("pyproject.toml", '<0.2"', '<0.2", "leap_two"', "depends on leap-two"),
        ("LICENSE", "the", "another", "LICENSE is missing or differs"),
    ],
)  # fmt: skip
def test_each_disagreement_is_named(root: Path, file: str, old: str, new: str, message: str) -> None:
    edit(root / "packages" / "one" / file, old, new)
    result = check(root)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("leap-one: ")
    assert message in result.stderr


def test_all_disagreements_are_listed_at_once(root: Path) -> None:
    (root / "shared" / "LICENSE").unlink()
    edit(root / "packages" / "one" / "pyproject.toml", '"A package"', '""')
    lines = check(root).stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["leap-shared", "leap-one"]


def test_a_tag_is_not_held_up_by_another_package(root: Path) -> None:
    edit(root / "packages" / "one" / "pyproject.toml", '"A package"', '""')
    assert check(root, "leap-shared-v0.1.2").returncode == 0


def test_a_package_before_its_first_release_needs_no_section_until_it_is_tagged(root: Path) -> None:
    (root / "packages" / "one" / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n- A thing.\n")
    assert check(root).returncode == 0
    assert "no section for 0.1.2" in check(root, "leap-one-v0.1.2").stderr


def test_a_package_is_not_released_with_the_templates_address_of_the_paper(root: Path) -> None:
    template = (TOOL.parents[1] / "templates" / "package" / "pyproject.toml").read_text()
    paper = template.partition("[project.urls]")[2].splitlines()[1]
    with (root / "packages" / "one" / "pyproject.toml").open("a") as file:
        file.write(f"[project.urls]\n{paper}\n")
    assert check(root).returncode == 0
    assert "template's address of the paper" in check(root, "leap-one-v0.1.2").stderr


def test_notes_without_a_tag_are_refused(root: Path) -> None:
    assert check(root, "--notes").returncode == 2
