"""EfficientTrain (Wang et al., ICCV 2023) and EfficientTrain++ (TPAMI 2024): a curriculum of sizes and augmentation."""

from __future__ import annotations

import importlib
from typing import Any

from leap_efficienttrain import mae, presets, recipes
from leap_efficienttrain.cache import build_cache, open_pictures
from leap_efficienttrain.checkpoints import convert, load_checkpoint, load_state, read_checkpoint, save_official
from leap_efficienttrain.cost import Prediction, gmac
from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.families import FAMILIES
from leap_efficienttrain.finish import Finish
from leap_efficienttrain.groups import named_groups, param_groups
from leap_efficienttrain.live import Columns, live
from leap_efficienttrain.loader import CurriculumLoader
from leap_efficienttrain.loops import rewrap
from leap_efficienttrain.models import VARIANTS, create_model
from leap_efficienttrain.plan import Plan, State
from leap_efficienttrain.released import stage_table
from leap_efficienttrain.replay import ReplayBuffer
from leap_efficienttrain.resampling import lanczos_resize, low_frequency_crop, prepare
from leap_efficienttrain.schedule import lr_schedule
from leap_efficienttrain.searching import Search, SearchResult, search
from leap_efficienttrain.sizes import Flexible, flexible
from leap_efficienttrain.stages import LearningRate, Stage
from leap_efficienttrain.streaming import stream
from leap_efficienttrain.tables import transfer_state
from leap_efficienttrain.training import CurriculumTrainer
from leap_efficienttrain.transforms import LiveTransform

__version__ = "0.0.1"

ADAPTERS = ("accelerate", "hf", "lightning", "timm")  # imported when they are asked for: they need their libraries

__all__ = [
    "FAMILIES",
    "VARIANTS",
    "Columns",
    "Curriculum",
    "CurriculumLoader",
    "CurriculumTrainer",
    "Finish",
    "Flexible",
    "LearningRate",
    "LiveTransform",
    "Plan",
    "Prediction",
    "ReplayBuffer",
    "Search",
    "SearchResult",
    "Stage",
    "State",
    "__version__",
    "build_cache",
    "convert",
    "create_model",
    "flexible",
    "gmac",
    "lanczos_resize",
    "live",
    "load_checkpoint",
    "load_state",
    "low_frequency_crop",
    "lr_schedule",
    "mae",
    "named_groups",
    "open_pictures",
    "param_groups",
    "prepare",
    "presets",
    "read_checkpoint",
    "recipes",
    "rewrap",
    "save_official",
    "search",
    "stage_table",
    "stream",
    "transfer_state",
]


def __getattr__(name: str) -> Any:
    if name in ADAPTERS:
        return importlib.import_module(f"leap_efficienttrain.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *ADAPTERS})
