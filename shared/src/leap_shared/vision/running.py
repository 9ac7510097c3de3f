"""What the verbs train and eval of all packages do: their flags, processes, trainings and scores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from leap_shared.cli import Command, Context
from leap_shared.cli.context import CONFIG
from leap_shared.errors import UserError
from leap_shared.files import write_json
from leap_shared.vision.data import build_transform, evaluation_loader
from leap_shared.vision.evaluation import evaluate
from leap_shared.vision.learner import AMP
from leap_shared.vision.official import Official, read_official
from leap_shared.vision.recipes import Protocol, Recipe
from leap_shared.vision.sources import open_source
from leap_shared.vision.training import Trainer

__all__ = ["Converting", "Evaluation", "Training", "data_part", "process_count", "start_processes"]

VALIDATION = ("val", "validation", "valid", "test")


def data_part(data: str, *names: str) -> str | None:
    """Folder of that name where `data` is laid out as DATA/train and DATA/val; `data` where it has no such folders."""
    root = Path(data)
    if not any((root / name).is_dir() for name in ("train", *VALIDATION)):
        return data
    return next((str(root / name) for name in names if (root / name).is_dir()), None)


@dataclass(frozen=True, kw_only=True)
class Converting(Command):
    """Base of a verb that makes another file of a checkpoint."""

    source: Annotated[Path, tyro.conf.Positional]
    """A .pth in the authors' layout, or a .safetensors."""
    target: Annotated[Path, tyro.conf.Positional]
    """File to write, .safetensors or .pth."""
    ema: bool = False
    """Take the moving average of the weights."""
    verify: bool = True
    """Read the written file again and compare tensors and logits."""


@dataclass(frozen=True, kw_only=True)
class Training(Command):
    """Base of a verb that trains a variant by its recipe; killed, it goes on."""

    cfg: str
    """Name of a variant, whose recipe is taken."""
    data: str
    """Folder with train/ and val/, each with a folder of pictures per class; or one source of training pictures."""
    validation: str | None = None
    """Source of validation pictures: a folder of class folders, .tar shards, an .npz file or hf:NAME."""
    ema: bool = False
    """Keep a moving average of the weights too."""
    amp: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    finetune: Path | None = None
    """Checkpoint to start from: of any image size, and where its classes are others, with a new head of zeros."""
    img_size: int | None = None
    """Side of the pictures in pixels; the variant's where none is given."""
    gpus: int | None = None
    """How many processes share the work, one per GPU; they are started, unless torchrun has started them."""
    batch_size: int | None = None
    """Pictures per process and forward pass; the recipe's where none is given."""
    accumulation: int | None = None
    """Forward passes per update; where none is given, as many as make up the recipe's batch, whatever the GPUs."""
    epochs: int | None = None
    """The recipe's where none is given; warm-up and cool-down change in proportion."""
    lr: float | None = None
    """Largest learning rate for 512 pictures per update; the recipe's where none is given. The others follow it."""
    protocol: Protocol = "reference"
    """How validation pictures are resized: to a square, or keeping their ratio."""
    workers: int = 4
    """Processes that read pictures."""
    save_updates: int | None = None
    """A checkpoint every so many updates, beside the one after each epoch."""

    def train(self, context: Context, recipe: Recipe, official: Official, **settings: Any) -> object:
        """Train, or go on; the last scores. Processes that are started run `cli.main` of the verb's package.

        Args:
            context: of the verb.
            recipe: of `cfg`.
            official: files of the package's models.
            **settings: more of `recipe.train_config`.
        """
        recipe = recipe if self.lr is None else recipe.with_lr(self.lr)
        world = process_count(self.gpus, self.device)
        train, validation = data_part(self.data, "train"), self.validation
        if train is None:
            raise UserError(f"{self.data} has no folder train: give the folder of the training pictures")
        if train != self.data:
            validation = validation or data_part(self.data, *VALIDATION)
        names = ["ema", "amp", "batch_size", "accumulation", "epochs", "protocol", "workers", "save_updates", "seed"]
        settings |= {name: getattr(self, name) for name in names}
        config = recipe.train_config(train, validation, gpus=world, image_size=self.img_size, **settings)
        if "WORLD_SIZE" not in os.environ and world > 1:
            package = type(self).__module__.partition(".")[0]
            verb = [*self.verb_name().split(), "--config", str(context.out / CONFIG), "--json"]
            try:
                return start_processes(world, ["-c", f"from {package}.cli import main; main()", *verb])
            except SystemExit:
                context.discard()
                raise
        if recipe.note:
            context.log(f"{self.cfg}: {recipe.note}")
        if self.finetune is None and recipe.fine_tunes is not None:
            context.log(f"the recipe fine-tunes {recipe.fine_tunes}: without --finetune the weights start at random")
        if world == 1 and torch.cuda.device_count() > 1:
            context.log(f"one of {torch.cuda.device_count()} GPUs is used; all: --gpus {torch.cuda.device_count()}")
        trainer = Trainer(config, context.out, device=self.device, reporter=context)
        if self.finetune is not None:
            official.load_official(trainer.model, self.finetune, resize=True, new_head=True)
            if trainer.learner.ema is not None:
                trainer.learner.ema.set(trainer.model)
        batch = f"{config.batch_size} x {config.accumulation} x {world}"
        rate = f"largest learning rate {recipe.lr * trainer.learner.scale:.3g}"
        context.log(f"{self.cfg}: epochs of {trainer.updates} updates of {batch} pictures, {rate}")
        metrics = trainer.train()
        return [
            {"weights": name, **metrics.get(name, {}), "written": str(context.out / f"{name}.safetensors")}
            for name in trainer.learner.models
        ]


