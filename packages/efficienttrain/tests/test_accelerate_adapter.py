"""The adapter to Accelerate, against the real library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from small import BASE, SAMPLES, SIZES, UPDATES, Rows, curriculum, plain_training, vit
from torch.utils.data import DataLoader

from leap_efficienttrain.accelerate import Run, wrap
from leap_efficienttrain.loader import CurriculumLoader
from leap_efficienttrain.stages import Stage
from leap_efficienttrain.transforms import LiveTransform
from leap_shared.errors import UserError


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps its state per process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Source:
    """Random pictures of bytes."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.images = generator.integers(0, 256, (SAMPLES, 40, 40, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return self.images[index], index % 4


def made(loader: Any = None, **options: Any) -> Run:
    accelerator = Accelerator(cpu=True)
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters())
    cur = options.pop("curriculum", curriculum())
    if loader is None:
        loader = CurriculumLoader(Source(), LiveTransform(BASE, downsample=cur.downsample))
    return wrap(cur, accelerator, model, optimizer, loader, **options)


def train(run: Run, stop: int | None = None) -> list[tuple[int, float, float]]:
    """Size, learning rate and loss of each forward pass."""
    seen = []
    for _ in run:
        for images, labels in run.batches():
            with run.accelerator.accumulate(run.model):
                loss = F.cross_entropy(run.model(images), labels)
                run.accelerator.backward(loss)
                run.optimizer.step()
                run.optimizer.zero_grad()
            seen.append((run.session.flexible.size, run.optimizer.param_groups[0]["lr"], loss.item()))
            if run.update == stop and run.accelerator.sync_gradients:
                return seen
    return seen


def test_all_stages_train_in_one_loop() -> None:
    run = made()
    seen = train(run)
    assert [size for size, _, _ in seen] == [SIZES[0]] * UPDATES[0] + [SIZES[1]] * UPDATES[1]
    assert [rate for _, rate, _ in seen] == [run.plan.lr(update) for update in range(sum(UPDATES))]
    assert run.update == run.plan.updates


def test_stages_accumulate_as_many_passes_as_they_say() -> None:
    stages = (Stage(0.5, 16, 0, micro_batch_scale=2), Stage(0.5, 32))
    run = made(curriculum=curriculum(stages=stages, micro_batch=4))
    steps = [0]
    run.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(run.update))
    sizes = [size for size, _, _ in train(run)]
    assert sizes == [16] * UPDATES[0] + [32] * 2 * UPDATES[1]
    assert steps == list(range(sum(UPDATES) + 1))


@pytest.mark.parametrize("stop", [1, UPDATES[0] - 1, UPDATES[0], UPDATES[0] + 1])
def test_a_run_that_stopped_anywhere_goes_on_to_the_same_losses(stop: int, tmp_path: Path) -> None:
    whole = train(made())
    fresh = made()
    first = train(fresh, stop)
    fresh.accelerator.save_state(str(tmp_path))
    other = made()
    other.accelerator.load_state(str(tmp_path))
    assert other.update == stop
    assert first + train(other) == whole


def test_another_loader_gives_pictures_of_the_base_size_which_become_small() -> None:
    run = made(DataLoader(Rows(), batch_size=4, shuffle=True))
    sizes: list[int] = []
    run.model.patch_embed.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-1]))
    train(run)
    assert sizes == [16] * 2 * UPDATES[0] + [32] * 2 * UPDATES[1]


def test_a_run_trains_what_a_loop_without_accelerate_trains() -> None:
    run = made(DataLoader(Rows(), batch_size=8))
    seen = train(run)
    assert [loss for _, _, loss in seen] == plain_training(list(range(SAMPLES)))[1]


def test_another_loader_goes_on_in_the_middle_of_a_pass(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Rows(), batch_size=8)

    whole = train(made(loader()))
    fresh = made(loader())
    first = train(fresh, UPDATES[0] - 1)
    fresh.accelerator.save_state(str(tmp_path))
    other = made(loader())
    other.accelerator.load_state(str(tmp_path))
    assert first + train(other) == whole


def test_a_loader_whose_batches_do_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"micro-batches of 3 \(the loader's batch size\)"):
        made(DataLoader(Rows(), batch_size=3))


def test_a_loader_that_ends_early_is_reported() -> None:
    run = made(DataLoader(Rows(16), batch_size=8), samples=SAMPLES)
    with pytest.raises(UserError, match="ended before update 3 of a pass that has 3"):
        train(run)


def test_going_on_under_another_curriculum_is_refused(tmp_path: Path) -> None:
    run = made()
    train(run, 1)
    run.accelerator.save_state(str(tmp_path))
    other = made(curriculum=curriculum(stages=(Stage(0.5, 16, 3), Stage(0.5, 32, 5))))
    with pytest.raises(UserError, match="stage 1: randaug is 3, was 0"):
        other.accelerator.load_state(str(tmp_path))


def test_a_pass_without_updates_is_reported() -> None:
    with pytest.raises(UserError, match="go through batches"):
        list(made())
