"""Keep the test sessions of the packages that changed since a commit.

    nox -s tests tests_lowest --list --json | python tools/changed_packages.py [BASE]

Prints a JSON list of {session, python} for a matrix; without BASE, of all sessions.
"""

from __future__ import annotations

import json
import subprocess
import sys

COMMON = ("shared/", "noxfile.py", "pyproject.toml", ".github/workflows/ci.yml")
TOOLS = ("tools/", "templates/", "tests/", "LICENSE")
DEFAULT_PYTHON = "3.10"


def touched(files: list[str], known: set[str]) -> set[str]:
    """Names of the packages whose tests the changed files concern; what all stand on concerns all."""
    if any(file.startswith(COMMON) for file in files):
        return known
    names = {file.split("/")[1] for file in files if file.startswith("packages/")}
    return (names | {"tools"} if any(file.startswith(TOOLS) for file in files) else names) & known


def main() -> None:
    """Filter the listing on standard input."""
    sessions = [session for session in json.load(sys.stdin) if "package" in session["call_spec"]]
    chosen = {session["call_spec"]["package"] for session in sessions}
    if base := "".join(sys.argv[1:2]):
        command = ["git", "diff", "--name-only", "--no-renames", base]
        files = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        chosen = touched(files, chosen)
    matrix = [
        {"session": session["session"], "python": session["python"] or DEFAULT_PYTHON}
        for session in sessions
        if session["call_spec"]["package"] in chosen
    ]
    print(json.dumps(matrix))


if __name__ == "__main__":
    main()
