"""Curricula for Hugging Face's Trainer."""
# ruff: noqa: ARG002 - callbacks have one interface

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from leap_efficienttrain.adapters import Session
from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.loops import accumulations, batch_size, check_half_precision, dataset_length, updates_ahead
from leap_efficienttrain.plan import Plan
from leap_shared.errors import UserError

try:
    from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise UserError('Hugging Face Trainer is not installed: pip install "leap-efficienttrain[hf]"') from error

__all__ = ["CurriculumCallback", "training_arguments"]

KEY = "leap_efficienttrain"


class CurriculumCallback(TrainerCallback):
    """Drives size, augmentation and learning rate of a Trainer's model by a curriculum, in one `train()`.

    Make it before `Trainer.train`, which may then go on from a checkpoint of any update: the model takes the size of
    the weights first. Pictures at the base size become smaller before the model; with `transform` the loader makes
    them small already. Evaluation is at the base size. The Trainer keeps one batch: the curriculum's must be it in all
    stages, without replay.

    Args:
        curriculum: what is trained when.
        model: the Trainer's: one of Transformers whose configuration has an `image_size`, one with a model of timm
            inside, or one that takes any size.
        transform: the `LiveTransform`, with output "float", of the training data set.
        samples: pictures of the training set; the data set's unless given.
        ema: moving averages of the model.
        ahead: see `Session`; worked out from the loader's workers unless given.
        evaluate_at: see `Session`.
        trainer: has to be given, here or as an attribute later, where several processes train a model whose parameters
            change their shapes.
        **options: of `flexible`.

    Raises:
        UserError: the model cannot take a size of the curriculum.

    Example:
        ```python
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**training_arguments(curriculum, len(data), output_dir="out")),
            train_dataset=data,
            callbacks=[CurriculumCallback(curriculum, model)],
        )
        trainer.train()
        ```
    """

    def __init__(
        self,
        curriculum: Curriculum,
        model: nn.Module,
        transform: Any = None,
        samples: int | None = None,
        *,
        ema: Any = None,
        ahead: int | None = None,
        evaluate_at: Literal["base", "stage"] = "base",
        trainer: Any = None,
        **options: Any,
    ) -> None:
        self.samples, self.ahead, self.trainer = samples, ahead, trainer
        resized = None
        if isinstance(model, PreTrainedModel) and hasattr(model.config, "image_size"):
            options = {"rebuild": _builder(model), "size": model.config.image_size, **options}
            resized = lambda size: setattr(model.config, "image_size", size)  # noqa: E731
        self.session = Session(
            curriculum, model, ema=ema, transform=transform, evaluate_at=evaluate_at, resized=resized, **options
        )
        self.session.attach()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Check what was set, and go to the update where the training begins."""
        loader, optimizer = parts["train_dataloader"], parts["optimizer"]
        samples = dataset_length(loader) if self.samples is None else self.samples
        wrapped = getattr(self.trainer, "model_wrapped", None)
        if args.world_size > 1 and wrapped is None and self.session.flexible.how != "any size":
            raise UserError("several processes, and parameters that change shapes: set callback.trainer = trainer")
        self.session.ahead = updates_ahead(loader) if self.ahead is None else self.ahead
        plan = self.session.begin(optimizer, samples, args.world_size, wrapped)
        self.session.attach()
        pictures = batch_size(loader) or args.per_device_train_batch_size
        _check_arguments(plan, pictures, args.gradient_accumulation_steps, state.max_steps)
        saved: Any = state.stateful_callbacks  # goes into the Trainer's checkpoints as JSON
        if state.global_step and KEY in saved:
            self.session.load_state_dict(saved[KEY])
        saved[KEY] = self.session.state_dict()
        self.session.enter(state.global_step)
        _follow(parts["lr_scheduler"], plan, optimizer, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Set what holds for this update."""
        self.session.enter(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Leave the model at the size of its last stage, without hooks."""
        self.session.detach()


def training_arguments(
    curriculum: Curriculum, samples: int, world: int = 1, micro_batch: int | None = None, **arguments: Any
) -> dict[str, Any]:
    """What a `TrainingArguments` needs to train the whole curriculum, with `arguments` beside it.

    Args:
        curriculum: what is trained when.
        samples: pictures of the training set.
        world: processes.
        micro_batch: pictures per process and forward pass; the smallest of the curriculum's stages unless given.
        **arguments: more of `TrainingArguments`.

    Raises:
        UserError: curriculum, data and batches do not fit together, or fp16 is asked for without CUDA.
    """
    check_half_precision(bool(arguments.get("fp16")), "fp16=True")
    plan = curriculum.plan(samples, world)
    pictures = micro_batch or min(leg.micro_batch for leg in plan.legs)
    accumulate = accumulations(plan, pictures, "micro_batch")
    _check_constant(accumulate)
    return {
        "per_device_train_batch_size": pictures,
        "gradient_accumulation_steps": accumulate[0],
        "max_steps": plan.updates,
        "learning_rate": float(curriculum.lr.base),
        "lr_scheduler_type": "constant",
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        **arguments,
    }


def _check_constant(accumulate: list[int]) -> None:
    if len(set(accumulate)) > 1:
        raise UserError(
            f"the stages have {accumulate} forward passes per update, the Trainer one number: no batch_scale"
        )


def _check_arguments(plan: Plan, pictures: int, accumulate: int, max_steps: int) -> None:
    wanted = accumulations(plan, pictures, "per_device_train_batch_size")
    _check_constant(wanted)
    if wanted[0] != accumulate:
        given = f"{pictures} x {accumulate} x {plan.world} = {pictures * accumulate * plan.world} pictures per update"
        advice = f"set gradient_accumulation_steps={wanted[0]}, or the curriculum's batch"
        raise UserError(f"the Trainer has {given}, and the curriculum {plan.legs[0].batch}: {advice}")
    if max_steps != plan.updates:
        text = f"the Trainer stops after {max_steps} updates, and the curriculum has {plan.updates}"
        warnings.warn(f"{text}: set max_steps={plan.updates}, see training_arguments", stacklevel=2)


def _follow(scheduler: Any, plan: Plan, optimizer: Any, update: int) -> None:
    """Let the Trainer's scheduler, whose rates it logs, say what the curriculum sets before every update."""
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [group["lr_scale"] for group in optimizer.param_groups]
        scheduler.lr_lambdas = [lambda step: plan.lr(min(step, plan.updates - 1))] * len(scheduler.base_lrs)
        scheduler._last_lr = [scale * plan.lr(min(update, plan.updates - 1)) for scale in scheduler.base_lrs]


def _builder(model: PreTrainedModel) -> Any:
    def build(size: Any) -> PreTrainedModel:
        config = copy.deepcopy(model.config)
        config.image_size = size
        return type(model)(config)

    return build
