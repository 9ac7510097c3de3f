"""Verbs that train and evaluate."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from leap_shared.cli import Command, Context
from leap_shared.errors import UserError

__all__ = ["Eval", "Train"]

VALIDATION = ("val", "validation", "valid", "test")


def _part(data: str, *names: str) -> str | None:
    """Folder of that name where `data` is laid out as DATA/train and DATA/val; `data` where it has no such folders."""
    root = Path(data)
    if not any((root / name).is_dir() for name in ("train", *VALIDATION)):
        return data
    return next((str(root / name) for name in names if (root / name).is_dir()), None)


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train a variant by its recipe; killed, it goes on.

    Writes checkpoints/, metrics.jsonl, metrics.csv, tensorboard/, and in the end weights.safetensors, ema.safetensors
    and best.safetensors.

    Examples:
        leap-flatten train --cfg flatten_swin_tiny --data imagenet --amp bf16 --out runs/swin
        torchrun --nproc-per-node 8 --no-python leap-flatten train --cfg flatten_cswin_tiny --data imagenet --ema
        leap-flatten train --cfg flatten_swin_base_384 --data imagenet --finetune flatten_swin_b.pth
    """

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
    """How many processes are expected to share the work, one per GPU: torchrun starts them."""
    batch_size: int | None = None
    """Pictures per process and forward pass; the recipe's where none is given."""
    accumulation: int | None = None
    """Forward passes per update; where none is given, as many as make up the recipe's batch, whatever the GPUs."""
    epochs: int | None = None
    """The recipe's where none is given; warm-up and cool-down change in proportion."""
    lr: float | None = None
    """Largest learning rate for 512 pictures per update; the recipe's where none is given. The others follow it."""
    decay_pos: bool = True
    """Decay scale, positional_encoding and pos_embed as the reference does."""
    denominator: Literal["mean", "sum"] = "mean"
    """Form of the attention: of the current release, or of the first one."""
    protocol: Literal["reference", "timm"] = "reference"
    """How validation pictures are resized: to a square, or keeping their ratio."""
    workers: int = 4
    """Processes that read pictures."""
    save_updates: int | None = None
    """A checkpoint every so many updates, beside the one after each epoch."""

    def run(self, context: Context) -> object:
        """Train, or go on; the last scores."""
        import torch

        from leap_flatten import recipes
        from leap_flatten.checkpoints import load_official
        from leap_shared.vision import Trainer

        recipe = recipes.get(self.cfg)
        recipe = recipe if self.lr is None else recipe.with_lr(self.lr)
        world = self._processes()
        if recipe.note:
            context.log(f"{self.cfg}: {recipe.note}")
        if self.finetune is None and recipe.fine_tunes is not None:
            context.log(f"the recipe fine-tunes {recipe.fine_tunes}: without --finetune the weights start at random")
        if world == 1 and torch.cuda.device_count() > 1:
            context.log(f"one of {torch.cuda.device_count()} GPUs is used; all: {_torchrun(torch.cuda.device_count())}")
        train, validation = _part(self.data, "train"), self.validation
        if train is None:
            raise UserError(f"{self.data} has no folder train: give the folder of the training pictures")
        if train != self.data:
            validation = validation or _part(self.data, *VALIDATION)
        names = ["ema", "amp", "batch_size", "accumulation", "epochs", "decay_pos", "denominator", "protocol"]
        names += ["workers", "save_updates", "seed"]
        settings = {name: getattr(self, name) for name in names}
        config = recipe.train_config(train, validation, gpus=world, image_size=self.img_size, **settings)
        trainer = Trainer(config, context.out, device=self.device, reporter=context)
        if self.finetune is not None:
            load_official(trainer.model, self.finetune, resize=True, new_head=True)
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

    def _processes(self) -> int:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.gpus is not None and self.gpus < 1:
            raise UserError(f"--gpus {self.gpus}: expected 1 or more")
        if self.gpus not in (None, world):
            started = "it was started as 1 process" if world == 1 else f"torchrun started {world} processes"
            raise UserError(f"--gpus {self.gpus}, but {started}: run `{_torchrun(self.gpus)}`")
        return world


