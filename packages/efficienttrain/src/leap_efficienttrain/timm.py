"""Curricula for timm's train.py, and for loops that are written like it."""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from typing import Any, Literal

from timm.scheduler.scheduler import Scheduler
from torch import nn

from leap_efficienttrain.adapters import Session
from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.launch import launch_commands
from leap_efficienttrain.live import live
from leap_efficienttrain.loops import check_even, check_half_precision, check_no_replay, dataset_length, set_rate
from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number

__all__ = ["CurriculumScheduler", "launch_commands", "live", "patch_args"]


def patch_args(args: Namespace, curriculum: Curriculum, world: int | None = None) -> Namespace:
    """Set what a curriculum decides for the whole run in the arguments of timm's train.py, in place.

    That is the base size, the batch and accumulation of the first stage, passes as `epochs`, learning rates, the scaled
    drop-path rate, and RandAugment at the first magnitude. `CurriculumScheduler` does what changes while it runs.

    Args:
        args: as train.py parsed them; arguments that it lacks are left out.
        curriculum: what is trained when, in reference arithmetic: such loops count whole passes.
        world: processes; `args.world_size`, or 1, unless given.

    Raises:
        UserError: the arguments do not fit the curriculum, or fp16 is asked for without CUDA.

    Warns:
        UserWarning: the arguments have another augmentation than RandAugment, which no magnitude can drive.
    """
    processes = getattr(args, "world_size", 1) if world is None else world
    plan = curriculum.plan(None, processes)
    _check_fit(curriculum)
    half = bool(getattr(args, "amp", False)) and str(getattr(args, "amp_dtype", "float16")) == "float16"
    check_half_precision(half, "--amp with --amp-dtype float16")
    if any(getattr(args, name, 0) for name in ("mixup", "cutmix", "cutmix_minmax")):
        check_even(plan)
    if getattr(args, "use_multi_epochs_loader", False):
        raise UserError("--use-multi-epochs-loader prepares pictures of the next pass at the old size: leave it out")
    policy = getattr(args, "aa", None)
    if getattr(args, "no_aug", False) or (policy and not policy.startswith("rand-")):
        given = "--no-aug" if getattr(args, "no_aug", False) else f"--aa {policy}"
        warnings.warn(f"{given} has no RandAugment that the magnitudes could drive: take --aa rand-m9", stacklevel=2)
    elif hasattr(args, "aa"):
        args.aa = _with_magnitude(policy or plan.states[0].randaug, plan.states[0].magnitude)
    first, base = plan.states[0], curriculum.base_size
    values = {
        "img_size": base,
        "input_size": None,
        "batch_size": first.micro_batch,
        "grad_accum_steps": first.accumulate,
        "epochs": len(plan.states),
        "lr": float(curriculum.lr.base),
        "min_lr": float(curriculum.lr.final),
        "warmup_epochs": 0,
        "cooldown_epochs": 0,
        "sched_on_updates": False,
    }
    if getattr(args, "drop_path", None) is not None:
        values["drop_path"] = curriculum.drop_path(args.drop_path)
    for name, value in values.items():
        if hasattr(args, name):
            setattr(args, name, value)
    return args


