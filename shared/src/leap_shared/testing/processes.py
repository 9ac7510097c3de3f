"""Code that is tested in a process of its own, as a user starts it: nothing of the other tests is loaded or set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run_python"]


def run_python(code: str, folder: Path, seconds: float = 500.0) -> str:
    """Run a program in a fresh interpreter and return what it printed.

    Args:
        code: the program.
        folder: where it runs; it can import the modules there.
        seconds: the most that it may take.

    Raises:
        AssertionError: it failed; the message ends as its errors do.
        subprocess.TimeoutExpired: it took too long.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(  # noqa: S603 (the test's own program)
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"the program ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout
