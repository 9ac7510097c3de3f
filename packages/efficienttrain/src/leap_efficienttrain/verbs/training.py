"""Verbs that train."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from leap_efficienttrain.verbs.common import CurriculumFlags
from leap_shared.cli import Context
from leap_shared.cli.context import CONFIG
from leap_shared.errors import UserError

__all__ = ["Search", "Train"]


@dataclass(frozen=True, kw_only=True)
class PictureFlags(CurriculumFlags):
    """Base of the verbs that train on pictures."""

    data: str
    """Folder with train/ and val/, each with a folder of pictures per class; or one source of training pictures: a
    folder of class folders, .tar shards, an .npz file, hf:NAME or the folder of a cache."""
    validation: str | None = None
    """Source of validation pictures."""
    model: str | None = None
    """Official name, or one of timm's; its released recipe is taken where there is one."""
    recipe: str | None = None
    """Name of a recipe (see leap-efficienttrain train --recipe list) or a YAML file of one."""
    amp: tuple[Literal["no", "bf16", "fp16"], ...] | None = None
    """Mixed precision: --amp bf16, or --amp alone for the recipe's; the recipe's on a GPU, none on a CPU."""
    augment_at: Literal["base", "low"] = "base"
    """base: crop and augment at full size, then make smaller, as released; low: decode and augment at the stage's size,
    which reads more than twice as many pictures per second and changes them a little."""
    workers: int = 4
    """Processes that read pictures."""

    def chosen_recipe(self) -> Any:
        """The `Recipe` that the flags name, with their curriculum."""
        from dataclasses import replace

        from leap_efficienttrain import recipes

        if self.recipe is not None:
            found = recipes.get(self.recipe)
            if self.model is not None and self.model not in (found.model, found.timm_name):
                raise UserError(
                    f"recipe {self.recipe} is for {found.model}, not for {self.model}: leave one of them out"
                )
        elif self.model is None:
            raise UserError("give --model, for its released recipe, or --recipe")
        else:
            found = recipes.for_model(self.model)
        return replace(found, curriculum=self.chosen(found.model, found.curriculum))

    def sources(self) -> tuple[str, str | None]:
        """Training and validation pictures."""
        from leap_shared.vision.running import VALIDATION, data_part

        train, validation = data_part(self.data, "train"), self.validation
        if train is None:
            raise UserError(f"{self.data} has no folder train: give the folder of the training pictures")
        return train, validation or (data_part(self.data, *VALIDATION) if train != self.data else None)

    def settings(self, recipe: Any, context: Context, world: int = 1, **more: Any) -> Any:
        """The run as the trainer takes it."""
        from leap_efficienttrain import recipes

        if self.amp is not None and len(self.amp) > 1:
            raise UserError(f"--amp {' '.join(self.amp)}: give one of no, bf16 and fp16, or none")
        amp = "no" if self.amp is None and context.device.type == "cpu" else recipe.train.amp
        amp = self.amp[0] if self.amp else amp
        train, validation = self.sources()
        return recipes.train_config(
            recipe, train, validation, world=world, amp=amp, workers=self.workers, seed=self.seed, **more
        )


@dataclass(frozen=True, kw_only=True)
class Train(PictureFlags):
    """Train a model by a curriculum in one process for all stages; killed, it goes on.

    Writes curriculum.yaml, checkpoints/, metrics.jsonl, metrics.csv, tensorboard/, and in the end stages.json with what
    each stage took, weights.safetensors, ema.safetensors and best.safetensors. Validation is at full size.

    Examples:
        leap-efficienttrain train --model deit_small --data imagenet --gpus 8 --out runs/deit
        leap-efficienttrain train --model resnet50 --data pets --batch 256 --epochs 100 --curriculum et++
        leap-efficienttrain train --recipe cswin_base_finetune_384 --finetune pretrained.pth --data imagenet --gpus 8
        leap-efficienttrain train --recipe vit_base_mae --data imagenet/train --gpus 8
        leap-efficienttrain train --recipe list --data -
    """

    gpus: int | None = None
    """How many processes share the work, one per GPU; they are started, unless torchrun has started them."""
    finetune: Path | None = None
    """Checkpoint to start from: of any image size, and where its classes are others, with a new head."""
    ema: float | None = None
    """Decay of a moving average of the weights; the recipe's where none is given."""
    mixup: bool = True
    """Mix pictures and labels, where the recipe does."""
    validate_at: Literal["base", "stage"] = "base"
    """Size of validation: full, or the stage's as released."""
    validation_epochs: int = 1
    """Passes over the data between validations."""
    compile: bool = False
    """Compile the model, once for each size."""
    save_updates: int | None = None
    """A checkpoint every so many updates, beside the one after each pass."""

    def run(self, context: Context) -> object:
        """Train, or go on; what each stage took, and the last scores."""
        from leap_efficienttrain import mae, recipes
        from leap_efficienttrain.evaluation import TRAINING
        from leap_efficienttrain.training import CurriculumTrainer
        from leap_shared.checkpoints import write_safetensors
        from leap_shared.files import write_json
        from leap_shared.vision.running import process_count, start_processes

        if self.recipe == "list":
            return [
                {"recipe": name, "model": found.model, "top1": found.figures[-1].top1 if found.figures else None}
                for name, found in ((name, recipes.get(name)) for name in recipes.names())
            ]
        recipe = self.chosen_recipe()
        world = process_count(self.gpus, self.device)
        changes: dict[str, Any] = {} if self.ema is None else {"optimiser": {"ema_decay": self.ema}}
        if not self.mixup:
            changes["augmentation"] = {"mixup": 0.0, "cutmix": 0.0}
        config = self.settings(
            recipe,
            context,
            world,
            save_updates=self.save_updates,
            validation_epochs=self.validation_epochs,
            **changes,
        )
        if "WORLD_SIZE" not in os.environ and world > 1:
            verb = ["train", "--config", str(context.out / CONFIG), "--json"]
            try:
                return start_processes(world, ["-c", "from leap_efficienttrain.cli import main; main()", *verb])
            except SystemExit:
                context.discard()
                raise
        masked = recipe.train.masked is not None
        trainer = CurriculumTrainer(
            recipe.curriculum,
            config,
            context.out,
            model=recipe.build() if masked else None,
            loss_fn=mae.masked_loss if masked else None,
            device=self.device,
            augment_at=self.augment_at,
            validate_at=self.validate_at,
            compile=self.compile,
            reporter=context,
        )
        if self.finetune is not None:
            trainer.load(self.finetune)
        if context.is_main:
            facts = {"model": recipe.timm_name, "base_size": recipe.curriculum.base_size}
            write_json(context.out / TRAINING, facts)
        plan = trainer.plan
        context.log(f"{recipe.name}: {plan.passes:.4g} passes over {plan.samples} pictures, {plan.updates} updates")
        metrics = trainer.train()
        if masked:
            model: Any = trainer.trainer.model
            write_safetensors(context.out / "encoder.safetensors", model.encoder_state())
        stages = [vars(row) for row in trainer.report()]
        for name, scores in metrics.items():
            context.log(f"{name}: top1 {scores['top1']:.2f}, top5 {scores['top5']:.2f}, loss {scores['loss']:.4f}")
        return {"stages": stages, "scores": metrics} if self.json else stages


