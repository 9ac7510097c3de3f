"""Side-by-side measurements: our callables against their peers, interleaved, with intervals."""

from __future__ import annotations

from leap_shared.bench.compare import Case, Row, compare
from leap_shared.bench.contenders import Remote
from leap_shared.bench.report import stamp, table, write

__all__ = ["Case", "Remote", "Row", "compare", "stamp", "table", "write"]