class CurriculumScheduler(Scheduler):  # type: ignore[misc, unused-ignore]
    """Takes the place of timm's learning-rate scheduler, and drives size, augmentation and batch as well.

    `step(epoch)` goes to a pass over the data, `step_update(updates)` sets the rate within it, as train.py calls them.
    Make it before the checkpoint is loaded: weights of a small stage then load. An epoch is a pass of the curriculum.

    Args:
        optimizer: holds the parameters of the model.
        curriculum: as in `patch_args`.
        model: without wrapper.
        loader: timm's training loader; its batches take the size of the stage's.
        args: of train.py, whose `grad_accum_steps` takes the stage's.
        transform: the live transform of the loader's data set, see `live`; without one the loader gives pictures at the
            base size, and they become smaller before the model.
        samples: pictures of the training set; the loader's unless given.
        world: processes.
        ema: moving averages of the model, as timm's ModelEmaV3.
        wrapped: the model in DistributedDataParallel.
        evaluate_at: see `Session`.
        **options: of `flexible`.

    Attributes:
        session: size, magnitude and learning rate of every update.
        state: of the present pass.

    Raises:
        UserError: curriculum, data, model and optimiser do not fit together.

    Example:
        Three lines of train.py change:

        ```python
        args = patch_args(args, curriculum)
        loader_train.dataset.transform = transform = live(loader_train.dataset.transform)
        lr_scheduler = CurriculumScheduler(optimizer, curriculum, model, loader_train, args, transform)
        ```
    """

    def __init__(
        self,
        optimizer: Any,
        curriculum: Curriculum,
        model: nn.Module,
        loader: Any,
        args: Namespace | None = None,
        transform: Any = None,
        *,
        samples: int | None = None,
        world: int = 1,
        ema: Any = None,
        wrapped: nn.Module | None = None,
        evaluate_at: Literal["base", "stage"] = "base",
        **options: Any,
    ) -> None:
        _check_fit(curriculum)
        self.loader, self.args = loader, args
        self.session = Session(curriculum, model, transform=transform, ema=ema, evaluate_at=evaluate_at, **options)
        self.plan = self.session.begin(
            optimizer, dataset_length(loader) if samples is None else samples, world, wrapped
        )
        set_rate([optimizer], self.plan.lr(0))  # notes the groups' proportions
        super().__init__(optimizer, "lr", t_in_epochs=False, initialize=True)
        self.session.attach()
        self.state = self.plan.states[0]
        self.step(0)

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Go to the beginning of a pass: at the end of each, with the number of the next, and once after resuming."""
        self.metric = metric
        if epoch >= len(self.plan.states):
            return
        self.epoch, self.state = epoch, self.plan.states[epoch]
        self.session.enter(self.state.first_update or 0)
        _set_batch(self.loader, self.state.micro_batch)
        if self.args is not None:
            self.args.grad_accum_steps = self.state.accumulate

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set the learning rate of an update; it counts as train.py does, epochs of the present length."""
        self.metric = metric
        done = num_updates - self.epoch * -(-len(self.loader) // self.state.accumulate)
        first, last = self.state.first_update or 0, self.plan.updates - 1
        self.update_groups([self.plan.lr(min(first + max(done, 0), last))] * len(self.base_values))

    def state_dict(self) -> dict[str, Any]:
        """The curriculum, and how far its training is."""
        return self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that it is the same curriculum; `step` goes to the pass."""
        self.session.load_state_dict(state_dict)

    def _get_lr(self, t: int) -> list[float]:
        return [self.plan.lr(min(t, self.plan.updates - 1))] * len(self.base_values)


def _with_magnitude(policy: str, magnitude: Number) -> str:
    """A RandAugment policy of timm, such as rand-m9-n1-inc1, at another magnitude."""
    parts = [part for part in policy.split("-") if not re.fullmatch(r"m[\d.]+", part)]
    return "-".join([parts[0], f"m{magnitude:g}", *parts[1:]])


def _check_fit(curriculum: Curriculum) -> None:
    if curriculum.arithmetic != "reference":
        raise UserError("timm's loop counts whole passes over the data: take arithmetic='reference'")
    check_no_replay(curriculum, "timm's loop")


def _set_batch(loader: Any, size: int) -> None:
    """Batches of another size from the next `iter` on; workers stay."""
    sampler = getattr(getattr(loader, "loader", loader), "batch_sampler", None)
    if sampler is None or not isinstance(getattr(sampler, "batch_size", None), int):
        kind = type(getattr(loader, "loader", loader)).__name__
        raise UserError(f"the batches of a {kind} cannot change: take a DataLoader, with persistent workers if need be")
    sampler.batch_size = size
