"""The one error that means "your input", and the helper that says what the input may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "did_you_mean"]


class UserError(ValueError):
    """Something the user gave is wrong: says what was given, what was expected and what to do.

    Command lines print it as one line and exit with code 2; every other exception keeps its traceback.
    """


def did_you_mean(given: str, known: Iterable[str], limit: int = 3) -> str:
    """Sentence naming the nearest of `known`, all of them where none is near, or nothing where there are none."""
    known = sorted(set(known))
    near = difflib.get_close_matches(given, known, n=limit, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(known)}" if known else ""
