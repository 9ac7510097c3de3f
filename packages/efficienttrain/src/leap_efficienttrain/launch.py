"""A curriculum as commands for timm's own train.py, one for each stage."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from typing import Any

import torch

from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.families import Family, family_of
from leap_efficienttrain.loops import check_no_replay
from leap_efficienttrain.models import create_model, find
from leap_efficienttrain.plan import Leg, Plan, State
from leap_shared.errors import UserError

__all__ = ["CAVEATS", "launch_commands", "recipe_flags"]

CAVEATS = (
    "As near as timm's train.py comes: between stages the optimiser starts anew, and pictures are cropped straight to",
    "their size. leap-efficienttrain train keeps moments and averages, and augments at full size, as released.",
)

STEPS = 1000  # points of a pass at which rates are compared
LAUNCHERS = {
    "python": "python {script}",
    "torchrun": "torchrun --nproc_per_node={world} {script}",
    "accelerate": "accelerate launch --num_processes={world} {script}",
}


def launch_commands(
    curriculum: Curriculum,
    model: str,
    data: str,
    *,
    world: int = 1,
    launcher: str = "torchrun",
    script: str = "train.py",
    output: str = "output",
    name: str = "",
    num_classes: int = 1000,
    options: Sequence[str] = (),
) -> list[str]:
    """Commands of timm's train.py that train the stages of a curriculum one after another.

    They come as near as that script can: sizes, passes, batches and RandAugment are the curriculum's; within a stage
    the learning rate is a straight line between the curriculum's at both ends (after a warm-up, where it rises first).
    Pictures are cropped straight to the size, without the base size in between. Each command starts from the weights
    that the one before it saved last, their moving average under --model-ema, resized first where a table depends on
    the size; the optimiser starts anew, since a resumed one would bring its former rate along. `leap-efficienttrain
    train` keeps moments and average, in one process.

    Args:
        curriculum: what is trained when.
        model: timm's name, or an official one.
        data: as train.py takes it.
        world: processes, on this machine.
        launcher: what starts them: torchrun, accelerate or python.
        script: path of train.py.
        output: folder of the stages' folders.
        name: of these; the curriculum's and the model's unless given.
        num_classes: outputs of the model.
        options: more flags for all commands, as ["--amp", "--mixup", "0.8"].

    Raises:
        UserError: a stage replays pictures, or timm does not know the model or it cannot change its size.
    """
    check_no_replay(curriculum, "timm's train.py")
    if launcher not in LAUNCHERS or (launcher == "python" and world > 1):
        raise UserError(f"launcher {launcher!r} for {world} processes: take torchrun or accelerate")
    variant = find(model)
    known = model if variant is None else variant.timm_name
    if variant is not None and variant.family == "cswin":
        raise UserError(f"timm's train.py does not know {model}: use leap-efficienttrain train")
    with torch.device("meta"):
        family = family_of(create_model(known, size=curriculum.base_size))
    if family is not None and family.how == "refused":
        raise UserError(f"{model} cannot change its input size: {family.reason}")
    plan = curriculum.plan(None, world)
    start = LAUNCHERS[launcher].format(script=shlex.quote(script), world=world)
    label = name or "-".join(filter(None, (curriculum.name.replace(":", "-"), model)))
    commands = []
    for leg in plan.legs:
        flags = ["--data-dir", data, "--model", known, "--num-classes", str(num_classes)]
        flags += _stage_flags(plan, leg, family)
        before = ""
        if leg.index:
            last = plan.legs[leg.index - 1]
            folder, size = f"{output}/{_folder(label, last)}", leg.stage.size
            file = f"{folder}/last.pth.tar"
            if family is not None and family.how != "any size" and last.stage.size != size:
                file, saved = f"{folder}/last-{size}px.pth", file
                made = f"et.create_model({known!r}, size={size}, num_classes={num_classes})"
                code = f"model = et.load_checkpoint({saved!r}, {made}); torch.save(model.state_dict(), {file!r})"
                before = f"python -c {shlex.quote(f'import torch, leap_efficienttrain as et; {code}')} && "
            flags += ["--initial-checkpoint", file]
        flags += ["--output", output, "--experiment", _folder(label, leg), *options]
        commands.append(f"{before}{start} {shlex.join(flags)}")
    return commands


def recipe_flags(settings: Any, drop_path: float) -> list[str]:
    """A recipe's optimiser, augmentation, drop path and averages as flags of train.py.

    Args:
        settings: `TrainSettings` of a recipe; the rate, the magnitude and the batch are the curriculum's.
        drop_path: rate.
    """
    optimiser, augmentation = settings.optimiser, settings.augmentation
    values = {
        "opt": optimiser.name,
        "opt-eps": optimiser.eps,
        "weight-decay": optimiser.weight_decay,
        "clip-grad": optimiser.clip_norm if settings.amp != "no" else None,
        "drop-path": drop_path or None,
        "mixup": augmentation.mixup,
        "cutmix": augmentation.cutmix,
        "smoothing": augmentation.label_smoothing,
        "reprob": augmentation.erasing,
        "remode": augmentation.erasing_mode,
        "amp-dtype": {"fp16": "float16", "bf16": "bfloat16"}.get(settings.amp),
        "model-ema-decay": optimiser.ema_decay,
    }
    switches = {"amp": settings.amp != "no", "model-ema": optimiser.ema_decay is not None}
    flags = [f"--{name}" for name, wanted in switches.items() if wanted]
    given = {f"--{name}": str(value) for name, value in values.items() if value is not None}
    return [*flags, *itertools.chain(*given.items())]


def _folder(label: str, leg: Leg) -> str:
    return f"{label}-stage{leg.index + 1:02d}-{leg.stage.size}px"


def _stage_flags(plan: Plan, leg: Leg, family: Family | None) -> list[str]:
    states = [state for state in plan.states if state.leg is leg]
    size, passes = leg.stage.size, max(round(leg.passes), 1)
    flags = ["--input-size", "3", str(size), str(size)]
    if family is not None and family.how != "any size":
        window = [f"window_size={size // 32}"] if family.windowed else []
        flags += ["--model-kwargs", f"img_size={size}", *window]
    flags += ["--batch-size", str(leg.micro_batch), "--grad-accum-steps", str(leg.accumulate)]
    return [*flags, "--aa", states[0].randaug, *_rate_flags(states, passes)]


def _rate_flags(states: list[State], passes: int) -> list[str]:
    """A line from where the rate is largest to where the stage ends, after a line that rises to it."""
    rates = [state.lr(step, STEPS) for state in states for step in range(0, round(state.fraction * STEPS), 10)]
    rates.append(states[-1].lr(round(states[-1].fraction * STEPS), STEPS))
    peak = max(range(len(rates)), key=rates.__getitem__)
    rising = min(round(peak / (len(rates) - 1) * passes), passes)
    flags = ["--sched", "poly", "--decay-rate", "1", "--sched-on-updates", "--cooldown-epochs", "0"]
    flags += ["--lr", f"{rates[peak]:.6g}", "--min-lr", f"{min(rates[-1], rates[peak]):.6g}"]
    warmup = ["--warmup-lr", f"{rates[0]:.6g}", "--warmup-epochs", str(rising)]
    if 0 < rising < passes:
        return [*flags, *warmup, "--warmup-prefix", "--epochs", str(passes - rising)]
    return [*flags, *(warmup if rising else ["--warmup-epochs", "0"]), "--epochs", str(passes)]
