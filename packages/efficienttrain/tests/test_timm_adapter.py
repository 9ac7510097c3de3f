"""The adapter to timm's loops, against timm's own factories."""

from __future__ import annotations

import copy
import random
import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from small import BASE, SAMPLES, SIZES, curriculum, vit
from timm.data import create_loader
from timm.models import load_checkpoint, resume_checkpoint
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch.utils.data import Dataset

from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.live import live
from leap_efficienttrain.stages import LearningRate, Stage
from leap_efficienttrain.timm import CurriculumScheduler, launch_commands, patch_args
from leap_shared.errors import UserError


class Pictures(Dataset[Any]):
    """Random pictures, with the transform that timm's loader sets."""

    def __init__(self) -> None:
        self.transform: Any = None
        self.images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 40, 40, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.images[index])), index % 4


def passes(**changes: Any) -> Curriculum:
    """Whole passes: 4 and 1."""
    stages = (Stage(0.5, 16, 0, micro_batch_scale=2), Stage(0.5, 32, 5))
    return curriculum(**{"stages": stages, "arithmetic": "reference", "micro_batch": 4, **changes})


def arguments(**changes: Any) -> Namespace:
    """Those of train.py that matter, at its defaults."""
    given = {"img_size": None, "input_size": None, "batch_size": 128, "grad_accum_steps": 1, "epochs": 300}
    given |= {"aa": "rand-m9-mstd0.5-inc1", "warmup_epochs": 5, "lr": None, "drop_path": None, "mixup": 0.0}
    return Namespace(**{**given, "amp": False, "min_lr": 0, "sched_on_updates": True, **changes})


