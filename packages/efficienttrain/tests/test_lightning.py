"""The adapter to Lightning, against the real library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from small import SAMPLES, SIZES, UPDATES, ConvNet, Rows, curriculum, plain_training, vit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from leap_efficienttrain.lightning import Curriculum, trainer_arguments
from leap_efficienttrain.stages import Stage
from leap_shared.errors import UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:.*Consider increasing the value of the `num_workers`",
    "ignore:The number of training batches",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:.*LeafSpec.*",
    "ignore:Checkpoint directory",
    "ignore:You defined a `validation_step` but have no",
)


class Classifier(pl.LightningModule):
    """A user's module."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.model = vit() if network is None else network
        self.seen: list[tuple[int, float, float]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        sides: list[int] = []
        part = next(module for module in self.model.modules() if isinstance(module, nn.Conv2d))
        with part.register_forward_pre_hook(lambda _, args: sides.append(args[0].shape[-1])):
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.seen.append((sides[0], self.optimizers().param_groups[0]["lr"], loss.item()))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]


class Order(torch.utils.data.Sampler[int]):
    """A shuffled order that goes on where it stopped, as Lightning wants it of loaders."""

    def __iter__(self) -> Any:
        return iter(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)).tolist())

    def __len__(self) -> int:
        return SAMPLES


def fitted(
    out: Path,
    module: Classifier | None = None,
    callback: Curriculum | None = None,
    batch: int = 8,
    path: Path | None = None,
    validation: bool = False,
    **options: Any,
) -> tuple[Classifier, pl.Trainer]:
    module = Classifier() if module is None else module
    callback = Curriculum(curriculum()) if callback is None else callback
    given = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given |= {"default_root_dir": out, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    callbacks = [callback, *options.pop("callbacks", [])]
    arguments = {**given, **trainer_arguments(callback.curriculum, SAMPLES), **options, "callbacks": callbacks}
    trainer = pl.Trainer(**arguments)
    train = DataLoader(Rows(), batch_size=batch, sampler=Order())
    judged = DataLoader(Rows(8), batch_size=8) if validation else None
    trainer.fit(module, train, judged, ckpt_path=None if path is None else str(path), weights_only=True)
    return module, trainer


class Keep(pl.Callback):
    """Saves after an update, and stops there."""

    def __init__(self, update: int, path: Path) -> None:
        self.update, self.path = update, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.update:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_one_fit_goes_through_all_stages(tmp_path: Path) -> None:
    module, trainer = fitted(tmp_path)
    plan = curriculum().plan(SAMPLES)
    assert [side for side, _, _ in module.seen] == [SIZES[0]] * UPDATES[0] + [SIZES[1]] * UPDATES[1]
    assert [rate for _, rate, _ in module.seen] == [plan.lr(update) for update in range(plan.updates)]
    assert trainer.global_step == plan.updates


def test_a_fit_trains_what_a_loop_without_lightning_trains(tmp_path: Path) -> None:
    module, _ = fitted(tmp_path)
    expected, losses = plain_training(list(Order()))
    assert [loss for _, _, loss in module.seen] == losses
    for mine, theirs in zip(module.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("stop", [3, UPDATES[0]])
def test_a_fit_that_stopped_goes_on_to_the_same_losses(stop: int, tmp_path: Path) -> None:
    whole, _ = fitted(tmp_path)
    path = tmp_path / "stopped.ckpt"
    first, _ = fitted(tmp_path, callbacks=[Keep(stop, path)])
    other, _ = fitted(tmp_path, path=path)
    assert first.seen + other.seen == whole.seen


def test_weights_of_a_small_stage_load_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    first, _ = fitted(tmp_path, callbacks=[Keep(1, path)])
    assert torch.load(path, weights_only=True)["state_dict"]["model.pos_embed"].shape == (1, 17, 24)
    other, _ = fitted(tmp_path, path=path)
    assert [row[:2] for row in first.seen + other.seen] == [row[:2] for row in fitted(tmp_path)[0].seen]


def test_validation_is_at_the_base_size_and_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    plain, _ = fitted(tmp_path)
    module = Classifier()
    sides: list[int] = []
    module.model.patch_embed.register_forward_pre_hook(
        lambda part, args: None if part.training else sides.append(args[0].shape[-1])
    )
    fitted(tmp_path, module, validation=True)
    assert module.seen == plain.seen
    assert set(sides) == {32}


def test_gradients_accumulate_to_the_curriculums_batch(tmp_path: Path) -> None:
    module, trainer = fitted(tmp_path, batch=4)
    assert trainer.global_step == sum(UPDATES)
    assert len(module.seen) == 2 * sum(UPDATES)


def test_stages_may_have_batches_of_their_own(tmp_path: Path) -> None:
    stages = (Stage(0.5, 16, batch_scale=3), Stage(0.5, 32))
    module, trainer = fitted(tmp_path, callback=Curriculum(curriculum(stages=stages)))
    assert trainer.global_step == 4 + 3
    assert [side for side, _, _ in module.seen] == [16] * 12 + [32] * 3


def test_a_batch_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"micro-batches of 3 \(the loader's batch size\)"):
        fitted(tmp_path, batch=3)


def test_a_trainer_of_other_length_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="max_steps=2, and the curriculum 15 updates"):
        fitted(tmp_path, max_steps=2)


def test_going_on_under_another_curriculum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    fitted(tmp_path, callbacks=[Keep(3, path)])
    other = Curriculum(curriculum(stages=(Stage(0.5, 16, 3), Stage(0.5, 32, 5))))
    with pytest.raises(UserError, match="stage 1: randaug is 3, was 0"):
        fitted(tmp_path, callback=other, path=path)


def test_the_part_that_takes_pictures_may_be_named(tmp_path: Path) -> None:
    module = Classifier(ConvNet())
    fitted(tmp_path, module, Curriculum(curriculum(), model="model"))
    assert module.seen[0][0] == 16
    with pytest.raises(UserError, match="Classifier has no part 'encoder': it has model"):
        fitted(tmp_path, callback=Curriculum(curriculum(), model="encoder"))
