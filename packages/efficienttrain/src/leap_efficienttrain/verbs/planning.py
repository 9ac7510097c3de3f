"""Verbs that tell what a training will be like, before anything runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from leap_efficienttrain.verbs.common import CurriculumFlags
from leap_shared.cli import Command, Context
from leap_shared.errors import UserError

__all__ = ["ExportLaunch", "List", "Plan"]


@dataclass(frozen=True, kw_only=True)
class Plan(CurriculumFlags):
    """Print stages, passes over the data, operations, predicted speed-up, and what the loader must deliver.

    Nothing is trained. The prediction counts operations: what does not shrink with them, as small batches of a small
    model, or a slow loader, makes the real training slower; --measure times the model's steps on this machine.

    Examples:
        leap-efficienttrain plan --model swin_tiny --epochs 200 --gpus 8
        leap-efficienttrain plan --model deit_small --curriculum et:iccv --images-per-second 1200 --gpus 8
        leap-efficienttrain plan --model resnet50 --data imagenet --gpus 8 --yaml resnet50.yaml
        leap-efficienttrain plan --model convnext_tiny --batch 256 --micro-batch 64 --measure
    """

    model: str = "swin_tiny"
    """Official name, or one of timm's."""
    samples: int = 1_281_167
    """Pictures of the training set; ImageNet-1K's unless given."""
    data: str | None = None
    """Count the pictures of this data set in place of --samples."""
    gpus: int = 1
    """Processes."""
    baseline_epochs: float = 300.0
    """Of the ordinary training that it is compared with."""
    images_per_second: float | None = None
    """Of the ordinary training at full size, over all processes: the loader's demand is then in pictures per second."""
    measure: bool = False
    """Time one training step per size on this machine, of 8 pictures on a CPU and of a micro-batch on a GPU."""
    yaml: str | None = None
    """Write the curriculum to this file."""

    def run(self, context: Context) -> object:
        """Predict."""
        from leap_efficienttrain.cache import open_pictures
        from leap_efficienttrain.cost import step_seconds
        from leap_shared.vision.running import data_part

        samples = self.samples
        if self.data is not None:
            train = data_part(self.data, "train")
            if train is None:
                raise UserError(f"{self.data} has no folder train: give the folder of the training pictures")
            samples = len(open_pictures(train))
        curriculum = self.chosen(self.model)
        rate = self.images_per_second
        timed: dict[int, float] = {}
        if self.measure:
            sizes = sorted({curriculum.base_size, *(stage.size for stage in curriculum.stages)})
            micro = curriculum.micro_batch or min(curriculum.batch // self.gpus, 64)
            batch = 8 if context.device.type == "cpu" else micro
            shown = context.progress(sizes, description="timing steps")
            timed = {size: step_seconds(self.model, size, batch, context.device) / batch for size in shown}
            rate = rate or self.gpus / timed[curriculum.base_size]
        table = curriculum.table(
            self.model,
            samples=samples,
            world=self.gpus,
            baseline_epochs=self.baseline_epochs,
            images_per_second=rate,
            seconds=timed or None,
        )
        if self.yaml is not None:
            curriculum.to_yaml(self.yaml)
        for line in str(table).splitlines()[-2 if timed else -1 :]:
            context.log(line)
        return asdict(table) if self.json else [asdict(row) for row in table.stages]


@dataclass(frozen=True, kw_only=True)
class ExportLaunch(CurriculumFlags):
    """Print commands that train the stages with timm's own train.py, one per stage, with the recipe's settings.

    What train.py cannot do is said above them: there the optimiser starts anew in each stage, for example.

    Examples:
        leap-efficienttrain export-launch --model swin_tiny --data imagenet --gpus 8
        leap-efficienttrain export-launch --model resnet50 --data imagenet --launcher accelerate > launch.sh
    """

    model: str = "swin_tiny"
    """Official name, or one of timm's."""
    data: str = "imagenet"
    """Folder of the pictures, as train.py takes it."""
    gpus: int = 1
    """Processes."""
    launcher: str = "torchrun"
    """torchrun, accelerate or python."""
    options: str = ""
    """More flags of train.py for all commands, as one string."""

    def run(self, context: Context) -> object:  # noqa: ARG002 - the interface of every verb
        """Write the commands."""
        import shlex
        from dataclasses import replace

        from leap_efficienttrain import recipes
        from leap_efficienttrain.launch import CAVEATS, launch_commands, recipe_flags

        recipe = recipes.for_model(self.model)
        recipe = replace(recipe, curriculum=self.chosen(self.model, recipe.curriculum))
        commands = launch_commands(
            recipe.curriculum,
            self.model,
            self.data,
            world=self.gpus,
            launcher=self.launcher,
            output=str(self.out or "output"),
            options=[*recipe_flags(recipe.train, recipe.drop_path), *shlex.split(self.options)],
        )
        return commands if self.json else "\n".join([*(f"# {line}" for line in CAVEATS), *commands])


@dataclass(frozen=True, kw_only=True)
class List(Command):
    """List the models with released recipes: parameters, operations by input size, published accuracy and speed-up.

    Examples:
        leap-efficienttrain list
        leap-efficienttrain list --json
    """

    def run(self, context: Context) -> object:  # noqa: ARG002 - the interface of every verb
        """One row per model, or all that is known of each."""
        from leap_efficienttrain.models import VARIANTS

        if self.json:
            return [{**asdict(variant), "files": variant.files} for variant in VARIANTS.values()]
        rows = []
        for variant in VARIANTS.values():
            best = {result.method: result for result in variant.results if result.source == "summary"}
            scores = {f"{method} top1": best[method].top1 if method in best else None for method in METHODS}
            faster = best["et++"].speedup if "et++" in best else None
            counts = {f"GMAC@{size}": variant.gmac.get(size) for size in (96, 160, 224)}
            rows.append(
                {"model": variant.name, "parameters": variant.parameters, **counts, **scores, "et++ speed-up": faster}
            )
        return rows


METHODS = ("baseline", "et:iccv", "et++")
