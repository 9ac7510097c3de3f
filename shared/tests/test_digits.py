"""The small experiments: real digits, the same weights from the same seed, training that learns."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from leap_shared.errors import UserError
from leap_shared.vision import digits
from leap_shared.vision.bodies import Site, WindowAttention
from leap_shared.vision.bodies.grids import Size
from leap_shared.vision.digits import DigitsViT, Recipe

TINY = Recipe(epochs=1, batch_size=300, dim=8, num_heads=2, depth=2)


@pytest.fixture(autouse=True)
def _data() -> None:
    pytest.importorskip("sklearn")


class Mean(nn.Module):
    """Every token takes the mean of all: the least that mixes."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site, self.proj = site, nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor, hw: Size) -> Tensor:
        assert hw == (8, 8)
        mixed: Tensor = self.proj(x.mean(1, keepdim=True)).expand_as(x)
        return mixed


def test_split_parts_all_images_and_differs_by_seed() -> None:
    first, again, other = (digits.load(seed) for seed in (0, 0, 1))
    assert (len(first.train.labels), len(first.test.labels)) == (1200, 597)
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert not torch.equal(first.train.labels, other.train.labels)
    rows = [{tuple(image.tolist()) for part in split for image in part.pixels[..., 0]} for split in (first, other)]
    assert rows[0] == rows[1]


def test_pixels_are_normalised() -> None:
    pixels = torch.cat([part.pixels for part in digits.load(0)])
    assert pixels.shape == (1797, 64, 1)
    assert float(pixels.mean()) == pytest.approx(0, abs=0.01)
    assert float(pixels.std()) == pytest.approx(1, abs=0.01)


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        digits.load(0)


def test_attention_is_made_for_every_block() -> None:
    model = DigitsViT(Mean, TINY, 0)
    sites = [block.attn.site for block in model.blocks]  # type: ignore[union-attr] # of a module list
    assert sites == [Site(0, index, 8, 2, (8, 8)) for index in range(2)]


def test_same_seed_trains_to_the_same_numbers_and_leaves_the_global_generator_alone() -> None:
    part, before = digits.load(0).train, torch.get_rng_state()
    losses, weights = [], []
    for _ in range(2):
        model = DigitsViT(Mean, TINY, 5)
        losses.append(digits.train(model, part, TINY, 5))
        weights.append(model.head.weight.detach())
    assert losses[0] == losses[1]
    assert torch.equal(*weights)
    assert torch.equal(before, torch.get_rng_state())


def test_training_lowers_the_loss_and_leaves_frozen_parameters() -> None:
    part, recipe = digits.load(0).train, Recipe(epochs=4, depth=1)
    model = DigitsViT(WindowAttention, recipe, 0)
    model.norm.requires_grad_(requires_grad=False)
    before = digits.accuracy(model, part)
    assert digits.train(model, part, recipe, 0) < 0.7 * np.log(10)
    assert digits.accuracy(model, part) > before + 20
    assert bool((model.norm.weight == 1).all())


def test_accuracy_is_the_share_of_right_answers_in_percent() -> None:
    model, part = DigitsViT(Mean, TINY, 0), digits.load(0).test
    with torch.no_grad():
        answers = model(part.pixels).argmax(1)
    part = part._replace(labels=torch.where(torch.arange(597) < 199, answers, (answers + 1) % 10))
    assert digits.accuracy(model, part) == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs is 0: give 1 or more"),
        ({"batch_size": 0}, "batch_size is 0: give 1 or more"),
        ({"depth": -1}, "depth is -1: give 1 or more"),
        ({"dim": 30}, "30 channels and 4 heads: the channels must be a multiple of the heads"),
        ({"learning_rate": 0.0}, "give a rate above 0"),
        ({"weight_decay": -0.1}, "a decay of 0 or more"),
    ],
)
def test_impossible_recipe_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**values)