def process_count(gpus: int | None, device: str) -> int:
    """How many processes there are, or are to be started.

    Args:
        gpus: asked for; None for those that torchrun has started, else one.
        device: as `resolve_device` takes it.

    Raises:
        UserError: torchrun started another number, or this machine has fewer GPUs.
    """
    world = os.environ.get("WORLD_SIZE")
    if gpus is not None and gpus < 1:
        raise UserError(f"--gpus {gpus}: expected 1 or more")
    if world is not None and gpus not in (None, int(world)):
        advice = "leave torchrun away, then they are started, or give it that number"
        raise UserError(f"--gpus {gpus}, but torchrun started {world} processes: {advice}")
    found = 0 if device == "cpu" else torch.cuda.device_count()
    if world is None and found and (gpus or 1) > found:
        raise UserError(f"--gpus {gpus}, but this machine has {found}: give {found} or less, or --device cpu")
    return gpus or int(world or 1)


def start_processes(count: int, arguments: Sequence[str]) -> Any:
    """Run ``python ARGUMENTS`` in so many processes by torchrun, and wait.

    What they write to stderr is shown at once; signals to stop are passed on to them.

    Returns:
        The JSON document that they write to stdout.

    Raises:
        SystemExit: they fail, with torchrun's code, or were told to stop, with 128 and the signal's number.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--no-python"]
    command = [sys.executable, *torchrun, sys.executable, *arguments]
    caught: list[int] = []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # not all under nohup
    # in a session of its own, the terminal's Ctrl-C reaches torchrun once: a second one would stop its own stopping
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as processes:  # noqa: S603 - itself

        def forward(number: int, frame: object) -> None:  # noqa: ARG001 - as signal calls it
            caught.append(number)
            processes.send_signal(number)

        former = {number: signal.signal(number, forward) for number in heeded}
        try:
            answer, _ = processes.communicate()
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
    if caught or processes.returncode:
        sys.exit(128 + caught[0] if caught else processes.returncode)
    return json.loads(answer)


@dataclass(frozen=True, kw_only=True)
class Evaluation(Command):
    """Base of a verb that scores a checkpoint on validation pictures, beside the published figure."""

    name: Annotated[str, tyro.conf.Positional]
    """Name of a variant."""
    checkpoint: Path
    """The authors' .pth, or a .safetensors."""
    data: str
    """Folder with val/, or of a folder of pictures per class; .tar shards, an .npz file or hf:NAME."""
    protocol: tuple[Protocol, ...] = ("reference",)
    """How pictures are resized: to a square, or keeping their ratio; both give two rows."""
    ema: bool = False
    """Take the moving average in the file."""
    img_size: int | None = None
    """Side of the pictures in pixels; the variant's where none is given."""
    resize: bool = False
    """Resample the tables of a checkpoint that is for another image size."""
    batch_size: int = 64
    """Pictures per forward pass."""
    workers: int = 4
    """Processes that read pictures."""
    amp: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""

    def score(
        self,
        context: Context,
        recipe: Recipe,
        official: Official,
        published: tuple[float | None, float | None],
        forms: Sequence[Mapping[str, Any]] = ({},),
    ) -> list[dict[str, Any]]:
        """A row for each form and protocol, and `scores.json` of them where there is an output folder.

        Args:
            context: of the verb.
            recipe: of the variant `name`.
            official: files of the package's models.
            published: top-1 and top-5 in percent on the 1000 classes of ImageNet-1K.
            forms: options of the models to score.
        """
        if self.batch_size < 1 or self.workers < 0 or not self.protocol or not forms:
            numbers = f"batch_size {self.batch_size}, workers {self.workers}"
            raise UserError(f"{numbers}: expected a positive number, 0 or more, and no list of nothing")
        state = read_official(self.checkpoint, use_ema=self.ema)
        classes = state["head.weight"].shape[0] if "head.weight" in state else 1000
        where = data_part(self.data, *VALIDATION)
        if where is None:
            raise UserError(f"{self.data} has no folder {', '.join(VALIDATION)}: give that of the pictures")
        source = open_source(where, "validation")
        names = getattr(source, "classes", None)
        if names is not None and len(names) != classes:
            found = f"{where} has {len(names)} classes, and {self.checkpoint} is for {classes}"
            raise UserError(f"{found}: give pictures of its classes, a folder for each")
        sizes: dict[str, Any] = {} if self.img_size is None else {"img_size": self.img_size}
        top1, top5 = published if classes == 1000 else (None, None)
        rows = []
        for form in forms:
            model = official.create_model(self.name, num_classes=classes, **form, **sizes)
            official.adapt(model, state)
            official.load_official(model, self.checkpoint, use_ema=self.ema, resize=self.resize)
            model.to(context.device)
            for protocol in self.protocol:
                loader = evaluation_loader(
                    source,
                    build_transform(recipe.data_config(where, image_size=self.img_size, protocol=protocol)),
                    batch_size=self.batch_size,
                    num_classes=classes,
                    workers=self.workers,
                    pin=context.device.type == "cuda",
                )
                shown = context.progress(loader, description=", ".join((self.name, protocol, *form.values())))
                scores = evaluate(model, shown, amp=AMP[self.amp])
                facts = {"model": self.name, "protocol": protocol, **form}
                rows.append({**facts, **scores, "published top1": top1, "published top5": top5})
        if self.out is not None:
            write_json(context.out / "scores.json", rows)
        return rows
