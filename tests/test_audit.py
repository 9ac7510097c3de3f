"""`nox -s audit` tells a network that reaches nothing from a clean bill, and a crash from both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "audit.py"
CLEAN = {"name": "one", "version": "1.0", "vulns": []}
SKIPPED = {"name": "two", "skip_reason": "Dependency not found"}
VULNERABLE = {"name": "three", "version": "3.0", "vulns": [{"id": "PYSEC-1"}, {"id": "PYSEC-2"}]}


def audit(folder: Path, output: str, complaint: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    """What the tool makes of a pip-audit that answers so."""
    script = f"import sys\nsys.stdout.write({output!r})\nsys.stderr.write({complaint!r})\nsys.exit({code})\n"
    stand_in = folder / "pip-audit"
    stand_in.write_text(f"#!{sys.executable}\n{script}")
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, str(TOOL)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def report(*rows: dict[str, object]) -> str:
    return json.dumps({"dependencies": rows, "fixes": []})


def test_what_was_looked_up_and_what_not_is_counted(tmp_path: Path) -> None:
    done = audit(tmp_path, report(CLEAN, SKIPPED, CLEAN))
    assert (done.returncode, done.stdout) == (0, "pip-audit: 2 looked up, 1 skipped, 0 vulnerable.\n")


def test_nothing_looked_up_is_said_plainly(tmp_path: Path) -> None:
    done = audit(tmp_path, report(SKIPPED, SKIPPED))
    assert done.returncode == 0
    assert "nothing was looked up" in done.stdout


def test_a_vulnerability_fails_with_its_names(tmp_path: Path) -> None:
    done = audit(tmp_path, report(VULNERABLE, SKIPPED), code=1)
    assert done.returncode == 1
    assert "three 3.0: PYSEC-1, PYSEC-2\n" in done.stdout


@pytest.mark.parametrize(
    "complaint",
    [
        "Traceback\nrequests.exceptions.ProxyError: HTTPSConnectionPool(host='x', port=443): Max retries",
        "Traceback\nrequests.exceptions.ConnectionError: HTTPSConnectionPool",
        "Traceback\nrequests.exceptions.HTTPError: 403 Client Error\n\nThe above\npip_audit.ServiceError",
        "ERROR:pip_audit._cli:Could not connect to the vulnerability feed",
    ],
)
def test_no_network_is_no_failure(tmp_path: Path, complaint: str) -> None:
    done = audit(tmp_path, "", complaint, 1)
    assert done.returncode == 0
    assert "not reachable" in done.stdout


@pytest.mark.parametrize(
    ("output", "complaint", "code"),
    [
        ("", "Traceback\nKeyError: 'name'\n", 1),
        ("", "pip-audit: error: unrecognized arguments\n", 2),
        ("", "", 0),
        ('{"dependencies": [', "", 0),
    ],
)
def test_any_other_crash_is_red(tmp_path: Path, output: str, complaint: str, code: int) -> None:
    done = audit(tmp_path, output, complaint, code)
    assert done.returncode == (code or 1)
    assert complaint in done.stderr
