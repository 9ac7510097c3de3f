"""Histograms of oriented gradients: those of scikit-image where both define the same, and what is ours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.feature import hog
from torch import Tensor

from leap_efficienttrain.hog import draw_histograms, oriented_gradients
from leap_shared.errors import UserError


def pictures(seed: int, rows: int = 2, columns: int = 3, channels: int = 2) -> Tensor:
    shape = (2, channels, 8 * rows, 8 * columns)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).double()


def ramp(degrees: float, side: int = 16) -> Tensor:
    """A picture that grows brighter in one direction, from the columns' towards the rows'."""
    row, column = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    angle = math.radians(degrees)
    return (row * math.sin(angle) + column * math.cos(angle))[None, None]


@given(seed=st.integers(0, 999), rows=st.integers(1, 3), columns=st.integers(1, 3), bins=st.sampled_from([4, 9]))
@settings(max_examples=20)
def test_hard_histograms_are_those_of_scikit_image(seed: int, rows: int, columns: int, bins: int) -> None:
    images = pictures(seed, rows, columns)
    found = oriented_gradients(images, bins, soft=False)
    options = {"cells_per_block": (1, 1), "block_norm": "L2", "feature_vector": False}
    for image, histograms in zip(images.flatten(0, 1).numpy(), found.flatten(0, 1), strict=True):
        expected = hog(image, bins, (8, 8), **options).reshape(rows, columns, bins)
        np.testing.assert_allclose(histograms.numpy(), expected, atol=1e-6)  # it adds up in single precision


@given(seed=st.integers(0, 999))
@settings(max_examples=10)
def test_soft_and_hard_histograms_share_the_same_magnitudes(seed: int) -> None:
    soft, hard = (oriented_gradients(pictures(seed), soft=soft, normalise=False).sum(4) for soft in (True, False))
    torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize("number", range(9))
def test_a_direction_in_the_middle_of_a_bin_counts_for_it_alone(number: int) -> None:
    inside = oriented_gradients(ramp(20 * number + 10, 24))[0, 0, 1, 1]
    torch.testing.assert_close(inside, torch.eye(9, dtype=torch.float64)[number], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("degrees", "shares"), [(15, {0: 0.75, 1: 0.25}), (0, {0: 0.5, 8: 0.5}), (175, {8: 0.75, 0: 0.25})]
)
def test_a_direction_between_two_bins_is_shared_in_proportion(degrees: int, shares: dict[int, float]) -> None:
    inside = oriented_gradients(ramp(degrees, 24), normalise=False)[0, 0, 1, 1]
    expected = torch.tensor([2 * shares.get(number, 0) for number in range(9)], dtype=torch.float64)
    torch.testing.assert_close(inside, expected, atol=1e-9, rtol=0)


def test_contrast_and_brightness_do_not_matter() -> None:
    images = pictures(0)
    torch.testing.assert_close(oriented_gradients(images), oriented_gradients(images * 7 - 40), atol=1e-6, rtol=0)


def test_a_flat_picture_has_empty_histograms() -> None:
    assert not oriented_gradients(torch.ones(1, 3, 16, 16)).any()


def test_single_and_half_precision_give_single() -> None:
    images = pictures(1)
    for kind, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-4)):  # bfloat16 holds whole numbers up to 256
        found = oriented_gradients(images.to(kind))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, oriented_gradients(images).float(), atol=tolerance, rtol=0)


def test_a_histogram_is_drawn_as_lines_along_the_edge() -> None:
    """Brightness that grows with the columns has edges down the rows."""
    histograms = torch.zeros(1, 1, 1, 2, 2)
    histograms[0, 0, 0, 0] = torch.tensor([1.0, 1.0])  # 45 and 135 degrees
    drawn = draw_histograms(histograms)[0, 0]
    assert drawn.shape == (8, 16)
    assert drawn.max() == 1
    assert torch.equal(drawn[:, :8], drawn[:, :8].T)
    assert not drawn[:, 8:].any()
    down = draw_histograms(torch.tensor([1.0] + 8 * [0.0]).view(1, 1, 1, 1, 9))[0, 0]
    assert down.sum(0)[3:5].sum() > 0.5 * down.sum() > down.sum(1)[3:5].sum()


def test_a_size_without_whole_cells_is_refused() -> None:
    with pytest.raises(UserError, match=r"12x16 pixels do not divide into cells of 8x8"):
        oriented_gradients(torch.ones(1, 1, 12, 16))
