"""Hugging Face's Trainer on a vision transformer of Transformers, which changes its input size while it trains.

    python examples/hf_trainer.py --out run

takes less than a minute of one CPU thread and ends with

    407 updates, accuracy on held-out digits: 64.3 %

less than the other examples' model, which has no class token to learn. Killed, or after --stop, the same command goes
on from the newest checkpoint in the folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from digits import SIZE, Digits, Rows, accuracy, make_curriculum, make_transform, options
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

import leap_efficienttrain as et


class Stop(TrainerCallback):
    """Ends the training early, as a limit of time would."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - the interface
        """Save and stop."""
        control.should_training_stop = control.should_save = state.global_step >= self.update


class Logits(nn.Module):
    """A model of Transformers as one that gives logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Pictures to logits."""
        logits: Tensor = self.model(images).logits
        return logits


def main(arguments: Sequence[str] | None = None) -> float:
    """Train and judge; the accuracy on held-out digits in percent."""
    given = options(__doc__, arguments)
    train, test, transform = Digits(train=True), Digits(train=False), make_transform("float")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=SIZE, patch_size=4, num_labels=10))
    curriculum = make_curriculum(given.epochs)

    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder)
        fields = et.hf.training_arguments(curriculum, len(train), output_dir=str(out), report_to=[], logging_steps=50)
        fields |= {"save_steps": 100, "save_total_limit": 1, "weight_decay": 0.05, "disable_tqdm": True}
        fields |= {"use_cpu": True, "dataloader_pin_memory": False}
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**fields),
            train_dataset=Rows(train, transform, named=True),
            callbacks=[et.hf.CurriculumCallback(curriculum, model, transform)],
        )
        if given.stop is not None:
            trainer.add_callback(Stop(given.stop))
        trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")))
    score = accuracy(Logits(model), test) if model.config.image_size == SIZE else 0.0
    print(f"{trainer.state.global_step} updates, accuracy on held-out digits: {score:.1f} %")
    return score


if __name__ == "__main__":
    main()