def _torchrun(gpus: int) -> str:
    """The line that runs this command on so many GPUs."""
    return f"torchrun --nproc-per-node {gpus} --no-python {Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}"


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Score a checkpoint on validation pictures, beside the published figure.

    The published figures are those of the protocol "reference" and the denominator "sum". With --out, scores.json is
    written there.

    Examples:
        leap-flatten eval flatten_swin_tiny --checkpoint flatten_swin_t.pth --data imagenet
        leap-flatten eval flatten_swin_tiny --checkpoint flatten_swin_t.pth --data imagenet --denominator mean sum
    """

    name: Annotated[str, tyro.conf.Positional]
    """Name of a variant."""
    checkpoint: Path
    """The authors' .pth, or a .safetensors."""
    data: str
    """Folder with val/, or of a folder of pictures per class; .tar shards, an .npz file or hf:NAME."""
    protocol: tuple[Literal["reference", "timm"], ...] = ("reference",)
    """How pictures are resized: to a square, or keeping their ratio; both give two rows."""
    denominator: tuple[Literal["mean", "sum"], ...] = ("mean",)
    """Form of the attention: of the current release, or of the first one; both give two rows each."""
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

    def run(self, context: Context) -> object:
        """Evaluate; one row per protocol and denominator."""
        from leap_flatten import recipes
        from leap_flatten.checkpoints import create_model, load_official, read_official
        from leap_flatten.models.variants import find
        from leap_shared.files import write_json
        from leap_shared.vision import build_transform, evaluate, evaluation_loader, open_source
        from leap_shared.vision.learner import AMP

        recipe = recipes.get(self.name)
        if self.batch_size < 1 or self.workers < 0 or not self.protocol or not self.denominator:
            numbers = f"batch_size {self.batch_size}, workers {self.workers}"
            raise UserError(f"{numbers}: expected a positive number, 0 or more, and a protocol and a denominator")
        head = read_official(self.checkpoint, use_ema=self.ema).get("head.weight")
        classes = 1000 if head is None else head.shape[0]
        where = _part(self.data, *VALIDATION)
        if where is None:
            raise UserError(f"{self.data} has no folder {', '.join(VALIDATION)}: give that of the pictures")
        source = open_source(where, "validation")
        names = getattr(source, "classes", None)
        if names is not None and len(names) != classes:
            found = f"{where} has {len(names)} classes, and {self.checkpoint} is for {classes}"
            raise UserError(f"{found}: give pictures of its classes, a folder for each")
        sizes: dict[str, Any] = {} if self.img_size is None else {"img_size": self.img_size}
        top1, top5 = find(self.name).published if classes == 1000 else (None, None)
        rows = []
        for denominator in self.denominator:
            model = create_model(self.name, num_classes=classes, denominator=denominator, **sizes)
            load_official(model, self.checkpoint, use_ema=self.ema, resize=self.resize)
            model.to(context.device)
            for protocol in self.protocol:
                settings = recipe.data_config(where, image_size=self.img_size, protocol=protocol)
                loader = evaluation_loader(
                    source,
                    build_transform(settings),
                    batch_size=self.batch_size,
                    num_classes=classes,
                    workers=self.workers,
                    pin=context.device.type == "cuda",
                )
                shown = context.progress(loader, description=f"{self.name}, {protocol}, {denominator}")
                scores = evaluate(model, shown, amp=AMP[self.amp])
                facts = {"model": self.name, "protocol": protocol, "denominator": denominator}
                rows.append({**facts, **scores, "published top1": top1, "published top5": top5})
        if self.out is not None:
            write_json(context.out / "scores.json", rows)
        return rows
