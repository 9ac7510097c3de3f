"""Shards that the real webdataset wrote and reads, with a live transform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from leap_efficienttrain.pipelines import photographs
from leap_efficienttrain.streaming import Sample, stream
from leap_efficienttrain.transforms import LiveTransform
from leap_shared.errors import UserError
from leap_shared.vision import open_source

webdataset = pytest.importorskip("webdataset")
pytestmark = [  # it leaves the files of shards to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard:03d}.tar")) as writer:
            for number, file in enumerate(photographs(6, seed=shard)):
                writer.write({"__key__": f"{shard}_{number}", "jpg": file, "cls": shard * 6 + number})
    return str(tmp_path / "{000..001}.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_every_picture_of_the_shards_comes_once(shards: str, workers: int) -> None:
    data = stream(shards, LiveTransform(64, output="float"), shuffle=4)
    loader = DataLoader(data, batch_size=3, num_workers=workers)
    batches = list(loader)
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(12))
    assert {images.shape[1:] for images, _ in batches} == {(3, 64, 64)}


def test_size_changes_between_passes_with_the_same_workers(shards: str) -> None:
    transform = LiveTransform(64, output="float")
    data = stream(shards, transform, shuffle=0)
    loader: Any = webdataset.WebLoader(data, batch_size=3, num_workers=1, persistent_workers=True)
    for size in (32, 48):
        transform.set(size=size)
        assert {tuple(images.shape[2:]) for images, _ in loader} == {(size, size)}


def test_without_shuffling_the_order_is_that_of_the_shards(shards: str) -> None:
    assert [label for _, label in stream(shards, LiveTransform(32), shuffle=0)] == list(range(12))


def test_the_same_shards_open_as_a_source_by_index(shards: str) -> None:
    source = open_source(shards)
    assert sorted(source[index][1] for index in range(len(source))) == list(range(12))
    assert LiveTransform(32, augment_at="low")(source[3][0]).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("sample", "said"),
    [({"jpg": b"no picture", "cls": b"1"}, "cannot identify"), ({"cls": b"1"}, "expected a picture and cls")],
)
def test_a_sample_that_cannot_be_read_is_named_with_its_shard(sample: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"cannot read the picture dog in a.tar: .*{said}"):
        Sample(LiveTransform(32))({"__key__": "dog", "__url__": "a.tar", **sample})
