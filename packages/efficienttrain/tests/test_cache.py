"""The cache of small pictures: the right pixels, sizes told before, resumed where it stopped, damage found."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from leap_efficienttrain import cache
from leap_efficienttrain.cache import CacheSize, build_cache, cache_size, open_cache, open_pictures
from leap_efficienttrain.decoding import shrink
from leap_efficienttrain.pipelines import photographs
from leap_efficienttrain.transforms import LiveTransform
from leap_shared.errors import UserError
from leap_shared.vision.sources import Source, class_names

COUNT = 11


class Mixed:
    """Pictures of several kinds and sizes."""

    classes = ("cat", "dog")

    def __init__(self, broken: int | None = None) -> None:
        generator = np.random.default_rng(0)
        sides = generator.integers(20, 60, (COUNT, 2))
        self.items: list[Any] = [generator.integers(0, 255, (*side, 3), dtype=np.uint8) for side in sides]
        self.items[1] = photographs(1)[0]
        self.items[2] = Image.open(io.BytesIO(photographs(1)[0]))
        if broken is not None:
            self.items[broken] = b"no picture"

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.items[index], index % 2


class Reporter:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = self.total = 0

    def log(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, *, description: str, total: int) -> Reporter:
        self.total = total
        return self

    def advance(self, count: int) -> None:
        self.count += count


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BLOCK", 4)


def test_pictures_keep_their_ratio_and_lose_their_size(tmp_path: Path) -> None:
    built = build_cache(Mixed(), tmp_path / "cache", 32)
    for index, item in enumerate(Mixed().items):
        if isinstance(item, np.ndarray):
            expected = np.asarray(shrink(Image.fromarray(item), 32, "lanczos"))
            pixels, label = built[index]
            assert np.array_equal(pixels, expected)
            assert label == index % 2
    assert built[1][0].shape == built[2][0].shape == (32, 42, 3)


def test_it_is_a_source_with_classes_that_can_be_opened_again(tmp_path: Path) -> None:
    built = build_cache(Mixed(), tmp_path, 32)
    again = open_cache(tmp_path, verify=True)
    assert isinstance(again, Source)
    assert class_names(again) == ["cat", "dog"]
    assert again.labels.tolist() == [index % 2 for index in range(COUNT)]
    assert again.where(3) == f"number 3 of {tmp_path}"
    assert all(np.array_equal(again[index][0], built[index][0]) for index in range(COUNT))


def test_caches_open_where_other_pictures_do(tmp_path: Path) -> None:
    build_cache(Mixed(), tmp_path / "cache", 32)
    (tmp_path / "folder" / "cat").mkdir(parents=True)
    (tmp_path / "folder" / "cat" / "0.jpg").write_bytes(photographs(1)[0])
    assert [len(open_pictures(str(tmp_path / name))) for name in ("cache", "folder")] == [COUNT, 1]


def test_size_is_told_before_anything_is_built(tmp_path: Path) -> None:
    size = cache_size(Mixed(), 32)
    built = build_cache(Mixed(), tmp_path, 32, size=size, reporter=(reporter := Reporter()))
    assert size.bytes == len(built.pixels)
    assert reporter.lines == [f"cache of {COUNT} pictures, 0.00 GB in {tmp_path}"]
    assert reporter.count == reporter.total == COUNT


def test_gigabytes_are_counted_in_pixels_of_three_bytes() -> None:
    shapes = np.full((1_281_167, 2), (128, 170))
    assert str(CacheSize(shapes, np.zeros(len(shapes), dtype=np.int64))) == "1281167 pictures, 83.63 GB"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_build_that_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    whole = build_cache(Mixed(), tmp_path / "whole", 32)
    with pytest.raises(UserError, match=r"cannot read the picture number 9: .*: mend it or remove it"):
        build_cache(Mixed(broken=9), tmp_path / "part", 32, size=cache_size(Mixed(), 32), workers=workers)
    with pytest.raises(UserError, match="it is not finished: build it again"):
        open_cache(tmp_path / "part")
    with (tmp_path / "part" / "pictures.bin").open("ab") as file:
        file.write(b"half of a block")
    made: list[int] = []
    original = cache.Smaller.__getitem__
    monkeypatch.setattr(cache.Smaller, "__getitem__", lambda self, index: made.append(index) or original(self, index))
    part = build_cache(Mixed(), tmp_path / "part", 32)
    assert made == [8, 9, 10]
    assert np.array_equal(part.pixels, whole.pixels)
    assert not (tmp_path / "part" / "progress.json").exists()


def test_the_beginning_of_another_cache_is_not_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="number 9"):
        build_cache(Mixed(broken=9), tmp_path, 32, size=cache_size(Mixed(), 32))
    with pytest.raises(UserError, match="holds the beginning of a cache of something else"):
        build_cache(Mixed(), tmp_path, 24)


def test_a_finished_cache_is_not_overwritten(tmp_path: Path) -> None:
    build_cache(Mixed(), tmp_path, 32)
    with pytest.raises(UserError, match="holds a cache already"):
        build_cache(Mixed(), tmp_path, 32)


def test_a_disk_that_is_too_small_is_told_in_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 5})())
    with pytest.raises(UserError, match=r"the cache needs 0\.00 GB, and .* has 0\.00 GB free"):
        build_cache(Mixed(), tmp_path, 32)


@pytest.mark.parametrize("name", ["pictures.bin", "index.npy"])
def test_damage_is_found(tmp_path: Path, name: str) -> None:
    build_cache(Mixed(), tmp_path, 32)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        open_cache(tmp_path, verify=True)


def test_a_cache_that_was_cut_is_found_without_reading_it(tmp_path: Path) -> None:
    build_cache(Mixed(), tmp_path, 32)
    (tmp_path / "pictures.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="is damaged"):
        open_cache(tmp_path)


def test_what_is_no_cache_or_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no cache of pictures"):
        open_cache(tmp_path)
    build_cache(Mixed(), tmp_path, 32)
    header = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps({**header, "version": 7}))
    with pytest.raises(UserError, match="of version 7, and this package reads 1"):
        open_cache(tmp_path)


def test_tensors_of_floats_and_empty_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a tensor of floats, and a cache holds bytes"):
        build_cache([(torch.rand(3, 40, 40), 0)], tmp_path, 32)
    with pytest.raises(UserError, match="0 pictures: expected 1 or more"):
        build_cache([], tmp_path, 32)


def test_workers_get_the_file_and_not_its_content(tmp_path: Path) -> None:
    built = build_cache(Mixed(), tmp_path, 32)
    content = pickle.dumps(built)
    assert len(content) < len(built.pixels) / 2
    assert np.array_equal(pickle.loads(content)[4][0], built[4][0])  # noqa: S301 - our own


def test_random_crops_are_drawn_from_it(tmp_path: Path) -> None:
    built = build_cache(Mixed(), tmp_path, 32)
    assert LiveTransform(48, augment_at="low")(built[1][0], size=24).shape == (24, 24, 3)
