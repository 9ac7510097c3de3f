"""What the adapters share: a model that looks after its size itself, in anybody's loop."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import BATCH, SAMPLES, SIZES, UPDATES, ConvNet, curriculum, moments, pictures, vit
from torch.utils.data import DataLoader, TensorDataset

from leap_efficienttrain.adapters import Session
from leap_efficienttrain.loops import (
    accumulations,
    batch_size,
    check_even,
    check_half_precision,
    dataset_length,
    downsample,
    set_rate,
    updates_ahead,
)
from leap_efficienttrain.resampling import low_frequency_crop
from leap_efficienttrain.stages import Stage
from leap_shared.errors import UserError

FIRST, SECOND = 0, UPDATES[0]


def started(model: Any = None, **options: Any) -> tuple[Session, torch.optim.Optimizer]:
    model = vit() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    session = Session(options.pop("curriculum", curriculum()), model, **options)
    session.attach()
    session.begin(optimizer, SAMPLES)
    return session, optimizer


def train_step(session: Session, optimizer: torch.optim.Optimizer, update: int) -> float:
    session.enter(update)
    session.model.train()
    images, labels = pictures(BATCH, update)
    loss = F.cross_entropy(session.model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@given(size=st.integers(2, 23).map(lambda half: 2 * half), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=10)
def test_lanczos_of_floats_is_pillows_but_for_its_rounding(size: int, seed: int) -> None:
    smooth = np.random.default_rng(seed).integers(64, 192, (48, 48, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(smooth).resize((size, size), Image.Resampling.LANCZOS)).astype(float)
    found = downsample(torch.from_numpy(smooth).permute(2, 0, 1)[None].float(), size, "lanczos")[0].permute(1, 2, 0)
    clear = (expected > 0) & (expected < 255)  # bytes are clipped in between
    assert np.abs(found.numpy() - expected)[clear].max() < 2


def test_fourier_stages_get_the_low_frequency_crop() -> None:
    images, _ = pictures(4)
    assert torch.equal(downsample(images, 16, "fourier"), low_frequency_crop(images, 16))


@pytest.mark.parametrize("method", ["lanczos", "fourier", "area", "bicubic"])
def test_every_method_keeps_constants_and_dtype(method: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        flat = downsample(torch.full((2, 3, 32, 32), 0.5, dtype=dtype), 16, method)
        assert flat.shape == (2, 3, 16, 16)
        assert flat.dtype == dtype
        torch.testing.assert_close(flat, torch.full_like(flat, 0.5))


def test_pictures_below_the_stages_size_are_refused() -> None:
    with pytest.raises(UserError, match="16 x 16 pixels in a stage of 32 x 32: load them at the base size"):
        downsample(torch.zeros(1, 3, 16, 16), 32)


def test_size_and_rate_follow_the_plan_in_any_order() -> None:
    session, optimizer = started()
    plan = session.plan
    assert plan is not None
    assert plan.updates == sum(UPDATES)
    for update in (SECOND, FIRST, SECOND - 1, SECOND + 1):
        session.enter(update)
        assert session.flexible.size == plan.at(update).size == SIZES[update >= SECOND]
        assert optimizer.param_groups[0]["lr"] == plan.lr(update)


def test_moments_move_with_the_parameter_that_they_belong_to() -> None:
    session, optimizer = started()
    train_step(session, optimizer, SECOND - 1)
    table = session.model.pos_embed
    assert moments(optimizer, table).shape == table.shape
    train_step(session, optimizer, SECOND)
    assert session.model.pos_embed is table
    assert moments(optimizer, table).shape == table.shape == (1, 65, 24)


def test_an_optimiser_of_another_model_is_refused() -> None:
    session = Session(curriculum(), vit())
    with pytest.raises(UserError, match="optimizer does not hold"):
        session.begin(torch.optim.AdamW(vit().parameters()), SAMPLES)


def test_groups_keep_the_proportion_of_their_rates() -> None:
    parts = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": parts[0]}, {"params": parts[1], "lr": 1e-4}, {"params": parts[2], "lr_scale": 0.5}]
    optimizer = torch.optim.SGD(groups, 1e-3)
    for rate in (0.5, 0.25):
        set_rate([optimizer], rate)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, rate / 10, rate / 2])


def test_evaluation_is_at_the_base_size_and_leaves_no_trace() -> None:
    session, optimizer = started()
    twin, other = started()
    for update in range(2):
        train_step(session, optimizer, update)
        train_step(twin, other, update)
        session.model.eval()
        with torch.inference_mode():
            session.model(pictures()[0])
        assert session.model.pos_embed.shape == (1, 65, 24)
    train_step(session, optimizer, 2)
    train_step(twin, other, 2)
    assert session.model.pos_embed.shape == (1, 17, 24)
    for mine, theirs in zip(session.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_evaluation_keeps_gradients_that_gather() -> None:
    session, _ = started()
    session.enter(0)
    images, labels = pictures(BATCH)
    F.cross_entropy(session.model.train()(images), labels).backward()
    before = session.model.pos_embed.grad.clone()
    with torch.no_grad():
        session.model.eval()(images)
    session.enter(0)
    assert torch.equal(session.model.pos_embed.grad, before)


def test_evaluation_at_the_stages_size_makes_the_pictures_small() -> None:
    session, _ = started(evaluate_at="stage")
    session.enter(0)
    session.model.eval()
    images, _ = pictures(4)
    with torch.no_grad():
        assert torch.equal(session.model(images), session.model(session.fit(images)))


def test_a_moving_average_is_evaluated_at_the_base_size_too() -> None:
    model = vit()
    ema = copy.deepcopy(model).eval()
    session, _ = started(model, ema=ema)
    session.enter(0)
    assert ema.pos_embed.shape == (1, 17, 24)
    with torch.no_grad():
        ema(pictures(4)[0])
    assert ema.pos_embed.shape == (1, 65, 24)
    assert ema.state_dict()["pos_embed"].shape == (1, 17, 24)


def test_what_is_saved_during_evaluation_has_the_training_size() -> None:
    session, _ = started()
    session.enter(0)
    with torch.no_grad():
        session.model.eval()(pictures(4)[0])
    assert session.model.state_dict()["pos_embed"].shape == (1, 17, 24)


def test_weights_of_any_stage_load_to_the_same_bits() -> None:
    session, optimizer = started()
    train_step(session, optimizer, 0)
    saved = copy.deepcopy(session.model.state_dict())
    fresh, _ = started(vit(seed=1))
    fresh.model.load_state_dict(saved)
    assert fresh.flexible.size == SIZES[0]
    for name, value in fresh.model.state_dict().items():
        assert torch.equal(value, saved[name])


def test_weights_of_another_model_are_refused_by_torch_at_the_present_size() -> None:
    session, _ = started()
    session.enter(0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        session.model.load_state_dict(vit(embed_dim=48).state_dict())
    assert session.model.pos_embed.shape == (1, 17, 24)


def test_going_on_under_another_curriculum_shows_what_differs() -> None:
    session, _ = started()
    other, _ = started(curriculum=curriculum(stages=(Stage(0.5, 24), Stage(0.5, 32)), batch=8))
    with pytest.raises(UserError, match=r"stage 1: size is 24, was 16.*take that one"):
        other.load_state_dict(session.state_dict())


def test_going_on_with_other_pictures_is_refused() -> None:
    session, _ = started()
    with pytest.raises(UserError, match="has 24 pictures, had 48"):
        session.load_state_dict({**session.state_dict(), "samples": 48})


def test_sizes_that_the_model_cannot_take_are_refused_before_training() -> None:
    odd = curriculum(stages=(Stage(0.5, 18), Stage(0.5, 32)))
    with pytest.raises(UserError, match=r"stage 1: 18 pixels is not a multiple of 4.*take 16 or 20"):
        Session(odd, vit())


def test_detached_the_model_is_left_alone() -> None:
    session, _ = started()
    session.enter(0)
    session.detach()
    assert session.model.train()(torch.zeros(1, 3, 16, 16)).shape == (1, 4)
    assert not session.model._forward_pre_hooks


class Recorder:
    """A transform that notes what is set."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def set(self, size: int, magnitude: float) -> None:
        self.seen.append((size, magnitude))


