"""What the loader is measured beside does the same work."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from timm.data import create_transform

from leap_efficienttrain.decoding import opened
from leap_efficienttrain.pipelines import (
    BASE,
    LOW,
    PIPELINES,
    REFERENCE,
    TIMM,
    images_per_second,
    photographs,
    pipeline,
)
from leap_shared.errors import UserError
from leap_shared.vision.data import isolated

FILES = photographs(6)


def seeded() -> Iterator[bytes]:
    """The files; random numbers start with the first, after beartype has drawn its own from the same generator."""
    with isolated(1):
        yield from FILES


@pytest.mark.parametrize("magnitude", [None, 9])
@pytest.mark.parametrize("size", [96, 224])
def test_our_faithful_pipeline_gives_the_numbers_of_the_authors_order(magnitude: int | None, size: int) -> None:
    ours, theirs = (pipeline(name, size, magnitude)(seeded()) for name in (BASE, REFERENCE))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_peer_is_timms_transform() -> None:
    theirs = create_transform(96, is_training=True, interpolation="bicubic", auto_augment=None, color_jitter=None)
    expected = torch.stack([theirs(opened(file)) for file in seeded()])  # type: ignore[operator]
    assert torch.equal(pipeline(TIMM, 96)(seeded()), expected)


def test_all_pipelines_give_a_batch_and_a_speed() -> None:
    for name in PIPELINES:
        function = pipeline(name, 32, 3, base_size=64)
        assert function(FILES[:2]).shape == (2, 3, 32, 32)
        assert images_per_second(function, FILES[:2], rounds=1) > 0


def test_photographs_are_jpeg_files_of_the_size_and_always_the_same() -> None:
    picture = opened(FILES[0])
    assert isinstance(picture, torch.Tensor) is False
    assert (picture.format, picture.size) == ("JPEG", (360, 270))
    assert photographs(2) == FILES[:2]
    assert len({np.asarray(opened(file)).tobytes() for file in FILES}) == len(FILES)


def test_an_unknown_pipeline_is_refused() -> None:
    with pytest.raises(UserError, match=f"there is no pipeline 'x': take {REFERENCE}"):
        pipeline("x", 96)
    assert LOW in PIPELINES
