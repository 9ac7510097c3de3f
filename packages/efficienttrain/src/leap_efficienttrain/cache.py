"""Pictures that are decoded once and kept small: uint8 in a file that is mapped into memory."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from leap_efficienttrain.decoding import decode, decode_factor, is_encoded, opened
from leap_shared.errors import UserError
from leap_shared.files import atomic_writer, ensure_folder, sha256, write_json
from leap_shared.vision.data import UNREADABLE
from leap_shared.vision.sources import Source, class_names, open_source

__all__ = ["CacheSize", "CacheSource", "build_cache", "cache_size", "open_cache", "open_pictures"]

HEADER, PROGRESS, PICTURES, INDEX = "cache.json", "progress.json", "pictures.bin", "index.npy"
VERSION, BLOCK = 1, 512  # pictures that are checked, and resumed from, together


@dataclass(frozen=True)
class CacheSize:
    """What a cache will hold.

    Attributes:
        shapes: height and width of each picture.
        labels: of each picture.
    """

    shapes: NDArray[np.int64]
    labels: NDArray[np.int64]

    @property
    def bytes(self) -> int:
        """Of all pixels."""
        return int((self.shapes.prod(1) * 3).sum())

    def __str__(self) -> str:
        return f"{len(self.labels)} pictures, {self.bytes / 1e9:.2f} GB"


def cache_size(source: Source, short_side: int, workers: int = 0) -> CacheSize:
    """What a cache of this source would take; of files, only the headers are read.

    Raises:
        UserError: a picture cannot be read, or is no picture of bytes.
    """
    _check(source, short_side)
    rows = [row for block in _loader(Headers(source, short_side), 0, workers) for row in block]
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return CacheSize(table[:, :2], table[:, 2])


def build_cache(
    source: Source,
    folder: str | Path,
    short_side: int = 128,
    *,
    workers: int = 0,
    size: CacheSize | None = None,
    reporter: Any = None,
) -> CacheSource:
    """Decode all pictures once, their shorter sides at `short_side` pixels at the most, ratios kept.

    For stages of a size below `short_side`. Small crops, which are enlarged, are less sharp than from the original.
    A build that was stopped goes on where it was; the folder is a cache once its cache.json is there.

    Args:
        source: the pictures, see `leap_shared.vision.open_source`.
        folder: of the cache.
        short_side: in pixels, by Pillow's Lanczos filter; JPEG files are decoded at twice that or more.
        workers: processes that decode.
        size: what `cache_size` says, where it was asked before.
        reporter: shows size and progress: a `leap_shared.cli.Context`, or what has such `progress` and `log`.

    Returns:
        The opened cache.

    Raises:
        UserError: a picture cannot be read, the disk has too little space, or the folder holds something else.
    """
    folder = ensure_folder(Path(folder))
    if (folder / HEADER).exists():
        raise UserError(f"{folder} holds a cache already: open it with open_cache(), or give another folder")
    size = size or cache_size(source, short_side, workers)
    if reporter is not None:
        reporter.log(f"cache of {size} in {folder}")
    checks = _begun(folder, size, short_side)
    about = {"short_side": short_side, "index": sha256(folder / INDEX)}
    _check_space(folder, size.bytes - _end(size, len(checks) * BLOCK))
    bar = None if reporter is None else reporter.progress(description="cache", total=len(size.labels))
    if bar is not None:
        bar.advance(min(len(checks) * BLOCK, len(size.labels)))
    with (folder / PICTURES).open("r+b") as file:
        file.truncate(_end(size, len(checks) * BLOCK))
        file.seek(0, 2)
        for pictures in _loader(Smaller(source, short_side), len(checks) * BLOCK, workers):
            content = b"".join(picture.tobytes() for picture in pictures)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            checks.append(zlib.crc32(content))
            write_json(folder / PROGRESS, {**about, "checks": checks})
            if bar is not None:
                bar.advance(len(pictures))
    classes = class_names(source)
    header = {
        "version": VERSION,
        "pictures": len(size.labels),
        "bytes": size.bytes,
        "classes": classes and list(classes),
    }
    write_json(folder / HEADER, {**header, **about, "checks": checks})
    (folder / PROGRESS).unlink()
    return open_cache(folder)


def open_cache(folder: str | Path, *, verify: bool = False) -> CacheSource:
    """Open a cache as a source of pictures.

    Args:
        folder: where it was built.
        verify: read all pixels and compare their checksums.

    Raises:
        UserError: it is no cache, not finished, or damaged.
    """
    folder = Path(folder)
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        version, index, total = header["version"], header["index"], header["bytes"]
        checks, classes = header["checks"], header["classes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        begun = "it is not finished: build it again, it goes on where it was"
        reason = begun if (folder / PROGRESS).exists() else f"{type(error).__name__} in {HEADER}"
        raise UserError(f"{folder} is no cache of pictures: {reason}") from error
    if version != VERSION:
        raise UserError(f"{folder} is a cache of version {version}, and this package reads {VERSION}: build it again")
    if sha256(folder / INDEX) != index or (folder / PICTURES).stat().st_size != total:
        raise UserError(f"{folder} is damaged: {INDEX} or {PICTURES} is not what {HEADER} says: build it again")
    cache = CacheSource(folder, np.load(folder / INDEX, allow_pickle=False), classes)
    for number, check in enumerate(checks if verify else ()):
        first, last = cache.offsets[number * BLOCK], cache.offsets[min((number + 1) * BLOCK, len(cache))]
        if zlib.crc32(cache.pixels[first:last].tobytes()) != check:
            raise UserError(f"{folder} is damaged: pictures {number * BLOCK} and after differ: build it again")
    return cache


def open_pictures(
    name: str, split: str = "train", image_column: str | None = None, label_column: str | None = None
) -> Source:
    """A cache, or what else `leap_shared.vision.open_source` opens; see there."""
    if (Path(name) / HEADER).is_file():
        return open_cache(name)
    return open_source(name, split, image_column, label_column)


class CacheSource:
    """Small pictures by index; see `open_cache`.

    Args:
        folder: of the cache.
        index: height, width and label of each picture.
        classes: names of the classes, where the source had any.
    """

    def __init__(self, folder: Path, index: NDArray[np.int64], classes: list[str] | None) -> None:
        self.folder, self.index, self.classes = folder, index, classes
        self.labels = index[:, 2]
        self.offsets = np.concatenate([[0], np.cumsum(index[:, 0] * index[:, 1] * 3)])
        self.pixels = self._mapped()

    def _mapped(self) -> NDArray[np.uint8]:
        return np.memmap(self.folder / PICTURES, dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        height, width, label = self.index[index].tolist()
        first = int(self.offsets[index])
        return self.pixels[first : first + height * width * 3].reshape(height, width, 3), label

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "pixels"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.pixels = self._mapped()

    def where(self, index: int) -> str:
        """Name of a picture, for error messages."""
        return f"number {index} of {self.folder}"


class Headers(Dataset[Any]):
    """Height and width that a picture will have, and its label, by the index of the picture."""

    def __init__(self, source: Source, short_side: int) -> None:
        self.source, self.short_side = source, short_side

    def __getitem__(self, index: int) -> Any:
        try:
            image, label = self.source[index]
            return self._made(image, int(label))
        except UNREADABLE as error:
            where = getattr(self.source, "where", "number {}".format)
            return UserError(f"cannot read the picture {where(index)}: {error}: mend it or remove it")

    def _made(self, image: Any, label: int) -> Any:
        width, height = _target(self._opened(image).size, self.short_side)
        return height, width, label

    @staticmethod
    def _opened(image: Any) -> Any:
        picture = opened(image)
        if isinstance(picture, Tensor):
            raise UserError("it is a tensor of floats, and a cache holds bytes")
        return picture


class Smaller(Headers):
    """The pixels of a picture, by its index."""

    def _made(self, image: Any, label: int) -> Any:
        del label
        picture = self._opened(image)
        target = _target(picture.size, self.short_side)
        factor = decode_factor((0, 0, *picture.size), 2 * self.short_side) if is_encoded(picture) else 1
        pixels = decode(picture, factor)
        whole = pixels if not isinstance(pixels, np.ndarray) else Image.fromarray(pixels)
        return np.asarray(whole if whole.size == target else whole.resize(target, Image.Resampling.LANCZOS))


def _target(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Width and height of a small picture."""
    short = min(size)
    if short <= short_side:
        return size
    width, height = (max(short_side, int(short_side * side / short)) for side in size)
    return width, height


