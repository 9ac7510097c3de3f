"""Image-classification training on accelerate and timm, from a configuration that YAML can hold."""

from __future__ import annotations

from leap_shared.errors import UserError

try:
    from leap_shared.vision.config import AugmentationConfig, DataConfig, OptimiserConfig, ScheduleConfig, TrainConfig
    from leap_shared.vision.data import build_transform, evaluation_loader
    from leap_shared.vision.evaluation import evaluate
    from leap_shared.vision.sources import Source, open_source
    from leap_shared.vision.training import Trainer
except ModuleNotFoundError as error:
    raise UserError(f'leap_shared.vision needs {error.name}: pip install "leap-shared[vision]"') from error

__all__ = [
    "AugmentationConfig",
    "DataConfig",
    "OptimiserConfig",
    "ScheduleConfig",
    "Source",
    "TrainConfig",
    "Trainer",
    "build_transform",
    "evaluate",
    "evaluation_loader",
    "open_source",
]
