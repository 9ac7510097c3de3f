"""Offline prioritised experience replay: static priorities of transitions, and trainers that draw by them."""

from __future__ import annotations

from leap_oper import integrations
from leap_oper.advantages import ValueFit, oper_a
from leap_oper.priorities import Priorities, convert_released, oper_r, top_rows
from leap_oper.replay import PrioritizedReplay
from leap_oper.report import Report
from leap_oper.samplers import AliasSampler, CdfSampler, ReferenceSampler
from leap_oper.trainer import Trainer
from leap_shared.offline import Transitions, from_d3rlpy, from_env, load, normalised_score, read_d4rl, read_minari

__version__ = "0.1.0"

from_arrays = Transitions.from_arrays

__all__ = [
    "AliasSampler",
    "CdfSampler",
    "Priorities",
    "PrioritizedReplay",
    "ReferenceSampler",
    "Report",
    "Trainer",
    "ValueFit",
    "__version__",
    "convert_released",
    "from_arrays",
    "from_d3rlpy",
    "from_env",
    "integrations",
    "load",
    "normalised_score",
    "oper_a",
    "oper_r",
    "read_d4rl",
    "read_minari",
    "top_rows",
]