class Loop:
    """A training as train.py writes it."""

    def __init__(self, folder: Path | None = None, resume: str = "", ema: bool = False, workers: int = 0) -> None:
        self.model = vit()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.args = patch_args(arguments(), passes())
        self.loader = create_loader(
            Pictures(),
            (3, BASE, BASE),
            self.args.batch_size,
            is_training=True,
            auto_augment=self.args.aa,
            num_workers=workers,
            persistent_workers=workers > 0,
            device=torch.device("cpu"),
        )
        self.loader.dataset.transform = transform = live(self.loader.dataset.transform)
        self.ema = ModelEmaV3(self.model) if ema else None
        self.scheduler = CurriculumScheduler(
            self.optimizer, passes(), self.model, self.loader, self.args, transform, ema=self.ema
        )
        self.start = 0
        if resume:
            self.start = resume_checkpoint(self.model, resume, self.optimizer, log_info=False)
            if self.ema is not None:
                load_checkpoint(self.ema.module, resume, use_ema=True)
            self.scheduler.step(self.start)
        self.saver = (
            None
            if folder is None
            else CheckpointSaver(
                self.model, self.optimizer, model_ema=self.ema, checkpoint_dir=str(folder), recovery_dir=str(folder)
            )
        )

    def train(self, stop: int | None = None) -> list[tuple[Any, ...]]:
        """Rows of epoch, size and number of the pictures, learning rate and loss."""
        seen = []
        for epoch in range(self.start, self.args.epochs if stop is None else stop):
            torch.manual_seed(epoch)
            np.random.seed(epoch)  # noqa: NPY002 - timm draws from it
            random.seed(epoch)
            accumulate = self.args.grad_accum_steps
            updates = epoch * -(-len(self.loader) // accumulate)
            self.model.train()
            for number, (images, labels) in enumerate(self.loader):
                loss = F.cross_entropy(self.model(images), labels) / accumulate
                loss.backward()
                rate = self.optimizer.param_groups[0]["lr"]
                seen.append((epoch, images.shape[-1], len(images), rate, loss.item()))
                if (number + 1) % accumulate == 0:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    updates += 1
                    if self.ema is not None:
                        self.ema.update(self.model)
                    self.scheduler.step_update(num_updates=updates)
            if self.saver is not None:
                self.saver.save_checkpoint(epoch)
            self.scheduler.step(epoch + 1)
        return seen


def test_a_loop_like_timms_trains_all_stages() -> None:
    seen = Loop().train()
    plan = passes().plan(SAMPLES)
    assert [row[:3] for row in seen] == [(epoch, 16, 8) for epoch in range(4) for _ in range(3)] + [(4, 32, 4)] * 6
    expected = [plan.lr(update) for update in range(12)] + [plan.lr(12 + update // 2) for update in range(6)]
    assert [row[3] for row in seen] == pytest.approx(expected)


def test_persistent_workers_follow_the_stage() -> None:
    assert [row[:3] for row in Loop(workers=1).train()] == [row[:3] for row in Loop().train()]


@pytest.mark.parametrize("stop", [2, 4])
def test_a_loop_resumes_from_timms_own_checkpoint(stop: int, tmp_path: Path) -> None:
    whole = Loop().train()
    first = Loop(tmp_path).train(stop)
    other = Loop(resume=str(tmp_path / "last.pth.tar"))
    assert other.start == stop
    assert first + other.train() == whole


def test_the_moving_average_resumes_at_its_size(tmp_path: Path) -> None:
    loop = Loop(tmp_path, ema=True)
    loop.train(2)
    saved = copy.deepcopy(loop.ema.module.state_dict())
    other = Loop(resume=str(tmp_path / "last.pth.tar"), ema=True)
    for name, value in other.ema.module.state_dict().items():
        assert torch.equal(value, saved[name])


def test_arguments_take_what_holds_for_the_whole_run() -> None:
    cur = Curriculum.preset("et++", 100, batch=1024, micro_batch=128)
    args = patch_args(arguments(drop_path=0.2), cur, world=8)
    assert (args.img_size, args.batch_size, args.grad_accum_steps) == (224, 128, 1)
    assert args.epochs == len(cur.plan(None, 8).states)
    assert args.aa == "rand-m0-mstd0.5-inc1"
    assert (args.lr, args.warmup_epochs, args.drop_path) == (4e-3, 0, 0.1)


def test_a_policy_keeps_all_but_its_magnitude() -> None:
    args = patch_args(arguments(aa="rand-n1-m9-mstd0.5-p0.3"), Curriculum.preset("et:iccv", 10))
    assert args.aa == "rand-m1-n1-mstd0.5-p0.3"


def test_an_odd_batch_is_no_match_for_mixup() -> None:
    with pytest.raises(UserError, match="Mixup pairs them"):
        patch_args(arguments(mixup=0.8), passes(batch=3, micro_batch=None))


def test_an_augmentation_without_magnitude_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="--aa augmix-m5 has no RandAugment that the magnitudes could drive"):
        patch_args(arguments(aa="augmix-m5"), passes())


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is allowed where there is CUDA")
def test_half_precision_without_cuda_is_refused() -> None:
    with pytest.raises(UserError, match="--amp with --amp-dtype float16 needs CUDA"):
        patch_args(arguments(amp=True, amp_dtype="float16"), passes())
    patch_args(arguments(amp=True, amp_dtype="bfloat16"), passes())


def test_parts_of_passes_are_refused() -> None:
    with pytest.raises(UserError, match="take arithmetic='reference'"):
        patch_args(arguments(), passes(arithmetic="continuous"))


def test_replay_is_refused() -> None:
    with pytest.raises(UserError, match="stage 1 replays pictures, which timm's loop cannot"):
        patch_args(arguments(), passes(stages=(Stage(0.5, 16, replay=2, buffer=2), Stage(0.5, 32)), micro_batch=None))


def test_a_loader_that_runs_ahead_of_the_passes_is_refused() -> None:
    loader = create_loader(
        Pictures(), 32, 4, is_training=True, use_multi_epochs_loader=True, num_workers=0, use_prefetcher=False
    )
    model = vit()
    with pytest.raises(UserError, match="batches of a MultiEpochsDataLoader cannot change"):
        CurriculumScheduler(torch.optim.AdamW(model.parameters()), passes(), model, loader)


def train_parser() -> ArgumentParser:
    """Flags of train.py as timm documents them."""
    parser = ArgumentParser(allow_abbrev=False)
    for flag in ("--data-dir", "--model", "--aa", "--sched", "--output", "--experiment", "--initial-checkpoint"):
        parser.add_argument(flag)
    parser.add_argument("--input-size", nargs=3, type=int)
    parser.add_argument("--model-kwargs", nargs="*", default=[])
    for flag in (
        "--batch-size",
        "--grad-accum-steps",
        "--epochs",
        "--warmup-epochs",
        "--cooldown-epochs",
        "--num-classes",
    ):
        parser.add_argument(flag, type=int)
    for flag in ("--lr", "--min-lr", "--warmup-lr", "--decay-rate", "--mixup"):
        parser.add_argument(flag, type=float)
    for flag in ("--sched-on-updates", "--warmup-prefix", "--amp"):
        parser.add_argument(flag, action="store_true")
    return parser


def parsed(commands: list[str]) -> list[Namespace]:
    words = [shlex.split(command) for command in commands]
    return [train_parser().parse_args(each[each.index("train.py") + 1 :]) for each in words]


def test_commands_have_timms_flags_and_the_curriculums_stages() -> None:
    cur = Curriculum.preset("et++", 200, batch=1024)
    commands = launch_commands(cur, "swin_tiny_patch4_window7_224", "data", world=8, options=["--amp"])
    assert commands[0].startswith("torchrun --nproc_per_node=8 train.py --data-dir data")
    rows = parsed(commands)
    assert [row.input_size for row in rows] == [[3, stage.size, stage.size] for stage in cur.stages]
    assert rows[0].model_kwargs == ["img_size=96", "window_size=3"]
    total = [row.epochs + (row.warmup_epochs if row.warmup_prefix else 0) for row in rows]
    assert total == [108, 109, 39, 39, 40, 39, 20, 20, 20, 20]
    assert all(row.batch_size * row.grad_accum_steps * 8 == 1024 for row in rows)
    assert rows[0].initial_checkpoint is None
    assert rows[1].initial_checkpoint.endswith(f"{rows[0].experiment}/last.pth.tar")
    assert rows[2].initial_checkpoint.endswith(f"{rows[1].experiment}/last-160px.pth")


@pytest.mark.parametrize("warmup", [0.05, 0.1, 0.13])
def test_commands_follow_the_curve_of_the_learning_rate(warmup: float) -> None:
    cur = Curriculum.preset("et++", 200, batch=32, lr=LearningRate(base=1e-3, warmup_share=warmup))
    plan = cur.plan(320)
    worst = 0.0
    for row, leg in zip(parsed(launch_commands(cur, "resnet18", "data")), plan.legs, strict=True):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], row.lr)
        scheduler, epochs = create_scheduler_v2(
            optimizer,
            row.sched,
            num_epochs=row.epochs,
            decay_rate=row.decay_rate,
            min_lr=row.min_lr,
            warmup_lr=row.warmup_lr or 1e-5,
            warmup_epochs=row.warmup_epochs,
            warmup_prefix=row.warmup_prefix,
            step_on_epochs=False,
            updates_per_epoch=10,
        )
        assert epochs == leg.passes
        for update in range(leg.updates or 0):
            scheduler.step_update(update)
            rate = optimizer.param_groups[0]["lr"]
            worst = max(worst, abs(rate - plan.lr(leg.first_update + update)) / 1e-3)
    assert worst < 0.02  # a chord of a tenth of the cosine misses it by 0.6 %, a rounded warm-up by more


