"""The adapter to Hugging Face's Trainer, against the real library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import SAMPLES, SIZES, UPDATES, ConvNet, Rows, curriculum, plain_training, vit
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from leap_efficienttrain.hf import CurriculumCallback, training_arguments
from leap_efficienttrain.stages import Stage
from leap_shared.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Classifier(nn.Module):
    """What the Trainer wants of a model of timm."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def transformers_vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=4, num_labels=4))


def sides(trainer: Trainer) -> list[int]:
    """Of the pictures in every training step, by the patches of the model."""
    model, found = trainer.model, []
    part = next(module for module in model.modules() if isinstance(module, nn.Conv2d))

    def note(_: nn.Module, args: Any) -> None:
        if model.training:
            found.append(args[0].shape[-1])

    part.register_forward_pre_hook(note)
    return found


class Stop(TrainerCallback):
    """Ends a training after an update, as a limit of time would."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.update


def trainer(out: Path, model: nn.Module | None = None, stop: int | None = None, **changes: Any) -> Trainer:
    model = Classifier(vit()) if model is None else model
    cur = changes.pop("curriculum", curriculum())
    callback = CurriculumCallback(cur, model, **changes.pop("callback", {}))
    given = {"output_dir": str(out), "report_to": [], "logging_steps": 1, "save_steps": 1, "disable_tqdm": True}
    given |= {"use_cpu": True, "dataloader_pin_memory": False, **changes}
    arguments = TrainingArguments(**{**training_arguments(cur, SAMPLES), **given})
    callbacks = [callback, *([] if stop is None else [Stop(stop)])]
    data = {"train_dataset": Rows(named=True), "eval_dataset": Rows(8, named=True)}
    return Trainer(model=model, args=arguments, callbacks=callbacks, **data)


def losses_of(found: Trainer) -> list[tuple[float, float]]:
    rows = [row for row in found.state.log_history if "loss" in row]
    return [(row["loss"], row["learning_rate"]) for row in rows]


def test_one_train_goes_through_all_stages(tmp_path: Path) -> None:
    found = trainer(tmp_path, save_strategy="no")
    seen = sides(found)
    found.train()
    assert seen == [SIZES[0]] * UPDATES[0] + [SIZES[1]] * UPDATES[1]
    assert found.model.network.pos_embed.shape == (1, 65, 24)


def test_a_training_is_what_a_loop_without_the_trainer_trains(tmp_path: Path) -> None:
    found = trainer(tmp_path, save_strategy="no", max_grad_norm=0.0, optim="adamw_torch")
    order = list(range(SAMPLES))
    found._get_train_sampler = lambda *_: order
    found.train()
    expected, losses = plain_training(order, decay=0.0)
    assert [loss for loss, _ in losses_of(found)] == pytest.approx(losses)
    for mine, theirs in zip(found.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_rates_used_and_logged_are_the_curriculums(tmp_path: Path) -> None:
    found = trainer(tmp_path, save_strategy="no")
    used: list[float] = []
    found.create_optimizer().register_step_pre_hook(lambda opt, *_: used.append(opt.param_groups[0]["lr"]))
    found.train()
    plan = curriculum().plan(SAMPLES)
    expected = [plan.lr(update) for update in range(plan.updates)]
    assert used == pytest.approx(expected)
    assert [rate for _, rate in losses_of(found)] == pytest.approx(expected)


@pytest.mark.parametrize("stop", [2, UPDATES[0], UPDATES[0] + 1])
def test_a_training_that_stopped_anywhere_goes_on_to_the_same_losses_of(stop: int, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", save_strategy="no")
    whole.train()
    trainer(tmp_path / "run", stop=stop).train()
    other = trainer(tmp_path / "run")
    seen = sides(other)
    other.train(resume_from_checkpoint=True)
    assert losses_of(other) == losses_of(whole)
    assert seen == ([SIZES[0]] * UPDATES[0] + [SIZES[1]] * UPDATES[1])[stop:]


def test_models_of_transformers_change_their_size_and_configuration(tmp_path: Path) -> None:
    model = transformers_vit()
    found = trainer(tmp_path, model, stop=2)
    found.train()
    again = ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert again.config.image_size == SIZES[0]
    other = trainer(tmp_path, transformers_vit())
    seen = sides(other)
    other.train(resume_from_checkpoint=True)
    assert seen == ([SIZES[0]] * UPDATES[0] + [SIZES[1]] * UPDATES[1])[2:]
    assert other.model.config.image_size == SIZES[1]


def test_evaluation_between_updates_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", save_strategy="no")
    plain.train()
    model = Classifier(vit())
    found = trainer(tmp_path / "judged", model, eval_strategy="steps", eval_steps=1)
    found.train()
    assert losses_of(found) == losses_of(plain)
    assert len([row for row in found.state.log_history if "eval_loss" in row]) == sum(UPDATES)


def test_gradients_accumulate_to_the_curriculums_batch(tmp_path: Path) -> None:
    found = trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_strategy="no")
    seen = sides(found)
    found.train()
    assert found.state.global_step == sum(UPDATES)
    assert seen == [SIZES[0]] * 2 * UPDATES[0] + [SIZES[1]] * 2 * UPDATES[1]


def test_another_batch_than_the_curriculums_is_refused(tmp_path: Path) -> None:
    found = trainer(tmp_path, per_device_train_batch_size=4)
    with pytest.raises(UserError, match="4 x 1 x 1 = 4 pictures per update, and the curriculum 8: set gradient_acc"):
        found.train()


def test_batches_that_grow_are_refused(tmp_path: Path) -> None:
    stages = (Stage(0.5, 16, batch_scale=2), Stage(0.5, 32))
    with pytest.raises(UserError, match="the Trainer one number"):
        trainer(tmp_path, curriculum=curriculum(stages=stages))


def test_a_trainer_that_stops_early_is_warned_of(tmp_path: Path) -> None:
    found = trainer(tmp_path, max_steps=2, save_strategy="no")
    with pytest.warns(UserWarning, match="stops after 2 updates, and the curriculum has 15"):
        found.train()


def test_going_on_under_another_curriculum_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, stop=2).train()
    other = trainer(tmp_path, curriculum=curriculum(stages=(Stage(0.5, 16, 3), Stage(0.5, 32, 5))))
    with pytest.raises(UserError, match="stage 1: randaug is 3, was 0"):
        other.train(resume_from_checkpoint=True)


def test_a_model_of_any_size_needs_nothing(tmp_path: Path) -> None:
    found = trainer(tmp_path, Classifier(ConvNet()), save_strategy="no")
    seen = sides(found)
    found.train()
    assert seen == [SIZES[0]] * UPDATES[0] + [SIZES[1]] * UPDATES[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is allowed where there is CUDA")
def test_half_precision_without_cuda_is_refused() -> None:
    with pytest.raises(UserError, match="fp16=True needs CUDA"):
        training_arguments(curriculum(), SAMPLES, fp16=True)
