"""What a curriculum needs of anybody's training loop: smaller pictures, wrappers, rates, checks of its batches."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leap_efficienttrain.ops.weights import lanczos_table
from leap_efficienttrain.plan import Plan
from leap_efficienttrain.resampling import low_frequency_crop
from leap_efficienttrain.stages import CurriculumFields
from leap_shared.errors import UserError

__all__ = [
    "Images",
    "Smaller",
    "accumulations",
    "batch_size",
    "check_even",
    "check_half_precision",
    "check_no_replay",
    "dataset_length",
    "downsample",
    "rewrap",
    "set_rate",
    "updates_ahead",
]

Images = Float[Tensor, "batch channels height width"]
Smaller = Float[Tensor, "batch channels size size"]


def downsample(images: Images, size: int, method: str = "lanczos") -> Smaller:
    """Square pictures of a batch at a lower size, by the curriculum's method; as they are where they have it already.

    Lanczos has Pillow's weights, without the rounding to bytes: it is for pictures that are normalised already.

    Raises:
        UserError: the pictures are smaller, or not square.
    """
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    if height != width or height < size:
        advice = "load them at the base size, or give the adapter the transform that makes them"
        raise UserError(f"pictures of {height} x {width} pixels in a stage of {size} x {size}: {advice}")
    if method == "fourier":
        return low_frequency_crop(images, size)
    exact = images if images.dtype == torch.float64 else images.float()
    with torch.autocast(images.device.type, enabled=False):
        if method == "lanczos":
            table = lanczos_table(width, size)
            weights = torch.from_numpy(table / table.sum(1, keepdims=True)).to(exact)
            smaller = weights @ exact @ weights.T
        elif method == "area":
            smaller = F.interpolate(exact, (size, size), mode="area")
        else:
            smaller = F.interpolate(exact, (size, size), mode=method, antialias=True)
    return smaller.to(images.dtype)


def rewrap(model: nn.Module) -> None:
    """Let DistributedDataParallel share gradients in the parameters' present shapes; the wrapper stays the same object.

    To be called in all processes after `Flexible.set_size` gave a parameter another shape. Communication hooks must be
    registered again. Models without that wrapper stay as they are.
    """
    if isinstance(model, DistributedDataParallel):
        kept = ["device_ids", "output_device", "dim", "process_group", "find_unused_parameters"]
        kept += ["gradient_as_bucket_view", "static_graph", "mixed_precision"]
        newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        options = {name: getattr(model, name) for name in kept}
        options["forward_sync_buffers" if newer else "broadcast_buffers"] = model.broadcast_buffers
        training = model.training
        DistributedDataParallel.__init__(model, model.module, init_sync=False, **options)
        model.training = training  # the wrapper alone forgets it


def set_rate(optimizers: Sequence[Any], rate: float) -> None:
    """Give all parameter groups a learning rate, times their `lr_scale` as timm keeps it.

    A group without one gets it: its initial rate over the optimiser's default, so that groups keep their proportions.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "lr_scale" not in group:
                group["lr_scale"] = _scale(group, optimizer.defaults.get("lr"))
            value = rate * group["lr_scale"]
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value


def _scale(group: Mapping[str, Any], default: Any) -> float:
    return float(group.get("initial_lr", group["lr"])) / float(default) if default else 1.0


def accumulations(plan: Plan, micro_batch: int, where: str) -> list[int]:
    """Forward passes per update in each stage, for a loop whose micro-batches have one size.

    Args:
        plan: the curriculum on the data.
        micro_batch: pictures per process and forward pass.
        where: what sets it, in words.

    Raises:
        UserError: a stage's batch is no multiple, or it replays pictures.
    """
    found = []
    check_no_replay(plan.curriculum, "this loop")
    for leg in plan.legs:
        times, rest = divmod(leg.batch, micro_batch * plan.world)
        if rest or not times:
            parts = f"micro-batches of {micro_batch} ({where}) on {plan.world} processes"
            advice = f"give a divisor of {leg.batch // plan.world}, or change the curriculum's batch"
            raise UserError(f"{parts} do not make up the {leg.batch} pictures of stage {leg.index + 1}: {advice}")
        found.append(times)
    return found


def check_no_replay(curriculum: CurriculumFields, loop: str) -> None:
    """Raise a UserError where a stage replays pictures, in a loop that cannot."""
    for number, stage in enumerate(curriculum.stages, 1):
        if stage.replay > 1:
            raise UserError(
                f"stage {number} replays pictures, which {loop} cannot: take a CurriculumLoader, or replay 1"
            )


def dataset_length(loader: Any) -> int:
    """Pictures of a loader's data set.

    Raises:
        UserError: it does not tell.
    """
    for name in ("source", "dataset"):
        if hasattr(getattr(loader, name, None), "__len__"):
            return len(getattr(loader, name))
    raise UserError(f"a {type(loader).__name__} does not tell how many pictures there are: give samples")


def batch_size(loader: Any) -> int | None:
    """Pictures of a loader's batches; None where it does not tell."""
    found = getattr(getattr(loader, "batch_sampler", None), "batch_size", None) or getattr(loader, "batch_size", None)
    return found if isinstance(found, int) else None


def updates_ahead(loader: Any) -> int:
    """Updates that a loader may have loaded before they are trained: its workers' and the library's batches."""
    workers = getattr(loader, "num_workers", 0) or 0
    return 2 + workers * (getattr(loader, "prefetch_factor", None) or 2)


def check_even(plan: Plan) -> None:
    """Raise a UserError where Mixup would meet an odd number of pictures."""
    for leg in plan.legs:
        pictures = leg.micro_batch * leg.stage.replay
        if pictures % 2:
            given = f"stage {leg.index + 1} has forward passes of {pictures} pictures"
            raise UserError(f"{given}, and Mixup pairs them: give an even number")


def check_half_precision(wanted: bool, flag: str) -> None:
    """Raise a UserError where 16-bit floats with a gradient scaler are asked for, and there is no CUDA."""
    if wanted and not torch.cuda.is_available():
        raise UserError(f"{flag} needs CUDA, which this machine lacks: take bfloat16 or none")
