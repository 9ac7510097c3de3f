"""Side-by-side measurements: our callables against their peers, interleaved, with intervals."""

from __future__ import annotations

from leap_shared.bench.allocations import peak_allocation
from leap_shared.bench.compare import Case, Row, compare
from leap_shared.bench.contenders import Remote
from leap_shared.bench.models import copy_with, dtype_on, infer, model_call, noise, placed, training_step
from leap_shared.bench.report import memory_table, stamp, table, write
from leap_shared.bench.settings import QUICK, BenchmarkSettings, file_name

__all__ = ["QUICK", "BenchmarkSettings", "Case", "Remote", "Row", "compare", "copy_with", "dtype_on", "file_name"]
__all__ += ["infer", "memory_table", "model_call", "noise", "peak_allocation", "placed", "stamp", "table"]
__all__ += ["training_step", "write"]
