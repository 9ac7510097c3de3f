"""Claim, runs over seeds, 95% intervals, verdict, figure and one section of a report."""

from __future__ import annotations

from leap_shared.experiment.core import Experiment, Result, run
from leap_shared.experiment.report import join
from leap_shared.experiment.statistics import Estimate, difference, mean, t_quantile

__all__ = ["Estimate", "Experiment", "Result", "difference", "join", "mean", "run", "t_quantile"]
