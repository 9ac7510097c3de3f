"""Batches whose order and augmentation depend on (seed, epoch, index) alone: a run can stop and go on anywhere."""

from __future__ import annotations

import contextlib
import itertools
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from leap_shared.errors import UserError
from leap_shared.vision.config import AugmentationConfig, DataConfig
from leap_shared.vision.sources import Source

__all__ = ["Pictures", "Transform", "batches", "build_transform", "evaluation_loader", "train_loader"]

Transform = Callable[[Image.Image], Tensor]
Batch = tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]
UNREADABLE = (OSError, SyntaxError, ValueError, IndexError, struct.error, Image.DecompressionBombError)


def derive(*numbers: int) -> int:
    """A 64-bit seed from whole numbers, none of them negative."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, which timm, torchvision and dropout draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - timm draws from it
    torch.manual_seed(seed)


@contextlib.contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed the global generators of the CPU, and leave them at the end as they were."""
    python, legacy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - as above
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - as above
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002 - as above
        torch.set_rng_state(own)


def build_transform(data: DataConfig, augmentation: AugmentationConfig | None = None) -> Transform:
    """The training transform of timm with this augmentation; without one, the one for validation.

    Raises:
        UserError: timm does not know the `auto_augment` policy.
    """
    kind: dict[str, Any] = {"crop_pct": data.crop_fraction, "crop_mode": "squash" if data.squash else "center"}
    if augmentation is not None:
        kind = {
            "is_training": True,
            "scale": augmentation.scale,
            "ratio": augmentation.ratio,
            "hflip": augmentation.flip,
        }
        kind |= {"color_jitter": augmentation.colour_jitter or None, "auto_augment": augmentation.auto_augment}
        kind |= {"re_prob": augmentation.erasing, "re_mode": augmentation.erasing_mode}
    kind |= {"interpolation": data.interpolation, "mean": data.mean, "std": data.std}
    try:
        transform: Any = create_transform(data.image_size, **kind)
    except (AssertionError, KeyError, ValueError) as error:
        policy = f"auto_augment={kind.get('auto_augment')!r}"
        raise UserError(f"{policy} is no policy of timm ({error}): use e.g. rand-m9-mstd0.5-inc1") from error
    for step in transform.transforms:
        for operation in (*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))):
            if operation.aug_fn is posterize:
                operation.aug_fn = posterize_at_zero
    if augmentation is not None and augmentation.crop_padding is not None:
        transform.transforms[0] = transforms.RandomCrop(data.image_size, padding=augmentation.crop_padding)
    ready: Transform = transform
    return ready


def posterize_at_zero(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, where it keeps no bit too, which newer Pillow refuses: the picture becomes black, as with older ones."""
    kept: Image.Image = posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)
    return kept


class Pictures(Dataset[Any]):
    """Transformed pictures by (epoch, index); what cannot be read becomes a UserError in the picture's place."""

    def __init__(self, source: Source, transform: Transform, num_classes: int | None, seed: int) -> None:
        self.source, self.transform, self.num_classes, self.seed = source, transform, num_classes, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | UserError:
        epoch, index = key
        with isolated(derive(self.seed, epoch, index)):
            try:
                image, label = self.source[index]
                image, label = _picture(image), int(label)
            except UNREADABLE as error:
                return UserError(f"cannot read the picture {self._where(index)}: {error}: mend it or remove it")
            if label < 0 or (self.num_classes is not None and label >= self.num_classes):
                return UserError(
                    f"the label of {self._where(index)} is {label}, of {self.num_classes} classes: mend it"
                )
            return image if isinstance(image, Tensor) else self.transform(image), label

    def _where(self, index: int) -> str:
        where = getattr(self.source, "where", None)
        return str(where(index)) if where else f"number {index}"


def _picture(image: Any) -> Image.Image | Tensor:
    if isinstance(image, Tensor) and image.is_floating_point():
        return image
    if isinstance(image, (Tensor, np.ndarray)):
        image = to_pil_image(image)
    if not isinstance(image, Image.Image):
        raise UserError(f"it is a {type(image).__name__}, not a PIL image, uint8 array or tensor")
    return image.convert("RGB")


def _collate(items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, UserError)), None) or default_collate(items)


class TrainOrder:
    """Keys of one process's batches in one epoch, from update `start` on; what fills no global batch is left out.

    An update takes the next `shape` (accumulation x processes x batch size) pictures of the epoch's shuffled order, so
    the same pictures make an update under any split of the global batch.
    """

    def __init__(
        self, length: int, shape: tuple[int, int, int], *, seed: int, epoch: int, rank: int, start: int
    ) -> None:
        accumulation, world, size = shape
        self.updates = length // (accumulation * world * size)
        if not self.updates:
            batch = f"batch_size {size} x accumulation {accumulation} x {world} processes"
            raise UserError(
                f"{batch} is more than the {length} training pictures: lower one of them, accumulation to 1 say"
            )
        order = torch.randperm(length, generator=torch.Generator().manual_seed(derive(seed, epoch)))
        order = order[: self.updates * accumulation * world * size].view(-1, *shape)
        self.epoch, self.rows = epoch, order[start:, :, rank].flatten(0, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for row in self.rows:
            yield [(self.epoch, index) for index in row.tolist()]


def train_loader(pictures: Pictures, order: Iterable[Any], *, workers: int = 0, pin: bool = False) -> DataLoader[Any]:
    """Loader of the pictures under these keys."""
    options: dict[str, Any] = {"batch_sampler": order, "num_workers": workers, "pin_memory": pin}
    return DataLoader(pictures, collate_fn=_collate, generator=torch.Generator(), **options)


def evaluation_loader(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    num_classes: int | None = None,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
    pin: bool = False,
) -> DataLoader[Any]:
    """Loader of all pictures in order, each once; of many processes, the `share` (rank, number of processes)."""
    own = range(share[0], len(source), share[1])
    keys = [[(0, index) for index in own[first : first + batch_size]] for first in range(0, len(own), batch_size)]
    return train_loader(Pictures(source, transform, num_classes, 0), keys, workers=workers, pin=pin)


def batches(loader: Iterable[Any]) -> Iterator[Batch]:
    """Batches of a loader.

    Raises:
        UserError: naming the picture that cannot be read.
    """
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def check_classes(names: Sequence[str] | None, validation: Sequence[str] | None) -> None:
    """Raise a UserError where a label does not mean the same class in training and in validation."""
    if names is not None and validation is not None and tuple(validation) != tuple(names[: len(validation)]):
        odd = sorted(set(names) ^ set(validation))[:5] or "their order"
        raise UserError(f"training and validation differ in their classes ({odd}): give both the same ones")