@dataclass(frozen=True, kw_only=True)
class Search(PictureFlags):
    """Find the sizes of a curriculum for a task by trying; every trial is kept, and a killed search goes on.

    greedy: stages of equal epochs, the smallest sizes that reach the accuracy of ordinary training. sequential: stages
    of equal compute, in each the size that is best after a short training at full size; far cheaper.
    Writes trials.jsonl and curriculum.yaml, for leap-efficienttrain train --curriculum.

    Examples:
        leap-efficienttrain search --model resnet18 --data pets --batch 256 --method sequential --budget 50
        leap-efficienttrain search --model vit_small_patch16_224 --data pets --batch 256 --budget 30 --workers-search 4
    """

    budget: float
    """Epochs at full size that the training may cost."""
    sizes: tuple[int, ...] = (96, 128, 160, 192, 224)
    """Candidates in pixels, ascending; the last is the full size."""
    stages: int = 5
    """Number of stages."""
    method: Literal["greedy", "sequential"] = "sequential"
    """How to search."""
    tolerance: float = 0.0
    """Percent of accuracy that a smaller size may lose."""
    repeats: int = 1
    """Seeds of every trial; the mean counts."""
    fine_tune: float = 0.05
    """sequential: share of the budget for the short training at full size."""
    workers_search: int = 1
    """Trials at a time, each in a process of its own."""
    ray: bool = False
    """Run trials on the Ray cluster that RAY_ADDRESS names, or on this machine; needs leap-efficienttrain[ray]."""

    def run(self, context: Context) -> object:
        """Search; the stages that were found."""
        from dataclasses import asdict

        from leap_efficienttrain.cache import open_pictures
        from leap_efficienttrain.searching import Search as Searching
        from leap_efficienttrain.training import SearchTraining

        recipe = self.chosen_recipe()
        if self.sources()[1] is None:
            raise UserError("a search judges by validation pictures: give --validation, or data with train/ and val/")
        curriculum = recipe.curriculum
        config = self.settings(recipe, context, validation_epochs=10**6)
        updates = len(open_pictures(config.data.train)) // curriculum.batch * self.budget
        if self.method == "sequential" and updates * self.fine_tune < 1:
            share = f"--fine-tune {self.fine_tune:g} of --budget {self.budget:g} epochs"
            raise UserError(f"{share} is less than one update: raise one of them, or lower --batch {curriculum.batch}")
        searching = Searching(
            budget=self.budget,
            sizes=self.sizes,
            stages=self.stages,
            method=self.method,
            tolerance=self.tolerance,
            repeats=self.repeats,
            seed=self.seed,
            fine_tune=self.fine_tune,
            changes={
                "batch": curriculum.batch,
                "micro_batch": curriculum.micro_batch,
                "lr": curriculum.lr,
                "downsample": curriculum.downsample,
            },
        )
        train = SearchTraining(config, context.out / "trials", self.device, self.augment_at)
        runner = "ray" if self.ray else None
        log = context.out / "trials.jsonl"
        own = {"recipe": recipe.name, "model": recipe.model, "data": self.data, "augment_at": self.augment_at}
        options: dict[str, Any] = {"workers": self.workers_search, "runner": runner, "log": log, "settings": own}
        result = searching.run(train, **options, reporter=context)
        result.curriculum.to_yaml(context.out / "curriculum.yaml")
        context.log(str(result).splitlines()[-1])
        return [asdict(stage) for stage in result.curriculum.stages]
