"""A pull request tests the packages that it touches, and everything else tests all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "changed_packages.py"
LISTING = [
    {"session": f"tests-3.10(package='{name}')", "python": "3.10", "call_spec": {"package": name}}
    for name in ("shared", "one", "two", "tools")
] + [
    {"session": "tests_lowest(package='one')", "python": None, "call_spec": {"package": "one"}},
    {"session": "lint", "python": None, "call_spec": {}},
]


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def matrix(folder: Path, *arguments: str) -> list[dict[str, str]]:
    command = [sys.executable, str(TOOL), *arguments]
    done = subprocess.run(command, cwd=folder, input=json.dumps(LISTING), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--initial-branch=main")
    for name in ("packages/one/a.py", "packages/two/a.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one\n")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--message=first")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("packages/one/a.py", {"one"}),
        ("packages/gone/a.py", set()),
        ("README.md", set()),
        ("tools/a.py", {"tools"}),
        ("templates/package/a.py", {"tools"}),
        ("shared/src/a.py", {"shared", "one", "two", "tools"}),
        ("noxfile.py", {"shared", "one", "two", "tools"}),
        ("pyproject.toml", {"shared", "one", "two", "tools"}),
        ("packages/two/pyproject.toml", {"two"}),
    ],
)
def test_a_change_chooses_the_packages_that_it_concerns(repository: Path, file: str, expected: set[str]) -> None:
    (repository / file).parent.mkdir(parents=True, exist_ok=True)
    (repository / file).write_text("two\n")
    git(repository, "add", "--all")
    git(repository, "commit", "--message=second")
    chosen = matrix(repository, "HEAD^1")
    assert {session["session"].split("'")[1] for session in chosen} == expected


def test_a_file_moved_between_packages_touches_both(repository: Path) -> None:
    git(repository, "mv", "packages/one/a.py", "packages/two/b.py")
    git(repository, "commit", "--message=second")
    assert {session["session"].split("'")[1] for session in matrix(repository, "HEAD^1")} == {"one", "two"}


@pytest.mark.parametrize("arguments", [(), ("",)])
def test_without_a_base_all_test_sessions_run(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert len(matrix(tmp_path, *arguments)) == 5


def test_a_session_without_its_own_python_gets_one(tmp_path: Path) -> None:
    assert all(session["python"] for session in matrix(tmp_path))
