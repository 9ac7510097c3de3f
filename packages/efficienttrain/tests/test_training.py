"""Whole trainings through the stages of a curriculum, and what is found when they are taken up again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from leap_efficienttrain import training
from leap_efficienttrain.checkpoints import load_checkpoint
from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.searching import search
from leap_efficienttrain.stages import LearningRate, Stage, any_last_size
from leap_efficienttrain.training import CurriculumTrainer, SearchTraining
from leap_shared.errors import UserError
from leap_shared.vision import AugmentationConfig, DataConfig, OptimiserConfig, TrainConfig

STAGES = (Stage(0.4, 32, 0), Stage(0.3, 48, 4, replay=2, buffer=2), Stage(0.3, 64, 9))
LR = LearningRate(base=1e-3, final=1e-5, warmup_epochs=0)


class Stopped(Exception):  # noqa: N818 - no error
    """Ends a training as a signal would."""


def curriculum(**changes: Any) -> Curriculum:
    given = {"base_size": 64, "arithmetic": "continuous", "batch": 8, "lr": LR, **changes}
    return Curriculum(given.pop("stages", STAGES), given.pop("equivalent_epochs", 1.5), **given)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Noise, in which the label's colour channel is brighter."""
    generator = np.random.default_rng(0)
    labels = np.arange(32) % 3
    images = generator.integers(0, 128, (32, 72, 80, 3), dtype=np.uint8)
    images[np.arange(32), :, :, labels] += 100
    np.savez(tmp_path / "all.npz", images=images, labels=labels)
    return str(tmp_path / "all.npz")


def config(data: str, **changes: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "model": "test_vit",
        "augmentation": AugmentationConfig(mixup=0.8),
        "optimiser": OptimiserConfig("adamw", ema_decay=0.9),
        "workers": 0,
        "tensorboard": False,
        "log_updates": 1,
    }
    return TrainConfig(DataConfig(data, data), **{**given, **changes})