def _loader(data: Headers, start: int, workers: int) -> Iterator[list[Any]]:
    """Blocks of what the data set makes, in order."""
    count = len(data.source)
    blocks = [range(first, min(first + BLOCK, count)) for first in range(start, count, BLOCK)]
    options: dict[str, Any] = {"batch_sampler": blocks, "num_workers": workers, "collate_fn": list}
    for block in DataLoader(data, **options):
        for item in block:
            if isinstance(item, UserError):
                raise item
        yield block


def _check(source: Source, short_side: int) -> None:
    if short_side < 1 or not len(source):
        raise UserError(f"short_side {short_side}, {len(source)} pictures: expected 1 or more of each")


def _end(size: CacheSize, count: int) -> int:
    """Bytes of the first `count` pictures."""
    return int((size.shapes[:count].prod(1) * 3).sum())


def _begun(folder: Path, size: CacheSize, short_side: int) -> list[int]:
    """Checksums of the blocks that an earlier build of the same cache has written; prepares the files of a new one."""
    table = np.concatenate([size.shapes, size.labels[:, None]], axis=1)
    if (folder / PROGRESS).exists():
        former = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        if former["short_side"] != short_side or not np.array_equal(np.load(folder / INDEX, allow_pickle=False), table):
            raise UserError(f"{folder} holds the beginning of a cache of something else: give another folder")
        checks: list[int] = former["checks"]
        return checks
    with atomic_writer(folder / INDEX) as file:
        np.save(file, table, allow_pickle=False)
    (folder / PICTURES).touch()
    write_json(folder / PROGRESS, {"short_side": short_side, "checks": []})
    return []


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"the cache needs {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free")
