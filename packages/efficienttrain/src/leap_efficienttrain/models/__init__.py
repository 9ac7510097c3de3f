"""The models of the papers: timm's, and CSWin, registered with timm when this module is imported."""

from __future__ import annotations

from leap_efficienttrain.models.cswin import CSWin
from leap_efficienttrain.models.variants import VARIANTS, Pretraining, Result, Variant, create_model, find

__all__ = ["VARIANTS", "CSWin", "Pretraining", "Result", "Variant", "create_model", "find"]
