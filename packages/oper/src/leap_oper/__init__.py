"""Offline prioritised experience replay: static priorities of transitions, and trainers that draw by them."""

from __future__ import annotations

from leap_oper.advantages import ValueFit, oper_a
from leap_oper.behaviour_cloning import BehaviourCloning, Run
from leap_oper.priorities import Priorities, oper_r
from leap_oper.replay import PrioritizedReplay
from leap_oper.samplers import AliasSampler, CdfSampler, ReferenceSampler
from leap_shared.offline import Transitions

__version__ = "0.1.0"

from_arrays = Transitions.from_arrays

__all__ = [
    "AliasSampler",
    "BehaviourCloning",
    "CdfSampler",
    "Priorities",
    "PrioritizedReplay",
    "ReferenceSampler",
    "Run",
    "ValueFit",
    "__version__",
    "from_arrays",
    "oper_a",
    "oper_r",
]
