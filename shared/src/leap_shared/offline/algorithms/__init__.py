"""Offline algorithms whose update rules can be called on given states, batches and noise, many runs at once."""

from __future__ import annotations

from typing import Any

from leap_shared.offline.algorithms.base import Algorithm, Batch
from leap_shared.offline.algorithms.bc import BC, BCConfig
from leap_shared.offline.algorithms.cql import CQL, CQLConfig
from leap_shared.offline.algorithms.iql import IQL, IQLConfig
from leap_shared.offline.algorithms.onestep import OneStep, OneStepConfig
from leap_shared.offline.algorithms.td3bc import TD3BC, TD3BCConfig

__all__ = [
    "ALGORITHMS",
    "BC",
    "CQL",
    "IQL",
    "TD3BC",
    "Algorithm",
    "BCConfig",
    "Batch",
    "CQLConfig",
    "IQLConfig",
    "OneStep",
    "OneStepConfig",
    "TD3BCConfig",
]

ALGORITHMS: dict[str, tuple[Any, Any]] = {
    "bc": (BC, BCConfig),
    "td3bc": (TD3BC, TD3BCConfig),
    "onestep": (OneStep, OneStepConfig),
    "cql": (CQL, CQLConfig),
    "iql": (IQL, IQLConfig),
}
"""By name: the class and its config."""