def test_a_loader_that_is_ahead_makes_pictures_for_the_largest_stage_in_reach() -> None:
    transform = Recorder()
    session, _ = started(transform=transform, ahead=2)
    for update in range(SECOND - 3, SECOND + 1):
        session.enter(update)
    assert transform.seen == [(16, 0), (32, 0), (32, 0), (32, 5)]


def test_pictures_in_keyword_arguments_become_small() -> None:
    session, _ = started(ConvNet())
    session.enter(0)
    sizes: list[int] = []
    session.model.body.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-1]))
    session.model.train()(images=pictures(4)[0])
    assert sizes == [16]


def test_batches_that_do_not_make_up_the_curriculums_are_refused() -> None:
    plan = curriculum().plan(SAMPLES, world=2)
    assert accumulations(plan, 2, "here") == [2, 2]
    with pytest.raises(UserError, match=r"micro-batches of 3 \(here\) on 2 processes do not make up the 8 pictures"):
        accumulations(plan, 3, "here")


def test_replay_needs_the_packages_loader() -> None:
    stages = (Stage(0.5, 16, replay=2, buffer=4), Stage(0.5, 32))
    with pytest.raises(UserError, match="stage 1 replays pictures"):
        accumulations(curriculum(stages=stages).plan(SAMPLES), 4, "here")


def test_an_odd_batch_is_no_match_for_mixup() -> None:
    with pytest.raises(UserError, match="stage 1 has forward passes of 3 pictures, and Mixup pairs them"):
        check_even(curriculum(batch=3).plan(SAMPLES))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is allowed where there is CUDA")
def test_half_precision_without_cuda_is_refused() -> None:
    with pytest.raises(UserError, match="fp16 needs CUDA"):
        check_half_precision(True, "fp16")


def test_a_loader_tells_its_length_batch_and_reach() -> None:
    loader = DataLoader(TensorDataset(*pictures()), batch_size=6)
    assert (dataset_length(loader), batch_size(loader), updates_ahead(loader)) == (SAMPLES, 6, 2)
    with pytest.raises(UserError, match="give samples"):
        dataset_length(iter([]))
