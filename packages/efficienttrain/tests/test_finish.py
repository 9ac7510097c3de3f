"""The batch step: normalisation as in torchvision, erasing by timm's rule, sizes by lanczos and fourier."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.functional import normalize

from leap_efficienttrain.finish import Finish, erase
from leap_efficienttrain.resampling import lanczos_resize, low_frequency_crop
from leap_shared.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 3, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator())


def normalised(images: Tensor) -> Tensor:
    return normalize(images.permute(0, 3, 1, 2) / 255, MEAN, STD)


def test_bytes_are_normalised_as_by_torchvision() -> None:
    torch.testing.assert_close(Finish(erasing=0)(pictures(), 32), normalised(pictures()), atol=1e-6, rtol=0)


def test_lanczos_comes_before_and_fourier_after_erasing() -> None:
    small = Finish(erasing=1)(pictures(), 16, generator(5))
    expected = normalised(lanczos_resize(pictures(), 16))
    erase(expected, 1, generator=generator(5))
    torch.testing.assert_close(small, expected, atol=1e-6, rtol=0)
    erased = normalised(pictures())
    erase(erased, 1, generator=generator(5))
    result = Finish(erasing=1, downsample="fourier")(pictures(), 16, generator(5))
    torch.testing.assert_close(result, low_frequency_crop(erased, 16), atol=1e-5, rtol=0)


def test_fourier_without_erasing_is_one_step_to_the_same_numbers() -> None:
    result = Finish(erasing=0, downsample="fourier")(pictures(), 16)
    torch.testing.assert_close(result, low_frequency_crop(normalised(pictures()), 16), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_has_the_type_that_was_asked_for(dtype: torch.dtype) -> None:
    assert Finish(dtype=dtype)(pictures(), 32, generator()).dtype == dtype


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match="pictures of 32x32 pixels, and the size is 16"):
        Finish()(torch.rand(2, 3, 32, 32), 16)


@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_one_rectangle_of_timms_areas_and_aspects_is_erased(height: int, width: int, seed: int) -> None:
    images = torch.full((4, 3, height, width), 9.0)
    erase(images, 1, "const", generator(seed))
    for image in images:
        rows, columns = (image[0] == 0).nonzero().unbind(1)
        if not len(rows):
            continue  # no rectangle fitted in ten attempts
        tall, wide = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert len(rows) == tall * wide
        assert torch.equal(image == 0, (image[:1] == 0).expand_as(image))
        assert tall < height
        assert wide < width
        slack = 1 / min(tall, wide)
        assert 0.02 * (1 - slack) ** 2 <= tall * wide / (height * width) <= (1 + slack) ** 2 / 3
        assert abs(math.log(tall / wide)) <= math.log(1 / 0.3) + 2 * slack


def test_so_many_pictures_are_erased_as_the_probability_says() -> None:
    images = torch.full((2000, 1, 12, 12), 9.0)
    erase(images, 0.25, "const", generator())
    assert 0.2 < float((images == 0).flatten(1).any(1).float().mean()) < 0.3


def test_modes_fill_with_zeros_one_colour_or_noise() -> None:
    def filled(mode: Any) -> Tensor:
        images = torch.full((1, 3, 40, 40), 9.0)
        erase(images, 1, mode, generator(2))
        return images[0][:, images[0, 0] != 9]

    assert filled("const").unique().tolist() == [0]
    assert len(filled("rand").unique()) == 3
    noise = filled("pixel")
    assert len(noise.unique()) == noise.numel()


def test_erasing_depends_on_the_generator_alone() -> None:
    results = []
    for _ in range(2):
        torch.rand(1)
        results.append(Finish(erasing=0.5)(pictures(8), 32, generator(4)))
    assert torch.equal(*results)
    assert not torch.equal(results[0], Finish(erasing=0.5)(pictures(8), 32, generator(5)))
