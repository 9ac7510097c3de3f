"""Pictures with labels by index, from folders, tar shards, arrays and Hugging Face data sets."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leap_shared.errors import UserError

__all__ = ["Source", "class_names", "open_source"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@runtime_checkable
class Source(Protocol):
    """Any map-style data set of (picture, label): a PIL image, a uint8 array H x W x 3 or a uint8 tensor 3 x H x W.

    Tensors of floats are taken as they are, without any transform. Where the source also has `classes` (names),
    `labels` (all, as an array) or `where(index)` (a path, for error messages), they are used.
    """

    def __len__(self) -> int:
        """Number of pictures."""

    def __getitem__(self, index: int, /) -> Any:
        """Picture and label."""


class FileSource:
    """Encoded pictures that are files or parts of files.

    Args:
        paths: the files.
        rows: of each picture, the index of its file, its first byte, its length (-1: to the end) and its label.
        names: of the pictures, for error messages.
        classes: names of the classes, where they have any.
    """

    def __init__(
        self, paths: list[Path], rows: list[tuple[int, int, int, int]], names: list[str], classes: list[str] | None
    ) -> None:
        self.paths, self.rows, self.names, self.classes = paths, np.asarray(rows), names, classes
        self.labels = self.rows[:, 3]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, offset, size, label = self.rows[index].tolist()
        with self.paths[path].open("rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size))), label

    def where(self, index: int) -> str:
        return self.names[index]


def _open_folder(root: Path) -> FileSource:
    """One folder of pictures per class, classes in alphabetical order, as in torchvision's ImageFolder."""
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found:
            raise UserError(f"{root / name} has no pictures ({', '.join(SUFFIXES)}): add some or remove the folder")
        paths, labels = paths + found, labels + [label] * len(found)
    if not paths:
        raise UserError(f"{root} has no folders of classes: expected {root}/CLASS/PICTURE.jpg")
    rows = [(index, 0, -1, label) for index, label in enumerate(labels)]
    return FileSource(paths, rows, [str(path) for path in paths], classes)


def _open_shards(pattern: str) -> FileSource:
    """Local tar files in webdataset's layout: members KEY.jpg (or another picture) and KEY.cls (the label's digits).

    The headers are read once; every picture is then found by its offset, so any order can be gone through and resumed.
    """
    found = [path for name in map(Path, _expand(pattern)) for path in (sorted(name.parent.glob(name.name)) or [name])]
    rows: list[tuple[int, int, int, int]] = []
    names: list[str] = []
    for shard, path in enumerate(found):
        pictures: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    key, _, suffix = base.partition(".")
                    if f".{suffix.lower()}" in SUFFIXES:
                        pictures[f"{folder}/{key}"] = member
                    elif suffix == "cls" and (content := tar.extractfile(member)):
                        labels[f"{folder}/{key}"] = int(content.read())
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(f"cannot read {path}: {error}: expected a local, uncompressed tar of shards") from error
        if not pictures or pictures.keys() != labels.keys():
            odd = sorted(pictures.keys() ^ labels.keys())[:3] or "it is empty"
            raise UserError(f"{path} lacks a picture or its .cls label ({odd}): write both under each key")
        rows += [(shard, member.offset_data, member.size, labels[key]) for key, member in pictures.items()]
        names += [f"{member.name} in {path}" for member in pictures.values()]
    return FileSource(found, rows, names, None)


def _expand(pattern: str) -> list[str]:
    """Names that a pattern with numeric ranges as ``{000..012}`` stands for."""
    match = RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [name for number in numbers for name in _expand(pattern[: match.start()] + number + pattern[match.end() :])]


class ArraySource:
    """Pictures that are in memory as one uint8 array."""

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as content:
                self.images, self.labels = content["images"], content["labels"]
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {path}: {error}: expected an .npz file with images and labels") from error
        shape, labels = self.images.shape, self.labels
        if self.images.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            raise UserError(f"images in {path} are {self.images.dtype} {shape}: expected uint8 N x H x W (x 3)")
        if labels.shape != shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
            raise UserError(f"labels in {path} are {labels.dtype} {labels.shape}: expected {shape[0]} whole numbers")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[index], int(self.labels[index])


class HuggingFaceSource:
    """One split of a data set of the `datasets` package; columns of the types Image and ClassLabel unless named."""

    def __init__(self, name: str, split: str, image_column: str | None, label_column: str | None) -> None:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise UserError(f'{name} needs Hugging Face datasets: pip install "leap-shared[datasets]"') from error
        try:
            if name.startswith("hf:"):
                repository, _, revision = name.removeprefix("hf:").partition("@")
                data = datasets.load_dataset(repository, split=split, revision=revision or None)
            else:
                data = datasets.load_from_disk(name)
            self.data = data[split] if isinstance(data, datasets.DatasetDict) else data
        except (OSError, KeyError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"cannot load the split {split!r} of {name}: {reason}") from error
        self.name, kinds = name, dict(self.data.features)
        found = {type(kind): column for column, kind in kinds.items()}
        self.image = image_column or found.get(datasets.Image, "image")
        self.label = label_column or found.get(datasets.ClassLabel, "label")
        if not {self.image, self.label} <= kinds.keys():
            raise UserError(f"{name} has the columns {', '.join(kinds)}: set image_column and label_column")
        if isinstance(kinds[self.label], datasets.ClassLabel):
            self.classes = tuple(kinds[self.label].names)
        else:
            self.labels = np.asarray(self.data[self.label])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.data[index]
        return row[self.image], row[self.label]

    def where(self, index: int) -> str:
        return f"row {index} of {self.name}"


def open_source(
    name: str, split: str = "train", image_column: str | None = None, label_column: str | None = None
) -> Source:
    """The pictures that `DataConfig` describes.

    Raises:
        UserError: there is nothing, nothing readable, or no pictures with labels.
    """
    path = Path(name)
    if name.startswith("hf:") or any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
        return HuggingFaceSource(name, split, image_column, label_column)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix in (".npz", ".tar"):
        return ArraySource(path) if path.suffix == ".npz" else _open_shards(name)
    raise UserError(f"no pictures at {name}: expected a folder of class folders, .tar shards, an .npz file or hf:NAME")


def class_names(source: Source) -> Sequence[str] | None:
    """Names of the classes where the source knows them, else their numbers where it knows all labels."""
    names: Sequence[str] | None = getattr(source, "classes", None)
    labels = getattr(source, "labels", None)
    if names is None and isinstance(labels, np.ndarray):
        return [str(number) for number in range(int(labels.max()) + 1)]
    return names