def test_weights_of_the_stage_before_are_resized_as_the_commands_ask(tmp_path: Path) -> None:
    cur = curriculum(stages=(Stage(0.5, 32), Stage(0.5, 64)), base_size=64)
    name = "vit_tiny_patch16_224"
    command = launch_commands(cur, name, "data", output=str(tmp_path), name="run", num_classes=4)[1]
    (tmp_path / "run-stage01-32px").mkdir()
    small = timm.create_model(name, img_size=32, num_classes=4)
    torch.save({"state_dict": small.state_dict()}, tmp_path / "run-stage01-32px" / "last.pth.tar")
    words = shlex.split(command)
    exec(words[words.index("-c") + 1], {})  # noqa: S102 - what the shell would run
    (row,) = parsed([command])
    large = timm.create_model(name, img_size=64, num_classes=4, checkpoint_path=row.initial_checkpoint)
    assert torch.equal(large.head.weight, small.head.weight)


def test_commands_for_a_model_of_one_size_are_refused() -> None:
    with pytest.raises(UserError, match="cannot change its input size"):
        launch_commands(curriculum(), "mixer_s32_224", "data")


def test_sizes_of_the_test_are_those_of_its_curriculum() -> None:
    assert tuple(stage.size for stage in passes().stages) == SIZES