def trained(data: str, out: Path, stop_at: int | None = None, **options: Any) -> CurriculumTrainer:
    calls = iter(range(10_000))

    def loss(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sizes.append(images.shape[-1])
        if next(calls) == stop_at:
            raise Stopped
        return -(targets * model(images).log_softmax(-1)).sum(-1).mean()

    sizes: list[int] = []
    settings = options.pop("config", config(data, save_updates=1))
    trainer = CurriculumTrainer(
        options.pop("curriculum", curriculum()), settings, out, device="cpu", loss_fn=loss, **options
    )
    if stop_at is None:
        trainer.train()
    else:
        with pytest.raises(Stopped):
            trainer.train()
    vars(trainer)["sizes"] = sizes
    return trainer


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_one_process_trains_every_stage_at_its_size(data: str, tmp_path: Path) -> None:
    trainer = trained(data, tmp_path / "out")
    updates = {leg.stage.size: leg.updates for leg in trainer.plan.legs}
    assert {size: trainer.sizes.count(size) for size in updates} == updates
    assert trainer.sizes == sorted(trainer.sizes)
    train = [row for row in rows(tmp_path / "out") if row["phase"] == "train"]
    assert [row["lr"] for row in train] == pytest.approx([trainer.plan.lr(k) for k in range(trainer.plan.updates)])
    model = load_checkpoint(tmp_path / "out", trainer.trainer.model, resize=False)
    assert model.pos_embed.shape[1] == 1 + 16


def test_moments_and_averages_have_followed_the_size(data: str, tmp_path: Path) -> None:
    trainer = trained(data, tmp_path / "out")
    learner = trainer.trainer.learner
    state = learner.optimiser.state[trainer.trainer.model.pos_embed]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == learner.ema.module.pos_embed.shape == (1, 17, 64)
    assert state["step"] == trainer.plan.updates


def test_each_stage_is_accounted_for(data: str, tmp_path: Path) -> None:
    trained(data, tmp_path / "out")
    stages = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert [stage["size"] for stage in stages] == [32, 48, 64]
    assert stages[0]["compute_speedup"] > stages[1]["compute_speedup"] > stages[2]["compute_speedup"] == 1
    assert all(stage["seconds"] > 0 and stage["images_per_second"] > 0 for stage in stages)


def test_validation_is_at_full_size_in_every_stage(data: str, tmp_path: Path) -> None:
    trainer = trained(data, tmp_path / "out")
    validations = [row for row in rows(tmp_path / "out") if row["phase"] == "validation"]
    assert len(validations) == 2 * len(trainer.states)
    assert {row["images"] for row in validations} == {32}


@pytest.mark.parametrize("stop_at", [3, 8, 14])
def test_a_killed_training_goes_on_to_the_same_bits(data: str, tmp_path: Path, stop_at: int) -> None:
    whole = trained(data, tmp_path / "whole")
    trained(data, tmp_path / "killed", stop_at)
    again = trained(data, tmp_path / "killed")
    for name, value in whole.trainer.model.state_dict().items():
        assert torch.equal(value, again.trainer.model.state_dict()[name]), name
    for name in ("weights", "ema"):
        assert (tmp_path / "whole" / f"{name}.safetensors").read_bytes() == (
            tmp_path / "killed" / f"{name}.safetensors"
        ).read_bytes()


def test_another_curriculum_is_refused_with_what_differs(data: str, tmp_path: Path) -> None:
    trained(data, tmp_path / "out", stop_at=3)
    with pytest.raises(UserError, match=r"another curriculum \(equivalent_epochs is 2, was 1\.5\)"):
        trained(data, tmp_path / "out", curriculum=curriculum(equivalent_epochs=2))


def test_odd_batches_cannot_be_mixed(data: str, tmp_path: Path) -> None:
    odd = curriculum(stages=(Stage(0.5, 32), Stage(0.5, 64, batch_scale=1.125)))
    with pytest.raises(UserError, match="stage 2 has forward passes of 9 pictures, and Mixup pairs them"):
        CurriculumTrainer(odd, config(data), tmp_path / "out", device="cpu")


def test_a_model_that_cannot_change_its_size_is_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mixer"):
        CurriculumTrainer(
            curriculum(stages=(Stage(0.5, 32), Stage(0.5, 64))),
            config(data, model="mixer_s16_224", optimiser=OptimiserConfig("sgd")),
            tmp_path / "out",
            device="cpu",
        )


def test_a_training_may_start_from_another_ones_end(data: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the last stage trains"):
        small = curriculum(stages=(Stage(1, 32, 0),), equivalent_epochs=0.5)
    first = trained(data, tmp_path / "first", curriculum=small)
    second = CurriculumTrainer(curriculum(), config(data), tmp_path / "second", device="cpu")
    second.start_from(tmp_path / "first")
    assert second.flexible.size == 32
    assert torch.equal(second.trainer.model.pos_embed, first.trainer.model.pos_embed)
    moments = [trainer.trainer.learner.optimiser.state_dict()["state"] for trainer in (first, second)]
    assert all(torch.equal(moments[0][key]["exp_avg"], moments[1][key]["exp_avg"]) for key in moments[0])
    second.train()
    with pytest.raises(UserError, match="has no checkpoints"):
        second.start_from(tmp_path)


def test_weights_of_other_classes_and_sizes_are_a_start(data: str, tmp_path: Path) -> None:
    trained(data, tmp_path / "first")
    other = curriculum(base_size=96, stages=(Stage(1, 96),))
    second = CurriculumTrainer(other, config(data), tmp_path / "second", device="cpu")
    second.load(tmp_path / "first" / "weights.safetensors")
    assert second.trainer.model.pos_embed.shape[1] == 1 + 36
    ema = second.trainer.learner.ema.module
    assert torch.equal(ema.pos_embed, second.trainer.model.pos_embed)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "sequential"])
def test_a_search_trains_by_it(data: str, tmp_path: Path, method: Any) -> None:
    settings = replace(config(data), augmentation=AugmentationConfig(mixup=0, cutmix=0), validation_epochs=10**6)
    train = SearchTraining(settings, tmp_path / "trials", "cpu")
    options = {"log": tmp_path / "log.jsonl", "fine_tune": 0.5, "batch": 8}
    with any_last_size():
        found = search(train, budget=1, sizes=(32, 64), stages=2, method=method, **options)
    assert found.stages[-1].size == 64 or method == "sequential"
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) >= 3


def test_the_clock_counts_updates_of_a_stage_alone() -> None:
    clock = training.Clock()
    for stage in (0, 0, 0, 1, 1):
        clock.tick(stage)
    clock.pause()
    clock.tick(1)
    assert [clock.timed[stage][0] for stage in (0, 1)] == [2, 1]
    again = training.Clock()
    again.load_state_dict(clock.state_dict())
    assert again.timed == clock.timed
