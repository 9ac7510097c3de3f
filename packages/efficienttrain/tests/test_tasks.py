"""Pictures of the demonstration: halves of photographs never mix, digits are split, one's own are cut to squares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leap_efficienttrain import tasks
from leap_shared.errors import UserError


@settings(max_examples=20, deadline=None)
@given(st.integers(128, 400), st.integers(128, 400))
def test_halves_share_no_pixel_and_leave_out_none(width: int, height: int) -> None:
    seen = np.zeros((height, width), dtype=int)
    for left, top, right, bottom in tasks._halves((width, height)):
        seen[top:bottom, left:right] += 1
    assert (seen == 1).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(400, 150), (150, 400), (260, 256)]))
def test_patches_do_not_see_across_the_border_of_their_half(seed: int, size: tuple[int, int]) -> None:
    first, second = tasks._halves(size)
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[second[1] : second[3], second[0] : second[2]] = 255
    photograph = Image.fromarray(pixels)
    for box, value in ((first, 0), (second, 255)):
        for patch in tasks._patches(photograph, box, 24, 5, np.random.default_rng(seed)):
            assert (np.asarray(patch) == value).all()


def test_photographs_give_patches_of_every_class_to_both_parts() -> None:
    task = tasks.photographs(3, side=16, train=4, test=2)
    assert len(task.classes) == 18
    assert task.train.images.shape == (72, 16, 16, 3)
    assert task.train.labels.bincount().tolist() == [4] * 18
    assert task.test.labels.bincount().tolist() == [2] * 18


def test_photographs_have_real_colour() -> None:
    task = tasks.photographs(0, side=16, train=3, test=1)
    astronaut = task.train.images[task.train.labels == task.classes.index("astronaut")].float()
    assert float((astronaut[..., 0] - astronaut[..., 2]).abs().mean()) > 5


def test_seed_draws_the_half_to_train_on_and_repeats() -> None:
    tasks.photographs.cache_clear()
    first = tasks.photographs(0, side=8, train=2, test=2)
    tasks.photographs.cache_clear()
    again = tasks.photographs(0, side=8, train=2, test=2)
    other = tasks.photographs(1, side=8, train=2, test=2)
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.train.images, other.train.images)


def test_digits_are_split_without_overlap() -> None:
    task = tasks.digits(5, side=8)
    assert [len(part.labels) for part in task[:2]] == [1200, 597]
    assert task.train.labels.unique().tolist() == list(range(10))
    rows = [{picture.numpy().tobytes() for picture in part.images} for part in task[:2]]
    assert not rows[0] & rows[1]


def save(root: Path, classes: dict[str, tuple[int, int]]) -> str:
    for name, size in classes.items():
        (root / name).mkdir(parents=True)
        Image.new("RGB", size, (10 * len(name), 0, 0)).save(root / name / "0.png")
    return str(root)


def test_pictures_of_any_shape_become_squares(tmp_path: Path) -> None:
    train = save(tmp_path / "train", {"a": (40, 20), "bb": (13, 31)})
    test = save(tmp_path / "test", {"a": (9, 9), "bb": (50, 8)})
    task = tasks.given(train, test, 12)
    assert task.classes == ("a", "bb")
    assert task.train.images.shape == task.test.images.shape == (2, 12, 12, 3)
    assert task.train.images[:, 6, 6, 0].tolist() == [10, 20]


def test_grey_arrays_become_pictures_of_three_channels(tmp_path: Path) -> None:
    images = np.full((3, 10, 10), 7, dtype=np.uint8)
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.array([0, 1, 2]))
    task = tasks.given(str(tmp_path / "train.npz"), str(tmp_path / "test.npz"), 8)
    assert task.test.images.shape == (3, 8, 8, 3)
    assert task.classes == ("0", "1", "2")


def test_class_that_is_tested_and_not_trained_is_refused(tmp_path: Path) -> None:
    train = save(tmp_path / "train", {"a": (8, 8), "b": (8, 8)})
    test = save(tmp_path / "test", {"a": (8, 8), "b": (8, 8), "c": (8, 8)})
    with pytest.raises(UserError, match=r"classes that .* lacks: \[2\]"):
        tasks.given(train, test, 8)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(UserError, match="expected 1 or more"):
        tasks.photographs(0, side=8, train=0)
    with pytest.raises(UserError, match="expected 1 or more"):
        tasks.digits(0, side=0)


def test_missing_photograph_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks._photographs.cache_clear()
    monkeypatch.setattr(tasks, "PHOTOGRAPHS", {"skimage.data": ("no_such_photograph.png",)})
    with pytest.raises(UserError, match=r"no_such_photograph\.png.*pip install scikit-image"):
        tasks._photographs()
    tasks._photographs.cache_clear()
